"""The report on votes as one HTML file that needs nothing else: no network, no script.

It looks like the page of `leyden compare`. All text from people and models is escaped, and the page's own policy
forbids scripts and loading.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources

from leyden import __version__
from leyden.language import language, localised
from leyden.votes.agreement import Divided
from leyden.votes.summary import Person, Summary, beyond_chance, conclusion, counted, percent, shown
from leyden.votes.vote import Item, Vote

MARK = "<!-- leyden votes -->"
"""The mark of a report of ours, which may be overwritten."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
DIVIDED, LONG = 12, 700
"""Items that are shown, and characters of a text before it is folded."""
_HANGUL = re.compile(r"[가-힣]")
STYLE = """
.scale { width: 15rem; height: 1.4rem; display: block; }
.scale line { stroke: var(--k0); stroke-width: 2.5; stroke-linecap: round; }
.scale circle { fill: var(--k0); opacity: 1; }
.scale .zero { stroke: var(--rule); stroke-width: 1; stroke-dasharray: 2 3; }
.matrix td, .numbers.matrix thead th:not(:first-child) { text-align: center; min-width: 5.5rem; }
article > p { margin: 0 0 0.5rem; font-size: 0.9rem; }
.matrix .more { background: color-mix(in srgb, var(--k0) calc(var(--far) * 70%), var(--paper)); }
.matrix .less { background: color-mix(in srgb, var(--k1) calc(var(--far) * 70%), var(--paper)); }
.matrix small { display: block; color: var(--soft); }
.numbers td.left { text-align: left; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 15rem), 1fr)); gap: 1rem; }
.facts { margin: 1rem 0; }
.facts div { background: var(--card); border-radius: 0.5rem; padding: 0.7rem 1rem; }
.facts b { font-size: 1.6rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.facts small { margin-left: 0.5rem; color: var(--soft); font-size: 0.95rem; font-variant-numeric: tabular-nums; }
.facts span { display: block; font-size: 0.85rem; color: var(--soft); }
.reasons { margin: 0.6rem 0 0; padding-left: 1.2rem; font-size: 0.9rem; }
"""


def page(told: Summary) -> str:
    """The page as HTML text, in the reader's language."""
    style = resources.files("leyden").joinpath("compare/page.css").read_text(encoding="utf-8")
    parts = [
        "<!doctype html>",
        MARK,
        f'<html lang="{language()}"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{_say('What people prefer')}</title>",
        f"<style>\n{style}{STYLE}</style></head>",
        f"<body><header><h1>{_say('What people prefer')}</h1>",
        f"<p>{' · '.join(map(_say, counted(told)))}</p></header><main>",
        *_models(told),
        *_agreement(told),
        *_people(told.people),
        *_divided(told),
        f"</main><footer>leyden {__version__}</footer></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _say(text: str) -> str:
    return escape(localised(text))


def _table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    """A table in a container of its own that scrolls. `head` is text, cells are HTML: whole ones, or what is in one."""
    top = "".join(f'<th scope="col">{_say(cell)}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_say(name)}"><table class="{kind}">'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


# -- models ----------------------------------------------------------------------------------------------------------


def _models(told: Summary) -> Iterator[str]:
    scores = told.scores
    yield f'<section id="models"><h2>{_say("Which model is better")}</h2>'
    yield "".join(f'<p class="conclusion">{_say(text)}</p>' for text in conclusion(scores))
    if scores.models:
        low, high = min(one.low for one in scores.scores), max(one.high for one in scores.scores)
        rows = []
        for at, name in enumerate(scores.models):
            one = scores.scores[at]
            played = int((scores.wins[at] + scores.wins[:, at] + scores.ties[at]).sum())
            rate = shown(scores.win_rates[at], percent=True)
            picture = _scale(one.low, one.value, one.high, low, high)
            rows.append([escape(name), shown(one), f'<td class="left">{picture}</td>', rate, f"{played:,}"])
        head = ["the model", "score (95 % interval)", "", "win rate (95 % interval)", "its comparisons"]
        yield _table("Scores of models", head, rows)
        yield "<p>" + " ".join(map(_say, (
            "A model that scores 1 more than another wins e = 2.7 times as often as it loses (Bradley and Terry, with "
            "Davidson's ties); the mean is 0.",
            "Intervals are over items, since votes on one item depend on each other.",
        ))) + "</p>"  # fmt: skip
    notes = "".join(f"<li>{_say(note)}</li>" for note in scores.notes())
    yield f'<ul class="notes">{notes}</ul>' if notes else ""
    if len(scores.models) > 1:
        yield f"<h3>{_say('Wins, ties and losses')}</h3>"
        yield _matrix(told)
        yield "<p>" + _say(
            "Each row's share of wins over the column, a tie being half a win; below it wins, ties and losses."
        ) + "</p>"  # fmt: skip
    yield "</section>"


def _scale(low: float, value: float, high: float, least: float, most: float) -> str:
    """A number with its interval between the least and the most of all, and a dashed line at 0."""
    least, most = min(least, 0.0), max(most, 0.0)
    wide = (most - least) or 1.0
    a, b, c, zero = (8 + 224 * (x - least) / wide for x in (low, value, high, 0.0))
    return (
        f'<svg class="scale" viewBox="0 0 240 22" aria-hidden="true"><line class="zero" x1="{zero:.1f}" y1="0" '
        f'x2="{zero:.1f}" y2="22"/><line x1="{a:.1f}" y1="11" x2="{c:.1f}" y2="11"/><circle cx="{b:.1f}" cy="11" '
        'r="5"/></svg>'
    )


def _matrix(told: Summary) -> str:
    scores, rows = told.scores, list[list[str]]()
    for i, name in enumerate(scores.models):
        row = [escape(name)]
        for j in range(len(scores.models)):
            won, lost, tied = (int(one) for one in (scores.wins[i, j], scores.wins[j, i], scores.ties[i, j]))
            if not won + lost + tied:
                row.append("<td>–</td>")
                continue
            share = (won + tied / 2) / (won + lost + tied)
            kind, far = ("more", share - 0.5) if share >= 0.5 else ("less", 0.5 - share)
            row.append(
                f'<td class="{kind}" style="--far: {far:.2f}">{percent(share)}<small>{won}–{tied}–{lost}</small></td>'
            )
        rows.append(row)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in scores.models)
    table = _table("Wins, ties and losses", ["row over column"], rows, "numbers matrix")
    return table.replace("</th></tr></thead>", f"</th>{head}</tr></thead>", 1)


# -- people ----------------------------------------------------------------------------------------------------------


def _agreement(told: Summary) -> Iterator[str]:
    people, reward = told.agreement, told.reward
    yield f'<section id="agreement"><h2>{_say("How far people agree")}</h2><div class="facts">'
    for value, name in (
        (people.ordinal, "Krippendorff's alpha of ranks"),
        (people.nominal, "Krippendorff's alpha of pairs: better, worse, a tie"),
    ):
        yield _fact(shown(value), name, beyond_chance(value.value))
    yield _fact(shown(people.share, percent=True), "of pairs of answers, two people say the same")
    if reward is not None:
        name = f"of {reward.pairs:,} pairs, the reward orders as a person does"
        yield _fact(shown(reward.share, percent=True), name, f"Kendall's tau-b {shown(reward.tau_b)}")
    yield "</div><p>" + " ".join(map(_say, (
        "Alpha is 1 where people agree and 0 where chance would agree as often; from 0.8 votes are reliable, from "
        "0.667 good for tentative conclusions (Krippendorff 2004).",
        "A reward that orders fewer pairs as people do than two people have in common tells less than another person "
        "would.",
    ))) + "</p>"  # fmt: skip
    if reward is not None and reward.ties:
        text = (
            f"{reward.ties:,} pairs that people call a tie are left out of the reward's share; equal scores are half."
        )
        yield f"<p>{_say(text)}</p>"
    yield "</section>"


def _fact(value: str, *names: str) -> str:
    """A number, its interval smaller beside it, and what it is of."""
    number, _, interval = value.partition(" ")
    beside = f"<small>{interval.strip('()')}</small>" if interval else ""
    return f"<div><b>{number}</b>{beside}{''.join(f'<span>{_say(name)}</span>' for name in names)}</div>"


def _people(people: Sequence[Person]) -> Iterator[str]:
    yield f'<section id="people"><h2>{_say("The people")}</h2>'
    rows = [
        [
            escape(one.name),
            f"{one.votes:,}",
            f"{one.skipped:,}",
            f"{one.all_bad:,}",
            percent(one.share),
            f"{one.pairs:,}",
        ]
        for one in sorted(people, key=lambda one: (-one.votes, one.name))
    ]
    head = ["the person", "their votes", "of them skipped", "of them all bad", "agrees with others", "pairs in common"]
    yield _table("The people", head, rows)
    yield "</section>"


def _two(told: Summary) -> str:
    """Every two people, in a table that is folded."""
    rows = [
        [f"{escape(one.people[0])}, {escape(one.people[1])}", percent(one.share),
         "–" if math.isnan(one.kappa) else f"{one.kappa:.2f}".replace("-", "−"), f"{one.pairs:,}", f"{one.items:,}"]
        for one in told.agreement.two
    ]  # fmt: skip
    head = ["two people", "say the same", "Cohen's kappa", "pairs in common", "items in common"]
    table = _table("two people", head, rows)
    return f"<details><summary>{_say('Every two people')} ({len(rows)})</summary>{table}</details>"


# -- items -----------------------------------------------------------------------------------------------------------


def _divided(told: Summary) -> Iterator[str]:
    items = [one for one in told.agreement.items if one.share < 1][:DIVIDED]
    if not told.agreement.items:
        return
    yield _two(told)
    if not items:
        return
    yield f'<section id="divided"><h2>{_say("Where people disagree most")}</h2>'
    votes: dict[str, list[Vote]] = {}
    for _, vote in told.ballots.ranked:
        votes.setdefault(vote.item, []).append(vote)
    for one in items:
        yield _card(one, votes[one.item.id])
    yield "</section>"


def _card(one: Divided, votes: Sequence[Vote]) -> str:
    turns = "".join(
        f'<div class="turn"><span class="role">{escape(str(turn.get("role", "")))}</span>'
        f"{_text(str(turn.get('content') or ''))}</div>"
        for turn in one.item.messages
    )
    boxes = "".join(_box(one.item, at, votes) for at in _best_first(one.item, votes))
    reasons = "".join(f"<li>{escape(vote.person)}: {escape(vote.reason)}</li>" for vote in votes if vote.reason)
    said = _say(f"{one.people} people, who say the same of {percent(one.share)} of the pairs")
    return (
        f'<article><p>{said}</p><div class="prompt">{turns}</div><div class="scroll side" role="region" tabindex="0" '
        f'aria-label="{_say("the answers")}">{boxes}</div>'
        + (f'<ul class="reasons">{reasons}</ul>' if reasons else "")
        + "</article>"
    )


def _best_first(item: Item, votes: Sequence[Vote]) -> list[int]:
    """Numbers of answers by their mean rank."""
    return sorted(range(len(item.answers)), key=lambda at: sum(vote.ranks[at] for vote in votes))


def _box(item: Item, at: int, votes: Sequence[Vote]) -> str:
    answer = item.answers[at]
    ranks = _say(f"ranks {', '.join(str(rank) for rank in sorted(vote.ranks[at] for vote in votes))}")
    return (
        f'<div class="answer"><div class="head"><span>{escape(answer.model)}</span><span class="reward">{ranks}</span>'
        f"</div>{_text(answer.text)}</div>"
    )


def _text(text: str) -> str:
    """Text as it was written; a long one is folded, and Korean is marked, so that lines break as they should."""
    letters = sum(letter.isalpha() for letter in text)
    korean = ' lang="ko"' if 2 * len(_HANGUL.findall(text)) >= letters > 0 else ""
    body, rest = escape(text[:LONG]), text[LONG:]
    if rest:
        body += f"<details><summary>{_say(f'{len(rest):,} more characters')}</summary>{escape(rest)}</details>"
    return f'<div class="text"{korean}>{body}</div>'
