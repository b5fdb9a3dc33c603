"""Experts of a mixture as grouped matrix products: one kernel for all experts of a layer.

transformers has such a way through a layer's experts, `grouped_mm`, and takes it by itself in most mixtures. `EXPERTS`
is the same way, kept from two things that would cost its speed or the run. Autocast does not know grouped products:
under it float32 weights would stay as they are, and the kernel for GPUs knows bfloat16 alone. And a product raises an
error where rows are no multiple of 16 bytes, or where a device has none: there the model's own loop over experts runs.
It is decided at every call, since weights are loaded before they move to the device that trains.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXPERTS = "leyden_experts"
"""Name of this way through the experts in transformers."""


class _Cast:
    """A layer's experts with their weights in another dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return found.to(self._dtype) if isinstance(found, Tensor) and found.is_floating_point() else found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@cache
def grouped_runs(device: torch.device, dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether this device has grouped products with weights of these shapes, forward and backward, found by trial."""
    product = getattr(torch.nn.functional, "grouped_mm", None)
    if product is None:  # transformers has a product of its own for older versions of torch
        return True
    ends = torch.tensor([1], dtype=torch.int32, device=device)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            for rows, columns in shapes:
                x = torch.ones(1, columns, dtype=dtype, device=device, requires_grad=True)
                weight = torch.ones(1, rows, columns, dtype=dtype, device=device, requires_grad=True)
                out = product(x, weight.transpose(1, 2), offs=ends)
                torch.autograd.grad(out, (x, weight), torch.ones_like(out).contiguous())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):
        return False
    return True


def experts_forward(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What transformers calls for the experts of a layer.

    Args:
        module: the experts.
        hidden: [T, H]
        chosen: [T, k] int64, the experts of each token
        weights: [T, k], their weights

    Returns:
        [T, H]
    """
    stacked = [parameter for parameter in module.parameters() if parameter.dim() == 3]
    kind, dtype = hidden.device.type, stacked[0].dtype
    if torch.is_autocast_enabled(kind) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(kind)
    if not grouped_runs(hidden.device, dtype, tuple(tuple(one.shape[1:]) for one in stacked)):
        own: Tensor = type(module).forward.__wrapped__(module, hidden, chosen, weights)
        return own
    view = module if dtype == stacked[0].dtype else _Cast(module, dtype)
    out: Tensor = grouped_mm_experts_forward(view, hidden, chosen, weights)
    return out


def use_grouped(base: PreTrainedModel) -> None:
    """Let the experts of a model run by `EXPERTS` where transformers has chosen grouped products. Quantised experts
    have ways of their own; four bits leave experts as they are."""
    method = getattr(getattr(base.config, "quantization_config", None), "quant_method", None)
    if method not in (None, "bitsandbytes"):
        return
    chosen = base.get_experts_implementation()
    if "grouped_mm" in chosen.values():
        base.set_experts_implementation({part: EXPERTS if way == "grouped_mm" else way for part, way in chosen.items()})


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
