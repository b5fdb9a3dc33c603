"""The contract of DataModules, and those that plan their batches ahead."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from leyden.data.step_plan import PlannedLoader, StepPlan, Trees, limited, plan_steps
from leyden.errors import UserError
from leyden.fingerprint import fingerprint_trees
from leyden.rng import EVALUATION_SEED, resolve_seed


class DataModule(LightningDataModule):
    """What algorithms ask of data. Derive from `PlannedData` where rows are trained on as they are, and from this class
    where something else is handed on, such as prompts.

    Args:
        batch_size: examples in one optimizer step (or prompts in one rollout), over all ranks and accumulated
            micro-batches.
        max_tokens: most tokens in one micro-batch: what fits the device.
        seed: of the order of rows, and of rows drawn where a file counts in part; None is that of `--seed_everything`.
            What is held out does not depend on it, so that seeds can be compared.
    """

    chat_template: str | None = None
    """The Jinja chat template used instead of the tokenizer's own, if any."""
    fingerprint: str = ""
    """Hex digits that differ where the training rows do, as they are trained on; not where their files stand."""
    longest_row: int = 0
    """Tokens of the longest row there is: the positions that a model needs."""

    def __init__(self, batch_size: int = 32, max_tokens: int = 16384, seed: int | None = None) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"--data.batch_size {batch_size}: a step needs at least one example; give 1 or more")
        self.batch_size, self.max_tokens, self.seed = batch_size, max_tokens, resolve_seed(seed)

    @abstractmethod
    def source(self, row: int) -> str:
        """Where an example stands, as `file:line`, by the stable id that batches carry."""

    @property
    def row_sizes(self) -> tuple[int, int]:
        """Fewest and most tokens in one micro-batch of training, as far as that is known."""
        return 1, self.max_tokens

    @property
    def held_sizes(self) -> tuple[int, int] | None:
        """The same of validation; None where nothing is held out."""
        return self.row_sizes

    def find_token(self, least: int) -> tuple[int, int] | None:
        """The first row with a token id of at least this, and the id; None where there is none or it is not known."""
        return None

    def val_dataloader(self) -> Any:
        """Held-out rows; none by default."""
        return []

    def test_dataloader(self) -> Any:
        raise UserError("there is nothing to test on; give --data.test_path FILE")

    def _trainer(self) -> Any:
        if self.trainer is None:
            raise RuntimeError("a DataModule needs a Trainer; pass it to trainer.fit(model, datamodule=...)")
        return self.trainer


class PlannedData(DataModule):
    """Plans batches over tokenised examples and hands them to the algorithm.

    A subclass sets `train_trees` (and `val_trees`, `test_trees` where there are such rows) in `setup`.
    """

    train_trees: Trees | None = None
    val_trees: Trees | None = None
    test_trees: Trees | None = None
    _planned: StepPlan | None = None

    @abstractmethod
    def source(self, row: int) -> str:
        """Where an example stands, as for every DataModule."""

    def train_rows(self) -> Sequence[int]:
        """Indices of the training rows of one epoch; a row may come more than once."""
        return range(len(self.train_trees or ()))

    def train_plan(self) -> StepPlan:
        """The optimizer steps of one epoch."""
        if self._planned is None:
            trainer, trees = self._trainer(), self.train_trees
            if trees is None or not len(self.train_rows()):
                raise UserError("no training rows are left; look at the counts above and at --data.path")
            if trainer.world_size > self.batch_size:
                raise UserError(
                    f"{trainer.world_size} processes share a step of {self.batch_size} rows, so some would never have "
                    f"one; set --data.batch_size {trainer.world_size} or more"
                )
            whole = plan_steps(
                self.train_rows(),
                trees.lengths,
                self.batch_size,
                self.max_tokens,
                trainer.accumulate_grad_batches,
                trainer.world_size,
                self.seed,
            )
            self._planned = whole
            if trainer.limit_train_batches:
                # cut in whole steps, so that totals stay exact, and only once: Lightning must not do it again
                micro = limited(len(whole.steps) * whole.accumulate, trainer.limit_train_batches)
                self._planned = StepPlan(whole.steps[: math.ceil(micro / whole.accumulate)], whole.world)
                trainer.limit_train_batches = 1.0
        return self._planned

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return len(self.train_plan().steps)

    @property
    def row_sizes(self) -> tuple[int, int]:
        assert self.train_trees is not None
        return _extremes(self.train_plan(), self.train_trees.lengths)

    @property
    def held_sizes(self) -> tuple[int, int] | None:
        if self.val_trees is None or not len(self.val_trees):
            return None
        rows = range(len(self.val_trees))  # a limit may leave only some of them
        return min(self.val_trees.lengths), _extremes(self._pass(self.val_trees, rows).plan, self.val_trees.lengths)[1]

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        return fingerprint_trees(self.train_trees or ())

    @property
    def longest_row(self) -> int:  # type: ignore[override]
        return max(
            (max(t.lengths, default=0) for t in (self.train_trees, self.val_trees, self.test_trees) if t), default=0
        )

    def find_token(self, least: int) -> tuple[int, int] | None:
        for trees in (self.train_trees, self.val_trees, self.test_trees):
            if trees is None or getattr(trees, "largest_token", least) < least:
                continue
            for tree in (trees[index] for index in range(len(trees))):
                last = max((max(ids, default=0) for ids in (tree.prompt, *tree.responses)), default=0)
                if last >= least:
                    return tree.row, last
        return None

    def train_dataloader(self) -> Any:
        assert self.train_trees is not None
        trainer = self._trainer()
        loader = PlannedLoader(self.train_trees, self.train_plan(), trainer.global_rank, self.seed)
        loader.rows = self.fingerprint
        return trainer.lightning_module.experience(loader)

    def _measure(self, trees: Trees | None, stage: str) -> Any:
        """A loader over held-out rows; totals are those of all of them, so that sums are exact means.

        Where `limit_*_batches` asks for fewer, they are drawn, always the same ones, and the totals are theirs.
        """
        trainer = self._trainer()
        limit = getattr(trainer, f"limit_{stage}_batches")
        if trees is None or not len(trees) or limit == 0:
            return []
        size = max(self.batch_size, trainer.world_size)
        kept = limited(math.ceil(len(trees) / size), limit) * size if isinstance(limit, int) else limit * len(trees)
        setattr(trainer, f"limit_{stage}_batches", 1.0)  # Lightning must not cut once more
        return self._pass(trees, _drawn(trees)[: max(int(kept), 1)])

    def _pass(self, trees: Trees, rows: Sequence[int]) -> PlannedLoader:
        """A loader over these rows, each once and by length, to be read without gradients."""
        trainer = self._trainer()
        size, budget = max(self.batch_size, trainer.world_size), max(self.max_tokens, max(trees.lengths))
        by_length = sorted(rows, key=lambda r: trees.lengths[r])
        while True:  # there is nothing to keep: fewer rows a batch where they do not fit
            try:
                whole = plan_steps(by_length, trees.lengths, size, budget, 1, trainer.world_size)
                break
            except UserError:
                size = max(size // 2, 1)
        return PlannedLoader(trees, whole, trainer.global_rank, whole=True)

    def all_rows(self) -> list[PlannedLoader]:
        """Loaders over all rows that training and validation will see, for what is worked out before training."""
        loaders = []
        if self.train_trees is not None:  # in the very batches of training: in half precision others round otherwise
            loaders.append(PlannedLoader(self.train_trees, self.train_plan(), self._trainer().global_rank))
        if self.val_trees is not None and len(self.val_trees):
            loaders.append(self._pass(self.val_trees, _drawn(self.val_trees)))
        return loaders

    def val_dataloader(self) -> Any:
        return self._measure(self.val_trees, "val")

    def test_dataloader(self) -> Any:
        return super().test_dataloader() if self.test_trees is None else self._measure(self.test_trees, "test")


def _extremes(plan: StepPlan, lengths: Sequence[int]) -> tuple[int, int]:
    """Fewest and most tokens in a micro-batch of a plan."""
    sizes = [sum(lengths[row] for row in rows) for step in plan.steps for rows in step]
    return max(min(sizes, default=1), 1), max(sizes, default=1)


def _drawn(trees: Trees) -> list[int]:
    """Held-out rows in the order in which a limit leaves them."""
    order: list[int] = torch.randperm(len(trees), generator=torch.Generator().manual_seed(EVALUATION_SEED)).tolist()
    return order
