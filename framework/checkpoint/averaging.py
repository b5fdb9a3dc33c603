"""Averages of weights: Lightning's `WeightAveraging` and `EMAWeightAveraging`, of what is trained, and resumed exactly.

Lightning's own average a copy of the whole module: frozen weights drift by rounding, four-bit ones become nonsense, and
their checkpoints name weights that an algorithm does not train.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from leyden.errors import UserError

log = logging.getLogger("leyden")
_CURRENT, _STATE, _AVERAGED = "current_model_state", "averaging_state", "averaged_model_state"


class _Trained(nn.Module):
    """A view of what a module trains: the very parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.names, self.weights = list(trained), nn.ParameterList(trained.values())


class _Average(AveragedModel):
    def update_parameters(self, model: nn.Module) -> None:
        super().update_parameters(_Trained(model))


class ExactAveraging(WeightAveraging):
    """What `average_exactly` makes of Lightning's callbacks.

    The average begins with the first update. From then on validation, evaluation, the export and `state_dict` of a
    checkpoint have the average; training goes on from the weights that it takes steps on, which stand beside it in the
    checkpoint.
    """

    _restored: dict[str, Any] | None = None
    _inside = False
    """Whether the model holds the average at present."""
    _for_validation = False
    """Whether it was put there for the validation that is running."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing: the model is not on its device yet, and has no weights of a checkpoint."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if pl_module.device_mesh is not None:
            raise UserError(
                f"{type(self).__name__}: weights that are sharded over devices cannot be averaged; leave the callback "
                "out, or set --trainer.strategy ddp"
            )
        device: Any = self._device or pl_module.device
        self._inside = False
        self._average_model = _Average(_Trained(pl_module), device, use_buffers=False, **self._kwargs)
        if self._restored is not None:
            self._average_model.n_averaged.fill_(self._restored[_STATE]["n_averaged"])
            with torch.no_grad():
                for name, weight in self._weights().items():
                    weight.copy_(self._restored[_AVERAGED][name])
            self._restored = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._for_validation = not self._inside
        if self._for_validation:
            self._exchange(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._for_validation and self._inside:
            self._exchange(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._has_average:
            log.warning(
                "%s averaged nothing in %d steps: the export has the weights of the last one",
                type(self).__name__,
                trainer.global_step,
            )
        elif not self._inside:
            self._exchange(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is None:
            return
        held, other = checkpoint["state_dict"], {n: w.detach() for n, w in self._weights().items()}
        current, averaged = (other, held) if self._inside else (held, other)
        checkpoint["state_dict"] = averaged if self._has_average else current
        checkpoint[_CURRENT], checkpoint[_STATE] = current, {"n_averaged": int(self._average_model.n_averaged)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit" and _AVERAGED in checkpoint:
            self._restored = {name: checkpoint[name] for name in (_AVERAGED, _STATE)}

    @property
    def _has_average(self) -> bool:
        return self._average_model is not None and int(self._average_model.n_averaged) > 0

    def _weights(self) -> dict[str, Tensor]:
        """The weights that stand beside the model at present, by name in it."""
        assert self._average_model is not None
        view: Any = self._average_model.module
        return dict(zip(view.names, view.weights, strict=True))

    def _exchange(self, pl_module: LightningModule) -> None:
        """Put the average in the model's place, or the weights that are trained back, if there is an average."""
        if self._has_average:
            self._swap_models(_Trained(pl_module))  # type: ignore[arg-type]
            self._inside = not self._inside


def average_exactly(callbacks: Sequence[Callback]) -> None:
    """Make every callback that averages weights an `ExactAveraging` of its kind."""
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and not isinstance(callback, ExactAveraging):
            kind = type(callback)
            callback.__class__ = type(kind.__name__, (ExactAveraging, kind), {"__qualname__": kind.__qualname__})


def resume_current(checkpoint: dict[str, Any]) -> None:
    """Let training go on from the weights that it took steps on, with or without the average beside them."""
    if _CURRENT in checkpoint:
        checkpoint[_AVERAGED] = checkpoint["state_dict"]
        checkpoint["state_dict"] = checkpoint[_CURRENT]


def holds_average(trainer: Trainer) -> bool:
    """Whether the model has the averaged weights in place of its own at present."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, ExactAveraging) and callback._inside for callback in callbacks)


@contextmanager
def averaged(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Run with the averaged weights, where a callback averages them and they are not in place already."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, ExactAveraging)]  # type: ignore[attr-defined]
    ours = [callback for callback in found if not callback._inside]
    for callback in ours:
        callback._exchange(module)
    try:
        yield
    finally:
        for callback in ours:
            if callback._inside:
                callback._exchange(module)
