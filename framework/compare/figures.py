"""The figures of the page: their specifications, and the curves and marks in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from leyden.compare.chart import Chart, Line, Mark
from leyden.compare.comparison import Comparison
from leyden.compare.groups import SeedGroup
from leyden.compare.intervals import Interval
from leyden.compare.measures import column_named
from leyden.compare.numbers import cell, number
from leyden.compare.run import RunFiles

LONGEST_NAME = 22
"""Letters of a name in a figure."""


@dataclass(frozen=True)
class FigureSpec:
    """The specification of a figure: one column against another, and a sentence below it."""

    name: str
    title: str
    x: str
    y: str
    label: str
    said: str = ""


TOKENS, SECONDS, STEPS = "train/tokens", "train/seconds", "steps"
CURVE = 60
"""Most points of a curve of training; those of longer runs are means of as many steps."""
BEST = (
    "Up and to the left is better. Crosses are 95\u00a0% intervals, which may reach beyond the figure; dashed is the "
    "best reward that any run had at this KL or less."
)
FIGURE_SPECS = (
    FigureSpec("frontier", "Reward against KL", "eval/kl", "eval/reward", "reward", BEST),
    FigureSpec("reward-tokens", "Reward against tokens", TOKENS, "eval/reward", "reward"),
    FigureSpec("reward-time", "Reward against time", SECONDS, "eval/reward", "reward"),
    FigureSpec("wins", "Win rate over the reference", TOKENS, "eval/win_rate", "win rate",
         "One half is as good as the reference."),
    FigureSpec("length", "Length of answers", TOKENS, "eval/length", "tokens per answer"),
    FigureSpec("forgetting", "Forgetting", TOKENS, "eval/forgetting", "nats per token",
         "Loss on general text, less that before training: above 0 is forgotten."),
    FigureSpec("entropy", "Entropy", TOKENS, "eval/entropy", "nats per token"),
    FigureSpec("validation", "Validation loss", TOKENS, "val/loss", "the algorithm's own loss"),
)  # fmt: skip

TRAINING_SPECS = (
    FigureSpec("train-loss", "Loss", STEPS, "train/loss", "the algorithm's own loss"),
    FigureSpec("train-reward", "Reward of rollouts", STEPS, "rollout/reward", "reward",
               "Of each run by its own reward, on answers to what it trains on."),
    FigureSpec("train-kl", "KL of rollouts", STEPS, "rollout/kl", "nats per answer",
               "From the model that each run started from."),
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A figure with its texts: `styles` are the groups in it, by number and name."""

    plan: FigureSpec
    chart: Chart
    styles: Sequence[tuple[int, str]]
    missing: str


def figures(comparison: Comparison) -> list[Figure]:
    """All figures for which there is something to draw."""
    columns = {column.column for column in comparison.columns}
    plans = [plan for plan in FIGURE_SPECS if not column_named(plan.y).asked or plan.y in columns]
    return [figure for plan in plans if (figure := _figure(comparison, plan)) is not None]


def training_figures(comparison: Comparison) -> list[Figure]:
    """The curves of training over optimizer steps."""
    return [figure for plan in TRAINING_SPECS if (figure := _figure(comparison, plan)) is not None]


def _figure(comparison: Comparison, plan: FigureSpec) -> Figure | None:
    unit, scale = _unit(comparison, plan)
    lines, marks, styles, drawn = list[Line](), list[Mark](), list[tuple[int, str]](), list[RunFiles]()
    for style, group in enumerate(comparison.groups):
        members = [
            run
            for run in comparison.members(group, plan.y)
            if plan.x == STEPS or run in comparison.compared.get(plan.x, ())
        ]
        curves = {run: curve for run in members if (curve := _points(run, plan, scale))}
        if not curves:
            continue
        drawn += curves
        styles.append((style, group.name))
        lines += _curves(style, group, curves, dots=plan.x != STEPS)
        marks.append(_mark(comparison, style, group, plan, lines[-1]))
    if not lines:
        return None
    corners = frontier([point for line in lines if not line.strong or line.tips for point in line.points])
    text = f"{plan.title}. " + "; ".join(mark.tip for mark in marks)
    edge = corners if plan.x == "eval/kl" else ()
    chart = Chart(plan.name, text, unit, plan.label, lines, marks, edge, plan.x == "eval/kl")
    absent = [run.name for run in comparison.runs if run not in drawn]
    return Figure(plan, chart, styles, f"Not shown: {', '.join(absent)}." if absent else "")


def _curves(
    style: int, group: SeedGroup, curves: dict[RunFiles, dict[int, tuple[float, float]]], dots: bool
) -> list[Line]:
    """A group's curves: those of its runs, and their mean at the steps that all have; of a single run its own."""
    lines = []
    for run, curve in curves.items():
        tips = [f"{group.name}, {run.name}, step {step}: {number(y)} at {number(x)}" for step, (x, y) in curve.items()]
        lines.append(Line(style, list(curve.values()), tips if dots else (), strong=len(curves) == 1))
    steps = [step for step in next(iter(curves.values())) if all(step in curve for curve in curves.values())]
    if len(curves) > 1 and steps:
        means = [
            (fmean(c[step][0] for c in curves.values()), fmean(c[step][1] for c in curves.values())) for step in steps
        ]
        lines.append(Line(style, means, (), strong=True))
    return lines


def _mark(comparison: Comparison, style: int, group: SeedGroup, plan: FigureSpec, line: Line) -> Mark:
    """The mark at the end of a group's curve."""
    x, y = line.points[-1]
    y_value = comparison.value(group, plan.y)
    x_value = comparison.value(group, plan.x) if plan.x == "eval/kl" else None
    tip = f"{group.name}: {column_named(plan.y).name} {cell(y_value)}" + (
        f", KL {cell(x_value)}" if x_value else f" at {number(x)}"
    )
    name = group.name if len(group.name) <= LONGEST_NAME else f"{group.name[: LONGEST_NAME - 1]}…"
    return Mark(style, name, tip, _ends(x_value, x), _ends(y_value if x_value else None, y))


def _ends(value: Interval | None, at: float) -> tuple[float, float, float]:
    return (at, at, at) if value is None else (value.low, value.mean, value.high)


def _points(run: RunFiles, plan: FigureSpec, scale: float) -> dict[int, tuple[float, float]]:
    """Step -> x and y of one run."""
    if plan.x == STEPS:
        return _binned(run.series[plan.y])
    if plan.x == "eval/kl":
        kl = dict(run.series[plan.x])
        return {step: (kl[step], y) for step, y in run.series[plan.y] if step in kl}
    points = {step: (run.at(plan.x, step), y) for step, y in run.series[plan.y]}
    return {step: (x / scale, y) for step, (x, y) in points.items() if x is not None}


def _binned(series: Sequence[tuple[int, float]]) -> dict[int, tuple[float, float]]:
    """A column's numbers over steps; of many, means over equal numbers of them, each at the last of its steps."""
    size = -(-len(series) // CURVE)
    parts = [series[at : at + size] for at in range(0, len(series), size)]
    return {part[-1][0]: (float(part[-1][0]), fmean(y for _, y in part)) for part in parts}


def _unit(comparison: Comparison, plan: FigureSpec) -> tuple[str, float]:
    """The label of the x axis, and the divisor of its numbers."""
    if plan.x == "eval/kl":
        return "KL from the reference (nats, square-root scale)", 1.0
    if plan.x in (TOKENS, STEPS):
        return {TOKENS: "tokens trained on", STEPS: "optimizer steps"}[plan.x], 1.0
    most = max((run.final(SECONDS) or 0.0 for run in comparison.runs), default=0.0)
    for name, size in (("hours", 3600.0), ("minutes", 60.0)):
        if most >= 2 * size:
            return f"{name} of training", size
    return "seconds of training", 1.0


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the steps along the highest y at each x or less."""
    corners = list[tuple[float, float]]()
    for x, y in sorted(points):
        if not corners or y > corners[-1][1]:
            corners += [(x, corners[-1][1])] if corners else []
            corners.append((x, y))
    return [*corners, (max(x for x, _ in points), corners[-1][1])] if corners else []
