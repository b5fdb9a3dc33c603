"""Attention over parts of the keys, and the join of two parts.

For scores z over all keys, softmax attention is a mean of values with weights exp(z). Over parts of the keys it is the
mean of the parts' outputs with weights exp(lse), where lse = log Σ exp(z) over the part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leyden.models.attention.forest import AttentionArgs

Part = tuple[Tensor, Tensor]
"""Output of attention over a part, [B, K, M, D], and its log-sum-exp, [B, K, M] fp32."""

FUSED = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
"""The kernel of torch's attention on a CPU, which also returns the log-sum-exp."""


def partial(query: Tensor, kept: Sequence[Tensor], mask: Tensor | None, args: AttentionArgs) -> Part:
    """Attention of queries [B, K, M, D] over a part of the keys.

    Args:
        kept: keys and values, [B, K, L, D] each.
        mask: fp32, added to the scores; broadcasts to [B, K, M, L].
        args: scale and soft cap.
    """
    key, value = kept
    same_width = key.shape[-1] == value.shape[-1]
    if query.device.type == "cpu" and FUSED is not None and args.softcap is None and same_width:
        return FUSED(query, key, value, 0.0, False, attn_mask=mask, scale=args.scale)  # type: ignore[no-any-return]
    return _plain(query, key, value, mask, args)


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, args: AttentionArgs) -> Part:
    scale = query.shape[-1] ** -0.5 if args.scale is None else args.scale
    scores = (query @ key.mT).float() * scale
    if args.softcap is not None:
        scores = args.softcap * torch.tanh(scores / args.softcap)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp().to(value.dtype) @ value, lse


def join(a: Part, b: Part) -> Tensor:
    """Output of attention over the keys of both parts."""
    weight = torch.sigmoid(b[1] - a[1])[..., None].to(a[0].dtype)
    return torch.lerp(a[0], b[0], weight)
