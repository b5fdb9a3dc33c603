"""Chunked head: log-probabilities of chosen tokens without the [T, vocabulary] logits.

The head is applied to chunks of hidden states, and its logits are recomputed in the backward pass, so that memory is
[chunk, V] and not [T, V]; only the logits of a small batch are kept. The gradient is written out. For the logits z of
one token, π = softmax(z) and its entropy H(π),

    ∇ log π(y) = 1[y] - π        ∇ H(π) = -π (log π + H(π))        ∇ mean_v log π(v) = 1/V - π

where ∇ is the gradient in z. log Σ_v π(v)², the log-probability that two draws agree, has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 256 << 20
"""Bytes of one chunk of logits, in the head's dtype. Logits that all fit in one chunk are kept for the backward pass,
which saves one of four matrix products."""
BLOCK_BYTES = {"cpu": 4 << 20}
"""Bytes of one block of fp32 logits, for the work after the product: as many as fit a CPU's cache; elsewhere 64 MiB."""


@dataclass(frozen=True)
class Squash:
    """A model's map from x = `head(hidden)` to its logits: `cap * tanh(scale * x / cap)`, or `scale * x` without cap.

    Cohere multiplies by a scale, Granite divides by one, Gemma 2 has a cap.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float() * self.scale if self.scale != 1.0 else x.float()
        return self.cap * torch.tanh(x / self.cap) if self.cap else x

    def backward(self, z: Tensor, grad: Tensor) -> Tensor:
        """Gradient in x, from the gradient `grad` in z = self(x)."""
        if self.cap:
            grad = grad * (1 - (z / self.cap) ** 2)
        return grad * self.scale if self.scale != 1.0 else grad


@dataclass
class Head:
    """The language-model head: weight [V, H] and bias [V] in the dtype of the product, squash and temperature."""

    weight: Tensor
    bias: Tensor | None
    squash: Squash
    temperature: float

    def product(self, hidden: Tensor) -> Tensor:
        """Hidden states [S, H] to the head's output [S, V], in the head's dtype."""
        return nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)

    def logits(self, x: Tensor) -> Tensor:
        """The head's output `x` to logits, fp32; always a new tensor."""
        z = self.squash(x)
        z = z.clone() if z.data_ptr() == x.data_ptr() else z
        return z.div_(self.temperature) if self.temperature != 1.0 else z

    def backward(self, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient in `x`, from the gradient `grad` in its logits; may overwrite `grad`."""
        if self.temperature != 1.0:
            grad = grad.div_(self.temperature)
        return self.squash.backward(self.squash(x), grad) if self.squash.cap else self.squash.backward(x, grad)


def _row_slices(rows: int, row_bytes: int, size: int) -> list[slice]:
    """Slices of the rows, of at most `size` bytes each."""
    step = max(1, size // row_bytes)
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]


def blocks(x: Tensor) -> list[slice]:
    """Slices of the rows of `x` [S, V] that are worked on at a time."""
    return _row_slices(len(x), 4 * x.shape[1], BLOCK_BYTES.get(x.device.type, 64 << 20))


def _columns(head: Head, x: Tensor, target: Tensor, extra: bool, agree: bool, out: Tensor) -> None:
    """Log-probability, entropy, mean log-probability, log-sum-exp and log Σ_v π(v)² of the head's output [S, V], into
    `out` [5, S]."""
    for s in blocks(x):
        z = head.logits(x[s])
        lse = z.logsumexp(-1)
        out[0, s] = z.gather(-1, target[s, None])[:, 0] - lse
        out[3, s] = lse
        if extra:
            out[2, s] = z.mean(-1) - lse
            out[1, s] = lse - ((z - lse[:, None]).exp_() * z).sum(-1)
        if agree:
            out[4, s] = (2 * z).logsumexp(-1) - 2 * lse


def _gradients(head: Head, x: Tensor, target: Tensor, extra: bool, out: Tensor, grads: Tensor) -> None:
    """Overwrite the head's output `x` [S, V] with its gradient, from the gradients [3, S] of the columns `out`."""
    for s in blocks(x):
        g_logp, g_entropy, g_mean = (g[:, None] for g in grads[:, s])
        logp = head.logits(x[s]).sub_(out[3, s, None])
        if extra:
            p = logp.exp()
            gradient = logp.add_(out[1, s, None]).mul_(-g_entropy).sub_(g_logp + g_mean)
            gradient = gradient.mul_(p).add_(g_mean / x.shape[1])
        else:
            gradient = logp.exp_().mul_(-g_logp)
        gradient.scatter_add_(-1, target[s, None], g_logp)
        x[s] = head.backward(x[s], gradient)


class _LogProbs(torch.autograd.Function):
    """(hidden [S, H], weight [V, H], bias [V] or None, target [S]) -> logp, entropy, mean logp and log Σ_v π(v)², each
    [S] fp32."""

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
        agree: bool,
        dtype: torch.dtype,
        training: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), squash, temperature)
        out = torch.zeros(5, len(hidden), device=hidden.device)  # as `_columns` has them
        ctx.chunks = _row_slices(len(hidden), weight.shape[0] * dtype.itemsize, CHUNK_BYTES)
        ctx.kept = None
        for s in ctx.chunks:
            x = head.product(hidden[s])
            _columns(head, x, target[s], extra, agree, out[:, s])
            ctx.kept = x if training and len(ctx.chunks) == 1 else None
        ctx.save_for_backward(hidden, weight, bias, target, out)
        ctx.options = squash, temperature, extra, dtype
        ctx.mark_non_differentiable(agreement := out[4].clone())
        return out[0], out[1], out[2], agreement

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, target, out = ctx.saved_tensors
        squash, temperature, extra, dtype = ctx.options
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), squash, temperature)
        column_grads = torch.stack([g.float() for g in grads[:3]])
        cached, ctx.kept = ctx.kept, None  # it is overwritten, so a second backward pass has to recompute it
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        for s in ctx.chunks:
            h = hidden[s].to(dtype)
            x = head.product(h) if cached is None else cached
            _gradients(head, x, target[s], extra, out[:, s], column_grads[:, s])
            gradients.add(s, head, h, x)
        return *gradients.found(), *(None,) * 7


class HeadGradients:
    """Gradients in a head's input, weight and bias, chunk by chunk.

    Args:
        hidden: [S, H] input of the head.
        weight: [V, H].
        bias: [V] or None.
        needed: for each of the three whether its gradient is asked for.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Sequence[bool]) -> None:
        self.hidden, self.weight, self.bias = torch.empty_like(hidden), weight, bias
        self.of_weight, self.of_bias = needed[1], bias is not None and needed[2]
        self.sums: dict[str, Tensor] = {}

    def add(self, rows: slice, head: Head, hidden: Tensor, x: Tensor) -> None:
        """Take the gradient `x` [s, V] in the head's output on some rows, whose input was `hidden` [s, H]."""
        self.hidden[rows] = x @ head.weight
        if self.of_weight:
            self._sum("weight", x.T @ hidden)
        if self.of_bias:
            self._sum("bias", x.sum(0, dtype=torch.float32))

    def _sum(self, name: str, x: Tensor) -> None:
        # in fp32 from the second term on, since bf16 would lose small terms
        self.sums[name] = x if name not in self.sums else self.sums[name].float().add_(x)

    def found(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[S, H], [V, H] and [V], in the dtypes of what they are gradients of; None where none was asked for."""
        weight, bias = self.sums.get("weight"), self.sums.get("bias")
        return (
            self.hidden,
            None if weight is None else weight.to(self.weight.dtype),
            None if bias is None or self.bias is None else bias.to(self.bias.dtype),
        )


def _through_module(
    head: nn.Module, hidden: Tensor, target: Tensor, squash: Squash, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same four outputs for a head that is no plain linear layer, such as one with an adapter."""
    z = squash(head(hidden)) / temperature
    logp = z.log_softmax(-1)
    agreement = (2 * logp.detach()).logsumexp(-1)
    return logp.gather(-1, target[:, None])[:, 0], -(logp.exp() * logp).sum(-1), logp.mean(-1), agreement


def logprobs(
    head: nn.Module,
    hidden: Tensor,
    target: Tensor,
    squash: Squash | None = None,
    temperature: float = 1.0,
    extra: bool = False,
    agree: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of each target under `softmax(squash(head(hidden)) / temperature)`.

    Args:
        head: the LM head; a plain `nn.Linear` takes the fused path, with the written-out gradient.
        hidden: [S, H] hidden states that predict the targets.
        target: [S] int64 token ids.
        extra: also compute the entropy and the mean log-probability over the vocabulary (label smoothing).
        agree: also compute log Σ_v π(v)², without a gradient.

    Returns:
        Log-probability, entropy, mean log-probability and log Σ_v π(v)², [S] fp32 nats each (0 unless asked for).
        Logits are computed in the head's dtype, or autocast's, and everything after them in fp32.
    """
    squash = squash or Squash()
    if type(head) is nn.Linear:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.weight.dtype
        options = squash, temperature, extra, agree, dtype, torch.is_grad_enabled()
        return _LogProbs.apply(hidden, head.weight, head.bias, target, *options)  # type: ignore[no-any-return, no-untyped-call]
    plain = getattr(head, "original_module", head)  # below PEFT's trainable tokens
    size = max(1, CHUNK_BYTES // (4 * int(cast(nn.Linear, plain).out_features)))
    parts = [
        checkpoint(_through_module, head, hidden[s], target[s], squash, temperature, use_reentrant=False)
        for s in (slice(at, at + size) for at in range(0, len(hidden), size))
    ]
    logp, entropy, mean, agreement = (torch.cat(column) for column in zip(*parts, strict=True))
    return logp, entropy, mean, agreement
