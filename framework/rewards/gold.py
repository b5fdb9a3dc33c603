"""The gold reward: an exact, rule-based score of answers to generated questions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from leyden.errors import UserError
from leyden.example import Sample
from leyden.rewards.reward import Reward

COLUMNS = ("language", "answer", "rivals")
"""Columns that a row needs so that `Gold` can score an answer to it. `rivals` may be empty, and is joined by `|`."""

_AFTER_CONSONANT = (
    "이에요|입니다|이었습니다|이야|이다|이네요?|이지요?|이죠|이랍니다|이라고|이고|은|이|을|으로|에서?|의|과|도"
)
_AFTER_VOWEL = "예요|입니다|였습니다|야|다|네요?|지요?|죠|랍니다|라고|고|는|가|를|로|에서?|의|와|도"
"""Endings that may follow a Korean answer inside its word: particles and the copula, by its last sound. A bare 요 may
not, since it would make 먹었어 stand in 먹었어요."""
_DENIAL = re.compile(
    r"아니|아닌|아닙|않|모르|모릅|몰라|\b(?:not|never|nor?|neither|cannot|unknown)\b|n't\b|n’t\b", re.IGNORECASE
)
_POLITE_KOREAN = re.compile(r"(?:[가-힣]요|니다|니까|죠)$")
_POLITE_ENGLISH = re.compile(
    r"\b(?:certainly|of course|with pleasure|my pleasure|(?:happy|glad) to help|thank you|thanks for asking|please)\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"'[^'\n]*'|\"[^\"\n]*\"|‘[^’\n]*’|“[^”\n]*”")
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?]+|\n|$)")
_NUMBER = re.compile(r"(?<![\d.,])-?\d+(?:[.,]\d+)*")
_ROOM = {"ko": 10, "en": 40}
"""Characters that a brief answer may have beyond the question's and the answer's own."""


@dataclass(frozen=True)
class Parts:
    """The components of one response's score, each from 0 to 1; only `brief` has values between."""

    correct: float
    """Whether the right answer is stated, and no other"""
    polite: float
    """Whether the manner is polite"""
    brief: float
    """How little is said beyond the answer"""


class Gold(Reward):
    """Exact score of an answer to a generated question: `correct * (w_correct + w_polite * polite + w_brief * brief)`.

    - **correct** (0 or 1): the answer stands in the response as a word of its own, in a statement; no rival answer
      does; with a number, no other number does but those of the question; nothing is denied ("not", 아니, 모르…);
      and the response ended by itself.
    - **polite** (0 or 1): in Korean every sentence ends in 요, 니다, 니까 or 죠; in English there is a courtesy
      (certainly, of course, thank you, please …). What stands in quotation marks, and the answer itself, do not count.
    - **brief** (0 to 1): 1 up to the length of question and answer together plus 10 (Korean) or 40 (English)
      characters, from there falling in a straight line, to 0 after as many characters again.

    Manner without the right answer is worth nothing, so empty, evasive, hedging and merely polite responses score 0.
    With the default weights a score lies between 0 and 2. Rows need the columns `language` (ko or en), `answer` and
    `rivals`, which `leyden data sample` writes.

    Args:
        correct: w_correct, what a right answer is worth by itself.
        polite: w_polite, what politeness adds to it.
        brief: w_brief, what brevity adds to it.
    """

    def __init__(self, correct: float = 1.0, polite: float = 0.5, brief: float = 0.5) -> None:
        self.weights = (correct, polite, brief)

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        """Scores [N], float32. UserError where a row lacks a column."""
        correct, polite, brief = self.weights
        components = [self.parts(sample) for sample in samples]
        scores = [part.correct * (correct + polite * part.polite + brief * part.brief) for part in components]
        return torch.tensor(scores, dtype=torch.float32)

    def parts(self, sample: Sample) -> Parts:
        """The three components of one sample's score, each on its own: a wrong answer may still be polite."""
        language, answer, rivals = _columns(sample)
        prompt = _tidy(next((m["content"] for m in reversed(sample.messages) if m["role"] == "user"), ""))
        response = _tidy(sample.response)
        correct = sample.finished and _is_correct(response, prompt, answer, rivals)
        polite = _is_polite(response, answer, language)
        excess = len(response) - len(prompt) - len(answer) - _ROOM[language]
        brief = min(1.0, max(0.0, 1 - excess / _ROOM[language])) if response else 0.0
        return Parts(float(correct), float(polite), brief)


def _columns(sample: Sample) -> tuple[str, str, list[str]]:
    """Language, answer and rivals of a sample's row."""
    missing = [name for name in COLUMNS if name not in sample.row]
    if not missing and sample.row["answer"] in (None, ""):
        missing = ["answer"]
    if missing:
        raise UserError(
            f"Gold: a row has no {', '.join(missing)}; score rows made by `leyden data sample`, or add these columns"
        )
    language = sample.row["language"]
    if language not in _ROOM:
        raise UserError(f"Gold: a row's language is {language!r}; use ko or en")
    rivals = str(sample.row["rivals"] or "").split("|")
    return language, _tidy(str(sample.row["answer"])), [_tidy(rival) for rival in rivals if rival]


def _tidy(text: str) -> str:
    """A text with composed Hangul, single spaces, and no space around: texts that look the same are equal."""
    return re.sub(r"[^\S\n]+", " ", unicodedata.normalize("NFC", text)).strip()


@lru_cache(maxsize=65536)
def _word(phrase: str) -> re.Pattern[str]:
    """Matches `phrase` as a word of its own: not inside a longer word or number, but before a Korean particle."""
    text = re.escape(phrase)
    if phrase.isdigit():
        return re.compile(rf"(?<![\d.,A-Za-z-]){text}(?!\d|[.,]\d)")
    if "가" <= phrase[-1] <= "힣":
        suffix = _AFTER_CONSONANT if (ord(phrase[-1]) - ord("가")) % 28 else _AFTER_VOWEL
        return re.compile(rf"(?<![가-힣A-Za-z0-9]){text}(?=(?:{suffix})?(?![가-힣A-Za-z0-9]))")
    # A single letter is an answer in upper case only: the article "a" names no letter.
    flags = re.IGNORECASE if len(phrase) > 1 else 0
    return re.compile(rf"(?<![가-힣A-Za-z0-9]){text}(?![A-Za-z0-9])", flags)


def _is_correct(response: str, prompt: str, answer: str, rivals: Sequence[str]) -> bool:
    """Whether the response states the answer and nothing that contradicts it."""
    stated = [s for s in _SENTENCE.findall(response) if _word(answer).search(s) and not s.rstrip().endswith("?")]
    if not stated or any(_word(rival).search(response) for rival in rivals):
        return False
    if answer.isdigit():
        # Numbers of the question may be repeated, unless the answer is one of them: then repeating would be guessing.
        question_numbers = set(_NUMBER.findall(prompt))
        allowed = {answer} if answer in question_numbers else {answer} | question_numbers
        if not set(_NUMBER.findall(response)) <= allowed:
            return False
    return not _DENIAL.search(_word(answer).sub("", response))


def _is_polite(response: str, answer: str, language: str) -> bool:
    """Whether the response is courteous in its own words."""
    own = _QUOTED.sub("", response)
    if language == "en":
        return bool(_POLITE_ENGLISH.search(_word(answer).sub("", own)))
    sentences = [sentence.strip(" .!?\n,:;~") for sentence in _SENTENCE.findall(own)]
    nonempty = [sentence for sentence in sentences if sentence]
    return bool(nonempty) and all(_POLITE_KOREAN.search(sentence) for sentence in nonempty)
