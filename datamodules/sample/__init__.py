"""Sample data with checkable answers, generated on demand: instruction, preference and unpaired rows, prompts, text.

Questions ask for facts, sums and small rewriting jobs in Korean or English. Answers are right, and mixed in style:
half are polite, half are brief, independently, so that there is something to align. Preference rows compare answers in
all these styles, and wrong ones, by the gold reward, with some labels flipped. Every row but text carries the columns
that `leyden.rewards.function.Gold` scores with: `language`, `answer` and `rivals` (wrong answers, joined by `|`).

The split is by content, not by wording: no training row asks for the content of a held-out row, in either language.
The same arguments give the same rows on every machine, and fewer rows are a prefix of more.

Called by `leyden data sample`, the demo and tests. May import the framework. Begin reading at `items`, the
content of questions, then `phrases`, their wording.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from leyden.atomic import write_whole
from leyden.datamodules.sample import phrases
from leyden.datamodules.sample.corpus import document
from leyden.datamodules.sample.items import Item
from leyden.datamodules.sample.preference import MOST, compared, labelled
from leyden.datamodules.sample.rewriting import draw_item
from leyden.errors import UserError, nearest

LANGUAGES = ("ko", "en", "both")
SPLITS = ("train", "heldout")
POLITE_SHARE = 0.5
BRIEF_SHARE = 0.5
RETRIES = 20
"""Draws of a new prompt before a used one is repeated: small held-out sets run out."""

Row = dict[str, Any]
Maker = Callable[[Random, str, str], Iterator[Row]]


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


def _preference(noise: float, responses: int) -> Maker:
    def rows(draw: Random, language: str, split: str) -> Iterator[Row]:
        for prompt, item in _prompts(draw, language, split):
            yield compared(draw, prompt, item, _checkable(item), noise, responses)

    return rows


def _unpaired(noise: float) -> Maker:
    def rows(draw: Random, language: str, split: str) -> Iterator[Row]:
        for prompt, item in _prompts(draw, language, split):
            yield labelled(draw, prompt, item, _checkable(item), noise)

    return rows


def _text(draw: Random, language: str, split: str) -> Iterator[Row]:
    while True:
        yield {"text": document(draw, draw.choice(("ko", "en")) if language == "both" else language)}


NOISE, RESPONSES = 0.1, 2
KINDS: dict[str, Maker] = {
    "instruction": _instruction,
    "preference": _preference(NOISE, RESPONSES),
    "unpaired": _unpaired(NOISE),
    "prompts": _bare_prompts,
    "text": _text,
}
"""Kind -> maker of its rows, which yields rows without end from a source of randomness, a language and a split."""


def sample_rows(
    kind: str,
    language: str,
    rows: int,
    seed: int,
    split: str = "train",
    noise: float | None = None,
    responses: int | None = None,
) -> Iterator[Row]:
    """`rows` generated rows.

    Args:
        kind: `instruction` (prompt, response and the columns to score with), `preference` (prompt, chosen and rejected
            instead), `unpaired` (prompt, response and a label that says whether it is good), `prompts` (the same
            without a response) or `text` (documents for pretraining, in the column `text`; `split` only varies the
            draw).
        language: `ko`, `en`, or `both` mixed evenly.
        rows: how many, at least 1.
        seed: rows of another seed are other draws from the same world.
        split: `train` or `heldout`.
        noise: of preference and unpaired rows: the share in which two answers have traded their labels; None is 0.1.
        responses: of preference rows: the number of answers that each compares; None is 2. More than two stand in
            `responses` with their `scores`.

    Raises:
        UserError: for a kind, language, split or number that does not exist, or that this kind has no use for.
    """
    for name, value, options in (("kind", kind, KINDS), ("language", language, LANGUAGES), ("split", split, SPLITS)):
        if value not in options:
            raise UserError(f"sample: no {name} '{value}'; use {', '.join(options)}{nearest(value, options)}")
    if rows < 1:
        raise UserError(f"sample: cannot make {rows} rows; use --rows 1 or more")
    maker = KINDS[kind]
    if noise is not None or responses is not None:
        checked = _checked(kind, noise, responses)
        maker = _preference(*checked) if kind == "preference" else _unpaired(checked[0])
    # A string seeds Python's generator through SHA-512, so it does not depend on the process's hash seed.
    draw = Random(f"{kind} {language} {split} {seed}")
    return itertools.islice(maker(draw, language, split), rows)


def write_sample(
    file: str | Path, kind: str, rows: int = 1000, language: str = "ko", seed: int = 0, split: str = "train"
) -> str:
    """Write generated rows to a JSONL file, whose name is returned. See `sample_rows`.

    Args:
        file: replaced where it exists.
        kind: `instruction`, `preference`, `unpaired`, `prompts` or `text`.
        rows: how many, at least 1.
        language: `ko`, `en`, or `both` mixed evenly.
        seed: rows of another seed are other draws from the same world.
        split: `train` or `heldout`.

    Raises:
        UserError: for a kind, language, split or number that does not exist.
    """
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in sample_rows(kind, language, rows, seed, split))
    write_whole(Path(file), "".join(lines))
    return str(file)


def _checked(kind: str, noise: float | None, responses: int | None) -> tuple[float, int]:
    """Noise and number of answers of preference rows, checked, and with the defaults for None."""
    if kind not in ("preference", "unpaired"):
        raise UserError(f"sample: {kind} rows have no labels; use --noise and --responses with --kind preference")
    if kind == "unpaired" and responses is not None:
        raise UserError("sample: unpaired rows have one answer each; use --responses with --kind preference")
    noise, responses = NOISE if noise is None else noise, RESPONSES if responses is None else responses
    if not 0 <= noise <= 1:
        raise UserError(f"sample: --noise {noise} is not a share; give 0 (every label is right) to 1 (every one wrong)")
    if not 2 <= responses <= MOST:
        raise UserError(f"sample: cannot compare {responses} answers; use --responses 2 to {MOST}")
    return noise, responses
