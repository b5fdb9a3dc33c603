"""What people's votes come to, as tables in the terminal and as a page for the browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leyden.atomic import write_whole
from leyden.errors import UserError
from leyden.language import localised
from leyden.votes.page import MARK, page
from leyden.votes.summary import Summary, beyond_chance, conclusion, counted, percent, shown, summary
from leyden.votes.vote import Item, Vote

NAMED = 12
"""Most people, and most models in a matrix, that the terminal shows; the page has all."""


def report(items: Sequence[Item], votes: Sequence[Vote], file: Path) -> None:
    """Print what the current votes come to and write it as a page. An older report is replaced, another file is not.

    Raises:
        UserError: there is no vote, the file is not a report or cannot be written, or a vote does not fit its item.
    """
    if not votes:
        raise UserError("no votes yet: there is nothing to report")
    start = f"<!doctype html>\n{MARK}"
    if file.is_dir():
        raise UserError(f"{file}: a folder; give a file, such as {file / 'votes.html'}")
    if file.exists():
        with file.open(encoding="utf-8", errors="replace") as stream:
            if stream.read(len(start)) != start:
                raise UserError(f"{file}: exists and is not a report on votes; name another file")
    told = summary(items, votes)
    show(told, Console(highlight=False))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, page(told))
    except OSError as error:
        raise UserError(f"{file}: cannot be written ({error.strerror}); name another file") from error


def show(told: Summary, console: Console) -> None:
    """Print the tables and sentences."""

    def line(text: str) -> None:
        console.print(Text(localised(text)))

    console.print(Text(" · ".join(map(localised, counted(told)))))
    scores = told.scores
    if scores.models:
        table = _table("the model", "score (95 % interval)", "win rate (95 % interval)", "its comparisons")
        for at, name in enumerate(scores.models):
            played = int((scores.wins[at] + scores.wins[:, at] + scores.ties[at]).sum())
            table.add_row(
                Text(name), shown(scores.scores[at]), shown(scores.win_rates[at], percent=True), f"{played:,}"
            )
        console.print(table, "")
    if 2 < len(scores.models) <= NAMED:
        console.print(_matrix(told), "")
        line("Each row's share of wins over the column, a tie being half a win, with the number of comparisons.")
    for text in [*conclusion(scores), *scores.notes()]:
        line(text)
    for text in agreed(told):
        line(text)
    console.print()
    if len(told.people) > 1:
        table = _table("the person", "their votes", "agrees with others", "pairs in common")
        for person in sorted(told.people, key=lambda one: -one.votes)[:NAMED]:
            table.add_row(Text(person.name), f"{person.votes:,}", percent(person.share), f"{person.pairs:,}")
        console.print(table, "")


def agreed(told: Summary) -> list[str]:
    """How far people agree with each other and with the reward, a sentence each."""
    people, reward = told.agreement, told.reward
    said = [
        f"Krippendorff's alpha of ranks: {shown(people.ordinal)}, {beyond_chance(people.ordinal.value)}.",
        f"Krippendorff's alpha of pairs: {shown(people.nominal)}, {beyond_chance(people.nominal.value)}.",
        f"Two people say the same of a pair of answers in {shown(people.share, percent=True)} of the cases.",
    ]
    if reward is not None:
        said.append(
            f"The reward orders {shown(reward.share, percent=True)} of {reward.pairs:,} pairs as people do (Kendall's "
            f"tau-b {shown(reward.tau_b)}); {reward.ties:,} pairs that people call a tie are left out of the share."
        )
    return said


def _matrix(told: Summary) -> Table:
    scores = told.scores
    table = _table("row over column", *scores.models)
    for i, name in enumerate(scores.models):
        cells = []
        for j in range(len(scores.models)):
            won, lost, tied = scores.wins[i, j], scores.wins[j, i], scores.ties[i, j]
            played = won + lost + tied
            cells.append(f"{percent((won + tied / 2) / played)} ({played:.0f})" if played else "–")
        table.add_row(Text(name), *cells)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column(Text(localised(first)), max_width=30, overflow="fold")
    for name in others:
        table.add_column(Text(localised(name)), justify="right")
    return table
