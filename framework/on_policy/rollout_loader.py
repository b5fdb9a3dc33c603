"""Prompts in, batches out: a rollout is sampled when the first of its minibatches is asked for, and then trained on.

Every process keeps the prompts that it answered. Which prompts make which optimizer step is the same for any number of
processes: a permutation of the whole rollout, drawn anew for every pass. Who answers which prompt is decided before, so
that every process has about equally many in each of these steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from leyden.batch.trajectory import Trajectory
from leyden.batch.tree import Totals, Tree
from leyden.data.prompts import Prompt, PromptLoader
from leyden.data.step_plan import balance
from leyden.distributed import Reduce, one_process
from leyden.errors import UserError

log = logging.getLogger("leyden")


class LocalStep(NamedTuple):
    """What one process has of one optimizer step."""

    micro_batches: list[list[int]]
    """Numbers of trees, one list for each micro-batch that it runs"""
    totals: Totals
    """Of all processes"""


class RolloutLoader:
    """The minibatches of one process, rollout after rollout: `passes` times over each, in `minibatches` steps.

    Sized, so that Lightning asks for a batch only when it is due and a rollout is sampled with the weights of the step
    before. Stateful: a checkpoint holds the rollout that is being trained on, and resuming goes on in the middle of it.

    Args:
        collect: samples and scores this process's part of the rollout of this number.
        prompts: what is drawn from.
        passes: over each rollout.
        minibatches: optimizer steps a pass.
        accumulate: micro-batches a process runs in one step.
        world: number of processes.
        rank: which of them this is.
        reduce: sums a tensor over processes.
        gather: the trajectories of all processes, on the first; None on the others.
        fingerprint: of the prompts, as the DataModule says it.
    """

    def __init__(
        self,
        collect: Callable[[int, list[tuple[int, Prompt]]], Trajectory],
        prompts: PromptLoader,
        passes: int,
        minibatches: int,
        accumulate: int = 1,
        world: int = 1,
        rank: int = 0,
        reduce: Reduce = one_process,
        gather: Callable[[Trajectory], list[Trajectory] | None] = lambda x: [x],
        fingerprint: str = "",
    ) -> None:
        self.collect, self.prompts, self.passes, self.minibatches = collect, prompts, passes, minibatches
        self.accumulate, self.world, self.rank = accumulate, world, rank
        self.reduce, self.gather, self.fingerprint = reduce, gather, fingerprint
        self.rollout, self.done, self._resume = -1, 0, False
        self.batch: Trajectory | None = None
        """This process's part of the rollout that is being trained on."""
        self.draws = list(range(prompts.size))
        """The number of the draw in each place of that rollout; a resumed run may have more or fewer places from the
        next one on."""
        self.replacements = 0
        """Prompts that were drawn so far to take the place of others."""
        self._steps: list[LocalStep] = []

    def __len__(self) -> int:
        return self.passes * self.minibatches * self.accumulate

    def stop(self) -> None:
        """Leave the rest of this rollout out. To be called on every process."""
        self.done = len(self)

    def __iter__(self) -> Iterator[Trajectory]:
        if not self._resume:
            # reset here and not after the last batch, since Lightning does not exhaust the iterator
            self.rollout, self.done, self.batch = self.rollout + 1, 0, None
            self.draws = self._first_draws(self.rollout)
            self.batch = self.collect(self.rollout, self.share(self.rollout))
            self._steps = []
        self._resume = False
        assert self.batch is not None
        if not self._steps:
            self._steps = self._plan(self.batch)
        while self.done < len(self):
            step, part = divmod(self.done, self.accumulate)
            self.done += 1
            yield self._micro_batch(self.batch, self._steps[step], part)

    # -- who has what ------------------------------------------------------------------------------------------------

    def share(self, rollout: int) -> list[tuple[int, Prompt]]:
        """This process's prompts of a rollout, each with the number of its draw, before any is replaced."""
        draws = self._first_draws(rollout)
        owners = self.owners(rollout, len(draws))
        return self.prompts.drawn(n for n, owner in zip(draws, owners, strict=True) if owner == self.rank)

    def refill(self, places: Sequence[int]) -> list[tuple[int, Prompt]]:
        """Let the next prompts of the sequence take these places of the present rollout, and give back this process's.
        To be called with the same places on every process."""
        owners, mine = self.owners(self.rollout, len(self.draws)), list[int]()
        for number, place in enumerate(places, self._first_draws(self.rollout)[-1] + 1):
            self.draws[place] = number
            mine += [number] if owners[place] == self.rank else []
        self.replacements += len(places)
        return self.prompts.drawn(mine)

    def places(self, draws: Iterable[int]) -> list[int]:
        """Where these draws stand in the present rollout."""
        place = {draw: at for at, draw in enumerate(self.draws)}
        return [place[draw] for draw in draws]

    def _first_draws(self, rollout: int) -> list[int]:
        first = rollout * self.prompts.size + self.replacements
        return list(range(first, first + self.prompts.size))

    def owners(self, rollout: int, size: int) -> tuple[int, ...]:
        """The process that answers each prompt of a rollout of this size."""
        if self.world == 1:
            return (0,) * size
        return _owners(size, self.world, tuple(map(tuple, self._order(rollout, size))))

    def _order(self, rollout: int, count: int) -> list[list[int]]:
        """The optimizer steps of a rollout: for each the numbers of its prompts, among those that have responses."""
        return steps_of(rollout, count, self.passes, self.minibatches, self.prompts.seed)

    def _plan(self, batch: Trajectory) -> list[LocalStep]:
        """Find this process's trees in the steps of the whole rollout, and the totals of all processes."""
        spans, places = batch.structure(), self.places(batch.draw.tolist())
        there = torch.zeros(len(self.draws), dtype=torch.float64)
        there[places] = 1.0
        there = self.reduce(there)
        number = (there.cumsum(0) - 1).long().tolist()  # prompts whose responses are all left out have none
        mine = {number[place]: tree for tree, place in enumerate(places)}
        lengths, totals = [span.stop - span.start for span in spans], [_totals(batch, tree) for tree in mine.values()]
        steps = [[mine[n] for n in step if n in mine] for step in self._order(self.rollout, int(there.sum()))]
        sums = [sum((totals[tree] for tree in trees), Totals(0.0, 0, 0)) for trees in steps]
        whole = self.reduce(torch.tensor(sums, dtype=torch.float64)).tolist()
        return [
            LocalStep(balance(trees, lengths, self.accumulate), Totals(tokens, int(responses), int(prompts)))
            for trees, (tokens, responses, prompts) in zip(steps, whole, strict=True)
        ]

    @staticmethod
    def _micro_batch(batch: Trajectory, step: LocalStep, part: int) -> Trajectory:
        """One micro-batch; without responses left for it, a few tokens of weight 0 that every process can run."""
        trees, spans = step.micro_batches[part], batch.structure()
        if len(trees) == len(spans) > 0:
            return replace(batch, totals=step.totals)
        if trees:
            return replace(batch.select(sorted(trees)), totals=step.totals)
        somewhere = batch.tokens[spans[0].start :][:2].tolist() if spans else [0, 0]
        return replace(Trajectory.of([Tree(somewhere, [])]), totals=step.totals)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """With the whole rollout, in the order of its draws, whatever process holds it. To be called on all of them."""
        going = self.batch is not None and self.done < len(self)
        parts = self.gather(self.batch) if going and self.batch is not None else None
        return {
            "rollout": self.rollout,
            "prompts": self.fingerprint,
            "done": self.done,
            "draws": self.draws,
            "replacements": self.replacements,
            "steps": [self.passes, self.minibatches, self.accumulate, self.world],
            "trajectory": None if parts is None else in_order(parts).state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches that were delivered.

        Raises:
            UserError: the checkpoint is from the middle of a rollout that was to be cut into other steps.
        """
        self.rollout, self.done, self._steps = state["rollout"], state["done"], []
        self.replacements = state.get("replacements", 0)
        self._resume = state["trajectory"] is not None
        if self.fingerprint != state["prompts"]:  # the rollout that is trained on stands in the checkpoint
            log.info("the prompts are others than those of the checkpoint; the next rollout takes the new")
        if not self._resume:
            return
        if state["steps"] != [self.passes, self.minibatches, self.accumulate, self.world]:
            raise UserError(
                "the checkpoint is from the middle of a rollout with other steps: --model.epochs, --model.minibatches, "
                "--trainer.accumulate_grad_batches and the number of processes must be the same; resume with them, or "
                "from the end of a rollout"
            )
        batch = Trajectory.from_state_dict(state["trajectory"])
        first = self.rollout * state["size"] if "size" in state else 0  # of a checkpoint from before any was replaced
        self.draws = state.get("draws") or list(range(first, first + state["size"]))
        if self.world > 1:
            owner = dict(zip(self.draws, self.owners(self.rollout, len(self.draws)), strict=True))
            batch = batch.select([n for n, draw in enumerate(batch.draw.tolist()) if owner[draw] == self.rank])
        self.batch = batch


def steps_of(rollout: int, prompts: int, passes: int, minibatches: int, seed: int) -> list[list[int]]:
    """The optimizer steps of a rollout: the numbers of the prompts in each."""
    steps = []
    for turn in range(passes):
        generator = torch.Generator().manual_seed(seed + 1_000_003 * (rollout * passes + turn + 1))
        order = torch.randperm(prompts, generator=generator).tolist()
        steps += [order[number::minibatches] for number in range(minibatches)]
    return steps


def largest_shares(
    prompts: int, passes: int, minibatches: int, accumulate: int, world: int, seed: int, rollouts: int = 16
) -> tuple[int, int]:
    """The most prompts of the first rollouts that one process answers, and that a micro-batch holds; on several
    processes a later rollout may have one more.

    Args:
        prompts: of a rollout.
    """
    answered = trained = 0
    for rollout in range(rollouts if world > 1 else 1):
        steps = steps_of(rollout, prompts, passes, minibatches, seed)
        owners = _owners(prompts, world, tuple(map(tuple, steps))) if world > 1 else (0,) * prompts
        answered = max(answered, *(owners.count(rank) for rank in range(world)))
        for step in steps:
            trained = max(trained, *(sum(owners[at] == rank for at in step) for rank in range(world)))
    return answered, -(-trained // accumulate)


@lru_cache(maxsize=32)
def _owners(size: int, world: int, steps: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Give each prompt to the process that is cheapest in its steps, and has fewest at all where these are equal. A
    process with n more prompts than a fair share of a step costs 4^n there, so that the largest share is kept low.

    Args:
        size: number of prompts.
        world: number of processes.
        steps: for each optimizer step the numbers of its prompts.

    Returns:
        The process of each prompt.
    """
    owners, loads = [0] * size, [[0] * world for _ in steps]
    of: list[list[int]] = [[] for _ in range(size)]
    for number, step in enumerate(steps):
        for at in step:
            of[at].append(number)
    fair, total = [len(step) // world for step in steps], [0] * world

    def cost(excess: int) -> int:  # times 4^8: in whole numbers every machine finds the same
        return 1 << 2 * max(0, excess + 8)

    for at in dict.fromkeys(at for step in steps for at in step):
        rank = min(range(world), key=lambda r: (sum(cost(loads[s][r] - fair[s]) for s in of[at]), total[r], r))
        owners[at] = rank
        total[rank] += 1
        for number in of[at]:
            loads[number][rank] += 1
    return tuple(owners)


def in_order(parts: Sequence[Trajectory]) -> Trajectory:
    """The parts of all processes as one, its prompts in the order of their draws."""
    if len(parts) == 1:
        return parts[0]
    whole = Trajectory.cat(parts)
    draws = whole.draw.tolist()
    return whole.select(sorted(range(len(draws)), key=draws.__getitem__))


def _totals(batch: Trajectory, tree: int) -> Totals:
    """What one tree adds to the totals of its step."""
    span = batch.structure()[tree]
    return Totals(float(batch.weight[span.cut : span.stop].sum()), len(span.responses), 1)


def check_room(algorithm: Any, loader: RolloutLoader) -> None:
    """That the longest prompt with its answers fits a micro-batch, before hours are spent on sampling. Where all
    prompts of a micro-batch may be too many together, it is cut in parts, which take the same step.

    Raises:
        UserError: it does not, or prompts cannot be cut into equal minibatches; it names the settings that fit.
    """
    prompts, parts, budget, responses = loader.prompts, algorithm.minibatches, algorithm.budget, algorithm.trained_on
    if prompts.size % parts:
        raise UserError(
            f"--data.batch_size {prompts.size} prompts cannot be cut into --model.minibatches {parts} equal parts; set "
            f"--data.batch_size {-(-prompts.size // parts) * parts}"
        )
    if prompts.size < loader.world:
        raise UserError(
            f"--data.batch_size {prompts.size} prompts are fewer than the {loader.world} processes that answer "
            f"them; set --data.batch_size {-(-loader.world // parts) * parts}, or fewer processes"
        )
    longest = max((len(prompt.tokens) for prompt in prompts.prompts), default=0)
    new = algorithm.sampling.max_new_tokens
    tree = longest + responses * new
    if tree > budget:
        raise UserError(
            f"a prompt of {longest} tokens with {responses} answers of {new} may have {tree} tokens but a micro-batch "
            f"holds {budget}; set --data.max_tokens {tree} or more, or fewer --model.samples"
        )
    cut = (prompts.size, loader.passes, parts, loader.accumulate, loader.world, prompts.seed)
    trees = largest_shares(*cut)[1] + (loader.world > 1)
    if loader.world > 1 and algorithm.drops_prompts:  # a step of fewer prompts may have them all on one process
        trees = -(-prompts.size // (parts * loader.accumulate))
    if trees * tree > budget:
        algorithm.micro_batches.limit_to(budget)
