"""Prompts in, batches out: a rollout is sampled when the first of its minibatches is asked for, and then trained on."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from leyden.batch.forest import Totals, Tree
from leyden.batch.trajectory import Trajectory, restored, stored
from leyden.data.step_plan import balance
from leyden.errors import UserError
from leyden.example import Example

log = logging.getLogger("leyden")


class Prompt(NamedTuple):
    """A prompt to sample answers to."""

    row: int
    """A stable id, for errors."""
    example: Example
    """Its messages and the row they came from, so that rewards can see answers."""
    tokens: list[int]


class PromptLoader:
    """An endless sequence of prompts, each once a pass in an order that depends only on seed and pass.

    Args:
        prompts: all there are.
        size: prompts in one rollout.
        seed: of the order.
    """

    def __init__(self, prompts: Sequence[Prompt], size: int, seed: int = 0) -> None:
        self.prompts, self.size, self.seed = prompts, size, seed

    def __len__(self) -> int:
        """Rollouts until every prompt has come."""
        return math.ceil(len(self.prompts) / self.size)

    def draw(self, rollout: int) -> list[tuple[int, Prompt]]:
        """The prompts of a rollout, each with its number in the whole sequence, which no other draw has."""
        orders: dict[int, list[int]] = {}
        drawn = []
        for number in range(rollout * self.size, (rollout + 1) * self.size):
            turn, place = divmod(number, len(self.prompts))
            if turn not in orders:
                generator = torch.Generator().manual_seed(self.seed + 1_000_003 * turn)
                orders[turn] = torch.randperm(len(self.prompts), generator=generator).tolist()
            drawn.append((number, self.prompts[orders[turn][place]]))
        return drawn


class Experience:
    """The minibatches of one rank, rollout after rollout: `passes` times over each rollout, in `minibatches` steps.

    Sized, so that Lightning asks for a batch only when it is due and a rollout is sampled with the weights of the step
    before. Stateful: a checkpoint holds the rollout that is being trained on, and resuming goes on in the middle of it.
    Every rank holds the whole rollout, so all plan the same steps.

    Args:
        collect: samples and scores the rollout of this number; the same result on every rank.
        passes: over each rollout.
        minibatches: optimizer steps a pass.
        accumulate: micro-batches a rank runs in one step.
        world: number of ranks.
        rank: which share of every step to deliver.
        seed: of the order of responses.
    """

    def __init__(
        self,
        collect: Callable[[int], Trajectory],
        passes: int,
        minibatches: int,
        accumulate: int = 1,
        world: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        self.collect, self.passes, self.minibatches = collect, passes, minibatches
        self.accumulate, self.world, self.rank, self.seed = accumulate, world, rank, seed
        self.rollout, self.done, self._resume = -1, 0, False
        self.rows = ""
        """What the prompts are, as the DataModule's fingerprint says it."""
        self.whole: Trajectory | None = None
        self._sizes: list[tuple[int, Totals]] = []
        """Tokens and totals of each tree of the rollout, once a minibatch was asked for."""

    def __len__(self) -> int:
        return self.passes * self.minibatches * self.accumulate

    def stop(self) -> None:
        """Leave the rest of this rollout out. To be called on every rank."""
        self.done = len(self)

    def __iter__(self) -> Iterator[Trajectory]:
        if not self._resume:
            self.rollout, self.done, self.whole = self.rollout + 1, 0, None  # code after the last yield never runs
            self.whole, self._sizes = self.collect(self.rollout), []
        self._resume = False
        assert self.whole is not None
        while self.done < len(self):
            step, part = divmod(self.done, self.accumulate)
            self.done += 1
            yield self._batch(self.whole, step, part)

    def _batch(self, whole: Trajectory, step: int, part: int) -> Trajectory:
        """One micro-batch; without responses left for it, a few tokens of weight 0 that every rank can run."""
        spans = whole.structure()
        if len(self._sizes) != len(spans):
            self._sizes = [(span.stop - span.start, _totals(whole, tree)) for tree, span in enumerate(spans)]
        turn, number = divmod(step, self.minibatches)
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * (self.rollout * self.passes + turn + 1))
        mine = torch.randperm(len(spans), generator=generator).tolist()[number :: self.minibatches]
        totals = sum((self._sizes[tree][1] for tree in mine), Totals(0.0, 0, 0))
        trees = balance(mine, [length for length, _ in self._sizes], self.accumulate * self.world)[
            part * self.world + self.rank
        ]
        if len(trees) == len(spans) > 0:
            return replace(whole, totals=totals)
        if trees:
            return replace(whole.select(sorted(trees)), totals=totals)
        somewhere = whole.tokens[spans[0].start :][:2].tolist() if spans else [0, 0]
        return replace(Trajectory.of([Tree(somewhere, [])]), totals=totals)

    def state_dict(self) -> dict[str, Any]:
        going = self.whole is not None and self.done < len(self)
        return {
            "rollout": self.rollout,
            "rows": self.rows,
            "done": self.done,
            "steps": [self.passes, self.minibatches, self.accumulate, self.world],
            "whole": stored(self.whole) if going and self.whole is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that were delivered.

        Raises:
            UserError: the checkpoint is from the middle of a rollout that was to be cut into other steps.
        """
        self.rollout, self.done = state["rollout"], state["done"]
        self._resume = state["whole"] is not None
        if self.rows != state["rows"]:  # the rollout that is trained on stands in the checkpoint
            log.info("the prompts are others than those of the checkpoint; the next rollout takes the new")
        if not self._resume:
            return
        if state["steps"] != [self.passes, self.minibatches, self.accumulate, self.world]:
            raise UserError(
                "the checkpoint is from the middle of a rollout with other steps: --model.epochs, --model.minibatches, "
                "--trainer.accumulate_grad_batches and the number of processes must be the same; resume with them, or "
                "from the end of a rollout"
            )
        self.whole = restored(state["whole"])


def _totals(whole: Trajectory, tree: int) -> Totals:
    """What one tree of a rollout adds to the totals of its step."""
    span = whole.structure()[tree]
    if not span.responses:
        return Totals(0.0, 0, 0)
    return Totals(float(whole.weight[span.cut : span.stop].sum()), len(span.responses), 1)


def check_room(algorithm: Any, loader: PromptLoader) -> None:
    """That the longest minibatch there can be fits, before hours are spent on sampling.

    Raises:
        UserError: it does not, or prompts cannot be cut into equal minibatches; it names the settings that fit.
    """
    parts, budget, samples = algorithm.minibatches, algorithm.budget, algorithm.samples
    if loader.size % parts:
        raise UserError(
            f"--data.batch_size {loader.size} prompts cannot be cut into --model.minibatches {parts} equal parts; set "
            f"--data.batch_size {-(-loader.size // parts) * parts}"
        )
    longest = max((len(prompt.tokens) for prompt in loader.prompts), default=0)
    new, trainer = algorithm.sampling.max_new_tokens, algorithm.trainer
    tree = longest + samples * new
    if tree > budget:
        raise UserError(
            f"a prompt of {longest} tokens with {samples} answers of {new} may have {tree} tokens but a micro-batch "
            f"holds {budget}; set --data.max_tokens {tree} or more, or fewer --model.samples"
        )
    step = loader.size // parts
    trees = -(-step // (trainer.accumulate_grad_batches * trainer.world_size))
    if trees * tree > budget:
        wanted = -(-step // (budget // tree * trainer.world_size))
        raise UserError(
            f"a micro-batch of {trees} prompts may have {trees * tree} tokens but --data.max_tokens is {budget}; set "
            f"--trainer.accumulate_grad_batches {wanted}, --data.max_tokens {trees * tree} or more --model.minibatches"
        )
