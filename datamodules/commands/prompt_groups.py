"""Prompts with their responses, gathered from the rows of one or several files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leyden.datamodules.commands.convert import counted
from leyden.datamodules.formats.columns import names_of
from leyden.datamodules.formats.formats import format_named
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.formats.turns import normalised_turns
from leyden.datamodules.predict_loader import origin
from leyden.datamodules.source import Source
from leyden.example import Example, Message, Sample


@dataclass
class PromptGroup:
    """A prompt with its different responses, in the order of the file."""

    messages: list[Message]
    row: dict[str, Any]
    """The row that the prompt came from, or the other columns of its own row"""
    samples: list[Sample]

    @property
    def key(self) -> str:
        """A hash of everything that a reward sees."""
        content = [self.messages, [[s.response, s.finished, dict(s.row)] for s in self.samples]]
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_groups(source: Source, rejects: list[dict[str, Any]], say: Callable[[str], None]) -> list[PromptGroup]:
    """The prompts of all files, each with its different responses. Bad rows go to `rejects`."""
    groups: dict[Any, PromptGroup] = {}
    known: set[Any] = set()
    for file in source.files(say):
        settled, examples = file.examples(say)
        for place, example in counted(examples, Path(file.path).name):
            try:
                if isinstance(example, Exception):
                    raise example
                samples = _samples(example)
            except RowError as error:
                rejects.append({"place": place, "problem": str(error)})
                continue
            except LeftOut:
                continue
            prompt = (normalised_turns(example.messages), repr(example.tools))
            if prompt not in groups:
                groups[prompt] = PromptGroup(example.messages, _other_columns(example, settled), [])
            for sample, response in zip(samples, example.responses, strict=True):
                if (pair := (prompt, normalised_turns(response))) not in known:
                    known.add(pair)
                    groups[prompt].samples.append(sample)
    return list(groups.values())


def _samples(example: Example) -> list[Sample]:
    """The responses of one row as a reward sees them."""
    ended, row, samples = example.row.get("finished", True), origin(example.row), []
    for number, response in enumerate(example.responses):
        if len(response) > 1:
            raise RowError("the response has several turns; give single answers to a prompt", "several turns")
        if response[0].keys() & {"tool_calls", "reasoning_content"}:
            problem = "the response has calls or reasoning, and rewards see texts; write these in its content"
            raise RowError(problem, "not a text")
        finished = ended[number] if isinstance(ended, list) and number < len(ended) else ended
        samples.append(
            Sample(example.messages, response[0]["content"], row, bool(finished), example.source, example.tools)
        )
    return samples


def _other_columns(example: Example, settled: Source) -> dict[str, Any]:
    """The original row in the column `row`, else the columns besides prompt, responses, `scores` and `finished`."""
    row = origin(example.row)
    if row is not example.row:
        return dict(row)
    named, needs = names_of(row, settled.columns), format_named(settled.format, "candidates").columns("candidates")
    used = {"finished", "scores", *(named[name] for name in needs if name in named)}
    return {name: value for name, value in row.items() if name not in used}
