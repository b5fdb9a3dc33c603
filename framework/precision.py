"""QLoRA as a precision: frozen weights in four bits, and everything that is trained in float (Dettmers et al. 2023).

Only what loads a model has to know of it: the Trainer builds models inside `module_init_context`, where `asked` says
how frozen layers are to be stored. No algorithm is aware of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from leyden.errors import UserError

log = logging.getLogger("leyden")


@dataclass(frozen=True)
class Quantization:
    """How frozen linear layers are stored, computed with, and where they are loaded to."""

    kind: Literal["nf4", "fp4"]
    """The sixteen values of four bits"""
    double: bool
    """Whether the scales of blocks are quantised too"""
    compute: torch.dtype
    """What is multiplied in"""
    keep: tuple[str, ...]
    """Parts of names of layers that stay in float"""
    device: torch.device
    """Where the weights are loaded to"""


_asked: ContextVar[Quantization | None] = ContextVar("quantization", default=None)


def asked() -> Quantization | None:
    """How the model that is being built is to be quantised, or None where it is not."""
    return _asked.get()


def fast_bfloat16() -> bool:
    """Whether this machine computes in bfloat16. Older GPUs emulate it; processors without instructions for it (AVX-512
    or AMX) take up to a hundred times as long as in float32."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # only x86 builds of torch have it
    return known is None or bool(known())


def advise(dtype: torch.dtype, flag: str, instead: str) -> None:
    """Warn of a dtype that this machine is slow in.

    Args:
        dtype: of the weights or of the arithmetic.
        flag: what asked for it, for the message.
        instead: what to type.
    """
    if dtype == torch.bfloat16 and not torch.cuda.is_available() and not fast_bfloat16():
        log.warning("%s: this processor has no bfloat16 arithmetic, so it will be very slow; use %s", flag, instead)


class QLoRAPrecision(MixedPrecision):
    """Stores the linear layers of frozen models in four bits as they are loaded, one after the other, so that full
    weights never exist. Embeddings, norms and heads keep the policy's dtype; adapters and new heads are fp32, and are
    used in `compute_dtype`.

    Args:
        quant_type: nf4, whose 16 values are quantiles of a normal distribution, or fp4.
        double_quant: quantise the scales of blocks too: 0.52 instead of 0.56 bytes a parameter.
        compute_dtype: of the arithmetic, into which a layer is unpacked when it is used. `auto` is bfloat16, or where
            that is slow float16 on GPUs, with a scaled loss, and float32 on processors.
        keep: parts of names of linear layers to leave in float, beside the output head.
    """

    def __init__(
        self,
        quant_type: Literal["nf4", "fp4"] = "nf4",
        double_quant: bool = True,
        compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
        keep: list[str] | None = None,
    ) -> None:
        if compute_dtype == "auto":
            old: Literal["float16", "float32"] = "float16" if torch.cuda.is_available() else "float32"
            compute_dtype = "bfloat16" if fast_bfloat16() else old
        self.quant_type, self.double_quant, self.keep = quant_type, double_quant, tuple(keep or ())
        self.compute_dtype: torch.dtype = getattr(torch, compute_dtype)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        super().__init__("16-mixed" if compute_dtype == "float16" else "bf16-mixed", device)
        if compute_dtype == "float32":
            self.precision = "32-true"  # type: ignore[assignment]

    @contextmanager
    def module_init_context(self) -> Iterator[None]:
        device = _device()
        self.device = device.type
        spec = Quantization(self.quant_type, self.double_quant, self.compute_dtype, self.keep, device)
        token = _asked.set(spec)
        try:
            yield
        finally:
            _asked.reset(token)

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Nothing to convert by now: only that something is quantised.

        Raises:
            UserError: nothing is, so the model was built before the Trainer could ask for four bits.
        """
        if not any(getattr(part, "quant_state", None) is not None for part in module.modules()):
            raise UserError(
                "QLoRAPrecision: nothing in the model is stored in four bits, since it was built before the Trainer "
                "could ask for that (an adapter that is there already cannot be quantised around); hand the policy to "
                "the algorithm unbuilt"
            )
        return module

    def forward_context(self) -> Any:
        return nullcontext() if self.compute_dtype == torch.float32 else self.autocast_context_manager()


def _device() -> torch.device:
    """Where this process's model goes: Lightning makes it the default while models are built, but not if it will be
    sharded, and then it is the process's GPU."""
    device = torch.get_default_device()
    sharded = device.type == "cpu" and torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if sharded else device
