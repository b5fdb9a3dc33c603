"""The comparison as one HTML file that needs nothing else: no network, no script.

All text from files is escaped, and the page's own policy forbids scripts and loading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from leyden import __version__
from leyden.compare.chart import drawn, sign
from leyden.compare.comparison import Comparison
from leyden.compare.conclusion import conclusion
from leyden.compare.figures import Figure, figures, training_figures
from leyden.compare.numbers import cells, explained, number
from leyden.compare.paired import differences
from leyden.compare.samples import answers
from leyden.compare.settings import brief, differing, seed

MARK = '<html lang="en"><!-- leyden compare -->'
"""The mark of a page of ours, which may be overwritten."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(comparison: Comparison) -> str:
    """The page as HTML text."""
    groups, runs = len(comparison.groups), len(comparison.runs)
    title = f"{', '.join(group.name for group in comparison.groups[:4])}{' and more' if groups > 4 else ''}"
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    parts = [
        "<!doctype html>",
        MARK,
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>Runs compared: {escape(title)}</title>",
        f"<style>\n{style}</style></head>",
        "<body><header><h1>Runs compared</h1>",
        f"<p>{runs} run{'s' * (runs != 1)} in {groups} group{'s' * (groups != 1)}; the runs of a group differ only in "
        "seeds.</p></header><main>",
        *_results(comparison),
        *_figures("Figures", figures(comparison)),
        *_figures("While training", training_figures(comparison)),
        *_settings(comparison),
        *answers(comparison),
        *_warnings(comparison),
        *_runs(comparison),
        f"</main><footer>leyden {__version__}</footer></body></html>",
    ]
    return "\n".join(parts) + "\n"


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table in a container of its own that scrolls. Cells are HTML; the first of a row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}"><table class="{kind}">'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _results(comparison: Comparison) -> Iterator[str]:
    yield '<section id="results"><h2>Results</h2>'
    head = [
        "group",
        "runs",
        *(f'<abbr title="{escape(column.unit)}">{escape(column.name)}</abbr>' for column in comparison.columns),
    ]
    values = [[comparison.value(group, column.column) for column in comparison.columns] for group in comparison.groups]
    columns = [cells([row[at] for row in values]) for at in range(len(comparison.columns))]
    rows = [
        [f"{sign(style)}{escape(group.name)}", str(len(group.runs)), *(column[style] for column in columns)]
        for style, group in enumerate(comparison.groups)
    ]
    if said := conclusion(comparison):
        yield f'<p class="conclusion">{escape(said)}</p>'
    yield table("Results", head, rows)
    yield f"<p>Each run's last number. {explained(value for row in values for value in row)}</p>"
    units = "".join(
        f"<dt>{escape(column.name)}</dt><dd>{escape(column.unit)}</dd>" for column in comparison.columns if column.unit
    )
    yield f'<details><summary>What the columns are</summary><dl class="units">{units}</dl></details>' if units else ""
    notes = "".join(f"<li>{escape(str(note))}</li>" for note in (*differences(comparison), *comparison.notes()))
    yield f'<ul class="notes">{notes}</ul>' if notes else ""
    yield "</section>"


def _figures(title: str, all_figures: Sequence[Figure]) -> Iterator[str]:
    if not all_figures:
        return
    yield f'<section id="{title.split()[-1].lower()}"><h2>{title}</h2>'
    yield "<p>Thin lines are single runs, thick ones the mean of a group's runs; marks show the end. Point at a "
    yield "mark or a dot to read it.</p>"
    yield '<div class="figures">'
    for figure in all_figures:
        yield _figure(figure)
    yield "</div></section>"


def _figure(figure: Figure) -> str:
    legend = "".join(f"<li>{sign(style)}{escape(name)}</li>" for style, name in figure.styles)
    notes = " ".join(part for part in (figure.plan.said, escape(figure.missing)) if part)
    first = figure.plan.name == "frontier"
    wide = f'<div class="wide">{drawn(figure.chart, 1000, 440)}</div>' if first else ""
    return (
        f"<figure{' class=first' if first else ''}><h3>{figure.plan.title}</h3>\n"
        f'{wide}<div class="narrow">{drawn(figure.chart, 400, 310)}</div>\n'
        f'<figcaption><ul class="legend">{legend}</ul>{f"<p>{notes}</p>" if notes else ""}</figcaption></figure>'
    )


def _settings(comparison: Comparison) -> Iterator[str]:
    """Settings that differ: first those that all groups have, then those that only some know."""
    known = [group for group in comparison.groups if group.settings]
    keys = differing([group.settings for group in known])
    if not keys:
        return
    yield '<section id="settings"><h2>Settings that differ</h2>'
    head = ["setting", *(escape(group.name) for group in known)]
    common = [key for key in keys if all(key in group.settings for group in known)]
    for few, what in ((common, ""), ([key for key in keys if key not in common], "Settings that only some have")):
        rows = [[f"<code>{escape(key)}</code>", *(_value(group.settings.get(key)) for group in known)] for key in few]
        content = table(what or "Settings that differ", head, rows, "words") if rows else ""
        yield f"<details><summary>{what} ({len(rows)})</summary>{content}</details>" if rows and what else content
    yield "</section>"


def _value(value: str | None) -> str:
    if value is None:
        return "–"
    short = brief(value, 40)
    return escape(value) if short == value else f'<abbr title="{escape(value)}">{escape(short)}</abbr>'


def _warnings(comparison: Comparison) -> Iterator[str]:
    runs = [run for run in comparison.runs if run.diagnostics]
    if not runs:
        return
    yield '<section id="warnings"><h2>Warnings while training</h2>'
    for run in runs:
        yield f"<h3>{escape(run.name)}</h3><ul>"
        for row in run.diagnostics:
            key = f" <code>{escape(str(row['key']))}</code>" if row.get("key") else ""
            yield f"<li>Step {row['step']}: {escape(row['sentence'])}{key}</li>"
        yield "</ul>"
    yield "</section>"


def _runs(comparison: Comparison) -> Iterator[str]:
    yield '<section id="runs"><h2>Runs</h2>'
    head = ["run", "group", "seed", "steps", "tokens", "seconds", "version", "commit", "folder"]
    rows = []
    for style, group in enumerate(comparison.groups):
        for run in group.runs:
            numbers = ["–" if (v := run.final(f"train/{c}")) is None else number(v) for c in ("tokens", "seconds")]
            about = [str(run.info.get(key) or "–") for key in ("version", "git")]
            words = [group.name, seed(run.config) or "–", str(run.steps), *numbers, *about, str(run.folder)]
            rows.append([f"{sign(style)}{escape(run.name)}", *map(escape, words)])
    yield table("Runs", head, rows)
    yield "</section>"
