"""`leyden compare RUN…`: a table in the terminal, a page for the browser, and a CSV file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from leyden.atomic import write_whole
from leyden.cli.parser import Parser, show_every_character
from leyden.compare.comparison import compare
from leyden.compare.export import FIRST, as_csv
from leyden.compare.finding import find_runs
from leyden.compare.measures import COLUMNS
from leyden.compare.page import MARK, page
from leyden.compare.run import RunFiles, read_run
from leyden.compare.table import show
from leyden.errors import UserError
from leyden.language import say


def main(argv: Sequence[str]) -> int:
    """Compare runs and return 0. Raises `UserError` for a mistake that the user can mend."""
    show_every_character()
    parser = _parser()
    options = parser.read(argv)
    if not options.run:
        raise UserError("leyden compare: name the runs, such as leyden compare runs (see leyden compare --help)")
    runs = [read_run(folder, name) for folder, name in find_runs(options.run).items()]
    remarks = [] if options.votes is None else _votes(runs, options.votes, options.ignore)
    comparison = compare(runs, options.metric, options.ignore)
    comparison.remarks += remarks
    report = _output_file(options.output, f"<!doctype html>\n{MARK}", "--output")
    table = None if options.csv is None else _output_file(options.csv, ",".join(FIRST), "--csv")
    show(comparison, Console(highlight=False))
    _write(report, page(comparison), "--output")
    say(f"report: {report} (open it in a browser)")
    if table is not None:
        _write(table, as_csv(comparison), "--csv")
        say(f"table: {table}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "leyden compare",
        "Compare runs from the files in their folders: a table in the terminal and a page with curves, answers side by "
        "side and the settings that differ. Runs that differ only in seeds are taken together.",
    )
    text = "a run's folder, a folder of runs, or a glob in quotes, such as 'runs/ppo-*'"
    parser.epilog = f"columns: {'; '.join(f'{one.name}: {one.unit}' for one in COLUMNS)}"
    parser.add_argument("run", nargs="*", metavar="RUN", help=text)
    parser.add_argument("--output", default="report.html", metavar="FILE", help="the page (default: report.html)")
    parser.add_argument("--csv", metavar="FILE", help="also write last numbers as CSV, a row for each run")
    text = "only this column in the table, such as reward or val/loss; the first sorts it; may be repeated"
    parser.add_argument("--metric", action="append", default=[], metavar="NAME", help=text)
    text = "a setting that makes no difference, such as model.policy.path; may be repeated"
    parser.add_argument("--ignore", action="append", default=[], metavar="KEY", help=text)
    text = "people's votes, a votes.jsonl of leyden annotate export: what they prefer, beside the other columns"
    parser.add_argument("--votes", metavar="FILE", help=text)
    return parser


def _votes(runs: Sequence[RunFiles], file: str, ignored: Sequence[str]) -> list[str]:
    from leyden.compare.votes import add_votes  # here, since it needs NumPy and most comparisons do not

    return add_votes(runs, Path(file).expanduser(), ignored)


def _output_file(name: str, start: str, flag: str) -> Path:
    """The path of a file to write, which is new or comes from an earlier comparison. Others are not overwritten."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"{flag} {name}: a folder; give a file, such as {path / 'report.html'}")
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            if not file.read(len(start)).startswith(start):
                raise UserError(f"{flag} {name}: exists and is not of leyden compare; name another file")
    return path


def _write(path: Path, text: str, flag: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be written ({error.strerror}); name another file") from error
