"""Trees of token ids, and their layout in one row, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

S = TypeVar("S", bound=Sized)
BORROWED = math.nan
"""The score of a response that belongs to another prompt: what the policy says of it is measured, and nothing is learnt
from it. It counts in no totals."""
PER_TOKEN = ("tokens", "position", "parent", "end", "branch", "weight")
"""Columns of a batch with one number a token."""


class Totals(NamedTuple):
    """What one whole optimizer step holds, over all its micro-batches and ranks: the denominators of exact means."""

    tokens: float
    """Summed loss weight of the trained tokens."""
    responses: int
    """Responses that count."""
    prompts: int
    """Prompts that have some."""

    def __add__(self, other: object) -> Totals:
        if not isinstance(other, Totals):
            return NotImplemented
        return Totals(self.tokens + other.tokens, self.responses + other.responses, self.prompts + other.prompts)


@dataclass
class Tree:
    """One prompt and its responses, as token ids."""

    prompt: list[int]
    """Token ids of the prompt; empty for plain text, which is one response alone"""
    responses: list[list[int]]
    """Token ids of each response, for preferences best first"""
    scores: list[float] | None = None
    """What each response is worth, or the labels of the only one; None where nothing says it"""
    weights: list[list[float]] | None = None
    """Loss weight of every response token; None is 1 everywhere"""
    row: int = 0
    """A stable id of the example, so that errors and random noise can refer to it."""

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))

    def totals(self) -> Totals:
        """What this tree adds to the totals of its optimizer step. A root token is never predicted, so never counts."""
        if not self.responses:
            return Totals(0.0, 0, 0)
        weights = self.weights or [[1.0] * len(r) for r in self.responses]
        skipped = 0.0 if self.prompt else weights[0][0]
        # labels of several attributes are scores too, and then there is not one a response
        scores = self.scores if self.scores is not None and len(self.scores) == len(weights) else [0.0] * len(weights)
        own = [w for w, score in zip(weights, scores, strict=True) if not math.isnan(score)]
        return Totals(sum(map(sum, own)) - skipped, len(own), 1)


class Span(NamedTuple):
    """Where one tree stands in the row of a batch."""

    start: int
    """Place of the prompt's first token"""
    cut: int
    """One past the prompt's last token"""
    responses: tuple[tuple[int, int, int], ...]
    """Of each response its number in the batch (`branch`), the place of its first token, and one past its last"""

    @property
    def stop(self) -> int:
        """One past the tree's last token."""
        return self.responses[-1][2] if self.responses else self.cut


def walk(end: list[int], branch: list[int]) -> list[Span]:
    """The trees of a row, read from `end` and `branch` in depth-first order."""
    spans, t = [], 0
    while t < len(end):
        start, stop = t, end[t]
        if branch[t] < 0 and stop == t + 1:  # padding
            t += 1
            continue
        while t < stop and branch[t] < 0:
            t += 1
        cut, responses = t, []
        while t < stop:
            responses.append((branch[t], t, end[t]))
            t = end[t]
        spans.append(Span(start, cut, tuple(responses)))
    return spans


def lay_out(trees: Sequence[Tree], length: int | None = None) -> tuple[dict[str, list[Any]], tuple[Span, ...]]:
    """The columns of a batch for trees in depth-first order, padded to `length` tokens, and where each tree stands.

    Raises:
        ValueError: an empty response, several responses without a prompt, or more tokens than `length`.
    """
    columns: dict[str, list[Any]] = {name: [] for name in (*PER_TOKEN, "group", "score", "row")}
    spans = tuple(_append(columns, tree) for tree in trees)
    size = len(columns["tokens"])
    pad = range(size, size if length is None else length)
    if length is not None and length < size:
        raise ValueError(f"{size} tokens do not fit a row of {length}")
    for name, value in {"tokens": 0, "position": 0, "parent": -1, "branch": -1, "weight": 0.0}.items():
        columns[name] += [value] * len(pad)
    columns["end"] += [t + 1 for t in pad]
    return columns, spans


def _append(columns: dict[str, list[Any]], tree: Tree) -> Span:
    """Append one tree to the columns of a batch and say where it stands."""
    root, n = len(columns["tokens"]), len(tree.prompt)
    if any(not response for response in tree.responses) or (not n and len(tree.responses) != 1):
        raise ValueError(f"row {tree.row}: a tree needs a prompt and non-empty responses, or one response alone")
    stop, number = root + len(tree), len(columns["row"])
    columns["tokens"] += tree.prompt
    columns["position"] += range(n)
    columns["parent"] += [-1, *range(root, root + n - 1)] if n else []
    columns["end"] += [stop] * n
    columns["branch"] += [-1] * n
    columns["weight"] += [0.0] * n
    placed = []
    for k, response in enumerate(tree.responses):
        t, m = len(columns["tokens"]), len(response)
        placed.append((len(columns["group"]), t, t + m))
        weights = list(tree.weights[k]) if tree.weights is not None else [1.0] * m
        if len(weights) != m:
            raise ValueError(f"row {tree.row}: {m} response tokens but {len(weights)} weights")
        columns["weight"] += weights if n else [0.0, *weights[1:]]
        columns["tokens"] += response
        columns["position"] += range(n, n + m)
        columns["parent"] += [root + n - 1 if n else -1, *range(t, t + m - 1)]
        columns["end"] += [t + m] * m
        columns["branch"] += [len(columns["group"])] * m
        columns["group"].append(number)
        columns["score"].append(tree.scores[k] if tree.scores is not None else 0.0)
    if tree.responses:
        columns["row"].append(tree.row)
    return Span(root, root + n, tuple(placed))


def chunk_by_tokens(items: Iterable[S], budget: int) -> Iterator[list[S]]:
    """`items` with a length in tokens, such as trees, in their order: as many at a time as have at most `budget` tokens
    together; a larger one comes alone."""
    together, tokens = list[S](), 0
    for item in items:
        size = len(item)
        if together and tokens + size > budget:
            yield together
            together, tokens = [], 0
        together.append(item)
        tokens += size
    if together:
        yield together
