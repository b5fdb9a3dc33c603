"""Rows for `leyden predict`: prompts to answer or responses to score, in chunks that the processes take in turn."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from leyden.batch.forest import Tree
from leyden.data.chat_template import ChatTemplate
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.source import Source
from leyden.datamodules.storage.truncation import longest
from leyden.errors import UserError
from leyden.example import Example

log = logging.getLogger("leyden")

OnError = Literal["raise", "skip"]
PromptTokens = tuple[Example, list[int]]
"""An example without its answer, and the token ids to answer from."""
Candidates = tuple[Example, Tree]
"""An example with its responses in the order of the row, and its tree of token ids."""
_T = TypeVar("_T")


@dataclass
class Chunks(Generic[_T]):
    """A loader of lists of items. (Lightning takes a plain list for several loaders.)"""

    chunks: Sequence[Sequence[_T]]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[Sequence[_T]]:
        return iter(self.chunks)


def origin(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The original row of a prompt. Files of sampled answers keep it in their column `row`."""
    original = row.get("row")
    return original if isinstance(original, Mapping) else row


def prompts(sources: Iterable[Source], template: ChatTemplate, on_error: OnError) -> list[PromptTokens]:
    """The prompts of all rows. Raises `UserError` for a bad row, unless `on_error` is `skip`."""
    return list(
        _usable_rows(sources, lambda example: (example, template.prompt(example.messages, example.tools)), on_error)
    )


def candidates(
    sources: Iterable[Source], template: ChatTemplate, max_length: int, on_error: OnError
) -> list[Candidates]:
    """The responses of all rows.

    Raises:
        UserError: for a bad row, unless `on_error` is `skip`, and for a response longer than `max_length` tokens, its
            prompt included.
    """
    encoded = list(_usable_rows(sources, lambda example: (example, template.encode(example)), on_error))
    long = [(example.source, longest(tree)) for example, tree in encoded if longest(tree) > max_length]
    if long:  # the score of a cut response is not the score of the response
        place, tokens = long[0]
        more = f" ({len(long) - 1:,} more rows are longer too)" if len(long) > 1 else ""
        raise UserError(
            f"{place}: {tokens} tokens of prompt and response, {max_length} fit{more}; "
            f"set --data.max_length {max(tokens for _, tokens in long)}, or take such rows out"
        )
    return encoded


def _usable_rows(sources: Iterable[Source], encode: Callable[[Example], _T], on_error: OnError) -> Iterator[_T]:
    """Yields what `encode` makes of every usable row."""
    for source in sources:
        for place, example in source.examples(log.debug)[1]:
            try:
                if isinstance(example, Exception):
                    raise example
                yield encode(example)
            except RowError as error:
                if on_error == "raise":
                    raise UserError(f"{place}: {error}; or leave such rows out with --data.on_error skip") from None
                log.info("left out %s: %s", place, error)
            except LeftOut as reason:
                log.info("left out %s: %s", place, reason)


def cut(items: Sequence[_T], lengths: Sequence[int], size: int, most: int) -> list[list[_T]]:
    """The items in order, in chunks of at most `size` items and `most` tokens; a single item may have more tokens."""
    chunks: list[list[_T]] = []
    tokens = 0
    for item, length in zip(items, lengths, strict=True):
        if not chunks or len(chunks[-1]) == size or tokens + length > most:
            chunks.append([])
            tokens = 0
        chunks[-1].append(item)
        tokens += length
    return chunks


def rank_chunks(items: Sequence[_T], lengths: Sequence[int], trainer: Any, size: int, most: int) -> Chunks[_T]:
    """The chunks of one rank. All ranks have equally many, some of them empty, so that none waits for another."""
    world = trainer.world_size
    chunks = cut(items, lengths, max(1, min(size, math.ceil(len(items) / world))), most)
    chunks += [[] for _ in range(-len(chunks) % world or world * (not chunks))]
    return Chunks(chunks[trainer.global_rank :: world])
