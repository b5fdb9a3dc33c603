"""Engines that sample the responses of a rollout: the policy itself, or another program that is kept up to date."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from leyden.policy.policy import Policy, Response, Sampling


class Engine(ABC):
    """Samples responses with the policy's present weights. Write one for a server or another library."""

    @abstractmethod
    def sync(self, policy: Policy) -> None:
        """Take over the policy's weights as they are now. Called once before every rollout, on every process."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Response]]:
        """`n` responses to each prompt of token ids, with their log-probs; see `Policy.generate`."""


class Native(Engine):
    """The policy's own `generate`."""

    def __init__(self) -> None:
        self._policy: tuple[Policy, ...] = ()  # a tuple, so that nothing takes it for a part of the engine

    def sync(self, policy: Policy) -> None:
        self._policy = (policy,)

    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> list[list[Response]]:
        return self._policy[0].generate(prompts, n, sampling, keys, on_progress)
