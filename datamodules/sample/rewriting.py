"""Small rewriting jobs on words and sentences, and the draw of any item: facts, sums and rewriting."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from leyden.datamodules.sample import words
from leyden.datamodules.sample.everyday import ENGLISH_ACTIONS, korean_forms
from leyden.datamodules.sample.items import Item, facts, sums
from leyden.datamodules.sample.korean import fill


def _repeat(draw: Random, language: str) -> Item:
    index, times = draw.randrange(len(words.pairs())), draw.randint(2, 4)
    word = words.pairs()[index][0 if language == "ko" else 1]
    answer, rival = " ".join([word] * times), " ".join([word] * (times + 1))
    key = f"{index} {times}"
    if language == "ko":
        front = fill("{w:을} " + ["두", "세", "네"][times - 2] + " 번", w=f"'{word}'")
        asks: tuple[str, ...] = (
            f"{front} 써 줘.",
            f"{front} 되풀이해 줘.",
            f"{front} 써 주세요.",
            f"{front} 반복해 줄래?",
        )
        return Item("repeat", key, "ko", (f"{front} 쓴 것",), "뭐", answer, f"'{answer}'", (rival,), asks)
    count = ["two", "three", "four"][times - 2]
    asks = (f"Repeat '{word}' {count} times.", f"Write '{word}' {count} times.", f"Please say '{word}' {count} times.")
    return Item("repeat", key, "en", (f"'{word}' {count} times",), "What", answer, f"'{answer}'", (rival,), asks)


def _reverse(draw: Random, language: str) -> Item:
    indices = draw.sample(range(len(words.pairs())), draw.randint(2, 3))
    chosen = [words.pairs()[i][0 if language == "ko" else 1] for i in indices]
    text, answer = " ".join(chosen), " ".join(reversed(chosen))
    orders = [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1]] if len(chosen) == 3 else []
    # Besides other orders: a run to and fro, which holds the answer and its opposite at once.
    runs = [chosen[:-1] + chosen[::-1], chosen[::-1] + chosen[1:]]
    rivals = tuple(" ".join(run) for run in [*([chosen[i] for i in order] for order in orders), *runs])
    key = " ".join(map(str, indices))
    if language == "ko":
        front = fill("{w:을} 거꾸로", w=f"'{text}'")
        asks = (f"{front} 써 줘.", f"{front} 써 주세요.", f"'{text}'의 순서를 뒤집어 줘.")
        return Item("reverse", key, "ko", (f"{front} 쓴 것",), "뭐", answer, f"'{answer}'", rivals, asks)
    asks = (f"Reverse the words '{text}'.", f"Write '{text}' in reverse order.", f"Please reverse '{text}'.")
    return Item("reverse", key, "en", (f"'{text}' in reverse",), "What", answer, f"'{answer}'", rivals, asks)


def _replace(draw: Random, language: str) -> Item:
    *indices, new = draw.sample(range(len(words.pairs())), draw.randint(3, 4))
    old = draw.randrange(len(indices))
    word = [pair[0 if language == "ko" else 1] for pair in words.pairs()]
    text = " ".join(word[i] for i in indices)
    answer = " ".join(word[new if place == old else i] for place, i in enumerate(indices))
    key = " ".join(map(str, [*indices, new, old]))
    if language == "ko":
        front = f"'{text}'에서 " + fill("{a:을} {b:으로}", a=word[indices[old]], b=word[new])
        asks = (f"{front} 바꿔 줘.", f"{front} 바꿔 주세요.", f"{front} 고쳐 줘.")
        return Item("replace", key, "ko", (f"{front} 바꾼 것",), "뭐", answer, f"'{answer}'", (), asks, (text,))
    change = f"'{word[indices[old]]}' with '{word[new]}'"
    asks = (f"Replace {change} in '{text}'.", f"In '{text}', replace {change}.", f"Please swap {change} in '{text}'.")
    name = f"'{text}' with '{word[new]}' for '{word[indices[old]]}'"
    return Item("replace", key, "en", (name,), "What", answer, f"'{answer}'", (), asks, (text,))


def _manners(draw: Random, language: str) -> Item:
    """Make a plain sentence polite or, in Korean, a polite one plain."""
    make_polite = language == "en" or draw.random() < 0.5
    if language == "ko":
        forms = korean_forms(draw)
        plain, polite = forms["plain"], forms["polite"]
    else:
        plain = draw.choice(ENGLISH_ACTIONS.strip().splitlines()).split("|")[0]
        polite = f"please {plain}"
    text, answer = (plain, polite) if make_polite else (polite, plain)
    key = f"{plain} {make_polite}"
    if language == "ko":
        front = fill("{w:을} ", w=f"'{text}'") + ("존댓말" if make_polite else "반말")
        asks: tuple[str, ...] = (
            f"{front}로 바꿔 줘.",
            f"{front}로 바꿔 주세요.",
            f"{front}로 고쳐 줘.",
            f"{front}로 말해 줘.",
        )
        return Item("manners", key, "ko", (f"{front}로 한 것",), "뭐", answer, f"'{answer}'", (), asks, (text,))
    asks = (f"Make '{text}' polite.", f"Say '{text}' in a polite way.", f"Turn '{text}' into a polite request.")
    name = f"the polite form of '{text}'"
    return Item("manners", key, "en", (name,), "What", answer, f"'{answer}'", (), asks, (text,))


REWRITING: tuple[Callable[[Random, str], Item], ...] = (_repeat, _reverse, _replace, _manners)


def draw_item(draw: Random, language: str, split: str | None = None) -> Item:
    """A random item: 60% facts, 15% sums, 25% rewriting. `split` None takes either side."""
    while True:
        kind = draw.random()
        if kind < 0.6:
            item = draw.choice(facts(language))
        elif kind < 0.75:
            item = draw.choice(sums(language))
        else:
            item = draw.choice(REWRITING)(draw, language)
        if split is None or item.split == split:
            return item
