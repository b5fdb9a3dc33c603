"""The step plan: the rows of every optimizer step, decided before training from their lengths alone.

Planning ahead is what makes means exact: every micro-batch can carry the totals of its whole optimizer step. It also
keeps every row (none dropped, none counted twice), balances micro-batches by tokens over accumulation and ranks, and
resumes to the batch.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from leyden.batch.forest import Batch, Totals, Tree, pack
from leyden.errors import UserError

log = logging.getLogger("leyden")


class Trees(Protocol):
    """Tokenised examples on disk or in memory: lengths and totals are known without reading the tokens."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tree: ...

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each tree."""

    @property
    def totals(self) -> Sequence[Totals]:
        """What each tree adds to the totals of its step."""


@dataclass(frozen=True)
class StepPlan:
    """Optimizer steps, each cut into the same number of micro-batches: `steps[s][m]` are indices of rows.

    Micro-batch m belongs to accumulation m // world and rank m % world.
    """

    steps: list[list[list[int]]]
    """Step -> micro-batch -> rows."""
    world: int = 1
    """Number of processes."""

    @property
    def accumulate(self) -> int:
        """Micro-batches of one process in a step."""
        return len(self.steps[0]) // self.world if self.steps else 1


def balance(rows: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Spread rows over `parts` bins, the longest row first into the lightest bin; the heaviest bin comes first."""
    heap: list[tuple[int, int]] = [(0, part) for part in range(parts)]
    bins: list[list[int]] = [[] for _ in range(parts)]
    for row in sorted(rows, key=lambda r: -lengths[r]):
        load, part = heapq.heappop(heap)
        bins[part].append(row)
        heapq.heappush(heap, (load + lengths[row], part))
    return sorted(bins, key=lambda one: -sum(lengths[r] for r in one))


def plan_steps(
    rows: Sequence[int],
    lengths: Sequence[int],
    batch_size: int,
    max_tokens: int,
    accumulate: int = 1,
    world: int = 1,
    seed: int | None = None,
) -> StepPlan:
    """Cut rows into optimizer steps of `batch_size` rows, shuffled by `seed` (None keeps their order).

    Args:
        rows: indices of rows, repeated where a row is to be seen more than once an epoch.
        lengths: tokens of each row by index.
        max_tokens: most tokens in one micro-batch.
        accumulate: micro-batches a rank runs in one step.
        world: number of ranks.

    Raises:
        UserError: a row or a micro-batch is longer than `max_tokens`; it names the setting that fits.
    """
    if accumulate < 1:
        raise UserError(f"--trainer.accumulate_grad_batches {accumulate}: a step has at least one micro-batch; give 1")
    longest = max((lengths[r] for r in rows), default=0)
    if longest > max_tokens:
        raise UserError(
            f"the longest row has {longest} tokens but a micro-batch holds {max_tokens}; "
            f"set --data.max_tokens {longest} or more, or --data.max_length {max_tokens} or less"
        )
    order = list(rows)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    steps = [balance(chunk, lengths, accumulate * world) for chunk in chunks]
    heaviest = max((sum(lengths[r] for r in step[0]) for step in steps), default=0)
    if heaviest > max_tokens:
        fits = _accumulation_that_fits(chunks, lengths, max_tokens, accumulate + 1, world)
        raise UserError(
            f"a micro-batch would hold {heaviest} tokens but --data.max_tokens is {max_tokens}; "
            f"set --trainer.accumulate_grad_batches {fits}, --data.max_tokens {heaviest} or a smaller --data.batch_size"
        )
    return StepPlan(steps, world)


def _accumulation_that_fits(
    chunks: list[list[int]], lengths: Sequence[int], max_tokens: int, start: int, world: int
) -> int:
    """The least accumulation with which every micro-batch fits; one row a micro-batch always does."""
    needed = start
    for chunk in chunks:
        while sum(lengths[r] for r in balance(chunk, lengths, needed * world)[0]) > max_tokens:
            needed += 1
    return needed


class PlannedLoader:
    """The micro-batches of one rank, in an order that depends only on seed and epoch. Sized and resumable.

    The steps are permuted from epoch to epoch. In the first epoch the step with the longest micro-batch comes first, so
    that what does not fit the memory shows at once. The length keeps Lightning from fetching ahead; `state_dict` counts
    batches delivered.

    Args:
        trees: tokenised examples.
        plan: which of them make which step.
        rank: which share of every step to deliver.
        seed: of the order of steps; None keeps it the same in every epoch.
        whole: totals over the whole plan instead of over each step (validation).
    """

    rows = ""
    """What the rows are, as the DataModule's fingerprint says it."""

    def __init__(
        self, trees: Trees, plan: StepPlan, rank: int = 0, seed: int | None = None, whole: bool = False
    ) -> None:
        self.trees, self.plan, self.rank, self.seed = trees, plan, rank, seed
        self.whole = self._totals(range(len(plan.steps))) if whole else None
        self.epoch, self.done, self._resume = -1, 0, False

    def __len__(self) -> int:
        return len(self.plan.steps) * self.plan.accumulate

    def _totals(self, steps: Sequence[int]) -> Totals:
        rows = (r for s in steps for micro in self.plan.steps[s] for r in micro)
        return sum((self.trees.totals[r] for r in rows), Totals(0.0, 0, 0))

    def order(self, epoch: int) -> list[int]:
        """The numbers of the steps in the order of an epoch."""
        if self.seed is None:
            return list(range(len(self.plan.steps)))
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (epoch + 1))
        order: list[int] = torch.randperm(len(self.plan.steps), generator=generator).tolist()
        if epoch == 0:
            order.insert(0, order.pop(order.index(self._longest)))
        return order

    @cached_property
    def _longest(self) -> int:
        """The step whose largest micro-batch has the most tokens; of equal ones the first."""
        lengths = self.trees.lengths
        sizes = [max(sum(lengths[r] for r in micro) for micro in step) for step in self.plan.steps]
        return sizes.index(max(sizes))

    def __iter__(self) -> Iterator[Batch]:
        if not self._resume:
            self.epoch, self.done = self.epoch + 1, 0
        self._resume = False
        order = self.order(self.epoch)
        while self.done < len(self):
            step, part = order[self.done // self.plan.accumulate], self.done % self.plan.accumulate
            self.done += 1
            yield self.batch(step, part)

    def batch(self, step: int, part: int) -> Batch:
        """One micro-batch; without rows left for it, a few tokens of weight 0 that every rank can run."""
        totals = self.whole or self._totals([step])
        rows = self.plan.steps[step][part * self.plan.world + self.rank]
        if not rows:
            somewhere = self.trees[self.plan.steps[step][0][0]]
            return pack([Tree((somewhere.prompt + somewhere.responses[0])[:2], [])], totals)
        return pack([self.trees[r] for r in rows], totals)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of what makes the order of batches (by the second of the rules there have been), the same on every
        rank."""
        return hashlib.sha256(repr((2, self.plan.steps, self.plan.world, self.seed)).encode()).hexdigest()[:16]

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, in an epoch and in its plan."""
        return {
            "epoch": self.epoch,
            "done": self.done,
            "length": len(self),
            "plan": self.fingerprint,
            "rows": self.rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that were delivered.

        Raises:
            UserError: the checkpoint is from the middle of an epoch of other rows, or of other batches of them.
        """
        self.epoch, self.done = state["epoch"], state["done"]
        self._resume = self.done < state["length"]
        if self.rows != state["rows"]:
            if self._resume:
                raise UserError(
                    "the checkpoint is from the middle of an epoch, and its rows were others than these: put the data "
                    "back that it was trained on (--data.path and the options that change rows), or resume from the "
                    "end of an epoch"
                )
            log.info("the rows are others than those that the checkpoint was trained on; the next epoch takes the new")
        if self._resume and state["plan"] != self.fingerprint:
            raise UserError(
                "the checkpoint is from the middle of an epoch that was planned differently: its data, batch_size, "
                "accumulation, number of processes and seed must be the same; resume with them, or from the end of an "
                "epoch"
            )


def limited(batches: int, limit: int | float) -> int:
    """How many of `batches` batches Lightning's `limit_*_batches` leaves: an integer counts, a float is a share."""
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)
