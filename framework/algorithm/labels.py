"""Responses with labels, several numbers or a class each: the data that have them, and what validation measures.

Measures are made of sums, which may be added up over batches and processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from leyden.algorithm.scalar_head import MOMENTS, moments, pearson


@runtime_checkable
class LabelledData(Protocol):
    """Data whose responses have labels; `leyden.datamodules.AttributeData`."""

    attributes: Sequence[str]
    """Names of the K numbers of each response"""
    classes: Sequence[str] | None
    """Names of the C classes, one of which each response is; then there is one attribute"""

    def labels(self, rows: Sequence[int]) -> Tensor:
        """[R, K] labels of the responses of these rows, one response each; of classes their number."""
        ...


def attribute_sums(outputs: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What `attribute_metrics` needs, from [N, K] outputs and labels of K attributes."""
    each = {name: moments(outputs[:, k], labels[:, k]) for k, name in enumerate(names)}
    return {f"{name} {what}": value for name, sums in each.items() for what, value in sums.items()}


def attribute_metrics(sums: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Of each attribute its mean squared error, `error_NAME`, and `correlation_NAME`, Pearson's."""
    metrics = {}
    for name in (name for name in names if sums[f"{name} n"]):
        mine = {what: sums[f"{name} {what}"] for what in MOMENTS}
        metrics[f"error_{name}"] = (mine["xx"] + mine["yy"] - 2 * mine["xy"]) / mine["n"]
        metrics[f"correlation_{name}"] = pearson(*mine.values())
    return metrics


def class_sums(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What `class_metrics` needs, from [N, C] logits and the [N] numbers of the classes."""
    sums: dict[str, Tensor] = {}
    for k, name in enumerate(names):
        mine = labels == k
        sums |= {f"{name} n": mine.sum(), f"{name} right": (mine & (logits.argmax(-1) == k)).sum()}
    return sums


def class_metrics(sums: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """`accuracy` over all responses, and `recall_CLASS`, the share of a class's responses that were seen as such."""
    right, count = (sum(sums[f"{name} {what}"] for name in names) for what in ("right", "n"))
    metrics = {"accuracy": right / count if count else 0.0}
    return metrics | {f"recall_{n}": sums[f"{n} right"] / sums[f"{n} n"] for n in names if sums[f"{n} n"]}
