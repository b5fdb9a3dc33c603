"""`leyden annotate serve`: files into the store, links for people, and the page until Ctrl-C."""

from __future__ import annotations

import argparse
import getpass
import shlex
from collections.abc import Sequence
from pathlib import Path

from leyden.class_paths import import_object
from leyden.datamodules.annotate.app import Annotation, application
from leyden.datamodules.annotate.items import MOST, Reading, named_files, read_items, signature
from leyden.datamodules.annotate.queue import Queue
from leyden.datamodules.annotate.store import Store, person_name
from leyden.errors import UserError
from leyden.language import say
from leyden.paths import short_names
from leyden.web.guard import Rules
from leyden.web.serve import Address, listen, serve

MODEL = "leyden.models.chat.answers.Answers"
"""What answers in a chat: made of a path and a `Sampling`, see `live.Model`."""


def serving(options: argparse.Namespace) -> int:
    """Run the command until it is stopped, and return the exit code."""
    address = Address(options.host, options.port, options.url)
    if not address.is_local and not options.people:
        raise UserError(f"--host {options.host}: others can reach that; name who votes, such as --people Kim Lee")
    how = Reading(options.answers or MOST, options.skip_bad, options.format or "auto")
    files = named_files(options.file, say)
    opened, address = listen(address)
    store = Store(options.store)
    try:
        add_files(store, files, how)
        annotation = _annotation(store, options)
        store.remember("address", address.link("").rstrip("/#"))
        rules = Rules(address.hosts(), f"leyden_{store.name}", store.guests, address.url)
        serve(application(annotation, rules), opened, [*links(store, address, options.people), _stop(store)])
    finally:
        opened.close()
        store.close()
    return 0


def _annotation(store: Store, options: argparse.Namespace) -> Annotation:
    """What is asked: items of files, or what people ask models."""
    if not options.models:
        if store.first("SELECT place FROM items") is None:
            raise UserError(f"{store.file}: no items in it yet; name files with answers, such as runs/ppo-1")
        return Annotation(store, Queue(store, options.order or "least", options.enough))
    names = names_of_models(options.models)
    from leyden.datamodules.annotate.live import LiveAnnotation
    from leyden.policy.policy import Sampling

    temperature = 0.7 if options.temperature is None else options.temperature
    sampling = Sampling(options.max_new_tokens or 512, temperature)
    make = import_object(MODEL, "--models")
    models = {name: make(path, sampling) for name, path in names.items()}
    samples = options.samples or (2 if len(models) == 1 else 1)
    return LiveAnnotation(store, Queue(store), models, samples, options.system or "")


def names_of_models(typed: Sequence[str]) -> dict[str, str]:
    """Name -> path, see `short_names`. UserError where one stands twice."""
    try:
        return short_names(typed)
    except UserError:
        raise UserError(
            "--models: a model stands there twice; give each once, and --samples for more of its answers"
        ) from None


def add_files(store: Store, files: dict[Path, str], how: Reading) -> None:
    """Add the items of files, unless they were read before and are unchanged."""
    if not files:
        return
    name = signature(files, how)
    if store.remembered(name) is None:
        items = list(read_items(files, how, say))  # all of them first: a bad row adds none, and the store is free
        new = store.add_items(items)
        store.remember(name, str(new))
        say(f"{store.file}: {new:,} new items of {', '.join(map(str, files))}")


def links(store: Store, address: Address, people: list[str]) -> list[str]:
    """A line for each person, with a link for those who have none yet. Only hashes of tokens are kept, so a link is
    shown once; whoever runs the program without naming anyone gets another each time."""
    invited = {person for person, _ in store.guests()}
    if not people and invited <= {default_person()}:
        return [f"{default_person()}: {address.link(store.invite(default_person()))}"]
    lines = []
    for person in dict.fromkeys(map(person_name, people)):
        if person in invited:
            another = shlex.join(["leyden", "annotate", "people", str(store.file), "--new-link", person])
            lines.append(f"{person}: has a link already; for another: {another}")
        else:
            lines.append(f"{person}: {address.link(store.invite(person))}")
    return lines or [f"the page is open for those who have a link: {', '.join(sorted(invited))}"]


def default_person() -> str:
    """Who votes where nobody is named: whoever is logged in."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "me"


def _stop(store: Store) -> str:
    return f"votes are kept in {store.file}; Ctrl-C ends the page"
