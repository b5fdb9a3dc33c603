"""Standard errors of measures over questions, and of the difference of two runs on the same questions.

A measure V of n questions is a mean of outcomes, or a function of a quotient R = Σx / Σw, such as bits per byte
(-R / ln 2) and perplexity (e^-R), x a text's log-probability and w its words or bytes. What question i moves it by is
its influence u_i: x_i - V for a mean, and g'(R) (x_i - R w_i) n / Σw for V = g(R), to first order (the delta method).
Then the standard error of V is s(u) / √n, and that of the difference of two runs, whose questions are the same, is
s(u - u') / √n: what both find hard or easy falls out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any, Literal

Kind = Literal["mean", "bits", "perplexity", "weighted", "unweighted", "other"]
"""How a measure comes from outcomes. A group's is the mean over all its questions (`weighted`) or over its tasks; of
`other` measures, such as F1, no outcome is kept."""


def influences(kind: Kind, outcomes: Sequence[Any]) -> list[float]:
    """The influence of each question.

    Args:
        kind: mean, bits or perplexity.
        outcomes: numbers, or for a quotient its pairs (x, w).
    """
    if kind == "mean":
        mean = fmean(outcomes)
        return [x - mean for x in outcomes]
    xs, ws = [float(x) for x, _ in outcomes], [float(w) for _, w in outcomes]
    total, quotient = sum(ws), sum(xs) / sum(ws)
    slope = -1 / math.log(2) if kind == "bits" else -math.exp(-quotient)
    return [slope * (x - quotient * w) * len(xs) / total for x, w in zip(xs, ws, strict=True)]


def standard_error(influence: Sequence[float]) -> float:
    """Of a measure with these influences; 0 of one question."""
    return stdev(influence) / math.sqrt(len(influence)) if len(influence) > 1 else 0.0


def error_of(kind: Kind, outcomes: Sequence[Any]) -> float:
    """The standard error of a measure over its questions."""
    return standard_error(influences(kind, outcomes))
