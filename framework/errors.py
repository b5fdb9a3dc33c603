"""Errors that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend. The command line prints it as one line, without a traceback, and exits with 2.

    The message says where (`file:line` if there is one), what is wrong, and what to type instead.
    """


class RowError(ValueError):
    """A row that cannot be used. The message says `what is wrong; what to do`; the caller adds where the row stands.

    Args:
        message: what is wrong, and what to do.
        reason: the same in a few words, without the row's own: what summaries count by.
    """

    def __init__(self, message: str, reason: str = "bad") -> None:
        super().__init__(message)
        self.reason = reason


def first_line(error: BaseException) -> str:
    """The first line of what `error`, of a library, says, or the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, options: Iterable[str]) -> str:
    """Which of `options` looks most like `name`, phrased to end a sentence: `; did you mean 'SFT'?`, or nothing."""
    candidates = list(options)
    folded = {option.lower(): option for option in candidates}
    match = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.5)
    return f"; did you mean '{folded[match[0]]}'?" if match else ""
