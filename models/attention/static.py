"""The decode step with fixed shapes: what a CUDA graph needs, which replays the same kernels on the same memory.

Rows and prompts have places that never move, and every tensor has room for all of them. A row writes its newest key
into the column of its own age and sees the columns up to it, so that rows of any age stand side by side. Places that
nothing occupies compute along, and nobody reads what they give. Only the number of columns grows, in few sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leyden.models.attention.cached import CachedStep, Masks, additive
from leyden.models.attention.kv_cache import KVCache, Layer, close, closing


class StaticPlan:
    """The assignment of rows to prompts, and what stands in each row: one block of integers on the device, so that one
    copy from the host changes all of it.

    Args:
        rows, prompts: number of places, R and P.
        most: largest number of rows of one prompt, m.
        longest: tokens of the longest prompt.
    """

    def __init__(self, rows: int, prompts: int, most: int, longest: int, device: torch.device) -> None:
        self.rows, self.most, self.longest = rows, most, longest
        sizes = [rows, rows, rows, rows, prompts * most, prompts]
        self.numbers = torch.zeros(sum(sizes), dtype=torch.long, device=device)
        self.tokens, self.position, self.age, self.back, self.there, self.lengths = torch.split(self.numbers, sizes)
        """[R] newest token, its position, number of the row's earlier tokens, place in the layout [P, m] of queries;
        [P * m] the row in each place of the layout, arbitrary in empty ones; [P] number of tokens of each prompt"""
        self.row = torch.arange(rows, device=device)

    def copy_from(self, numbers: Sequence[int]) -> None:
        """Replace all integers, in the order of the attributes, without waiting for the device."""
        host = torch.tensor(numbers, pin_memory=self.numbers.is_cuda)
        self.numbers.copy_(host, non_blocking=True)


class StaticCache(KVCache):
    """The KV cache of all layers for fixed shapes, with the methods of `Cache`. What it speaks of by index are the
    prompts and rows that are there, without gaps; their places on the device lie anywhere.

    Args:
        rows, prompts: number of places.
        most: largest number of rows of one prompt.
        longest: tokens of the longest prompt.
        columns: room for the sampled tokens of a row.
        device: device of the model.
    """

    def __init__(self, rows: int, prompts: int, most: int, longest: int, columns: int, device: torch.device) -> None:
        super().__init__(rows, prompts, longest)
        self._columns = columns
        self.plan = StaticPlan(rows, prompts, most, longest, device)
        self.lengths: list[int] = []
        """Number of tokens of each prompt."""
        self.owner: list[int] = []
        """Index of each row's prompt."""
        self.prompt_place: list[int] = []
        self.row_place: list[int] = []
        self._free_prompts, self._free_rows = [*range(prompts)][::-1], [*range(rows)][::-1]

    @property
    def columns(self) -> int:
        return self._columns

    def open(self, lengths: Sequence[int]) -> list[int]:
        places = [self._free_prompts.pop() for _ in lengths]
        self.lengths += lengths
        self.prompt_place += places
        return places

    def enter(self, prompts: Sequence[int]) -> None:
        """Begin a row for each of these prompts, given by index."""
        self.owner += prompts
        self.row_place += [self._free_rows.pop() for _ in prompts]

    def leave(self, gone: Sequence[int]) -> None:
        """End the rows of these indices; the gaps are filled as in `close`."""
        self._free_rows += [self.row_place[i] for i in gone]
        close(self.owner, gone)
        close(self.row_place, gone)

    def forget(self, gone: Sequence[int]) -> None:
        """Drop prompts that have no rows left; the gaps are filled as in `close`."""
        self._free_prompts += [self.prompt_place[i] for i in gone]
        moved = {source: to for to, source in closing(len(self.lengths), gone)}
        self.owner = [moved.get(prompt, prompt) for prompt in self.owner]
        close(self.lengths, gone)
        close(self.prompt_place, gone)

    def arrange(self, newest: Sequence[tuple[int, int, int]]) -> None:
        """Put every row in its place: its newest token, the position of that, and the number of tokens before it."""
        plan, rows, prompts = self.plan, self.rows, self.prompts
        numbers = [[0] * rows for _ in range(4)]
        there, lengths, taken = [0] * (prompts * plan.most), [1] * prompts, [0] * prompts
        for index, length in enumerate(self.lengths):
            lengths[self.prompt_place[index]] = length
        for row, prompt, of_row in zip(self.row_place, self.owner, newest, strict=True):
            place = self.prompt_place[prompt]
            in_layout = place * plan.most + taken[place]
            taken[place] += 1
            there[in_layout] = row
            for column, number in zip(numbers, (*of_row, in_layout), strict=True):
                column[row] = number
        plan.copy_from([number for part in (*numbers, there, lengths) for number in part])


class StaticStep(CachedStep):
    """Decode step of all places, with keys of the first `columns` columns."""

    def __init__(self, cache: StaticCache, columns: int) -> None:
        super().__init__(cache, cache.plan)
        self.columns, self.seen = columns, slice(0, columns)

    def store(self, layer: Layer, key: Tensor, value: Tensor) -> None:
        for buffer, x in zip(layer.own, (key, value), strict=True):
            buffer[self.plan.row, :, self.plan.age] = x[0].transpose(0, 1)

    def masks(self, window: int | None) -> Masks:
        plan = self.plan
        if window is not None and plan.longest + self.columns < window:
            window = None
        if window not in self._masks:
            position, column = (torch.arange(n, device=plan.age.device) for n in (plan.longest, self.columns))
            prompt_seen = (position < plan.lengths[:, None])[:, None, None]
            back = plan.age[:, None] - column  # how many tokens each column lies back
            own_seen = back >= 0
            if window is not None:
                query_position = plan.lengths[:, None] + plan.age[plan.there].view(len(plan.lengths), plan.most)
                prompt_seen = prompt_seen & (query_position[:, None, :, None] - position < window)
                own_seen = own_seen & (back < window)
            self._masks[window] = additive(prompt_seen), additive(own_seen[:, None, None])
        return self._masks[window]
