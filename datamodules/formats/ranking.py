"""The responses of a row that are compared, best first: each is better than the next, and none comes twice."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.formats.turns import normalised_turns
from leyden.example import Example, Message


def best_first(responses: Sequence[Sequence[Message]], worth: Sequence[float] | None = None) -> list[int]:
    """Numbers of the responses that can be compared, the best one first.

    Of responses with the same worth only the first in the row is kept, since none of them is better than another. So
    no pair of the rest is a tie, and for Plackett-Luce the ranking of a part is as good a sample as that of the whole
    (Luce's choice axiom). Of copies that follow one another in the ranking only the first is kept.

    Args:
        responses: in the order of the row.
        worth: the worth of each response, higher is better; None where they stand best first.

    Raises:
        RowError: fewer than two are left, or a response stands both above and below another one.
    """
    if len(responses) < 2:
        raise RowError(f"only {len(responses)} answer; a preference needs two or more", "only one response")
    texts = [normalised_turns(response) for response in responses]
    order = list(range(len(texts)))
    if worth is not None:
        order.sort(key=lambda number: -worth[number])
        places = [(texts[number], worth[number]) for number in order]
        order = [number for at, number in enumerate(order) if places.index(places[at]) == at]
    order = [order[at] for at in without_repeats([texts[number] for number in order])]
    if len(order) < 2:
        which = "chosen equals rejected" if len(responses) == 2 else "all responses are equal"
        raise RowError(f"{which}: the row says nothing about preference; drop it", which)
    if worth is not None:
        order = [number for at, number in enumerate(order) if at == 0 or worth[number] < worth[order[at - 1]]]
    if len(order) < 2:
        raise RowError("all answers are worth the same: the row says nothing about preference; drop it", "tied")
    return order


def without_repeats(keys: Sequence[Hashable]) -> list[int]:
    """Numbers of the responses, best first, without those that equal the one before.

    Raises:
        RowError: a response comes again after another one, and so would be both better and worse than it.
    """
    numbers = [number for number, key in enumerate(keys) if number == 0 or key != keys[number - 1]]
    if len({keys[number] for number in numbers}) < len(numbers):
        raise RowError(
            "the same response stands both above and below another one; keep one of its places or drop the row",
            "contradicts itself",
        )
    return numbers


def compared(example: Example, min_gap: float = 0.0, most: int | None = None) -> Example:
    """The example with the responses, best first, that `above_gap` and then `spread` leave.

    Raises:
        RowError: `min_gap` is set and there are no scores.
        LeftOut: all responses are closer than the gap.
    """
    numbers = list(range(len(example.responses)))
    if min_gap:
        if example.scores is None:
            problem = f"no scores to see a gap of {min_gap:g} in; leave out --data.min_gap, or drop the row"
            raise RowError(problem, "no scores")
        numbers = above_gap(example.scores, min_gap)
        if len(numbers) < 2:
            raise LeftOut("closer than min_gap")
    numbers = [numbers[place] for place in spread(len(numbers), most)]
    scores = example.scores and [example.scores[number] for number in numbers]
    left_out = example.left_out + len(example.responses) - len(numbers)
    return replace(example, responses=[example.responses[n] for n in numbers], scores=scores, left_out=left_out)


def above_gap(scores: Sequence[float], min_gap: float) -> list[int]:
    """Numbers of the responses, best first, of which each scores at least `min_gap` less than the one before.

    From the best down, a response too close to the last one kept is left out, so no pair of the rest is closer.
    """
    numbers = [0]
    for number, score in enumerate(scores):
        gap = scores[numbers[-1]] - score
        if number and (gap >= min_gap or math.isclose(gap, min_gap)):  # 0.3 - 0.2 is a little less than 0.1
            numbers.append(number)
    return numbers


def spread(count: int, most: int | None) -> list[int]:
    """At most `most` of 0 … count - 1: the first, the last, and evenly between."""
    if most is None or count <= most:
        return list(range(count))
    return [(2 * place * (count - 1) + most - 1) // (2 * (most - 1)) for place in range(most)]
