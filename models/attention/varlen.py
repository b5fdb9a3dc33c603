"""Attention with the variable-length flash kernel, for CUDA in half precision.

Every segment of the row is one sequence of the kernel. Its queries stay in place; its keys, those of its prompt and its
own, are gathered. Where queries and keys differ in number, the kernel aligns their ends, so that a response's first
query sees its whole prompt. The index of a gathered key is its position in the tree, so that the kernel's sliding
window can be used as it is.
"""

from __future__ import annotations

import inspect
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leyden.models.attention.backend import Backend
from leyden.models.attention.forest import AttentionArgs, Forest

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

ABILITIES = frozenset(inspect.signature(varlen_attn).parameters if varlen_attn else ())
"""Arguments of the kernel in this version of torch. The first versions lack `enable_gqa`, and even `window_size`."""


class Layout(NamedTuple):
    """S sequences for the kernel: offsets of their queries and keys, and the tokens that the keys belong to."""

    queries: Tensor
    """[S + 1] int32, cumulative number of queries"""
    keys: Tensor
    """[S + 1] int32, cumulative number of keys"""
    most_queries: int
    most_keys: int
    source: Tensor | None
    """[K] int64, the token that each key belongs to; None where the keys are the row itself"""


def layout(forest: Forest) -> Layout:
    """The segments of a forest as the kernel's sequences."""
    queries = [s.queries for s in forest.segments]
    keys = [s.before + s.queries for s in forest.segments]
    source = None
    if keys != queries:
        pieces = [torch.arange(a, b) for s in forest.segments for a, b in ((s.first, s.cut), (s.start, s.stop))]
        source = torch.cat(pieces).to(forest.end.device, non_blocking=True)
    sums = (torch.tensor([0, *accumulate(sizes)], dtype=torch.int32) for sizes in (queries, keys))
    starts = [x.to(forest.end.device, non_blocking=True) for x in sums]
    return Layout(starts[0], starts[1], max(queries), max(keys), source)


class _Gather(torch.autograd.Function):
    """x[source] for x [T, H, D] and source [K]; gradients of a token's copies are summed in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(source)
        ctx.shape = x.shape
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (source,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
        return total.index_add_(0, source, grad.float()).to(grad.dtype), None


class Varlen(Backend):
    """One call of the kernel for the whole row."""

    name = "varlen"
    devices = ("cuda",)
    dtypes = (torch.bfloat16, torch.float16)
    widths = range(8, 257, 8)
    one_width = True
    window = "window_size" in ABILITIES

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if varlen_attn is None:
            return "this version of torch lacks the kernel"
        if device.type != "cuda" or torch.version.hip is not None:
            return "the kernel is one of NVIDIA GPUs"
        if torch.cuda.get_device_capability(device) < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
            return "this GPU has no flash attention"
        return None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, forest: Forest, args: AttentionArgs) -> Tensor:
        plan: Layout = forest.once("varlen", lambda: layout(forest))
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options: dict[str, Any] = {}
        if "window_size" in ABILITIES:
            options["window_size"] = (-1 if args.window is None else args.window - 1, 0)
        else:
            options["is_causal"] = True
        if "scale" in ABILITIES:
            options["scale"] = args.scale
        elif args.scale is not None:
            q = q * (args.scale * q.shape[-1] ** 0.5)
        if plan.source is not None:
            k, v = (_Gather.apply(x, plan.source) for x in (k, v))  # type: ignore[no-untyped-call]
        if "enable_gqa" in ABILITIES:
            options["enable_gqa"] = q.shape[1] != k.shape[1]
        elif (repeat := q.shape[1] // k.shape[1]) > 1:
            k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
        sizes = plan.queries, plan.keys, plan.most_queries, plan.most_keys
        out: Tensor = varlen_attn(q, k, v, *sizes, **options)
        return out[None]
