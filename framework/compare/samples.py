"""The answers of all runs to the same prompts, side by side."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from typing import Any

from leyden.compare.chart import sign
from leyden.compare.comparison import Comparison
from leyden.compare.numbers import number
from leyden.compare.run import RunFiles

OPEN, MOST = 20, 200
"""Prompts that are unfolded, and most prompts on the page."""
TALL, TALL_LINES = 600, 14
"""Characters and lines of a text that are shown; the rest is folded."""
_HANGUL = re.compile(r"[가-힣]")


@dataclass
class Asked:
    """One prompt with each run's answer, and the references' answers with the names of the runs that have them."""

    prompt: list[dict[str, Any]]
    given: dict[RunFiles, dict[str, Any]] = field(default_factory=dict)
    references: dict[tuple[str, float | None], list[str]] = field(default_factory=dict)


def asked(runs: list[RunFiles]) -> list[Asked]:
    """The prompts of all runs in the order of their rows. Prompts that a file has more than once are matched by their
    occurrence, the first with the first and so on: rows of different files may have the same number."""
    prompts: dict[tuple[str, int], Asked] = {}
    for run in runs:
        counts: dict[str, int] = {}
        for row in run.samples:
            text = json.dumps(row["prompt"], ensure_ascii=False, sort_keys=True)
            counts[text] = counts.get(text, 0) + 1
            entry = prompts.setdefault((text, counts[text]), Asked(row["prompt"]))
            entry.given[run] = row
            if isinstance(row.get("reference"), str):
                entry.references.setdefault((row["reference"], row.get("reference_reward")), []).append(run.name)
    return list(prompts.values())


def answers(comparison: Comparison) -> Iterator[str]:
    """The page's section of answers; nothing where no run has any."""
    rows = asked([run for run in comparison.runs if run.samples])
    if not rows:
        return
    yield '<section id="answers"><h2>Answers</h2>'
    yield "<p>Of each run's last evaluation, one to each prompt, with its reward. The reference comes first.</p>"
    styles = {run: style for style, group in enumerate(comparison.groups) for run in group.runs}
    scored = set(comparison.compared.get("eval/reward", ()))
    cards = [_card(row, styles, scored) for row in rows[:MOST]]
    yield from cards[:OPEN]
    if len(cards) > OPEN:
        yield f"<details><summary>{len(cards) - OPEN} more prompts</summary>"
        yield from cards[OPEN:]
        yield "</details>"
    if len(rows) > MOST:
        yield f"<p>These are the first {MOST} of {len(rows)} prompts; samples.jsonl in each run's folder has all.</p>"
    yield "</section>"


def _card(row: Asked, styles: dict[RunFiles, int], scored: set[RunFiles]) -> str:
    prompt = "".join(
        f'<div class="turn"><span class="role">{escape(str(turn.get("role", "")))}</span>{_text(turn["content"])}</div>'
        for turn in row.prompt
    )
    several = len(row.references) > 1
    boxes = [
        _box(escape(f"reference of {', '.join(names)}") if several else "reference", text, reward, "reference")
        for (text, reward), names in row.references.items()
    ]
    for run, given in row.given.items():
        head = f"{sign(styles[run])}{escape(run.name)}"
        note = "" if run in scored else " (not comparable)"
        boxes.append(_box(head, given["response"], given.get("reward"), "", given.get("finished") is False, note))
    return (
        f'<article><div class="prompt">{prompt}</div><div class="scroll side" role="region" tabindex="0" '
        f'aria-label="answers">{"".join(boxes)}</div></article>'
    )


def _box(head: str, text: str, reward: float | None, kind: str = "", cut: bool = False, note: str = "") -> str:
    score = "" if reward is None else f'<span class="reward">{number(reward)}{note}</span>'
    end = '<span class="cut" title="cut off: it did not end within its tokens">…</span>' if cut else ""
    return f'<div class="answer {kind}"><div class="head"><span>{head}</span>{score}</div>{_text(text, end)}</div>'


def _text(text: str, end: str = "") -> str:
    """Text as it was written, marked as Korean where it is, so that lines break and letters look as they should."""
    letters = sum(letter.isalpha() for letter in text)
    korean = ' lang="ko"' if 2 * len(_HANGUL.findall(text)) >= letters > 0 else ""
    if len(text) > TALL or text.count("\n") > TALL_LINES:
        cut = min(TALL, len("\n".join(text.split("\n")[:TALL_LINES])))
        shown, rest = escape(text[:cut]), escape(text[cut:])
        fold = f"<details><summary>{len(text) - cut:,} more characters</summary>{rest}{end}</details>"
        return f'<div class="text"{korean}>{shown}{fold}</div>'
    return f'<div class="text"{korean}>{escape(text) or "<i>empty</i>"}{end}</div>'
