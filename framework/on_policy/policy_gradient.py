"""The base of policy-gradient algorithms: rewards with a KL penalty, an estimator of advantages, and a surrogate."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from leyden.advantages import Estimator
from leyden.batch.forest import Batch
from leyden.batch.trajectory import Trajectory
from leyden.corrections import TIS, Correction, NoCorrection
from leyden.errors import UserError
from leyden.lightning_loop import skip_rest_of_epoch
from leyden.losses import kl_estimate
from leyden.on_policy.dynamic_sampling import replace_prompts
from leyden.on_policy.metrics import divergence
from leyden.on_policy.on_policy import OnPolicy
from leyden.on_policy.reward_shaping import KLController, ScoreTransform, truncated
from leyden.on_policy.rollout import Rollout
from leyden.policy.policy import Outputs
from leyden.surrogates import Average, Clip, Surrogate, average

log = logging.getLogger("leyden")


class PolicyGradient(OnPolicy):
    """Make tokens that did better than expected likelier, as far as the surrogate allows (Schulman et al. 2017, eq. 7).

    The reward of a token is -β log(π / π_ref), k1, and its response's score at the last token (Ouyang et al. 2022, eq.
    2 without the pretraining term). GRPO, RLOO, DAPO and the like are settings of what follows.

    Args:
        estimator: advantages from rewards.
        surrogate: the loss of a token from its log-ratio and advantage; None is PPO's clip.
        average: what weighs the same in the mean of the losses of a step: `tokens`, `responses`, or nothing that
            depends on lengths, `constant`; see `leyden.surrogates.average`.
        correction: weights of tokens that an engine sampled from another distribution than training computes. They
            multiply the surrogate's losses, not those of values and not the entropy. None is TIS where the engine is
            not exact.
        clip: ε of PPO's clip, how far the probability of a token may move within a rollout before its gradient ends.
        kl: where the price of the KL stands. `reward`: in the reward of each token, so that the gradient is that of
            E[r] - β KL(π || π_ref), all that a token leads to included. `k2`, `k3`: an estimate of each token's KL, as
            a term of the loss (averaged like it). The gradient of k2 is that of KL(π || π_ref) of the next token, and
            of k3 that of KL(π_ref || π), in the contexts that are sampled: what a token leads to is not priced.
        kl_coef: β.
        kl_target: nats a response that β is adapted to reach; None keeps β.
        kl_horizon: responses over which β is adapted.
        score: what is done to scores before they become rewards.
        mask_truncated: leave responses that were cut at the length limit out of the loss (Yu et al. 2025, section 3.4).
            Their scores still count in what others are compared with, and with `average` responses or constant they
            count in the mean, as 0.
        dynamic_sampling: replace prompts whose responses all score the same, which teach nothing, by the next ones:
            most batches of `data.batch_size` prompts that may be drawn for that (Yu et al. 2025, eq. 11). 0 replaces
            none. Where they do not suffice, the rollout is smaller.
        entropy_coef: weight of the mean entropy of a token in nats, which is added to what is maximised.
        stop_kl: leave the rest of a rollout out once the policy has moved this far from the one that sampled it: mean
            nats a token (k3) of a minibatch, whose own step is not taken either. None never does.
    """

    has_values: ClassVar[bool] = False
    """Whether there is a value function, which some estimators need."""

    def __init__(
        self,
        *args: Any,
        estimator: Estimator,
        surrogate: Surrogate | None = None,
        average: Average = "tokens",
        correction: Correction | None = None,
        clip: float = 0.2,
        kl: Literal["reward", "k2", "k3"] = "reward",
        kl_coef: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: float = 10_000.0,
        score: ScoreTransform | None = None,
        mask_truncated: bool = False,
        dynamic_sampling: int = 0,
        entropy_coef: float = 0.0,
        stop_kl: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not self.sampling.is_full:
            raise UserError(
                f"{type(self).__name__}: it trains the distribution that is sampled, so --model.sampling takes a "
                "temperature above 0 and neither top_k nor top_p; leave them out"
            )
        if surrogate is not None and clip != 0.2:
            raise UserError(
                f"--model.clip {clip}: of PPO's clip, and --model.surrogate is given; set its own arguments"
            )
        if kl_target is not None and kl_coef <= 0:
            raise UserError(
                f"--model.kl_target {kl_target}: it multiplies --model.kl_coef, which is {kl_coef}; give that a start, "
                "such as 0.05"
            )
        self._check_estimator(estimator)
        self._check_dynamic_sampling(dynamic_sampling)
        self.estimator, self.surrogate, self.correction = estimator, surrogate or Clip(clip), correction
        self.average, self.kl_kind, self.mask_truncated = average, kl, mask_truncated
        self.dynamic_sampling = dynamic_sampling
        self.entropy_coef, self.stop_kl = entropy_coef, stop_kl
        self.kl_controller = KLController(kl_coef, kl_target, kl_horizon)
        self.score_transform = score or ScoreTransform()

    def _check_estimator(self, estimator: Estimator) -> None:
        """That it has the values and samples that it needs."""
        if estimator.needs_values and not self.has_values:
            raise UserError(f"--model.estimator {type(estimator).__name__}: it needs values; use PPO")
        if self.has_values and not estimator.needs_values:
            raise UserError(
                f"--model.estimator {type(estimator).__name__}: it uses no values, and a value function would learn "
                "nothing; use --model PolicyGradient"
            )
        if self.samples < estimator.least_samples:
            raise UserError(
                f"--model.samples {self.samples}: a response is compared with the others to its prompt; give "
                f"{estimator.least_samples} or more, or use PPO"
            )

    def _check_dynamic_sampling(self, dynamic_sampling: int) -> None:
        """That there are scores to look at when further prompts are drawn."""
        if dynamic_sampling < 0 or (dynamic_sampling and self.lag):
            raise UserError(
                f"--model.dynamic_sampling {dynamic_sampling}: batches of prompts, 0 or more, and 0 with --model.lag 1,"
                " whose next prompts are drawn before the scores are known"
            )
        if dynamic_sampling and self.samples < 2:
            raise UserError(
                "--model.dynamic_sampling: it looks at how the answers to a prompt differ; give --model.samples 2 or "
                "more"
            )

    def configure_model(self) -> None:
        super().configure_model()
        given = type(self.correction).__name__
        if not isinstance(self.correction, NoCorrection | None) and not self.lag and self.engine.is_exact(self.policy):
            raise UserError(
                f"--model.correction {given}: the engine {type(self.engine).__name__} samples from the distribution "
                "that is trained, so there is nothing to correct; leave it out, or set another --model.engine"
            )

    @property
    def drops_prompts(self) -> bool:
        return self.dynamic_sampling > 0 or type(self).complete is not PolicyGradient.complete

    def complete(self, rollout: Rollout) -> None:
        if self.dynamic_sampling and self.rollout_loader is not None:
            self.rollout_metrics["rollout/replaced"] = replace_prompts(
                rollout,
                self.rollout_loader,
                lambda drawn: self.sampler.sample(rollout.number, drawn, self.reward, self),
                self.dynamic_sampling,
                self.all_reduce,
            )

    @property
    def active_correction(self) -> Correction:
        """The correction that was asked for, or else truncated weights where the engine is not exact."""
        if self.correction is not None:
            return self.correction
        return NoCorrection() if not self.lag and self.engine.is_exact(self.policy) else TIS()

    def credit(self, rollout: Rollout) -> Trajectory:
        batch = super().credit(rollout)
        self._correct(batch)
        longest = self.sampling.max_new_tokens
        batch.score, metrics = self.score_transform(batch, self.policy.stop, longest, self.all_reduce)
        reward = torch.zeros_like(batch.old_logp)
        if self.kl_kind == "reward":
            reward = -self.kl_controller.coefficient * kl_estimate(batch.old_logp - batch.ref_logp) * batch.weight
        reward[batch.last] += batch.score
        price = self.kl_controller.coefficient
        batch.advantage, batch.returns = self.estimator(batch, reward, self.all_reduce)
        kl = divergence(batch).double()
        total, responses = self.all_reduce(torch.stack([kl.sum(), torch.ones_like(kl).sum()])).tolist()
        self.kl_controller.update(total / max(responses, 1.0), int(responses))
        in_loss = self.kl_kind != "reward"  # what the losses of this rollout will use is the price after it
        self.rollout_metrics |= metrics | {"rollout/kl_coef": self.kl_controller.coefficient if in_loss else price}
        if self.mask_truncated:
            batch.weight = batch.weight * ~batch.per_token(truncated(batch, self.policy.stop).float()).bool()
        return batch

    def _correct(self, batch: Trajectory) -> None:
        """Fill in `correction`, and what to log of it."""
        correction = self.active_correction
        if isinstance(correction, NoCorrection):
            return
        log_ratio = torch.where(batch.weight > 0, batch.old_logp - batch.sampled_logp, 0.0)
        batch.correction = correction(batch, log_ratio)
        corrected = correction.corrected(batch, log_ratio).float()
        columns = torch.stack([batch.correction, corrected, torch.ones_like(log_ratio)]).double()
        weight, share, tokens = self.all_reduce((columns * batch.weight.double()).sum(1)).tolist()
        self.rollout_metrics["rollout/correction"] = weight / max(tokens, 1.0)
        self.rollout_metrics["rollout/corrected"] = share / max(tokens, 1.0)

    def policy_loss(self, batch: Trajectory, out: Outputs) -> Tensor:
        """The surrogate, corrected, with a KL term and less the entropy bonus; logs what it did under policy/."""
        log_ratio, longest = out.logp - batch.old_logp, self.sampling.max_new_tokens
        losses = self.surrogate(batch, log_ratio, batch.advantage) * batch.correction
        loss = average(batch, losses, self.average, longest)
        with torch.no_grad():
            self.note("policy/loss", loss)
            self.note("policy/approx_kl", batch.token_mean(kl_estimate(-log_ratio, "k3")))
            self.note("policy/clip_fraction", batch.token_mean(self.surrogate.clipped(batch, log_ratio).float()))
        if self.kl_kind != "reward" and self.kl_controller.coefficient:
            price = kl_estimate(out.logp - batch.ref_logp, self.kl_kind)
            self.note("policy/kl", batch.token_mean(price))
            loss = loss + self.kl_controller.coefficient * average(batch, price, self.average, longest)
        if out.entropy is not None:
            entropy = batch.token_mean(out.entropy)
            self.note("policy/entropy", entropy)
            loss = loss - self.entropy_coef * entropy
        return loss

    @property
    def loss_outputs(self) -> set[str]:
        """What the loss asks the policy for."""
        return {"logp", "entropy"} if self.entropy_coef else {"logp"}

    def loss(self, batch: Batch) -> Tensor:
        assert isinstance(batch, Trajectory)
        return self.policy_loss(batch, self.policy(batch, self.loss_outputs, self.temperature))

    def takes_step(self, metrics: Mapping[str, float]) -> bool:
        """Neither this step nor the rest of a rollout once approx_kl, which is measured before the step, exceeds
        `stop_kl`; every process sees the same number."""
        moved = metrics["policy/approx_kl"]
        if self.stop_kl is None or moved <= self.stop_kl or self.rollout_loader is None:
            return super().takes_step(metrics)
        log.info("approx_kl %.3g: the rest of rollout %s is left out", moved, self.rollout_loader.rollout)
        self.rollout_loader.stop()
        skip_rest_of_epoch(self.trainer)
        return False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["rewards"] = {"kl_coef": self.kl_controller.coefficient, **self.score_transform.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "rewards" in checkpoint and self.trainer.state.fn == "fit":
            state = checkpoint["rewards"]
            if self.kl_controller.target is not None:  # a fixed β is the configuration's
                self.kl_controller.coefficient = state["kl_coef"]
            self.score_transform.load_state_dict(state)
