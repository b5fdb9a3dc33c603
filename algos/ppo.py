"""Proximal policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from leyden.advantages import GAE, Estimator, explained_variance
from leyden.batch import Batch, Trajectory
from leyden.errors import UserError
from leyden.losses import clipped_value
from leyden.on_policy import PolicyGradient, Rollout
from leyden.policy import Outputs, Policy


class PPO(PolicyGradient):
    """Learn from rewards with a value function that predicts the return (Schulman et al. 2017; Ouyang et al.
    2022). Advantages are whitened over the whole rollout of all processes; returns are those before whitening.

    Args:
        value: where values come from: a `head` on the policy's own hidden states, which costs no forward of its own,
            or an `adapter` (with a head) of its own on the policy's frozen weights.
        value_policy: a separate model for values, instead; from a reward model's folder, its value head starts as the
            score head there.
        value_weight: weight of the value loss.
        value_clip: how far values may move within a rollout before their gradient ends; None is no limit.
        discount: γ, of the reward of the next token.
        trace: λ of generalised advantage estimation, 1 for plain returns.
        estimator: advantages and returns from rewards and values; None is generalised advantage estimation, whitened.
    """

    wants: ClassVar[tuple[str, ...]] = ("logp", "value")
    has_values = True

    def __init__(
        self,
        *args: Any,
        value: Literal["head", "adapter"] = "head",
        value_policy: Policy | None = None,
        value_weight: float = 0.1,
        value_clip: float | None = 0.2,
        discount: float = 1.0,
        trace: float = 0.95,
        estimator: Estimator | None = None,
        **kwargs: Any,
    ) -> None:
        if estimator is not None and (discount, trace) != (1.0, 0.95):
            raise UserError(
                "--model.discount and --model.trace are the default estimator's, and --model.estimator is given"
            )
        super().__init__(*args, estimator=estimator or GAE(discount, trace), **kwargs)
        if value_policy is not None and value == "adapter":
            raise UserError("--model.value adapter: give that or --model.value_policy, not both")
        self.value_kind, self.value_policy = value, value_policy
        self.critic: nn.Module | None = None
        self.value_weight, self.value_clip = value_weight, value_clip
        if value_policy is not None or value == "adapter":
            self.wants = ("logp",)  # type: ignore[misc]

    def configure_model(self) -> None:
        super().configure_model()
        if self.value_policy is not None:
            same = self.value_policy.tokenizer.get_vocab() == self.policy.tokenizer.get_vocab()
            if not same:
                raise UserError(
                    f"the value model {self.value_policy.path} has another tokenizer than {self.policy.path}, so the "
                    "same tokens are other text to it; give --model.value_policy.path a model of the same family"
                )
            self.value_policy.build(("value",), dropout=False)
            self.shard_policy(self.value_policy)
        elif self.value_kind == "adapter" and self.critic is None:
            if self.device_mesh is not None:
                raise UserError(
                    "--model.value adapter: FSDP2 shards a base for one model alone; set --model.value head"
                )
            self.critic = self.policy.critic()

    def values(self, batch: Batch, out: Outputs) -> Tensor:
        """[T] value of the state before each response token; `out` is what the policy says of the batch."""
        if self.value_policy is not None:
            out = self.value_policy(batch, {"value"})
        value = self.critic(batch) if self.critic is not None else out.value
        assert isinstance(value, Tensor)
        return value

    def rehearse(self, batch: Batch) -> list[Tensor]:
        apart = self.critic is not None or self.value_policy is not None
        return super().rehearse(batch) + ([self.values(batch, Outputs(batch.weight))] if apart else [])

    @property
    def loss_outputs(self) -> set[str]:
        return super().loss_outputs | set(self.wants)

    def compute_log_probs(self, batch: Trajectory) -> Trajectory:
        out = self.policy(batch, set(self.wants), self.temperature)
        ratio = self.log_ratio(batch, out.logp, self.temperature)
        return replace(batch, old_logp=out.logp, ref_logp=out.logp - ratio, value=self.values(batch, out))

    def credit(self, rollout: Rollout) -> Trajectory:
        batch = super().credit(rollout)
        explained = explained_variance(batch.value, batch.returns, batch.weight, self.all_reduce)
        self.rollout_metrics["ppo/explained_variance"] = explained
        return batch

    def loss(self, batch: Batch) -> Tensor:
        assert isinstance(batch, Trajectory)
        out = self.policy(batch, self.loss_outputs, self.temperature)
        value = self.values(batch, out)
        value_loss = batch.token_mean(clipped_value(value, batch.value, batch.returns, self.value_clip))
        self.note("ppo/value_loss", value_loss)
        return self.policy_loss(batch, out) + self.value_weight * value_loss
