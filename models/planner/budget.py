"""The memory of a run on one device, item by item: what stays, and what each phase of the run adds for a while."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from leyden.models.generation.decoder import MEMORY, READ, ROWS
from leyden.models.generation.packed_weights import MOST
from leyden.models.planner import memory
from leyden.models.planner.memory import FLOAT
from leyden.models.planner.outline import Item, Model, PlannedRun, Sampling

PROCESS = {"cpu": 0.57e9, "cuda": 0.5e9}
"""Bytes of a run before it has a model. On a CPU these are Python and the libraries, measured with the embedded model;
on a GPU the CUDA context with the kernels and work spaces of its libraries."""
WORK_SPACE = {"cpu": 15e6, "cuda": 0.0}
"""Other bytes of runs of any size, 8 to 21 MB as measured by benchmarks/memory.py: the work space of matrix products,
and Python objects of every layer."""


@dataclass(frozen=True)
class Budget:
    """Bytes of one device."""

    kept: list[Item]
    """Items that stay for the whole run"""
    phases: dict[str, list[Item]]
    """Items that each phase adds"""

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
    """Memory of a run on each of its devices.

    Args:
        room: bytes of the device; sampling on a GPU takes half of the free ones.
    """
    kept = [item for item in [*_policy(run), *_others(run)] if item.size]
    phases = {
        "training": _training(run),
        "the optimizer steps": _step(run),
        "looking without gradients": _evaluation(run),
    }
    if run.sampling is not None:
        phases["sampling"] = _sampling(run, run.sampling, None if room is None else room - _sum(kept))
    return Budget(kept, {name: [item for item in items if item.size] for name, items in phases.items()})


def _policy(run: PlannedRun) -> list[Item]:
    """Weights, gradients and optimizer state of the policy."""
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
        outer = (policy.plan.total - policy.plan.shape.linear) * policy.how.weight
        layers = 2 * max(policy.base - outer, 0.0) / policy.plan.shape.layers
        items.append(Item("gathered weights", layers + outer, "two layers, embeddings and head", "weights"))
    return items


def _others(run: PlannedRun) -> list[Item]:
    """Items of the reference, value model, reward models and the process itself."""
    items, policy = [], run.policy
    if isinstance(run.reference, Model):
        items.append(Item("reference model", run.reference.base, "another model"))
    elif run.reference in ("copy", "snapshot"):
        items.append(Item(f"reference, {run.reference}", policy.gradients / run.share, "what is trained, once more"))
    if run.teacher is not None:
        items.append(Item("teacher model", (run.teacher.base + run.teacher.own) / run.share, "another model"))
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
    alternative = _activations(run, replace(policy, checkpointing=not policy.checkpointing))
    note = f"{alternative / 1e9:,.2f} GB with{'out' * policy.checkpointing} gradient checkpointing"
    items = [Item("activations", _activations(run, policy), f"{run.tokens:,} tokens; {note}")]
    if isinstance(run.value, Model):
        items.append(Item("activations of values", _activations(run, run.value)))
    elif run.value == "adapter":
        items.append(Item("activations of values", _activations(run, policy)))
    head = memory.logits(run.predicted, shape, how) if policy.language else 0
    if (teacher := run.teacher) is not None:
        head += memory.logits(run.predicted, teacher.plan.shape, teacher.how)
        items.append(Item("the teacher's forward pass", memory.forward(run.tokens, teacher.plan.shape, teacher.how)))
    reference = memory.forward(run.tokens, shape, how) if run.reference != "none" else 0
    # gradients of the step before are freed by now, so their memory is available
    backward = memory.passing(run.tokens, shape, policy.plan.kept, how, policy.checkpointing) - policy.gradients
    if backward > head + reference:
        return [*items, Item("a layer's backward pass", backward)]
    return [*items, Item("logits", head), Item("the reference's forward pass", reference)]


def _activations(run: PlannedRun, model: Model) -> int:
    return memory.activations(run.tokens, model.plan.shape, model.plan.kept, model.how, model.checkpointing)


def _step(run: PlannedRun) -> list[Item]:
    """Work space of the optimizer step, which needs no activations."""
    size = 0
    for model in run.learners:
        for width, count in model.trained.items():
            largest = max(model.plan.shape.largest, model.plan.shape.vocabulary * model.plan.shape.hidden)
            largest = largest if width == model.how.weight and not model.adapted else 0
            size += memory.step(count, min(largest, count), width, run.optimizer.in_place, model.how.cuda)
    return [Item("work space of the optimizer", size / run.share)]


def _evaluation(run: PlannedRun) -> list[Item]:
    """Forward passes without gradients: validation, log-probabilities and values of rollouts, rewards."""
    policy, shape = run.policy, run.policy.plan.shape
    head = memory.logits(run.looked, shape, policy.how) if policy.language else 0
    policy_pass = memory.forward(run.looked, shape, policy.how) + head
    scoring = [
        memory.forward(tokens, (model or policy).plan.shape, (model or policy).how) for model, tokens in run.rewards
    ]
    return [Item("a forward pass", max(policy_pass, *scoring) if scoring else policy_pass, f"{run.looked:,} tokens")]


def _sampling(run: PlannedRun, sampling: Sampling, free: float | None) -> list[Item]:
    """KV cache and work space of sampling in `leyden.models.generation.decoder`."""
    shape, how = run.policy.plan.shape, run.policy.how
    tokens = sampling.new + sampling.longest * min(2, sampling.samples) // sampling.samples
    row = tokens * shape.layers * 2 * shape.key * how.weight
    most = ROWS["cuda" if how.cuda else "cpu"]
    if not how.cuda:
        most = min(most, MEMORY // row)
    elif free is not None:
        most = min(most, int(free // 2) // row)
    rows = max(1, min(most, sampling.waiting))
    prompts = min(rows, -(-sampling.waiting // sampling.samples), 2 * -(-rows // sampling.samples))
    size = memory.cache(rows, prompts, sampling.longest, sampling.new, shape, how)
    work = max(memory.choosing(rows, shape, how), memory.forward(min(READ, prompts * sampling.longest), shape, how))
    items = [Item("keys and values", size, f"{rows} answers side by side"), Item("choosing tokens", work)]
    gathered = (run.policy.base + run.policy.own) * (1 - 1 / run.share)
    items.append(Item("weights put together", gathered))
    packed = 0 if how.cuda or how.autocast or how.weight == FLOAT else how.weight * shape.linear
    return [*items, Item("weights laid out anew", packed if packed <= MOST else 0)]
