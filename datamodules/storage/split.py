"""The split into training rows and held-out rows, and the mix of several files in an epoch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from leyden.rng import EVALUATION_SEED

Row = tuple[int, int]
"""(number of a store, index in it)"""


def shuffled(count: int, seed: int) -> list[int]:
    """0 … count - 1 in an order that depends only on the seed."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def hold_out(rows: Sequence[Row], fraction: float, places: Sequence[Hashable]) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, both in their order. There is at least one of each where there are two, and a
    file always gives the same ones, so that runs with different seeds are measured on the same rows.

    Rows of the same place (the pieces of a long text, comparisons for one prompt) are held out together, since each
    tells about the others.
    """
    different = list(dict.fromkeys(places))
    count = min(max(1, round(fraction * len(different))), len(different) - 1)
    held = {different[i] for i in shuffled(len(different), EVALUATION_SEED)[: max(count, 0)]}
    both = list(zip(rows, places, strict=True))
    return [row for row, place in both if place not in held], [row for row, place in both if place in held]


def joined(places: Sequence[Hashable], content: Sequence[Hashable]) -> list[Hashable]:
    """The place of each row, or the first place of which all rows have the same content: a file may hold a row twice,
    and a folder a file, and what is held out must not be trained on under another number."""
    whole: dict[Hashable, list[Hashable]] = {}
    for place, what in zip(places, content, strict=True):
        whole.setdefault(place, []).append(what)
    first: dict[tuple[Hashable, ...], Hashable] = {}
    equal = {place: first.setdefault(tuple(parts), place) for place, parts in whole.items()}
    return [equal[place] for place in places]


def apart(rows: Sequence[Row], held: Sequence[Row], content: Sequence[Sequence[Hashable]]) -> list[Row]:
    """The rows whose content, given by store and index, is that of no held-out row: a folder may hold its validation
    file too, by another name, and a file may have rows of another."""
    known = {content[store][row] for store, row in held}
    return [(store, row) for store, row in rows if content[store][row] not in known]


def epoch(rows: Sequence[Row], weights: Sequence[float], seed: int) -> list[int]:
    """Indices of the rows of one epoch: those of store s come `weights[s]` times, a fraction of them drawn by seed."""
    indices: list[int] = []
    for store, weight in enumerate(weights):
        own = [i for i, (s, _) in enumerate(rows) if s == store]
        whole, part = int(weight), weight - int(weight)
        indices += own * whole + [own[i] for i in shuffled(len(own), seed + store)[: round(part * len(own))]]
    return indices
