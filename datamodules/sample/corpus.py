"""Documents of generated text for pretraining: facts, sums and rewriting in running prose, and everyday sentences.

Text states every fact, those that instruction rows hold out included, but in other words than those rows ask in.
"""

from __future__ import annotations

from random import Random

from leyden.datamodules.sample import phrases
from leyden.datamodules.sample.everyday import KOREAN_WHO, english_sentence, korean_forms, korean_sentence, talk
from leyden.datamodules.sample.items import Item, sums
from leyden.datamodules.sample.korean import particle
from leyden.datamodules.sample.rewriting import draw_item

ASKED = {
    "ko": (("질문: ", " 답: "), ("문: ", "\n답: "), ("", " "), ("", "\n")),
    "en": (("Question: ", " Answer: "), ("Q: ", "\nA: "), ("", " ")),
}


def _dialogue(draw: Random, language: str, item: Item) -> str:
    """A question and its answer, as a page of questions would print them or as two people would say them."""
    question = draw.choice(phrases.asks(item, text=True))
    reply = phrases.answer(draw, item, draw.random() < 0.5, draw.random() < 0.92)
    if draw.random() < 0.3:
        first, second = draw.sample(KOREAN_WHO[12:16] if language == "ko" else ["Tom", "Anna", "Ben", "Mia"], 2)
        return f"{first}: {question}\n{second}: {reply}"
    before, between = draw.choice(ASKED[language])
    return f"{before}{question}{between}{reply}"


def _rewriting(draw: Random, language: str) -> str:
    """A pair of plain and polite sentences, as a grammar book would list them."""
    if language == "en":
        return english_sentence(draw)
    forms = korean_forms(draw)
    forms.pop("when")
    return " ".join(f"{text}." for text in forms.values())


def _everyday(draw: Random, language: str) -> str:
    """A sentence or two of daily life, or a remark with its reply."""
    if draw.random() < 0.5:
        remark, reply = talk(draw, language)
        if language == "ko" and draw.random() < 0.3:
            return f"{remark} {particle(draw.choice(KOREAN_WHO[1:]), '이')} 말했다. {reply}"
        return f"{remark} {reply}"
    return korean_sentence(draw) if language == "ko" else english_sentence(draw)


def document(draw: Random, language: str) -> str:
    """One document: a handful of pieces, each a sentence or a short exchange."""
    pieces = []
    for _ in range(draw.randint(4, 9)):
        kind = draw.random()
        item = draw_item(draw, language)
        if kind < 0.4:
            pieces.append(phrases.statement(draw, item))
        elif kind < 0.8:
            pieces.append(_dialogue(draw, language, item))
        elif kind < 0.88:
            line = draw.choice(sums(language))
            pieces.append(f"{line.names[1]} = {line.answer}")
        elif kind < 0.91:
            pieces.append(_rewriting(draw, language))
        else:
            pieces.append(_everyday(draw, language))
    return draw.choice((" ", "\n")).join(pieces)
