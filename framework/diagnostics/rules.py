"""Rules that recognise what goes wrong in training: one for each symptom, each a function of the run's history.

A rule reads windows of several rollouts (or steps) and compares them with the run's own beginning, so that neither
noise nor the scale of a reward makes it fire. The first rollout comes before any training: later ones are compared with
it, and only what teaches nothing at all is reported of it. Healthy numbers are those of PPO on the embedded model with
the exact reward (benchmarks/rewards.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median
from typing import NamedTuple

from leyden.diagnostics.history import History


class Advice(NamedTuple):
    """A configuration key, and what to try in words."""

    key: str
    text: str


def set_to(key: str, value: float | str) -> Advice:
    """Advice to set a key, such as `--model.kl_coef 0.1`."""
    return Advice(f"model.{key}", f"--model.{key} {value if isinstance(value, str) else f'{value:.3g}'}")


def lower_rate(history: History) -> Advice:
    """Advice to lower the learning rate to a third."""
    rate = history.settings.get("lr")
    return set_to("optimizer.lr", rate / 3) if rate else Advice("model.optimizer.lr", "a smaller --model.optimizer.lr")


def stronger_kl(history: History) -> Advice:
    """Advice to halve the KL target or else to double the KL coefficient; without these, to lower the learning rate."""
    coefficient, target = history.settings.get("kl_coef"), history.settings.get("kl_target")
    if coefficient is None:
        return lower_rate(history)
    first = set_to("kl_target", target / 2) if target else set_to("kl_coef", 2 * coefficient if coefficient else 0.05)
    return either(first, lower_rate(history))


def more_entropy(history: History) -> Advice:
    """Advice to raise the entropy bonus, where the algorithm has one, or to lower the learning rate."""
    bonus = history.settings.get("entropy_coef")
    return (
        lower_rate(history) if bonus is None else either(set_to("entropy_coef", 3 * bonus or 0.01), lower_rate(history))
    )


def either(first: Advice, second: Advice) -> Advice:
    """Advice to try the first or the second; the key is the first's."""
    return Advice(first.key, f"{first.text} or {second.text}")


@dataclass(frozen=True)
class Finding:
    """The finding of a rule."""

    name: str
    """Of the rule"""
    value: float
    """The measure that made it fire, in its own unit"""
    sentence: str
    """With the number, what it means, and what to try"""
    key: str
    """The configuration key to try first"""


Rule = Callable[[History], Finding | None]
"""A rule: called with the history of a run after every rollout, or step, it returns what it finds, or None."""


def _finding(name: str, value: float, seen: str, advice: Advice) -> Finding:
    return Finding(name, value, f"{seen}; try {advice.text}", advice.key)


def entropy_collapse(history: History) -> Finding | None:
    """Less than a fifth of the entropy at the start, in two rollouts: what is hardly ever sampled cannot be learnt.

    Healthy: 0.27 to 0.39 nats. Below 0.05 nats there is none to lose.
    """
    before, now = history.first("rollout/entropy"), history.latest("rollout/entropy", 2, skip=1)
    if not before or not now or before[0] < 0.05 or fmean(now) > before[0] / 5:
        return None
    seen = f"rollout entropy fell from {before[0]:.2g} to {fmean(now):.2g} nats a token: answers become all the same"
    return _finding("entropy_collapse", fmean(now), seen, more_entropy(history))


def entropy_rise(history: History) -> Finding | None:
    """Three times the entropy at the start, and more than a nat, in two rollouts: the model forgets how to write."""
    before, now = history.first("rollout/entropy"), history.latest("rollout/entropy", 2, skip=1)
    if not before or not now or fmean(now) < max(3 * before[0], 1.0):
        return None
    seen = f"rollout entropy rose from {before[0]:.2g} to {fmean(now):.2g} nats a token: answers turn into noise"
    return _finding("entropy_rise", fmean(now), seen, lower_rate(history))


def kl_jump(history: History) -> Finding | None:
    """More than a nat a token from the reference, in two rollouts. Healthy: 0.1 (1.3 nats, 13 tokens).

    A nat a token means that the reference gives what is sampled, at every token, about a third of the policy's
    probability.
    """
    kl, length = history.latest("rollout/kl", 2, skip=1), history.latest("rollout/length", 2, skip=1)
    if not kl or not length or fmean(kl) < fmean(length):
        return None
    seen = (
        f"answers are {fmean(kl):.3g} nats from the reference, {fmean(kl) / fmean(length):.2g} a token: the policy no "
        "longer says what the reference would"
    )
    return _finding("kl_jump", fmean(kl), seen, stronger_kl(history))


def kl_acceleration(history: History) -> Finding | None:
    """KL more than doubles between two windows of three rollouts, after it grew by less than half of that before.

    It counts from a quarter of a nat a token on: during a warm-up of the learning rate every KL accelerates.
    """
    kl, length = history.latest("rollout/kl", 9, skip=1), history.latest("rollout/length", 3)
    if not kl or not length:
        return None
    a, b, c = (fmean(kl[at : at + 3]) for at in (0, 3, 6))
    if not (c > 2 * b and c - b > max(2 * (b - a), fmean(length) / 4)):
        return None
    seen = f"KL from the reference speeds up: {a:.2g}, {b:.2g}, {c:.2g} nats an answer over the last nine rollouts"
    return _finding("kl_acceleration", c, seen, stronger_kl(history))


def length_gaming(history: History) -> Finding | None:
    """Answers have grown by half, and longer ones score higher: a correlation above 0.4 in three rollouts. Where it is
    above 0.7, little else is learnt, and a fifth is enough.

    Healthy: they shrink, from 20 to 13 tokens, and the correlation is -0.2 to 0.1. Where longer answers are rightly
    better, it is worth knowing too.
    """
    before, now = history.first("rollout/length"), history.latest("rollout/length", 3, skip=1)
    correlations = history.latest("rollout/length_correlation", 3)
    if not before or not now or not correlations:
        return None
    growth, correlation = fmean(now) / before[0], fmean(correlations)
    if not (growth >= 1.5 and correlation >= 0.4 or growth >= 1.2 and correlation >= 0.7):
        return None
    seen = (
        f"answers grew from {before[0]:.3g} to {fmean(now):.3g} tokens and longer ones score higher (correlation "
        f"{correlation:.2f}): it may be length that is learnt"
    )
    advice = Advice("model.reward", "--model.reward WeightedSum with a Function of yours that takes length off")
    return _finding("length_gaming", correlation, seen, advice)


def clipping(history: History) -> Finding | None:
    """More than three tenths of the tokens beyond the clip, on average over two rollouts. Healthy: 0.03.

    GSPO clips whole responses, a hundred times as many tokens in health (Zheng et al. 2025, section 5.2).
    """
    now = history.latest("policy/clip_fraction by rollout", 2)
    if not now or fmean(now) < 0.3 or history.settings.get("surrogate") == "SequenceRatio":
        return None
    seen = f"{fmean(now):.0%} of the tokens are beyond the clip: the policy moves too far within a rollout"
    stop = history.settings.get("stop_kl")
    return _finding(
        "clipping", fmean(now), seen, either(lower_rate(history), set_to("stop_kl", stop / 2 if stop else 0.1))
    )


def value_function(history: History) -> Finding | None:
    """Values explain less than nothing: below -0.5 in two rollouts, or below 0 in three after the eighth.

    A new head needs some rollouts. Healthy: -0.01 to 0.03 in the first five, 0.35 from the eighth on.
    """
    name = "ppo/explained_variance"
    windows = (history.latest(name, 3, skip=8), 0.0), (history.latest(name, 2, skip=1), -0.5)
    now = next((fmean(values) for values, bound in windows if values and fmean(values) < bound), None)
    if now is None:
        return None
    seen = f"values explain {now:.2g} of the variance of returns, so a constant would do better: advantages are noise"
    weight = history.settings.get("value_weight") or 0.1
    clipped = history.settings.get("value_clip") is not None
    return _finding(
        "value_function", now, seen, set_to("value_clip", "null") if clipped else set_to("value_weight", 10 * weight)
    )


def truncation(history: History) -> Finding | None:
    """More than three tenths of the answers are cut, in two rollouts. Healthy: 0.4 %."""
    ended = history.latest("rollout/eos_rate", 2, skip=1)
    if not ended or 1 - fmean(ended) < 0.3:
        return None
    limit = int(history.settings.get("max_new_tokens") or 256)
    seen = f"{1 - fmean(ended):.0%} of the answers are cut at {limit:,} tokens and scored unfinished"
    return _finding("truncation", 1 - fmean(ended), seen, set_to("sampling.max_new_tokens", str(2 * limit)))


def scores_tie(history: History) -> Finding | None:
    """All answers of a rollout score the same; or all to each prompt, where answers are only compared with others to
    their prompt. Healthy: never."""
    spread, same = history.latest("rollout/spread", 1), history.latest("rollout/same", 1)
    alone = "value_weight" not in history.settings and same == [1.0]
    if spread != [0.0] and not alone:
        return None
    which = "all answers of this rollout" if spread == [0.0] else "all answers to every prompt of this rollout"
    advice = Advice("model.reward", "a --model.reward that tells answers apart; the answers are in rollouts.jsonl")
    return _finding("scores_tie", 0.0, f"{which} score the same: none is better, so the reward teaches nothing", advice)


def nothing_to_compare(history: History) -> Finding | None:
    """All answers score the same for more than four fifths of the prompts, in three rollouts; or over the whole of a
    run that had not so many. PPO does not mind: it compares with values. Healthy: 0.3 to 0.7, with two samples, whose
    scores are more often the same than those of eight."""
    now = history.latest("rollout/same", 3, skip=1)
    if not now and history.ended:
        now = next((few for n in (3, 2, 1) if (few := history.latest("rollout/same", n))), [])
    if not now or fmean(now) < 0.8 or "value_weight" in history.settings:
        return None
    samples = int(history.settings.get("samples") or 8)
    seen = f"all answers score the same for {fmean(now):.0%} of the prompts, which teach nothing"
    other = Advice("model.reward", "a --model.reward that tells answers apart")
    return _finding("nothing_to_compare", fmean(now), seen, either(set_to("samples", str(2 * samples)), other))


def engine_mismatch(history: History) -> Finding | None:
    """The engine's log-probs are more than 0.05 nats a token from those of training, or its distribution more than 0.01
    nats (k3), on average over two rollouts: it samples from another model than the one that is trained.

    Healthy: 1e-5 nats in single precision; a bf16 engine under an fp32 policy has 4e-3, with 0.08 at most and a k3 of
    4e-5 to 7e-5. One whose weights are those of another step has 1 to 18. The bounds stand between: 0.05 is twelve
    times what bf16 rounds, and k3, about half the mean square, is above 0.01 also where few tokens are far off.
    """
    mean, k3 = history.latest("rollout/mismatch", 2), history.latest("rollout/mismatch_k3", 2)
    if not mean or not k3 or (fmean(mean) < 0.05 and fmean(k3) < 0.01) or history.settings.get("lag"):
        return None  # with a lag it is by design that of another step
    seen = (
        f"the engine's log-probs are {fmean(mean):.2g} nats a token from those of training (k3 {fmean(k3):.2g}): it "
        "samples from another model"
    )
    advice = Advice("model.engine", "a --model.engine with the precision, chat template and latest weights of training")
    stronger = {"NoCorrection": "TIS", "TIS": "MIS"}.get(str(history.settings.get("correction")))
    if stronger is not None:
        advice = either(advice, set_to("correction", stronger))
    return _finding("engine_mismatch", fmean(mean), seen, advice)


def chosen_collapse(history: History) -> Finding | None:
    """The better answers of pairs have lost half a nat a token against the reference, over ten steps: the policy may
    be forgetting them, while the worse ones fall faster (Pal et al. 2024). Healthy: 0 to 0.1."""
    now = history.latest("train/chosen_drift", 10)
    if not now or fmean(now) > -0.5:
        return None
    seen = (
        f"chosen answers have become {-fmean(now):.2f} nats a token less likely than under the reference: the policy "
        "may be forgetting them"
    )
    weight, beta = history.settings.get("sft_weight") or 0.0, history.settings.get("beta") or 0.1
    advice = either(set_to("sft_weight", 3 * weight or 0.1), set_to("objective.beta", 3 * beta))
    return _finding("chosen_collapse", fmean(now), seen, either(advice, lower_rate(history)))


def accuracy_stands(history: History) -> Finding | None:
    """At the end of training the better of two held-out answers is told hardly more often than at the first validation:
    by less than two hundredths, and below seven tenths. Healthy: from 0.5 to 0.7 and more."""
    before, now = history.first("val/accuracy"), history.latest("val/accuracy", 1, skip=1)
    if not history.ended or not now or now[0] >= 0.7 or now[0] - before[0] >= 0.02:
        return None
    seen = f"val/accuracy was {before[0]:.2f} at first and is {now[0]:.2f}: what makes answers better was not learnt"
    rate = history.settings.get("lr")
    faster = (
        set_to("optimizer.lr", 10 * rate) if rate else Advice("model.optimizer.lr", "a higher --model.optimizer.lr")
    )
    more = Advice("data.path", "more or clearer pairs (leyden data check counts them)")
    return _finding("accuracy_stands", now[0], seen, either(faster, more))


def no_gradient(history: History) -> Finding | None:
    """The gradient of four steps in a row, or of every step of a run, is exactly 0. Healthy: never, but where a
    threshold lets nothing through."""
    now, first = history.latest("train/grad_norm", 4), history.first("train/grad_norm")
    if not now and history.ended and first:  # fewer steps than four
        now = next(values for n in (3, 2, 1) if (values := history.latest("train/grad_norm", n)))
    if not now or any(now):
        return None
    seen = f"the gradient of {len(now)} steps is exactly 0: they taught nothing and left the weights as they were"
    advice = Advice(
        "data.path", "a --data.path whose rows have trained tokens or pairs, or a --model.reward whose scores differ"
    )
    return _finding("no_gradient", 0.0, seen, advice)


def _trend(values: Sequence[float]) -> float:
    """Share of pairs that rise, less that of those that fall (Kendall's tau): 1 where every value is higher than all
    before it."""
    pairs = list(combinations(values, 2))
    return sum((later > earlier) - (later < earlier) for earlier, later in pairs) / len(pairs)


def overoptimisation(history: History) -> Finding | None:
    """Over six evaluations the held-out reward falls (14 of 15 pairs of them) by more than a quarter of all that it had
    gained, while that of rollouts rises (13 of 15 pairs).

    Of six values that are noise alone one set in 120 falls so. (Gao et al. 2023: the gap between proxy and gold.)
    """
    held, trained = history.latest("eval/reward", 6), history.latest("rollout/reward at eval", 6)
    if not held or not trained or _trend(held) > -0.8 or _trend(trained) < 0.7:
        return None
    if held[0] - held[-1] < (max(held) - history.first("eval/reward")[0]) / 4:
        return None
    seen = (
        f"held-out reward fell from {held[0]:.3g} to {held[-1]:.3g} over six evaluations while that of rollouts rose "
        f"from {trained[0]:.3g} to {trained[-1]:.3g}: the policy learns the reward's mistakes"
    )
    best = Advice("checkpoint.monitor", "--checkpoint.monitor eval/reward --checkpoint.mode max to keep the best")
    return _finding("overoptimisation", held[-1], seen, either(stronger_kl(history), best))


def gradient(history: History) -> Finding | None:
    """The median gradient norm of eight steps is 20 times that of the first eight, and above 10. Healthy: it falls."""
    before, now = history.first("train/grad_norm", 8), history.latest("train/grad_norm", 8, skip=8)
    if not before or not now or median(now) < max(20 * median(before), 10.0):
        return None
    seen = f"the gradient norm rose from {median(before):.3g} to {median(now):.3g}: training is about to diverge"
    return _finding("gradient", median(now), seen, lower_rate(history))


RULES: tuple[Rule, ...] = (
    entropy_collapse,
    entropy_rise,
    kl_jump,
    kl_acceleration,
    length_gaming,
    clipping,
    value_function,
    truncation,
    scores_tie,
    nothing_to_compare,
    engine_mismatch,
    chosen_collapse,
    accuracy_stands,
    no_gradient,
    overoptimisation,
    gradient,
)
