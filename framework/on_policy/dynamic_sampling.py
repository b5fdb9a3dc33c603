"""Dynamic sampling: prompts whose responses all score the same are replaced by the next ones (Yu et al. 2025, eq. 11).

Nothing is learnt from such a prompt, since its responses have no advantage over each other. Every prompt of a rollout
has a place in it, and a replacement takes the place and the process of what it replaces, so that the steps are balanced
as they were planned. Which prompts are drawn depends on all scores and on nothing else: one process and two draw the
same, and a resumed run draws what it drew before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from leyden.data.prompts import Prompt
from leyden.distributed import Reduce
from leyden.errors import UserError
from leyden.on_policy.rollout import AnsweredPrompt, Rollout
from leyden.on_policy.rollout_loader import RolloutLoader


def differs(one: AnsweredPrompt) -> bool:
    """Whether the responses to a prompt have different scores."""
    scores = one.scores or []
    return bool(scores) and min(scores) < max(scores)


def replace_prompts(
    rollout: Rollout,
    loader: RolloutLoader,
    sample: Callable[[list[tuple[int, Prompt]]], Rollout],
    most: int,
    reduce: Reduce,
) -> float:
    """Move prompts whose responses score alike to `rollout.replaced`, and sample others in their places. To be called
    on every process.

    Args:
        rollout: this process's part, scored.
        loader: whose sequence of prompts goes on.
        sample: responses with scores to further prompts.
        most: batches of prompts that may be drawn.
        reduce: sums over processes.

    Returns:
        Prompts that were replaced, as a share of the rollout.

    Raises:
        UserError: no prompt at all is left.
    """
    size, drawn = len(loader.draws), 0
    while True:
        same = [one for one in rollout.answered if not differs(one)]
        rollout.replaced += same
        rollout.answered = [one for one in rollout.answered if differs(one)]
        usable = torch.zeros(size, dtype=torch.float64)
        usable[loader.places(one.draw for one in rollout.answered)] = 1.0
        empty = (reduce(usable) == 0).nonzero()[:, 0].tolist()
        further = min(len(empty), most * size - drawn)
        if not further:
            break
        rollout.answered += sample(loader.refill(empty[:further])).answered
        drawn += further
    if len(empty) == size:
        raise UserError(
            f"--model.dynamic_sampling: in rollout {rollout.number} the answers to each of {size + drawn} prompts all "
            "score the same, so there is nothing to learn from; look at them in rollouts.jsonl: give prompts that are "
            "neither too easy nor too hard, a reward that tells answers apart, or more --model.samples"
        )
    rollout.answered.sort(key=lambda one: one.draw)
    return drawn / size
