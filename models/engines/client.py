"""What is said to a vLLM server over HTTP, in token ids."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from leyden.errors import UserError
from leyden.policy.policy import Sampling

DEAD = "EngineCore encountered an issue"
"""What a vLLM whose engine has ended answers, with HTTP 500, until its server has ended too."""
UNSEEN = ("No such file", "No adapter found", "does not exist", "Repo id must", "Cannot find any model weights")
"""What it says of a folder that it does not see, which it takes for a model of the hub."""


class Unreachable(Exception):
    """The server did not answer: it is down, going down, or cut off."""


class Slow(Unreachable):
    """It took the request, and has not answered in time."""


class Refused(Exception):
    """The server takes requests, but not this one; its reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status}: {reason}")
        self.status, self.reason = status, reason


class Client:
    """A vLLM server. Threads may share it: each has a connection of its own, kept open.

    Args:
        url: such as `http://127.0.0.1:8000`.
        timeout: seconds that one answer may take.
        flag: where the url is given.
    """

    def __init__(self, url: str, timeout: float = 600.0, flag: str = "--model.engine.url") -> None:
        parts = urlsplit(url.removesuffix("/").removesuffix("/v1"))
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or "@" in parts.netloc:
            raise UserError(f"{flag} {url}: give the address of a server, such as http://127.0.0.1:8000")
        self.url, self.timeout = f"{parts.scheme}://{parts.netloc}", timeout
        self._make = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port, self._prefix = parts.hostname, port, parts.path.rstrip("/")
        self._local = threading.local()
        self._open: dict[HTTPConnection, threading.Thread] = {}
        self._lock, self._breaks = threading.Lock(), 0

    def get(self, path: str, timeout: float | None = None) -> Any:
        """The answer to GET, as JSON; an empty one is {}."""
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: Any = None, timeout: float | None = None) -> Any:
        """The answer to POST, as JSON; an empty one is {}, and plain text is text.

        Raises:
            Refused: HTTP 400 or above.
            Unreachable: no answer, or one of a server that is going down.
        """
        return self._ask("POST", path, json.dumps(body if body is not None else {}).encode(), timeout)

    def is_up(self) -> bool:
        """Whether it takes requests."""
        try:
            self.get("/health", timeout=5.0)
        except (Unreachable, Refused):
            return False
        return True

    def hang_up(self) -> None:
        """Break every connection: requests under way fail in their threads, and the server gives them up."""
        with self._lock:
            self._breaks += 1
            for connection in self._open:
                with suppress(OSError, AttributeError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def tidy(self) -> None:
        """Close the connections of threads that have ended."""
        with self._lock:
            for connection in [one for one, thread in self._open.items() if not thread.is_alive()]:
                del self._open[connection]
                connection.close()

    def close(self) -> None:
        """Break and close every connection; the next request opens one again."""
        self.hang_up()
        with self._lock:
            for connection in self._open:
                connection.close()

    def _ask(self, method: str, path: str, data: bytes | None, timeout: float | None) -> Any:
        connection = self._connection()
        connection.timeout, breaks = timeout or self.timeout, self._breaks
        while True:
            reused = connection.sock is not None
            try:
                if reused:
                    connection.sock.settimeout(connection.timeout)
                connection.request(method, self._prefix + path, data, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                status, text = answer.status, answer.read().decode("utf-8", "replace")
                break
            except (OSError, HTTPException) as error:
                took = isinstance(error, TimeoutError) and connection.sock is not None
                connection.close()
                if took:
                    raise Slow(f"{self.url}{path}: no answer within {connection.timeout:g} s") from None
                # a server ends connections that were idle for long: that is no failure yet
                if not (reused and isinstance(error, ConnectionError) and breaks == self._breaks):
                    raise Unreachable(f"{self.url}{path}: {type(error).__name__}: {error}") from None
        if status in (502, 503, 504) or (status == 500 and DEAD in text):
            raise Unreachable(f"{self.url}{path}: HTTP {status}: {_reason(text)}")
        if status >= 400:
            raise Refused(status, _reason(text))
        try:
            return json.loads(text) if text else {}
        except ValueError:
            return text

    def _connection(self) -> HTTPConnection:
        """This thread's own."""
        found: HTTPConnection | None = getattr(self._local, "connection", None)
        if found is None:
            found = self._local.connection = self._make(self._host, self._port, timeout=self.timeout)
            with self._lock:
                self._open[found] = threading.current_thread()
        return found


def completion(
    model: str,
    prompt: list[int],
    n: int,
    sampling: Sampling,
    seed: int,
    room: int,
    stop: frozenset[int],
    stop_strings: Sequence[str] = (),
) -> dict[str, Any]:
    """The body of a request for `n` samples.

    Args:
        model: as the server calls it.
        prompt: token ids.
        n: samples.
        sampling: how.
        seed: of the first sample; vLLM gives sample k the seed + k.
        room: most tokens of an answer that the model has positions for.
        stop: token ids that end an answer; the one that did is part of it.
        stop_strings: texts that end one; see `Engine.stop_strings`.
    """
    texts = {"stop": list(stop_strings), "include_stop_str_in_output": True} if stop_strings else {}
    return texts | {
        "model": model,
        "prompt": prompt,
        "n": n if sampling.temperature > 0 else 1,  # all would be the same, and vLLM refuses to
        "max_tokens": max(1, min(sampling.max_new_tokens, room)),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "seed": seed,
        "logprobs": 0,
        "return_token_ids": True,
        "stop_token_ids": sorted(stop),
        "ignore_eos": True,
    }


def not_taken_over(client: Client, folder: Path, refusal: Refused) -> UserError:
    """What a refusal of weights means."""
    said = refusal.reason
    if "max_lora_rank" in said or "is greater than" in said:
        advice = "start it with a larger --max-lora-rank"
    elif refusal.status == 404 and said == "Not Found":  # a path that it does not have
        adapters = "--enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 for adapters"
        advice = f"start it with VLLM_SERVER_DEV_MODE=1 (and {adapters})"
    elif any(sign in said for sign in UNSEEN):
        advice = f"it does not see {folder}; give --model.engine.folder a disk that both sides share"
    else:
        advice = "its log says more"
    return UserError(f"{client.url} does not take the weights over ({refusal}); {advice}")


def _reason(text: str) -> str:
    """What a server says of an error, on one line."""
    try:
        found = json.loads(text)
        found = found.get("error", found) if isinstance(found, dict) else found
        text = str(found.get("message") or found.get("detail") or found) if isinstance(found, dict) else str(found)
    except ValueError:
        pass
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:299] + "…"
