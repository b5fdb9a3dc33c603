"""The door of a page: which requests reach it at all, and what every answer says to the browser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from leyden.errors import UserError
from leyden.web.guests import Guests, whose
from leyden.web.limits import Limit

CUSTOM_HEADER = "x-leyden"
"""A header that forms of other sites cannot send: each POST must have it."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
PROBLEMS = {
    "host": (403, "this page has another address; open the link that was given to you"),
    "foreign": (403, "this request came from another page"),
    "big": (413, "this is too long to be sent"),
    "often": (429, "too many requests; wait a moment"),
    "token": (401, "this link is not valid here; ask for a new one"),
    "store": (503, "this page cannot work now; its terminal says why"),
}
"""What is wrong with a request -> status and words; pages translate the name."""


@dataclass
class Rules:
    """What the guard lets in.

    Args:
        hosts: names by which the page may be opened, without the port; its numbers need not be among them.
        cookie: name of the cookie with a person's token.
        guests: who may come in.
        url: address that people open, where that is a proxy's or a tunnel's.
        most: bytes of a request's body.
        person: requests of a person.
        stranger: requests of an address that has shown no token.
    """

    hosts: frozenset[str]
    cookie: str
    guests: Guests
    url: str = ""
    most: int = 1 << 20
    person: Limit = field(default_factory=lambda: Limit(20, 80))
    stranger: Limit = field(default_factory=lambda: Limit(10, 120))

    @property
    def is_https(self) -> bool:
        """Whether people come by https."""
        return urlsplit(self.url).scheme == "https"


class TooLong(Exception):
    """The body of a request has more bytes than it may."""


class Guard:
    """Middleware that refuses what the rules do not let in. What is under `/api/` is for guests alone, except
    `/api/enter`, where they show their token; `scope["person"]` is who asks."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    own[name] = value
            await send(message)

        cookie = cookie_parser(headers.get("cookie", "")).get(self.rules.cookie, "")
        try:
            scope["person"] = whose(cookie, await run_in_threadpool(self.rules.guests))
            problem = self._problem(scope, headers)
        except UserError:
            problem = "store"
        app = self.app if problem is None else refused(problem)
        await app(scope, _at_most(receive, self.rules.most), answer)

    def _problem(self, scope: Scope, headers: Headers) -> str | None:
        """What is wrong with a request, a name of `PROBLEMS`; None where it may come in."""
        if not _is_known(headers.get("host", ""), self.rules.hosts):
            return "host"
        person, address = scope["person"], _address(scope)
        if not (self.rules.stranger.allows(address) if person is None else self.rules.person.allows(person)):
            return "often"
        if scope["method"] not in ("GET", "HEAD") and not _from_here(headers, self.rules.url):
            return "foreign"
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length) > self.rules.most:
            return "big"
        if person is None and scope["path"].startswith("/api/") and scope["path"] != "/api/enter":
            return "token"
        return None


def refused(problem: str) -> JSONResponse:
    """The answer to a request that something is wrong with, a name of `PROBLEMS`."""
    status, text = PROBLEMS[problem]
    return JSONResponse({"error": problem, "text": text}, status)


def _address(scope: Mapping[str, object]) -> str:
    """Where a request comes from."""
    client = scope.get("client")
    return str(client[0]) if isinstance(client, tuple | list) and client else "unknown"


def _from_here(headers: Headers, url: str) -> bool:
    """Whether a request was made by a script of the page itself (no other site's can send these headers unasked)."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "same-origin")
    hosts = {headers.get("host", "").lower(), urlsplit(url).netloc.lower()} - {""}
    own = origin is None or urlsplit(origin).netloc.lower() in hosts
    is_json = headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
    return own and site == "same-origin" and is_json and headers.get(CUSTOM_HEADER) == "1"


def _is_known(host: str, hosts: frozenset[str]) -> bool:
    """Whether a `Host` header names this page. A number does: what others can lead here is a name of theirs."""
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        return name in hosts or bool(ip_address(name))
    except ValueError:
        return False


def _at_most(receive: Receive, most: int) -> Receive:
    """The body of a request, up to so many bytes. Raises `TooLong` for more."""
    seen = 0

    async def part() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise TooLong
        return message

    return part
