"""Statistics of preference files: pairs, margins, lengths, labels, and rows that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from leyden.datamodules.formats.turns import normalised_turns
from leyden.example import Example


@dataclass
class PreferenceStats:
    """Counts over the usable rows of a file."""

    sizes: Counter[int] = field(default_factory=Counter)
    """Responses of a row -> rows"""
    longer: int = 0
    """Rows whose best response is longer than their worst"""
    shorter: int = 0
    margins: list[float] = field(default_factory=list)
    """Score of the best response minus that of the worst, of each row with scores"""
    left_out: int = 0
    """Responses that tie with, or repeat, another one of their row"""
    said: dict[int, str] = field(default_factory=dict)
    """Hash of (prompt, better, worse) -> the place of the first row with it"""

    def add(self, example: Example, lengths: Sequence[int], place: str) -> str | None:
        """Count a row, given the lengths of its responses. Returns the place of an earlier row that contradicts it."""
        self.sizes[len(lengths)] += 1
        self.longer += lengths[0] > lengths[-1]
        self.shorter += lengths[0] < lengths[-1]
        self.left_out += example.left_out + len(example.responses) - len(lengths)
        if example.scores is not None:
            self.margins.append(example.scores[0] - example.scores[-1])
        prompt, opposite = normalised_turns(example.messages), None
        for better, worse in combinations([normalised_turns(response) for response in example.responses], 2):
            opposite = opposite or self.said.get(hash((prompt, worse, better)))
            self.said.setdefault(hash((prompt, better, worse)), place)
        return opposite

    def lines(self) -> Iterator[str]:
        """Yields the statistics as lines of text."""
        rows = sum(self.sizes.values())
        pairs = sum(size * (size - 1) // 2 * count for size, count in self.sizes.items())
        by_size = ", ".join(f"{count:,} with {size} responses" for size, count in sorted(self.sizes.items()))
        yield f"pairs {pairs:,} · rows: {by_size}"
        names = ("chosen", "rejected") if set(self.sizes) == {2} else ("the best response", "the worst")
        share = f"{self.longer / rows:.0%} of the rows, shorter in {self.shorter / rows:.0%}"
        yield f"{names[0]} is longer than {names[1]} in {share}"
        if self.margins:
            ordered = sorted(self.margins)
            numbers = f"least {ordered[0]:g}, median {ordered[len(ordered) // 2]:g}, most {ordered[-1]:g}"
            all_of_them = "all" if len(ordered) == rows else f"{len(ordered):,} of {rows:,}"
            yield f"margin of {names[0]} over {names[1]} ({all_of_them} rows): {numbers}"
        if self.left_out:
            why = "tie with, or repeat, another one of their row, or are over --min-gap and --max-responses"
            yield f"left out: {self.left_out:,} responses that {why}"


@dataclass
class LabelStats:
    """Counts over the usable rows of a file of single answers with labels."""

    labels: Counter[float] = field(default_factory=Counter)
    """1 for good, 0 for bad -> answers"""
    left_out: int = 0
    """Answers of compared ones that are neither the best nor the worst of their row"""
    said: dict[int, str] = field(default_factory=dict)
    """Hash of (prompt, answer, label) -> the place of the first row with it"""

    def add(self, example: Example, lengths: Sequence[int], place: str) -> str | None:
        """Count a row. Returns the place of an earlier row that labels the same answer otherwise."""
        self.left_out += example.left_out
        prompt, opposite = normalised_turns(example.messages), None
        for response, label in zip(example.responses, example.scores or (), strict=True):
            self.labels[label] += 1
            turns = normalised_turns(response)
            opposite = opposite or self.said.get(hash((prompt, turns, 1 - label)))
            self.said.setdefault(hash((prompt, turns, label)), place)
        return opposite

    @property
    def alike(self) -> bool:
        """Whether all answers have the same label, from which nothing can be learnt."""
        return len(self.labels) == 1

    def lines(self) -> Iterator[str]:
        """Yields the statistics as lines of text."""
        yield f"labels: {self.labels[1.0]:,} good, {self.labels[0.0]:,} bad"
        if self.left_out:
            yield f"left out: {self.left_out:,} answers that are neither the best nor the worst of their row"
        if self.alike:
            other = "bad" if self.labels[1.0] else "good"
            yield f"error: all answers are labelled alike, which says nothing about what is better; add {other} ones"
