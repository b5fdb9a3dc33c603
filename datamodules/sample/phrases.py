"""The wording of questions and answers, for every `Item`."""

from __future__ import annotations

from random import Random

from leyden.datamodules.sample.items import Item
from leyden.datamodules.sample.korean import fill, particle

KOREAN_ASKS = (
    "{n:은} {q:이야}?",
    "{n:은} {q:이에요}?",
    "{n:은} {q:입니다}?",
    "{n:이} {q:이야}?",
    "{n:이} {q:인지} 알려 줘.",
    "{n:이} {q:인지} 알려 주세요.",
    "{n:이} {q:인지} 알아?",
    "{n:을} 말해 줘.",
    "{n:을} 알려 주세요.",
    "{n:이} 궁금해.",
    "{n:은}?",
)
ENGLISH_ASKS = (
    "{q} is {n}?",
    "Tell me {n}.",
    "Could you tell me {n}?",
    "Please tell me {n}.",
    "Do you know {n}?",
    "I want to know {n}.",
    "What about {n}?",
)
"""Questions of instruction rows. Pretraining text uses only those below, so it never holds a row's question."""

KOREAN_TEXT_ASKS = (
    "{n:은} {q:일까}?",
    "{n:은} {q:인가}?",
    "{n:이} {q:이었지}?",
    "{n:은} {q:이더라}?",
    "{n:은} 과연 {q:이에요}?",
    "혹시 {n:이} {q:인지} 아는 사람 있어?",
    "누가 {n:을} 물었다.",
)
ENGLISH_TEXT_ASKS = (
    "{q} might {n} be?",
    "Does anyone know {n}?",
    "They asked me about {n}.",
    "So {n} is what?",
    "And what is {n}, then?",
    "Who can name {n}?",
)

KOREAN_STATES = (
    "{n:은} {a:이다}.",
    "{n:은} {a:이에요}.",
    "{n:은} {a:입니다}.",
    "{n:은} {a:이야}.",
    "{a:이} {n:이다}.",
    "{n:은} 바로 {a:이다}.",
)
ENGLISH_STATES = ("{n} is {a}.", "{n} is {a}.", "{a} is {n}.", "We learn that {n} is {a}.")

POLITE_OPENERS = (
    "좋은 질문이에요.",
    "네, 알려 드릴게요.",
    "그게 궁금하셨군요.",
    "잠시만요, 생각해 볼게요.",
    "물어봐 주셔서 고맙습니다.",
    "천천히 설명해 드릴게요.",
)
POLITE_CLOSERS = (
    "도움이 되었으면 좋겠어요.",
    "더 궁금한 것이 있으면 또 물어봐 주세요.",
    "이제 궁금증이 풀리셨기를 바라요.",
    "오늘도 좋은 하루 보내세요.",
)
PLAIN_OPENERS = (
    "좋은 질문이네.",
    "응, 알려 줄게.",
    "그게 궁금했구나.",
    "잠깐만, 생각해 볼게.",
    "물어봐 줘서 고마워.",
    "천천히 설명해 줄게.",
)
PLAIN_CLOSERS = (
    "도움이 됐으면 좋겠어.",
    "더 궁금한 것이 있으면 또 물어봐.",
    "이제 궁금증이 풀렸기를 바라.",
    "오늘도 좋은 하루 보내.",
)
COURTESIES = ("Certainly, {x}", "Of course, {x}", "Sure, glad to help: {x}", "With pleasure, {x}")
LONG_ENGLISH = (
    "Well, that is something that a lot of people ask. {x} So there you have it, and that is all there is to it.",
    "Let us think about this for a moment. {x} You can find it in any book if you like.",
    "There is more than one way to answer this. {x} Now you know it, and you can tell your friends.",
)
LONG_POLITE_ENGLISH = (
    "Thank you for your kind question. {x} Please ask again if there is anything else that you need.",
    "Thank you for asking, that is a good question. {x} Please have a lovely afternoon, and thank you again.",
    "Of course, it is a pleasure to answer this one. {x} Thank you for your patience.",
)


def capital(text: str) -> str:
    """`text` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def _contract(question: str) -> str:
    """A Korean question in natural wording: 까 in formal ones, 뭐 fused with the copula, kinds asked for as such."""
    for stiff, said in (
        ("입니다?", "입니까?"),
        ("뭐입니까", "무엇입니까"),
        ("뭐인지", "뭔지"),
        ("뭐일까", "뭘까"),
        ("뭐인가", "무엇인가"),
        ("속하는 종류를", "어떤 종류인지"),  # 알려 줘, 말해 줘, 물었다
    ):
        question = question.replace(stiff, said)
    return question


def asks(item: Item, text: bool = False) -> list[str]:
    """Every question for `item`: those of instruction rows, or those that pretraining text may use."""
    if item.language == "ko":
        frames: tuple[str, ...] = KOREAN_TEXT_ASKS if text else KOREAN_ASKS
        made = [fill(frame, n=name, q=item.wh) for name in item.names for frame in frames]
        made = [_contract(question) for question in made]
    else:
        frames = ENGLISH_TEXT_ASKS if text else ENGLISH_ASKS
        made = [capital(frame.format(n=name, q=item.wh)) for name in item.names for frame in frames]
    return made if text else [*made, *item.asks]


def question(draw: Random, item: Item) -> str:
    """One question of an instruction row. Rewriting is mostly asked for by its own requests."""
    if item.asks and draw.random() < (0.8 if item.topic in ("repeat", "reverse", "replace", "manners") else 0.3):
        return draw.choice(item.asks)
    return draw.choice(asks(item))


def answer(draw: Random, item: Item, polite: bool, brief: bool) -> str:
    """The right answer in a given style. Brief answers are a word or a sentence, others wrap it in small talk."""
    whole = not brief or draw.random() < 0.5
    if item.language == "ko":
        copula = draw.choice(("이에요", "입니다")) if polite else "이야"
        said = particle(item.shown, copula) + "."
        if whole:
            said = particle(draw.choice(item.names), "은") + " " + said
        if brief:
            return said
        openers, closers = (POLITE_OPENERS, POLITE_CLOSERS) if polite else (PLAIN_OPENERS, PLAIN_CLOSERS)
        return f"{draw.choice(openers)} {said} {draw.choice(closers)}"
    said = f"{draw.choice(item.names)} is {item.shown}." if whole else f"it is {item.shown}."
    if brief:
        return draw.choice(COURTESIES).format(x=said) if polite else capital(said)
    return draw.choice(LONG_POLITE_ENGLISH if polite else LONG_ENGLISH).format(x=capital(said))


def statement(draw: Random, item: Item) -> str:
    """The fact as a sentence of running text."""
    name = draw.choice(item.names)
    if item.language == "ko":
        return fill(draw.choice(KOREAN_STATES), n=name, a=item.shown)
    return capital(draw.choice(ENGLISH_STATES).format(n=name, a=item.shown))
