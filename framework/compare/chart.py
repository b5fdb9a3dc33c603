"""A chart as SVG text: lines, marks with their intervals, axes, and labels where there is room for them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from leyden.compare.axis import Axis, fitted, written

STYLES = 8
"""Colours; the shapes of marks are one fewer, so that 56 groups look different."""
SHAPES = (
    "M0-5.5A5.5 5.5 0 1 1 0 5.5A5.5 5.5 0 1 1 0-5.5Z",
    "M-5-5H5V5H-5Z",
    "M0-6.5L6.2 4.6H-6.2Z",
    "M0-7L6 0L0 7L-6 0Z",
    "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "M0 6.5L-6.2-4.6H6.2Z",
    "M-5-6.4L0-2.4L5-6.4L6.4-5L2.4 0L6.4 5L5 6.4L0 2.4L-5 6.4L-6.4 5L-2.4 0L-6.4-5Z",
)
DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "5 2", "12 3", "1 3", "4 2 1 2")
LETTER = 6.8
"""Pixels that a Latin letter of a name takes, in a wide font; Hangul takes less than twice as many."""


@dataclass(frozen=True)
class Line:
    """A curve of one run, or of a group's mean (`strong`), with a text for each point."""

    style: int
    points: Sequence[tuple[float, float]]
    tips: Sequence[str]
    strong: bool = False


@dataclass(frozen=True)
class Mark:
    """The end of a group's curve, with its intervals along x and y where they are drawn."""

    style: int
    label: str
    tip: str
    x: tuple[float, float, float]
    y: tuple[float, float, float]
    """Low end, number, high end"""


@dataclass(frozen=True)
class Chart:
    """The content of a chart. `edge`: corners of a dashed line behind the rest; `plane`: x is a measure, on a scale by
    square roots, instead of a count that only grows."""

    name: str
    text: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    marks: Sequence[Mark]
    edge: Sequence[tuple[float, float]] = ()
    plane: bool = False


def drawn(chart: Chart, width: int, height: int) -> str:
    """The chart as an SVG element of `width` by `height` units; on the page it takes the width of its container."""
    points = [point for line in chart.lines for point in line.points]
    right = min(60.0 if chart.plane else 130.0, max((_width(mark.label) for mark in chart.marks), default=0) + 12)
    x = fitted([p[0] for p in points], 50, width - right, zero=True, root=chart.plane)
    y = fitted([p[1] for p in points], height - 44, 28)
    clip = f"{chart.name}-{width}"
    inside = [_edge(chart.edge, x, y), *(_line(line, x, y) for line in chart.lines)]
    inside += [_whiskers(mark, x, y) for mark in chart.marks]
    frame = f'<rect x="{x.start}" y="{y.end}" width="{x.end - x.start:.1f}" height="{y.start - y.end:.1f}"/>'
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.text)}">',
        f'<clipPath id="{clip}">{frame}</clipPath>',
        _axes(chart, x, y),
        f'<g clip-path="url(#{clip})">{"".join(inside)}</g>',
        *(_mark(mark, x, y) for mark in chart.marks),
        _labels(chart, x, y, width),
        "</svg>",
    ]
    return "\n".join(part for part in parts if part)


def sign(style: int) -> str:
    """A group's line and mark as a small SVG element, for legends."""
    line = f'<path class="mean" d="M1 8H31"{_dash(style)}/>'
    return (
        f'<svg class="sign {_class(style)}" viewBox="0 0 32 16" aria-hidden="true">{line}'
        f'<path class="mark" transform="translate(16 8)" d="{SHAPES[style % len(SHAPES)]}"/></svg>'
    )


def _class(style: int) -> str:
    return f"k{style % STYLES}"


def _dash(style: int) -> str:
    dash = DASHES[style % len(DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""


def _axes(chart: Chart, x: Axis, y: Axis) -> str:
    parts = ['<g class="axes">']
    y_ticks, x_ticks = y.ticks(40), x.ticks()
    for value, text in zip(y_ticks, written(y_ticks), strict=True):
        at = y.place(value)
        parts.append(f'<path d="M{x.start} {at:.1f}H{x.end:.1f}"/>')
        parts.append(f'<text x="{x.start - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in zip(x_ticks, written(x_ticks), strict=True):
        at = x.place(value)
        parts.append(f'<path d="M{at:.1f} {y.start}v5"/>')
        parts.append(f'<text x="{at:.1f}" y="{y.start + 18}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="base" d="M{x.start} {y.end}V{y.start}H{x.end:.1f}"/>')
    parts.append(f'<text class="label" x="4" y="14">{escape(chart.y_label)}</text>')
    parts.append(f'<text class="label" x="{x.start}" y="{y.start + 37}">{escape(chart.x_label)}</text>')
    return "".join(parts) + "</g>"


def _edge(corners: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    path = " L".join(f"{x.place(a):.1f} {y.place(b):.1f}" for a, b in corners)
    return f'<path class="edge" d="M{path}"/>' if corners else ""


def _line(line: Line, x: Axis, y: Axis) -> str:
    places = [f"{x.place(a):.1f} {y.place(b):.1f}" for a, b in line.points]
    kind = f'class="mean"{_dash(line.style)}' if line.strong else 'class="one"'
    path = f'<path {kind} d="M{" L".join(places)}"/>' if len(places) > 1 else ""
    dots = (
        f'<circle cx="{place.split()[0]}" cy="{place.split()[1]}" r="2.5"><title>{escape(tip)}</title></circle>'
        for place, tip in zip(places, line.tips, strict=False)
    )
    return f'<g class="{_class(line.style)}">{path}{"".join(dots)}</g>'


def _whiskers(mark: Mark, x: Axis, y: Axis) -> str:
    y_place, x_place = y.place(mark.y[1]), x.place(mark.x[1])
    parts = []
    if mark.x[2] > mark.x[0]:
        parts.append(f"M{x.place(mark.x[0]):.1f} {y_place:.1f}H{x.place(mark.x[2]):.1f}")
    if mark.y[2] > mark.y[0]:
        parts.append(f"M{x_place:.1f} {y.place(mark.y[0]):.1f}V{y.place(mark.y[2]):.1f}")
    return f'<path class="whisker {_class(mark.style)}" d="{"".join(parts)}"/>' if parts else ""


def _mark(mark: Mark, x: Axis, y: Axis) -> str:
    place = f"translate({x.place(mark.x[1]):.1f} {y.place(mark.y[1]):.1f})"
    shape, tip = SHAPES[mark.style % len(SHAPES)], f"<title>{escape(mark.tip)}</title>"
    return f'<path class="mark {_class(mark.style)}" transform="{place}" d="{shape}">{tip}</path>'


def _width(text: str) -> float:
    return LETTER * sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _labels(chart: Chart, x: Axis, y: Axis, width: int) -> str:
    """The marks' names, each in the first place beside its mark where it covers no mark, no other name and no curve of
    a group. A name that has no such place is left out. Unless the chart is a plane, names stand to the right of their
    marks alone."""
    places = [(x.place(mark.x[1]), y.place(mark.y[1])) for mark in chart.marks]
    occupied = [(a - 6, b - 6, a + 6, b + 6) for a, b in places]
    behind = [chart.edge, *(line.points for line in chart.lines if line.strong)]
    curves = [[(x.place(a), y.place(b)) for a, b in points] for points in behind]
    crossed = [point for curve in curves for ends in pairwise(curve) for point in _between(*ends)]
    parts = []
    for mark, (a, b) in zip(chart.marks, places, strict=True):
        length = _width(mark.label)
        right, left, middle = a + 9, a - 9 - length, a - length / 2
        around = ((left, 4), (middle, -11), (middle, 19), (right, -9), (right, 17))
        on_the_right = ((right, 0), (right, 8), (right, -6), (right, 14), (right, -12), (right, 20))
        for at, down in ((right, 4), *(around if chart.plane else on_the_right)):
            box = (at, b + down - 11, at + length, b + down + 3)
            inside = box[0] >= x.start + 2 and box[2] <= width - 2 and box[1] >= y.end and box[3] <= y.start
            if inside and not any(_overlap(box, other) for other in occupied) and not _holds(box, crossed):
                occupied.append(box)
                name = f'<text class="name {_class(mark.style)}" x="{at:.1f}" y="{b + down:.1f}">'
                parts.append(f"{name}{escape(mark.label)}</text>")
                break
    return "".join(parts)


def _between(one: tuple[float, float], other: tuple[float, float]) -> list[tuple[float, float]]:
    """Points on the way from one to another, at most 4 pixels apart."""
    count = 1 + int(max(abs(one[0] - other[0]), abs(one[1] - other[1])) / 4)
    return [tuple(a + (b - a) * k / count for a, b in zip(one, other, strict=True)) for k in range(count + 1)]  # type: ignore[misc]


def _holds(box: tuple[float, float, float, float], points: Sequence[tuple[float, float]]) -> bool:
    return any(box[0] <= a <= box[2] and box[1] <= b <= box[3] for a, b in points)


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
