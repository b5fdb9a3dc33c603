"""Preference rows: right and wrong answers in every style, ranked by the gold reward, with some labels flipped."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import combinations
from random import Random
from typing import TYPE_CHECKING, Any

from leyden.datamodules.sample import phrases
from leyden.datamodules.sample.items import Item, facts
from leyden.example import Sample

if TYPE_CHECKING:
    from leyden.rewards.function import Gold

RIGHT_SHARE = 0.75
"""Right answers among those drawn. Of two with different rewards, then, half are both right and differ in manner."""
GAP = 0.25
"""Gold rewards closer than this count as equal: half of what politeness is worth. Of two answers they make no row."""
MOST = 8
"""Most answers to one question: there are not many more ways to put some of them."""

Row = dict[str, Any]


def compared(draw: Random, prompt: str, item: Item, columns: Row, noise: float, count: int) -> Row:
    """One row of `count` answers in the styles of instruction rows, not all of the same gold reward.

    With two answers the row has `chosen` and `rejected`, else `responses` and `scores`. In a share of `noise` of the
    rows two answers of different reward have traded their labels; with another noise the rows are otherwise the same.
    The columns `gold_chosen, gold_rejected` or `gold` keep the true rewards, under names that no format reads.
    """
    while True:
        texts: dict[str, None] = {}
        while len(texts) < count:
            said = item if draw.random() < RIGHT_SHARE else wrong(draw, item)
            texts[phrases.answer(draw, said, polite=draw.random() < 0.5, brief=draw.random() < 0.5)] = None
        responses = list(texts)
        samples = [Sample([{"role": "user", "content": prompt}], response, columns) for response in responses]
        gold = [round(reward, 4) for reward in _gold()(samples).tolist()]
        differ = [(i, j) for i, j in combinations(range(count), 2) if abs(gold[i] - gold[j]) >= GAP]
        if differ:
            break
    first, second = draw.choice(differ)
    labels = list(gold)
    if draw.random() < noise:
        labels[first], labels[second] = gold[second], gold[first]
    if count > 2:
        return {"prompt": prompt, "responses": responses, "scores": labels} | columns | {"gold": gold}
    best, worst = (0, 1) if labels[0] > labels[1] else (1, 0)
    pair = {"prompt": prompt, "chosen": responses[best], "rejected": responses[worst]}
    return pair | columns | {"gold_chosen": gold[best], "gold_rejected": gold[worst]}


def labelled(draw: Random, prompt: str, item: Item, columns: Row, noise: float) -> Row:
    """One of the two answers of a row of `compared`, with the label that says whether it was the better one. In `gold`
    stands its true reward, under a name that no format reads."""
    pair = compared(draw, prompt, item, columns, noise, 2)
    good = draw.random() < 0.5
    name = "chosen" if good else "rejected"
    return {"prompt": prompt, "response": pair[name], "label": good} | columns | {"gold": pair[f"gold_{name}"]}


def wrong(draw: Random, item: Item) -> Item:
    """The item with a wrong answer: a rival, what a careless writer would give, or another number."""
    options = item.rivals or item.mistakes
    if options:
        answer = draw.choice(options)
        shown = _shown(item.language).get((item.topic, answer)) or item.shown.replace(item.answer, answer)
    else:
        number = int(item.answer)
        answer = str(draw.choice([n for n in range(number - 3, number + 4) if n >= 0 and n != number]))
        shown = re.sub(r"\d+", answer, item.shown)
    return replace(item, answer=answer, shown=shown)


@cache
def _shown(language: str) -> dict[tuple[str, str], str]:
    """(topic, answer) -> the answer as a sentence shows it, with its own article."""
    return {(item.topic, item.answer): item.shown for item in facts(language) if item.topic != "count"}


@cache
def _gold() -> Gold:
    """The gold reward; imported late, since it imports torch."""
    from leyden.rewards.function import Gold

    return Gold()
