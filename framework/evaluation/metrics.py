"""What is measured on answers: reward, KL, wins over the reference, diversity, language and speech level."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

import torch

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
    found = {"korean_rate": fmean(float(is_korean(answer)) for answer in asked)}
    if levels:
        found["formality"] = fmean(float(not (polite and plain)) for polite, plain in levels)
        found["polite_rate"] = sum(polite for polite, _ in levels) / sum(map(sum, levels))
    return found


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
    drawn = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(torch.tensor(values)[drawn].mean(1), torch.tensor([0.025, 0.975])).tolist()
    return low, high


def error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 of one value."""
    return stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def measured(rows: Sequence[Row], text: Sequence[tuple[float, float]] = ()) -> dict[str, float]:
    """The measures of one look at a policy.

    Args:
        rows: one answer to each prompt.
        text: general text: summed loss in nats and trained tokens, by parts.

    Returns:
        reward and kl (nats, summed per answer), each with its standard error as _se; length (tokens); eos_rate, the
        share of answers that ended by themselves; entropy (nats a token); distinct_2; win_rate against the reference
        with its interval as _low and _high; what `korean` finds; retained_loss (nats a token). What is not known is
        left out.
    """
    rewards, tokens = [row["reward"] for row in rows], [len(row["tokens"]) for row in rows]
    texts, asked = [row["response"] for row in rows], [row["prompt"][-1]["content"] for row in rows]
    found = {
        "reward": fmean(rewards),
        "reward_se": error(rewards),
        "length": fmean(tokens),
        "eos_rate": fmean(float(row["finished"]) for row in rows),
        "entropy": sum(row["entropy"] for row in rows) / max(sum(tokens), 1),
        "distinct_2": distinct(texts),
    } | korean(asked, texts)
    if all("kl" in row for row in rows):
        nats = [row["kl"] for row in rows]
        found |= {"kl": fmean(nats), "kl_se": error(nats)}
    if all("reference_reward" in row for row in rows):
        won = wins(rewards, [row["reference_reward"] for row in rows])
        low, high = bootstrap(won)
        found |= {"win_rate": fmean(won), "win_rate_low": low, "win_rate_high": high}
    if trained := sum(count for _, count in text):
        found["retained_loss"] = sum(loss for loss, _ in text) / trained
    return found
