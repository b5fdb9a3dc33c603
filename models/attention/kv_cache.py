"""The KV cache for sampling, in which the keys and values of a prompt are stored once for all of its samples.

Keys of sampled tokens are stored in a ring of columns. At every step all rows write the same column, whenever they
began, and a row sees only the columns written since it began. So rows can start and end at any step, and nothing is
moved to make room. Attention does not depend on the order of columns, since positions are in the keys already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

COLUMNS = 32
"""Initial number of columns of a ring; it doubles when a row grows longer."""


def closing(size: int, gone: Sequence[int]) -> list[tuple[int, int]]:
    """Moves (to, from) that fill the places `gone` among `size` places, by moving the last ones there."""
    removed, remaining = set(gone), size - len(gone)
    movers = [i for i in range(remaining, size) if i not in removed]
    return list(zip(sorted(i for i in removed if i < remaining), movers, strict=True))


def close(items: list[Any], gone: Sequence[int]) -> None:
    """Remove the places `gone` from a list, by the moves of `closing`."""
    for to, source in closing(len(items), gone):
        items[to] = items[source]
    del items[len(items) - len(gone) :]


class Layer:
    """Keys and values of one attention layer, as [keys, values]."""

    def __init__(self, key: Tensor, value: Tensor, prompts: tuple[int, int], rows: tuple[int, int]) -> None:
        def zeros(x: Tensor, places: int, length: int) -> Tensor:
            return x.new_zeros(places, x.shape[1], length, x.shape[3])

        self.prompts = [zeros(x, *prompts) for x in (key, value)]
        """[P, K, L, D] of the prompts' tokens"""
        self.own = [zeros(x, *rows) for x in (key, value)]
        """[R, K, C, D] of the rows' sampled tokens"""


class KVCache(ABC):
    """Keys and values of all layers, with places for prompts and for rows.

    Args:
        rows: largest number of rows side by side.
        prompts: largest number of prompts at a time.
        longest: tokens of the longest prompt.
    """

    def __init__(self, rows: int, prompts: int, longest: int) -> None:
        self.rows, self.prompts, self.longest = rows, prompts, longest
        self.layers: list[Layer] = []
        """By the order in which a forward pass calls attention."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """Room for the sampled tokens of a row."""

    @abstractmethod
    def open(self, lengths: Sequence[int]) -> Sequence[int]:
        """Add prompts of these lengths, and return their places."""

    def layer(self, call: int, key: Tensor, value: Tensor) -> Layer:
        """Keys and values of attention call number `call` of a forward pass; allocated the first time.

        Calls are counted, not modules: one module may attend several times in a forward pass (DiffLlama).
        """
        if call == len(self.layers):
            self.layers.append(Layer(key, value, (self.prompts, self.longest), (self.rows, self.columns)))
        return self.layers[call]


class Cache(KVCache):
    """The KV cache of all layers, for prompts and for rows. Both occupy places 0, 1, 2 … without gaps.

    Args:
        rows: largest number of rows side by side.
        prompts: largest number of prompts at a time.
        longest: tokens of the longest prompt.
        device: device of the model.
    """

    def __init__(self, rows: int, prompts: int, longest: int, device: torch.device) -> None:
        super().__init__(rows, prompts, longest)
        self.device = device
        self.lengths: list[int] = []
        """Number of tokens of each prompt."""
        self.owner: list[int] = []
        """Place of each row's prompt."""
        self.born: list[int] = []
        """First step of each row."""
        self.now, self.at, self.filled = -1, -1, 0
        """Current step, the column that it writes, and the number of columns written so far."""
        self.stamp = torch.full((COLUMNS,), -1, device=device)
        """[C] the last step that wrote each column, -1 where none has"""
        self._plan: RowMap | None = None

    @property
    def columns(self) -> int:
        return len(self.stamp)

    @property
    def plan(self) -> RowMap:
        """Current assignment of rows to prompts."""
        if self._plan is None:
            self._plan = RowMap(self)
        return self._plan

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one row, in all layers."""
        buffers = (x for layer in self.layers for x in layer.own)
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in buffers)

    def open(self, lengths: Sequence[int]) -> Sequence[int]:
        self._plan = None
        self.lengths += lengths
        return range(len(self.lengths) - len(lengths), len(self.lengths))

    def enter(self, prompts: Sequence[int]) -> None:
        """Begin a row for each of these prompts, given by place."""
        self._plan = None
        self.owner += prompts
        self.born += [self.now + 1] * len(prompts)

    def leave(self, gone: Sequence[int]) -> None:
        """End the rows in the places `gone`; the gaps are filled as in `close`."""
        self._plan = None
        self._move([x for layer in self.layers for x in layer.own], len(self.owner), gone)
        close(self.owner, gone)
        close(self.born, gone)

    def forget(self, gone: Sequence[int]) -> None:
        """Drop prompts that have no rows left; the gaps are filled as in `close`."""
        self._plan = None
        self._move([x for layer in self.layers for x in layer.prompts], len(self.lengths), gone)
        moved = {source: to for to, source in closing(len(self.lengths), gone)}
        self.owner = [moved.get(prompt, prompt) for prompt in self.owner]
        close(self.lengths, gone)

    def _move(self, tensors: list[Tensor], size: int, gone: Sequence[int]) -> None:
        if moves := closing(size, gone):
            to, source = torch.tensor(moves, device=self.device).T
            for x in tensors:
                x[to] = x[source]

    def advance(self) -> None:
        """Begin a step: the next column, which no row needs any more, becomes the one to write."""
        if self.now + 1 - min(self.born) >= self.columns:
            self._grow()
        self.now += 1
        self.at = (self.at + 1) % self.columns
        self.filled = min(self.filled + 1, self.columns)
        self.stamp[self.at] = self.now

    def _grow(self) -> None:
        """Double the columns, with the oldest first, so that the next one to write is always the oldest."""
        old, rows = self.columns, len(self.owner)
        order = (torch.arange(old, device=self.device) + self.at + 1) % old
        for layer in self.layers:
            for i, x in enumerate(layer.own):
                layer.own[i] = x.new_zeros(*x.shape[:2], 2 * old, x.shape[3])
                layer.own[i][:rows, :, :old] = x[:rows][:, :, order]
        self.stamp = torch.cat([self.stamp[order], torch.full_like(self.stamp, -1)])
        self.at = old - 1


class RowMap:
    """Assignment of rows to prompts; valid until rows or prompts are added or removed.

    P prompts, R rows, and at most m rows per prompt: queries to the prompts' keys are laid out as [P, m].
    """

    def __init__(self, cache: Cache) -> None:
        rows_of: list[list[int]] = [[] for _ in cache.lengths]
        for row, prompt in enumerate(cache.owner):
            rows_of[prompt].append(row)
        self.most, self.longest = max(map(len, rows_of)), max(cache.lengths)
        self.padded = len(set(cache.lengths)) > 1
        self.oldest, self.youngest = min(cache.born), max(cache.born)
        self._there = [row for rows in rows_of for row in [*rows, *[-1] * (self.most - len(rows))]]
        self._numbers, self._device = (cache.lengths[:], cache.born[:]), cache.device

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, device=self._device)

    @cached_property
    def lengths(self) -> Tensor:
        """[P] number of tokens of each prompt"""
        return self._tensor(self._numbers[0])

    @cached_property
    def born(self) -> Tensor:
        """[R] first step of each row"""
        return self._tensor(self._numbers[1])

    @cached_property
    def there(self) -> Tensor | None:
        """[P * m] the row in each place of the layout, arbitrary in empty places; None if it is the rows in order"""
        if self._there == [*range(len(self._numbers[1]))]:
            return None
        return self._tensor([max(0, row) for row in self._there])

    @cached_property
    def back(self) -> Tensor:
        """[R] place of each row in the layout"""
        place = {row: place for place, row in enumerate(self._there)}
        return self._tensor([place[row] for row in range(len(self._numbers[1]))])
