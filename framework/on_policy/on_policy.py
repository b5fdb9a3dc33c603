"""Learning from rewards: the policy answers prompts, the answers are scored, and minibatches of them are trained on."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from leyden.algorithm.with_reference import Compared
from leyden.batch.forest import Batch
from leyden.batch.trajectory import Trajectory, joined, restored, stored
from leyden.batch.tree import Tree, packs
from leyden.distributed import gathered, share
from leyden.errors import UserError
from leyden.evaluation.evaluation_pass import answered
from leyden.on_policy.engine import Engine, Native
from leyden.on_policy.metrics import Clock, divergence, measured, some, term_means
from leyden.on_policy.rollout_file import RolloutFile, Row, fingerprint, fits, row_of, samples_of, tree_of
from leyden.on_policy.rollout_loader import Experience, Prompt, PromptLoader, check_room
from leyden.policy.policy import Sampling
from leyden.rewards.reward import Reward, attach, score
from leyden.run.progress import RolloutBar
from leyden.sharding import assembled

log = logging.getLogger("leyden")
SAMPLING = Sampling(max_new_tokens=256, temperature=1.0)
CHUNK = 256
"""Responses that are sampled, scored and kept at a time."""


class OnPolicy(Compared):
    """One epoch is one rollout: `data.batch_size` prompts are answered with the weights of that moment, the answers are
    scored, and `epochs` passes of `minibatches` optimizer steps learn from them.

    The noise of a response depends on seed, rollout, prompt and the number of the sample alone, and every process ends
    up with the whole rollout: one process and two take the same steps. A subclass writes `loss`, and `credit` for what
    it needs to know of a rollout before it trains on it.

    Args:
        reward: scores answers: a trained ModelReward, Gold, a Function of yours, an HTTPJudge, a WeightedSum of some.
        samples: responses to each prompt.
        epochs: passes over each rollout.
        minibatches: optimizer steps in one pass.
        sampling: how responses are sampled, in training and by `predict`.
        engine: what samples; None is the policy itself.
        keep_rollouts: whether all responses and scores go to rollouts.jsonl in the run's folder, from where a run that
            broke off in the middle of a rollout goes on, too.
    """

    def __init__(
        self,
        *args: Any,
        reward: Reward,
        samples: int = 1,
        epochs: int = 1,
        minibatches: int = 1,
        sampling: Sampling = SAMPLING,
        engine: Engine | None = None,
        keep_rollouts: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, sampling=sampling, **kwargs)
        if samples < 1 or epochs < 1 or minibatches < 1:
            raise UserError(
                f"--model.samples {samples} --model.epochs {epochs} --model.minibatches {minibatches}: give 1 or more"
            )
        if self.reference_kind == "precomputed":
            raise UserError(
                "--model.reference precomputed: answers are not known before they are sampled; leave it out"
            )
        self._reward = (reward,)  # a tuple, so that a model in it is neither trained nor saved
        self.samples, self.epochs, self.minibatches = samples, epochs, minibatches
        self.engine = engine or Native()
        self.keep_rollouts = keep_rollouts
        self.experiences: Experience | None = None
        self.found: dict[str, float] = {}
        """What was measured on the latest rollout, until it is logged."""
        self._kept: RolloutFile | None = None
        self._parts: dict[str, list[float]] = {}
        self.clock = Clock()
        self._validation_began = 0.0

    @property
    def reward(self) -> Reward:
        reward = self._reward[0]
        if isinstance(reward, nn.Module):
            reward.to(self.device)  # does nothing once it is there
        return reward

    # -- the seams ---------------------------------------------------------------------------------------------------

    looks_at: ClassVar[int | None] = None
    """How many of a prompt's responses log-probs are worked out for: all, or so many where only the KL needs them."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of one minibatch of what `credit` gave back, as for every algorithm."""

    def credit(self, trees: list[Tree], seen: Trajectory) -> Trajectory:
        """What to train on. Sees the whole rollout of all processes and must come to the same on each of them.

        Args:
            trees: every prompt with its responses and scores, best response first.
            seen: the responses that were looked at, with log-probs of policy and reference (and values), on CPU.
        """
        return seen

    def look(self, batch: Trajectory) -> Trajectory:
        """What the policy and its reference say of responses now: the path that training takes, without gradients."""
        logp = self.policy(batch, {"logp"}, self.temperature).logp
        return replace(batch, old_logp=logp, ref_logp=logp - self.log_ratio(batch, logp, self.temperature))

    @property
    def temperature(self) -> float:
        """Of the distribution that is trained: the one that is sampled from."""
        return self.sampling.temperature or 1.0

    def configure_model(self) -> None:
        super().configure_model()
        attach(self._reward[0], self.policy)

    # -- experience --------------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        return self.epochs * self.minibatches

    def experience(self, loader: PromptLoader) -> Experience:
        if not isinstance(loader, PromptLoader):
            raise UserError(f"{type(self).__name__} samples answers to prompts; set --data PromptData")
        trainer, self._loader = self.trainer, loader
        check_room(self, loader)
        shares = trainer.accumulate_grad_batches, trainer.world_size, trainer.global_rank
        self.experiences = Experience(self.collect, self.epochs, self.minibatches, *shares, loader.seed)
        self.experiences.rows = str(getattr(self.data, "fingerprint", ""))
        return self.experiences

    @torch.no_grad()
    def collect(self, rollout: int) -> Trajectory:
        """Sample, score and look at one rollout; the same on every process."""
        self.clock.start()
        drawn = share(self._loader.draw(rollout), self.trainer)
        with assembled(self), self.trainer.precision_plugin.forward_context():
            self.engine.sync(self.policy)
            trees = gathered(self._sampled(drawn, rollout), self.trainer)
            self.clock.sampled(trees)
            seen = self._looked([some(tree, self.looks_at, rollout) for tree in trees])
        whole = self.credit(trees, seen)
        terms, self._parts = gathered([self._parts], self.trainer), {}
        self.found |= measured(trees, seen, self.policy.stop) | term_means(terms) | self.clock.end()
        return whole

    def _sampled(self, drawn: Sequence[tuple[int, Prompt]], rollout: int) -> list[Tree]:
        """Responses with scores, of this process's prompts; those that are on file already are not sampled again."""
        sampling = replace(self.sampling, seed=(self.sampling.seed or 0) * 1_000_003 + rollout)
        marks = fingerprint(self, sampling, self.samples)
        known = self._file().begin(rollout, marks, self.trainer.ckpt_path is not None)
        known = {number: known[number] for number, p in drawn if number in known and fits(p, known[number])}
        bar = RolloutBar(self.trainer, rollout, len(drawn) * self.samples)
        step, trees = max(1, CHUNK // self.samples), list[Tree]()
        for chunk in (drawn[at : at + step] for at in range(0, len(drawn), step)):
            missing = [(number, prompt) for number, prompt in chunk if number not in known]
            prompts, numbers = [prompt.tokens for _, prompt in missing], [number for number, _ in missing]
            groups = self.engine.generate(prompts, self.samples, sampling, numbers, bar.add) if missing else []
            for (number, prompt), group in zip(missing, groups, strict=True):
                known[number] = row_of(prompt, group, {"rollout": rollout, "draw": number, "marks": marks})
            self._score([(prompt, known[number]) for number, prompt in chunk])
            trees += [tree_of(prompt, known[number]) for number, prompt in chunk]
            bar.scored(len(trees) * self.samples)
        self._file().end()
        return trees

    def _score(self, pairs: list[tuple[Prompt, Row]]) -> None:
        """Give rows their scores, and write them down, with what the reward failed on too."""
        new = [(prompt, row) for prompt, row in pairs if row["scores"] is None]
        if not new:
            return
        try:
            found = score(self.reward, [sample for prompt, row in new for sample in samples_of(prompt, row)]).tolist()
            for _, row in new:
                row["scores"], found = found[: len(row["responses"])], found[len(row["responses"]) :]
            for name, values in getattr(self.reward, "terms", {}).items():
                self._parts.setdefault(name, []).extend(values.tolist())
        finally:
            self._file().append([row for _, row in new])

    def _file(self) -> RolloutFile:
        if self._kept is None:
            rank = self.trainer.global_rank
            name = f"rollouts-{rank}.jsonl" if rank else "rollouts.jsonl"
            self._kept = RolloutFile(Path(self.trainer.default_root_dir) / name if self.keep_rollouts else None)
        return self._kept

    def _looked(self, trees: list[Tree]) -> Trajectory:
        """`look` at responses of all processes, each at its share."""
        packed = [Trajectory.of(few) for few in packs(share(trees, self.trainer), self.budget)]
        parts = [stored(part) for batch in packed for part in self.pieces.run(self._looking, batch)]
        return joined([restored(part) for part in gathered(parts, self.trainer)])

    def _looking(self, batch: Trajectory) -> Trajectory:
        return self.look(batch.to(self.device)).to("cpu")

    # -- training and validation -------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        found, self.found = self.found, {}
        self.log_dict(found, logger=False, on_step=True, on_epoch=False)
        for logger in self.trainer.loggers if found else ():  # once a rollout: Lightning would repeat it at every step
            logger.log_metrics(found, step=self.trainer.global_step)

    @torch.no_grad()
    def measures(self, batch: list[Prompt]) -> dict[str, Tensor]:  # type: ignore[override]
        """One answer to each held-out prompt, with the same noise every time; sums over them."""
        with assembled(self):
            rows = answered(self.trainer, self.policy, batch, self.sampling, self.reward, self.engine) if batch else []
            pairs = zip(batch, rows, strict=True)
            trees = [Tree(prompt.tokens, [row["tokens"]], [row["reward"]], None, prompt.row) for prompt, row in pairs]
            seen = [self._looking(Trajectory.of(few)) for few in packs(trees, self.budget)]
        sums = {
            "count": len(rows),
            "reward": sum(row["reward"] for row in rows),
            "kl": sum(float(divergence(part).sum()) for part in seen),
            "length": sum(len(row["tokens"]) for row in rows),
            "eos_rate": sum(row["finished"] for row in rows),
        }
        return {name: torch.tensor(float(value), device=self.device) for name, value in sums.items()}

    def pause(self, seconds: float) -> None:
        """So long something was done that is no part of training."""
        self.clock.pause(seconds)

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._validation_began = time.monotonic()

    def on_validation_end(self) -> None:
        super().on_validation_end()
        self.pause(time.monotonic() - self._validation_began)

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {name: value / max(sums["count"], 1.0) for name, value in sums.items() if name != "count"}
