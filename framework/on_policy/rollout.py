"""Rollouts: prompts with their responses and scores, the value that sampler, reward, file and `credit` share."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from leyden.batch.trajectory import Trajectory
from leyden.batch.tree import Tree
from leyden.data.prompts import Prompt
from leyden.example import Sample
from leyden.policy.policy import Response


@dataclass
class AnsweredPrompt:
    """One prompt with its sampled responses, in the order in which they were sampled; a row of rollouts.jsonl."""

    prompt: Prompt
    """What was asked."""
    draw: int
    """Place in the run's sequence of prompts, unique."""
    responses: list[Response]
    """What the engine answered."""
    scores: list[float] | None = None
    """What each response is worth; None until the reward has said it, and where it failed."""
    terms: dict[str, list[float]] = field(default_factory=dict)
    """What the scores are made of, by name: one number a response."""

    def __len__(self) -> int:
        """Tokens of the prompt and all responses."""
        return len(self.prompt.tokens) + sum(len(response.tokens) for response in self.responses)

    def samples(self) -> list[Sample]:
        """The responses as a reward sees them."""
        example = self.prompt.example
        told = (example.source, example.tools)
        return [Sample(example.messages, r.text, example.row, r.finished, *told) for r in self.responses]

    def keep(self, numbers: Sequence[int]) -> AnsweredPrompt:
        """The same prompt with these of its responses, in this order."""
        scores = self.scores and [self.scores[k] for k in numbers]
        terms = {name: [values[k] for k in numbers] for name, values in self.terms.items()}
        return replace(self, responses=[self.responses[k] for k in numbers], scores=scores, terms=terms)

    def best_first(self) -> AnsweredPrompt:
        """The same with the best response first, as in preference data; of equal ones, and without scores, the
        earlier."""
        scores = self.scores or [0.0] * len(self.responses)
        return self.keep(sorted(range(len(scores)), key=lambda k: (-scores[k], k)))

    def tree(self) -> Tree:
        """Token ids with scores."""
        return Tree(self.prompt.tokens, [r.tokens for r in self.responses], self.scores, row=self.prompt.row)

    def to_row(self, rollout: int, fingerprint: str) -> dict[str, Any]:
        """The row of rollouts.jsonl: preference data of the format "scored", and instruction data by its best response.

        Args:
            rollout: the number of the rollout.
            fingerprint: of what the responses depend on.
        """
        return {
            **self.prompt.example.prompt_columns(),
            "responses": [r.text for r in self.responses],
            "scores": self.scores,
            **({"terms": self.terms} if self.terms else {}),
            "finished": [r.finished for r in self.responses],
            "tokens": [r.tokens for r in self.responses],
            "logp": [r.logp for r in self.responses],
            "rollout": rollout,
            "draw": self.draw,
            "fingerprint": fingerprint,
            "row": dict(self.prompt.example.row),
        }

    @classmethod
    def from_row(cls, prompt: Prompt, row: Mapping[str, Any]) -> Self | None:
        """The responses of a row without their scores, since the reward may be another one now; None where the row
        answers another prompt."""
        if row["prompt"] != prompt.example.messages or row["row"] != dict(prompt.example.row):
            return None
        parts = zip(row["tokens"], row["logp"], row["finished"], row["responses"], strict=True)
        return cls(prompt, row["draw"], [Response(*part) for part in parts])


@dataclass
class Rollout:
    """The prompts of one rollout that this process answered, in the order of their draws, all scored."""

    number: int
    """0 for the first of the run."""
    answered: list[AnsweredPrompt]
    """What is trained on."""
    trajectory: Trajectory | None = None
    """The responses as a batch with log-probs of policy and reference (and values), on the CPU, best response first:
    all of them, or for algorithms that only want the KL, `kl_responses` of each prompt."""
    replaced: list[AnsweredPrompt] = field(default_factory=list)
    """Prompts that others took the place of, since nothing is learnt from them; see `dynamic_sampling`."""

    @property
    def all_answered(self) -> list[AnsweredPrompt]:
        """Every prompt that was answered, replaced ones included: what rewards are measured on."""
        return [*self.answered, *self.replaced]

    @property
    def terms(self) -> list[str]:
        """The names of what the rewards are made of."""
        return sorted({name for one in self.all_answered for name in one.terms})

    @staticmethod
    def pack(answered: Sequence[AnsweredPrompt]) -> Trajectory:
        """Responses with their scores as a batch, best response first; prompts without any are left out."""
        kept = [one.best_first() for one in answered if one.responses]
        logp = [[response.logp for response in one.responses] for one in kept]
        return Trajectory.of([one.tree() for one in kept], logp, [one.draw for one in kept])

    def some_responses(self, most: int | None) -> list[AnsweredPrompt]:
        """Every prompt with at most so many of its responses, drawn at random, whatever their scores; None keeps
        all."""
        return [one if most is None else self._some(one, most) for one in self.answered]

    def _some(self, one: AnsweredPrompt, most: int) -> AnsweredPrompt:
        best = one.best_first()
        if most >= len(best.responses):
            return best
        draw = random.Random(f"{self.number}/{one.prompt.row}")
        return best.keep(draw.sample(range(len(best.responses)), most))
