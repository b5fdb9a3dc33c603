"""Rejection sampling: best of n, then supervised fine-tuning on it."""

from __future__ import annotations

import logging
import math
from statistics import fmean
from typing import Any

from torch import Tensor

from leyden.batch.forest import Batch
from leyden.batch.trajectory import Trajectory
from leyden.batch.tree import Tree
from leyden.errors import UserError
from leyden.losses import negative_log_likelihood
from leyden.on_policy.on_policy import OnPolicy

log = logging.getLogger("leyden")


class RejectionSampling(OnPolicy):
    """Each rollout answers every prompt `samples` times, keeps the best answers and imitates them (Touvron et al. 2023,
    section 3.2.3; Dong et al. 2023, RAFT). Of equal scores the earlier sample is better. The KL of best-of-n from the
    policy is at most log n - (n - 1) / n (Beirami et al. 2024).

    Args:
        samples: responses to each prompt, n, 2 or more.
        top: how many of them to keep.
        threshold: keep only those with at least this score; prompts may then go without any.
    """

    looks_at = 1

    def __init__(
        self, *args: Any, samples: int = 8, top: int = 1, threshold: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, samples=samples, **kwargs)
        if samples < 2 or not 1 <= top < samples:
            raise UserError(
                f"--model.samples {samples} --model.top {top}: to reject any, give 2 samples or more and keep fewer"
            )
        self.top, self.threshold = top, threshold

    def credit(self, trees: list[Tree], seen: Trajectory) -> Trajectory:
        kept = [found for tree in trees if (found := self.best(tree)).responses]
        scores = [score for tree in kept for score in tree.scores or ()]
        if not kept:
            log.warning("no answer reached --model.threshold %s, so this rollout teaches nothing", self.threshold)
        n = self.samples
        self.found |= {
            "rollout/kept": len(scores) / sum(len(tree.responses) for tree in trees),
            "rollout/kept_reward": fmean(scores) if scores else math.nan,
            "rollout/kl_bound": math.log(n) - (n - 1) / n,
        }
        self.found |= {f"rollout/best_of_{m}": value for m, value in best_of(trees).items()}
        return Trajectory.of(kept)

    def best(self, tree: Tree) -> Tree:
        """The tree with only the responses to keep, best first."""
        scores = tree.scores or []
        order = sorted(range(len(scores)), key=lambda k: (-scores[k], k))[: self.top]
        order = [k for k in order if self.threshold is None or scores[k] >= self.threshold]
        return Tree(tree.prompt, [tree.responses[k] for k in order], [scores[k] for k in order], None, tree.row)

    def loss(self, batch: Batch) -> Tensor:
        return batch.token_mean(negative_log_likelihood(self.policy(batch).logp))


def best_of(trees: list[Tree]) -> dict[int, float]:
    """Mean reward of the best of 1, 2, 4 … n responses, from all n: a maximum over m of them drawn without
    replacement, averaged over all draws and over prompts.

    With scores in order s_1 <= … <= s_n, E max of m = sum_i s_i C(i - 1, m - 1) / C(n, m).
    """
    n = min(len(tree.responses) for tree in trees)
    sizes = [2**power for power in range(n.bit_length()) if 2**power <= n]

    def expected(scores: list[float], m: int) -> float:
        ways = math.comb(len(scores), m)
        return sum(s * math.comb(i, m - 1) for i, s in enumerate(sorted(scores))) / ways

    return {m: fmean(expected(tree.scores or [], m) for tree in trees) for m in sizes}
