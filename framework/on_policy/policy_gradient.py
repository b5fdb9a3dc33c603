"""What policy-gradient algorithms share: rewards with a price on moving away, and the clipped surrogate."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leyden.batch.forest import Batch
from leyden.batch.trajectory import Trajectory
from leyden.batch.tree import Tree
from leyden.errors import UserError
from leyden.lightning_loop import skip_rest
from leyden.losses import clipped_surrogate, kl_estimate
from leyden.on_policy.metrics import divergence
from leyden.on_policy.on_policy import OnPolicy
from leyden.on_policy.scores import ScoreShape
from leyden.policy.policy import Outputs

log = logging.getLogger("leyden")


@dataclass
class KLPrice:
    """What a nat of KL from the reference costs, in units of the reward.

    Args:
        coefficient: the price, at first.
        target: nats a response that the price is steered to; None keeps it (Ziegler et al. 2019, section 2.2).
        horizon: responses over which it is steered.
    """

    coefficient: float = 0.05
    target: float | None = None
    horizon: float = 10_000.0

    def steer(self, kl: float, responses: int) -> None:
        """Dearer when the policy is too far away, by at most a fifth per `horizon` responses; cheaper when too near."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * responses / self.horizon


class PolicyGradient(OnPolicy):
    """Make tokens that did better than expected likelier, as far as the clip allows (Schulman et al. 2017, eq. 7).

    The reward of a token is -b log(policy / reference), k1, and its response's score at the last token (Ouyang et al.
    2022, eq. 2 without the pretraining term). A subclass writes `advantages`.

    Args:
        clip: how far the probability of a token may move within a rollout before its gradient ends.
        kl_coef: b.
        kl_target: nats a response that b is steered to; None keeps b.
        kl_horizon: responses over which b is steered.
        score: what is done to scores before they become rewards.
        entropy_coef: weight of the mean entropy of a token in nats, which is added to what is maximised.
        stop_kl: leave the rest of a rollout out once the policy has moved this far from the one that sampled it: mean
            nats a token (k3). None never does.
    """

    def __init__(
        self,
        *args: Any,
        clip: float = 0.2,
        kl_coef: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: float = 10_000.0,
        score: ScoreShape | None = None,
        entropy_coef: float = 0.0,
        stop_kl: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        s = self.sampling
        if s.temperature == 0 or s.top_k or s.top_p < 1:
            raise UserError(
                f"{type(self).__name__}: it trains the distribution that is sampled, so --model.sampling takes a "
                "temperature above 0 and neither top_k nor top_p; leave them out"
            )
        self.clip, self.entropy_coef, self.stop_kl = clip, entropy_coef, stop_kl
        self.price = KLPrice(kl_coef, kl_target, kl_horizon)
        self.score_shape = score or ScoreShape()

    @abstractmethod
    def advantages(self, whole: Trajectory, reward: Tensor) -> None:
        """Fill in `whole.advantage` [T], and what else the loss needs, from the reward [T] of each token."""

    def credit(self, trees: list[Tree], seen: Trajectory) -> Trajectory:
        shaped, found = self.score_shape(seen, self.policy.stop)
        reward = -self.price.coefficient * kl_estimate(seen.old_logp - seen.ref_logp) * seen.weight
        reward[seen.last] += shaped
        self.found |= found | {"rollout/kl_coef": self.price.coefficient}
        self.advantages(seen, reward)
        self.price.steer(float(divergence(seen).mean()), len(seen.group))
        return seen

    def policy_loss(self, batch: Trajectory, out: Outputs) -> Tensor:
        """The clipped surrogate, less the entropy bonus; logs what it did under ppo/."""
        log_ratio = out.logp - batch.old_logp
        ratio = log_ratio.exp()
        loss = batch.token_mean(clipped_surrogate(ratio, batch.advantage, self.clip))
        with torch.no_grad():
            self.note("ppo/policy_loss", loss)
            self.note("ppo/approx_kl", batch.token_mean(kl_estimate(-log_ratio, "k3")))
            self.note("ppo/clip_fraction", batch.token_mean(((ratio - 1).abs() > self.clip).float()))
        if out.entropy is not None:
            entropy = batch.token_mean(out.entropy)
            self.note("ppo/entropy", entropy)
            loss = loss - self.entropy_coef * entropy
        return loss

    @property
    def want(self) -> set[str]:
        """What the loss asks the policy for."""
        return {"logp", "entropy"} if self.entropy_coef else {"logp"}

    def loss(self, batch: Batch) -> Tensor:
        assert isinstance(batch, Trajectory)
        return self.policy_loss(batch, self.policy(batch, self.want, self.temperature))

    def watch(self, now: Mapping[str, float]) -> None:
        """Stop learning from this rollout once the policy has left it behind; every rank sees the same number."""
        if self.stop_kl is not None and now["ppo/approx_kl"] > self.stop_kl and self.experiences is not None:
            log.info(
                "approx_kl %.3g: the rest of rollout %s is left out", now["ppo/approx_kl"], self.experiences.rollout
            )
            self.experiences.stop()
            skip_rest(self.trainer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["rewards"] = {"kl_coef": self.price.coefficient, **self.score_shape.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "rewards" in checkpoint and self.trainer.state.fn == "fit":
            state = dict(checkpoint["rewards"])
            if self.price.target is not None:  # a fixed price is the configuration's
                self.price.coefficient = state["kl_coef"]
            self.score_shape.load(state)
