"""Engines that sample responses for a policy: the policy itself, or another program that is kept up to date."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from leyden.policy.policy import Policy, Response, Sampling

CHUNK = 256
"""Responses of a rollout that are scored together, and by default sampled together."""
OnProgress = Callable[[int], None]
"""Called now and then with how many responses have ended since."""


class Engine(ABC):
    """Samples responses with the policy's present weights. Write one for a server or another library.

    Every process has an engine of its own. Its log-probs travel with every token. Those that training computes are
    trained on, and what lies between the two is logged as `rollout/mismatch`.
    """

    runs_policy: ClassVar[bool] = True
    """Whether `generate` runs this process's own policy, whose sharded weights must then be whole."""
    at_once: ClassVar[int] = CHUNK
    """Responses that `stream` asks for at a time, where a class has no way of its own."""
    concurrent: ClassVar[bool] = False
    """Whether it can sample while this process trains."""
    room: int | None = None
    """Most tokens of a prompt and its response, where that is less than `start` was told."""
    stop_strings: Sequence[str] = ()
    """Texts of which the caller wants nothing that comes after. An engine that can ends a response there, with the
    tokens of the text as part of it; others sample on."""

    def servers(self) -> Sequence[Engine]:
        """What it is made of, each to be proven by itself after a sync; as many on every process."""
        return [self]

    def is_exact(self, policy: Policy) -> bool:
        """Whether it samples from just the distribution that training computes, in the same precision. Where it does
        not, policy gradients correct for it. The same on every process. False by default."""
        return False

    def start(self, policy: Policy, folder: Path, longest: int) -> None:
        """Get ready to sample: called on every process, before the first `sync`. Does nothing by default.

        Args:
            policy: built, and on its device.
            folder: of the run, for logs.
            longest: most tokens of a prompt and its response together.
        """
        return

    @abstractmethod
    def sync(self, policy: Policy) -> None:
        """Take over the policy's weights as they are now. Called on every process, with or without prompts to answer,
        once for each state of the weights that is sampled from: it may wait for the others. Sharded weights are whole
        inside the call where the engine runs the policy; elsewhere `policy.weights()` gathers them one by one."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        on_progress: OnProgress | None = None,
    ) -> list[list[Response]]:
        """`n` responses to each prompt of token ids, with their log-probs; see `Policy.generate`.

        `keys` are the places of prompts in the run's sequence: noise that depends on them and on `sampling.seed` alone
        makes a resumed run, and any number of processes, sample the same.
        """

    def stream(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        on_progress: OnProgress | None = None,
    ) -> Iterator[list[tuple[int, list[Response]]]]:
        """As `generate`, but handed out as it is there: (place of the prompt, its responses), several at a time and in
        any order, so that they are scored and kept while others are sampled. By default some `at_once` a time."""
        step = max(1, self.at_once // n)
        for at in range(0, len(prompts), step):
            part = slice(at, at + step)
            groups = self.generate(prompts[part], n, sampling, keys[part], on_progress)
            yield list(enumerate(groups, at))

    def rest(self) -> None:
        """Nothing is sampled before training has gone on: memory that it needs may be given back. Does nothing by
        default; `generate` and `sync` end the rest."""
        return

    def stop(self) -> None:
        """End what `start` has started: called on every process, as the run ends. Does nothing by default."""
        return


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
        on_progress: OnProgress | None = None,
    ) -> list[list[Response]]:
        assert self._policy is not None
        return self._policy.generate(prompts, n, sampling, keys, on_progress)
