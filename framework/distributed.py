"""Work that the processes share: each does its part, and all learn the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def share(items: Sequence[T], trainer: Any) -> Sequence[T]:
    """This process's part: in order, and of equal size or one apart."""
    rank, world = trainer.global_rank, trainer.world_size
    return items[len(items) * rank // world : len(items) * (rank + 1) // world]


def gathered(items: list[T], trainer: Any) -> list[T]:
    """The parts of all processes, in their order."""
    if trainer.world_size == 1:
        return items
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]
