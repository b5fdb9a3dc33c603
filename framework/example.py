"""Rows of data, sampled answers and chat messages as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it. `role` is system, user, assistant or tool."""

    role: str
    content: str
    """What is said; empty only where a turn calls tools, or a tool returns nothing."""
    reasoning_content: NotRequired[str]
    """What an assistant thought before it spoke, where that is no part of `content`."""
    tool_calls: NotRequired[list[dict[str, Any]]]
    """`{"type": "function", "function": {"name": …, "arguments": {…}}}`, with an `id` where the row gives one."""
    tool_call_id: NotRequired[str]
    name: NotRequired[str]
    trained: NotRequired[bool]
    """False: an assistant turn that is context alone. Templates do not see this key."""


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
    tools: list[dict[str, Any]] = field(default_factory=list)
    """The tools that may be called, `{"type": "function", "function": {"name": …, "parameters": …}}` each."""
    source: str = ""
    """Where the row stands, as `file:line`."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The row as read, so that rewards can see answers and other columns."""
    left_out: int = 0
    """Responses of the row that are not here, since they tie with, or repeat, one that is."""
    not_read: Mapping[str, bool] = field(default_factory=dict)
    """Columns, and keys of messages, that have something in them and are not read -> whether that is text."""

    def prompt_columns(self) -> dict[str, Any]:
        """The prompt as the columns of a row that is written: its messages, and the tools where there are some."""
        return {"prompt": self.messages} | ({"tools": self.tools} if self.tools else {})


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
    tools: list[dict[str, Any]] = field(default_factory=list)
    """The tools that the prompt offers."""
