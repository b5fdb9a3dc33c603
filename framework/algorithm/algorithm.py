"""The base class of algorithms: a subclass writes `loss`, as exact means over its batch, and little else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from leyden.algorithm.optimizer_step import OptimizerStep
from leyden.algorithm.schedules import WarmupCosine, parameter_groups, restore_hyperparameters
from leyden.batch.forest import Batch
from leyden.checkpoint.find import ENTRY
from leyden.checkpoint.provenance import Provenance, made_from
from leyden.distributed import reduce_sums
from leyden.errors import UserError
from leyden.example import Example
from leyden.lightning_loop import use_exact_loop
from leyden.policy.policy import Policy, Reference, ReferenceKind, Sampling
from leyden.policy.reference import OtherPolicy
from leyden.sharding import assembled, shard

GREEDY = Sampling(temperature=0.0)


log = logging.getLogger(__name__)


class Algorithm(OptimizerStep):
    """A policy and a loss, with building, optimizer, validation, prediction and checkpoints around them. How a step is
    taken, `loss` and `note` stand in `OptimizerStep`.

    Args:
        policy: the model.
        optimizer: any optimizer by class path.
        lr_scheduler: any scheduler by class path, stepped once an optimizer step; None keeps the rate.
        sampling: how `predict` samples; greedy unless a temperature is given.
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
        self._sums: dict[str, Tensor] = {}

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

    def setup(self, stage: str) -> None:
        use_exact_loop(self.trainer)
        template = getattr(self.data, "chat_template", None)
        if template is not None:  # so that generation and exports use the template of the data
            self.policy.tokenizer.chat_template = template

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
        for line in self.policy.cautions if self.trainer.state.fn == "fit" else ():
            log.warning(line)
        longest, room = getattr(self.data, "longest_row", 0), self.policy.positions
        if room is not None and longest > room:
            raise UserError(
                f"the longest row has {longest} tokens but {self.policy.path} has positions for {room}; "
                f"set --data.max_length {room}"
            )

    def shard_policy(self, policy: Policy) -> None:
        """Shard a policy that was just built, where the strategy has a mesh of devices for that."""
        if self.device_mesh is not None:
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
        optimizer = self.optimizer(cast(Any, groups))
        # fused optimizers offer to unscale fp16 gradients themselves, and then Lightning refuses to clip them
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        self._settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, WarmupCosine):
            scheduler.plan(self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int | None:
        """Optimizer steps of the whole training, or None if it has no known end.

        Worked out here: Lightning's own estimate creates the loaders early, and then their state is not restored.
        """
        trainer, ends = self.trainer, []
        if trainer.max_steps >= 0:
            ends.append(trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs >= 0 and self.steps_per_epoch is not None:
            ends.append(trainer.max_epochs * self.steps_per_epoch)
        return min(ends) if ends else None

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one epoch, or None where nothing is planned ahead."""
        steps = getattr(self.data, "steps_per_epoch", None)
        return None if steps is None else int(steps)

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path is not None:
            for optimizer in self.trainer.optimizers:
                schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
                restore_hyperparameters(optimizer, self._settings, cast(Any, schedulers))

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

    def predict_step(self, batch: Sequence[tuple[Example, list[int]]], index: int) -> list[dict[str, Any]]:
        """One answer to each prompt: rows for a JSONL file that can be trained on, with the row each came from."""
        with assembled(self):
            groups = self.policy.generate([prompt for _, prompt in batch], 1, self.sampling)
        return [
            {
                "prompt": example.messages,
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
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        sharded = self.device_mesh is not None  # the strategy has put weights and optimizer in their places already
        weights = None if sharded else self.state_dict()
        self.provenance.check(checkpoint, self.made_from(), weights, training=self.trainer.state.fn == "fit")
        self.progress, self.validated_at = dict(checkpoint["progress"]), int(checkpoint["validated_at"])
