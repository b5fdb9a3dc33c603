"""Readers of a run's YAML and JSON files; what cannot be read is named and left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from leyden.compare.metrics import named

Row = dict[str, Any]


def read_config(file: Path, notes: list[str]) -> Row:
    """The content of config.yaml; empty where it is missing or damaged, which is added to `notes`."""
    if not file.is_file():
        notes.append(f"{file}: missing, so this run's settings are not known")
        return {}
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark is not None else str(file)
        notes.append(f"{place}: cannot be read, so this run's settings are not known")
        return {}
    return content if isinstance(content, dict) else {}


def read_object(file: Path, notes: list[str]) -> Row | None:
    """The content of a file with one JSON object; None where it is missing or damaged."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        notes.append(f"{file}: cannot be read ({error}); left out")
        return None
    if not isinstance(content, dict):
        notes.append(f"{file}: not a JSON object; left out")
        return None
    return content


def read_rows(file: Path, usable: Callable[[Row], bool], notes: list[str]) -> list[Row]:
    """The usable rows of a JSONL file; none where it is missing."""
    if not file.is_file():
        return []
    rows, problems = list[Row](), list[str]()
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                problems.append(f"{file}:{number}: not whole JSON; line skipped")
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int) and usable(row):
                rows.append(row)
            else:
                problems.append(f"{file}:{number}: keys are missing or of another kind; line skipped")
    notes += named(file, problems)
    return rows


def is_sample(row: Row) -> bool:
    """Whether a row has a prompt, a response, and numbers for scores where it has any."""
    messages, scores = row.get("prompt"), [row.get(name) for name in ("reward", "reference_reward")]
    return (
        isinstance(messages, list)
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
        and isinstance(row.get("response"), str)
        and isinstance(row.get("reference", ""), str | None)
        and all(score is None or isinstance(score, int | float) for score in scores)
    )


def is_diagnostic(row: Row) -> bool:
    """Whether a row has the sentence of a warning."""
    return isinstance(row.get("sentence"), str)
