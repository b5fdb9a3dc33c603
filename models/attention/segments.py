"""Attention segment by segment: no work across trees, and no mask of a whole row.

The forward pass is one call of scaled dot-product attention per segment, or one per block of queries where the mask of
a segment would be large, so that memory is linear in the row. The backward pass of torch's kernel for CPUs is slow on
segments as short as these, so on a CPU it is written out with plain matrix products. For one block of queries, with
scores z = s q kᵀ, s the scale, weights p = softmax(z) and output o = p v, the gradients are

    dv = pᵀ do        dz = p ⊙ (do vᵀ - Σ do ⊙ o)        dq = s dz k        dk = s dzᵀ q

where Σ sums over each query's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leyden.models.attention.backend import Backend
from leyden.models.attention.forest import AttentionArgs, Forest, Segment

BLOCK = 1 << 19
"""Scores of all heads that the backward pass works on at a time: as many as fit a processor's cache."""
MASK = 1 << 22
"""Entries of the largest mask of the forward pass: a segment with a larger one is attended to block by block."""
KEPT = 1 << 18
"""Entries of the largest mask that is kept for later layers: all that are kept together stay linear in the row."""


def segment_mask(forest: Forest, queries: int, before: int, window: int | None) -> Tensor | None:
    """[queries, before + queries] bool mask of one segment, or None where plain causal attention is the same."""
    if window is not None and before + queries <= window:
        window = None
    if before == 0 and window is None:
        return None

    def make() -> Tensor:
        mask = torch.ones(queries, before + queries, dtype=torch.bool, device=forest.end.device).tril(before)
        return mask if window is None else mask.triu(before - window + 1)

    if queries * (before + queries) > KEPT:
        return make()
    mask: Tensor = forest.once(("segment", queries, before, window), make)
    return mask


class Segments(Backend):
    """One call of scaled dot-product attention per prompt and per response."""

    name = "segments"
    dropout = True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, forest: Forest, args: AttentionArgs) -> Tensor:
        if query.device.type == "cpu" and not args.dropout:
            return _Attention.apply(query, key, value, forest, args)  # type: ignore[no-any-return, no-untyped-call]
        return _forward(query, key, value, forest, args)


def _forward(query: Tensor, key: Tensor, value: Tensor, forest: Forest, args: AttentionArgs) -> Tensor:
    """Forward pass, one call of torch's attention per segment: [1, T, H, D]."""
    gqa = query.shape[1] != key.shape[1]
    if gqa and query.device.type != "cpu":  # fast GPU kernels take a mask or fewer key heads, but not both
        repeat = query.shape[1] // key.shape[1]
        key, value, gqa = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1), False
    sizes = [s.queries for s in forest.segments]
    number = {s.start: i for i, s in enumerate(forest.segments)}
    # `split`, not slices: the backward pass of every slice writes a whole row of zeros
    queries, keys, values = (torch.split(x, sizes, dim=2) for x in (query, key, value))
    out = []
    for i, s in enumerate(forest.segments):
        k, v = keys[i], values[i]
        if s.before:
            k, v = (torch.cat([x[number[s.first]], x[i]], 2) for x in (keys, values))
        parts = [*_parts(s, args.window)]
        for q, (a, b, low) in zip(torch.split(queries[i], [b - a for a, b, _ in parts], 2), parts, strict=True):
            whole = (a, b, low) == (0, s.queries, 0)
            seen_k, seen_v = (x if whole else x[:, :, low : s.before + b] for x in (k, v))
            mask = segment_mask(forest, b - a, s.before + a - low, args.window)
            one = F.scaled_dot_product_attention(
                q, seen_k, seen_v, mask, args.dropout, is_causal=mask is None, scale=args.scale, enable_gqa=gqa
            )
            out.append(one.transpose(1, 2))
    return torch.cat(out, 1)


class _Attention(torch.autograd.Function):
    """`_forward` with the backward pass of this module's formulas. G query heads share each of K key heads."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, forest: Forest, args: AttentionArgs) -> Tensor:  # type: ignore[override]
        out = _forward(query, key, value, forest, args)
        ctx.save_for_backward(query, key, value, out)
        ctx.forest, ctx.args = forest, args
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out = ctx.saved_tensors
        dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
        scale = query.shape[-1] ** -0.5 if ctx.args.scale is None else ctx.args.scale
        k, v = key[0], value[0]  # [K, T, D]
        # the heads of a group side by side, so that one product covers them all: [K, T * G, D]
        q, do, o = (_grouped(x, len(k)) for x in (query[0].transpose(0, 1), grad[0], out[0]))
        q_wide, do_wide = q.to(wide), do.to(wide)
        inner = (do_wide * o).sum(-1, keepdim=True)
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros(x.shape, dtype=wide) for x in (k, v))
        group = q.shape[1] // k.shape[1]
        for s in ctx.forest.segments:
            ks, vs = (torch.cat([x[:, s.first : s.cut], x[:, s.start : s.stop]], 1) for x in (k, v))
            ks_wide, vs_wide = (x.to(wide).transpose(1, 2) for x in (ks, vs))
            for a, b, low in _blocks(s, query.shape[1], ctx.args.window):
                rows, seen = slice((s.start + a) * group, (s.start + b) * group), slice(low, s.before + b)
                z = torch.bmm(q_wide[:, rows], ks_wide[..., seen]).mul_(scale)
                hidden = _hidden(ctx.forest, b - a, s.before + a - low, ctx.args.window)
                z.view(len(k), b - a, group, -1)[..., -hidden.shape[1] :].masked_fill_(hidden[:, None], float("-inf"))
                p = z.softmax(-1)
                dz = torch.bmm(do_wide[:, rows], vs_wide[..., seen]).sub_(inner[:, rows]).mul_(p).to(dtype)
                dq[:, rows] = torch.bmm(dz, ks[:, seen])
                _add(dk, s, low, torch.bmm(dz.transpose(1, 2), q[:, rows]))
                _add(dv, s, low, torch.bmm(p.to(dtype).transpose(1, 2), do[:, rows]))
        dq = dq.mul_(scale).view(len(k), -1, group, q.shape[-1]).transpose(1, 2).reshape(query.shape)
        return dq, dk.mul_(scale).to(dtype)[None], dv.to(dtype)[None], None, None


def _parts(s: Segment, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Blocks of queries [a, b) of a segment, each with the first key that its queries see, such that no block's mask
    has more than `MASK` entries; the whole segment where it needs no mask, or no larger one."""
    if (s.before == 0 and (window is None or s.queries <= window)) or s.queries * (s.before + s.queries) <= MASK:
        yield 0, s.queries, 0
        return
    a = 0
    while a < s.queries:
        low = 0 if window is None else max(0, s.before + a - window + 1)
        b = min(s.queries, a + max(32, _fitting(MASK, s.before + a - low)))
        yield a, b, low
        a = b


def _grouped(x: Tensor, keys: int) -> Tensor:
    """Queries grouped by key head: [T, H, D] to [K, T * G, D]."""
    return x.reshape(len(x), keys, -1, x.shape[-1]).transpose(0, 1).reshape(keys, -1, x.shape[-1])


def _blocks(s: Segment, heads: int, window: int | None) -> Iterator[tuple[int, int, int]]:
    """Blocks of queries [a, b) of a segment, counted from its start, each with the first key that its queries see."""
    a = 0
    while a < s.queries:
        most = min(BLOCK // (heads * (s.before + a + 64)), _fitting(4 * BLOCK // heads, s.before + a))
        b = min(s.queries, a + max(32, most))
        yield a, b, 0 if window is None else max(0, s.before + a - window + 1)
        a = b


def _fitting(entries: int, before: int) -> int:
    """The most queries, after `before` keys, whose scores are no more than `entries`: n (before + n) of them."""
    return int((entries + before * before / 4) ** 0.5 - before / 2)


def _hidden(forest: Forest, queries: int, before: int, window: int | None) -> Tensor:
    """[queries, C] bool: keys hidden from each query of a block, among the last C keys; earlier ones are all seen."""
    if window is not None and before + queries <= window:
        window = None
    mask = segment_mask(forest, queries, before, window) if window is not None else None

    def make() -> Tensor:
        return torch.ones(queries, queries, dtype=torch.bool).triu(1) if mask is None else ~mask

    hidden: Tensor = forest.once(("hidden", queries, before if window is not None else 0, window), make)
    return hidden


def _add(total: Tensor, s: Segment, low: int, x: Tensor) -> None:
    """Add the gradients of a block's keys, which begin at the segment's key `low`, to those of all keys [K, T, D]."""
    prompt = max(0, s.before - low)
    if prompt:
        total[:, s.first + low : s.cut] += x[:, :prompt]
    own_start = s.start + max(0, low - s.before)
    total[:, own_start : own_start + x.shape[1] - prompt] += x[:, prompt:]
