"""Rows of data, sampled answers and chat messages as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it. `role` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass
class Example:
    """One row of data: a prompt and the responses that follow it.

    For `{"prompt": "2+2?", "response": "4"}` that is
    `Example([{"role": "user", "content": "2+2?"}], [[{"role": "assistant", "content": "4"}]])`.
    A multi-turn conversation is one response that starts at its first assistant turn and also holds the later user
    turns; only assistant turns are trained. A row of plain text has no messages and the text in `text`.
    """

    messages: list[Message]
    """The prompt: every turn before the first assistant turn that a response starts with. Empty for plain text."""
    responses: list[list[Message]] = field(default_factory=list)
    """Each response is a list of turns that starts with an assistant turn; preferences put the best first."""
    scores: list[float] | None = None
    """One label or reward a response, where the row gives them."""
    text: str | None = None
    """Plain text for continued pretraining; then `messages` and `responses` are empty."""
    source: str = ""
    """Where the row stands, as `file:line`."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row as read, so that rewards can see answers and other columns."""
    left_out: int = 0
    """Responses of the row that are not here, since they tie with, or repeat, one that is."""
    not_read: Mapping[str, bool] = field(default_factory=dict)
    """Columns, and keys of messages, that have something in them and are not read -> whether that is text."""


@dataclass
class Sample:
    """One sampled response, as a reward sees it."""

    messages: list[Message]
    """The prompt."""
    response: str
    """The sampled text, without the tokens that end a turn."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row that the prompt came from."""
    finished: bool = True
    """Whether the response ended by itself (an end-of-turn token) and was not cut at the length limit."""
    source: str = ""
    """Where the prompt stands, as `file:line`."""
