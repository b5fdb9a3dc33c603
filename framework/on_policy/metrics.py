"""What is measured on a rollout, the same for every algorithm that samples."""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Mapping, Sequence
from statistics import StatisticsError, correlation, fmean

from torch import Tensor

from leyden.batch.trajectory import Trajectory
from leyden.batch.tree import Tree


def divergence(seen: Trajectory) -> Tensor:
    """log policy / reference summed over each response: [N] nats, whose mean is an estimate of their KL divergence."""
    return seen.per_branch(seen.old_logp - seen.ref_logp)


def some(tree: Tree, n: int | None, seed: int) -> Tree:
    """The tree with `n` of its responses, drawn whatever their scores are; all of them where `n` is None."""
    if n is None or n >= len(tree.responses):
        return tree
    drawn = random.Random(f"{seed}/{tree.row}").sample(range(len(tree.responses)), n)
    scores = tree.scores and [tree.scores[k] for k in drawn]
    return Tree(tree.prompt, [tree.responses[k] for k in drawn], scores, None, tree.row)


def measured(trees: Sequence[Tree], seen: Trajectory, stop: Collection[int]) -> dict[str, float]:
    """Means over the responses of all processes.

    Args:
        trees: every prompt with its responses and scores.
        seen: the responses that were looked at.
        stop: token ids that end a response.

    Returns:
        rollout/reward, rollout/length (tokens), rollout/eos_rate (share that ended by themselves), rollout/kl (nats,
        summed per response), rollout/entropy (nats a token), rollout/length_correlation (of score and length, unless
        one of them is always the same); with several samples a prompt rollout/best (mean of the best of each) and
        rollout/same (share of prompts whose responses all score the same, which teach nothing).
    """
    scores = [score for tree in trees for score in tree.scores or ()]
    responses = [response for tree in trees for response in tree.responses]
    tokens = max(float(seen.weight.sum()), 1.0)
    found = {
        "reward": fmean(scores),
        "length": fmean(map(len, responses)),
        "eos_rate": fmean(float(response[-1] in stop) for response in responses),
        "kl": float(divergence(seen).mean()),
        "entropy": -float((seen.old_logp * seen.weight).sum()) / tokens,
    }
    together = _with_length(trees)
    if together is not None:
        found["length_correlation"] = together
    groups = [tree.scores for tree in trees if tree.scores and len(tree.scores) > 1]
    if groups:
        found |= {
            "best": fmean(max(group) for group in groups),
            "same": fmean(float(max(group) == min(group)) for group in groups),
        }
    return {f"rollout/{name}": value for name, value in found.items()}


def _with_length(trees: Sequence[Tree]) -> float | None:
    """Pearson correlation of score and length in tokens, each less its mean over the prompt's responses where there are
    several: longer questions may have better answers. None where it is not defined."""
    scores, lengths = list[float](), list[float]()
    for tree in trees:
        several = len(tree.responses) > 1
        for values, found in ((scores, tree.scores or ()), (lengths, [float(len(r)) for r in tree.responses])):
            middle = fmean(found) if several else 0.0
            values += [value - middle for value in found]
    try:
        return correlation(scores, lengths)
    except StatisticsError:
        return None


def term_means(parts: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Means of what the reward is made of, over the scores of all processes, as rollout/reward_NAME."""
    names = sorted({name for part in parts for name in part})
    return {f"rollout/reward_{name}": fmean([x for part in parts for x in part.get(name, ())]) for name in names}


class Clock:
    """How the time goes between sampling and training."""

    def __init__(self) -> None:
        self._began = self._sampled = self._ended = 0.0
        self._trained: float | None = None
        self._tokens = 0

    def pause(self, seconds: float) -> None:
        """So long it was neither sampling nor training since the last rollout was ready."""
        if self._ended:
            self._ended += seconds

    def start(self) -> None:
        """A rollout starts, and training on the one before has ended."""
        self._began = time.monotonic()
        self._trained = self._began - self._ended if self._ended else None

    def sampled(self, trees: Sequence[Tree]) -> None:
        """All responses are there and scored."""
        self._sampled = time.monotonic()
        self._tokens = sum(len(response) for tree in trees for response in tree.responses)

    def end(self) -> dict[str, float]:
        """The rollout is ready: perf/generated_tokens_per_second (sampling and scoring, all processes),
        perf/rollout_seconds, and perf/rollout_share of it and the training before it, pauses left out."""
        self._ended = time.monotonic()
        took = self._ended - self._began
        found = {
            "perf/generated_tokens_per_second": self._tokens / max(self._sampled - self._began, 1e-9),
            "perf/rollout_seconds": took,
        }
        return found if self._trained is None else found | {"perf/rollout_share": took / (took + self._trained)}
