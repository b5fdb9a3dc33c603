"""How well rewards agree with preferences, from sums that may be added up over batches and processes.

A reward model says that the better of two responses wins with probability s(d), s the logistic function and d the
difference of their rewards. So it can be right or wrong, and it can be too sure or not sure enough of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

BINS = 10
"""Of equal width over the confidence s(|d|), from 0.5 to 1."""
MARGINS = (0.0, 0.5, 1.0, 2.0, math.inf)
"""Edges of the buckets of |d| that accuracy is given for."""
LABELS = {
    f"accuracy_margin_{low:g}" + (f"_{high:g}" if high < math.inf else ""): (low, high)
    for low, high in pairwise(MARGINS)
}
"""Name of each bucket's metric -> its edges."""


def pair_sums(better: Tensor, worse: Tensor, share: Tensor) -> dict[str, Tensor]:
    """What `agreement` needs to know of M pairs.

    Args:
        better: [M] reward of the better response.
        worse: [M] reward of the worse one.
        share: [M] weight of each pair; 1 / pairs of its prompt lets all prompts weigh the same.
    """
    better, worse, share = _exact(better), _exact(worse), _exact(share)
    gap = (better - worse).abs()
    right = (1 + (better - worse).sign()) / 2  # a tie is half right, as a coin would be
    sure = gap.sigmoid()
    sums = {"share": share, "chosen_reward": share * better, "rejected_reward": share * worse, "right": share * right}
    bins = ((sure - 0.5) * 2 * BINS).long().clamp_max(BINS - 1)
    for k in range(BINS):
        sums[f"over_{k}"] = share * (sure - right) * (bins == k)
    for name, (low, high) in LABELS.items():
        inside = share * ((gap >= low) & (gap < high))
        sums |= {name: inside * right, f"{name}_share": inside}
    return {name: value.sum() for name, value in sums.items()}


def length_sums(reward: Tensor, length: Tensor) -> dict[str, Tensor]:
    """What `agreement` needs to know of the rewards and the lengths, in tokens, of N responses."""
    x, y = _exact(reward), _exact(length)
    columns = {"n": torch.ones_like(x), "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    return {f"length_{name}": value.sum() for name, value in columns.items()}


def agreement(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics from the sums of `pair_sums` and `length_sums` over any number of batches.

    - accuracy: share of pairs whose better response has the higher reward, equal ones half; also for each bucket of |d|
      that has pairs.
    - margin, chosen_reward, rejected_reward: means of d and of the rewards of better and worse responses.
    - ece: expected calibration error (Guo et al. 2017, eq. 3): |accuracy - mean confidence| over bins of the
      confidence, weighted by pairs. 0.02 says that an answer given with 80% is right in 78% to 82% of cases.
    - length_correlation: Pearson's, of reward and length; a reward model that likes long answers has a high one.
    """
    total = sums.get("share", 0.0)
    if not total:
        return {}
    chosen, rejected = sums["chosen_reward"] / total, sums["rejected_reward"] / total
    found = {
        "accuracy": sums["right"] / total,
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "ece": sum(abs(sums[f"over_{k}"]) for k in range(BINS)) / total,
        "length_correlation": _correlation(*(sums[f"length_{name}"] for name in ("n", "x", "y", "xx", "yy", "xy"))),
    }
    return found | {name: sums[name] / sums[f"{name}_share"] for name in LABELS if sums[f"{name}_share"]}


def _correlation(n: float, x: float, y: float, xx: float, yy: float, xy: float) -> float:
    """Pearson's correlation from sums; 0 where one of the two does not vary."""
    spread = (n * xx - x * x) * (n * yy - y * y)
    return (n * xy - x * y) / math.sqrt(spread) if spread > 0 else 0.0


def _exact(x: Tensor) -> Tensor:
    """In double precision, since differences of large sums follow; without it where the device has none."""
    return x.detach().float() if x.device.type == "mps" else x.detach().double()
