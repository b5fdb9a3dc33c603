"""Metrics of a rollout, the same for every algorithm that samples."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from statistics import fmean

from torch import Tensor

from leyden.batch.trajectory import Trajectory
from leyden.losses import kl_estimate
from leyden.on_policy.rollout import AnsweredPrompt, Rollout


def divergence(trajectory: Trajectory) -> Tensor:
    """log policy / reference summed over each response: [N] nats, whose mean is an estimate of their KL divergence."""
    return trajectory.per_branch(trajectory.old_logp - trajectory.ref_logp)


def largest_mismatch(trajectory: Trajectory) -> float:
    """Most nats between the sampler's account of a token's log-prob and that of training; 0 without responses."""
    apart = (trajectory.old_logp - trajectory.sampled_logp).abs() * (trajectory.weight > 0)
    return float(apart.max()) if len(apart) else 0.0


def rollout_sums(rollout: Rollout, terms: Sequence[str] = ()) -> dict[str, float]:
    """The sums over one process's part from which `rollout_metrics` is computed once they are added up.

    Args:
        rollout: the part.
        terms: the names of the reward's terms, the same on every process.
    """
    batch = rollout.trajectory
    assert batch is not None
    sums: dict[str, float] = dict.fromkeys(("responses", "scored", "score", "squares", "length", "finished"), 0.0)
    sums |= dict.fromkeys(("groups", "best", "same", "x", "y", "xx", "yy", "xy"), 0.0)
    sums |= dict.fromkeys([f"{what} {name}" for name in terms for what in ("term", "count")], 0.0)
    for one in rollout.all_answered:
        scores, lengths = one.scores or [], [float(len(response.tokens)) for response in one.responses]
        sums["responses"] += len(lengths)
        sums["scored"] += len(scores)
        sums["score"] += math.fsum(scores)
        sums["squares"] += math.fsum(score * score for score in scores)
        sums["length"] += sum(lengths)
        sums["finished"] += sum(response.finished for response in one.responses)
        several = len(scores) > 1
        if several:
            sums["groups"] += 1
            sums["best"] += max(scores)
            sums["same"] += max(scores) == min(scores)
        # less the mean over the prompt's responses, where there are several: longer questions may have better answers
        middle = (fmean(scores), fmean(lengths)) if several else (0.0, 0.0)
        for score, length in zip(scores, lengths, strict=bool(scores)):
            x, y = score - middle[0], length - middle[1]
            for name, value in (("x", x), ("y", y), ("xx", x * x), ("yy", y * y), ("xy", x * y)):
                sums[name] += value
    apart = (batch.sampled_logp - batch.old_logp).double() * (batch.weight > 0)
    return (
        sums
        | term_sums(rollout.all_answered)
        | {
            "measured": float(len(batch.group)),
            "kl": float(divergence(batch).double().sum()),
            "tokens": float(batch.weight.double().sum()),
            "logp": float((batch.old_logp * batch.weight).double().sum()),
            "mismatch": float(apart.abs().sum()),
            "mismatch_k3": float(kl_estimate(apart, "k3").sum()),
        }
    )


def rollout_metrics(sums: Mapping[str, float], full: bool = True) -> dict[str, float]:
    """Means over the responses of all processes, from the sums of `rollout_sums`.

    Args:
        sums: over all processes.
        full: whether responses were drawn from the whole distribution; see `Sampling.is_full`.

    Returns:
        Where there is a reward, rollout/reward, rollout/reward_NAME for each term that it is made of, and
        rollout/spread (standard deviation of all scores); rollout/length (tokens); rollout/eos_rate (share that ended
        by themselves); rollout/length_correlation (Pearson's, of score and length, unless one of them is always the
        same); with several samples a prompt rollout/best (mean of the best of each) and rollout/same (share of prompts
        whose responses all score the same, which teach nothing). Where `full`, rollout/kl (nats, summed per response);
        rollout/entropy (nats a token); rollout/mismatch (nats a token between the sampler's account of its log-probs
        and that of training); rollout/mismatch_k3 (nats a token): of other samples these means would be of nothing in
        particular.

        rollout/mismatch_k3 estimates KL(μ || π) a token, of the sampler's distribution μ from training's π. With
        d = log μ(y) - log π(y) it is the mean of exp(-d) - 1 + d over y sampled from μ: E[d] is that KL, E[exp(-d)] =
        Σ μ π / μ = 1 takes the rest away, and no token's part is below 0, since exp(-d) >= 1 - d (Schulman 2020).
    """
    responses, tokens = max(sums["responses"], 1.0), max(sums["tokens"], 1.0)
    metrics = {
        "length": sums["length"] / responses,
        "eos_rate": sums["finished"] / responses,
    }
    if sums["scored"]:
        metrics["reward"], squares = sums["score"] / responses, sums["squares"] / responses
        variance = squares - metrics["reward"] ** 2
        metrics["spread"] = math.sqrt(variance) if variance > 1e-12 * squares else 0.0  # more than rounding
    if full:
        metrics["kl"] = sums["kl"] / max(sums["measured"], 1.0)
        metrics |= {"entropy": -sums["logp"] / tokens, "mismatch": sums["mismatch"] / tokens}
        metrics["mismatch_k3"] = sums["mismatch_k3"] / tokens
    n, xx, yy = sums["responses"], sums["xx"], sums["yy"]
    x_spread, y_spread = n * xx - sums["x"] ** 2, n * yy - sums["y"] ** 2
    if x_spread > 1e-12 * n * xx and y_spread > 1e-12 * n * yy:  # more than rounding
        metrics["length_correlation"] = (n * sums["xy"] - sums["x"] * sums["y"]) / math.sqrt(x_spread * y_spread)
    if sums["groups"]:
        metrics |= {"best": sums["best"] / sums["groups"], "same": sums["same"] / sums["groups"]}
    return {f"rollout/{name}": value for name, value in (metrics | term_means(sums)).items()}


def term_sums(answered: Sequence[AnsweredPrompt]) -> dict[str, float]:
    """What `term_means` are computed from: the sum and the count of every term of the reward."""
    sums: dict[str, float] = {}
    for name, values in (term for one in answered for term in one.terms.items()):
        sums[f"term {name}"] = sums.get(f"term {name}", 0.0) + math.fsum(values)
        sums[f"count {name}"] = sums.get(f"count {name}", 0.0) + len(values)
    return sums


def term_means(sums: Mapping[str, float]) -> dict[str, float]:
    """`reward_NAME` for each term of the reward: its mean over responses."""
    terms = sorted(name.removeprefix("term ") for name in sums if name.startswith("term "))
    return {f"reward_{name}": sums[f"term {name}"] / max(sums[f"count {name}"], 1.0) for name in terms}


class RolloutClock:
    """The timer behind perf/rollout_seconds, perf/rollout_share and perf/generated_tokens_per_second."""

    def __init__(self) -> None:
        self._began = self._sampled = self._ended = 0.0
        self._trained: float | None = None

    def pause(self, seconds: float) -> None:
        """Leave time out that was neither sampling nor training since the last rollout was ready."""
        if self._ended:
            self._ended += seconds

    def start(self) -> None:
        """A rollout starts, and training on the one before has ended."""
        self._began = time.monotonic()
        self._trained = self._began - self._ended if self._ended else None

    def sampled(self) -> None:
        """All responses are there and scored."""
        self._sampled = time.monotonic()

    def end(self, tokens: float) -> dict[str, float]:
        """The rollout is ready: perf/generated_tokens_per_second (sampling and scoring, all processes),
        perf/rollout_seconds, and perf/rollout_share of it and the training before it, pauses left out.

        Args:
            tokens: that were sampled, by all processes.
        """
        self._ended = time.monotonic()
        took = self._ended - self._began
        metrics = {
            "perf/generated_tokens_per_second": tokens / max(self._sampled - self._began, 1e-9),
            "perf/rollout_seconds": took,
        }
        return metrics if self._trained is None else metrics | {"perf/rollout_share": took / (took + self._trained)}
