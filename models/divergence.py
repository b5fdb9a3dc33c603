"""The chunked head against a teacher: divergences over the whole vocabulary without [S, V] logits of either.

Both heads are applied to chunks of hidden states, and both logits are recomputed in the backward pass, so that memory
is [chunk, V]; only the logits of a small batch are kept. The gradient is written out: see `leyden.divergences`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leyden.batch.forest import Batch
from leyden.divergences import Divergence
from leyden.models.logprobs import Head, HeadGradients, Squash, blocks
from leyden.policy.predictions import Predictions, chunks


class HeadPredictions(Predictions):
    """Predictions by a language-model head on hidden states.

    The head's weights are taken as they are now, so that they stay those of a forward pass that ran with other ones in
    their place. Of a head whose adapter is switched off the layer under it is taken.

    Args:
        batch: of T tokens.
        hidden: [T, H] hidden state of each token.
        head: the head; a plain `nn.Linear` has the fused path, others run as modules.
        squash: maps the head's output to logits.
        temperature: what logits are divided by.
    """

    def __init__(self, batch: Batch, hidden: Tensor, head: nn.Module, squash: Squash, temperature: float) -> None:
        super().__init__(batch)
        self.hidden = hidden[batch.parent[self.at].clamp_min(0)]
        """[S, H] the states that predict."""
        while getattr(head, "_disable_adapters", False):
            head = _inner(head)
        self.module, self.squash, self.temperature = head, squash, temperature
        self.plain = type(head) is nn.Linear
        self.weight, self.bias = (layer := _innermost(head)).weight, layer.bias
        kind = hidden.device.type
        self.autocast = torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if self.autocast else self.weight.dtype

    @property
    def vocabulary(self) -> int:
        return int(self.weight.shape[0])

    def head(self) -> Head:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return Head(self.weight.to(self.dtype), bias, self.squash, self.temperature)

    def logits(self, rows: slice) -> Tensor:
        if self.plain:
            head = self.head()
            return head.logits(head.product(self.hidden[rows]))
        with torch.autocast(self.hidden.device.type, self.dtype, self.autocast):  # also in a backward pass
            return self.squash(self.module(self.hidden[rows])) / self.temperature

    def compare(self, teacher: Predictions, divergence: Divergence, size: int) -> Tensor:
        if not self.plain:
            return super().compare(teacher, divergence, size)
        options = self, teacher, divergence, size, torch.is_grad_enabled()
        return _Compared.apply(self.hidden, self.weight, self.bias, *options)  # type: ignore[no-any-return, no-untyped-call]


def _inner(head: Any) -> Any:
    """The layer that an adapter has been put around."""
    return getattr(head, "base_layer", None) or head.original_module


def _innermost(head: Any) -> Any:
    while hasattr(head, "base_layer") or hasattr(head, "original_module"):
        head = _inner(head)
    return head


class _Compared(torch.autograd.Function):
    """(hidden [S, H], weight [V, H], bias [V] or None) and a teacher -> divergences [S] fp32."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mine: HeadPredictions,
        teacher: Predictions,
        divergence: Divergence,
        size: int,
        training: bool,
    ) -> Tensor:
        head, out = mine.head(), torch.zeros(len(hidden), device=hidden.device)
        ctx.chunks, ctx.kept = chunks(len(hidden), max(mine.vocabulary, teacher.vocabulary)), None
        for s in ctx.chunks:
            x, z = head.product(hidden[s]), teacher.logits(s)
            for b in blocks(x):
                log_pi, log_p = _log_probs(head, x[b], z[b], size)
                out[s][b] = divergence(log_pi, log_p)
            ctx.kept = (x, z) if training and len(ctx.chunks) == 1 else None
        ctx.save_for_backward(hidden, weight, bias, out)
        ctx.options = mine.dtype, mine.squash, mine.temperature, teacher, divergence, size
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, out = ctx.saved_tensors
        dtype, squash, temperature, teacher, divergence, size = ctx.options
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), squash, temperature)
        kept, ctx.kept = ctx.kept, None  # it is overwritten, so a second backward pass has to recompute it
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad)
        for s in ctx.chunks:
            h = hidden[s].to(dtype)
            x, z = (head.product(h), teacher.logits(s)) if kept is None else kept
            for b in blocks(x):
                log_pi, log_p = _log_probs(head, x[b], z[b], size)
                slope = divergence.gradient(log_pi, log_p, out[s][b]) * grad[s][b, None]
                x[b, :size] = head.backward(x[b, :size], slope)
            x[:, size:] = 0.0
            gradients.add(s, head, h, x)
        return *gradients.found(), *(None,) * 5


def _log_probs(head: Head, x: Tensor, z: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """log π and log p over the first `size` tokens, from the head's output and from the teacher's logits: [s, size]."""
    return head.logits(x[:, :size]).log_softmax(-1), z[:, :size].log_softmax(-1)
