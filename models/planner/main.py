"""`leyden plan`: what a run would hold in memory, before anything is downloaded or loaded."""

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
    """Print the plan of a run. 0: it fits, or no memory is given; 1: it does not fit; `UserError` for mistakes."""
    if not argv or {"-h", "--help", "help"} & set(argv):
        print(_help())
        return 0
    rest, own = _own(argv)
    room, devices = _bytes(own.get("memory")), _count(own.get("devices"))
    command = read_command("fit", rest)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    found, notes = settings(resolved(command), devices)
    run = found.run()
    plan = budget(run, room)
    notes = [*notes, *([run.policy.plan.doubt] if run.policy.plan.doubt else [])]
    parts = [_heading(found, run), _breakdown(plan), _alternatives(found, room), *_rule(found, run)]
    print("\n\n".join([*parts, *(f"Note: {note}." for note in notes), SUITS]))
    if room is None:
        return 0
    print(f"\n{_verdict(found, plan, room)}")
    return 0 if plan.total <= room else 1


def _own(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments of `leyden fit`, and `--memory` and `--devices` by name."""
    rest, own, words = list[str](), dict[str, str](), list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in ("memory", "devices"):
            rest.append(word)
            continue
        if not equals and (not words or words[0].startswith("--")):
            raise UserError(f"--{name} needs a value, such as --{name} {'8GB' if name == 'memory' else 2}")
        own[name] = value if equals else words.pop(0)
    return rest, own


def _bytes(text: str | None) -> float | None:
    """`8GB` as 8e9; `8GiB` as 8 * 2^30."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d*\.?\d+)\s*([a-zA-Z]*)", text.strip(), re.ASCII)
    if found is None or found[2].upper() not in UNITS or not float(found[1]):
        raise UserError(f"--memory {text}: give a size such as 8GB or 24GiB")
    return float(found[1]) * UNITS[found[2].upper()]


def _count(text: str | None) -> int | None:
    if text is not None and (not text.isdigit() or not int(text)):
        raise UserError(f"--devices {text}: give a number of devices, 1 or more")
    return None if text is None else int(text)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f}" if size < 99.995e9 else f"{size / 1e9:,.0f}"


def _count_of(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:,.1f} M"


def _heading(found: Settings, run: PlannedRun) -> str:
    choice, policy = found.policy.choice, run.policy
    weights = {4: "float32", 2: "16 bits"}[choice.size]
    how = [f"weights in 4 bits, others in {weights}" if choice.quantised else f"weights in {weights}"]
    how += ["autocast to 16 bits"] * choice.autocast + ["gradient checkpointing"] * found.policy.checkpointing
    kind = "GPU" if found.cuda else "processor"
    device = f"one {kind}" if found.devices == 1 else f"each of {found.devices} {kind}s"
    trained = f"{'an adapter of ' if policy.adapted else ''}{_count_of(sum(policy.trained.values()))}"
    rows = f"{found.rows} row{'s' * (found.rows > 1)} of at most {found.row:,}"
    return (
        f"{found.algorithm.__name__} on {device}{'' if found.cuda else ' (for a GPU: --trainer.accelerator gpu)'}: "
        f"{found.policy.path}, {_count_of(policy.plan.total)} parameters, {trained} trained\n{', '.join(how)}\n"
        f"at most {run.tokens:,} tokens in a micro-batch: {rows}"
    )


def _breakdown(plan: Budget) -> str:
    """What stays, and what each phase adds to it."""
    lines = [_line(item) for item in plan.kept]
    for name, items in plan.phases.items():
        lines += [f"  while {name}:", *(_line(item, 4) for item in items)] if items else []
    return "\n".join([*lines, _line(Item("in all", plan.total, f"what stays, and what is added while {plan.largest}"))])


def _line(item: Item, indent: int = 2) -> str:
    name = " " * indent + item.name
    return f"{name:<32}{_gb(item.size):>8} GB" + (f"   {item.note}" if item.note else "")


def _alternatives(found: Settings, room: float | None) -> str:
    names = ("weights", "training", "the rest", "in all")
    lines = [f"  {'':<18}" + "".join(f"{name:>10}" for name in names) + (f"   in {_gb(room)} GB" if room else "")]
    for way in alternatives(found):
        plan = budget(way.settings.run(), room)
        weights, training = (sum(i.size for i in plan.kept if i.kind == kind) for kind in ("weights", "training"))
        columns = [weights, training, plan.total - weights - training, plan.total]
        fits = "" if room is None else f"   {'fits' if plan.total <= room else 'no':<10}"
        lines.append(f"  {way.name:<18}" + "".join(f"{_gb(size):>10}" for size in columns) + f"{fits}   {way.flags}")
    return "\n".join([*lines, "  Training is gradients and optimizer; the rest is mostly activations."])


def _rule(found: Settings, run: PlannedRun) -> list[str]:
    """Where the rule of thumb for 7 B parameters holds, for models of about that size."""
    if not 6e9 < run.policy.plan.total < 9e9:
        return []
    sizes = rule_of_thumb(found)
    names = ("full, bfloat16", "LoRA on bfloat16", "QLoRA", "full, bf16-mixed")
    full, lora, qlora, mixed = (_gb(sizes[name]) for name in names)
    return [
        f"""\
The rule of thumb for 7 B is 60, 16 and 6 GB (full, LoRA, QLoRA). This model takes {full}, {lora} and {qlora} GB with
bfloat16 weights, one row of 2,048 tokens and gradient checkpointing. The rule is wrong for bf16-mixed: weights,
gradients and both moments stay in float32, 16 bytes a parameter, and bfloat16 copies are 2 more: {mixed} GB."""
    ]


def _verdict(found: Settings, plan: Budget, room: float) -> str:
    if plan.total <= room:
        return f"It fits in {_gb(room)} GB, with {_gb(room - plan.total)} GB to spare."
    lines, size = [f"It does not fit in {_gb(room)} GB. What helps, each line on top of those before:"], plan.total
    for flags, size in remedies(found, room):
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

It takes the configs and flags of `leyden fit` and reads the model's configuration, no weights and no rows.
Exit code: 0 if the run fits or no memory is given, 1 if it does not fit, 2 for mistakes."""
