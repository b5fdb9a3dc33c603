"""The structure of one packed batch for attention, computed once and shared by all layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leyden.batch.forest import Batch


class AttentionArgs(NamedTuple):
    """A layer's options for attention, apart from the forest."""

    scale: float | None = None
    """factor on the scores; None is 1 / √D, D the head width"""
    dropout: float = 0.0
    window: int | None = None
    """sliding window: a query sees only keys that lie fewer than this many positions back"""
    softcap: float | None = None
    """scores z become softcap · tanh(z / softcap) before the softmax (Gemma 2)"""


@dataclass(frozen=True)
class MaskWindow:
    """What a layer gets in place of the sliding mask that its model would build: the mask's window.

    Some models tell the attention function of no window (Qwen2-MoE): only their masks know it.
    """

    size: int


class Segment(NamedTuple):
    """A causal piece of a row: queries [start, stop) see the keys [first, cut), and each other causally."""

    start: int
    stop: int
    first: int
    cut: int

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def before(self) -> int:
        """Number of its prompt's keys that a response sees; 0 for a segment that continues no other."""
        return self.cut - self.first


def cut_up(batch: Batch) -> Iterator[Segment]:
    """The segments of a row in order: every token is a query of exactly one."""
    used = 0
    for span in batch.structure():
        used = span.stop
        if len(span.responses) == 1:  # a lone response continues its prompt: one causal piece
            yield Segment(span.start, span.stop, span.start, span.start)
            continue
        yield Segment(span.start, span.cut, span.start, span.start)
        for _, start, stop in span.responses:
            yield Segment(start, stop, span.start, span.cut)
    if used < len(batch):  # padding, whose outputs are never read
        yield Segment(used, len(batch), used, used)


class Forest:
    """The structure of one batch, and the masks and layouts that a back-end derives from it once for all layers.

    Args:
        batch: T tokens on the device where attention runs.
        backend: name of the attention back-end.
    """

    def __init__(self, batch: Batch, backend: str) -> None:
        self.backend, self.end, self.position = backend, batch.end, batch.position
        self.segments = tuple(cut_up(batch))
        self._kept: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Result of the first call of `make` under this key; later calls return the same."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def mask(self, window: int | None) -> Tensor:
        """[T, T] bool, True where the query of the row sees the key of the column."""

        def make() -> Tensor:
            index = torch.arange(len(self.end), device=self.end.device)
            mask = (index <= index[:, None]) & (index[:, None] < self.end)
            return mask if window is None else mask & (self.position[:, None] - self.position < window)

        mask: Tensor = self.once(("mask", window), make)
        return mask
