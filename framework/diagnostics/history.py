"""The history of a run for the rules: the first and the latest values of each measure that they read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

FIRST, LATEST = 8, 64
"""Values of a measure that are stored from its beginning and from its end."""
PER_STEP = ("policy/clip_fraction",)
"""Measures of steps that are read as means over a rollout only: its first step is always within the clip."""
WATCHED = (
    "rollout/entropy",
    "rollout/kl",
    "rollout/reward",
    "rollout/length",
    "rollout/length_correlation",
    "rollout/eos_rate",
    "rollout/same",
    "rollout/mismatch",
    "rollout/mismatch_k3",
    "rollout/spread",
    "ppo/explained_variance",
    "eval/reward",
    "train/grad_norm",
    "train/chosen_drift",
    "val/accuracy",
    *PER_STEP,
)
Point = tuple[int, float]


class History:
    """Measures by name, each a list of (optimizer step, value). Plain numbers, small enough for every checkpoint.

    Two more are derived: at each new rollout `NAME by rollout`, the mean of a measure of steps over the rollout that is
    over, and at each evaluation pass `rollout/reward at eval`, the mean training reward of the latest two rollouts.

    Args:
        settings: of the algorithm, by the names of its arguments; those that it does not have are missing.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self.settings: Mapping[str, Any] = settings or {}
        self.ended = False
        """Whether training is over, so that what has not happened will not."""
        self._points: dict[str, list[Point]] = {}
        self._first: dict[str, list[Point]] = {}

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of an optimizer step. A measure logged again at the same step replaces the earlier value."""
        if "rollout/reward" in metrics:
            self._close_rollout(step)
        for name in WATCHED:
            if name in metrics:
                self._put(name, step, float(metrics[name]))
        if "eval/reward" in metrics and (rewards := self.latest("rollout/reward", 2)):
            self._put("rollout/reward at eval", step, fmean(rewards))

    def end(self) -> None:
        """Close the last rollout, at the end of training."""
        self.ended = True
        if "rollout/reward" in self._points:
            self._close_rollout(1 << 62)

    def _close_rollout(self, step: int) -> None:
        """Average the measures of the rollout before the one that begins at a step."""
        began = [at for at, _ in self._points.get("rollout/reward", []) if at < step]
        for name in PER_STEP if began else ():
            if values := [value for at, value in self._points.get(name, ()) if began[-1] <= at < step]:
                self._put(f"{name} by rollout", began[-1], fmean(values))

    def _put(self, name: str, step: int, value: float) -> None:
        if not math.isfinite(value):
            return
        for points in (self._points.setdefault(name, []), self._first.setdefault(name, [])):
            if points and points[-1][0] == step:
                points[-1] = (step, value)
            elif points is self._points[name] or len(points) < FIRST:
                points.append((step, value))
        del self._points[name][:-LATEST]

    # -- queries of rules --------------------------------------------------------------------------------------------

    def first(self, name: str, n: int = 1) -> list[float]:
        """The first `n` values, or none where there are not so many."""
        points = self._first.get(name, [])
        return [value for _, value in points[:n]] if len(points) >= n else []

    def latest(self, name: str, n: int, skip: int = 0) -> list[float]:
        """The latest `n` values, or none where there are not so many after the first `skip`."""
        points = self._points.get(name, [])
        return [value for _, value in points[-n:]] if len(points) >= n + skip else []

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint."""
        parts = {"points": self._points, "first": self._first}
        return {part: {name: list(points) for name, points in measures.items()} for part, measures in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self._points, self._first = (
            {name: [(int(at), float(value)) for at, value in points] for name, points in state[part].items()}
            for part in ("points", "first")
        )
