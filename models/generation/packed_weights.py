"""Weights laid out as a processor's matrix kernels want them, for the time of sampling.

In bfloat16 every product otherwise starts by laying its weights out anew, which for the few rows of a decoding step
takes as long as the product: with 4 to 16 rows sampling is about 1.5 times as fast, with 64 a tenth faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

MOST = 2 << 30
"""Bytes of weights that are kept a second time. A larger model does without."""
WORTH = 16
"""Fewer steps than this do not pay for laying weights out."""


def _usable() -> bool:
    """Whether this torch and this processor have the kernels, which are those that torch's compiler uses."""
    ops = torch.ops.mkldnn
    needed = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and all(hasattr(ops, name) for name in needed) and bool(ops._is_mkldnn_bf16_supported())


@contextmanager
def packed(model: nn.Module, steps: int) -> Iterator[None]:
    """Run the plain linear layers of a model with packed weights, where that helps: bfloat16 on a processor.

    Args:
        steps: how many tokens will be sampled one after the other.
    """
    layers = []
    if steps >= WORTH and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"):
        layers = [m for m in model.modules() if type(m) is nn.Linear and _fits(m)]
    if not layers or sum(2 * m.weight.numel() for m in layers) > MOST or not _usable():
        yield
        return
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight, None)
            layer.forward = partial(_product, weight, layer.bias)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _fits(layer: nn.Linear) -> bool:
    plain = layer.weight.device.type == "cpu" and layer.weight.dtype == torch.bfloat16
    return plain and layer.weight.is_contiguous() and "forward" not in layer.__dict__


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
