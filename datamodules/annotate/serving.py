"""`leyden annotate serve`: files into the store, links for people, and the page until Ctrl-C."""

from __future__ import annotations

import argparse
import getpass
from pathlib import Path

from leyden.datamodules.annotate.app import Annotation, application
from leyden.datamodules.annotate.items import Reading, named_files, read_items, signature
from leyden.datamodules.annotate.queue import Queue
from leyden.datamodules.annotate.store import Store
from leyden.errors import UserError
from leyden.language import say
from leyden.web.guard import Rules
from leyden.web.serve import Address, listen, serve


def serving(options: argparse.Namespace) -> int:
    """Run the command until it is stopped, and return the exit code."""
    address = Address(options.host, options.port, options.url)
    if not address.is_local and not options.people:
        raise UserError(f"--host {options.host}: others can reach that; name who votes, such as --people Kim Lee")
    how = Reading(options.answers, options.skip_bad, options.format)
    files = named_files(options.file, say)
    opened, address = listen(address)
    store = Store(options.store)
    try:
        add_files(store, files, how)
        if store.first("SELECT place FROM items") is None:
            raise UserError(f"{store.file}: no items in it yet; name files with answers, such as runs/ppo-1")
        annotation = Annotation(store, Queue(store, options.order, options.enough))
        rules = Rules(address.hosts(), f"leyden_{store.name}", store.guests, address.is_https)
        serve(application(annotation, rules), opened, [*links(store, address, options.people), _stop(store)])
    finally:
        opened.close()
        store.close()
    return 0


def add_files(store: Store, files: dict[Path, str], how: Reading) -> None:
    """Add the items of files, unless they were read before and are unchanged."""
    if not files:
        return
    name = signature(files, how)
    if store.remembered(name) is None:
        new = store.add_items(read_items(files, how, say))
        store.remember(name, str(new))
        say(f"{store.file}: {new:,} new items of {', '.join(map(str, files))}")


def links(store: Store, address: Address, people: list[str]) -> list[str]:
    """A line for each person, with a link for those who have none yet. Only hashes of tokens are kept, so a link is
    shown once."""
    invited = {person for person, _ in store.guests()}
    lines = []
    for person in people or ([] if invited else [default_person()]):
        if person.strip() in invited:
            lines.append(
                f"{person}: the link of before (another: leyden annotate people {store.file} --new-link {person})"
            )
        else:
            lines.append(f"{person}: {address.link(store.invite(person))}")
    if not people and default_person() in invited:
        lines.append(f"{default_person()}: {address.link(store.invite(default_person()))}")
    return lines or [f"the page is at {address.link('')[:-2]}, for the links of before"]


def default_person() -> str:
    """Who votes where nobody is named: whoever is logged in."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "me"


def _stop(store: Store) -> str:
    return f"votes go to {store.file}; Ctrl-C ends the page"
