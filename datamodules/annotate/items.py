"""Files to items: rows that have several answers, and answers to the same prompts in several files."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leyden.compare.finding import find_runs, is_run
from leyden.datamodules.commands.convert import counted
from leyden.datamodules.files.files import find_files
from leyden.datamodules.formats.ranking import spread
from leyden.datamodules.formats.row_error import LeftOut, RowError, by_count
from leyden.datamodules.formats.turns import normalised_turns
from leyden.datamodules.source import Source
from leyden.errors import UserError
from leyden.example import Example
from leyden.votes.vote import Answer, Item

MOST = 8
"""Answers of an item."""
OF_RUNS = ("samples.jsonl", "answers.jsonl", "rollouts.jsonl")
"""Files with answers in a run's folder; the first that is there counts."""


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Args:
        most: answers of an item; of more, the best, the worst and some between count where they have scores, else the
            first.
        skip_bad: whether bad rows are left out, instead of ending it all.
        format: a format's name, or `auto`.
    """

    most: int = MOST
    skip_bad: bool = False
    format: str = "auto"

    def __post_init__(self) -> None:
        if not 2 <= self.most <= MOST:
            raise UserError(f"--answers {self.most}: give a number from 2 to {MOST}")


@dataclass
class _Asked:
    """A prompt with the answers to it."""

    messages: list[Any]
    answers: list[Answer] = field(default_factory=list)


def named_files(typed: Sequence[str], say: Callable[[str], None]) -> dict[Path, str]:
    """File -> the name of the model whose answers it has: its run's, or its own.

    Args:
        typed: files, folders, globs, and folders of runs.
        say: receives notes on what is not read.

    Raises:
        UserError: nothing is there, or a run has no answers.
    """
    files: dict[Path, None] = {}
    for word in typed:
        path = Path(word).expanduser()
        if path.is_dir() and is_run(path):
            files |= dict.fromkeys(_answers_of(path))
        elif path.is_dir() and any(inner.is_dir() and is_run(inner) for inner in path.iterdir()):
            runs = {run: _of_run(run) for run in find_runs([word])}
            for run in (run for run, there in runs.items() if not there and any(runs.values())):
                say(f"{run}: no answers in it; left out")
            answers = [file for there in runs.values() for file in there]
            files |= dict.fromkeys(answers or _answers_of(path))
        else:
            files |= dict.fromkeys(find_files(word, say))
    return _names(list(files))


def _of_run(run: Path) -> list[Path]:
    """The files with the answers of a run, if it has any; each process of a training has rollouts of its own."""
    for name in OF_RUNS:
        found = [run / name, *sorted(run.glob(name.replace(".", "-[0-9]*.")))]
        if there := [file for file in found if file.is_file()]:
            return there
    return []


def _answers_of(run: Path) -> list[Path]:
    """The same of a run that must have some."""
    if found := _of_run(run):
        return found
    raise UserError(f"{run}: no answers in it; give a run of --config eval, of leyden predict, or with rollouts.jsonl")


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """Each file's name: its stem, or its folder's where all runs call it so, with more folders where that is not
    one's own."""
    parts, size = dict[Path, tuple[str, ...]](), 1
    for file in files:
        own = file.resolve()
        generic = any(own.match(name.replace(".", "*.")) for name in OF_RUNS)
        parts[file] = own.parent.parts if generic else (*own.parent.parts, own.name.partition(".")[0])
    for size in range(1, 1 + max(map(len, parts.values()), default=0)):
        if len({own[-size:] for own in parts.values()}) == len(set(parts.values())):
            break
    return {file: "/".join(own[-size:]) for file, own in parts.items()}


def read_items(files: dict[Path, str], how: Reading, say: Callable[[str], None]) -> Iterator[Item]:
    """The items of files, in the order of the rows.

    A row with several answers is an item. Rows with one answer are joined by their prompt: the first of a file with the
    first of the others and so on. Equal answers of a model are one.

    Raises:
        UserError: a row is bad (`file:line: …`), unless these are skipped, or nothing can be compared.
    """
    singles: dict[tuple[Any, int], _Asked] = {}
    left, made = Counter[str](), 0
    for file, model in files.items():
        seen = Counter[Any]()
        for example in _examples(file, how, left, say):
            answers = _answers(example, model)
            if len(example.responses) > 1:
                if item := _item(example.messages, answers, how.most, left):
                    made += 1
                    yield item
                continue
            prompt = (normalised_turns(example.messages), repr(example.tools))
            seen[prompt] += 1
            singles.setdefault((prompt, seen[prompt]), _Asked(example.messages)).answers.extend(answers)
    for asked in singles.values():
        if item := _item(asked.messages, asked.answers, how.most, left):
            made += 1
            yield item
    if reasons := by_count(+left):
        say(f"left out: {reasons}")
    if not made:
        raise UserError(
            f"{', '.join(map(str, files))}: no prompt has two different answers, so there is nothing to rank; give "
            "answers of several models to the same prompts, or rollouts with several answers to each"
        )


def _examples(file: Path, how: Reading, left: Counter[str], say: Callable[[str], None]) -> Iterator[Example]:
    source, examples = Source(str(file), "candidates", how.format).examples(say)
    last = _last_step(file)
    for place, example in counted(examples, file.name):
        if isinstance(example, RowError):
            if not how.skip_bad and example.reason != "empty response":  # a model may say nothing
                raise UserError(f"{place}: {example}; or leave such rows out with --skip-bad")
            left[example.reason] += 1
        elif isinstance(example, LeftOut):
            left[str(example)] += 1
        elif last is None or example.row.get("step") == last:
            if any(len(response) > 1 for response in example.responses):
                left["answers of several turns"] += 1
                continue
            yield example


def _last_step(file: Path) -> int | None:
    """The step of the last evaluation pass in samples.jsonl: the others are of models that are no more."""
    if not file.name.startswith("samples"):
        return None
    steps = [0]
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                steps.append(int(json.loads(line)["step"]))
            except (ValueError, TypeError, KeyError):
                return None
    return max(steps)


def _answers(example: Example, model: str) -> list[Answer]:
    """The answers of a row with what it says of them."""
    row, count = example.row, len(example.responses)
    texts = [str(response[0]["content"]) for response in example.responses]
    told = row.get("scores") if count > 1 else [row.get("reward", row.get("score"))]
    if "score_chosen" in row and count == 2:
        told = [row["score_chosen"], row.get("score_rejected")]
    terms = row.get("terms")
    scores = _numbers(told, count)
    spreads = _numbers(_spread(terms), count)
    own = row.get("models")
    of_one = count == 1 or isinstance(terms, dict) or "draw" in row
    names = [str(name) for name in own] if isinstance(own, list) and len(own) == count else [model * of_one] * count
    answers = [Answer(*parts) for parts in zip(texts, names, scores, spreads, strict=True)]
    if isinstance(row.get("reference"), str) and "step" in row:
        answers.append(Answer(row["reference"], "reference", *_numbers([row.get("reference_reward")], 1)))
    return answers


def _spread(terms: Any) -> Any:
    """What an `Ensemble` calls `spread`, also where it is a part of another reward."""
    if not isinstance(terms, dict):
        return None
    return next((terms[name] for name in terms if name == "spread" or name.endswith(".spread")), None)


def _numbers(values: Any, count: int) -> list[float | None]:
    """Finite numbers of a list of this length; None for what is none."""
    if not isinstance(values, list) or len(values) != count:
        return [None] * count
    good = (isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    return [float(value) if is_good else None for value, is_good in zip(values, good, strict=True)]


def _item(messages: Sequence[Any], found: Iterable[Answer], most: int, left: Counter[str]) -> Item | None:
    """An item of the different answers to a prompt, or None where there is nothing to compare."""
    different: dict[tuple[str, str], Answer] = {}
    for answer in found:
        different.setdefault((answer.text, answer.model), answer)
    answers = list(different.values())
    if len({answer.text for answer in answers}) < 2:
        left["prompts with one answer" if len(answers) < 2 else "prompts whose answers are all equal"] += 1
        return None
    if len(answers) > most:
        left["answers beyond --answers"] += len(answers) - most
        answers = _some(answers, most)
    return Item(tuple(messages), tuple(answers))


def _some(answers: Sequence[Answer], most: int) -> list[Answer]:
    """So many of the answers, in their order: the best, the worst and some between, or the first of those that have no
    scores."""
    scores = [answer.score for answer in answers]
    if any(score is None for score in scores):
        return list(answers[:most])
    ranked = sorted(range(len(answers)), key=lambda number: -float(scores[number] or 0.0))
    return [answers[number] for number in sorted(ranked[place] for place in spread(len(ranked), most))]


def signature(files: dict[Path, str], how: Reading) -> str:
    """Hex digits that differ where files or the way of reading them do, so that unchanged ones need not be read."""
    facts = [(str(file.resolve()), name, file.stat().st_size, file.stat().st_mtime_ns) for file, name in files.items()]
    return hashlib.sha256(repr((facts, how)).encode()).hexdigest()[:24]
