"""`leyden chat --web`: a page on which one or two models answer side by side.

The page keeps the conversation and asks each model by itself, so that one goes on where the other fails. A model writes
one answer at a time; who has to wait is told how many are before them.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from argparse import Namespace
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from leyden.errors import UserError, first_line
from leyden.language import localised, say
from leyden.paths import short_names
from leyden.policy.policy import Sampling
from leyden.web.guard import Rules
from leyden.web.guests import Invited
from leyden.web.serve import Address, listen, serve
from leyden.web.site import read_json, site

if TYPE_CHECKING:
    from leyden.models.chat.answers import Answers, Written

PAGE = Path(__file__).parent / "page"
MOST_WAITING = 32
"""Answers of a model that may wait for their turn."""
MOST_TURNS = 2000
MOST_TOKENS = 1 << 17
"""Of an answer, at most."""
WHOLE = 1 << 53
"""Browsers know whole numbers up to here."""


class BadRequest(ValueError):
    """A page asks for something that it may not. The message says what."""


class Chat:
    """Models that people chat with.

    Args:
        models: by the name that people see.
        sampling: settings that a page begins with.
        system: the system prompt that a page begins with; empty for none.
    """

    def __init__(self, models: Mapping[str, Answers], sampling: Sampling, system: str = "") -> None:
        self.names, self.models = list(models), list(models.values())
        self.sampling, self.system = sampling, system
        self.queues = [list[asyncio.Event]() for _ in models]
        """Of each model, those who wait for an answer; the first is answered."""
        self.ended = Event()
        """Set where the page ends: no more is written."""

    def routes(self) -> list[BaseRoute]:
        """What is under `/api/`."""
        return [Route("/api/chat", self.about), Route("/api/answer", self.answer, methods=["POST"])]

    async def about(self, request: Request) -> Response:
        """The models, and what a page begins with."""
        settings = {name: value for name, value in asdict(self.sampling).items() if name != "top_k"}
        parameters = [model.parameters for model in self.models]
        models = [dict(name=name, parameters=n) for name, n in zip(self.names, parameters, strict=True)]
        return JSONResponse({"models": models, "settings": settings | {"system": self.system}})

    async def answer(self, request: Request) -> Response:
        """An answer of a model, as lines of JSON: `{"waiting": n}` while others are before, `{"text": …, "tokens": n}`
        for each piece, and how it ended, see `Written`, or `{"failed": …}`."""
        sent = await read_json(request)
        try:
            model = whole(sent, "model", 0, len(self.models) - 1)
            number = whole(sent, "number", 0, WHOLE)
            messages, sampling = messages_of(sent.get("messages")), sampling_of(sent)
        except BadRequest as error:
            return JSONResponse({"error": "request", "text": str(error)}, 400)
        if len(self.queues[model]) > MOST_WAITING:
            return JSONResponse({"error": "crowded", "text": "too many people wait for this model"}, 503)

        def write(show: Callable[[str, int], None], is_stopped: Callable[[], bool]) -> Written:
            return self.models[model].write(messages, show, sampling, number, is_stopped)

        language = "ko" if sent.get("language") == "ko" else "en"
        return StreamingResponse(self._lines(model, write, language), media_type="application/x-ndjson")

    async def _lines(self, model: int, write: Write, language: str) -> AsyncIterator[str]:
        """The lines of `answer`. Where the person leaves or stops it, the model does."""
        queue, own, stopped = self.queues[model], asyncio.Event(), Event()
        queue.append(own)
        try:
            while before := queue.index(own):
                own.clear()
                yield _line(waiting=before)
                await own.wait()
            if self.ended.is_set():
                return
            yield _line(waiting=0)

            def is_stopped() -> bool:
                return stopped.is_set() or self.ended.is_set()

            async for line in _written(write, is_stopped, self.names[model], language):
                yield line
        finally:
            stopped.set()
            queue.remove(own)
            for other in queue:
                other.set()


Write = Callable[[Callable[[str, int], None], Callable[[], bool]], "Written"]
"""Writes an answer: shows its pieces, and asks whether it is stopped."""


async def _written(write: Write, is_stopped: Callable[[], bool], name: str, language: str) -> AsyncIterator[str]:
    """Lines with what a thread writes."""
    loop, lines = asyncio.get_running_loop(), asyncio.Queue[str | None]()

    def put(line: str | None) -> None:
        with suppress(RuntimeError):  # the page has ended meanwhile
            loop.call_soon_threadsafe(lines.put_nowait, line)

    def sample() -> None:
        try:
            written = write(lambda text, tokens: put(_line(text=text, tokens=tokens)), is_stopped)
            put(_line(**asdict(written)))
        except UserError as error:
            put(_line(failed=localised(str(error).partition("; /")[0], language)))  # commands of the terminal
        except Exception as error:  # whatever a model does
            say(f"{name}: no answer ({first_line(error)})", file=sys.stderr, flush=True)
            put(_line(failed=""))
        finally:
            put(None)

    Thread(target=sample, daemon=True).start()
    while (line := await lines.get()) is not None:
        yield line


def _line(**content: Any) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


def messages_of(given: Any) -> list[dict[str, str]]:
    """Turns that a page sent: a system prompt or none, and then a person and a model in turn, the person last.

    Raises:
        BadRequest: they are something else.
    """
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_TURNS:
        raise BadRequest(f"send 1 to {MOST_TURNS:,} messages")
    turns = []
    for turn in given:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str) or not content.strip():
            raise BadRequest("every message has a role and a text")
        turns.append({"role": role, "content": content.encode("utf-8", "replace").decode()})
    roles = [turn["role"] for turn in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if len(talk) % 2 == 0 or any(role != ("user", "assistant")[at % 2] for at, role in enumerate(talk)):
        raise BadRequest("messages are of user and assistant in turn, the last of the user")
    return turns


def sampling_of(sent: Mapping[str, Any]) -> Sampling:
    """Settings that a page sent. Raises `BadRequest` where a number is missing or out of bounds."""
    temperature, top_p = _number(sent, "temperature"), _number(sent, "top_p")
    if not 0 <= temperature <= 100:
        raise BadRequest("temperature is a number from 0 to 100")
    if not 0 < top_p <= 1:
        raise BadRequest("top_p is a number above 0, at most 1")
    length, seed = whole(sent, "max_new_tokens", 1, MOST_TOKENS), whole(sent, "seed", -WHOLE, WHOLE)
    return Sampling(length, float(temperature), 0, float(top_p), seed)


def whole(sent: Mapping[str, Any], name: str, least: int, most: int) -> int:
    """A whole number that a page sent. Raises `BadRequest` where it is none, or out of bounds."""
    value = sent.get(name)
    if type(value) is not int or not least <= value <= most:
        raise BadRequest(f"{name} is a whole number from {least:,} to {most:,}")
    return value


def _number(sent: Mapping[str, Any], name: str) -> float:
    """A number that a page sent; NaN, which is within no bounds, where it is none."""
    value = sent.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def application(chat: Chat, rules: Rules) -> ASGIApp:
    """The whole page."""
    return site(PAGE, chat.routes(), rules)


def serving(options: Namespace) -> int:
    """Load the models and show the page until it is stopped; the exit code."""
    names = ("temperature", "top_p", "max_new_tokens", "seed")
    try:
        sampling = sampling_of({name: getattr(options, name) for name in names})
    except BadRequest as error:
        raise UserError(f"--web: {error}") from None
    opened, address = listen(Address(options.host, options.port, options.url))
    try:
        chat = Chat(_loaded(options, sampling), sampling, options.system)
        people = Invited()
        rules = Rules(address.hosts(), f"leyden_chat_{address.port}", people, address.url)
        link = address.link(people.invite("guest"))
        serve(application(chat, rules), opened, [f"chat: {link}", "Ctrl-C ends the page"], chat.ended.set)
    finally:
        opened.close()
    return 0


def _loaded(options: Namespace, sampling: Sampling) -> dict[str, Answers]:
    """Name -> model. Raises `UserError` for one that cannot chat, or has no place for the system prompt."""
    from leyden.models.chat.answers import Answers

    models = dict[str, Answers]()
    for name, path in short_names(options.model).items():
        say(f"{name}: loading", flush=True)
        how = (options.dtype, options.chat_template, options.base, options.chat_template_args)
        models[name] = answers = Answers(path, sampling, *how)
        answers.direct(options.system)
    return models
