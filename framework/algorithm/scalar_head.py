"""Algorithms with a scalar head, which gives every response a reward: validation, calibration and prediction.

A reward model says that the better of two responses wins with probability σ(d), σ the logistic function and d the
difference of their rewards. Validation measures its accuracy and its calibration, from sums that may be added up
over batches and processes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from leyden.algorithm.algorithm import GREEDY, Algorithm
from leyden.batch.forest import Batch, pack
from leyden.batch.pairs import pairwise_wins, preference_pairs
from leyden.batch.tree import chunk_by_tokens
from leyden.errors import UserError
from leyden.example import Example, Message
from leyden.losses import bradley_terry
from leyden.policy.policy import Labels

BINS = 10
"""Of equal width over the confidence σ(|d|), from 0.5 to 1."""
MOMENTS = ("n", "x", "y", "xx", "yy", "xy")
"""Names of the sums that a correlation needs."""
MARGINS = (0.0, 0.5, 1.0, 2.0, math.inf)
"""Edges of the buckets of |d| that accuracy is given for."""
LABELS = {
    f"accuracy_margin_{low:g}" + (f"_{high:g}" if high < math.inf else ""): (low, high)
    for low, high in pairwise(MARGINS)
}
"""Name of each bucket's metric -> its edges."""


class WithScalarHead(Algorithm):
    """A policy with a scalar head, read at each response's last token. Dropout is off: a reward has no noise.

    A subclass writes `loss` on `rewards(batch)`. Validation sees preferences, best response first.
    """

    wants: ClassVar[tuple[str, ...]] = ("score",)
    dropout: ClassVar[bool] = False
    predicts: ClassVar[str] = "scores"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.sampling != GREEDY.seeded():
            raise UserError(f"--model.sampling: {type(self).__name__} scores answers and samples none; leave it out")
        self.policy.labels = Labels()

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of one micro-batch, as for every algorithm, from `rewards(batch)`."""

    def rewards(self, batch: Batch) -> Tensor:
        """The reward of each response: [N] fp32; [N, K] where the head gives K numbers."""
        score = self.policy(batch, {"score"}).score
        assert isinstance(score, Tensor)
        return score

    # -- validation --------------------------------------------------------------------------------------------------

    def validation_sums(self, batch: Batch) -> dict[str, Tensor]:
        """The plain log loss of pairs, whatever is trained on, so that runs compare; and what `calibration` needs."""
        reward, pairs = self.rewards(batch), preference_pairs(batch)
        better, worse = reward[pairs.better], reward[pairs.worse]
        length = batch.branch[batch.branch >= 0].bincount(minlength=len(reward))
        sums = pair_sums(better, worse, pairs.share / (batch.totals.prompts or 1)) | length_sums(reward, length)
        return {"loss": pairs.mean(batch, bradley_terry(better - worse))} | sums

    def validation_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"]} | calibration(sums) if sums else {}

    # -- prediction --------------------------------------------------------------------------------------------------

    def predict_step(self, batch: Sequence[tuple[Example, Any]], index: int) -> list[dict[str, Any]]:
        """The rewards of the responses that rows have, which keep their order, as rows for a JSONL file.

        Args:
            batch: rows and their trees.
            index: of the batch.

        Returns:
            `{"prompt", "responses", "scores", "row"}`, which is preference data itself, or `{"prompt", "response",
            "score", "row"}` where a row has one response.
        """
        scores: list[Any] = []
        for trees in chunk_by_tokens([tree for _, tree in batch], self.budget):
            scores += self.written(self.rewards(pack(trees).to(self.device)))
        rest = iter(scores)
        return [_row(example, [next(rest) for _ in tree.responses]) for example, tree in batch]

    def written(self, rewards: Tensor) -> list[Any]:
        """What `predict` writes for each response."""
        return [round(value, 6) for value in rewards.tolist()]

    def _needs_head(self) -> None:
        """Rewards of a head that was never trained mean nothing."""
        if "score" in self.policy.fresh and not self.progress["samples"] and self.trainer.state.fn != "fit":
            raise UserError(
                f"{self.policy.path}: it has no reward head, so its scores would be random; give --model.policy.path "
                "the folder that `leyden fit` exported, or --ckpt_path FILE a checkpoint of the reward model"
            )

    on_validation_start = on_test_start = on_predict_start = _needs_head


def _row(example: Example, scores: list[Any]) -> dict[str, Any]:
    texts = [_text(turns) for turns in example.responses]
    answers = {"responses": texts, "scores": scores} if len(texts) > 1 else {"response": texts[0], "score": scores[0]}
    return {**example.prompt_columns(), **answers, "row": dict(example.row)}


def _text(turns: list[Message]) -> str | list[Message]:
    """One answer as its text; as its turns where it goes on, or is more than a text."""
    return turns[0]["content"] if len(turns) == 1 and turns[0].keys() == {"role", "content"} else turns


def pair_sums(better: Tensor, worse: Tensor, share: Tensor) -> dict[str, Tensor]:
    """The sums over M pairs from which `calibration` is computed.

    Args:
        better: [M] reward of the better response.
        worse: [M] reward of the worse one.
        share: [M] weight of each pair; 1 / pairs of its prompt lets all prompts weigh the same.
    """
    better, worse, share = _exact(better), _exact(worse), _exact(share)
    gap = (better - worse).abs()
    right = pairwise_wins(better, worse)
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
    """The sums over N responses, their rewards and their lengths in tokens, from which `calibration` is computed."""
    return {f"length_{name}": value for name, value in moments(reward, length).items()}


def moments(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The sums over N pairs of numbers that `pearson` takes, by name and in its order."""
    x, y = _exact(x), _exact(y)
    columns = {"n": torch.ones_like(x), "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
    return {name: value.sum() for name, value in columns.items()}


def calibration(sums: Mapping[str, float]) -> dict[str, float]:
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
    metrics = {
        "accuracy": sums["right"] / total,
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "ece": sum(abs(sums[f"over_{k}"]) for k in range(BINS)) / total,
        "length_correlation": pearson(*(sums[f"length_{name}"] for name in MOMENTS)),
    }
    return metrics | {name: sums[name] / sums[f"{name}_share"] for name in LABELS if sums[f"{name}_share"]}


def pearson(n: float, x: float, y: float, xx: float, yy: float, xy: float) -> float:
    """Pearson's correlation from sums; 0 where one of the two does not vary."""
    spread = (n * xx - x * x) * (n * yy - y * y)
    return (n * xy - x * y) / math.sqrt(spread) if spread > 0 else 0.0


def _exact(x: Tensor) -> Tensor:
    """In double precision, since differences of large sums follow; without it where the device has none."""
    return x.detach().float() if x.device.type == "mps" else x.detach().double()
