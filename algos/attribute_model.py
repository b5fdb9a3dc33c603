"""Models of labelled scores: several numbers for each response, or its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from leyden.algorithm import WithScalarHead
from leyden.algorithm.labels import LabelledData, attribute_metrics, attribute_sums, class_metrics, class_sums
from leyden.batch import Batch
from leyden.errors import UserError
from leyden.policy import Labels


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
        outputs, labels = self.outputs(batch)
        measured = class_sums if self.classifies else attribute_sums
        return {"loss": batch.response_mean(self.errors(outputs, labels))} | measured(outputs, labels, self.names)

    def validation_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        measured = class_metrics if self.classifies else attribute_metrics
        return {"loss": sums["loss"]} | measured(sums, self.names) if sums else {}

    def written(self, rewards: Tensor) -> list[Any]:
        """For each response a number by name: of attributes what the head gives, of classes their probability."""
        outputs = rewards.reshape(len(rewards), len(self.names))
        values = outputs.softmax(-1) if self.classifies else outputs
        return [{name: round(v, 6) for name, v in zip(self.names, row, strict=True)} for row in values.tolist()]
