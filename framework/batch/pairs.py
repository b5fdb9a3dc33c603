"""Pairs of responses to one prompt, of which one is better, and tables of ranked responses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leyden.batch.forest import Batch


class Pairs(NamedTuple):
    """M pairs of responses to the same prompt; see `preference_pairs`."""

    better: Tensor
    """[M] int64, number of the better response"""
    worse: Tensor
    """[M] int64, number of the worse one"""
    share: Tensor
    """[M] float32, 1 / pairs of its prompt: all prompts weigh the same, however many responses they have"""

    def mean(self, batch: Batch, x: Tensor) -> Tensor:
        """This batch's share of the step's mean over prompts of the mean of `x` [M] over each prompt's pairs."""
        return batch.prompt_mean(x * self.share)

    def only(self, batch: Batch, kept: Tensor) -> Pairs:
        """The pairs where `kept` [M] bool is true: these share their prompt's weight, and the others have none."""
        count = torch.zeros(len(batch.row), device=kept.device).index_add(0, batch.group[self.better], kept.float())
        return self._replace(share=kept / count.clamp_min(1)[batch.group[self.better]])


def preference_pairs(batch: Batch) -> Pairs:
    """All pairs of responses to one prompt, which stand best first: K responses give K (K - 1) / 2 pairs.

    Args:
        batch: of prompts with two responses or more.
    """
    better, worse, share = [], [], []
    for mine in responses_by_prompt(batch):
        pairs = [(a, b) for i, a in enumerate(mine) for b in mine[i + 1 :]]
        better += [a for a, _ in pairs]
        worse += [b for _, b in pairs]
        share += [1 / max(len(pairs), 1)] * len(pairs)
    numbers = (torch.tensor(x, dtype=torch.long) for x in (better, worse))
    columns = (*numbers, torch.tensor(share, dtype=torch.float32))
    return Pairs(*(x.to(batch.group.device, non_blocking=True) for x in columns))


def pairwise_wins(better: Tensor, worse: Tensor) -> Tensor:
    """1 where the better response comes out ahead, 0 where the worse does, a half where neither: [M], [M] -> [M].

    Args:
        better: [M] measure of the better responses.
        worse: [M] the same of the worse ones.
    """
    return 0.5 + 0.5 * (better - worse).sign()


def rank_table(batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [N] with one row per prompt of `batch`, best response first.

    Returns:
        Values [P, K], and [P, K] bool, False on padding.
    """
    numbers = responses_by_prompt(batch)
    most = max(map(len, numbers), default=0)
    rows = [mine + [-1] * (most - len(mine)) for mine in numbers]
    table = torch.tensor(rows, dtype=torch.long, device=x.device).reshape(len(rows), most)
    mask = table >= 0
    return torch.where(mask, x[table], 0.0) if len(x) else x.new_zeros(table.shape), mask


def responses_by_prompt(batch: Batch) -> list[list[int]]:
    """Numbers of the responses to each prompt, as plain numbers, without a copy from the device."""
    numbers = [[number for number, _, _ in span.responses] for span in batch.structure() if span.responses]
    if len(numbers) != len(batch.row):  # unshared: a prompt stands once for each of its responses
        numbers = [[] for _ in batch.row]
        for number, group in enumerate(batch.group.tolist()):
            numbers[group].append(number)
    return numbers
