"""Learning from rewards: the policy answers prompts, the answers are scored, and minibatches of them are trained on."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leyden.algorithm.with_reference import WithReference
from leyden.batch.forest import Batch
from leyden.batch.trajectory import Trajectory
from leyden.batch.tree import Totals, Tree, chunk_by_tokens
from leyden.data.prompts import Prompt, PromptLoader
from leyden.distributed import all_gather, all_gather_list, all_or_none, gather_tensor, reduce_sums, reducer
from leyden.errors import UserError
from leyden.on_policy.ahead import Ahead
from leyden.on_policy.metrics import (
    RolloutClock,
    divergence,
    largest_mismatch,
    rollout_metrics,
    rollout_sums,
    term_means,
    term_sums,
)
from leyden.on_policy.rollout import Rollout
from leyden.on_policy.rollout_loader import RolloutLoader, check_room
from leyden.on_policy.sampler import Sampler, answer_prompts
from leyden.policy.engine import Engine
from leyden.policy.policy import Policy, Sampling
from leyden.rewards.reward import Reward, attach
from leyden.sharding import assembled, is_sharded

log = logging.getLogger("leyden")
SAMPLING = Sampling(max_new_tokens=256, temperature=1.0)


class OnPolicy(WithReference):
    """One epoch is one rollout: `data.batch_size` prompts are answered with the weights of that moment, the answers are
    scored, and `epochs` passes of `minibatches` optimizer steps learn from them.

    Every process answers and keeps its part of the prompts; the steps are those of one process. A subclass writes
    `loss`, and `credit` for what it needs to know of a rollout before it trains on it.

    Args:
        reward: scores answers: a trained ModelReward, Gold, a Function of yours, an HTTPJudge, a WeightedSum of some.
        samples: responses to each prompt.
        epochs: passes over each rollout.
        minibatches: optimizer steps in one pass.
        sampling: how responses are sampled, in training and by `predict`.
        keep_rollouts: whether all responses and scores go to rollouts.jsonl in the run's folder, from where a run that
            broke off in the middle of a rollout goes on, too.
        lag: 1 samples the next rollout while this one trains, so with weights of one rollout before (Noukhovitch et al.
            2024, "Asynchronous RLHF"); it needs an engine other than the policy, and `correction` weighs what lies
            between. 0 samples with the present weights.
    """

    on_policy = True
    kl_responses: ClassVar[int | None] = None
    """How many responses of each prompt get log-probs, chosen at random, where only the KL needs them; None is all."""
    needs_reward: ClassVar[bool] = True
    """Whether there is nothing to learn without one."""
    needs_answers: bool = False
    """Whether it trains on answers that rows have, too: `Prompt.answer`."""

    def __init__(
        self,
        *args: Any,
        reward: Reward | None,
        samples: int = 1,
        epochs: int = 1,
        minibatches: int = 1,
        sampling: Sampling = SAMPLING,
        keep_rollouts: bool = True,
        lag: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, sampling=sampling, **kwargs)
        if samples < 1 or epochs < 1 or minibatches < 1:
            raise UserError(
                f"--model.samples {samples} --model.epochs {epochs} --model.minibatches {minibatches}: give 1 or more"
            )
        if reward is None and self.needs_reward:
            raise UserError(
                f"--model.reward: missing; {type(self).__name__} learns from scores: give a ModelReward, Gold or a "
                "class of yours"
            )
        if self.reference_kind == "precomputed":
            raise UserError(
                "--model.reference precomputed: answers are not known before they are sampled; leave it out"
            )
        if lag not in (0, 1) or (lag and not self.engine.concurrent):
            raise UserError(
                f"--model.lag {lag}: 0 or 1; 1 samples while the policy trains, which takes another program: add "
                "--config vllm"
            )
        self.lag, self._ahead = lag, Ahead()
        self._reward = (reward,)  # a tuple, so that a model in it is neither trained nor saved
        self.samples, self.epochs, self.minibatches = samples, epochs, minibatches
        self.samples_answers = self.engine.runs_policy
        self.keep_rollouts = keep_rollouts
        self.rollout_loader: RolloutLoader | None = None
        self.rollout_metrics: dict[str, float] = {}
        """What was measured on the latest rollout, until it is logged."""
        self.clock = RolloutClock()
        self._validation_began = 0.0
        self._answers: list[Tree] = []
        """Answers of this validation, until their divergence is known."""

    # -- methods to override -----------------------------------------------------------------------------------------

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of one minibatch of what `credit` gave back, as for every algorithm."""

    def credit(self, rollout: Rollout) -> Trajectory:
        """Turn this process's part of a rollout into what is trained on. `all_reduce` sums over the whole.

        Args:
            rollout: prompts with their scored responses; `rollout.trajectory` has their log-probs.
        """
        assert rollout.trajectory is not None
        return rollout.trajectory

    def complete(self, rollout: Rollout) -> None:
        """Called on every process with its part of a rollout, sampled and scored, before log-probs are computed: the
        place for whatever needs other or further responses. By default nothing is done."""

    def asked(self, drawn: list[tuple[int, Prompt]]) -> list[tuple[int, Prompt]]:
        """Those of a rollout's prompts that the policy answers: all of them by default.

        Args:
            drawn: this process's prompts, each with the number of its draw.
        """
        return drawn

    def compute_log_probs(self, batch: Trajectory) -> Trajectory:
        """Fill in `old_logp` and `ref_logp` (and `value`) by the forward pass of training, without gradients."""
        logp = self.policy(batch, {"logp"}, self.temperature).logp
        return replace(batch, old_logp=logp, ref_logp=logp - self.log_ratio(batch, logp, self.temperature))

    # -- helpers of subclasses ---------------------------------------------------------------------------------------

    @property
    def temperature(self) -> float:
        """Of the distribution that is trained: the one that is sampled from."""
        return self.sampling.temperature or 1.0

    @property
    def reward(self) -> Reward | None:
        """What scores the samples, on this device; None where nothing does."""
        reward = self._reward[0]
        if isinstance(reward, nn.Module):
            reward.to(self.device)  # does nothing once it is there
        return reward

    @property
    def needs_whole(self) -> bool:
        reward = self._reward[0]
        shared = any(map(is_sharded, reward.modules())) if isinstance(reward, nn.Module) else False
        return shared or super().needs_whole  # a reward on the policy's base runs it whenever it is asked

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of a tensor over all processes; to be called on every one of them."""
        return x if self._trainer is None else reducer(self.trainer)(x)

    @property
    def trained_on(self) -> int:
        """Most responses of one prompt that `credit` gives back."""
        return self.samples

    @property
    def drops_prompts(self) -> bool:
        """Whether a rollout may end with fewer prompts than it began with."""
        return type(self).complete is not OnPolicy.complete

    # -- experience --------------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        return self.epochs * self.minibatches

    @property
    def row_sizes(self) -> tuple[int, int]:
        answers = self.samples * self.sampling.max_new_tokens
        return 1, min(self.budget, self.data.batch_size * (self.data.longest_row + answers)) or self.budget

    def rehearse(self, batch: Batch) -> list[Tensor]:
        reward: Any = self.reward
        for model in reward.modules() if isinstance(reward, nn.Module) else ():
            if isinstance(model, Policy):
                with torch.no_grad(), torch.autocast(self.device.type, enabled=False):  # as `ModelReward` runs it
                    model(batch, {"score"})
        return super().rehearse(batch)

    def configure_model(self) -> None:
        super().configure_model()
        if self._reward[0] is not None:
            attach(self._reward[0], self.policy)

    def experience(self, loader: PromptLoader) -> RolloutLoader:
        if not isinstance(loader, PromptLoader):
            raise UserError(f"{type(self).__name__} samples answers to prompts; set --data PromptData")
        trainer = self.trainer
        folder = Path(trainer.default_root_dir) if self.keep_rollouts else None
        self.sampler = Sampler(self.engine, self.sampling, self.samples, folder, trainer)
        self.rollout_loader = RolloutLoader(
            self.collect,
            loader,
            self.epochs,
            self.minibatches,
            trainer.accumulate_grad_batches,
            trainer.world_size,
            trainer.global_rank,
            self.all_reduce,
            self._gather,
            str(getattr(self.data, "fingerprint", "")),
        )
        check_room(self, self.rollout_loader)
        return self.rollout_loader

    @torch.no_grad()
    def collect(self, number: int, drawn: list[tuple[int, Prompt]]) -> Trajectory:
        """Sample, score and credit this process's part of a rollout."""
        self.clock.start()
        with self.trainer.precision_plugin.forward_context(), self.sampling_engine():
            rollout = self._sampled(number, self.asked(drawn))
            self.complete(rollout)
            terms = all_gather_list(rollout.terms)  # also waits for the last process, whose time is everyone's
            self.clock.sampled()
            rollout.trajectory = self._with_log_probs(rollout)
        self.agree_on_memory()
        sums = reduce_sums(rollout_sums(rollout, sorted(set(terms))), self.trainer, self.device)
        self.rollout_metrics |= rollout_metrics(sums, self.sampling.is_full) if sums["responses"] else {}
        if self.sampling.is_full and sums["responses"]:
            self.rollout_metrics["rollout/mismatch_max"] = max(all_gather(largest_mismatch(rollout.trajectory)))
        batch = self.credit(rollout)
        self.rollout_metrics |= self.clock.end(sums["length"])
        if not self.engine.runs_policy:
            self.rollout_metrics["perf/sync_seconds"] = self.session.seconds
        return batch

    def _sampled(self, number: int, drawn: list[tuple[int, Prompt]]) -> Rollout:
        """This rollout with its scores; with a lag it was sampled ahead, and the next one is from here on."""
        assert self.rollout_loader is not None
        pending, prompts = self._ahead.take(number), self.rollout_loader.fingerprint
        saved = self._ahead.saved(number, prompts, drawn, self.policy) if pending is None else None
        if saved is not None:
            pending = self.sampler.known(number, drawn, *saved)
        if pending is None:
            pending = self.sampler.draw(number, drawn, self)
            if self.lag:
                pending.all()  # the next one would ask the engine at the same time
        total = self.total_steps()
        if self.lag and (total is None or total > self.trainer.global_step + self.steps_per_epoch):
            share = self.asked(self.rollout_loader.share(number + 1))
            self._ahead.pending = self.sampler.draw(number + 1, share, self, shown=False).ahead()
        return self.sampler.score(pending, self.reward)

    @contextmanager
    def sampling_engine(self) -> Iterator[Engine]:
        if self.lag:
            all_or_none(self._ahead.wait)
        with super().sampling_engine() as engine:
            yield engine

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self._ahead.forget()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.lag and self.rollout_loader is not None:
            checkpoint["ahead"] = self._ahead.state_dict(self._gather, self.rollout_loader.fingerprint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn == "fit":
            self._ahead.load_state_dict(checkpoint.get("ahead"))

    def _with_log_probs(self, rollout: Rollout) -> Trajectory:
        """Responses with the log-probs of policy and reference, as many at a time as fit the memory."""
        answered = chunk_by_tokens(rollout.some_responses(self.kl_responses), self.budget)
        parts = self.run_in_step(self._on_device, [Rollout.pack(few) for few in answered])
        return Trajectory.cat(parts or [Rollout.pack([])])

    def _on_device(self, batch: Trajectory) -> Trajectory:
        return self.compute_log_probs(batch.to(self.device)).to("cpu")

    def _gather(self, batch: Trajectory) -> list[Trajectory] | None:
        """The parts of all processes, on the first."""
        columns = {d.name: x for d in fields(batch) if d.init and isinstance(x := getattr(batch, d.name), Tensor)}
        gathered = {name: gather_tensor(x, self.trainer) for name, x in columns.items()}
        if self.trainer.global_rank:
            return None
        whole = zip(*(parts or [] for parts in gathered.values()), strict=True)
        return [Trajectory(**dict(zip(gathered, part, strict=True)), totals=Totals(0.0, 0, 0)) for part in whole]

    # -- training and validation -------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        metrics, self.rollout_metrics = self.rollout_metrics, {}
        self.log_dict(metrics, logger=False, on_step=True, on_epoch=False)
        for logger in self.trainer.loggers if metrics else ():  # once a rollout: Lightning would repeat it every step
            logger.log_metrics(metrics, step=self.trainer.global_step)

    @torch.no_grad()
    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._answers = []
        self.sync_engine()  # here, and not where prompts are answered: a process may have none of them

    on_test_epoch_start = on_validation_epoch_start

    @torch.no_grad()
    def validation_sums(self, batch: list[Prompt]) -> dict[str, Tensor]:  # type: ignore[override]
        """One answer to each held-out prompt, with the same noise every time; sums over them."""
        with assembled(self) if self.needs_whole else nullcontext():
            answered = answer_prompts(self.trainer, self.policy, batch, self.sampling, self.reward, self.engine)
        self._answers += [one.tree() for one in answered] if self.sampling.is_full else []
        responses = [one.responses[0] for one in answered]
        sums = {
            "count": len(answered),
            "length": sum(len(response.tokens) for response in responses),
            "eos_rate": sum(response.finished for response in responses),
        } | term_sums(answered)
        if self._reward[0] is not None:
            sums["reward"] = sum(one.scores[0] for one in answered if one.scores)
        return {name: torch.tensor(float(value), device=self.device) for name, value in sums.items()}

    def validation_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        names = [name for name in ("reward", "kl", "length", "eos_rate") if name in sums]
        return {name: sums[name] / max(sums["count"], 1.0) for name in names} | term_means(sums)

    @torch.no_grad()
    def on_validation_epoch_end(self) -> None:
        if self.sampling.is_full:  # here, where all processes are: they run as many forwards
            answers, self._answers = chunk_by_tokens(self._answers, self.budget), []
            with self.trainer.precision_plugin.forward_context():
                parts = self.run_in_step(self._on_device, [Trajectory.of(few) for few in answers])
            self._sums["kl"] = torch.tensor(sum(float(divergence(part).sum()) for part in parts), device=self.device)
        for name in sorted(set(all_gather_list(list(self._sums)))):  # a process without prompts knows of no terms
            self._sums.setdefault(name, torch.zeros((), device=self.device))
        self.engine.rest()
        super().on_validation_epoch_end()

    on_test_epoch_end = on_validation_epoch_end

    def pause(self, seconds: float) -> None:
        """Leave seconds, an evaluation's for one, out of the time that perf/rollout_share is a share of."""
        self.clock.pause(seconds)

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._validation_began = time.monotonic()

    def on_validation_end(self) -> None:
        super().on_validation_end()
        self.pause(time.monotonic() - self._validation_began)
