"""Attention segment by segment: no work across trees, and no mask of a whole row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from leyden.models.forest import Ask, Forest


def segment_mask(forest: Forest, queries: int, before: int, window: int | None) -> Tensor | None:
    """[queries, before + queries] bool for one segment, or None where plain causal attention says the same."""
    if window is not None and before + queries <= window:
        window = None
    if before == 0 and window is None:
        return None

    def make() -> Tensor:
        mask = torch.ones(queries, before + queries, dtype=torch.bool, device=forest.end.device).tril(before)
        return mask if window is None else mask.triu(before - window + 1)

    mask: Tensor = forest.once(("segment", queries, before, window), make)
    return mask


def attend(query: Tensor, key: Tensor, value: Tensor, forest: Forest, ask: Ask) -> Tensor:
    """One call of scaled dot-product attention a segment: [1, T, H, D]."""
    gqa = query.shape[1] != key.shape[1]
    if gqa and query.device.type != "cpu":  # the fast kernels there take a mask, or fewer key heads, but not both
        repeat = query.shape[1] // key.shape[1]
        key, value, gqa = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1), False
    sizes = [s.queries for s in forest.segments]
    number = {s.start: i for i, s in enumerate(forest.segments)}
    # `split` and not slices: the backward of a slice writes a whole row of zeros, once a segment
    queries, keys, values = (torch.split(x, sizes, dim=2) for x in (query, key, value))
    out = []
    for i, s in enumerate(forest.segments):
        k, v = keys[i], values[i]
        if s.before:
            k, v = (torch.cat([x[number[s.first]], x[i]], 2) for x in (keys, values))
        mask = segment_mask(forest, s.queries, s.before, ask.window)
        out.append(
            F.scaled_dot_product_attention(
                queries[i], k, v, mask, ask.dropout, is_causal=mask is None, scale=ask.scale, enable_gqa=gqa
            ).transpose(1, 2)
        )
    return torch.cat(out, 1)
