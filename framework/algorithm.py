"""What every algorithm shares: a subclass writes `loss`, as exact means over its batch, and little else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from leyden.batch import Batch
from leyden.errors import UserError
from leyden.example import Example
from leyden.guard import stop
from leyden.optim import WarmupCosine, parameter_groups, reapply
from leyden.policy import Policy, Sampling

GREEDY = Sampling(temperature=0.0)


class Algorithm(LightningModule):
    """A policy, a loss, and everything around them.

    Means are exact over the whole optimizer step: a micro-batch divides by the totals of its step, and here the loss
    is multiplied by accumulation x world size once, which undoes what the Trainer and the strategy divide by. So one
    batch of 8, eight of 1 and two processes of 4 take the same step, also where a loss mixes units.

    Args:
        policy: the model.
        optimizer: any optimizer by class path.
        lr_scheduler: any scheduler by class path, stepped once an optimizer step; None keeps the rate.
        sampling: how `predict` samples; greedy unless a temperature is given.
    """

    wants: ClassVar[tuple[str, ...]] = ("logp",)
    """What the policy is asked for: logp, score. Heads that nothing asks for are not made, or not trained."""
    dropout: ClassVar[bool] = True
    """Whether the model keeps its dropout. Where two forwards are compared, noise would look like a difference."""
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
        self.sampling = sampling
        self.strict_loading = False
        self.progress = {"tokens": 0.0, "samples": 0.0}
        """Tokens and examples trained on so far, by all ranks."""
        self.validated_at = -1
        """The optimizer step of the last validation."""
        self._window: list[tuple[Batch, dict[str, Tensor]]] = []
        self._sums: dict[str, Tensor] = {}
        self._notes: dict[str, Tensor] = {}

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of one micro-batch as means: `batch.token_mean(…) + c * batch.prompt_mean(…)`; a scalar."""

    def experience(self, loader: Any) -> Any:
        """A sized iterable of batches from the DataModule's loader: the loader itself, unless sampled on-policy."""
        return loader

    def measures(self, batch: Batch) -> dict[str, Tensor]:
        """What validation logs: each value is this batch's share of a mean, so that summing over batches is exact."""
        self._notes = {}
        loss = self.loss(batch)
        return {"loss": loss} | self._notes

    def note(self, name: str, share: Tensor) -> None:
        """Log a scalar from inside `loss`, as train/NAME or val/NAME (as it is where the name has a slash). It is this
        batch's share of a mean, like the loss: `batch.response_mean(x)`. Every batch must note the same names, since
        ranks add them up."""
        self._notes[name] = self._notes.get(name, torch.zeros((), device=share.device)) + share.detach()

    def summary(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Validation metrics from the sums of `measures`."""
        return dict(sums)

    # -- building ----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        template = getattr(self.data, "chat_template", None)
        if template is not None:  # so that generation and exports speak as the data did
            self.policy.tokenizer.chat_template = template

    @property
    def data(self) -> Any:
        """The Trainer's DataModule, or None where plain loaders are used."""
        return getattr(self.trainer, "datamodule", None)

    def configure_model(self) -> None:
        self.policy.build(self.wants, self.dropout)
        longest, room = getattr(self.data, "longest_row", 0), self.policy.positions
        if room is not None and longest > room:
            raise UserError(
                f"the longest row has {longest} tokens but {self.policy.path} has positions for {room}; "
                f"set --data.max_length {room}"
            )

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
        """Optimizer steps in one epoch, or None where plain loaders are used."""
        return None if self.data is None else int(self.data.steps_per_epoch)

    def on_train_start(self) -> None:
        if self.trainer.ckpt_path is not None:
            for optimizer in self.trainer.optimizers:
                schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
                reapply(optimizer, self._settings, cast(Any, schedulers))

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, index: int) -> Tensor:
        self._notes = {}
        loss = self.loss(batch)
        self._window.append((batch, {"loss": loss.detach()} | self._notes))
        shares: int = self.trainer.accumulate_grad_batches * self.trainer.world_size
        return loss * shares

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        window, self._window = self._window, []
        bad = [batch for batch, noted in window if not torch.isfinite(noted["loss"])]
        mine = {
            "wrong": len(bad),
            "tokens": sum(batch.size for batch, _ in window if len(batch.row)),
            "samples": sum(len(batch.row) for batch, _ in window),
        } | {name: sum(noted[name] for _, noted in window) for name in window[0][1]}
        now = self._reduced(mine)
        if now.pop("wrong"):  # every rank learns of it in the same place, so that none waits for another
            stop(self, "loss", now["loss"], bad)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None and not torch.isfinite(norm):  # a scaler leaves such a step out by itself
            stop(self, "gradient", float(norm), [batch for batch, _ in window])
        for name in self.progress:
            self.progress[name] += now.pop(name)
        now |= {"grad_norm": float(norm), "lr": optimizer.param_groups[0]["lr"], **self.progress}
        named = {name if "/" in name else f"train/{name}": value for name, value in now.items()}
        self.log_dict(named, on_step=True, on_epoch=False)
        self.watch(now)

    def watch(self, now: Mapping[str, float]) -> None:
        """Look at what a step measured (the names of train/… without it), to warn of what goes wrong."""

    # -- validation, test and prediction -----------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._sums = {}

    def validation_step(self, batch: Batch, index: int) -> None:
        for name, value in self.measures(batch).items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=self.device)) + value.detach()

    def on_validation_epoch_end(self) -> None:
        found = {f"{self._stage()}/{name}": value for name, value in self.summary(self._reduced(self._sums)).items()}
        whole = not self.trainer.sanity_checking or self.trainer.num_sanity_val_steps == float("inf")
        for logger in self.trainer.loggers if whole else ():
            # loggers count the steps before this one; a whole sanity check is the measure before training, at step 0
            logger.log_metrics(found, step=self.trainer.global_step - 1)
        if not self.trainer.sanity_checking:
            self.validated_at = self.trainer.global_step
            self.log_dict(found, logger=False)

    def _stage(self) -> str:
        return "test" if self.trainer.testing else "val"

    def _reduced(self, mine: Mapping[str, Any]) -> dict[str, float]:
        """Sums over all ranks. Every rank has the same names: ranks without rows run batches of weight 0."""
        names = sorted(mine)
        if not names:
            return {}
        kind = torch.float64 if self.device.type != "mps" else torch.float32  # counts of tokens need the digits
        shares = torch.stack([torch.as_tensor(mine[name], dtype=kind, device=self.device) for name in names])
        total = self.trainer.strategy.reduce(shares, reduce_op="sum")
        return dict(zip(names, total.tolist(), strict=True))

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Sequence[tuple[Example, list[int]]], index: int) -> list[dict[str, Any]]:
        """One answer to each prompt: rows for a JSONL file that can be trained on, with the row each came from."""
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

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: v for name, v in super().state_dict(*args, **kwargs).items() if name in trained}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = dict(self.progress)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.progress = dict(checkpoint.get("progress", self.progress))
        saved, here = set(checkpoint["state_dict"]), set(self.state_dict())
        if saved != here:
            odd = sorted(saved ^ here)[0]
            raise UserError(
                f"the checkpoint does not fit this model: {len(saved - here)} weights are only in the checkpoint and "
                f"{len(here - saved)} only in the model ({odd}); use the configuration it was trained with"
            )
