"""Requests for samples: many at a time, shared among servers, and asked again where a server went away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from leyden.errors import UserError
from leyden.models.engines.client import Client, Refused, Slow, Unreachable, completion
from leyden.policy.policy import Policy, Response, Sampling

log = logging.getLogger("leyden")

OUTAGES = 1
"""How often a server may go away without having answered anything in between."""
PAUSE = 0.5
"""Seconds between two looks at a server that is away."""


@dataclass
class Replica:
    """A server with the present weights."""

    client: Client
    is_up: bool = True
    """Whether it has them; one that went away gets requests again after the next sync"""
    busy: int = 0
    """Requests that it works on"""


def request_seed(seed: int | None, key: int) -> int:
    """The seed of a request. vLLM gives sample k of a request the seed + k, so seeds lie at least 65,536 apart, where
    they are not equal."""
    digest = blake2b(f"{seed or 0}/{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 2) & ~0xFFFF


def persist(
    replica: Replica, what: Callable[[Client], None], lives: Callable[[], bool], patience: float, alone: bool
) -> None:
    """Do something with a server, again if it went away meanwhile and came back. One of several is left out instead.

    Raises:
        UserError: the only server does not come back, or goes away a second time.
    """
    for left in range(OUTAGES, -1, -1):
        try:
            what(replica.client)
            replica.is_up = True
            return
        except Unreachable as error:
            if not alone:
                log.warning("%s does not answer; it is left out until the next sync", replica.client.url)
                replica.is_up = False
                return
            if not left:
                raise UserError(f"{replica.client.url} went away twice ({error}); see its log") from None
            await_up(replica.client, lives, patience)


def await_up(client: Client, lives: Callable[[], bool], patience: float) -> None:
    """Until a server that went away answers again.

    Raises:
        UserError: it does not, within that many seconds.
    """
    log.warning("%s does not answer; waiting for it", client.url)
    deadline = time.monotonic() + patience
    while not client.is_up():
        if not lives() or time.monotonic() > deadline:
            raise UserError(
                f"{client.url} has gone and does not come back; see the server's log. What was sampled is kept: "
                "--ckpt_path auto goes on from there"
            )
        time.sleep(PAUSE)
    log.info("%s is back", client.url)


def _give_up(jobs: Mapping[Future[Any], tuple[int, Replica]]) -> None:
    """End requests that nobody waits for any more."""
    left = set(jobs)
    while left:  # again and again: one may only be about to connect
        for replica in {id(replica): replica for _, replica in jobs.values()}.values():
            replica.client.hang_up()
            replica.busy = 0
        left = {job for job in left if not job.cancel()}
        left = wait(left, timeout=0.05).not_done


class Requests:
    """The requests of one call.

    Args:
        policy: whose tokens and stops they are.
        replicas: the servers.
        model: as they call it.
        responses: most at the same time.
        lives: whether a server that does not answer may come back.
        patience: seconds that it may take to.
        again: what makes a server ready that did; None where it is at once.
        stop_strings: texts that end a response.
    """

    def __init__(
        self,
        policy: Policy,
        replicas: Sequence[Replica],
        model: str,
        responses: int,
        lives: Callable[[], bool],
        patience: float,
        again: Callable[[Client], None] | None = None,
        stop_strings: Sequence[str] = (),
    ) -> None:
        self.policy, self.replicas, self.model, self.responses = policy, replicas, model, responses
        self.lives, self.patience, self.again = lives, patience, again
        self.stop, self.stop_strings = policy.stop, stop_strings

    def stream(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        keys: Sequence[int],
        on_progress: Callable[[int], None],
    ) -> Iterator[list[tuple[int, list[Response]]]]:
        """Groups of responses as they are there; see `Engine.stream`."""
        waiting = list(range(len(prompts)))[::-1]
        jobs: dict[Future[Any], tuple[int, Replica]] = {}
        outages, problem, places = 0, "", max(1, min(len(prompts), self.responses // n))
        pool = ThreadPoolExecutor(places, "vllm")
        try:
            while waiting or jobs:
                while waiting and len(jobs) < places and (replica := self._least_busy()) is not None:
                    place = waiting.pop()
                    body = self._body(prompts[place], n, sampling, keys[place])
                    replica.busy += 1
                    jobs[pool.submit(replica.client.post, "/v1/completions", body)] = place, replica
                if not jobs:
                    outages += 1
                    self._recover(outages, problem)
                    continue
                done, _ = wait(jobs, return_when=FIRST_COMPLETED)
                groups, lost = [], list[int]()
                for job in done:
                    place, replica = jobs.pop(job)
                    replica.busy -= 1
                    try:
                        groups.append((place, self._group(job.result(), n)))
                    except (Unreachable, Refused) as error:
                        problem = self._lose(replica, error, prompts[place])
                        lost.append(place)
                waiting += sorted(lost, reverse=True)
                if groups:
                    outages = 0
                    on_progress(n * len(groups))
                    yield groups
        finally:
            _give_up(jobs)  # where the caller did, or an error
            pool.shutdown(cancel_futures=True)
            for replica in self.replicas:
                replica.client.tidy()

    def _lose(self, replica: Replica, error: Unreachable | Refused, prompt: list[int]) -> str:
        """Send a replica nothing more, since it went away; what it said last.

        Raises:
            UserError: it is there, and refuses.
        """
        if isinstance(error, Slow):
            raise UserError(
                f"{error}; give more --model.engine.timeout, or fewer --model.engine.requests at a time"
            ) from None
        # a server that was started again does not know the adapter; what else is refused would be again
        if isinstance(error, Refused) and (error.status != 404 or self.again is None):
            raise self._refused(replica.client, error, prompt) from None
        replica.is_up = False
        return str(error)

    def _least_busy(self) -> Replica | None:
        """Where the next request goes; None where no server has the present weights. One that comes back by itself may
        have others."""
        able = [replica for replica in self.replicas if replica.is_up]
        return min(able, key=lambda replica: replica.busy, default=None)

    def _recover(self, outages: int, problem: str) -> None:
        """Wait for the server that went away, where there is only one: others may have other weights by then."""
        kept = "What was sampled is kept: --ckpt_path auto goes on from there"
        if len(self.replicas) > 1:
            raise UserError(
                f"none of the {len(self.replicas)} servers answers any more ({problem}); start them again. {kept}"
            )
        replica = self.replicas[0]
        if outages > OUTAGES:
            raise UserError(
                f"{replica.client.url} went away twice over the same requests ({problem}); see its log. {kept}"
            )
        persist(replica, self._ready, self.lives, self.patience, alone=True)

    def _ready(self, client: Client) -> None:
        if not client.is_up():
            raise Unreachable(f"{client.url} is down")
        if self.again is not None:
            self.again(client)

    def _body(self, prompt: list[int], n: int, sampling: Sampling, key: int) -> dict[str, Any]:
        if not prompt:
            raise ValueError("a prompt without tokens")
        room = (self.policy.positions or 1 << 30) - len(prompt)
        if room < 1:
            raise UserError(
                f"a prompt of {len(prompt)} tokens leaves no position for an answer of {self.policy.positions}"
            )
        seed = request_seed(sampling.seed, key)
        return completion(self.model, prompt, n, sampling, seed, room, self.stop, self.stop_strings)

    def _group(self, answer: Any, n: int) -> list[Response]:
        """The n responses of an answer, in the order of their samples; a greedy one came once."""
        found = []
        for choice in sorted(answer["choices"], key=lambda choice: int(choice["index"])):
            tokens = [int(token) for token in choice["token_ids"]]
            logp = [float(value) for value in choice["logprobs"]["token_logprobs"]]
            found.append(self.policy.response(tokens, logp, choice["finish_reason"] == "stop"))
        return found if len(found) == n else found * n

    def _refused(self, client: Client, refusal: Refused, prompt: list[int]) -> UserError:
        if "maximum context length" in refusal.reason or "max_model_len" in refusal.reason:
            return UserError(
                f"{client.url}: a prompt of {len(prompt)} tokens with its answer is longer than the server takes; give "
                f"--model.engine.max_length, or start it with a larger --max-model-len ({refusal})"
            )
        return UserError(f"{client.url} refuses to sample ({refusal}); see its log")
