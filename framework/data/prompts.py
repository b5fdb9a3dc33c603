"""Prompts that a policy answers, and the endless sequence in which rollouts draw them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from leyden.example import Example


class Prompt(NamedTuple):
    """A prompt to sample answers to."""

    row: int
    """A stable id, for errors."""
    example: Example
    """Its messages and the row they came from, so that rewards can see answers."""
    tokens: list[int]
    """Its token ids, up to where the answer begins."""
    answer: list[int] | None = None
    """Token ids of the row's own answer, where the algorithm trains on it (`OnPolicy.needs_answers`)."""


class PromptLoader:
    """An endless sequence of prompts, each once a pass in an order that depends only on seed and pass.

    Args:
        prompts: all there are.
        size: prompts in one rollout.
        seed: of the order.
    """

    def __init__(self, prompts: Sequence[Prompt], size: int, seed: int = 0) -> None:
        self.prompts, self.size, self.seed = prompts, size, seed

    def __len__(self) -> int:
        """Rollouts until every prompt has come."""
        return math.ceil(len(self.prompts) / self.size)

    def draw(self, rollout: int) -> list[tuple[int, Prompt]]:
        """The prompts of a rollout, where none are replaced; see `drawn`."""
        return self.drawn(range(rollout * self.size, (rollout + 1) * self.size))

    def drawn(self, numbers: Iterable[int]) -> list[tuple[int, Prompt]]:
        """The prompts of these places in the whole sequence, each with its number, which no other draw has."""
        orders: dict[int, list[int]] = {}
        drawn = []
        for number in numbers:
            turn, place = divmod(number, len(self.prompts))
            if turn not in orders:
                generator = torch.Generator().manual_seed(self.seed + 1_000_003 * turn)
                orders[turn] = torch.randperm(len(self.prompts), generator=generator).tolist()
            drawn.append((number, self.prompts[orders[turn][place]]))
        return drawn
