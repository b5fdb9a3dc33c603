"""Preference data: responses to one prompt, best first, or single responses that are labelled good or bad."""

from __future__ import annotations

import logging
from typing import Any

from leyden.batch.forest import Tree
from leyden.data.step_plan import StepPlan, Trees
from leyden.datamodules.file_data import StoredRows
from leyden.datamodules.formats.ranking import compared
from leyden.datamodules.storage.arrow import Store, Subset
from leyden.datamodules.storage.mismatched import Mismatched
from leyden.datamodules.storage.truncation import at, distinct_responses
from leyden.errors import UserError
from leyden.example import Example

log = logging.getLogger("leyden")


class PreferenceData(StoredRows):
    """Rows of any preference format: two or more responses to each prompt, the better before the worse.

    Of responses that tie, or repeat each other, only the first is compared with the others. Rows with the same prompt
    are held out together. The scores of a row become the batch's `score`; margins are their differences.

    An algorithm that takes single responses (`unpaired`: KTO, BCO) is given rows of `prompt, response, label`, with the
    score 1 where the response is good and 0 where it is bad. A row of responses that are compared gives it two: the
    best as a good one and the worst as a bad one.

    Args:
        min_gap: least difference of the scores of two responses. From the best down, a response closer than this to the
            last one kept is left out, so that no pair is closer. It applies to pairs with scores or a margin.
        max_responses: most responses of a row that are compared: 2 keeps the best and the worst, more keeps some
            evenly between them.
    """

    kind = "preference"

    def __init__(self, *args: Any, min_gap: float = 0.0, max_responses: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not min_gap >= 0:
            raise UserError(f"--data.min_gap {min_gap}: a gap between scores is 0 or more")
        if max_responses is not None and max_responses < 2:
            raise UserError(f"--data.max_responses {max_responses}: a comparison takes two; give 2 or more")
        self.min_gap, self.max_responses = min_gap, max_responses
        self._mismatched = False

    def read_for(self, algorithm: Any) -> None:
        """Read rows as an algorithm, or its class, takes them: to be called before anything is read.

        Raises:
            UserError: an option compares responses, and the algorithm takes single ones.
        """
        if not getattr(algorithm, "unpaired", False):
            return
        if self.min_gap or self.max_responses is not None:
            option = "min_gap" if self.min_gap else "max_responses"
            raise UserError(
                f"--data.{option}: of responses that are compared, and here each stands alone; leave it out"
            )
        self.kind, self._mismatched = "unpaired", bool(getattr(algorithm, "mismatched", False))

    def prepare_data(self) -> None:
        self.read_for(self._trainer().lightning_module)
        super().prepare_data()

    def setup(self, stage: str) -> None:
        self.read_for(self._trainer().lightning_module)
        super().setup(stage)
        if self.kind == "unpaired" and stage == "fit":
            self._check_labels()

    def _check_labels(self) -> None:
        """That there are good and bad responses among the rows to train on."""
        labels = [label for store in self._stores[: len(self.paths)] for label in store.labels]
        if len(set(labels)) == 1:
            alike = "good; add bad ones too, or train on these with --config sft" if labels[0] else "bad; add good ones"
            raise UserError(f"{', '.join(self.paths)}: all {len(labels):,} answers are labelled {alike}")
        if self._trainer().global_rank == 0:
            good = int(sum(labels))
            log.info("labels: %s good, %s bad", f"{good:,}", f"{len(labels) - good:,}")

    def encode(self, example: Example) -> list[Tree]:
        if self.kind == "unpaired":
            tree = self.template.encode(example)
            tree.scores = example.scores
            return [at(tree, [number]) for number in range(len(tree.responses))]
        chosen = compared(example, self.min_gap, self.max_responses)
        tree = self.template.encode(chosen)
        tree.scores = chosen.scores
        return [distinct_responses(tree)]

    def places(self, rows: list[tuple[int, int]]) -> list[Any]:
        prompts = [store.prompts() for store in self._stores]
        return [prompts[store][row] for store, row in rows]

    def trees(self, rows: list[tuple[int, int]]) -> Trees:
        own = Subset(self._stores, rows)
        return Mismatched(own, self.places(rows), self.longest_row) if self._mismatched else own

    def row_lengths(self) -> tuple[list[int], int]:
        lengths, longest = super().row_lengths()
        if not self._mismatched:
            return lengths, longest
        stores = [Store(self._stored(path)) for path in self.paths]
        rows = Subset(stores, [(s, i) for s, store in enumerate(stores) for i in range(len(store))])
        prompts = [prompt for store in stores for prompt in store.prompts()]
        return list(Mismatched(rows, prompts, longest).lengths), longest

    def train_plan(self) -> StepPlan:
        """The optimizer steps of one epoch. Raises `UserError` where a row with all its responses does not fit."""
        if self._planned is None and self.train_trees is not None:
            lengths = self.train_trees.lengths
            row = max(self.train_rows(), key=lambda index: lengths[index], default=None)
            if row is not None and lengths[row] > self.max_tokens:
                tree = self.train_trees[row]
                fewer = "--data.max_responses 2" if len(tree.responses) > 2 else "a lower --data.max_length"
                raise UserError(
                    f"{self.source(tree.row)}: a prompt of {len(tree.prompt)} tokens with its {len(tree.responses)} "
                    f"responses has {lengths[row]} tokens but a micro-batch holds {self.max_tokens}; set "
                    f"--data.max_tokens {lengths[row]} or more, or {fewer}"
                )
        return super().train_plan()
