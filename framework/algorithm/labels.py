"""Responses with labels, several numbers or a class each: the data that have them, and what outputs are compared with.

Measures are made of sums, which may be added up over batches and processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from leyden.algorithm.scalar_head import MOMENTS, moments, pearson
from leyden.errors import UserError
from leyden.policy.policy import Labels


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


def labels_of(data: Any, name: str) -> Labels:
    """What a head learns from these data. Raises `UserError`, in the algorithm's name, where they have no labels."""
    if not isinstance(data, LabelledData):
        raise UserError(
            f"{name}: {type(data).__name__} has no labels; give --data AttributeData with --data.attributes [NAME, …]"
        )
    if data.classes is not None:
        return Labels(tuple(data.classes), "single_label_classification")
    return Labels(tuple(data.attributes))


@dataclass(frozen=True)
class Target(ABC):
    """What the outputs of a head are compared with.

    Args:
        names: of the head's outputs.
    """

    names: Sequence[str]

    @abstractmethod
    def errors(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """[N] loss of each response, from [N, K] outputs and its labels, as `LabelledData.labels` gives them."""

    @abstractmethod
    def sums(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What `metrics` needs, from [N, K] outputs and their labels."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Of `sums`, added up."""

    def shown(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """[N] numbers by name whose means training shows. By default there are none."""
        return {}

    def values(self, outputs: Tensor) -> Tensor:
        """[N, K] what predictions write: what the head gives."""
        return outputs


class Attributes(Target):
    """A number for each name; the loss is the squared error, averaged over the names."""

    def errors(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return (outputs - labels).square().mean(-1)

    def sums(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        each = {name: moments(outputs[:, k], labels[:, k]) for k, name in enumerate(self.names)}
        return {f"{name} {what}": value for name, sums in each.items() for what, value in sums.items()}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Of each attribute its mean squared error, `error_NAME`, and `correlation_NAME`, Pearson's."""
        metrics = {}
        for name in (name for name in self.names if sums[f"{name} n"]):
            mine = {what: sums[f"{name} {what}"] for what in MOMENTS}
            metrics[f"error_{name}"] = (mine["xx"] + mine["yy"] - 2 * mine["xy"]) / mine["n"]
            metrics[f"correlation_{name}"] = pearson(*mine.values())
        return metrics


class Classes(Target):
    """One of the names; the loss is the cross-entropy."""

    def errors(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels[:, 0].long(), reduction="none")

    def sums(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for k, name in enumerate(self.names):
            mine = labels[:, 0] == k
            sums |= {f"{name} n": mine.sum(), f"{name} right": (mine & (outputs.argmax(-1) == k)).sum()}
        return sums

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`accuracy` of all responses, and `recall_CLASS`, the share of a class's responses that were seen as such."""
        right, count = (sum(sums[f"{name} {what}"] for name in self.names) for what in ("right", "n"))
        metrics = {"accuracy": right / count if count else 0.0}
        return metrics | {f"recall_{n}": sums[f"{n} right"] / sums[f"{n} n"] for n in self.names if sums[f"{n} n"]}

    def shown(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(-1) == labels[:, 0]).float()}

    def values(self, outputs: Tensor) -> Tensor:
        """Their probabilities."""
        return outputs.softmax(-1)
