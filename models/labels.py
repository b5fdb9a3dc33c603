"""The labels of a model's head that a reward is made of, by name or by number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leyden.errors import UserError, nearest

SHOWN = 30
"""Most labels that a message lists"""


@dataclass(frozen=True)
class Chosen:
    """Labels by name, each with its place in the outputs and its weight."""

    labels: Mapping[str, tuple[int, float]]

    def __call__(self, outputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of outputs [N, K], and each of several labels by itself: [N], and [N] each."""
        columns = {name: outputs[:, place] for name, (place, _) in self.labels.items()}
        total = torch.zeros(len(outputs))
        for name, (_, weight) in self.labels.items():
            total += weight * columns[name]
        return total, columns if len(columns) > 1 else {}


def chosen(path: str, labels: Sequence[str], label: int | str | None, weights: Mapping[str, float] | None) -> Chosen:
    """The labels that are asked for.

    Args:
        path: of the model, for messages.
        labels: all of them, in the order of the outputs.
        label: the one; needed where there are several and no weights.
        weights: of some, by name or number.

    Raises:
        UserError: there is no such label, or it is not said which; the message lists them.
    """
    twice = {name for name, count in Counter(labels).items() if count > 1}
    names = {place: f"{name}-{place}" if name in twice else name for place, name in enumerate(labels)}
    if weights is not None:
        if label is not None:
            raise UserError(f"{path}: label {label} and weights; give one of them")
        if not weights or not all(math.isfinite(weight) for weight in weights.values()):
            raise UserError(f"{path}: weights {weights}; give {{LABEL: a finite number, …}}; {_listed(names)}")
        places = {name: _place(path, name, names) for name in weights}
        if len(set(places.values())) < len(places):
            raise UserError(f"{path}: weights {dict(weights)} name a label twice; {_listed(names)}")
        return Chosen({names[place]: (place, float(weights[name])) for name, place in places.items()})
    if label is None and len(names) > 1:
        raise UserError(f"{path}: {len(names)} labels, so say which is the reward by label; {_listed(names)}")
    place = _place(path, 0 if label is None else label, names)
    return Chosen({names[place]: (place, 1.0)})


def _place(path: str, label: int | str, names: Mapping[int, str]) -> int:
    """The number of a label that is given by name or by number."""
    for name in (str(label), str(label).lower()):
        same = [place for place, known in names.items() if name in (known, known.lower())]
        if len(same) == 1:
            return same[0]
    if str(label).isdecimal() and int(label) in names:
        return int(label)
    hint = nearest(str(label), names.values())
    raise UserError(f"{path}: no label {label!r}{hint}; {_listed(names)}")


def _listed(names: Mapping[int, str]) -> str:
    shown = ", ".join(f"{place} {name}" for place, name in list(names.items())[:SHOWN])
    return f"its labels are {shown}" + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
