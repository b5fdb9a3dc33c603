"""What is done to scores before they become rewards."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from leyden.batch.trajectory import Trajectory


@dataclass
class ScoreShape:
    """In this order: the penalty, normalisation, clipping.

    Args:
        eos_penalty: taken off a response that was cut at the length limit.
        normalise: take off the mean of all scores so far and divide by their standard deviation, so that the price of
            KL and the learning rate mean the same for every reward.
        clip: most that a score may be away from 0.
    """

    eos_penalty: float = 0.0
    normalise: bool = False
    clip: float | None = None
    _moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0], init=False, repr=False)
    """Count, mean and summed squared distance from it, of all scores so far (Welford 1962)."""

    def __call__(self, whole: Trajectory, stop: Collection[int]) -> tuple[Tensor, dict[str, float]]:
        """The scores [N] as they become rewards, and what to log."""
        ended = torch.isin(whole.tokens[whole.last], torch.tensor(sorted(stop), dtype=torch.long))
        score = whole.score - self.eos_penalty * (~ended).float()
        found: dict[str, float] = {}
        if self.normalise:
            self._take(score)
            count, mean, squares = self._moments
            deviation = (squares / count) ** 0.5
            score = (score - mean) / max(deviation, 1e-6)
            found |= {"rollout/score_mean": mean, "rollout/score_std": deviation}
        if self.clip is not None:
            found["rollout/score_clipped"] = float((score.abs() > self.clip).float().mean())
            score = score.clamp(-self.clip, self.clip)
        return score, found

    def _take(self, score: Tensor) -> None:
        count, mean, squares = self._moments
        new, here = len(score), float(score.double().mean())
        total, apart = count + new, here - mean
        squares += float(((score.double() - here) ** 2).sum()) + apart**2 * count * new / total
        self._moments = [total, mean + apart * new / total, squares]

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"moments": list(self._moments)}

    def load(self, state: dict[str, Any]) -> None:
        """From `state`."""
        self._moments = list(state["moments"])
