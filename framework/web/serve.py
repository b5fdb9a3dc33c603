"""The server of a page: its address, the links to it, and its end."""

from __future__ import annotations

import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from leyden.errors import UserError
from leyden.language import say

if TYPE_CHECKING:
    from types import FrameType

    from starlette.types import ASGIApp


@dataclass(frozen=True)
class Address:
    """Where a page is.

    Args:
        host: address that the server listens at.
        port: 0 takes a free one.
        url: what people type where that is another address, a proxy's or a tunnel's.
    """

    host: str = "127.0.0.1"
    port: int = 8800
    url: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"--port {self.port}: give a number from 0 to 65535")
        if self.url and (urlsplit(self.url).scheme not in ("http", "https") or not urlsplit(self.url).hostname):
            raise UserError(f"--url {self.url}: give an address that people open, such as https://votes.example.org")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host == "localhost" or _is_loopback(self.host)

    def hosts(self) -> frozenset[str]:
        """Names that a browser may call it by. A name of someone else's that leads here is none of them, so no page of
        theirs can read this one (DNS rebinding)."""
        names = {"localhost", urlsplit(self.url).hostname or "localhost"}
        if not self.is_local:
            own = socket.gethostname().lower()
            names |= {own, socket.getfqdn().lower(), f"{own}.local", self.host.lower()}
        return frozenset(names)

    def link(self, token: str) -> str:
        """The link of a person."""
        host = _outward() if self.host in ("0.0.0.0", "::", "") else self.host
        base = self.url.rstrip("/") or f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        return f"{base}/#{token}"


def require_packages(command: str) -> None:
    """Raise `UserError` if a package is missing that pages need."""
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise UserError(f"{command}: {package} is not installed; type pip install 'leyden[annotate]'")


def listen(address: Address) -> tuple[socket.socket, Address]:
    """An open socket at an address, and the address with the port that it has.

    Raises:
        UserError: the port is taken, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((address.host, address.port))
        opened.listen(128)
    except OSError as error:
        opened.close()
        if error.errno == errno.EADDRINUSE:
            free = "--port 0 takes a free one"
            raise UserError(f"--port {address.port}: another program listens there; name another, or {free}") from None
        reason = f"{address.host}:{address.port} cannot be listened at ({error.strerror or error})"
        raise UserError(f"--host {reason}; give an address of this machine, or 0.0.0.0 for all of them") from None
    return opened, Address(address.host, opened.getsockname()[1], address.url)


def serve(
    app: ASGIApp, opened: socket.socket, lines: Sequence[str], on_stop: Callable[[], None] = lambda: None
) -> None:
    """Show an application until Ctrl-C or SIGTERM; requests that are under way then have three seconds. Nothing that
    people ask for is logged.

    Args:
        app: the application.
        opened: where it is shown.
        lines: printed first.
        on_stop: called at Ctrl-C or SIGTERM, so that long answers can end.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # requests that end here have not failed
            on_stop()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=3,
        timeout_keep_alive=30,
        limit_concurrency=512,
    )
    for line in lines:
        say(line, flush=True)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn hands signals on once it has ended
    try:
        Server(config).run(sockets=[opened])
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        opened.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _outward() -> str:
    """The address by which other machines reach this one, as far as it knows; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for examples
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname().lower()
