"""Items of sample data: an `Item` is one thing to ask about in one language. Every fact and sum is one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from leyden.datamodules.sample import places, words, world
from leyden.datamodules.sample.korean import fill


@dataclass(frozen=True)
class Item:
    """One thing to ask about, with its answer. `names` are noun phrases for it, such as "the capital of France"."""

    topic: str
    key: str
    """Its content, the same in both languages; decides the split."""
    language: str
    names: tuple[str, ...]
    wh: str
    answer: str
    shown: str
    """The answer as a sentence shows it: with a unit, an article or quotation marks."""
    rivals: tuple[str, ...] = ()
    """Wrong answers that a response must not name next to the right one."""
    asks: tuple[str, ...] = ()
    """Questions and requests that only fit this kind of item, besides those made from `names`."""
    mistakes: tuple[str, ...] = ()
    """Wrong answers that a careless writer would give, where there are no rivals."""

    @property
    def split(self) -> str:
        """`train` or `heldout` (one content in five), by a stable hash of the content."""
        digest = hashlib.blake2b(f"{self.topic}:{self.key}".encode(), digest_size=8).digest()
        return "heldout" if int.from_bytes(digest, "big") % 5 == 0 else "train"


@dataclass(frozen=True)
class Relation:
    """The wording of a table of facts: templates with `{s}` for the subject, in Korean and in English."""

    table: str
    names: tuple[str, ...]
    wh: str
    english_names: tuple[str, ...]
    english_wh: str = "What"
    asks: tuple[str, ...] = ()
    english_asks: tuple[str, ...] = ()
    shown: str = "{a}"
    english_shown: str = "{a}"


RELATIONS = {
    "capital": Relation(
        places.CAPITAL, ("{s}의 수도", "{s} 수도"), "어디", ("the capital of {s}", "the capital city of {s}")
    ),
    "continent": Relation(
        places.CONTINENT,
        ("{s:이} 있는 대륙", "{s:이} 속한 대륙"),
        "어디",
        ("the continent of {s}", "the continent where {s} lies"),
        asks=("{s:은} 어느 대륙에 있어?", "{s:은} 어느 대륙에 있나요?"),
        english_asks=("Which continent is {s} in?",),
    ),
    "sound": Relation(
        world.SOUND,
        ("{s:이} 내는 소리", "{s}의 울음소리"),
        "뭐",
        ("the sound of {s}", "the sound that {s} makes"),
        asks=("{s:은} 어떻게 울어?", "{s:은} 어떤 소리를 내나요?"),
        english_asks=("What does {s} say?",),
        shown="'{a}'",
        english_shown='"{a}"',
    ),
    "young": Relation(
        world.YOUNG,
        ("{s}의 새끼를 부르는 말", "새끼 {s:을} 이르는 말"),
        "뭐",
        ("the name of a young {s}", "the word for a baby {s}"),
        english_asks=("What do you call a young {s}?",),
    ),
    "colour": Relation(
        world.COLOUR,
        ("{s}의 색", "{s}의 색깔"),
        "뭐",
        ("the colour of {s}", "the usual colour of {s}"),
        asks=("{s:은} 무슨 색이야?", "{s:은} 무슨 색인가요?"),
        english_asks=("What colour is {s}?",),
    ),
    "opposite": Relation(
        words.OPPOSITE,
        ("'{s}'의 반대말", "'{s}'의 반의어"),
        "뭐",
        ("the opposite of '{s}'", "the word opposite to '{s}'"),
        shown="'{a}'",
        english_shown="'{a}'",
    ),
    "tool": Relation(world.TOOL, ("{s}",), "뭐", ("the tool for {s}", "the thing used for {s}")),
    "count": Relation(
        world.COUNT, ("{s}",), "몇", ("the number of {s}",), english_asks=("How many {s} are there?", "Count the {s}.")
    ),
    "kind": Relation(
        world.KIND,
        ("{s:이} 속하는 종류", "{s}의 종류"),
        "뭐",
        ("the kind of thing that {s} is", "the class of {s}"),
        asks=("{s:은} 어떤 종류야?", "{s:은} 어떤 종류에 속하나요?"),
        english_asks=("What kind of thing is {s}?",),
    ),
    "workplace": Relation(
        places.WORKPLACE,
        ("{s:이} 일하는 곳", "{s}의 일터"),
        "어디",
        ("the place where {s} works", "the workplace of {s}"),
        asks=("{s:은} 어디에서 일해?", "{s:은} 어디에서 일하나요?"),
        english_asks=("Where does {s} work?",),
        english_shown="the {a}",
    ),
    "next": Relation(world.NEXT, ("{s}",), "뭐", ("{s}",)),
}


def _unarticled(text: str) -> str:
    return re.sub(r"^(an?|the) ", "", text)


def _how_many(count: str) -> str:
    """The Korean question word for a count, which goes by its unit: 몇 개 for 4개, 며칠 for 7일."""
    unit = count.lstrip("0123456789")
    return "며칠" if unit == "일" else f"몇 {unit}"


def _mirrored(text: str) -> str:
    """A table of opposites with every line also turned round."""
    lines = [[half.split("=") for half in line.split("|")] for line in text.strip().splitlines()]
    return text.strip() + "\n" + "\n".join(f"{k[1]} = {k[0]} | {e[1]} = {e[0]}" for k, e in lines)


def _related(topic: str, relation: Relation, language: str) -> Iterator[Item]:
    """The items of one table in one language."""
    side = 0 if language == "ko" else 1
    names, asks = (relation.names, relation.asks) if side == 0 else (relation.english_names, relation.english_asks)
    shown = relation.shown if side == 0 else relation.english_shown
    facts = world.table(_mirrored(relation.table) if topic == "opposite" else relation.table)

    def bare(answer: str) -> str:
        return re.sub(r"(\d+).*", r"\1", answer) if topic == "count" else _unarticled(answer)

    known = sorted({bare(fact[side][1]) for fact in facts if fact[side][0]})
    for fact in facts:
        subject, answer = fact[side]
        if not subject:
            continue
        alike = {bare(other[side][1]) for other in facts if other[side][0] == subject}
        rivals = () if topic == "count" else tuple(w for w in known if w not in alike and w not in subject)
        yield Item(
            topic,
            " ".join(half[0] for half in fact),
            language,
            tuple(fill(name, s=subject) for name in names),
            _how_many(answer) if (side, topic) == (0, "count") else (relation.wh, relation.english_wh)[side],
            bare(answer),
            shown.format(a=answer),
            rivals,
            tuple(fill(ask, s=subject) for ask in asks),
        )


def _lexical(language: str) -> Iterator[Item]:
    """Translations and first letters of the word list."""
    pairs = words.pairs()
    for korean, english in pairs:
        if language == "ko":
            names: tuple[str, ...] = (f"'{korean}'의 영어 단어", f"'{korean}'의 영어 낱말")
            asks: tuple[str, ...] = (
                fill("{w:은} 영어로 뭐야?", w=f"'{korean}'"),
                fill("{w:을} 영어로 말해 주세요.", w=f"'{korean}'"),
            )
            answer, others = english, [pair[1] for pair in pairs]
        else:
            names = (f"the Korean word for '{english}'", f"the Korean for '{english}'")
            asks = (f"How do you say '{english}' in Korean?", f"Translate '{english}' into Korean.")
            answer, others = korean, [pair[0] for pair in pairs]
        rivals = tuple(sorted({other for other in others if other != answer}))
        yield Item(
            "translation",
            korean,
            language,
            names,
            "뭐" if language == "ko" else "What",
            answer,
            f"'{answer}'",
            rivals,
            asks,
        )
        # 바다 can be read as its own first syllable with the copula, 바 + 다, so asking for that would answer it.
        if language == "ko" and len(korean) > 1 and korean != "바다":
            first, letters = korean[0], {pair[0][0] for pair in pairs}
            rivals = tuple(sorted(letters - {first}))
            yield Item("first", korean, "ko", (f"'{korean}'의 첫 글자",), "뭐", first, f"'{first}'", rivals)
        if language == "en" and english[0] not in "ai":
            first, letters = english[0].upper(), {pair[1][0].upper() for pair in pairs}
            rivals = tuple(sorted(letters - {first, "A", "I"}))
            yield Item("first", english, "en", (f"the first letter of '{english}'",), "What", first, first, rivals)


@cache
def facts(language: str) -> tuple[Item, ...]:
    """Every fact in one language."""
    items = [item for topic, relation in RELATIONS.items() for item in _related(topic, relation, language)]
    return (*items, *_lexical(language))


@cache
def sums(language: str) -> tuple[Item, ...]:
    """Addition to 10 + 10, subtraction from at most 12, and the multiplication table to 5 x 9.

    Sums whose answer is one of the numbers in the question are left out: repeating the question would answer them.
    """
    equations = []
    for a in range(1, 13):
        for b in range(1, 11):
            if a <= 10:
                equations.append(("+", a, b, a + b))
            if b < a:
                equations.append(("-", a, b, a - b))
            if 2 <= a <= 5 and 2 <= b <= 9:
                equations.append(("×", a, b, a * b))
    korean = {"+": "더하기", "-": "빼기", "×": "곱하기"}
    english = {"+": "plus", "-": "minus", "×": "times"}
    items = []
    for sign, a, b, result in equations:
        if result in (a, b):
            continue
        # a + b and b + a are one content, so that neither gives the other away.
        key = f"{a} {sign} {b}" if sign == "-" else f"{min(a, b)} {sign} {max(a, b)}"
        if language == "ko":
            names: tuple[str, ...] = (f"{a} {korean[sign]} {b}", f"{a} {sign} {b}")
            items.append(Item("sum", key, "ko", names, "얼마", str(result), str(result)))
        else:
            names = (f"{a} {english[sign]} {b}", f"{a} {sign} {b}")
            asks = (f"How much is {names[0]}?", f"Calculate {names[1]}.")
            items.append(Item("sum", key, "en", names, "What", str(result), str(result), (), asks))
    return tuple(items)
