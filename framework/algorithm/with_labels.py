"""The base class of algorithms that learn from single responses, each labelled good or bad."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from leyden.algorithm.with_reference import WithReference
from leyden.batch.forest import Batch
from leyden.batch.pairs import pairwise_wins
from leyden.errors import UserError


class Labelled(NamedTuple):
    """N responses and what is known of each; see `WithLabels.labelled`."""

    reward: Tensor
    """[N] β (log π - log π_ref), summed over the response's tokens"""
    good: Tensor
    """[N] 1 where the response is labelled good, else 0"""
    bad: Tensor
    """[N] 1 where it is labelled bad; a response that was borrowed from another prompt is neither"""


class WithLabels(WithReference):
    """Single responses with the score 1 where they are good and 0 where they are bad, each compared with the reference,
    and with a `point` that all responses of a step share.

    The point is a mean over more responses than a micro-batch holds. So it comes from the steps before: a subclass sets
    it in `on_step_metrics`, which knows the means of a whole step. It is the same however a step is cut and on however
    many processes, and it is in checkpoints. In the first step it is 0: policy and reference agree, unless that is
    another model.

    Args:
        beta: β, how strongly the policy is held to the reference, in 1 / nats.
    """

    unpaired: ClassVar[bool] = True
    """Whether the data gives single responses, and not responses to compare."""
    mismatched: ClassVar[bool] = False
    """Whether each prompt comes with a response of another prompt too, which counts in no mean."""

    def __init__(self, *args: Any, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if beta <= 0:
            raise UserError(f"--model.beta {beta}: give more than 0; 0.1 is usual")
        self.beta = beta
        self.point = 0.0
        """What rewards are compared with, in their unit."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        kind = getattr(self.data, "kind", "unpaired")
        if stage == "fit" and kind not in ("unpaired", "preference"):
            raise UserError(
                f"{type(self).__name__} learns from answers that are labelled good or bad, and these are rows of the "
                f"kind {kind}: set --data PreferenceData"
            )

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of one micro-batch, a `response_mean` of what `labelled` gives."""

    def labelled(self, batch: Batch) -> Labelled:
        """Rewards and labels of the responses, which are noted for the means of the step."""
        reward = self.beta * batch.per_branch(self.log_ratio(batch, self.policy(batch).logp))
        found = Labelled(reward, (batch.score == 1).float(), (batch.score == 0).float())
        above = pairwise_wins(reward, torch.full_like(reward, self.point))
        self.note("accuracy", batch.response_mean(found.good * above + found.bad * (1 - above)))
        for name, label in ("good", found.good), ("bad", found.bad):
            self.note(name, batch.response_mean(label))
            self.note(f"{name}_reward", batch.response_mean(label * reward))
        if self.mismatched:
            self.note("borrowed", batch.response_mean(batch.score.isnan().float()))
            self.note("kl", batch.response_mean(torch.where(batch.score.isnan(), reward, 0.0)) / self.beta)
        return found

    def step_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What a step has measured.

        Raises:
            UserError: the data lends no prompt a response of another one.
        """
        if self.mismatched and not sums["borrowed"] and sums["good"] + sums["bad"]:
            raise UserError(
                f"{type(self).__name__} compares with responses to other prompts, and the data gives none: set --data "
                "PreferenceData, or give each tree a second response with the score leyden.batch.tree.BORROWED"
            )
        if 0 < sums["good"] + sums["bad"] < 1 - 1e-4:
            raise UserError(
                f"{type(self).__name__}: {100 * (1 - sums['good'] - sums['bad']):.3g} % of the answers are labelled "
                "neither 1, good, nor 0, bad; give them one of these scores"
            )
        return _means(sums)

    def validation_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return _means(sums)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["point"] = self.point

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.point = float(checkpoint["point"])


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """What was noted, with the mean reward of each label in the place of its share of a mean over all responses. A step
    may have no response of one label: then it says nothing of it."""
    known = {
        name: value
        for name, value in sums.items()
        if name not in ("good", "bad", "good_reward", "bad_reward", "borrowed")
    }
    for name, label in ("chosen", "good"), ("rejected", "bad"):
        if sums[label] > 0:
            known[f"{name}_reward"] = sums[f"{label}_reward"] / sums[label]
    if sums["good"] > 0 and sums["bad"] > 0:
        known["margin"] = known["chosen_reward"] - known["rejected_reward"]
    return known | {"good_share": sums["good"]}
