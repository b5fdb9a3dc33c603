"""The base of policy-gradient algorithms: rewards with a KL penalty, an estimator of advantages, and a surrogate."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from leyden.advantages import Estimator
from leyden.batch.forest import Batch
from leyden.batch.trajectory import Trajectory
from leyden.corrections import TIS, Correction, NoCorrection
from leyden.distributed import Reduce, one_process
from leyden.errors import UserError
from leyden.lightning_loop import skip_rest_of_epoch
from leyden.losses import kl_estimate
from leyden.on_policy.metrics import divergence
from leyden.on_policy.on_policy import OnPolicy
from leyden.on_policy.rollout import Rollout
from leyden.policy.policy import Outputs
from leyden.surrogates import Clip, Surrogate

log = logging.getLogger("leyden")


@dataclass
class KLController:
    """β, what a nat of KL from the reference costs in units of the reward.

    Args:
        coefficient: β, at first.
        target: nats a response that β is adapted to reach; None keeps β (Ziegler et al. 2019, section 2.2).
        horizon: responses over which β is adapted.
    """

    coefficient: float = 0.05
    target: float | None = None
    horizon: float = 10_000.0

    def update(self, kl: float, responses: int) -> None:
        """Raise β where the KL is above its target, lower it where it is below: by at most 20 % a `horizon`.

        Args:
            kl: from the reference, mean nats a response over a rollout of all processes.
            responses: in that rollout.
        """
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * responses / self.horizon


@dataclass
class ScoreTransform:
    """Transforms scores into rewards, in this order: penalty, normalisation, clipping.

    Args:
        eos_penalty: taken off a response that was cut at the length limit.
        normalise: take off the mean of all scores so far and divide by their standard deviation, so that β and the
            learning rate mean the same for every reward.
        clip: most that a score may be away from 0.
    """

    eos_penalty: float = 0.0
    normalise: bool = False
    clip: float | None = None
    _moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0], init=False, repr=False)
    """Count, mean and summed squared distance from it, of all scores so far (Welford 1962)."""

    def __call__(
        self, batch: Trajectory, stop: Collection[int], reduce: Reduce = one_process
    ) -> tuple[Tensor, dict[str, float]]:
        """The scores [N] as they become rewards, and what to log.

        Args:
            batch: responses with scores.
            stop: token ids that end a response.
            reduce: sums over the processes that hold the rest of the rollout.
        """
        ended = torch.isin(batch.tokens[batch.last], torch.tensor(sorted(stop), dtype=torch.long))
        score = batch.score - self.eos_penalty * (~ended).float()
        metrics: dict[str, float] = {}
        if self.normalise:
            self._take(score.double(), reduce)
            count, mean, squares = self._moments
            deviation = (squares / count) ** 0.5
            score = (score - mean) / max(deviation, 1e-6)
            metrics |= {"rollout/score_mean": mean, "rollout/score_std": deviation}
        if self.clip is not None:
            beyond = (score.abs() > self.clip).double()
            share = reduce(torch.stack([beyond.sum(), torch.ones_like(beyond).sum()]))
            metrics["rollout/score_clipped"] = float(share[0] / share[1])
            score = score.clamp(-self.clip, self.clip)
        return score, metrics

    def _take(self, score: Tensor, reduce: Reduce) -> None:
        """Add scores [N] of this process, and those of the others, to the moments."""
        count, mean, squares = self._moments
        new, summed = reduce(torch.stack([torch.ones_like(score).sum(), score.sum()])).tolist()
        here = summed / new
        total, apart = count + new, here - mean
        squares += float(reduce(((score - here) ** 2).sum())) + apart**2 * count * new / total
        self._moments = [total, mean + apart * new / total, squares]

    def state_dict(self) -> dict[str, Any]:
        """The moments."""
        return {"moments": list(self._moments)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._moments = list(state["moments"])


class PolicyGradient(OnPolicy):
    """Make tokens that did better than expected likelier, as far as the surrogate allows (Schulman et al. 2017, eq. 7).

    The reward of a token is -β log(π / π_ref), k1, and its response's score at the last token (Ouyang et al. 2022, eq.
    2 without the pretraining term). A subclass names an estimator of advantages.

    Args:
        estimator: advantages from rewards.
        surrogate: the loss of a token from its log-ratio and advantage; None is PPO's clip.
        correction: weights of tokens that an engine sampled from another distribution than training computes. They
            multiply the surrogate's losses, not those of values and not the entropy. None is TIS where the engine is
            not exact.
        clip: ε of PPO's clip, how far the probability of a token may move within a rollout before its gradient ends.
        kl_coef: β.
        kl_target: nats a response that β is adapted to reach; None keeps β.
        kl_horizon: responses over which β is adapted.
        score: what is done to scores before they become rewards.
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
        correction: Correction | None = None,
        clip: float = 0.2,
        kl_coef: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: float = 10_000.0,
        score: ScoreTransform | None = None,
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
        if estimator.needs_values and not self.has_values:
            raise UserError(f"--model.estimator {type(estimator).__name__}: it needs values; use PPO")
        if self.samples < estimator.least_samples:
            raise UserError(
                f"--model.samples {self.samples}: a response is compared with the others to its prompt; give "
                f"{estimator.least_samples} or more, or use PPO"
            )
        self.estimator, self.surrogate, self.correction = estimator, surrogate or Clip(clip), correction
        self.entropy_coef, self.stop_kl = entropy_coef, stop_kl
        self.kl_controller = KLController(kl_coef, kl_target, kl_horizon)
        self.score_transform = score or ScoreTransform()

    def configure_model(self) -> None:
        super().configure_model()
        given = type(self.correction).__name__
        if not isinstance(self.correction, NoCorrection | None) and not self.lag and self.engine.is_exact(self.policy):
            raise UserError(
                f"--model.correction {given}: the engine {type(self.engine).__name__} samples from the distribution "
                "that is trained, so there is nothing to correct; leave it out, or set another --model.engine"
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
        batch.score, metrics = self.score_transform(batch, self.policy.stop, self.all_reduce)
        reward = -self.kl_controller.coefficient * kl_estimate(batch.old_logp - batch.ref_logp) * batch.weight
        reward[batch.last] += batch.score
        self.rollout_metrics |= metrics | {"rollout/kl_coef": self.kl_controller.coefficient}
        batch.advantage, batch.returns = self.estimator(batch, reward, self.all_reduce)
        kl = divergence(batch).double()
        total, responses = self.all_reduce(torch.stack([kl.sum(), torch.ones_like(kl).sum()])).tolist()
        self.kl_controller.update(total / responses, int(responses))
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
        """The surrogate, corrected, less the entropy bonus; logs what it did under policy/."""
        log_ratio = out.logp - batch.old_logp
        loss = batch.token_mean(self.surrogate(batch, log_ratio, batch.advantage) * batch.correction)
        with torch.no_grad():
            self.note("policy/loss", loss)
            self.note("policy/approx_kl", batch.token_mean(kl_estimate(-log_ratio, "k3")))
            self.note("policy/clip_fraction", batch.token_mean(self.surrogate.clipped(batch, log_ratio).float()))
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
