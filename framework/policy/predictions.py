"""Distributions over the vocabulary from which tokens are predicted, compared without ever having all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leyden.batch.forest import Batch
from leyden.divergences import Divergence

CHUNK_BYTES = 256 << 20
"""Most bytes of fp32 logits that are there at a time."""


class Predictions(ABC):
    """The distributions that predict the S trained tokens of a batch, in the order of `batch.predicted()`.

    A batch without such a token has one distribution that counts for nothing, of its first token: so that every
    parameter has a gradient, for which other processes wait.

    Args:
        batch: of T tokens.
    """

    def __init__(self, batch: Batch) -> None:
        at = batch.predicted()
        self.tokens, self.real = len(batch), float(len(at) > 0)
        self.at = at if len(at) else torch.zeros(1, dtype=torch.long, device=batch.tokens.device)
        """[S] where the tokens stand that are predicted."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """V, how many tokens there is a logit for."""

    @abstractmethod
    def logits(self, rows: slice) -> Tensor:
        """[s, V] logits of some of the S distributions, fp32, divided by the temperature."""

    def divergence(self, teacher: Predictions, divergence: Divergence) -> Tensor:
        """How far these are from a teacher's, with gradients for these alone: [T] nats, 0 on tokens not predicted.

        Both predict the same tokens, after whatever prompts. Heads of one tokenizer may be padded to different sizes:
        then both distributions are those over the tokens that both have.

        Args:
            teacher: predictions of as many tokens.
            divergence: which.
        """
        if len(self.at) != len(teacher.at):
            raise ValueError(f"{len(self.at)} tokens are predicted here and {len(teacher.at)} by the teacher")
        value = self.compare(teacher, divergence, min(self.vocabulary, teacher.vocabulary))
        return value.new_zeros(self.tokens).index_put((self.at,), value * self.real)

    def compare(self, teacher: Predictions, divergence: Divergence, size: int) -> Tensor:
        """[S] divergences over the first `size` tokens of the vocabulary. Logits are recomputed in the backward pass.

        Overridden where the gradient is written out.
        """
        parts = [
            checkpoint(self._compare, rows, teacher, divergence, size, use_reentrant=False)
            for rows in chunks(len(self.at), max(self.vocabulary, teacher.vocabulary))
        ]
        return torch.cat(parts)

    def _compare(self, rows: slice, teacher: Predictions, divergence: Divergence, size: int) -> Tensor:
        with torch.no_grad():
            log_p = teacher.logits(rows)[:, :size].log_softmax(-1)
        return divergence(self.logits(rows)[:, :size].log_softmax(-1), log_p)


class KnownPredictions(Predictions):
    """Predictions of a policy small enough to have all logits at once.

    Args:
        batch: of T tokens.
        logits: [T, V] from which each token is predicted, divided by the temperature.
    """

    def __init__(self, batch: Batch, logits: Tensor) -> None:
        super().__init__(batch)
        self._logits = logits[self.at]

    @property
    def vocabulary(self) -> int:
        return self._logits.shape[1]

    def logits(self, rows: slice) -> Tensor:
        return self._logits[rows].float()


def chunks(rows: int, vocabulary: int) -> list[slice]:
    """Slices of the rows, of at most `CHUNK_BYTES` of fp32 logits each."""
    step = max(1, CHUNK_BYTES // (4 * vocabulary))
    return [slice(at, min(at + step, rows)) for at in range(0, rows, step)]
