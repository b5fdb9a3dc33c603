"""Attention over a packed forest: query q sees key k iff `k <= q < end[k]`.

One interface, several back-ends that are checked against each other. A policy sets its model's attention
implementation to `FOREST` or `UNMASKED` and passes `forest=Forest(...)` to the model's forward; transformers hands the
keyword to the attention function of every layer. Sliding windows count in `position`, not in the packed row.

- `segments`: scaled dot-product attention per prompt and per response (keys: prompt and response): the fastest on CPUs,
  it runs anywhere, with dropout too.
- `varlen`: the variable-length flash kernel of NVIDIA GPUs, in half precision.
- `flex`: FlexAttention, for other GPUs and precisions and for soft caps.
- `dense`: one T x T mask; the reference, which supports every option and runs anywhere.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from leyden.class_paths import import_class
from leyden.errors import UserError, nearest
from leyden.models.attention.backend import Backend, Needs
from leyden.models.attention.cached import CachedStep, Prefill
from leyden.models.attention.flex import Flex
from leyden.models.attention.forest import AttentionArgs, Forest, MaskWindow
from leyden.models.attention.segments import Segments
from leyden.models.attention.varlen import Varlen

FOREST, UNMASKED = "leyden_forest", "leyden_forest_unmasked"
"""Names of this attention implementation in transformers; the second is for models whose masks have no windows."""
WINDOWS = ("sliding_window", "attention_chunk_size")
"""What transformers reads the windows of masks from."""


class Dense(Backend):
    """The reference: attention with one T x T mask."""

    name = "dense"
    dropout = softcap = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, forest: Forest, args: AttentionArgs) -> Tensor:
        repeat = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeat, 1) if repeat > 1 else x for x in (key, value))
        mask = forest.mask(args.window)
        if args.softcap is None:
            out = F.scaled_dot_product_attention(query, key, value, mask, args.dropout, scale=args.scale)
        else:
            scale = query.shape[-1] ** -0.5 if args.scale is None else args.scale
            scores = args.softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / args.softcap))
            weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1).to(value.dtype)
            out = F.dropout(weights, args.dropout) @ value
        return out.transpose(1, 2)


BACKENDS: dict[str, Backend] = {one.name: one for one in (Varlen(), Flex(), Segments(), Dense())}
"""Back-ends by name, the fastest first: `auto` takes the first that can serve the model."""


@cache
def backend_named(name: str) -> Backend:
    """The back-end of this name or class path.

    Raises:
        UserError: no back-end has this name.
    """
    if name in BACKENDS:
        return BACKENDS[name]
    if "." not in name:
        names = ", ".join(["auto", *BACKENDS, "rows"])
        raise UserError(f"--model.policy.attention {name}: unknown{nearest(name, BACKENDS) or f'; use {names}'}")
    return import_class(name, "--model.policy.attention", Backend)()  # type: ignore[no-any-return]


def choose(
    device: torch.device,
    softcap: float | None,
    dtype: torch.dtype = torch.float32,
    wanted: str = "auto",
    width: int | None = None,
) -> str:
    """Name of the back-end for a model on this device.

    Args:
        softcap: the soft cap of the model's attention scores, if it has one.
        dtype: dtype of queries and keys: autocast's, or that of the weights.
        wanted: name from the user's configuration; `auto` takes the fastest that can run.
        width: head width of the model, if it has one for all layers.

    Raises:
        UserError: the back-end of this name cannot run here.
    """
    needs = Needs(device, dtype, softcap=bool(softcap), width=width)
    if wanted == "auto":
        return next(name for name, backend in BACKENDS.items() if backend.lacks(needs) is None)
    if (problem := backend_named(wanted).lacks(needs)) is not None:
        raise UserError(f"attention {wanted} cannot run here: {problem}; use --model.policy.attention auto")
    return wanted


@torch.compiler.disable  # type: ignore[untyped-decorator]  # compiled layers stop here, since the structure of the batch changes with every batch
def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | MaskWindow | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    forest: Forest | CachedStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        query: [1, H, T, D]; key and value: [1, H or fewer, T, D]
        attention_mask: the window of the layer's mask, from `forest_mask`; it holds before `sliding_window`.
        forest: the packed forest that was passed to the model's forward; while sampling, one with a KV cache.

    Returns:
        [1, T, H, D], and no attention weights.

    Raises:
        RuntimeError: the forest did not arrive, or the model uses an option that no back-end supports: sinks, a mask
            or bias of its own, keys that are not the queries' own, attention to later tokens.
    """
    if forest is None:
        raise RuntimeError(f"{type(module).__name__}: the forest did not reach the attention function")
    if kwargs.get("s_aux") is not None:
        raise RuntimeError(f"{type(module).__name__}: attention sinks are not known here")
    if isinstance(attention_mask, Tensor) or kwargs.get("is_causal") is False or key.shape[2] != query.shape[2]:
        raise RuntimeError(f"{type(module).__name__}: a mask that is no causal one is not known here")
    if attention_mask is not None:
        sliding_window = attention_mask.size
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # autocast does not cover every kernel, and rotary embeddings return fp32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if isinstance(forest, CachedStep):
        return forest.attend(query, key, value, AttentionArgs(scaling, 0.0, sliding_window, softcap)), None
    if isinstance(forest, Prefill):
        forest.keep(key, value)
    args = AttentionArgs(scaling, dropout, sliding_window, softcap)
    asked = (args.softcap is not None, args.window is not None, dropout > 0)
    needs = Needs(query.device, query.dtype, *asked, query.shape[-1], value.shape[-1])
    out = server(forest.backend, needs).attend(query, key, value, forest, args)
    return out.contiguous(), None


@cache
def server(name: str, needs: Needs) -> Backend:
    """The back-end of this name, or the fastest other that can serve a layer which this one cannot.

    On a CPU any back-end is taken at its word, so that those for GPUs can be tested there as well.
    """
    backend = backend_named(name)
    problem = backend.lacks_option(needs) if needs.device.type == "cpu" else backend.lacks(needs)
    return backend if problem is None else next(one for one in BACKENDS.values() if one.lacks(needs) is None)


def implementation(config: Any) -> str:
    """Name of this attention implementation for a model. Where a mask can only be causal, none is asked for: before
    it builds one, transformers waits for the device, in every forward pass."""
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "model_type"))]
    try:
        windows = any(getattr(part, name, None) for part in parts for name in WINDOWS)
    except RuntimeError:  # windows that differ by layer have no value of their own
        windows = True
    return FOREST if windows else UNMASKED


def forest_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> MaskWindow | None:
    """What transformers calls where a model builds a mask. The forest is the mask, but for a window."""
    return None if local_size is None else MaskWindow(local_size)


AttentionInterface.register(FOREST, forest_attention)
AttentionInterface.register(UNMASKED, forest_attention)
AttentionMaskInterface.register(FOREST, forest_mask)  # type: ignore[arg-type]
