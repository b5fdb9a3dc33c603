"""Engines that sample the responses of a rollout: the policy itself, or another program that is kept up to date."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from leyden.policy.policy import Policy, Response, Sampling


class Engine(ABC):
    """Samples responses with the policy's present weights. Write one for a server or another library.

    Every process has an engine of its own. What it says of log-probs is logged as `rollout/mismatch` against those that
    training computes; the latter are trained on.
    """

    def is_exact(self, policy: Policy) -> bool:
        """Whether it samples from just the distribution that training computes, at the same precision. Where it does
        not, policy gradients correct for it. The same on every process; asked once the policy is built."""
        return False

    @abstractmethod
    def sync(self, policy: Policy) -> None:
        """Take over the policy's weights as they are now; sharded ones are whole inside the call, and
        `policy.save(folder)` writes them. Called once before every rollout, every validation and every evaluation, on
        every process, with or without prompts to answer: it may wait for the others."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Response]]:
        """`n` responses to each prompt of token ids, with their log-probs; see `Policy.generate`.

        A rollout comes in several calls of some 256 responses each. `keys` are the places of prompts in the run's
        sequence: noise that depends on them and on `sampling.seed` alone makes a resumed run, and any number of
        processes, sample the same.
        """


class Native(Engine):
    """The policy's own `generate`."""

    def __init__(self) -> None:
        self._policy: Policy | None = None

    def is_exact(self, policy: Policy) -> bool:
        return True

    def sync(self, policy: Policy) -> None:
        self._policy = policy

    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Response]]:
        assert self._policy is not None
        return self._policy.generate(prompts, n, sampling, keys, on_progress)
