"""What one device holds in a run, item by item: what stays there, and what each phase of the run adds for a while."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from leyden.models.generation.decoder import MEMORY, READ, ROWS
from leyden.models.generation.packed_weights import MOST
from leyden.models.planner import memory
from leyden.models.planner.memory import FLOAT
from leyden.models.planner.outline import Item, Model, PlannedRun, Sampling

PROCESS = {"cpu": 0.57e9, "cuda": 0.5e9}
"""Bytes of a run before it has a model. On a processor Python and the libraries, measured with the embedded model; on a
GPU the context of CUDA with the kernels and work spaces of its libraries."""
WORK_SPACE = {"cpu": 15e6, "cuda": 0.0}
"""What else runs of any size held: measured by benchmarks/memory.py, 8 to 21 MB. Matrix products have a work space, and
Python keeps something of every layer."""


@dataclass(frozen=True)
class Budget:
    """Bytes of one device."""

    kept: list[Item]
    """What is there all the time"""
    phases: dict[str, list[Item]]
    """What each phase adds"""

    @property
    def largest(self) -> str:
        """The phase that adds most."""
        return max(self.phases, key=lambda name: _sum(self.phases[name]))

    @property
    def total(self) -> float:
        return _sum(self.kept) + _sum(self.phases[self.largest])


def _sum(items: Iterable[Item]) -> float:
    return sum(item.size for item in items)


def budget(run: PlannedRun, room: float | None = None) -> Budget:
    """What a run holds on each of its devices.

    Args:
        room: bytes of the device; sampling on a GPU takes half of what is free.
    """
    kept = [item for item in [*_policy(run), *_others(run)] if item.size]
    phases = {"training": _training(run), "the optimizer steps": _step(run), "looking without gradients": _looking(run)}
    if run.sampling is not None:
        phases["sampling"] = _sampling(run, run.sampling, None if room is None else room - _sum(kept))
    return Budget(kept, {name: [item for item in items if item.size] for name, items in phases.items()})


def _policy(run: PlannedRun) -> list[Item]:
    """Weights, gradients and optimizer of what is trained."""
    policy = run.policy
    note = f"{policy.own / FLOAT / 1e6:.1f} M parameters in float32"
    items = [
        *policy.weights(),
        Item("adapter and heads", policy.own, note, "weights"),
        Item("gradients", policy.gradients, kind="training"),
        Item(f"optimizer ({run.optimizer.name})", run.optimizer.state(policy), kind="training"),
    ]
    items = [replace(item, size=item.size / run.share) for item in items]
    if run.buckets:
        items.append(Item("gradients on their way", policy.gradients, "DDP's copies", "training"))
    if run.sharded:
        ends = (policy.plan.total - policy.plan.shape.linear) * policy.how.weight
        layers = 2 * max(policy.base - ends, 0.0) / policy.plan.shape.layers
        items.append(Item("gathered weights", layers + ends, "two layers, embeddings and head", "weights"))
    return items


def _others(run: PlannedRun) -> list[Item]:
    """Reference, value model, reward models and the process itself."""
    items, policy = [], run.policy
    if isinstance(run.reference, Model):
        items.append(Item("reference model", run.reference.base, "another model"))
    elif run.reference in ("copy", "snapshot"):
        items.append(Item(f"reference, {run.reference}", policy.gradients / run.share, "what is trained, once more"))
    if isinstance(run.value, Model):
        model = run.value
        size = model.base + model.own + model.gradients + run.optimizer.state(model)
        items.append(Item("value model", size / run.share, "weights, gradients and optimizer"))
    elif run.value == "adapter":
        size = FLOAT * (policy.plan.adapter + policy.plan.shape.hidden)
        state = memory.optimizer(run.optimizer.name, size // FLOAT, FLOAT, run.optimizer.momentum)
        items.append(Item("value adapter", 2 * size + state, "weights, gradients and optimizer"))
    for scorer, _ in run.rewards:
        if scorer is None:
            items.append(Item("reward model", FLOAT * policy.plan.adapter, "an adapter on the policy's base"))
        else:
            note = f"{scorer.plan.total / 1e6:,.0f} M parameters"
            items.append(Item("reward model", scorer.base + scorer.own, note))
    device = "cuda" if policy.how.cuda else "cpu"
    return [*items, Item("the process itself", PROCESS[device] + WORK_SPACE[device])]


def _training(run: PlannedRun) -> list[Item]:
    policy, shape, how = run.policy, run.policy.plan.shape, run.policy.how
    other = _activations(run, replace(policy, checkpointing=not policy.checkpointing))
    note = f"{other / 1e9:,.2f} GB with{'out' * policy.checkpointing} gradient checkpointing"
    items = [Item("activations", _activations(run, policy), f"{run.tokens:,} tokens; {note}")]
    if isinstance(run.value, Model):
        items.append(Item("activations of values", _activations(run, run.value)))
    elif run.value == "adapter":
        items.append(Item("activations of values", _activations(run, policy)))
    head = memory.logits(run.predicted, shape, how) if policy.language else 0
    compared = memory.forward(run.tokens, shape, how) if run.reference != "none" else 0
    # gradients of the step before are gone by now, so there is as much room as they took
    passing = memory.passing(run.tokens, shape, policy.plan.kept, how, policy.checkpointing) - policy.gradients
    if passing > head + compared:
        return [*items, Item("a layer's backward pass", passing)]
    return [*items, Item("logits", head), Item("the reference's forward pass", compared)]


def _activations(run: PlannedRun, model: Model) -> int:
    return memory.activations(run.tokens, model.plan.shape, model.plan.kept, model.how, model.checkpointing)


def _step(run: PlannedRun) -> list[Item]:
    """The optimizer's step needs work space, but no activations."""
    size = 0
    for model in run.learners:
        for width, count in model.trained.items():
            largest = max(model.plan.shape.largest, model.plan.shape.vocabulary * model.plan.shape.hidden)
            largest = largest if width == model.how.weight and not model.adapted else 0
            size += memory.step(count, min(largest, count), width, run.optimizer.in_place, model.how.cuda)
    return [Item("work space of the optimizer", size / run.share)]


def _looking(run: PlannedRun) -> list[Item]:
    """Forward passes without gradients: validation, rollouts looked at again, rewards."""
    policy, shape = run.policy, run.policy.plan.shape
    head = memory.logits(run.looked, shape, policy.how) if policy.language else 0
    own = memory.forward(run.looked, shape, policy.how) + head
    scoring = [
        memory.forward(tokens, (model or policy).plan.shape, (model or policy).how) for model, tokens in run.rewards
    ]
    return [Item("a forward pass", max(own, *scoring) if scoring else own, f"{run.looked:,} tokens")]


def _sampling(run: PlannedRun, asked: Sampling, free: float | None) -> list[Item]:
    """As `leyden.models.generation.decoder` does it."""
    shape, how = run.policy.plan.shape, run.policy.how
    tokens = asked.new + asked.longest * min(2, asked.samples) // asked.samples
    row = tokens * shape.layers * 2 * shape.key * how.weight
    most = ROWS["cuda" if how.cuda else "cpu"]
    if not how.cuda:
        most = min(most, MEMORY // row)
    elif free is not None:
        most = min(most, int(free // 2) // row)
    rows = max(1, min(most, asked.waiting))
    prompts = min(rows, -(-asked.waiting // asked.samples), 2 * -(-rows // asked.samples))
    size = memory.cache(rows, prompts, asked.longest, asked.new, shape, how)
    work = max(memory.choosing(rows, shape, how), memory.forward(min(READ, prompts * asked.longest), shape, how))
    items = [Item("keys and values", size, f"{rows} answers side by side"), Item("choosing tokens", work)]
    whole = (run.policy.base + run.policy.own) * (1 - 1 / run.share)
    items.append(Item("weights put together", whole))
    laid_out = 0 if how.cuda or how.autocast or how.weight == FLOAT else how.weight * shape.linear
    return [*items, Item("weights laid out anew", laid_out if laid_out <= MOST else 0)]
