"""Log-probabilities of chosen tokens without the [T, vocabulary] logits.

The head is applied to chunks of hidden states and its logits are recomputed in the backward pass, so that memory is
[chunk, V] and not [T, V]. The gradient is written out: for z = logits of one token, p = softmax(z),

    d logp(y) / dz = 1[y] - p        d entropy / dz = -p (log p + entropy)        d mean(log p) / dz = 1/V - p
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 << 20
"""Size of one chunk of fp32 logits. A few such buffers exist at a time, whatever T and V are."""


@dataclass(frozen=True)
class Squash:
    """How a model turns `head(hidden)` into its logits: `cap * tanh(scale * x / cap)`, cap only where there is one.

    Cohere multiplies, Granite divides (scale), Gemma 2 caps.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float() * self.scale if self.scale != 1.0 else x.float()
        return self.cap * torch.tanh(x / self.cap) if self.cap else x

    def backward(self, z: Tensor, grad: Tensor) -> Tensor:
        """Gradient with respect to x of a gradient `grad` at z = self(x)."""
        if self.cap:
            grad = grad * (1 - (z / self.cap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad


class _LogProbs(torch.autograd.Function):
    """(hidden [S, H], weight [V, H], bias [V] or None, target [S]) -> logp, entropy, mean log-prob, each [S] fp32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        squash: Squash,
        temperature: float,
        extra: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out = torch.zeros(4, len(hidden), device=hidden.device)  # logp, entropy, mean log-prob, log-sum-exp
        ctx.chunk = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        w = weight.to(dtype)
        for at in range(0, len(hidden), ctx.chunk):
            s = slice(at, at + ctx.chunk)
            z = squash(nn.functional.linear(hidden[s].to(dtype), w, None if bias is None else bias.to(dtype)))
            z = z / temperature if temperature != 1.0 else z
            lse = z.logsumexp(-1)
            out[0, s] = z.gather(-1, target[s, None])[:, 0] - lse
            out[3, s] = lse
            if extra:
                out[2, s] = z.mean(-1) - lse
                out[1, s] = lse - ((z - lse[:, None]).exp_() * z).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, target, out)
        ctx.squash, ctx.temperature, ctx.extra, ctx.dtype = squash, temperature, extra, dtype
        return out[0], out[1], out[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, target, out = ctx.saved_tensors
        g_logp, g_entropy, g_mean = (g.float() for g in grads)
        dtype, squash, temperature = ctx.dtype, ctx.squash, ctx.temperature
        w = weight.to(dtype)
        d_hidden = torch.empty_like(hidden)
        # sums over chunks are kept in fp32: bf16 would lose the small ones
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and ctx.needs_input_grad[2] else None
        for at in range(0, len(hidden), ctx.chunk):
            s = slice(at, at + ctx.chunk)
            h = hidden[s].to(dtype)
            z = squash(nn.functional.linear(h, w, None if bias is None else bias.to(dtype)))
            raw = z.clone() if squash.cap else z  # the rest works in place: these are the largest tensors there are
            logp = (z.div_(temperature) if temperature != 1.0 else z).sub_(out[3, s, None])
            if ctx.extra:
                p = logp.exp()
                slope = logp.add_(out[1, s, None]).mul_(-g_entropy[s, None]).sub_((g_logp[s] + g_mean[s])[:, None])
                slope = slope.mul_(p).add_((g_mean[s] / weight.shape[0])[:, None])
            else:
                slope = logp.exp_().mul_(-g_logp[s, None])
            slope.scatter_add_(-1, target[s, None], g_logp[s, None])
            if temperature != 1.0:
                slope.div_(temperature)
            slope = squash.backward(raw, slope).to(dtype)
            d_hidden[s] = slope @ w
            if d_weight is not None:
                d_weight += slope.T @ h
            if d_bias is not None:
                d_bias += slope.sum(0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            *(None,) * 5,
        )


def _through_module(
    head: nn.Module, hidden: Tensor, target: Tensor, squash: Squash, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a head that is not a plain linear layer (one with an adapter, say)."""
    z = squash(head(hidden)) / temperature
    logp = z.log_softmax(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1), logp.mean(-1)


def logprobs(
    head: nn.Module,
    hidden: Tensor,
    target: Tensor,
    squash: Squash | None = None,
    temperature: float = 1.0,
    extra: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob of each target under `softmax(squash(head(hidden)) / temperature)`.

    Args:
        head: the LM head; a plain `nn.Linear` takes the fused path.
        hidden: [S, H] states that predict.
        target: [S] int64 token ids.
        extra: also compute the entropy and the mean log-prob over the vocabulary (label smoothing).

    Returns:
        Log-prob, entropy and mean log-prob, [S] fp32 nats each (the last two are 0 unless `extra`). Logits are
        computed in the head's dtype, or autocast's, and everything after them in fp32.
    """
    squash = squash or Squash()
    if type(head) is nn.Linear:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        return _LogProbs.apply(hidden, head.weight, head.bias, target, squash, temperature, extra, dtype)  # type: ignore[no-any-return, no-untyped-call]
    size = max(1, CHUNK_BYTES // (4 * int(cast(nn.Linear, head).out_features)))
    parts = [
        checkpoint(_through_module, head, hidden[s], target[s], squash, temperature, use_reentrant=False)
        for s in (slice(at, at + size) for at in range(0, len(hidden), size))
    ]
    logp, entropy, mean = (torch.cat(column) for column in zip(*parts, strict=True))
    return logp, entropy, mean
