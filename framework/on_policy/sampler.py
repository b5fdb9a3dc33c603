"""Sampling of rollouts: the engine responds, the reward scores, and both go to rollouts.jsonl at once."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from leyden.data.prompts import Prompt
from leyden.errors import UserError
from leyden.on_policy.pending_rollout import PendingRollout
from leyden.on_policy.rollout import AnsweredPrompt, Rollout
from leyden.on_policy.rollout_file import RolloutFile, sampling_fingerprint
from leyden.policy.engine import CHUNK, Engine, Native
from leyden.policy.policy import Policy, Response, Sampling
from leyden.rewards.reward import score_with_terms
from leyden.run.progress import RolloutBar, count_answers


class Sampler:
    """Samples this process's part of every rollout.

    The noise of a response depends on seed, rollout, draw and the number of the sample alone, so that it does not
    matter which process answers a prompt, and beside which others. Prompts whose responses are on file are not asked
    again.

    Args:
        engine: what samples; synchronised by the caller.
        sampling: how.
        samples: responses to each prompt.
        folder: where rollouts.jsonl goes; None keeps nothing.
        trainer: whose progress is shown, and whose rank this is.
    """

    def __init__(self, engine: Engine, sampling: Sampling, samples: int, folder: Path | None, trainer: Any) -> None:
        self.engine, self.sampling, self.samples, self.trainer = engine, sampling, samples, trainer
        rank = trainer.global_rank
        self.file = RolloutFile(folder and folder / (f"rollouts-{rank}.jsonl" if rank else "rollouts.jsonl"))

    def sample(self, rollout: int, drawn: Sequence[tuple[int, Prompt]], reward: Any, trained: nn.Module) -> Rollout:
        """Responses with scores; see `draw` and `score`."""
        return self.score(self.draw(rollout, drawn, trained), reward)

    def draw(
        self, rollout: int, drawn: Sequence[tuple[int, Prompt]], trained: nn.Module, shown: bool = True
    ) -> PendingRollout:
        """Responses on their way.

        Args:
            rollout: its number.
            drawn: this process's prompts, each with the number of its draw.
            trained: the module that is trained; responses on file count only if they were sampled with its present
                weights.
            shown: whether the progress line counts them.
        """
        sampling = replace(self.sampling, seed=(self.sampling.seed or 0) * 1_000_003 + rollout)
        fingerprint = sampling_fingerprint(trained, sampling, self.samples)
        rows = self.file.begin(rollout, fingerprint, self.trainer.ckpt_path is not None)
        known = {draw: AnsweredPrompt.from_row(prompt, rows[draw]) for draw, prompt in drawn if draw in rows}
        ready = {draw: one for draw, one in known.items() if one is not None}
        count = RolloutBar(self.trainer, rollout, len(drawn) * self.samples).add if shown else _count_nothing
        arrivals = self._arrivals([one for one in drawn if one[0] not in ready], sampling, count)
        return PendingRollout(rollout, drawn, fingerprint, ready, arrivals, self.file)

    def known(
        self,
        rollout: int,
        drawn: Sequence[tuple[int, Prompt]],
        answered: Sequence[AnsweredPrompt],
        fingerprint: str,
    ) -> PendingRollout:
        """A rollout whose responses are all there: those of a checkpoint."""
        ready = {one.draw: one for one in answered}
        self.file.begin(rollout, fingerprint, self.trainer.ckpt_path is not None)
        nothing = self._arrivals([], self.sampling, _count_nothing)
        return PendingRollout(rollout, drawn, fingerprint, ready, nothing, self.file)

    def score(self, pending: PendingRollout, reward: Any) -> Rollout:
        """A rollout with scores, each as soon as its responses are there."""
        drawn, step = pending.drawn, max(1, CHUNK // self.samples)
        whole = Rollout(pending.number, [])
        with closing(pending):
            # always the same few are scored together, whatever order they arrive in: models round by company
            for chunk in (drawn[at : at + step] for at in range(0, len(drawn), step)):
                answered = pending.of(chunk)
                try:
                    give_scores(answered, reward)
                finally:  # what the reward failed on is filed, too
                    self.file.append(answered, pending.number, pending.fingerprint)
                whole.answered += answered
        self.file.end(pending.number, {draw for draw, _ in drawn})
        return whole

    def _arrivals(
        self, missing: Sequence[tuple[int, Prompt]], sampling: Sampling, on_progress: Callable[[int], None]
    ) -> Generator[list[AnsweredPrompt]]:
        """Prompts with new responses, as the engine has them."""
        prompts, draws = [prompt.tokens for _, prompt in missing], [draw for draw, _ in missing]
        for groups in self.engine.stream(prompts, self.samples, sampling, draws, on_progress) if missing else ():
            check_log_probs(self.engine, [group for _, group in groups])
            yield [
                AnsweredPrompt(missing[place][1], missing[place][0], list(map(rounded, group)))
                for place, group in groups
            ]


def _count_nothing(responses: int) -> None:
    """No progress to show."""


def check_log_probs(engine: Engine, groups: Sequence[Sequence[Response]]) -> None:
    """That an engine gives one log-prob for each token.

    Raises:
        UserError: it does not.
    """
    for one in (response for group in groups for response in group):
        if len(one.logp) != len(one.tokens):
            raise UserError(
                f"{type(engine).__name__}: a response of {len(one.tokens)} tokens with {len(one.logp)} log-probs; give "
                "Response.logp one number for each token"
            )


def rounded(response: Response) -> Response:
    """The same with log-probs of six digits after the point, as rollouts.jsonl has them."""
    return replace(response, logp=[round(float(value), 6) for value in response.logp])


def give_scores(answered: Sequence[AnsweredPrompt], reward: Any) -> None:
    """Ask a reward for the scores of all responses, and what they are made of; without one they have none.

    Raises:
        UserError: it failed; see `leyden.rewards.reward.score`.
    """
    if reward is None:
        return
    given, parts = score_with_terms(reward, [sample for one in answered for sample in one.samples()])
    scores, terms = given.tolist(), {name: values.tolist() for name, values in parts.items()}
    at = 0
    for one in answered:
        stop = at + len(one.responses)
        one.scores = scores[at:stop]
        one.terms = {name: values[at:stop] for name, values in terms.items()}
        at = stop


def answer_prompts(
    trainer: Any,
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    reward: Any,
    engine: Engine | None = None,
) -> list[AnsweredPrompt]:
    """One scored answer to each prompt, with noise that depends on the number of the prompt alone; nothing is filed.

    Args:
        engine: already in step with the policy; by default the policy answers itself.
    """
    if engine is None:
        engine = Native()
        engine.sync(policy)
    if not prompts:
        return []
    tokens, keys = [prompt.tokens for prompt in prompts], [prompt.row for prompt in prompts]
    groups = engine.generate(tokens, 1, sampling, keys, count_answers(trainer, len(prompts)))
    answered = [AnsweredPrompt(p, p.row, group) for p, group in zip(prompts, groups, strict=True)]
    give_scores(answered, reward)
    return answered
