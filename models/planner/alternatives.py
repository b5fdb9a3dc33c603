"""The same run with its weights stored and trained in other ways, and what makes a run fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from leyden.algorithm.algorithm import Algorithm
from leyden.cli import class_names
from leyden.cli.config_keys import read
from leyden.models.planner.blueprint import base_path
from leyden.models.planner.budget import budget
from leyden.models.planner.memory import FLOAT, HALF
from leyden.models.planner.outline import Optimizer
from leyden.models.planner.settings import Choice, Part, Settings
from leyden.precision import fast_bfloat16

Say = Callable[[Settings], str]
Change = Callable[[Settings], Settings]
LORA = "--config lora --model.policy.dtype bfloat16 --trainer.precision bf16-mixed"
SHORTEST = 256
"""Rows are not advised to be cut below this."""


class Alternative(NamedTuple):
    """A way to store and train the weights."""

    name: str
    flags: str
    """What to type for it"""
    settings: Settings


def alternatives(settings: Settings) -> list[Alternative]:
    """Full training in three precisions, LoRA and QLoRA of the same run."""
    policy = settings.policy
    bare, half = replace(policy, path=base_path(policy.path)), settings.cuda or fast_bfloat16()
    stored = policy.choice.adapter is None and bare.path != policy.path  # an adapter that training goes on with
    adapter = policy.choice.adapter or (None if stored else shipped_adapter())
    under = policy if stored else bare
    old = policy.choice
    kinds = [
        ("full, float32", "--model.policy.dtype float32", bare, Choice()),
        ("full, bf16-mixed", "--trainer.precision bf16-mixed", bare, Choice(autocast=True)),
        ("full, bfloat16", "--model.policy.dtype bfloat16", bare, Choice(HALF)),
        ("LoRA on bfloat16", LORA, under, Choice(HALF, half, adapter)),
        ("QLoRA", "--config qlora", under, Choice(HALF, half, adapter, True, old.double, old.keep)),
    ]
    return [Alternative(name, flags, _with(settings, part, choice)) for name, flags, part, choice in kinds]


def _with(settings: Settings, part: Part, choice: Choice) -> Settings:
    """The run with this choice for all models that are built for training."""

    def other(found: Part | None) -> Part | None:
        if found is None:
            return None
        own = found.choice
        return replace(found, choice=replace(choice, size=own.size, adapter=own.adapter))

    return replace(
        settings,
        policy=replace(part, choice=choice),
        reference_model=other(settings.reference_model),
        value_model=other(settings.value_model),
    )


def shipped_adapter() -> Any:
    """The adapter of the config `lora`."""
    from peft import LoraConfig

    content, _ = read(class_names.configs()["lora"])
    return LoraConfig(**content["model"]["init_args"]["policy"]["init_args"]["adapter"]["init_args"])


def total(settings: Settings, room: float | None = None) -> float:
    """Bytes of one device."""
    return budget(settings.run(), room).total


def remedies(settings: Settings, room: float) -> Iterator[tuple[str, float]]:
    """What to change, one thing after the other until the run fits: flags, and the bytes with these and all before."""
    for flags, changed in _changes(settings):
        settings = changed(settings)
        size = total(settings, room)
        yield flags(settings), size
        if size <= room:
            return


def _changes(settings: Settings) -> Iterator[tuple[Say, Change]]:
    """Remedies in the order in which they cost least: how to type them, and what they do."""
    run, choice = settings.run(), settings.policy.choice
    ways = {way.name: way.settings.policy.choice for way in alternatives(settings)}
    if run.tokens > settings.row or settings.rows > 1:
        yield _accumulation, _one_row
    if any(part and part.choice.size == FLOAT for part, _ in settings.rewards):
        yield (lambda _: "--model.reward.dtype bfloat16"), _half_rewards
    if any(tokens > settings.row for _, tokens in settings.rewards):
        yield (lambda s: f"--model.reward.batch_tokens {s.rewards[0][1]}"), _few_scored
    if not settings.policy.checkpointing:
        yield (lambda _: "--model.policy.gradient_checkpointing true"), _checkpointing
    if not run.policy.adapted:
        yield (lambda _: LORA), lambda s: _with(s, s.policy, ways["LoRA on bfloat16"])
    if not choice.quantised:
        yield (lambda _: "--config qlora, instead of lora"), lambda s: _with(s, s.policy, ways["QLoRA"])
    length = settings.max_length
    while length // 2 >= max(SHORTEST, 2 * settings.new):
        length //= 2
        yield _shorter, partial(_cut, length=length)


def _cut(settings: Settings, length: int) -> Settings:
    return _one_row(replace(settings, max_length=length))


def _one_row(settings: Settings) -> Settings:
    """One row in a micro-batch."""
    step = -(-settings.batch_size // settings.minibatches)
    return replace(settings, max_tokens=settings.row, accumulate=-(-step // settings.devices))


def _accumulation(settings: Settings) -> str:
    return f"--data.max_tokens {settings.max_tokens} --trainer.accumulate_grad_batches {settings.accumulate}"


def _shorter(settings: Settings) -> str:
    return f"--data.max_length {settings.max_length} --data.max_tokens {settings.max_tokens} (longer rows are left out)"


def _checkpointing(settings: Settings) -> Settings:
    value = settings.value_model and replace(settings.value_model, checkpointing=True)
    return replace(settings, policy=replace(settings.policy, checkpointing=True), value_model=value)


def _half_rewards(settings: Settings) -> Settings:
    rewards = [(part and replace(part, choice=replace(part.choice, size=HALF)), n) for part, n in settings.rewards]
    return replace(settings, rewards=tuple(rewards))


def _few_scored(settings: Settings) -> Settings:
    return replace(settings, rewards=tuple((part, settings.row) for part, _ in settings.rewards))


def rule_of_thumb(settings: Settings) -> dict[str, float]:
    """Bytes by name of alternative for what the rule of 60, 16 and 6 GB is about: supervised training of 7 B
    parameters on one row of 2,048 tokens at a time, with gradient checkpointing."""
    plain = replace(settings, algorithm=Algorithm, rewards=(), reference_model=None, value_model=None, value="none")
    plain = replace(plain, batch_size=1, accumulate=1, minibatches=1, responses=1, kept=1, new=0, devices=1)
    plain = replace(plain, max_tokens=2048, max_length=2048, sharded=False, optimizer=Optimizer(fused=True))
    return {way.name: total(way.settings) for way in alternatives(_checkpointing(plain))}
