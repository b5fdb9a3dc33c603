"""Prompts as batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from leyden.example import Example

Prompt = tuple[Example, list[int]]
"""An example without its answer, and the token ids to answer from."""


@dataclass
class Prompts:
    """Chunks of prompts as a loader. (Lightning takes a plain list for several loaders.)"""

    chunks: list[list[Prompt]]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[list[Prompt]]:
        return iter(self.chunks)
