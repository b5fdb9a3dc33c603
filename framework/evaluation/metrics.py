"""Measures of answers: reward, KL, wins over the reference, diversity, language and speech level.

A measure is a class with its columns, what `leyden compare` calls them, and what two runs must share to be compared by
them. One of yours stands in a file of yours: `--eval.measures my_file.MyMeasure`; `compare` shows it beside the others.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any, ClassVar, Literal

Fact = Literal[
    "prompts", "reward", "reference", "text", "sampling", "tokenizer", "algorithm", "rows", "task", "template",
    "examples", "questions",
]  # fmt: skip
Row = Mapping[str, Any]
"""An answer with what is known of it: `prompt` (messages), `response`, `tokens`, `finished`, `reward`, `entropy` (nats,
summed over its tokens); `kl` (nats, summed), `reference` and `reference_reward` where there is a reference."""

_LETTER = re.compile(r"[^\W\d_]")
_HANGUL = re.compile(r"[가-힣ㄱ-ㅎㅏ-ㅣ\u1100-\u11ff]")
_SENTENCE = re.compile(r"[^.!?…~\n]+")
_POLITE = re.compile(r"(?:요|니다|니까|죠|십시오|시오)$")
_PLAIN = re.compile(
    r"(?:[았었했겠]어|이야|[^가-힣]야|해|거야|[았었겠하]지|잖아|[않같좋많]아|[네군]|[을할]래|[하보]자|[느으]?냐|구나|거든|[어아]라|[이하]다)$"
)
"""Endings of the plain levels (해체 and 해라체) beside a 다 after a closed syllable. Only those that hardly end a noun:
what matches neither is no sentence with a level, such as an item of a list."""


def is_korean(text: str) -> bool:
    """Whether half or more of a text's letters are Hangul."""
    letters = len(_LETTER.findall(text))
    return letters > 0 and 2 * len(_HANGUL.findall(text)) >= letters


def speech_levels(text: str) -> tuple[int, int]:
    """How many Korean sentences end politely (해요체, 하십시오체: 존댓말), and how many plainly (반말 and 해라체).

    A rule over the last syllables of each sentence; sentences that end in a noun count as neither.
    """
    polite = plain = 0
    for sentence in _SENTENCE.findall(text):
        end = re.sub(r"[^가-힣A-Za-z0-9]+$", "", sentence)
        polite += bool(_POLITE.search(end))
        plain += not _POLITE.search(end) and bool(_PLAIN.search(end) or _declares(end))
    return polite, plain


def _declares(sentence: str) -> bool:
    """Whether it ends like 간다 or 있다, and not like 바다: the syllable before the 다 is a closed one."""
    closed = len(sentence) > 1 and "가" <= sentence[-2] <= "힣" and (ord(sentence[-2]) - ord("가")) % 28 > 0
    return sentence.endswith("다") and closed


def korean(prompts: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """How Korean prompts are answered; empty where no prompt is Korean.

    Returns:
        korean_rate, the share of them answered in Korean; and of the Korean answers whose sentences have a speech
        level: formality, the share that keeps to one level throughout, and polite_rate, the share of polite sentences.
    """
    asked = [answer for prompt, answer in zip(prompts, answers, strict=True) if is_korean(prompt)]
    if not asked:
        return {}
    levels = [pair for answer in asked if is_korean(answer) and any(pair := speech_levels(answer))]
    rates = {"korean_rate": fmean(float(is_korean(answer)) for answer in asked)}
    if levels:
        rates["formality"] = fmean(float(not (polite and plain)) for polite, plain in levels)
        rates["polite_rate"] = sum(polite for polite, _ in levels) / sum(map(sum, levels))
    return rates


def distinct(answers: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words among all of them (Li et al. 2016, section 5.1, over all answers together); 0 where
    there is none. It falls with the number of answers, so it compares sets of equal size only."""
    grams = [gram for answer in answers for gram in _grams(answer.split(), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    if n == 2:
        return list(pairwise(words))
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]


def wins(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """1 where an answer scores higher than the other to its prompt, 0 where lower, a half where they tie."""
    return [float(a > b) + 0.5 * (a == b) for a, b in zip(mine, theirs, strict=True)]


def bootstrap(values: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of values under resampling (Efron 1979): always the same for the same."""
    import torch  # here, since `leyden compare` reads the columns below and needs no tensors

    drawn = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(torch.tensor(values)[drawn].mean(1), torch.tensor([0.025, 0.975])).tolist()
    return low, high


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 of one value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Column:
    """A column of metrics.csv, as `leyden compare` shows it.

    Args:
        column: its name there.
        name: what it is called in tables.
        unit: of its numbers, in a few words.
        needs: what runs must share to be compared by it.
        best: whether more or less of it is better, for sorting.
        asked: whether it is only shown where all runs that have it can be compared by it.
    """

    column: str
    name: str
    unit: str = ""
    needs: tuple[Fact, ...] = ()
    best: Literal["most", "least"] = "most"
    asked: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For evaluation.json, from where `compare` learns of measures that are not its own."""
        return asdict(self) | {"needs": list(self.needs)}


ANSWERS: tuple[Fact, ...] = ("prompts", "sampling")
"""What all runs must share whose answers are compared."""
TEXT: tuple[Fact, ...] = ("text", "tokenizer")


class Measure(ABC):
    """Numbers about the answers of one pass. Write one, and name it by `--eval.measures my_file.MyMeasure`."""

    columns: ClassVar[tuple[Column, ...]]
    """Every number that it gives; one that says how sure another is ends in _se, or in _low and _high, and is none."""

    @abstractmethod
    def __call__(self, rows: Sequence[Row], text: Sequence[tuple[float, float]]) -> dict[str, float]:
        """Numbers by their column without `eval/`; what is not known is left out.

        Args:
            rows: one answer to each prompt, in the order of the prompts.
            text: general text: summed loss in nats and trained tokens, by parts.
        """


class RewardMeasure(Measure):
    """reward: mean score, with its standard error over prompts."""

    columns = (Column("eval/reward", "reward", "mean per answer", (*ANSWERS, "reward")),)

    def __call__(self, rows: Sequence[Row], text: Sequence[tuple[float, float]]) -> dict[str, float]:
        rewards = [row["reward"] for row in rows]
        return {"reward": fmean(rewards), "reward_se": standard_error(rewards)}


class KLMeasure(Measure):
    """kl: nats, summed per answer, with its standard error over prompts; only where there is a reference."""

    columns = (Column("eval/kl", "KL", "nats per answer, from the reference", (*ANSWERS, "reference"), "least"),)

    def __call__(self, rows: Sequence[Row], text: Sequence[tuple[float, float]]) -> dict[str, float]:
        if not all("kl" in row for row in rows):
            return {}
        nats = [row["kl"] for row in rows]
        return {"kl": fmean(nats), "kl_se": standard_error(nats)}


class WinRateMeasure(Measure):
    """win_rate: share of prompts whose answer scores higher than the reference's, ties half, with its interval."""

    columns = (
        Column(
            "eval/win_rate",
            "win rate",
            "share of answers that beat the reference's; a tie is half a win",
            (*ANSWERS, "reward", "reference"),
        ),
    )

    def __call__(self, rows: Sequence[Row], text: Sequence[tuple[float, float]]) -> dict[str, float]:
        if not all("reference_reward" in row for row in rows):
            return {}
        won = wins([row["reward"] for row in rows], [row["reference_reward"] for row in rows])
        low, high = bootstrap(won)
        return {"win_rate": fmean(won), "win_rate_low": low, "win_rate_high": high}


class LengthMeasure(Measure):
    """length: tokens of an answer."""

    columns = (Column("eval/length", "length", "tokens per answer", (*ANSWERS, "tokenizer"), "least"),)

    def __call__(self, rows: Sequence[Row], text: Sequence[tuple[float, float]]) -> dict[str, float]:
        return {"length": fmean(len(row["tokens"]) for row in rows)}


class RetainedLossMeasure(Measure):
    """retained_loss: nats a token of general text. What it grew by since before training is forgetting, which `compare`
    works out."""

    columns = (
        Column(
            "eval/forgetting", "forgetting", "nats per token of general text, more than before training", TEXT, "least"
        ),
        Column("eval/retained_loss", "retained loss", "nats per token of general text", TEXT, "least"),
    )

    def __call__(self, rows: Sequence[Row], text: Sequence[tuple[float, float]]) -> dict[str, float]:
        tokens = sum(count for _, count in text)
        return {"retained_loss": sum(loss for loss, _ in text) / tokens} if tokens else {}


class EosRateMeasure(Measure):
    """eos_rate: share of answers that ended by themselves."""

    columns = (Column("eval/eos_rate", "ended", "share of answers that end by themselves", ANSWERS),)

    def __call__(self, rows: Sequence[Row], text: Sequence[tuple[float, float]]) -> dict[str, float]:
        return {"eos_rate": fmean(float(row["finished"]) for row in rows)}


class EntropyMeasure(Measure):
    """entropy: nats a token."""

    columns = (Column("eval/entropy", "entropy", "nats per token", (*ANSWERS, "tokenizer")),)

    def __call__(self, rows: Sequence[Row], text: Sequence[tuple[float, float]]) -> dict[str, float]:
        return {"entropy": sum(row["entropy"] for row in rows) / max(sum(len(row["tokens"]) for row in rows), 1)}


class DistinctMeasure(Measure):
    """distinct_2: share of word pairs that are different ones over all answers."""

    columns = (Column("eval/distinct_2", "distinct-2", "share of different word pairs in all answers", ANSWERS),)

    def __call__(self, rows: Sequence[Row], text: Sequence[tuple[float, float]]) -> dict[str, float]:
        return {"distinct_2": distinct([row["response"] for row in rows])}


class KoreanMeasure(Measure):
    """korean_rate, formality and polite_rate; see `korean`."""

    columns = (
        Column("eval/korean_rate", "Korean", "share of Korean prompts answered in Korean", ANSWERS),
        Column("eval/formality", "formality", "share of Korean answers that keep to one speech level", ANSWERS),
        Column("eval/polite_rate", "polite", "share of Korean sentences that are polite", ANSWERS),
    )

    def __call__(self, rows: Sequence[Row], text: Sequence[tuple[float, float]]) -> dict[str, float]:
        return korean([row["prompt"][-1]["content"] for row in rows], [row["response"] for row in rows])


MEASURES: tuple[Measure, ...] = (
    RewardMeasure(),
    KLMeasure(),
    WinRateMeasure(),
    LengthMeasure(),
    RetainedLossMeasure(),
    EosRateMeasure(),
    EntropyMeasure(),
    DistinctMeasure(),
    KoreanMeasure(),
)
"""Taken in every evaluation, in the order of tables."""


def measure_answers(
    rows: Sequence[Row], text: Sequence[tuple[float, float]] = (), own: Sequence[Measure] = ()
) -> dict[str, float]:
    """All measures of one pass, those of the user last; see `Measure`."""
    return {name: value for measure in (*MEASURES, *own) for name, value in measure(rows, text).items()}
