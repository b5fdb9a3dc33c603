"""The settings of a configuration that decide its memory and its numbers of tokens at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from leyden.algorithm.with_reference import WithReference
from leyden.data.step_plan import plan_steps
from leyden.models.planner.blueprint import blueprint
from leyden.models.planner.memory import FLOAT, Arithmetic
from leyden.models.planner.outline import Model, Optimizer, PlannedRun, Sampling
from leyden.on_policy.on_policy import OnPolicy
from leyden.on_policy.rollout_loader import largest_shares
from leyden.policy.engine import CHUNK


@dataclass(frozen=True)
class Choice:
    """Storage and training of a model's weights, in which the alternatives differ."""

    size: int = FLOAT
    """Bytes of a weight that is not quantised"""
    autocast: bool = False
    adapter: Any = None
    """A new adapter's PEFT configuration"""
    quantised: bool = False
    double: bool = True
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """A model of the run: its source and its options."""

    path: str
    flag: str
    choice: Choice
    checkpointing: bool = False
    source: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Settings:
    """All settings of a configuration that decide the memory of a run."""

    algorithm: type
    policy: Part
    optimizer: Optimizer
    batch_size: int
    max_tokens: int
    max_length: int
    accumulate: int
    responses: int
    """Responses per prompt, in the rows or sampled"""
    kept: int
    """Sampled responses per prompt that are trained on"""
    minibatches: int = 1
    passes: int = 1
    new: int = 0
    """Tokens of the longest sampled answer"""
    reference: str = "auto"
    value: str = "none"
    reference_model: Part | None = None
    value_model: Part | None = None
    teacher_model: Part | None = None
    rewards: tuple[tuple[Part | None, int], ...] = ()
    """Reward models, None for an adapter on the policy's base, each with its tokens per forward pass"""
    devices: int = 1
    sharded: bool = False
    buckets: bool = False
    cuda: bool = False
    lengths: tuple[int, ...] = ()
    """Tokens of every row with its responses, of prompts alone where answers are sampled; empty: not known, and rows
    are taken to be as long as `max_length` lets them be"""
    seed: int = 0

    @property
    def sampled(self) -> bool:
        return issubclass(self.algorithm, OnPolicy)

    @property
    def row(self) -> int:
        """Tokens of the longest row: a prompt with its responses."""
        if self.sampled:
            return self.prompt + self.kept * self.new
        return max(self.lengths) if self.lengths else self.max_length * self.responses

    @property
    def prompt(self) -> int:
        """Tokens of the longest prompt that is answered."""
        return max(self.lengths) if self.lengths else self.max_length - self.new

    @property
    def rows(self) -> int:
        """Most rows in a micro-batch."""
        if self.sampled and self.devices > 1:
            return self._shares[1]
        step = -(-self.batch_size // self.minibatches)
        return -(-step // (self.accumulate * self.devices))

    @property
    def _shares(self) -> tuple[int, int]:
        """The most prompts that one device answers, and that a micro-batch of it holds."""
        return largest_shares(self.batch_size, self.passes, self.minibatches, self.accumulate, self.devices, self.seed)

    def _micro_batch(self) -> int:
        """Most tokens in a micro-batch."""
        if self.sampled or not self.lengths:
            return min(self.max_tokens, self.rows * self.row)
        parts = (range(len(self.lengths)), self.lengths, self.batch_size, sum(self.lengths), self.accumulate)
        plan = plan_steps(*parts, self.devices, self.seed)
        return min(self.max_tokens, max(sum(self.lengths[r] for r in step[0]) for step in plan.steps))

    def _without_gradients(self) -> int:
        """Most tokens in a forward pass without gradients, whose batches hold rows of about one length."""
        if self.lengths and not self.sampled:
            longest = sum(sorted(self.lengths)[-self.batch_size :])
        else:
            longest = self.batch_size * (self.row + (self.responses - self.kept) * self.new)
        return min(max(self.max_tokens, self.max_length), longest)

    def run(self) -> PlannedRun:
        """The models and sizes of the run."""
        tokens = self._micro_batch()
        predicted = min(tokens, self.rows * self.kept * self.new) if self.sampled else tokens
        heads = {"score", "value"} & set(self.wants)
        policy = self._model(self.policy, len(heads), bool({"logp", "entropy", "mean_logp"} & set(self.wants)))
        return PlannedRun(
            policy,
            tokens,
            predicted,
            self._without_gradients(),
            self.optimizer,
            self._reference(policy),
            self._value(policy),
            None if self.teacher_model is None else self._model(self.teacher_model),
            tuple((self._model(p, 1, False, alone=True) if p else None, tokens) for p, tokens in self.rewards),
            self._sampling(),
            self.devices,
            self.sharded,
            self.buckets and self.devices > 1,
        )

    @property
    def wants(self) -> tuple[str, ...]:
        """Outputs that the algorithm needs from the policy, such as `logp` and `value`."""
        outputs: tuple[str, ...] = getattr(self.algorithm, "wants", ("logp",))
        critic = self.value_model is not None or (self.value == "adapter" and self.policy.choice.adapter is not None)
        return tuple(name for name in outputs if name != "value") if critic else outputs

    def _model(self, part: Part, heads: int = 0, language: bool = True, alone: bool = False) -> Model:
        """A model in numbers. `alone`: it is a reward model, which is neither quantised nor run under autocast."""
        choice = part.choice
        how = Arithmetic(choice.size, choice.autocast and not alone, choice.quantised and not alone, self.cuda)
        plan = blueprint(part.path, choice.adapter, choice.keep, part.flag, **dict(part.source))
        return Model(plan, how, choice.double, plan.adapter > 0, heads, language, part.checkpointing)

    def _reference(self, policy: Model) -> Any:
        if not issubclass(self.algorithm, WithReference) or self.reference in ("precomputed", "none"):
            return "none"
        if self.reference_model is not None:
            return self._model(self.reference_model)
        if not policy.adapted:
            return "copy"
        cheapest = "adapter_off" if self.policy.choice.adapter is not None else "snapshot"
        return cheapest if self.reference == "auto" else self.reference

    def _value(self, policy: Model) -> Model | Literal["none", "adapter"]:
        if self.value_model is not None:
            return self._model(self.value_model, 1, False)
        return "adapter" if self.value == "adapter" and policy.adapted else "none"

    def _sampling(self) -> Sampling | None:
        if not self.sampled:
            return None
        prompts = min(max(1, CHUNK // self.responses), self._shares[0])
        return Sampling(prompts * self.responses, self.responses, self.prompt, self.new)
