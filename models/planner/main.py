"""`leyden plan`: the memory that a run would take, before anything is downloaded or loaded."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence

from leyden.cli.command import read_command
from leyden.errors import UserError
from leyden.models.planner.alternatives import alternatives, remedies, rule_of_thumb
from leyden.models.planner.budget import Budget, budget
from leyden.models.planner.outline import Item, PlannedRun
from leyden.models.planner.reading import resolved, settings
from leyden.models.planner.settings import Settings

UNITS = {"": 1.0, "B": 1.0, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}
SUITS = """\
Which algorithm suits: SFT for answers of another form; SFT with LoRA or QLoRA for a domain; DPO for preferences and
few resources; PPO for a reward and resources; rejection sampling for a reward and caution; QLoRA on your own GPU."""


def main(argv: Sequence[str]) -> int:
    """Print the plan of a run and return the exit code.

    0 if the run fits or no memory is given, 1 if it does not fit. Raises `UserError` for mistakes.
    """
    if not argv or {"-h", "--help", "help"} & set(argv):
        print(_help())
        return 0
    fit_arguments, options = _split_arguments(argv)
    room, devices = _bytes(options.get("memory")), _count(options.get("devices"))
    command = read_command("fit", fit_arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    planned, notes = settings(resolved(command), devices)
    run = planned.run()
    plan = budget(run, room)
    notes = [*notes, *([run.policy.plan.doubt] if run.policy.plan.doubt else [])]
    sections = [_heading(planned, run), _breakdown(plan), _alternatives(planned, room), *_rule(planned, run)]
    print("\n\n".join([*sections, *(f"Note: {note}." for note in notes), SUITS]))
    if room is None:
        return 0
    print(f"\n{_verdict(planned, plan, room)}")
    return 0 if plan.total <= room else 1


def _split_arguments(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments of `leyden fit`, and the values of `--memory` and `--devices` by name."""
    fit_arguments, options, words = list[str](), dict[str, str](), list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in ("memory", "devices"):
            fit_arguments.append(word)
            continue
        if not equals and (not words or words[0].startswith("--")):
            raise UserError(f"--{name} needs a value, such as --{name} {'8GB' if name == 'memory' else 2}")
        options[name] = value if equals else words.pop(0)
    return fit_arguments, options


def _bytes(text: str | None) -> float | None:
    """Bytes of a size: `8GB` is 8e9, `8GiB` is 8 · 2³⁰; None for None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d*\.?\d+)\s*([a-zA-Z]*)", text.strip(), re.ASCII)
    if match is None or match[2].upper() not in UNITS or not float(match[1]):
        raise UserError(f"--memory {text}: give a size such as 8GB or 24GiB")
    return float(match[1]) * UNITS[match[2].upper()]


def _count(text: str | None) -> int | None:
    if text is not None and (not text.isdigit() or not int(text)):
        raise UserError(f"--devices {text}: give a number of devices, 1 or more")
    return None if text is None else int(text)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 99.995e9 else f"{size / 1e9:,.0f}"


def _parameter_count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:,.1f} M"


def _heading(settings: Settings, run: PlannedRun) -> str:
    choice, policy = settings.policy.choice, run.policy
    weights = {4: "float32", 2: "16 bits"}[choice.size]
    how = [f"weights in 4 bits, others in {weights}" if choice.quantised else f"weights in {weights}"]
    how += ["autocast to 16 bits"] * choice.autocast + ["gradient checkpointing"] * settings.policy.checkpointing
    kind = "GPU" if settings.cuda else "processor"
    device = f"one {kind}" if settings.devices == 1 else f"each of {settings.devices} {kind}s"
    trained = f"{'an adapter of ' if policy.adapted else ''}{_parameter_count(sum(policy.trained.values()))}"
    rows = f"{settings.rows} row{'s' * (settings.rows > 1)} of at most {settings.row:,}"
    return (
        f"{settings.algorithm.__name__} on {device}"
        f"{'' if settings.cuda else ' (for a GPU: --trainer.accelerator gpu)'}: "
        f"{settings.policy.path}, {_parameter_count(policy.plan.total)} parameters, {trained} trained\n"
        f"{', '.join(how)}\n"
        f"at most {run.tokens:,} tokens in a micro-batch: {rows}"
    )


def _breakdown(plan: Budget) -> str:
    """Lines of the items that stay and of those that each phase adds, and the total."""
    lines = [_line(item) for item in plan.kept]
    for name, items in plan.phases.items():
        lines += [f"  while {name}:", *(_line(item, 4) for item in items)] if items else []
    return "\n".join([*lines, _line(Item("in all", plan.total, f"what stays, and what is added while {plan.largest}"))])


def _line(item: Item, indent: int = 2) -> str:
    name = " " * indent + item.name
    return f"{name:<32}{_gb(item.size):>8} GB" + (f"   {item.note}" if item.note else "")


def _alternatives(settings: Settings, room: float | None) -> str:
    names = ("weights", "training", "the rest", "in all")
    lines = [f"  {'':<18}" + "".join(f"{name:>10}" for name in names) + (f"   in {_gb(room)} GB" if room else "")]
    for alternative in alternatives(settings):
        plan = budget(alternative.settings.run(), room)
        weights, training = (sum(i.size for i in plan.kept if i.kind == kind) for kind in ("weights", "training"))
        columns = [weights, training, plan.total - weights - training, plan.total]
        fits = "" if room is None else f"   {'fits' if plan.total <= room else 'no':<10}"
        lines.append(
            f"  {alternative.name:<18}"
            + "".join(f"{_gb(size):>10}" for size in columns)
            + f"{fits}   {alternative.flags}"
        )
    return "\n".join([*lines, "  Training is gradients and optimizer; the rest is mostly activations."])


def _rule(settings: Settings, run: PlannedRun) -> list[str]:
    """Comparison with the rule of thumb for 7 B parameters, for models of about that size."""
    if not 6e9 < run.policy.plan.total < 9e9:
        return []
    sizes = rule_of_thumb(settings)
    names = ("full, bfloat16", "LoRA on bfloat16", "QLoRA", "full, bf16-mixed")
    full, lora, qlora, mixed = (_gb(sizes[name]) for name in names)
    return [
        f"""\
The rule of thumb for 7 B is 60, 16 and 6 GB (full, LoRA, QLoRA). This model takes {full}, {lora} and {qlora} GB with
bfloat16 weights, one row of 2,048 tokens and gradient checkpointing. The rule is wrong for bf16-mixed: weights,
gradients and both moments stay in float32, 16 bytes a parameter, and bfloat16 copies are 2 more: {mixed} GB."""
    ]


def _verdict(settings: Settings, plan: Budget, room: float) -> str:
    if plan.total <= room:
        return f"It fits in {_gb(room)} GB, with {_gb(room - plan.total)} GB to spare."
    lines, size = [f"It does not fit in {_gb(room)} GB. What helps, each line on top of those before:"], plan.total
    for flags, size in remedies(settings, room):
        lines.append(f"  {_gb(size):>8} GB   {flags}")
    if size > room:
        lines.append("That is not enough: take a smaller model, or divide it among devices (ModelParallelStrategy).")
    return "\n".join(lines)


def _help() -> str:
    return """leyden plan: what a run would hold in memory on each device, before anything is downloaded

usage: leyden plan --config NAME [--config NAME …] [--KEY VALUE …] [--memory 8GB] [--devices N]

  --memory SIZE                     of one device, such as 8GB or 24GiB: says what fits, and what to change
  --devices N                       instead of --trainer.devices
  --trainer.accelerator gpu         plans for a GPU where there is none

It takes the configs and flags of `leyden fit` and reads the model's configuration, no weights. With
--data.path it reads the lengths of the rows; without, they are as long as --data.max_length lets them be.
Exit code: 0 if the run fits or no memory is given, 1 if it does not fit, 2 for mistakes."""
