"""What the page asks: the next item without the names of its models, and votes, each stored once."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from leyden.datamodules.annotate.queue import Queue
from leyden.datamodules.annotate.store import Full, Gone, Store, Used
from leyden.errors import UserError
from leyden.votes.vote import Item, Vote
from leyden.web.guard import Rules, refused
from leyden.web.site import read_json, site

PAGE = Path(__file__).parent / "page"
LONGEST_REASON = 4000
"""Characters of a written reason."""
Handler = Callable[[str, Mapping[str, Any]], dict[str, Any]]
"""Answers a person's request with what it sent."""


class BadVote(ValueError):
    """A vote that says something else than it may. The message says what."""


class Annotation:
    """The questions of one store.

    Args:
        store: of items and votes.
        queue: what is asked next.
    """

    def __init__(self, store: Store, queue: Queue) -> None:
        self.store, self.queue = store, queue

    def routes(self) -> list[BaseRoute]:
        """What is under `/api/`."""
        handlers: dict[str, tuple[str, Handler]] = {
            "/api/next": ("GET", self.next),
            "/api/before": ("GET", self.before),
            "/api/vote": ("POST", self.vote),
        }
        return [Route(path, answering(handler), methods=[verb]) for path, (verb, handler) in handlers.items()]

    def next(self, person: str, sent: Mapping[str, Any]) -> dict[str, Any]:
        """The item that a person is asked now, and how far they are."""
        place = self.queue.next(person)
        told = {"person": person, "store": self.store.name, "progress": self.store.progress(person)}
        return told | {"item": None if place is None else self.shown(person, place)}

    def before(self, person: str, sent: Mapping[str, Any]) -> dict[str, Any]:
        """The item of a person's last vote before the one with the number `before`, with what they said of it."""
        number = str(sent.get("before", ""))
        found = self.store.vote_before(person, int(number) if re.fullmatch("[0-9]{1,18}", number) else None)
        if found is None:
            return {"item": None}
        before, place, vote = found
        return {"item": self.shown(person, place, vote), "number": before}

    def vote(self, person: str, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Store a vote, and give the next item."""
        vote, id = self.read_vote(person, sent)
        stored = self.store.add_vote(vote, id)
        self.queue.release(person)
        return {"stored": stored} | self.next(person, {})

    def shown(self, person: str, place: int, vote: Vote | None = None) -> dict[str, Any]:
        """An item as a person sees it: equal answers as one, in an order of their own, without names and scores."""
        item = self.store.item(place)
        texts = {key_of(answer.text): answer.text for answer in item.answers}
        order = sorted(texts, key=lambda key: hashlib.sha256(f"{person}\n{item.id}\n{key}".encode()).digest())
        shown: dict[str, Any] = {
            "id": item.id,
            "messages": [{"role": turn.get("role"), "content": turn.get("content")} for turn in item.messages],
            "answers": [{"key": key, "text": texts[key]} for key in order],
        }
        last = vote or self.store.last_vote(person, place)
        if last is not None:
            keys = [key_of(answer.text) for answer in item.answers]
            ranks = dict(zip(keys, last.ranks, strict=True)) if last.ranks else {}
            shown["vote"] = {"ranks": ranks, "all_bad": last.all_bad, "reason": last.reason}
        return shown

    def read_vote(self, person: str, sent: Mapping[str, Any]) -> tuple[Vote, str]:
        """The vote that the page sent, and its id.

        Raises:
            BadVote: it says something that it may not.
            Gone: its item is not there.
        """
        id, name, reason, all_bad = (sent.get(key) for key in ("id", "item", "reason", "all_bad"))
        if not isinstance(id, str) or not 8 <= len(id) <= 64 or not isinstance(name, str):
            raise BadVote("a vote has an id of its own and names its item")
        if not isinstance(reason, str) or len(reason) > LONGEST_REASON or not isinstance(all_bad, bool):
            raise BadVote(f"a reason has at most {LONGEST_REASON} characters")
        ranks = ranks_of(self.store.item(self.store.place(name)), sent.get("ranks"))
        return Vote(name, person, time.time(), ranks, all_bad, reason.encode("utf-8", "replace").decode()), id


def key_of(text: str) -> str:
    """The name of an answer on the page, which says nothing of who wrote it."""
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]


def ranks_of(item: Item, given: Any) -> tuple[int, ...]:
    """Ranks for the answers of an item in its order, 1, 2, … without gaps; none where nothing was ranked.

    Args:
        item: whose answers they are.
        given: key of an answer -> a number, the smallest for the best.

    Raises:
        BadVote: an answer has no rank, or something else has one.
    """
    keys = [key_of(answer.text) for answer in item.answers]
    if not isinstance(given, dict) or (given and set(given) != set(keys)):
        raise BadVote("give a rank to each answer, or to none")
    if any(type(rank) is not int or not 1 <= rank <= 99 for rank in given.values()):
        raise BadVote("ranks are whole numbers from 1 for the best")
    dense = {rank: place for place, rank in enumerate(sorted(set(given.values())), start=1)}
    return tuple(dense[given[key]] for key in keys) if given else ()


def answering(handler: Handler) -> Callable[[Request], Any]:
    """An endpoint that answers by a function, in a thread, and says in JSON what went wrong."""

    async def endpoint(request: Request) -> Response:
        sent = dict(request.query_params) if request.method == "GET" else await read_json(request)
        return await run_in_threadpool(told, handler, request.scope["person"], sent)

    return endpoint


def told(handler: Handler, person: str, sent: Mapping[str, Any]) -> Response:
    """What a function answers, or what went wrong, with a name that pages translate."""
    if (other := someone_else(person, sent)) is not None:
        return other
    try:
        return JSONResponse(handler(person, sent))
    except Gone:
        return problem(410, "gone", "this item is no longer here")
    except Full:
        return problem(507, "full", "the disk is full; the vote waits on this page")
    except BadVote as error:
        return problem(400, "vote", str(error))
    except Used:  # sent again it would be refused again, and votes behind it would wait for ever
        return problem(400, "used", "another vote has this id")
    except UserError:  # of the file of votes, which is no business of who votes
        return refused("store")


def someone_else(person: str, sent: Mapping[str, Any]) -> JSONResponse | None:
    """What a page is answered that shows someone else than the cookie names; None where they are the same.

    All tabs of a browser have one cookie, so the link that was opened last says who asks in each of them.
    """
    if sent.get("person", person) == person:
        return None
    return problem(409, "person", "this browser is now someone else's; open your own link again", person=person)


def problem(status: int, name: str, text: str, **more: str) -> JSONResponse:
    """An answer that says what went wrong."""
    return JSONResponse({"error": name, "text": text} | more, status)


def application(annotation: Annotation, rules: Rules) -> ASGIApp:
    """The whole page."""
    return site(PAGE, annotation.routes(), rules)
