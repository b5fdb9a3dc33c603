"""Models of labelled scores: several numbers for each response, or its class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from leyden.algorithm import WithScalarHead
from leyden.algorithm.labels import Attributes, Classes, Target, labels_of
from leyden.batch import Batch


class AttributeModel(WithScalarHead):
    """A head with one number for each attribute of a response (helpfulness, correctness …), or for each class.

    With attributes the loss is the squared error (f_k - y_k)^2, averaged over the K attributes and over responses
    (HelpSteer2, Wang et al. 2024, section 3). With classes it is the cross-entropy -log softmax(f)_y. Labels keep their
    unit.

    The data name what is learnt: `AttributeData`. The export is an `AutoModelForSequenceClassification` with K labels,
    which `leyden.models.Classifier` takes as a reward, by the name of an attribute or by weights of several.
    """

    def setup(self, stage: str) -> None:
        self.policy.labels = labels_of(self.data, type(self).__name__)
        super().setup(stage)

    @property
    def target(self) -> Target:
        """What the head's outputs are compared with."""
        assert self.policy.labels is not None
        kind = Attributes if self.policy.labels.problem == "regression" else Classes
        return kind(self.policy.labels.names)

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the head gives [N, K] and the labels of the responses: [N, K], or [N, 1], the number of the class."""
        data: Any = self.data
        labels = data.labels(batch.row.tolist()).to(batch.group.device)[batch.group]
        return self.rewards(batch).reshape(len(labels), len(self.target.names)), labels

    def loss(self, batch: Batch) -> Tensor:
        outputs = self.outputs(batch)
        for name, values in self.target.shown(*outputs).items():
            self.note(name, batch.response_mean(values))
        return batch.response_mean(self.target.errors(*outputs))

    def validation_sums(self, batch: Batch) -> dict[str, Tensor]:
        outputs = self.outputs(batch)
        return {"loss": batch.response_mean(self.target.errors(*outputs))} | self.target.sums(*outputs)

    def validation_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"]} | self.target.metrics(sums) if sums else {}

    def written(self, rewards: Tensor) -> list[Any]:
        values = self.target.values(rewards.reshape(len(rewards), len(self.target.names))).tolist()
        return [{name: round(v, 6) for name, v in zip(self.target.names, row, strict=True)} for row in values]
