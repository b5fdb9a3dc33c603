"""A chat with models whose answers are ranked: every turn is an item, and the best answer is what the talk goes on
with."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any, Protocol

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from leyden.datamodules.annotate.app import Annotation, answering, problem, someone_else
from leyden.datamodules.annotate.queue import Queue
from leyden.datamodules.annotate.store import Store
from leyden.errors import first_line
from leyden.language import say
from leyden.votes.vote import Answer, Item
from leyden.web.site import read_json

LONGEST_QUESTION = 20_000
"""Characters of what a person says in one turn."""
_random = random.SystemRandom()


class Model(Protocol):
    """Something that answers, such as `leyden.models.chat.answers.Answers`."""

    def stream(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        """The pieces of an answer to a conversation."""
        ...


@dataclass
class Talk:
    """How far a person's conversation is."""

    messages: list[dict[str, str]] = field(default_factory=list)
    pending: str | None = None
    """The item that they have not voted on yet."""


@dataclass
class Slot:
    """An answer while it is written."""

    name: str
    model: Model
    text: str = ""
    has_failed: bool = False


class LiveAnnotation(Annotation):
    """Questions that people make up as they go.

    Args:
        store: where items and votes are kept.
        queue: of the store.
        models: by name.
        samples: answers of each.
        system: the system prompt; empty for none.
    """

    def __init__(
        self, store: Store, queue: Queue, models: Mapping[str, Model], samples: int = 1, system: str = ""
    ) -> None:
        super().__init__(store, queue)
        self.slots = [(name, model) for name, model in models.items() for _ in range(samples)]
        self.system = [{"role": "system", "content": system}] if system else []
        self._asking: set[str] = set()

    def routes(self) -> list[BaseRoute]:
        own = [Route("/api/ask", self.ask, methods=["POST"]), Route("/api/new", answering(self.new), methods=["POST"])]
        return [*super().routes(), *own]

    def next(self, person: str, sent: Mapping[str, Any]) -> dict[str, Any]:
        """The conversation, and the item that waits for a vote."""
        talk = self._talk(person)
        shown = None if talk.pending is None else self.shown(person, self.store.place(talk.pending))
        progress = self.store.progress(person)
        about = {"person": person, "store": self.store.name, "progress": progress, "live": True}
        return about | {"messages": talk.messages, "item": shown}

    def new(self, person: str, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a new conversation."""
        self._keep(person, Talk(list(self.system)))
        return self.next(person, {})

    def vote(self, person: str, sent: Mapping[str, Any]) -> dict[str, Any]:
        """Store a vote. The conversation goes on with the best answer; where none is good, or it was skipped, the
        question is taken back."""
        vote, id = self.read_vote(person, sent)
        stored, talk = self.store.add_vote(vote, id), self._talk(person)
        if stored and talk.pending == vote.item:
            item = self.store.item(self.store.place(vote.item))
            goes_on = [*map(dict, item.messages), _turn(item.answers[vote.ranks.index(1)].text)] if vote.ranks else None
            self._keep(person, Talk(goes_on or talk.messages))
        return {"stored": stored} | self.next(person, {})

    async def ask(self, request: Request) -> Response:
        """Put a question to all models: lines of JSON, `{"slot": k, "text": …}` while they write, and the item."""
        person, sent = request.scope["person"], await read_json(request)
        if (other := someone_else(person, sent)) is not None:
            return other
        text = sent.get("text")
        if not isinstance(text, str) or not text.strip() or len(text) > LONGEST_QUESTION:
            return problem(400, "vote", f"say something of at most {LONGEST_QUESTION:,} characters")
        return StreamingResponse(self._lines(person, text.strip()), media_type="application/x-ndjson")

    async def _lines(self, person: str, text: str) -> AsyncIterator[str]:
        """The lines of `ask`. Where the person leaves, the models stop, and the question was never put."""
        if person in self._asking:
            yield _line(ended="busy")
            return
        self._asking.add(person)
        stopped = Event()
        try:
            talk = await run_in_threadpool(self._talk, person)
            messages = [*talk.messages, {"role": "user", "content": text}]
            slots = [Slot(name, model) for name, model in self.slots]
            _random.shuffle(slots)
            yield _line(slots=len(slots))
            async for line in _written(slots, messages, stopped):
                yield line
            yield _line(**await run_in_threadpool(self._asked, person, messages, slots))
        finally:
            stopped.set()
            self._asking.discard(person)

    def _asked(self, person: str, messages: list[dict[str, str]], slots: Sequence[Slot]) -> dict[str, Any]:
        """What comes of the answers to a question: an item to vote on, or, where only one was given, the next turn."""
        good = [Answer(slot.text, slot.name) for slot in slots if slot.text.strip() and not slot.has_failed]
        different = list({(answer.text, answer.model): answer for answer in good}.values())
        if len({answer.text for answer in different}) < 2:
            if different:
                self._keep(person, Talk([*messages, _turn(different[0].text)]))
            return {"ended": "same" if different else "failed"} | self.next(person, {})
        item = Item(tuple(messages), tuple(different))
        self.store.add_items([item])
        self._keep(person, Talk(messages[:-1], item.id))
        shown, order = self.next(person, {}), [answer.text for answer in different]
        shown["item"]["answers"].sort(key=lambda answer: order.index(answer["text"]))
        return shown

    def _talk(self, person: str) -> Talk:
        kept = self.store.remembered(f"talk of {person}")
        return Talk(**json.loads(kept)) if kept else Talk(list(self.system))

    def _keep(self, person: str, talk: Talk) -> None:
        text = json.dumps({"messages": talk.messages, "pending": talk.pending}, ensure_ascii=False)
        self.store.remember(f"talk of {person}", text.encode("utf-8", "replace").decode())


async def _written(slots: Sequence[Slot], messages: list[dict[str, str]], stopped: Event) -> AsyncIterator[str]:
    """Lines with what all models write at once. One that fails is told, and the others go on."""
    loop, lines = asyncio.get_running_loop(), asyncio.Queue[str | None]()

    def put(line: str | None) -> None:
        with suppress(RuntimeError):  # the page has ended meanwhile
            loop.call_soon_threadsafe(lines.put_nowait, line)

    def write(number: int, slot: Slot) -> None:
        try:
            with closing(slot.model.stream(messages)) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    slot.text += piece
                    if stopped.is_set():
                        return
                    put(_line(slot=number, text=piece))
        except Exception as error:  # whatever a model does; its name is for the terminal alone
            slot.has_failed = True
            say(f"{slot.name}: no answer ({first_line(error)})", file=sys.stderr, flush=True)
            put(_line(slot=number, failed=True))
        finally:
            put(None)

    for number, slot in enumerate(slots):
        Thread(target=write, args=(number, slot), daemon=True).start()
    left = len(slots)
    while left:
        line = await lines.get()
        if line is None:
            left -= 1
        else:
            yield line


def _turn(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _line(**content: Any) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
