"""Divergences of a policy from a teacher, chosen by class path: what distillation makes small.

A divergence is called with log π of the policy and log p of the teacher, over the whole vocabulary: [S, V] fp32 nats
each for S places in which a token is predicted. It returns how far π is from p in each place, [S] nats, 0 where they
are equal. `gradient` is the same in the policy's logits z, with π = softmax(z). For D = Σ_v f(π_v) it is

    ∂D / ∂z_v = π_v (f'(π_v) - Σ_u π_u f'(π_u))

A new one is a class in a file of yours, `--model.divergence my_file.MyDivergence`; without a `gradient` of its own,
autograd's is taken.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leyden.shapes import check_shapes


class Divergence(ABC):
    """How far a policy is from its teacher; see the module."""

    sampled: ClassVar[bool] = False
    """Whether it is estimated from the policy's own samples, and called with log-probs of these alone: [T] and [T]
    nats to [T] nats. Its gradient is then that of a policy gradient."""

    @abstractmethod
    def __call__(self, log_pi: Tensor, log_p: Tensor) -> Tensor:
        """[S] nats from log π and log p, [S, V] nats each."""

    def gradient(self, log_pi: Tensor, log_p: Tensor, value: Tensor) -> Tensor:
        """[S, V] gradient of each place's own divergence in the policy's logits there.

        Args:
            log_pi: [S, V] log π.
            log_p: [S, V] log p.
            value: [S] the divergence, as it was worked out.
        """
        with torch.enable_grad():
            z = log_pi.detach().requires_grad_()  # log π are logits of π, too
            total = self(z.log_softmax(-1), log_p).sum()
        return torch.autograd.grad(total, z)[0]


def apart(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a - log b, and 0 of what neither can say: some heads give tokens outside of their vocabulary -inf.

    Args:
        log_a: log-probs in nats.
        log_b: the same, of the same shape.
    """
    return torch.where(log_a == log_b, 0.0, log_a - log_b)


@dataclass
class ForwardKL(Divergence):
    """KL(p || π) = Σ p (log p - log π), as in sequence-level distillation (Hinton et al. 2015; Agarwal et al. 2024).

    The policy covers all that the teacher may say. Its gradient is π - p.
    """

    def __call__(self, log_pi: Tensor, log_p: Tensor) -> Tensor:
        check_shapes(log_pi=(log_pi, "S V"), log_p=(log_p, "S V"))
        return (log_p.exp() * apart(log_p, log_pi)).sum(-1)

    def gradient(self, log_pi: Tensor, log_p: Tensor, value: Tensor) -> Tensor:
        return log_pi.exp().sub_(log_p.exp())


@dataclass
class ReverseKL(Divergence):
    """KL(π || p) = Σ π (log π - log p) (Gu et al. 2024, MiniLLM, of one token; Agarwal et al. 2024).

    The policy says nothing that the teacher would not. Its gradient is π (log π - log p - KL).
    """

    def __call__(self, log_pi: Tensor, log_p: Tensor) -> Tensor:
        check_shapes(log_pi=(log_pi, "S V"), log_p=(log_p, "S V"))
        return (log_pi.exp() * apart(log_pi, log_p)).sum(-1)

    def gradient(self, log_pi: Tensor, log_p: Tensor, value: Tensor) -> Tensor:
        return apart(log_pi, log_p).sub_(value[:, None]).mul_(log_pi.exp())


@dataclass
class JensenShannon(Divergence):
    """β KL(p || m) + (1 - β) KL(π || m) with m = β p + (1 - β) π (Agarwal et al. 2024, eq. 1).

    Its gradient is (1 - β) π (log π - log m - KL(π || m)). As β goes to 0 the divergence over β becomes KL(p || π), and
    as β goes to 1 the divergence over 1 - β becomes KL(π || p), but at 0 and at 1 it is itself 0: other programs take
    these numbers for the two KL divergences, here they are ForwardKL and ReverseKL.

    Args:
        beta: β, the teacher's share of the mixture, between 0 and 1.

    Raises:
        ValueError: `beta` is not between 0 and 1.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"beta {self.beta}: between 0 and 1; at 0 take ForwardKL, at 1 ReverseKL")

    def __call__(self, log_pi: Tensor, log_p: Tensor) -> Tensor:
        check_shapes(log_pi=(log_pi, "S V"), log_p=(log_p, "S V"))
        log_m = self._mixture(log_pi, log_p)
        value = self.beta * log_p.exp() * apart(log_p, log_m) + (1 - self.beta) * log_pi.exp() * apart(log_pi, log_m)
        return value.sum(-1)

    def gradient(self, log_pi: Tensor, log_p: Tensor, value: Tensor) -> Tensor:
        far, pi = apart(log_pi, self._mixture(log_pi, log_p)), log_pi.exp()
        kl = (pi * far).sum(-1, keepdim=True)
        return far.sub_(kl).mul_(pi).mul_(1 - self.beta)

    def _mixture(self, log_pi: Tensor, log_p: Tensor) -> Tensor:
        """log m."""
        return torch.logaddexp(log_p + math.log(self.beta), log_pi + math.log1p(-self.beta))


@dataclass
class SampledReverseKL(Divergence):
    """log π(y) - log p(y) of sampled tokens y, whose mean over samples of π is KL(π || p): all that a teacher must give
    is the log-prob of what was sampled.

    The gradient is that of a policy gradient in which every token is rewarded by log p(y) - log π(y) and by nothing
    that comes later; it varies far more than that of the sum over the vocabulary, and has the same mean.
    """

    sampled = True

    def __call__(self, log_pi: Tensor, log_p: Tensor) -> Tensor:
        check_shapes(log_pi=(log_pi, "T"), log_p=(log_p, "T"))
        return log_pi - log_p
