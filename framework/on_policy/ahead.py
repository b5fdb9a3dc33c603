"""A rollout that is sampled while the one before it trains: one step off the policy, and exact on resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from leyden.batch.trajectory import Trajectory
from leyden.data.prompts import Prompt
from leyden.on_policy.pending_rollout import PendingRollout
from leyden.on_policy.rollout import AnsweredPrompt
from leyden.policy.policy import Policy

Drawn = Sequence[tuple[int, Prompt]]
Gather = Callable[[Trajectory], list[Trajectory] | None]


class Ahead:
    """The rollout after the one that is trained on.

    A checkpoint holds it whole, since the weights that it was sampled with are gone by then; so saving waits for it.
    """

    def __init__(self) -> None:
        self.pending: PendingRollout | None = None
        self._saved: dict[str, Any] | None = None
        """What a checkpoint held."""

    def wait(self) -> None:
        """Until nothing is being sampled any more, so that the engine may get other weights."""
        if self.pending is not None:
            self.pending.wait()

    def take(self, number: int) -> PendingRollout | None:
        """The rollout of this number, if it was sampled ahead."""
        pending, self.pending = self.pending, None
        return pending if pending is not None and pending.number == number else None

    def forget(self) -> None:
        self.pending = None

    def saved(self, number: int, prompts: str, drawn: Drawn, policy: Policy) -> tuple[list[AnsweredPrompt], str] | None:
        """This process's part of the rollout of this number, if a checkpoint held it, with answers to these prompts;
        and the fingerprint of what they depend on.

        Args:
            prompts: their fingerprint.
        """
        state, self._saved = self._saved, None
        if state is None or (state["rollout"], state["prompts"]) != (number, prompts):
            return None
        batch = Trajectory.from_state_dict(state["trajectory"])
        return answered_prompts(batch, dict(drawn), policy), str(state["fingerprint"])

    def trajectory(self) -> Trajectory | None:
        """All responses as a batch, without scores."""
        if self.pending is None:
            return None
        answered = self.pending.all()
        logp = [[response.logp for response in one.responses] for one in answered]
        batch = Trajectory.of([one.tree() for one in answered], logp, [one.draw for one in answered])
        said = [value for tree in logp for response in tree for value in response]
        batch.sampled_logp = batch.sampled_logp.double()  # every digit that rollouts.jsonl has
        batch.sampled_logp[batch.branch >= 0] = torch.tensor(said, dtype=torch.float64)
        return batch

    def state_dict(self, gather: Gather, prompts: str) -> dict[str, Any] | None:
        """The whole rollout, whatever process holds it, or None where there is none. To be called on all of them.

        Args:
            gather: the parts of all processes, on the first.
            prompts: the fingerprint of what it answers.
        """
        batch, pending = self.trajectory(), self.pending
        if batch is None or pending is None:
            return self._saved  # of the checkpoint that training has just gone on from
        parts = gather(batch)
        whole = None if parts is None else Trajectory.cat(parts).state_dict()
        return {
            "rollout": pending.number,
            "prompts": prompts,
            "fingerprint": pending.fingerprint,
            "trajectory": whole,
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """The inverse of `state_dict`."""
        self._saved = state


def answered_prompts(batch: Trajectory, prompts: dict[int, Prompt], policy: Policy) -> list[AnsweredPrompt]:
    """The prompts among these that a batch of responses answers; the inverse of `Ahead.trajectory`."""
    found = []
    for span, draw in zip(batch.structure(), batch.draw.tolist(), strict=True):
        if draw not in prompts:
            continue
        responses = []
        for _, start, stop in span.responses:
            tokens, logp = batch.tokens[start:stop].tolist(), batch.sampled_logp[start:stop].tolist()
            responses.append(policy.response(tokens, logp, tokens[-1] in policy.stop))
        found.append(AnsweredPrompt(prompts[draw], draw, responses))
    return found
