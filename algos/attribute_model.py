"""Models of labelled scores: several numbers for each response, or its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from leyden.algorithm import WithScalarHead
from leyden.algorithm.scalar_head import MOMENTS, moments, pearson
from leyden.batch import Batch
from leyden.errors import UserError
from leyden.policy import Labels


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


class AttributeModel(WithScalarHead):
    """A head with one number for each attribute of a response (helpfulness, correctness …), or for each class.

    With attributes the loss is the squared error (f_k - y_k)^2, averaged over the K attributes and over responses
    (HelpSteer2, Wang et al. 2024, section 3). With classes it is the cross-entropy -log softmax(f)_y. Labels keep their
    unit.

    The data name what is learnt: `AttributeData`. The export is an `AutoModelForSequenceClassification` with K labels,
    which `leyden.models.Classifier` takes as a reward, by the name of an attribute or by weights of several.
    """

    def setup(self, stage: str) -> None:
        self.policy.labels = self._labels()
        super().setup(stage)

    def _labels(self) -> Labels:
        data = self.data
        if not isinstance(data, LabelledData):
            raise UserError(
                f"{type(self).__name__}: {type(data).__name__} has no labels; give --data AttributeData with "
                "--data.attributes [NAME, …]"
            )
        if data.classes is not None:
            return Labels(tuple(data.classes), "single_label_classification")
        return Labels(tuple(data.attributes))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the attributes or classes."""
        assert self.policy.labels is not None
        return self.policy.labels.names

    @property
    def classifies(self) -> bool:
        """Whether the labels are classes, and not numbers."""
        return self.policy.labels is not None and self.policy.labels.problem != "regression"

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the head gives [N, K] and the labels of the responses: [N, K], or the number of the class, [N] int64."""
        data: Any = self.data
        labels = data.labels(batch.row.tolist()).to(batch.group.device)[batch.group]
        outputs = self.rewards(batch).reshape(len(labels), len(self.names))
        return outputs, labels[:, 0].long() if self.classifies else labels

    def errors(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """[N] loss of each response."""
        if self.classifies:
            return F.cross_entropy(outputs, labels, reduction="none")
        return (outputs - labels).square().mean(-1)

    def loss(self, batch: Batch) -> Tensor:
        outputs, labels = self.outputs(batch)
        if self.classifies:
            self.note("accuracy", batch.response_mean((outputs.argmax(-1) == labels).float()))
        return batch.response_mean(self.errors(outputs, labels))

    def validation_sums(self, batch: Batch) -> dict[str, Tensor]:
        """The loss; of each class how many responses are of it and how many of these are seen; of each attribute the
        squared error, and what a correlation needs."""
        outputs, labels = self.outputs(batch)
        sums = {"loss": batch.response_mean(self.errors(outputs, labels))}
        for k, name in enumerate(self.names):
            if self.classifies:
                mine = labels == k
                sums |= {f"{name} n": mine.sum(), f"{name} right": (mine & (outputs.argmax(-1) == k)).sum()}
            else:
                sums |= {f"{name} {what}": value for what, value in moments(outputs[:, k], labels[:, k]).items()}
        return sums

    def validation_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """`accuracy` over all responses and `recall_CLASS`; or of each attribute its mean squared error, `error_NAME`,
        and `correlation_NAME`, Pearson's."""
        if not sums:
            return {}
        metrics = {"loss": sums["loss"]}
        if self.classifies:
            right, count = (sum(sums[f"{name} {what}"] for name in self.names) for what in ("right", "n"))
            metrics["accuracy"] = right / count if count else 0.0
        for name in self.names:
            if not (n := sums[f"{name} n"]):
                continue
            if self.classifies:
                metrics[f"recall_{name}"] = sums[f"{name} right"] / n
                continue
            mine = {what: sums[f"{name} {what}"] for what in MOMENTS}
            metrics[f"error_{name}"] = (mine["xx"] + mine["yy"] - 2 * mine["xy"]) / n
            metrics[f"correlation_{name}"] = pearson(*mine.values())
        return metrics

    def written(self, rewards: Tensor) -> list[Any]:
        """For each response a number by name: of attributes what the head gives, of classes their probability."""
        outputs = rewards.reshape(len(rewards), len(self.names))
        values = outputs.softmax(-1) if self.classifies else outputs
        return [{name: round(v, 6) for name, v in zip(self.names, row, strict=True)} for row in values.tolist()]
