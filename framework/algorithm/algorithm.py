"""The base class of algorithms: a subclass writes `loss`, as exact means over its batch, and little else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from leyden.algorithm.compile_ahead import compile_ahead
from leyden.algorithm.optimizer_checks import make_optimizer, make_schedule
from leyden.algorithm.optimizer_step import OptimizerStep
from leyden.algorithm.schedules import (
    WarmupCosine,
    parameter_groups,
    plain_state,
    replayed,
    restore_hyperparameters,
)
from leyden.algorithm.trainer_checks import check_trainer
from leyden.batch.forest import Batch
from leyden.checkpoint.averaging import average_exactly, holds_average, resume_current
from leyden.checkpoint.find import ENTRY
from leyden.checkpoint.provenance import Provenance, made_from
from leyden.data.tokenizer import beyond_embeddings, set_template
from leyden.distributed import reduce_sums
from leyden.errors import UserError
from leyden.example import Example
from leyden.lightning_loop import planned_steps, use_exact_loop
from leyden.policy.engine import Engine, Native
from leyden.policy.engine_session import EndEngine, EngineSession
from leyden.policy.policy import Policy, Reference, ReferenceKind, Sampling
from leyden.policy.reference import OtherPolicy
from leyden.sharding import assembled, shard

log = logging.getLogger("leyden")
GREEDY = Sampling(temperature=0.0)


class Algorithm(OptimizerStep):
    """A policy and a loss, with building, optimizer, validation, prediction and checkpoints around them. How a step is
    taken, `loss` and `note` stand in `OptimizerStep`.

    Args:
        policy: the model.
        optimizer: any optimizer by class path.
        lr_scheduler: any scheduler by class path, stepped once an optimizer step; None keeps the rate.
        sampling: how `predict` samples; greedy unless a temperature is given.
        engine: what samples; None is the policy itself.
    """

    wants: ClassVar[tuple[str, ...]] = ("logp",)
    """What training asks the policy for: logp, score, value. A head that nothing asks for is not made or not
    trained."""
    dropout: ClassVar[bool] = True
    """Whether the model keeps its dropout. Where two forwards are compared, noise would look like a difference."""
    on_policy: ClassVar[bool] = False
    """Whether it trains on rollouts that it samples itself."""
    predicts: ClassVar[str] = "answers"
    """What `leyden predict` writes: answers to prompts, or scores of the answers that rows have."""

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=2e-5, weight_decay=0.01, fused=True),
        lr_scheduler: LRSchedulerCallable | None = lambda o: WarmupCosine(o),
        sampling: Sampling = GREEDY,
        engine: Engine | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if kwargs:
            raise TypeError(f"{type(self).__name__} has no argument {', '.join(kwargs)}")
        self.policy, self.optimizer, self.lr_scheduler = policy, optimizer, lr_scheduler
        self.sampling = sampling.seeded()
        self.strict_loading = False
        self.provenance = Provenance()
        self.when_built: list[Callable[[], None]] = []
        """Called once the policy is built, before the weights of a checkpoint arrive."""
        self.validated_at = -1
        """The optimizer step of the last validation."""
        self.engine = engine or Native()
        self.session = EngineSession(self.engine)
        self.samples_answers = False
        """Whether the policy itself answers prompts while it is trained; set by what will ask it."""
        self.longest_sampled = 0
        """Most tokens of a prompt and its answer that anything beside the data's own prompts will ask for."""
        self._sums: dict[str, Tensor] = {}
        self._settings: list[dict[str, Any]] = []
        """Of the optimizer's parameter groups, as they are configured."""
        self._schedule: dict[str, Any] = {}
        """What the learning rates follow: see `_planned`."""
        self._saved_schedule: dict[str, Any] = {}
        """The same of the checkpoint that training goes on from."""

    def experience(self, loader: Any) -> Any:
        """A sized iterable of batches from the DataModule's loader: the loader itself, unless sampled on-policy."""
        return loader

    def validation_sums(self, batch: Batch) -> dict[str, Tensor]:
        """The sums that validation adds up over batches and processes: by default each value is this batch's share of a
        mean, so that the sum is the mean."""
        self._notes = {}
        loss = self.loss(batch)
        return {"loss": loss} | self._notes

    def validation_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Validation metrics from the sums of `validation_sums`."""
        return dict(sums)

    # -- building ----------------------------------------------------------------------------------------------------

    def configure_callbacks(self) -> list[Any]:
        average_exactly(self.trainer.callbacks)  # type: ignore[attr-defined]
        return [EndEngine()]

    def setup(self, stage: str) -> None:
        use_exact_loop(self.trainer)
        self.session.forget()
        if stage == "fit":
            check_trainer(self.trainer, self)
            for policy in (module for module in self.modules() if isinstance(module, Policy)):
                policy.check_trainable()
        template = getattr(self.data, "chat_template", None)
        if template is not None:  # so that generation and exports use the template of the data
            set_template(self.policy.tokenizer, template)

    def teardown(self, stage: str) -> None:
        self.session.stop()

    @property
    def needs_whole(self) -> bool:
        """Whether sampling runs models here, whose sharded weights then have to be whole on every process."""
        return self.engine.runs_policy

    @contextmanager
    def sampling_engine(self) -> Iterator[Engine]:
        """The engine, with the policy's present weights, each state of which is sent once. To be entered on every
        process; sharded weights are whole inside where `needs_whole`."""
        trainer, sharded = self.trainer, assembled(self) if self.needs_whole else nullcontext()
        longest = max(self.longest_sampled, int(getattr(self.data, "max_length", 0) or 0)) or self.budget
        longest = min(longest, self.policy.positions or longest)
        version = (trainer.global_step, holds_average(trainer))
        with sharded:
            yield self.session.sync(self.policy, version, Path(trainer.default_root_dir), longest)
        if trainer.state.fn == "fit":
            self.engine.rest()

    def sync_engine(self) -> None:
        """Send the engine the policy's present weights, for what will be asked later. To be called on every process."""
        with self.trainer.precision_plugin.forward_context(), self.sampling_engine():
            return

    @property
    def budget(self) -> int:
        """Most tokens in one forward."""
        return int(getattr(self.data, "max_tokens", 16384))

    @property
    def has_reference(self) -> bool:
        """Whether there is a `reference` that gives log-probs of any batch."""
        return False

    @property
    def has_reference_policy(self) -> bool:
        """Whether that reference is another model than the one that training starts from."""
        return False

    def configure_model(self) -> None:
        self.policy.build(self.wants, self.dropout)
        self.shard_policy(self.policy)
        while self.when_built:
            self.when_built.pop()()
        self._check_tokens()
        for line in self.policy.cautions if self.trainer.state.fn == "fit" else ():
            log.warning(line)
        longest, room = getattr(self.data, "longest_row", 0), self.policy.positions
        if room is not None and longest > room:
            raise UserError(
                f"the longest row has {longest} tokens but {self.policy.path} has positions for {room}; "
                f"set --data.max_length {room}"
            )

    def _check_tokens(self) -> None:
        """That the model has an embedding for every token of the data. Tokens that the data do not use may lack one."""
        limit, tokenizer = self.policy.embeddings, self.policy.tokenizer
        if limit is None or not hasattr(self.data, "find_token") or len(tokenizer) <= limit:
            return
        if (at := self.data.find_token(limit)) is not None:
            row, token = at
            problem = beyond_embeddings(tokenizer, token, limit)
            raise UserError(f"{self.data.source(row)}: with its chat template it holds {problem}")

    def shard_policy(self, policy: Policy) -> None:
        """Shard a policy that was just built, where the strategy has a mesh of devices for that."""
        if self.device_mesh is not None and any(True for _ in policy.parameters()):
            shard(policy, policy.blocks(), self.device_mesh["data_parallel"])

    def frozen_reference(self, kind: ReferenceKind = "auto") -> Reference:
        """The policy as it is now, sharded where the policy is: copies cannot take the place of sharded weights, so
        there the model is loaded again, unless it is the policy without its adapter."""
        reference = self.policy.reference(kind)
        if self.device_mesh is None or reference.kind == "adapter_off":
            return reference
        twin = self.policy.twin()
        reference = OtherPolicy(twin, self.policy)
        self.shard_policy(twin)
        return reference

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self)
        if not groups:
            raise UserError(
                "nothing is trained: the weights are frozen (four-bit weights always are) and there is no adapter; add "
                "--config lora"
            )
        optimizer = make_optimizer(self.optimizer, groups)
        # fused optimizers offer to unscale fp16 gradients themselves, and then Lightning refuses to clip them
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        self._settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        make = self.lr_scheduler
        scheduler = None if make is None else make_schedule(make, optimizer, self.total_steps())
        self._schedule = self._planned(optimizer, scheduler)
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, WarmupCosine):
            scheduler.plan(self._schedule["total"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _planned(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
        """What decides on learning rates, as plain values: optimizer and scheduler with their arguments, what bounds
        training, and the number of steps that follows from it."""
        trainer = self.trainer
        return {
            "optimizer": _class_path(optimizer),
            "settings": plain_state(self._settings),
            "scheduler": [_class_path(scheduler), plain_state(scheduler.state_dict())] if scheduler else None,
            "bounds": [trainer.max_steps, trainer.max_epochs, self.steps_per_epoch],
            "total": self.total_steps(),
        }

    def total_steps(self) -> int | None:
        """Optimizer steps of the whole training, or None if it has no known end. On resume those that the checkpoint
        had taken count, whatever epochs were then, and epochs to come are as long as they are now.

        Worked out here: Lightning's own estimate creates the loaders early, and then their state is not restored.
        """
        return planned_steps(self.trainer, self.steps_per_epoch)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one epoch, or None where nothing is planned ahead."""
        steps = getattr(self.data, "steps_per_epoch", None)
        return None if steps is None else int(steps)

    def rehearse(self, batch: Batch) -> list[Tensor]:
        """Run each model once as `loss` does, before the first step, where kernels are to be compiled. Overridden by
        algorithms that train more than the policy.

        Args:
            batch: a few tokens; prompts with two responses each.

        Returns:
            What is learnt from.
        """
        return [x for x in vars(self.policy(batch, set(self.wants))).values() if x is not None]

    @property
    def row_sizes(self) -> tuple[int, int]:
        """Fewest and most tokens in one forward of training, as far as that is known."""
        sizes: tuple[int, int] = getattr(self.data, "row_sizes", (1, self.budget))
        return sizes

    def on_fit_start(self) -> None:
        compile_ahead(self)

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path is None:
            return
        saved, now, configs = self._saved_schedule, self._schedule, self.trainer.lr_scheduler_configs
        # where training is bounded as it was, the steps that an epoch left out do not shorten its plan
        now["total"] = saved["total"] if saved.get("bounds") == now["bounds"] else self.total_steps()
        if now["total"] is not None and self.trainer.global_step >= now["total"]:
            log.warning(
                "training came to its end at step %d already: what is left is to validate and to export; a larger "
                "--trainer.max_steps or --trainer.max_epochs goes on",
                self.trainer.global_step,
            )
        changed = {name for name in now if saved.get(name, now[name]) != now[name]}
        for optimizer in self.trainer.optimizers:
            if "optimizer" in changed:
                optimizer.state.clear()
                log.warning("%s starts anew: the checkpoint has the state of %s", now["optimizer"], saved["optimizer"])
            anew = not changed.isdisjoint({"optimizer", "scheduler"})
            restore_hyperparameters(optimizer, self._settings, None if anew else saved.get("settings"))
            for config in configs:
                if anew and self.lr_scheduler is not None:
                    config.scheduler = replayed(self.lr_scheduler, optimizer, self.trainer.global_step)
                else:  # its own state says how far it has come
                    for group, rate in zip(optimizer.param_groups, config.scheduler.get_last_lr(), strict=True):
                        group["lr"] = rate
                if isinstance(config.scheduler, WarmupCosine):
                    config.scheduler.plan(now["total"])

    # -- validation, test and prediction -----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._sums = {}

    def validation_step(self, batch: Any, index: int) -> None:
        parts = (
            self.micro_batches.run(self.validation_sums, batch)
            if isinstance(batch, Batch)
            else [self.validation_sums(batch)]
        )
        for part in parts:
            for name, value in part.items():
                self._sums[name] = self._sums.get(name, torch.zeros((), device=self.device)) + value.detach()

    def on_validation_epoch_end(self) -> None:
        self.agree_on_memory()
        sums = reduce_sums(self._sums, self.trainer, self.device)
        metrics = {f"{self._stage()}/{name}": value for name, value in self.validation_metrics(sums).items()}
        whole = not self.trainer.sanity_checking or self.trainer.num_sanity_val_steps == float("inf")
        for logger in self.trainer.loggers if whole else ():
            # loggers count the steps before this one; a whole sanity check is the measure before training, at step 0
            logger.log_metrics(metrics, step=self.trainer.global_step - 1)
        self.log_dict(metrics, logger=False)  # of a sanity check too: `Checkpoint` looks for its monitor
        if not self.trainer.sanity_checking:
            self.validated_at = self.trainer.global_step

    def _stage(self) -> str:
        return "test" if self.trainer.testing else "val"

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def on_predict_start(self) -> None:
        if self.predicts == "answers":
            self.sync_engine()  # here, and not where prompts are answered: a process may have none of them

    def predict_step(self, batch: Sequence[tuple[Example, list[int]]], index: int) -> list[dict[str, Any]]:
        """One answer to each prompt: rows for a JSONL file that can be trained on, with the row each came from."""
        prompts = [prompt for _, prompt in batch]
        with self.sampling_engine() as engine:
            groups = engine.generate(prompts, 1, self.sampling, range(len(prompts)))
        return [
            {
                **example.prompt_columns(),
                "response": group[0].text,
                "finished": group[0].finished,
                "row": dict(example.row),
            }
            for (example, _), group in zip(batch, groups, strict=True)
        ]

    # -- checkpoints: what is trained, and nothing that the configuration or the base model already says ------------

    def made_from(self) -> dict[str, Any]:
        """What this run is made from; to be asked on every process, since weights may be sharded."""
        policies = {name: module for name, module in self.named_modules() if isinstance(module, Policy)}
        data = str(getattr(self.data, "fingerprint", ""))
        return made_from(type(self).__name__, policies, self.policy.tokenizer, data)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: v for name, v in super().state_dict(*args, **kwargs).items() if name in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {
            ENTRY: self.provenance.entry(self.made_from()),
            "progress": dict(self.progress),
            "validated_at": self.validated_at,
            "schedule": self._schedule,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sharded = self.device_mesh is not None  # the strategy has put weights and optimizer in their places already
        weights = None if sharded else self.state_dict()
        self.provenance.check(checkpoint, self.made_from(), weights, training=self.trainer.state.fn == "fit")
        self.progress, self.validated_at = dict(checkpoint["progress"]), int(checkpoint["validated_at"])
        self._saved_schedule = dict(checkpoint.get("schedule") or {})
        if self.trainer.state.fn == "fit":
            resume_current(checkpoint)


def _class_path(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
