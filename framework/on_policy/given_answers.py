"""Rollouts in which some prompts have the answers of their rows, instead of samples."""

from __future__ import annotations

import random
from typing import Any

from leyden.batch.trajectory import Trajectory
from leyden.batch.tree import Tree
from leyden.data.prompts import Prompt, PromptLoader
from leyden.errors import UserError
from leyden.on_policy.on_policy import OnPolicy
from leyden.on_policy.rollout import Rollout
from leyden.on_policy.rollout_loader import RolloutLoader, in_order


class WithGivenAnswers(OnPolicy):
    """Trains on samples and on answers that rows have. A coin is tossed for each prompt that is drawn, the same
    whatever process has it. What is measured on rollouts is of samples alone.

    Args:
        given: share of prompts whose row's own answer is trained on, and not a sample.
    """

    def __init__(self, *args: Any, given: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= given <= 1:
            raise UserError(f"--model.given {given}: give a share of the prompts, from 0 to 1")
        if given == 1 and (self.samples > 1 or self.lag):
            raise UserError("--model.given 1: nothing is sampled, so leave out --model.samples and --model.lag")
        self.given, self.needs_answers = given, given > 0

    def is_given(self, draw: int) -> bool:
        """Whether the prompt of this draw has its row's answer."""
        return random.Random(f"{self.sampling.seed}/{draw}").random() < self.given

    def experience(self, loader: PromptLoader) -> RolloutLoader:
        found = super().experience(loader)
        missing = next((prompt for prompt in loader.prompts if not prompt.answer), None) if self.needs_answers else None
        if missing is not None:
            raise UserError(f"{self.data.source(missing.row)}: no answer, and --model.given {self.given} trains on it")
        return found

    def asked(self, drawn: list[tuple[int, Prompt]]) -> list[tuple[int, Prompt]]:
        return [one for one in drawn if not self.is_given(one[0])]

    def credit(self, rollout: Rollout) -> Trajectory:
        """Samples and given answers, of which nothing but the tokens is known."""
        parts = [Rollout.pack(rollout.answered)]
        if self.given and self.rollout_loader is not None:
            share = self.rollout_loader.share(rollout.number)
            given = {draw: prompt for draw, prompt in share if self.is_given(draw)}
            trees = [Tree(prompt.tokens, [prompt.answer or []], row=prompt.row) for prompt in given.values()]
            parts.append(Trajectory.of(trees, draws=list(given)))
        return in_order(parts)  # as a checkpoint has them, so that a resumed run adds up in the same order
