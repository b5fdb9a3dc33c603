"""A client of an OpenAI-compatible chat endpoint: one question, one answer, with a time-out and retries.

The key is read from the environment when a request is made. It is in no object, message or log line.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from threading import Event
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from leyden import __version__
from leyden.errors import UserError
from leyden.example import Message

log = logging.getLogger("leyden")

LONGEST_PAUSE = 60.0
"""Longest pause between tries, in seconds."""
MOST_PATIENCE = 600.0
"""Longest wait in seconds where the server says how long to wait."""


class Stopped(Exception):
    """The caller does not wait for the answer any more."""


class Refused(UserError):
    """The server takes requests, but not this one."""


class _Retry(Exception):
    """A failure after which another try may succeed. `wait` is how many seconds the server asks to wait."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _NoRedirect(HTTPRedirectHandler):
    """Follows no redirects: one would carry the key to another place."""

    def redirect_request(self, *args: Any) -> None:
        return None


class Endpoint:
    """A model behind `URL/chat/completions`. Threads may share it.

    Args:
        url: with or without `/v1` or `/v1/chat/completions` at its end.
        model: as the server calls it.
        key_env: the name of the environment variable that holds the key; where it is not set, no key is sent.
        timeout: seconds that one answer may take.
        retries: how often a request is made again after a connection error, a time-out, HTTP 408, 409, 425, 429 or 5xx.
        backoff: seconds before the first of them; each further pause is twice as long, give or take a half.
        options: more keys of the request's body; null leaves one out (`temperature: null`).
    """

    def __init__(
        self,
        url: str,
        model: str,
        key_env: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 6,
        backoff: float = 1.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key_env):  # what was given may be a key: do not repeat it
            raise UserError("key_env is the name of an environment variable that holds the key, such as OPENAI_API_KEY")
        if timeout <= 0 or retries < 0 or backoff <= 0:
            raise UserError(
                f"timeout {timeout}, retries {retries}, backoff {backoff}: give more than 0 (retries: or 0)"
            )
        self.url, self.place = _completions(url)
        self.model, self.key_env = model, key_env
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.options = {"temperature": 0.0} | dict(options or {})
        self._opener, self._last_logged = build_opener(_NoRedirect), float("-inf")

    def body(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The body of a request. The key is not in it."""
        whole = {"model": self.model, "messages": list(messages)} | self.options
        return {name: value for name, value in whole.items() if value is not None}

    def ask(self, messages: Sequence[Message], stop: Event) -> str:
        """The answer to a conversation.

        Args:
            messages: the conversation.
            stop: set when the caller does not wait any more; it ends pauses.

        Raises:
            UserError: no answer, after all tries or since another one would not help; says what to set.
            Stopped: `stop` was set.
        """
        for left in range(self.retries, -1, -1):
            if stop.is_set():
                raise Stopped
            try:
                return self._post(messages)
            except _Retry as failure:
                reason, wait = str(failure), failure.wait
            if left:
                pause = min(self.backoff * 2 ** (self.retries - left), LONGEST_PAUSE)
                pause = wait + pause * random.SystemRandom().uniform(0.5, 1.5)  # the seeded generators stay untouched
                self._warn(f"{self.place}: {reason}; trying again in {pause:.1f} s")
                stop.wait(pause)
        raise UserError(
            f"no answer from {self.place} in {self.retries + 1} tries ({reason}); see that the server runs and that "
            "the url is right, or give it more timeout or retries; what was judged before is kept"
        )

    def _warn(self, line: str) -> None:
        """Log a line, but at most one in 10 seconds, whichever thread it comes from."""
        if time.monotonic() - self._last_logged > 10:
            self._last_logged = time.monotonic()
            log.warning("%s", line)

    def _post(self, messages: Sequence[Message]) -> str:
        data = json.dumps(self.body(messages)).encode()
        request = Request(self.url, data, self._headers(), method="POST")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                text = _read(response, time.monotonic() + self.timeout)
        except HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except (OSError, HTTPException) as error:  # refused, reset, timed out, or half an answer
            reason = getattr(error, "reason", error)
            timed_out = isinstance(reason, TimeoutError)
            problem = f"no answer within {self.timeout:g} s" if timed_out else f"{type(reason).__name__}: {reason}"
            raise _Retry(self._one_line(problem)) from None
        try:
            content = json.loads(text)["choices"][0]["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _Retry(f"it answers '{self._one_line(text)}', which is no chat completion") from None
        return content if isinstance(content, str) else ""

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "User-Agent": f"leyden/{__version__}"}
        key = self._key()
        if not key.isascii() or not key.isprintable() or " " in key:  # http.client would repeat it in its error
            raise UserError(f"{self.key_env} holds characters that no key has, such as a line break; set it again")
        return headers | ({"Authorization": f"Bearer {key}"} if key else {})

    def _key(self) -> str:
        return os.environ.get(self.key_env, "").strip()

    def _one_line(self, text: str) -> str:
        """A server's words on one line, shortened, and without the key, which some repeat."""
        key = self._key()
        line = " ".join((text.replace(key, "***") if key else text).split())
        return line if len(line) <= 200 else line[:199] + "…"

    def _refusal(self, error: HTTPError) -> Exception:
        """The exception for an HTTP status other than 200."""
        code = error.code
        if code in (401, 403):  # what the server says may hold part of the key
            has = "refuses the key in" if self._key() else "wants a key: set"
            return UserError(f"{self.place} {has} {self.key_env} (HTTP {code}); set the environment variable to a key")
        if 300 <= code < 400:
            return UserError(f"{self.place} has moved (HTTP {code}) to {error.headers.get('Location')}; give that url")
        detail = self._one_line(_message(error))
        if code == 404:
            return UserError(f"{self.place}: no such place, or no model '{self.model}' ({detail}); check url and model")
        quota_spent = "insufficient_quota" in detail  # waiting does not fill an account
        if not quota_spent and (code in (408, 409, 425, 429) or code >= 500):
            return _Retry(f"HTTP {code} ({detail})", _retry_after(error.headers.get("Retry-After")))
        return Refused(f"{self.place} refuses the request (HTTP {code}: {detail}); check model, options and rubric")


def _completions(url: str) -> tuple[str, str]:
    """The full url of chat completions, and for messages the same without scheme and query, which may hold secrets."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or " " in url:
        raise UserError(f"url {url}: give the address of a server, such as http://localhost:8000/v1")
    if "@" in parts.netloc:
        raise UserError("url: leave user and password out of it; the key comes from the environment")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
    return parts._replace(path=path, fragment="").geturl(), f"{parts.netloc}{path}"


def _read(response: HTTPResponse, deadline: float) -> str:
    """The body of a response, until a deadline. The socket's own time-out is only for each piece of it."""
    pieces = []
    while piece := response.read1(65536):
        pieces.append(piece)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(pieces).decode("utf-8", "replace")


def _message(error: HTTPError) -> str:
    """The error message of a server: that in its JSON, else the start of its text."""
    try:
        text = error.read(10_000).decode("utf-8", "replace")
    except (OSError, HTTPException):
        return error.reason
    try:
        problem = json.loads(text)["error"]
        message = problem if isinstance(problem, str) else f"{problem.get('message')} {problem.get('code') or ''}"
    except (ValueError, LookupError, TypeError, AttributeError):
        message = text or str(error.reason)
    return str(message)


def _retry_after(value: str | None) -> float:
    """Seconds to wait, from a number of seconds or a date; 0 where it is neither."""
    try:
        seconds = float(value or 0)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(str(value)) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            seconds = 0.0
    return min(max(seconds, 0.0), MOST_PATIENCE) if seconds == seconds else 0.0
