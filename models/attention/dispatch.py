"""Attention over a packed forest: query q sees key k iff `k <= q < end[k]`.

One interface with several back-ends that are checked against each other. A policy sets its model's attention
implementation to `FOREST` and passes `forest=Forest(...)` to the model's forward; the keyword travels down to the
attention function of every layer. Sliding windows count in `position`, not in the packed row.

- `segments`: scaled dot-product attention per prompt and per response (keys: prompt and response); for CPUs.
- `varlen`: the variable-length flash kernel of NVIDIA GPUs, in half precision.
- `flex`: FlexAttention, for other GPUs and precisions and for soft caps.
- `dense`: one T x T mask; the reference, which knows everything and can be run anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from leyden.errors import UserError
from leyden.models.attention import flex, segments, varlen
from leyden.models.attention.cached import Reading, Step
from leyden.models.attention.forest import Ask, Forest

__all__ = ["BACKENDS", "FOREST", "Forest", "choose", "forest_attention"]

FOREST = "leyden_forest"
"""The name under which transformers knows this attention."""


def _dense(query: Tensor, key: Tensor, value: Tensor, forest: Forest, ask: Ask) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (key, value))
    mask = forest.mask(ask.window)
    if ask.softcap is None:
        out = F.scaled_dot_product_attention(query, key, value, mask, ask.dropout, scale=ask.scale)
    else:
        scale = query.shape[-1] ** -0.5 if ask.scale is None else ask.scale
        scores = ask.softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / ask.softcap))
        weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1).to(value.dtype)
        out = F.dropout(weights, ask.dropout) @ value
    return out.transpose(1, 2)


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Forest, Ask], Tensor]] = {
    "segments": segments.attend,
    "varlen": varlen.attend,
    "flex": flex.attend,
    "dense": _dense,
}


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, softcap: float | None) -> str | None:
    """Why a back-end cannot serve a model on this device, or None if it can."""
    if softcap and name in ("segments", "varlen"):
        return "it knows no soft-capped scores"
    if name == "varlen":
        return varlen.obstacle(device, dtype)
    return flex.obstacle(device) if name == "flex" else None


def choose(
    device: torch.device, softcap: float | None, dtype: torch.dtype = torch.float32, wanted: str = "auto"
) -> str:
    """The back-end for a model on this device.

    Args:
        softcap: the model's limit on its scores, if it has one.
        dtype: of the model's weights.
        wanted: what the user asked for; `auto` means the fastest that can run.

    Raises:
        UserError: the back-end asked for cannot run here.
    """
    if wanted == "auto":
        order = ("varlen", "flex", "segments", "dense") if device.type == "cuda" else ("segments", "dense")
        return next(name for name in order if _obstacle(name, device, dtype, softcap) is None)
    problem = _obstacle(wanted, device, dtype, softcap)
    if problem is not None:
        raise UserError(f"attention {wanted} cannot run here: {problem}; use --model.policy.attention auto")
    return wanted


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest: Forest | Step | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer.

    Args:
        query: [1, H, T, D]; key and value: [1, H or fewer, T, D]
        forest: the packed forest, handed to the model's forward; while sampling, one that keeps a cache.

    Returns:
        [1, T, H, D], and no attention weights.

    Raises:
        RuntimeError: the forest did not arrive, or the model uses what no back-end knows.
    """
    if forest is None:
        raise RuntimeError(f"{type(module).__name__}: the forest did not reach the attention function")
    if kwargs.get("s_aux") is not None:
        raise RuntimeError(f"{type(module).__name__}: attention sinks are not known here")
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # not every kernel is known to autocast, and rotary embeddings leave fp32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if isinstance(forest, Step):
        return forest.attend(module, query, key, value, Ask(scaling, 0.0, sliding_window, softcap)), None
    if isinstance(forest, Reading):
        forest.keep(module, key, value)
    backend = forest.backend
    if dropout and backend in ("flex", "varlen"):  # kernels without dropout
        backend = "segments"
    if softcap is not None and backend == "segments":
        backend = "dense"
    out = BACKENDS[backend](query, key, value, forest, Ask(scaling, dropout, sliding_window, softcap))
    return out.contiguous(), None


AttentionInterface.register(FOREST, forest_attention)
AttentionMaskInterface.register(FOREST, lambda *args, **kwargs: None)  # the forest is the mask
