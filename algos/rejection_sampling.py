"""Rejection sampling: best of n, then supervised fine-tuning on it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from leyden.batch import Batch, Trajectory
from leyden.errors import UserError
from leyden.losses import negative_log_likelihood
from leyden.on_policy import AnsweredPrompt, OnPolicy, Rollout

log = logging.getLogger("leyden")


class RejectionSampling(OnPolicy):
    """Each rollout answers every prompt `samples` times, keeps the best answers and imitates them (Touvron et al. 2023,
    section 3.2.3; Dong et al. 2023, RAFT). Of equal scores the earlier sample is better. `kl_bound` says how far what
    is kept is from the policy, in nats.

    Args:
        samples: responses to each prompt, n, 2 or more.
        top: how many of them to keep.
        threshold: keep only those with at least this score; prompts may then go without any.
    """

    kl_responses = 1

    def __init__(
        self, *args: Any, samples: int = 8, top: int = 1, threshold: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, samples=samples, **kwargs)
        if samples < 2 or not 1 <= top < samples:
            raise UserError(
                f"--model.samples {samples} --model.top {top}: to reject any, give 2 samples or more and keep fewer"
            )
        if self.sampling.temperature == 0:
            raise UserError(
                "--model.sampling.temperature 0: all answers to a prompt would be the same and none the best; give a "
                "temperature above 0"
            )
        self.top, self.threshold = top, threshold

    @property
    def drops_prompts(self) -> bool:
        return self.threshold is not None

    @property
    def trained_on(self) -> int:
        return self.top

    def credit(self, rollout: Rollout) -> Trajectory:
        kept = [self.best(one) for one in rollout.answered]
        scores = [score for one in kept for score in one.scores or ()]
        curve = best_of(rollout.answered)
        responses = sum(len(one.responses) for one in rollout.answered)
        mine = [len(scores), math.fsum(scores), responses, len(kept), *curve.values()]
        count, total, responses, prompts, *best = self.all_reduce(torch.tensor(mine, dtype=torch.float64)).tolist()
        if not count:
            log.warning("no answer reached --model.threshold %s, so this rollout teaches nothing", self.threshold)
        self.rollout_metrics |= {
            "rollout/kept": count / responses,
            "rollout/kept_reward": total / count if count else math.nan,
            "rollout/kl_bound": kl_bound(self.samples, self.top, count / responses),
        } | {f"rollout/best_of_{m}": value / prompts for m, value in zip(curve, best, strict=True)}
        return Rollout.pack(kept)

    def best(self, one: AnsweredPrompt) -> AnsweredPrompt:
        """The prompt with only the responses to keep, best first."""
        scores = one.scores or []
        order = sorted(range(len(scores)), key=lambda k: (-scores[k], k))[: self.top]
        return one.keep([k for k in order if self.threshold is None or scores[k] >= self.threshold])

    def loss(self, batch: Batch) -> Tensor:
        return batch.token_mean(negative_log_likelihood(self.policy(batch).logp))


def best_of(answered: Sequence[AnsweredPrompt]) -> dict[int, float]:
    """For each power of two m ≤ n the expected best score of m responses drawn without replacement from a prompt's n,
    summed over prompts.

    With scores in order s_1 ≤ … ≤ s_n, E max of m = Σ_i s_i C(i - 1, m - 1) / C(n, m).
    """
    n = min(len(one.responses) for one in answered)
    sizes = [2**power for power in range(n.bit_length()) if 2**power <= n]

    def expected(scores: list[float], m: int) -> float:
        ways = math.comb(len(scores), m)
        return sum(s * math.comb(i, m - 1) for i, s in enumerate(sorted(scores))) / ways

    return {m: math.fsum(expected(one.scores or [], m) for one in answered) for m in sizes}


def kl_bound(n: int, top: int, kept: float) -> float:
    """The most nats that what is kept is from the policy π, as KL(kept || π), averaged over what is kept.

    Let u be the share of a prompt's answers that are worse than an answer y, ties broken by chance: uniform for y ~ π.
    An answer is kept if fewer than k of its n - 1 rivals are better, which has the probability w(u) = P(Bin(n - 1,
    1 - u) < k), and if it reaches the threshold, so that u ≥ u_0 for the prompt's own u_0. So a = E[w(u); u ≥ u_0] of
    all answers are kept, with the density w(u) / a against π, and

        KL = -log a + E[w(u) log w(u); u ≥ u_0] / a

    of prompts and answers together, which is no less than that of answers given their prompts. As a function of the
    share that one prompt keeps the second term's numerator is concave (its slope, log w(u_0), falls), so it is largest
    where all prompts keep the same share a: that is computed here, whatever the threshold. Without one a = k / n, and
    for k = 1 this is log n - (n - 1) / n (Beirami et al. 2024, theorem 1); where a threshold rarely lets anything
    through, it is -log a.

    Args:
        n: responses to each prompt.
        top: k, most that are kept of them.
        kept: a, the share of all responses that are kept.
    """
    if not kept:
        return math.nan
    u = 1 - (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    w = sum((math.comb(n - 1, m) * (1 - u) ** m * u ** (n - 1 - m) for m in range(top)), torch.zeros_like(u))
    inside = w.cumsum(0) / len(u) <= kept + 1e-9  # from the best answer down, as far as something is kept
    return max(float(torch.xlogy(w, w)[inside].sum()) / len(u) / kept - math.log(kept), 0.0)
