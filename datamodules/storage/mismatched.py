"""Rows with a second response that answers another prompt: what an estimate of a KL divergence is made from."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from functools import cached_property

from leyden.batch.forest import Totals, Tree
from leyden.batch.tree import BORROWED
from leyden.datamodules.storage.arrow import Subset
from leyden.datamodules.storage.split import shuffled
from leyden.rng import EVALUATION_SEED


class Mismatched:
    """Single responses, each with the response of another prompt beside it, whose score is `BORROWED`.

    Which one is borrowed depends on the rows alone, so it is the same however a step is cut, and in every epoch.
    What is borrowed counts in no totals.

    Args:
        rows: of one response each.
        prompts: something for each row that is the same where its prompt is.
        longest: most tokens of a prompt with a response; what is borrowed is cut to it.
    """

    def __init__(self, rows: Subset, prompts: Sequence[Hashable], longest: int) -> None:
        self.rows, self.longest, self.lender = rows, longest, lenders(prompts)
        self.totals: Sequence[Totals] = rows.totals

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tree:
        tree, other = self.rows[index], self.rows[self.lender[index]]
        room = self.longest - len(tree.prompt)
        weights = tree.weights or [[1.0] * len(tree.responses[0])]
        lent = (other.weights or [[1.0] * len(other.responses[0])])[0][:room]
        scores = [*(tree.scores or [0.0]), BORROWED]
        return Tree(tree.prompt, [*tree.responses, other.responses[0][:room]], scores, [*weights, lent], tree.row)

    @cached_property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row, with what it borrows."""
        own, prompts = self.rows.lengths, self.rows.prompt_lengths
        return [
            n + min(own[lender] - prompts[lender], self.longest - prompt)
            for n, prompt, lender in zip(own, prompts, self.lender, strict=True)
        ]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of these rows and of who borrows from whom."""
        return hashlib.sha256(f"{self.rows.fingerprint} {self.longest} {self.lender}".encode()).hexdigest()[:16]

    @property
    def largest_token(self) -> int:
        """At least the largest token id of these rows."""
        return self.rows.largest_token


def lenders(prompts: Sequence[Hashable]) -> list[int]:
    """For each row the number of the one that it borrows from: in an order drawn once for all, the next row of another
    prompt. Where there is one prompt only, it is some row of it."""
    order = shuffled(len(prompts), EVALUATION_SEED)
    lender = dict(enumerate(order))
    for place in reversed(range(2 * len(order))):  # twice round, so that the end knows what stands at the beginning
        here, after = order[place % len(order)], order[(place + 1) % len(order)]
        lender[here] = after if prompts[after] != prompts[here] else lender[after]
    return [lender[row] for row in range(len(order))]
