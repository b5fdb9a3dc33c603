"""Which responses of a row are compared, best first: each is better than the next, and none stands twice."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.formats.turns import seen
from leyden.example import Example, Message


def best_first(responses: Sequence[Sequence[Message]], worth: Sequence[float] | None = None) -> list[int]:
    """Numbers of the responses that can be compared, the best one first.

    Of responses that are worth the same only the first in the row is kept, since none of them is better than another:
    no pair of the rest is ever a tie, and for Plackett-Luce the ranking of a part is as good a sample as the whole
    (Luce's choice axiom). Copies of a response that follow one another in the ranking are kept once.

    Args:
        responses: in the order of the row.
        worth: of each, higher is better; None where they stand best first.

    Raises:
        RowError: fewer than two are left, or a response stands both above and below another one.
    """
    if len(responses) < 2:
        raise RowError(f"only {len(responses)} answer; a preference needs two or more", "only one response")
    texts = [seen(response) for response in responses]
    order = list(range(len(texts)))
    if worth is not None:
        order.sort(key=lambda number: -worth[number])
        places = [(texts[number], worth[number]) for number in order]
        order = [number for at, number in enumerate(order) if places.index(places[at]) == at]
    order = [order[at] for at in apart([texts[number] for number in order])]
    if len(order) < 2:
        which = "chosen equals rejected" if len(responses) == 2 else "all responses are equal"
        raise RowError(f"{which}: the row says nothing about preference; drop it", which)
    if worth is not None:
        order = [number for at, number in enumerate(order) if at == 0 or worth[number] < worth[order[at - 1]]]
    if len(order) < 2:
        raise RowError("all answers are worth the same: the row says nothing about preference; drop it", "tied")
    return order


def apart(keys: Sequence[Hashable]) -> list[int]:
    """Numbers of the responses, best first, that are left when each run of equal ones is kept once.

    Raises:
        RowError: a response comes back after another one, and so would be both better and worse than it.
    """
    kept = [number for number, key in enumerate(keys) if number == 0 or key != keys[number - 1]]
    if len({keys[number] for number in kept}) < len(kept):
        raise RowError(
            "the same response stands both above and below another one; keep one of its places or drop the row",
            "contradicts itself",
        )
    return kept


def compared(example: Example, min_gap: float = 0.0, most: int | None = None) -> Example:
    """The example with those of its responses, best first, that two options leave: `above_gap` and `spread`.

    Raises:
        RowError: a gap is asked for and there are no scores.
        LeftOut: all responses are closer than the gap.
    """
    kept = list(range(len(example.responses)))
    if min_gap:
        if example.scores is None:
            problem = f"no scores to see a gap of {min_gap:g} in; leave out --data.min_gap, or drop the row"
            raise RowError(problem, "no scores")
        kept = above_gap(example.scores, min_gap)
        if len(kept) < 2:
            raise LeftOut("closer than min_gap")
    kept = [kept[place] for place in spread(len(kept), most)]
    scores = example.scores and [example.scores[number] for number in kept]
    left_out = example.left_out + len(example.responses) - len(kept)
    return replace(example, responses=[example.responses[n] for n in kept], scores=scores, left_out=left_out)


def above_gap(scores: Sequence[float], min_gap: float) -> list[int]:
    """Numbers of the responses, best first, that are left when each must be at least `min_gap` below the one before.

    From the best down, a response too close to the last one kept is left out, so no pair of the rest is closer.
    """
    kept = [0]
    for number, score in enumerate(scores):
        gap = scores[kept[-1]] - score
        if number and (gap >= min_gap or math.isclose(gap, min_gap)):  # 0.3 - 0.2 is a little less than 0.1
            kept.append(number)
    return kept


def spread(count: int, most: int | None) -> list[int]:
    """At most `most` of 0 … count - 1: the first, the last, and evenly between."""
    if most is None or count <= most:
        return list(range(count))
    return [(2 * place * (count - 1) + most - 1) // (2 * (most - 1)) for place in range(most)]
