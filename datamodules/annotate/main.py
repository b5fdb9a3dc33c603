"""The command line of `leyden annotate serve | people | export | report`."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from leyden.cli.parser import Parser, run_verb
from leyden.errors import UserError, nearest
from leyden.language import localised, say
from leyden.paths import resolve

if TYPE_CHECKING:
    from leyden.datamodules.annotate.store import Store

DEFAULT = "votes.db"
ORDERS = ("least", "disagreement")
OF_MODELS = ("samples", "system", "temperature", "max_new_tokens")
"""Flags that only --models reads."""


def main(argv: list[str]) -> int:
    """Run one verb and return the exit code. Raises `UserError` for what the user can mend."""
    return run_verb("annotate", VERBS, _help, argv)


def _serve(argv: list[str]) -> int:
    options = _serve_parser().read(argv)
    from leyden.web.serve import require_packages

    require_packages("leyden annotate")
    _check(options)
    from leyden.datamodules.annotate.serving import serving

    return serving(options)


def _serve_parser() -> Parser:
    parser = Parser("leyden annotate serve", "Show answers to people who rank them, on a web page.")
    text = "rollouts.jsonl, answers of leyden predict, preference data, or the folder of a run; without: what is stored"
    parser.add_argument("file", nargs="*", metavar="FILE", help=text)
    parser.add_argument("--store", default=DEFAULT, metavar="FILE", help=f"where votes are kept (default: {DEFAULT})")
    parser.add_argument("--people", nargs="+", default=[], metavar="NAME", help="who votes; each gets a link")
    parser.choice("--order", ORDERS, help="the least voted first (default), or where an ensemble disagrees")
    parser.add_argument("--enough", type=int, metavar="N", help="votes after which an item is done (default: everyone)")
    parser.add_argument("--answers", type=int, metavar="K", help="most answers of an item (default: 8)")
    parser.add_argument("--format", metavar="NAME", help="force a format by name")
    parser.add_argument("--skip-bad", "--skip_bad", action="store_true", help="leave out rows that cannot be read")
    text = "one to four models to chat with instead of files; each answer is ranked, and the best goes on"
    parser.add_argument("--models", nargs="+", default=[], metavar="RUN", help=text)
    parser.add_argument(
        "--samples", type=int, metavar="N", help="--models: answers of each (default: 1; of one model 2)"
    )
    parser.add_argument("--system", metavar="TEXT", help="--models: system prompt")
    parser.add_argument("--temperature", type=float, metavar="T", help="--models: default 0.7")
    length = ("--max-new-tokens", "--max_new_tokens")
    parser.add_argument(*length, type=int, metavar="N", help="--models: of an answer; default 512")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0: other machines reach it")
    parser.add_argument("--port", type=int, default=8800, metavar="N", help="(default: 8800; 0: a free one)")
    parser.add_argument("--url", default="", metavar="URL", help="what people open, where that is a proxy or a tunnel")
    return parser


def _check(options: Namespace) -> None:
    """Raise `UserError` for values that mean nothing, and for flags that would be ignored."""
    for person in options.people:
        if Path(person).exists():
            raise UserError(f"--people {person}: a file; name files before the flags")
    ignored = ("order", "enough", "answers", "format", "skip_bad") if options.models else OF_MODELS
    for name in ignored:
        if getattr(options, name):
            flag = f"--{name.replace('_', '-')}"
            other = "not with --models, whose questions people make up" if options.models else "only with --models"
            raise UserError(f"{flag}: {other}; leave it out")
    if options.models and options.file:
        raise UserError(f"--models: people chat with these, or rank what is in {options.file[0]}; give one of them")
    for path in options.models:
        resolve(path)  # a mistake is said before the libraries are there
    samples = options.samples or 1
    if len(options.models) > 4 or len(options.models) * samples > 8 or samples < 1:
        raise UserError("--models: give one to four, and --samples so that there are at most 8 answers")
    if len(options.models) == 1 and options.samples == 1:
        raise UserError("--samples 1: one answer of one model cannot be ranked; give 2 or more, or more --models")
    for name, least in (("enough", 1), ("temperature", 0), ("max_new_tokens", 1)):
        if (value := getattr(options, name)) is not None and not value >= least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {least} or more")


def _people(argv: list[str]) -> int:
    parser = Parser("leyden annotate people", "Who votes, and how far they are; new links for them.")
    parser.add_argument("store", metavar="STORE", help="the database of leyden annotate serve")
    parser.add_argument("--add", nargs="+", default=[], metavar="NAME", help="someone new, with a link")
    parser.add_argument("--new-link", "--new_link", nargs="+", default=[], metavar="NAME", help="in place of the old")
    parser.add_argument("--remove", nargs="+", default=[], metavar="NAME", help="end their links; their votes stay")
    parser.add_argument("--url", metavar="URL", help="what people open (default: where the page was last)")
    options = parser.read(argv)
    store = _store(options.store)
    from leyden.datamodules.annotate.store import person_name
    from leyden.web.serve import Address

    for flag in ("add", "new_link", "remove"):
        names = [person_name(name, f"--{flag.replace('_', '-')}") for name in getattr(options, flag)]
        setattr(options, flag, list(dict.fromkeys(names)))
    known = store.people()
    for person in options.new_link:
        if person not in known:
            raise UserError(f"--new-link {person}: nobody is called that{nearest(person, known) or '; --add them'}")
    for person in options.add:
        if person in known:
            raise UserError(f"--add {person}: there already; --new-link {person} gives them another link")
    for person in options.remove:
        store.dismiss(person)
    Address("127.0.0.1", 0, options.url or "")  # an address that nobody can open is refused
    url = options.url or store.remembered("address") or "http://127.0.0.1:8800"
    for person in (*options.add, *options.new_link):
        say(f"{person}: {url.rstrip('/')}/#{store.invite(person, anew=True)}")
    invited = {person for person, _ in store.guests()}
    for person in store.people():
        done = store.progress(person)
        no_link = "" if person in invited else ", no link"
        say(f"{person}: {done['done']:,} of {done['total']:,} items ranked, {done['skipped']:,} skipped{no_link}")
    return 0


def _export(argv: list[str]) -> int:
    about = "Votes as preference data, which training reads as it is, or as they are, for leyden compare --votes."
    parser = Parser("leyden annotate export", about)
    parser.add_argument("store", metavar="STORE", help="the database of leyden annotate serve")
    parser.add_argument("output", metavar="OUT", help="a .jsonl file")
    text = "all answers with ranks (default), pairs, or the votes themselves"
    parser.choice("--kind", ("ranked", "pairs", "votes"), "ranked", text)
    parser.choice("--votes", ("majority", "all"), help="what most people say (default), or every vote")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    options = parser.read(argv)
    out = _target(options.output, ".jsonl", options.overwrite)
    if options.kind == "votes" and options.votes is not None:
        raise UserError(f"--votes {options.votes}: --kind votes writes each of them; leave it out")
    store = _store(options.store)
    items, votes = store.items(), store.votes()
    if options.kind == "votes":
        from leyden.votes.vote_file import write_votes

        say(f"{store.file} -> {out}: {write_votes(items, votes, out):,} votes")
        return 0
    from leyden.datamodules.annotate.export import export
    from leyden.datamodules.commands.convert import whole_file

    rows = export(items, votes, options.kind, options.votes or "majority")
    if not rows:
        raise UserError(f"{store.file}: no vote prefers an answer to another yet, so there is nothing to write")
    with whole_file(out) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    say(f"{store.file} -> {out}: {len(rows):,} rows")
    return 0


def _report(argv: list[str]) -> int:
    parser = Parser("leyden annotate report", "How far people agree, and which model they prefer: a page and a table.")
    parser.add_argument("store", metavar="STORE", help="the database of leyden annotate serve")
    parser.add_argument("--output", default="votes.html", metavar="FILE", help="the page (default: votes.html)")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that exists")
    options = parser.read(argv)
    out = _target(options.output, ".html", options.overwrite)
    store = _store(options.store)
    from leyden.votes.report import report

    report(store.items(), store.votes(), out)
    say(f"report: {out} (open it in a browser)")
    return 0


def _store(file: str) -> Store:
    from leyden.datamodules.annotate.store import Store

    return Store(file, make=False)


def _target(name: str, ending: str, overwrite: bool) -> Path:
    out = Path(name).expanduser()
    if out.suffix != ending:
        raise UserError(f"{out}: name the output {out.with_suffix(ending)}")
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists already; add --overwrite, or name another output")
    return out


def _help() -> str:
    lines = "\n".join(f"  {usage:<34} {localised(what)}" for usage, what in USAGE.items())
    return f"usage: leyden annotate VERB …\n\n{lines}\n\nleyden annotate VERB --help names the flags of a verb."


VERBS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "people": _people,
    "export": _export,
    "report": _report,
}
USAGE = {
    "serve FILE … --people NAME …": "the page on which people rank answers",
    "people STORE": "who votes, and how far they are; new links",
    "export STORE OUT": "votes as preference data",
    "report STORE": "agreement of people, and scores of models",
}
