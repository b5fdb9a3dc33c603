"""One optimizer step: exact means over its micro-batches, its metrics, and a second try where memory runs out."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from leyden.algorithm.microbatches import MicroBatches, out_of_memory
from leyden.batch.forest import Batch
from leyden.batch.trajectory import Trajectory
from leyden.batch.tree import Tree
from leyden.distributed import all_gather, full_tensor, reduce_sums
from leyden.errors import UserError
from leyden.lightning_loop import is_accumulating

B = TypeVar("B", bound=Batch)
R = TypeVar("R")


class OptimizerStep(LightningModule):
    """Forward, backward, metrics, and the second try where memory runs out, of one optimizer step.

    Means are exact over the whole optimizer step: a micro-batch divides by the totals of its step, and here the loss
    is multiplied by accumulation x world size once, which undoes what the Trainer and the strategy divide by. So one
    batch of 8, eight of 1 and two processes of 4 take the same step, also where a loss mixes units. For the same
    reason a micro-batch that runs out of memory can be run again in parts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.progress = {"tokens": 0.0, "samples": 0.0}
        """Tokens and examples trained on so far, by all ranks."""
        self.micro_batches = MicroBatches()
        self._notes: dict[str, Tensor] = {}
        self._window: list[tuple[Batch, dict[str, Tensor]]] = []
        """Parts of this step that were run, with the metrics that each noted."""
        self._micro: list[Batch] = []
        """The whole micro-batches of this step so far."""
        self._rest: list[Batch] = []
        """Parts of the last micro-batch that are still to be run."""
        self._graph: Tensor | None = None
        """Loss of the first part, with its graph, until it is run backward."""
        self._failed: Batch | None = None
        """The part that ran out of memory."""
        self._drawn: list[Tensor] = []
        """States of the random generators when the step began."""
        self._norm: Tensor | None = None
        """Norm of this step's gradient, between its measurement and clipping."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The loss of one micro-batch as means: `batch.token_mean(…) + c * batch.prompt_mean(…)`; a scalar."""

    def note(self, name: str, share: Tensor) -> None:
        """Log a scalar from inside `loss`, as train/NAME or val/NAME (as it is where the name has a slash). It is this
        batch's share of a mean, like the loss: `batch.response_mean(x)`. Every batch must note the same names, since
        ranks add them up."""
        self._notes[name] = self._notes.get(name, torch.zeros((), device=share.device)) + share.detach()

    def step_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What a step logs, from what was noted in it, summed over its micro-batches and processes: by default these
        sums themselves, since each is a mean."""
        return dict(sums)

    def on_step_metrics(self, metrics: Mapping[str, float]) -> None:
        """Called before every step with what it measured (the names of train/… without it), on every rank the same."""

    def takes_step(self, metrics: Mapping[str, float]) -> bool:
        """Whether to take the step that these measures speak of; by default unless its gradient is exactly 0.

        Nothing was learnt then: no pairs, no trained tokens, no advantages. Momentum and weight decay would move the
        weights all the same. A step that is not taken leaves them and the optimizer's state as they are; it counts, in
        `global_step` and for the learning rate, so that what was planned ends when it was planned to.
        """
        return metrics["grad_norm"] != 0

    @property
    def data(self) -> Any:
        """The Trainer's DataModule, or None where plain loaders are used."""
        return getattr(self.trainer, "datamodule", None)

    # -- forward and backward ----------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, index: int) -> Tensor:
        if not self._micro:
            self._drawn = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if batch.tokens.is_cuda else [])]
        self._micro.append(batch)
        first, *self._rest = self.micro_batches.of(batch, self._common_count(batch))
        shares: int = self.trainer.accumulate_grad_batches * self.trainer.world_size
        if self.trainer.world_size > 1:
            if self.micro_batches.token_limit is not None and isinstance(
                ddp := self.trainer.strategy.model, DistributedDataParallel
            ):
                ddp.require_backward_grad_sync = False  # gradients of parts are added up first, and then over ranks
            return self._noted(first) * shares
        try:
            self._graph = self._noted(first)
            value = self._graph.detach()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            self._failed, value = first, torch.zeros((), device=self.device)
        # Lightning holds on to what it is given, and a graph would keep memory that a failed backward pass must free
        return (value * shares).requires_grad_()

    def _noted(self, part: Batch) -> Tensor:
        """The loss of a part, which is noted down for the step."""
        self._notes = {}
        loss = self.loss(part)
        self._window.append((part, {"loss": loss.detach()} | self._notes))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        graph, self._graph = self._graph, None
        if self.trainer.world_size > 1:
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
            for part in self._rest:
                self._backward(self._forward(part))
            self._average_gradients()
            return
        if graph is not None:
            self._failed = self._run_part(self._micro[-1], graph) or self._run(self._rest)
            del graph
        while self._failed is not None:
            self._retry(self._failed)

    def _forward(self, part: Batch) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            return self._noted(part)

    def _backward(self, loss: Tensor) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        loss = loss * self.trainer.world_size
        loss = loss if scaler is None else scaler.scale(loss)
        loss.backward()  # type: ignore[no-untyped-call]

    def _run_part(self, part: Batch, graph: Tensor | None = None) -> Batch | None:
        """Run a part forward, unless that is done, and backward; the part itself if it does not fit."""
        try:
            self._backward(self._forward(part) if graph is None else graph)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return part
        return None

    def _run(self, parts: list[Batch]) -> Batch | None:
        """Run parts one by one; the first that does not fit, or None."""
        return next((part for part in parts if self._run_part(part) is not None), None)

    def _retry(self, failed: Batch) -> None:
        """Run this step from its beginning, cut smaller, with the random numbers that it had: gradients
        of an unfinished backward pass cannot be undone."""
        self.micro_batches.shrink(failed)
        self._window = []
        for parameter in self.parameters():
            parameter.grad = None
        for state, restore in zip(self._drawn, (torch.set_rng_state, torch.cuda.set_rng_state), strict=False):
            restore(state)
        self._failed = self._run([part for batch in self._micro for part in self.micro_batches.of(batch)])

    # -- several processes -------------------------------------------------------------------------------------------

    def run_in_step(self, function: Callable[[B], R], batches: Sequence[B]) -> list[R]:
        """The results of a function that runs models without gradients, for each of these batches or its parts, cut
        smaller where memory ran out. To be called on every process: where weights are sharded, each runs as many,
        since they put the weights together for each other.

        Args:
            batches: on their device or not, any number of them.
        """
        if self.device_mesh is None:
            return [result for batch in batches for result in self.micro_batches.run(function, batch)]
        parts = [part for batch in batches for part in self.micro_batches.of(batch)]
        missing = max(all_gather(len(parts))) - len(parts)
        filler = parts[-1].blank() if parts else cast(B, Trajectory.of([Tree([0, 0], [])]))
        return [function(part) for part in [*parts, *[filler] * missing]][: len(parts)]

    def agree_on_memory(self) -> None:
        """Cut micro-batches on every process as small as the one that has the least memory: to be called on all of them
        after a pass in which each may have run out of it by itself, such as a rollout or a validation."""
        limit, most = self.micro_batches.token_limit, torch.iinfo(torch.int64).max
        if self.trainer.world_size > 1:
            mine = torch.tensor(most if limit is None else limit, device=self.device)
            least = int(self.trainer.strategy.reduce(mine, reduce_op="min"))
            self.micro_batches.token_limit = None if least == most else least

    def _common_count(self, batch: Batch) -> int | None:
        """How many parts every process cuts its micro-batch into; None where each may decide for itself."""
        if self.micro_batches.token_limit is None or self.device_mesh is None:
            return None
        wanted = torch.tensor(self.micro_batches.needed(batch), device=self.device)
        return int(self.trainer.strategy.reduce(wanted, reduce_op="max"))

    def _average_gradients(self) -> None:
        """Average gradients over processes, at the end of a step whose parts ran with DDP's own averaging off."""
        ddp = self.trainer.strategy.model
        if self.micro_batches.token_limit is None or not isinstance(ddp, DistributedDataParallel):
            return
        if not is_accumulating(self.trainer):
            for parameter in (p for p in self.parameters() if p.requires_grad):
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= self.trainer.world_size

    # -- the step ----------------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        window, self._window, self._micro = self._window, [], []
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in _learning(optimizer) if p.grad is not None])
        mine = {
            "wrong": sum(~torch.isfinite(noted["loss"]) for _, noted in window),
            "tokens": sum(batch.size for batch, _ in window if len(batch.row)),
            "samples": sum(len(batch.row) for batch, _ in window),
        } | {name: sum(noted[name] for _, noted in window) for name in window[0][1]}
        # the one place of a step where the host waits for the device; the norm is the same on every rank
        mine["grad_norm"] = full_tensor(self._norm) / self.trainer.world_size
        metrics = reduce_sums(mine, self.trainer, self.device)
        norm = metrics.pop("grad_norm")
        if metrics.pop("wrong"):  # every rank learns of it in the same place, so that none waits for another
            bad = [batch for batch, noted in window if not torch.isfinite(noted["loss"])]
            self._refuse_step("loss", metrics["loss"], [row for batch in bad for row in self._rows_to_blame(batch)])
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None and not math.isfinite(norm):  # a scaler leaves such a step out by itself
            self._refuse_step("gradient", norm, [row for batch, _ in window for row in batch.row.tolist()])
        for name in self.progress:
            self.progress[name] += metrics.pop(name)
        metrics = self.step_metrics(metrics) | {
            "grad_norm": norm,
            "lr": optimizer.param_groups[0]["lr"],
            **self.progress,
        }
        # tensors on the CPU, since Lightning reads what it has logged again after the optimizer has been started
        named = {name if "/" in name else f"train/{name}": torch.tensor(float(x)) for name, x in metrics.items()}
        self.log_dict(named, on_step=True, on_epoch=False)
        self.on_step_metrics(metrics)
        if not self.takes_step(metrics):
            for parameter in self.parameters():
                parameter.grad = None  # what optimizers pass over

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        norm, self._norm = self._norm, None
        if norm is None or not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        torch.nn.utils.clip_grads_with_norm_(_learning(optimizer), gradient_clip_val, norm)  # it is known already

    def _refuse_step(self, what: str, value: float, rows: Sequence[int]) -> NoReturn:
        """Stop before the weights are touched by a loss or gradient that is not finite, and name the rows.

        Args:
            what: loss or gradient.
            value: of the whole step.
            rows: of this rank's micro-batches that are to blame.

        Raises:
            UserError: always.
        """
        names = [self.data.source(row) if self.data is not None else f"row {row}" for row in rows[:8]]
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        places = ", ".join(names) + more if rows else "rows of another process"
        raise UserError(
            f"step {self.trainer.global_step}: the {what} is {value}, from {places}; look at those rows, and try a "
            "lower --model.optimizer.lr or --trainer.gradient_clip_val 1"
        )

    @torch.no_grad()
    def _rows_to_blame(self, batch: Batch) -> list[int]:
        """The rows whose loss alone is not finite, or all rows if none is to blame by itself."""
        rows: list[int] = batch.row.tolist()
        if self.device_mesh is not None:  # a forward that only one rank runs would wait for the others for ever
            return rows
        parts = [batch.select([i]) for i, span in enumerate(batch.structure()) if span.responses]
        with self.trainer.precision_plugin.forward_context():
            return [int(part.row[0]) for part in parts if not torch.isfinite(self.loss(part))] or rows


def _learning(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters that have a gradient."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
