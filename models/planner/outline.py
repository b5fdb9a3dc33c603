"""The numbers of a run: its models, its optimizer, and its largest numbers of tokens and rows at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from leyden.models.planner import memory
from leyden.models.planner.blueprint import Blueprint
from leyden.models.planner.memory import FLOAT, Arithmetic


@dataclass(frozen=True)
class Item:
    """An item of memory: one line of the breakdown."""

    name: str
    size: float
    """Bytes"""
    note: str = ""
    kind: Literal["weights", "training", "other"] = "other"


@dataclass(frozen=True)
class Model:
    """One model of a run."""

    plan: Blueprint
    how: Arithmetic
    double: bool = True
    """Scales of 4-bit blocks are quantised too"""
    adapted: bool = False
    """An adapter is trained. All weights are trained if this is false and the model is not quantised"""
    heads: int = 0
    """Number of scalar heads"""
    language: bool = True
    """The language-model head is used"""
    checkpointing: bool = False

    @property
    def base(self) -> float:
        """Bytes of the base model's weights, without adapter and scalar heads."""
        return sum(item.size for item in self.weights())

    def weights(self) -> list[Item]:
        """Items of the base model's weights, with four-bit weights as an item of their own."""
        four = self.plan.quantised if self.how.quantised else 0
        rest, name = self.plan.total - four, "other weights" if four else "weights"
        note = f"{rest / 1e6:,.0f} M parameters in {'float32' if self.how.weight == FLOAT else '16 bits'}"
        items = [Item(name, rest * self.how.weight, note, "weights")]
        if four:
            packed = memory.quantised(four, self.double)
            items.insert(0, Item("weights in 4 bits", packed, f"{four / 1e6:,.0f} M parameters", "weights"))
        return items

    @property
    def own(self) -> float:
        """Bytes of adapter and scalar heads."""
        return FLOAT * self._floats

    @property
    def trained(self) -> dict[int, int]:
        """Number of trained parameters, by their size in bytes."""
        counts = {FLOAT: self._floats}
        if not self.adapted and not self.how.quantised:
            size, count = self.how.weight, self.plan.reached - (0 if self.language else self.plan.head)
            counts[size] = counts.get(size, 0) + count
        return {size: count for size, count in counts.items() if count}

    @property
    def gradients(self) -> float:
        return sum(size * count for size, count in self.trained.items())

    @property
    def _floats(self) -> int:
        return self.heads * self.plan.shape.hidden + (self.plan.adapter if self.adapted else 0)


@dataclass(frozen=True)
class Optimizer:
    """The optimizer, as far as its memory depends on it."""

    name: str = "AdamW"
    momentum: bool = False
    fused: bool = False

    @property
    def in_place(self) -> bool:
        """Whether it needs no work space, as torch's fused kernels and those of bitsandbytes."""
        return self.fused or self.name.endswith(("8bit", "32bit")) or self.name.startswith("Paged")

    def state(self, model: Model) -> float:
        return sum(memory.optimizer(self.name, n, size, self.momentum) for size, n in model.trained.items())


@dataclass(frozen=True)
class Sampling:
    """Numbers of sampled answers."""

    waiting: int
    """Answers requested at a time"""
    samples: int
    """Answers per prompt"""
    longest: int
    """Tokens of the longest prompt"""
    new: int
    """Tokens of the longest answer"""


@dataclass(frozen=True)
class PlannedRun:
    """The models and sizes of a run. Numbers of tokens are those of one device at a time."""

    policy: Model
    tokens: int
    """Tokens in a micro-batch"""
    predicted: int
    """Predicted tokens among them"""
    looked: int
    """Tokens in a forward pass without gradients: validation, and log-probabilities and values of rollouts"""
    optimizer: Optimizer = field(default_factory=Optimizer)
    reference: Literal["none", "adapter_off", "snapshot", "copy"] | Model = "none"
    value: Literal["none", "adapter"] | Model = "none"
    teacher: Model | None = None
    """Another model that a run is distilled from"""
    rewards: tuple[tuple[Model | None, int], ...] = ()
    """Reward models, None for an adapter on the policy's base, each with its tokens per forward pass"""
    sampling: Sampling | None = None
    devices: int = 1
    sharded: bool = False
    """Weights, gradients and optimizer state are sharded over the devices"""
    buckets: bool = False
    """Gradients are copied for averaging over the devices"""

    @property
    def share(self) -> int:
        """Number of devices that share weights, gradients and optimizer state."""
        return self.devices if self.sharded else 1

    @property
    def learners(self) -> list[Model]:
        return [self.policy, *([self.value] if isinstance(self.value, Model) else [])]
