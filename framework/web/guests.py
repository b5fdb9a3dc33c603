"""Who may come in: people, each with a token of their own, of which only a hash is kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable

Guests = Callable[[], Iterable[tuple[str, str]]]
"""Gives (person, hash of a token of theirs) of everyone who may come in; a person may have several tokens."""


def new_token() -> str:
    """32 characters that nobody guesses: 192 random bits."""
    return secrets.token_urlsafe(24)


def hashed(token: str) -> str:
    """What is kept of a token. It is random and long, so that a fast hash without salt cannot be searched."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def whose(token: str, guests: Iterable[tuple[str, str]]) -> str | None:
    """The person of a token, or None. It takes as long for a wrong token as for a right one."""
    given, found = hashed(token), None
    for person, kept in guests:
        if hmac.compare_digest(given, kept):
            found = person
    return found


class Invited:
    """Guests that are known as long as the program runs."""

    def __init__(self) -> None:
        self._hashes: list[tuple[str, str]] = []

    def invite(self, person: str) -> str:
        """A new token for a person."""
        token = new_token()
        self._hashes.append((person, hashed(token)))
        return token

    def __call__(self) -> list[tuple[str, str]]:
        return list(self._hashes)
