"""The proof that an engine samples from the policy: after each sync both sides score the same few samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from leyden.batch.forest import pack
from leyden.batch.tree import Tree
from leyden.distributed import all_gather
from leyden.errors import UserError
from leyden.policy.engine import Engine
from leyden.policy.policy import Policy, Response, Sampling, eval_mode

log = logging.getLogger("leyden")

TEXTS = (
    "The library opens at nine in the morning and closes at six in the evening. On the ground floor there are novels, "
    "newspapers and a table for children; on the second floor there are maps, and a room with a view of the river.",
    "도서관은 아침 아홉 시에 열고 저녁 여섯 시에 닫습니다. 일 층에는 소설과 신문이 있고 "
    "아이들을 위한 책상이 있습니다. 이 층에는 지도가 있고 강이 보이는 조용한 방이 있습니다.",
    "Question: a train leaves at 8:40 and takes two hours and a half. When does it arrive? Answer: it arrives at "
    "11:10. def area(width, height): return width * height",
    "1, 2, 3, 5, 8, 13, 21, 34. 서울의 인구는 약 940만 명입니다. Water boils at 100 °C, and freezes at 0.",
)
"""What is sampled from, over and over until it fills `LENGTH` tokens."""
LENGTH = 288
"""Tokens of a prompt: more than any engine keeps in one block of its cache, so that keys which it should have dropped
after a sync show."""
SAMPLES, NEW = 4, 16
"""Samples of each prompt, and most tokens of each."""
SEED = 7
TEMPERATURE = 0.8
"""Not 1, at which log-probs are the same before and after it."""
START_MEAN = 0.1
"""Nats a token at which no engine of whatever precision samples from this policy: bfloat16 against float32 differs by
about 0.004."""
MEAN_FACTOR, MEAN_FLOOR = 5.0, 2e-5
LARGEST_FACTOR, LARGEST_FLOOR = 10.0, 2e-4
"""How many times the difference at the start is allowed later, and what always is: rounding of float32 is some 1e-6 in
the mean and 1e-5 at most."""


class Mismatch(NamedTuple):
    """What lies between the log-probs of an engine and of training, over samples of the engine; nats a token."""

    mean: float
    largest: float


class SyncProof:
    """Compares log-probs after each sync. What they differ by at first is the engine's own noise (its precision, its
    kernels); what exceeds that by far later is a sync that did not do what it said."""

    def __init__(self) -> None:
        self.noise: Mismatch | None = None
        """The mismatch after the first sync; the worst of all processes."""

    def measure(self, policy: Policy, engine: Engine, longest: int) -> Mismatch:
        """Sample, and score by the policy. To be called on every process: one forward each, and the worst of all.

        Args:
            longest: most tokens of a prompt and its response.
        """
        longest = min(longest, engine.room or longest)
        prompts = probes(policy, max(1, min(LENGTH, longest - NEW)))
        new, found = min(NEW, max(1, longest - len(prompts[0]))), list[tuple[float, float]]()
        for server in engine.servers():
            groups = server.generate(prompts, SAMPLES, Sampling(new, TEMPERATURE, seed=SEED), range(len(prompts)))
            apart = differences(policy, prompts, groups, TEMPERATURE)
            found += all_gather((float(apart.mean()), float(apart.max())))
        return Mismatch(*torch.tensor(found, dtype=torch.float64).amax(0).tolist())  # NaN where any of them is

    def holds(self, now: Mismatch) -> bool:
        """Whether a mismatch is that of an engine in step with the policy. NaN is not."""
        if self.noise is None:
            return now.mean <= START_MEAN
        mean = max(MEAN_FACTOR * self.noise.mean, MEAN_FLOOR)
        return now.mean <= mean and now.largest <= max(LARGEST_FACTOR * self.noise.largest, LARGEST_FLOOR)

    def check(self, policy: Policy, engine: Engine, longest: int) -> None:
        """Measure after a sync; the first time that is the noise. Where it fails, the sync is made once more, so that
        no run of weeks ends by chance.

        Raises:
            UserError: the engine does not sample from the policy.
        """
        name, now = type(engine).__name__, self.measure(policy, engine, longest)
        if not self.holds(now):
            log.warning("%s differs by %.3g nats a token after a sync; it is synced again", name, now.mean)
            engine.sync(policy)
            now = self.measure(policy, engine, longest)
        if not self.holds(now):
            raise UserError(self._problem(name, now))
        if self.noise is None:
            self.noise = now
            log.info("%s is in step: log-probs differ by %.1e nats a token, %.1e at most", name, *now)

    def _problem(self, name: str, now: Mismatch) -> str:
        if self.noise is None:
            return (
                f"{name} does not sample from this policy: its log-probs differ by {now.mean:.3g} nats a token (at "
                f"most {now.largest:.3g}) right after the first sync. Most often it serves another model or another "
                "tokenizer, or does not take all weights over (a tied output head); see docs/engines.md"
            )
        return (
            f"{name} is no longer in step with the policy: after a sync its log-probs differ by {now.mean:.3g} nats a "
            f"token (at most {now.largest:.3g}), where {self.noise.mean:.1e} ({self.noise.largest:.1e}) was its noise "
            "at the start. Most often weights were not taken over, or keys of older weights are still in its cache; "
            "see docs/engines.md"
        )


def probes(policy: Policy, length: int) -> list[list[int]]:
    """Prompts of `length` token ids each, the same in every run."""
    found = []
    for text in TEXTS:
        ids = [int(token) for token in policy.tokenizer(text, add_special_tokens=False)["input_ids"]]
        found.append((ids * (length // len(ids) + 1))[:length])
    return found


@torch.no_grad()
def differences(
    policy: Policy, prompts: Sequence[list[int]], groups: Sequence[Sequence[Response]], temperature: float = 1.0
) -> Tensor:
    """|log-prob by the engine - log-prob by training's forward| of every sampled token: [tokens], nats."""
    trees = [
        Tree(p, [r.tokens for r in group], row=i) for i, (p, group) in enumerate(zip(prompts, groups, strict=True))
    ]
    batch = pack(trees).to(policy.device)
    with eval_mode(policy):
        ours = policy(batch, {"logp"}, temperature).logp[batch.branch >= 0]
    theirs = torch.tensor([value for group in groups for response in group for value in response.logp])
    apart: Tensor = (ours.double().cpu() - theirs.double()).abs()
    return apart
