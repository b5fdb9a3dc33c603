"""Attention over a packed forest: query q sees key k iff `k <= q < end[k]`.

One interface with several back-ends that are checked against each other. A policy sets its model's attention
implementation to `FOREST` and passes `forest=Forest(...)` to the model's forward; the keyword travels down to the
attention function of every layer. Sliding windows count in `position`, not in the packed row.

- `segments`: scaled dot-product attention per prompt and per response (keys: prompt and response). No work across
  trees, no T x T mask.
- `dense`: one T x T mask; the reference, and the one that knows soft caps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from leyden.batch import Batch

FOREST = "leyden_forest"
"""The name under which transformers knows this attention."""


class Forest:
    """What attention must know of one batch, shared by all layers: its structure and the masks made from it.

    Args:
        batch: T tokens on the device where attention runs.
        backend: `segments` or `dense`.
    """

    def __init__(self, batch: Batch, backend: str) -> None:
        self.end, self.position, self.attend = batch.end, batch.position, BACKENDS[backend]
        self.segments: list[tuple[int, int, int, int]] = []
        """(start, stop, first, cut): queries [start, stop) see the keys [first, cut), and themselves causally."""
        for span in batch.structure():
            if len(span.responses) == 1:  # a lone response continues its prompt: one causal piece
                self.segments.append((span.start, span.stop, span.start, span.start))
                continue
            self.segments.append((span.start, span.cut, span.start, span.start))
            self.segments += [(start, stop, span.start, span.cut) for _, start, stop in span.responses]
        used = self.segments[-1][1] if self.segments else 0
        if used < len(batch):  # padding; what it computes is never read
            self.segments.append((used, len(batch), used, used))
        self._masks: dict[Any, Tensor] = {}

    def dense_mask(self, window: int | None) -> Tensor:
        """[T, T] bool, True where the row's query may attend to the column's key."""
        if window not in self._masks:
            index = torch.arange(len(self.end), device=self.end.device)
            mask = (index <= index[:, None]) & (index[:, None] < self.end)
            if window is not None:
                mask &= self.position[:, None] - self.position < window
            self._masks[window] = mask
        return self._masks[window]

    def segment_mask(self, queries: int, before: int, window: int | None) -> Tensor | None:
        """[queries, before + queries] bool for one segment, or None where plain causal attention says the same."""
        if window is not None and before + queries <= window:
            window = None
        if before == 0 and window is None:
            return None
        key = (queries, before, window)
        if key not in self._masks:
            mask = torch.ones(queries, before + queries, dtype=torch.bool, device=self.end.device).tril(before)
            self._masks[key] = mask if window is None else mask.triu(before - window + 1)
        return self._masks[key]


def _segments(
    q: Tensor, k: Tensor, v: Tensor, forest: Forest, scale: float | None, dropout: float, window: int | None
) -> Tensor:
    sizes = [stop - start for start, stop, _, _ in forest.segments]
    number = {start: i for i, (start, _, _, _) in enumerate(forest.segments)}
    # `split` and not slices: the backward of a slice writes a whole row of zeros, once a segment
    queries, keys, values = (torch.split(x, sizes, dim=2) for x in (q, k, v))
    out = []
    for i, (start, stop, first, cut) in enumerate(forest.segments):
        key, value = keys[i], values[i]
        if cut > first:
            key = torch.cat([keys[number[first]], key], 2)
            value = torch.cat([values[number[first]], value], 2)
        mask = forest.segment_mask(stop - start, cut - first, window)
        out.append(
            F.scaled_dot_product_attention(
                queries[i], key, value, attn_mask=mask, is_causal=mask is None, scale=scale, dropout_p=dropout
            )
        )
    return torch.cat(out, 2)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, forest: Forest, scale: float | None, dropout: float, window: int | None
) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=forest.dense_mask(window), scale=scale, dropout_p=dropout)


def _capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout: float, softcap: float) -> Tensor:
    """Attention whose scores are squeezed into (-softcap, softcap) before the softmax (Gemma 2)."""
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    weights = scores.float().masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype)
    return F.dropout(weights, dropout) @ v


BACKENDS: dict[str, Callable[..., Tensor]] = {"segments": _segments, "dense": _dense}


def choose(device: torch.device, softcap: float | None) -> str:
    """The back-end that `attention: auto` means on this device for a model with or without soft-capped scores."""
    return "dense" if softcap else "segments"


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
    forest: Forest | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer.

    Args:
        query: [1, H, T, D]; key and value: [1, H or fewer, T, D]
        forest: the packed forest, handed to the model's forward.

    Returns:
        [1, T, H, D], and no attention weights.

    Raises:
        RuntimeError: the forest did not arrive, or the model uses what no back-end knows.
    """
    if forest is None:
        raise RuntimeError(f"{type(module).__name__}: the forest did not reach the attention function")
    if kwargs.get("s_aux") is not None:
        raise RuntimeError(f"{type(module).__name__}: attention sinks are not known here")
    repeat = query.shape[1] // key.shape[1]
    if repeat > 1:
        key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
    if softcap is not None:
        mask = forest.dense_mask(sliding_window)
        out = _capped(query, key, value, mask, scaling or query.shape[-1] ** -0.5, dropout, softcap)
    else:
        out = forest.attend(query, key, value, forest, scaling, dropout, sliding_window)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FOREST, forest_attention)
AttentionMaskInterface.register(FOREST, lambda *args, **kwargs: None)  # the forest is the mask
