"""Alternatives to a run: other ways to store and train its weights, and remedies for a run that does not fit."""

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
"""Smallest row length, in tokens, that is advised."""


class Alternative(NamedTuple):
    """A way to store and train the weights."""

    name: str
    flags: str
    """Flags of `leyden fit` for it"""
    settings: Settings


def alternatives(settings: Settings) -> list[Alternative]:
    """Full training in three precisions, LoRA and QLoRA of the same run."""
    policy = settings.policy
    bare, half = replace(policy, path=base_path(policy.path)), settings.cuda or fast_bfloat16()
    stored = policy.choice.adapter is None and bare.path != policy.path  # an adapter whose training continues
    adapter = policy.choice.adapter or (None if stored else shipped_adapter())
    base = policy if stored else bare
    present = policy.choice
    kinds = [
        ("full, float32", "--model.policy.dtype float32", bare, Choice()),
        ("full, bf16-mixed", "--trainer.precision bf16-mixed", bare, Choice(autocast=True)),
        ("full, bfloat16", "--model.policy.dtype bfloat16", bare, Choice(HALF)),
        ("LoRA on bfloat16", LORA, base, Choice(HALF, half, adapter)),
        ("QLoRA", "--config qlora", base, Choice(HALF, half, adapter, True, present.double, present.keep)),
    ]
    return [Alternative(name, flags, _with_choice(settings, part, choice)) for name, flags, part, choice in kinds]


def _with_choice(settings: Settings, part: Part, choice: Choice) -> Settings:
    """The run with this choice for all models that are built for training."""

    def other(model: Part | None) -> Part | None:
        if model is None:
            return None
        old = model.choice
        return replace(model, choice=replace(choice, size=old.size, adapter=old.adapter))

    return replace(
        settings,
        policy=replace(part, choice=choice),
        reference_model=other(settings.reference_model),
        value_model=other(settings.value_model),
        teacher_model=other(settings.teacher_model),
    )


def shipped_adapter() -> Any:
    """The PEFT configuration of the shipped config `lora`."""
    from peft import LoraConfig

    content, _ = read(class_names.configs()["lora"])
    return LoraConfig(**content["model"]["init_args"]["policy"]["init_args"]["adapter"]["init_args"])


def total(settings: Settings, room: float | None = None) -> float:
    """Bytes of a run on one device."""
    return budget(settings.run(), room).total


def remedies(settings: Settings, room: float) -> Iterator[tuple[str, float]]:
    """Changes that make the run fit, each on top of those before: flags, and the bytes with them; stops at a fit."""
    for flags, changed in _changes(settings):
        settings = changed(settings)
        size = total(settings, room)
        yield flags(settings), size
        if size <= room:
            return


def _changes(settings: Settings) -> Iterator[tuple[Say, Change]]:
    """Remedies, the cheapest first: their flags, and the change of settings."""
    run, choice = settings.run(), settings.policy.choice
    choices = {alternative.name: alternative.settings.policy.choice for alternative in alternatives(settings)}
    if run.tokens > settings.row or settings.rows > 1:
        yield _accumulation_flags, _one_row
    if any(part and part.choice.size == FLOAT for part, _ in settings.rewards):
        yield (lambda _: "--model.reward.dtype bfloat16"), _half_rewards
    if any(tokens > settings.row for _, tokens in settings.rewards):
        yield (lambda s: f"--model.reward.batch_tokens {s.rewards[0][1]}"), _smaller_reward_batches
    if not settings.policy.checkpointing:
        yield (lambda _: "--model.policy.gradient_checkpointing true"), _checkpointing
    if not run.policy.adapted:
        yield (lambda _: LORA), lambda s: _with_choice(s, s.policy, choices["LoRA on bfloat16"])
    if not choice.quantised:
        yield (lambda _: "--config qlora, instead of lora"), lambda s: _with_choice(s, s.policy, choices["QLoRA"])
    length = settings.max_length
    while length // 2 >= max(SHORTEST, 2 * settings.new):
        length //= 2
        yield _length_flags, partial(_shorten, length=length)


def _shorten(settings: Settings, length: int) -> Settings:
    most = length - settings.new if settings.sampled else length * settings.responses
    return _one_row(replace(settings, max_length=length, lengths=tuple(min(most, n) for n in settings.lengths)))


def _one_row(settings: Settings) -> Settings:
    """One row in a micro-batch."""
    step = -(-settings.batch_size // settings.minibatches)
    return replace(settings, max_tokens=settings.row, accumulate=-(-step // settings.devices))


def _accumulation_flags(settings: Settings) -> str:
    return f"--data.max_tokens {settings.max_tokens} --trainer.accumulate_grad_batches {settings.accumulate}"


def _length_flags(settings: Settings) -> str:
    return f"--data.max_length {settings.max_length} --data.max_tokens {settings.max_tokens} (longer rows are left out)"


def _checkpointing(settings: Settings) -> Settings:
    value = settings.value_model and replace(settings.value_model, checkpointing=True)
    return replace(settings, policy=replace(settings.policy, checkpointing=True), value_model=value)


def _half_rewards(settings: Settings) -> Settings:
    rewards = [(part and replace(part, choice=replace(part.choice, size=HALF)), n) for part, n in settings.rewards]
    return replace(settings, rewards=tuple(rewards))


def _smaller_reward_batches(settings: Settings) -> Settings:
    return replace(settings, rewards=tuple((part, settings.row) for part, _ in settings.rewards))


def rule_of_thumb(settings: Settings) -> dict[str, float]:
    """Bytes of each alternative, by name, in the case of the rule of 60, 16 and 6 GB: supervised training of 7 B
    parameters on one row of 2,048 tokens at a time, with gradient checkpointing."""
    plain = replace(settings, algorithm=Algorithm, rewards=(), reference_model=None, value_model=None, value="none")
    plain = replace(plain, teacher_model=None)
    plain = replace(plain, batch_size=1, accumulate=1, minibatches=1, responses=1, kept=1, new=0, devices=1)
    plain = replace(plain, max_tokens=2048, max_length=2048, lengths=(), sharded=False, optimizer=Optimizer(fused=True))
    return {alternative.name: total(alternative.settings) for alternative in alternatives(_checkpointing(plain))}
