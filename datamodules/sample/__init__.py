"""Sample data with checkable answers, made on the spot: instruction rows, prompts and pretraining text.

Questions ask for facts, sums and small rewriting jobs in Korean or English. Answers are right, and mixed in style:
half are polite, half are brief, independently, so that there is something to align. Every row but text carries the
columns that `leyden.rewards.Gold` scores with: `language`, `answer` and `rivals` (wrong answers, joined by `|`).

The split is by content, not by wording: what is asked in held-out rows is asked in no training row, in neither
language. The same arguments give the same rows on every machine, and fewer rows are a prefix of more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from leyden.datamodules.sample import phrases
from leyden.datamodules.sample.corpus import document
from leyden.datamodules.sample.items import Item
from leyden.datamodules.sample.rewriting import draw_item
from leyden.errors import UserError, nearest

LANGUAGES = ("ko", "en", "both")
SPLITS = ("train", "heldout")
POLITE_SHARE = 0.5
BRIEF_SHARE = 0.5
RETRIES = 20
"""How often a prompt that has been used is drawn again before it is used twice: small held-out sets run out."""

Row = dict[str, Any]


def _checkable(item: Item) -> Row:
    """The columns that scoring an answer needs, as plain text so that they survive CSV."""
    return {
        "language": item.language,
        "topic": item.topic,
        "answer": item.answer,
        "rivals": "|".join(item.rivals),
    }


def _prompts(draw: Random, language: str, split: str) -> Iterator[tuple[str, Item]]:
    """Questions with their items, without end, repeating one only when new ones are hard to find."""
    seen: set[str] = set()
    while True:
        for _ in range(RETRIES):
            item = draw_item(draw, draw.choice(("ko", "en")) if language == "both" else language, split)
            prompt = phrases.question(draw, item)
            if prompt not in seen:
                break
        seen.add(prompt)
        yield prompt, item


def _instruction(draw: Random, language: str, split: str) -> Iterator[Row]:
    for prompt, item in _prompts(draw, language, split):
        polite, brief = draw.random() < POLITE_SHARE, draw.random() < BRIEF_SHARE
        yield {"prompt": prompt, "response": phrases.answer(draw, item, polite, brief)} | _checkable(item)


def _bare_prompts(draw: Random, language: str, split: str) -> Iterator[Row]:
    for prompt, item in _prompts(draw, language, split):
        yield {"prompt": prompt} | _checkable(item)


def _text(draw: Random, language: str, split: str) -> Iterator[Row]:
    while True:
        yield {"text": document(draw, draw.choice(("ko", "en")) if language == "both" else language)}


KINDS: dict[str, Callable[[Random, str, str], Iterator[Row]]] = {
    "instruction": _instruction,
    "prompts": _bare_prompts,
    "text": _text,
}
"""Row makers by name: each yields rows without end from a source of randomness, a language and a split."""


def sample_rows(kind: str, language: str, rows: int, seed: int, split: str = "train") -> Iterator[Row]:
    """`rows` generated rows.

    Args:
        kind: `instruction` (prompt, response and the columns to score with), `prompts` (the same without a response)
            or `text` (documents for pretraining, in the column `text`; `split` only varies the draw).
        language: `ko`, `en`, or `both` mixed evenly.
        rows: how many, at least 1.
        seed: rows of another seed are other draws from the same world.
        split: `train` or `heldout`.

    Raises:
        UserError: for a kind, language, split or number that does not exist.
    """
    for name, value, options in (("kind", kind, KINDS), ("language", language, LANGUAGES), ("split", split, SPLITS)):
        if value not in options:
            raise UserError(f"sample: no {name} '{value}'; use {', '.join(options)}{nearest(value, options)}")
    if rows < 1:
        raise UserError(f"sample: cannot make {rows} rows; use --rows 1 or more")
    # A string seeds Python's generator through SHA-512, so it does not depend on the process's hash seed.
    draw = Random(f"{kind} {language} {split} {seed}")
    return itertools.islice(KINDS[kind](draw, language, split), rows)
