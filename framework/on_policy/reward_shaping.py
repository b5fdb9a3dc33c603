"""How scores become rewards, and what the KL from the reference costs: the settings of policy-gradient algorithms."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leyden.batch.trajectory import Trajectory
from leyden.distributed import Reduce, one_process


@dataclass
class KLController:
    """β, what a nat of KL from the reference costs in units of the reward.

    Args:
        coefficient: β, at first.
        target: nats a response that β is adapted to reach; None keeps β (Ziegler et al. 2019, section 2.2).
        horizon: responses over which β is adapted.
    """

    coefficient: float = 0.05
    target: float | None = None
    horizon: float = 10_000.0

    def update(self, kl: float, responses: int) -> None:
        """Raise β where the KL is above its target, lower it where it is below: by at most 20 % a `horizon`.

        Args:
            kl: from the reference, mean nats a response over a rollout of all processes.
            responses: in that rollout.
        """
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * responses / self.horizon


@dataclass
class ScoreTransform:
    """Transforms scores into rewards, in this order: penalties, normalisation, clipping.

    Args:
        eos_penalty: taken off a response that was cut at the length limit.
        normalise: take off the mean of all scores so far and divide by their standard deviation, so that β and the
            learning rate mean the same for every reward.
        clip: most that a score may be away from 0.
        overlong: the last share of the length limit, in which a response costs something: nothing where it begins,
            `overlong_penalty` at the limit, in proportion between (Yu et al. 2025, eq. 13, where it is 0.2). 0 is no
            such penalty.
        overlong_penalty: taken off at the length limit.
    """

    eos_penalty: float = 0.0
    normalise: bool = False
    clip: float | None = None
    overlong: float = 0.0
    overlong_penalty: float = 1.0
    _moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0], init=False, repr=False)
    """Count, mean and summed squared distance from it, of all scores so far (Welford 1962)."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlong <= 1:
            raise ValueError(
                f"overlong {self.overlong}: a share of the length limit, 0 or more and at most 1; 0.2 is usual"
            )

    def __call__(
        self, batch: Trajectory, stop: Collection[int], longest: int, reduce: Reduce = one_process
    ) -> tuple[Tensor, dict[str, float]]:
        """The scores [N] as they become rewards, and what to log.

        Args:
            batch: responses with scores.
            stop: token ids that end a response.
            longest: tokens of a response at the length limit.
            reduce: sums over the processes that hold the rest of the rollout.
        """
        score = batch.score - self.eos_penalty * truncated(batch, stop).float()
        metrics: dict[str, float] = {}
        if self.overlong:
            price = self.overlong_penalty * overlong_share(batch.lengths(), longest, self.overlong * longest)
            total, count = reduce(torch.stack([price.double().sum(), torch.ones_like(price).double().sum()])).tolist()
            score, metrics["rollout/overlong"] = score - price, total / max(count, 1.0)
        if self.normalise:
            self._take(score.double(), reduce)
            count, mean, squares = self._moments
            deviation = (squares / count) ** 0.5
            score = (score - mean) / max(deviation, 1e-6)
            metrics |= {"rollout/score_mean": mean, "rollout/score_std": deviation}
        if self.clip is not None:
            beyond = (score.abs() > self.clip).double()
            share = reduce(torch.stack([beyond.sum(), torch.ones_like(beyond).sum()]))
            metrics["rollout/score_clipped"] = float(share[0] / share[1])
            score = score.clamp(-self.clip, self.clip)
        return score, metrics

    def _take(self, score: Tensor, reduce: Reduce) -> None:
        """Add scores [N] of this process, and those of the others, to the moments."""
        count, mean, squares = self._moments
        new, summed = reduce(torch.stack([torch.ones_like(score).sum(), score.sum()])).tolist()
        here = summed / new
        total, apart = count + new, here - mean
        squares += float(reduce(((score - here) ** 2).sum())) + apart**2 * count * new / total
        self._moments = [total, mean + apart * new / total, squares]

    def state_dict(self) -> dict[str, Any]:
        """The moments."""
        return {"moments": list(self._moments)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._moments = list(state["moments"])


def truncated(batch: Trajectory, stop: Collection[int]) -> Tensor:
    """Whether each response was cut at the length limit: [N] bool.

    Args:
        stop: token ids that end a response.
    """
    return ~torch.isin(batch.tokens[batch.last], torch.tensor(sorted(stop), dtype=torch.long))


def overlong_share(length: Tensor, longest: int, cache: float) -> Tensor:
    """How far into the last `cache` tokens before the limit each response reaches: [N] tokens -> [N], 0 to 1.

        0 where |y| <= L_max - L_cache        (|y| - (L_max - L_cache)) / L_cache beyond

    The negative of Yu et al. 2025, eq. 13, which has -1 for what is longer than L_max; nothing is here.

    Args:
        length: [N] |y|, tokens of each response.
        longest: L_max.
        cache: L_cache, above 0.
    """
    return ((length - (longest - cache)) / cache).clamp(0.0, 1.0)
