"""The plan of a run as text."""

from __future__ import annotations

from leyden.models.planner.alternatives import alternatives, remedies, rule_of_thumb
from leyden.models.planner.budget import Budget, budget
from leyden.models.planner.outline import Item, PlannedRun
from leyden.models.planner.settings import Settings

SUITS = """\
Which algorithm suits: SFT for answers of another form; SFT with LoRA or QLoRA for a domain; DPO for preferences and
few resources; PPO for a reward and resources; rejection sampling for a reward and caution; QLoRA on your own GPU."""


def report(settings: Settings, plan: Budget, notes: list[str], room: float | None) -> str:
    """The plan of a run: what it holds, what other ways to train it would hold, and what was assumed.

    Args:
        room: bytes of the device, if they were given.
    """
    run = settings.run()
    notes = [*notes, *([run.policy.plan.doubt] if run.policy.plan.doubt else [])]
    sections = [_heading(settings, run), _breakdown(plan), _alternatives(settings, room), *_rule(settings, run)]
    return "\n\n".join([*sections, *(f"Note: {note}." for note in notes), SUITS])


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


def verdict(settings: Settings, plan: Budget, room: float) -> str:
    """Whether the run fits, and what would make it fit."""
    if plan.total <= room:
        return f"It fits in {_gb(room)} GB, with {_gb(room - plan.total)} GB to spare."
    lines, size = [f"It does not fit in {_gb(room)} GB. What helps, each line on top of those before:"], plan.total
    for flags, size in remedies(settings, room):
        lines.append(f"  {_gb(size):>8} GB   {flags}")
    if size > room:
        lines.append("That is not enough: take a smaller model, or divide it among devices (ModelParallelStrategy).")
    return "\n".join(lines)
