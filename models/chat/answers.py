"""Answers of one model to conversations, piece by piece: what pages ask for, by this class's path."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from leyden.errors import UserError
from leyden.example import Message
from leyden.models.chat.conversation import Conversation
from leyden.models.chat.loading import load, template_of
from leyden.models.chat.streaming_text import Spelling
from leyden.policy.policy import Sampling


@dataclass(frozen=True)
class Written:
    """How an answer ended.

    Args:
        reason: `end` where the model ended it, `length` at the most new tokens, `positions` where the model has no
            more of them, `stopped` where it was stopped.
        tokens: of the answer, those that say nothing included.
        seconds: of its sampling, the prompt included.
        dropped: number of the oldest turns that had no room in the prompt.
    """

    reason: str
    tokens: int
    seconds: float
    dropped: int


class Answers:
    """A loaded model that answers conversations.

    Args:
        path: model or adapter folder, a run's folder, hub name, or `tiny`.
        sampling: how it samples; the n-th answer, from 0, has the noise of a prompt with key n.
        dtype: of the weights; default: bfloat16 on a GPU, else float32.
        chat_template: instead of the model's own.
        base: an adapter's base, if it is not where the adapter says.
        template_args: arguments of the chat template.

    Raises:
        UserError: there is no such model, or it cannot chat.
    """

    def __init__(
        self,
        path: str,
        sampling: Sampling | None = None,
        dtype: str | None = None,
        chat_template: str | None = None,
        base: str | None = None,
        template_args: dict[str, Any] | None = None,
    ) -> None:
        self.policy = load(path, dtype, base)
        self.template = template_of(self.policy, chat_template, template_args)
        self.sampling = sampling or Sampling(512, 0.7)
        self._keys = count()
        self._lock = Lock()  # a model writes one answer at a time

    @property
    def positions(self) -> int | None:
        """Number of the model's positions, in tokens; None for no limit."""
        return self.policy.positions

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return sum(parameter.numel() for parameter in self.policy.parameters())

    def direct(self, system: str) -> None:
        """Raise `UserError` if the template has no place for a system prompt."""
        Conversation(self.template, self.positions, self.sampling.max_new_tokens, system)

    def stream(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling | None = None) -> Iterator[str]:
        """The answer to a conversation, as text that no later piece changes. Closing the iterator ends the sampling.

        Args:
            messages: turns, `role` and `content` each, of which the last is the user's; the oldest are left out where
                they no longer fit the model's positions.
            sampling: instead of the model's own.

        Raises:
            UserError: the last turn alone has no room in the model's positions.
        """
        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
        stopped = Event()

        def sample() -> None:
            try:
                self.write(messages, lambda piece, tokens: pieces.put(piece), sampling, None, stopped.is_set)
                pieces.put(None)
            except BaseException as error:
                pieces.put(error)

        thread = Thread(target=sample, daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            stopped.set()
            thread.join()

    def write(
        self,
        messages: Sequence[Mapping[str, Any]],
        show: Callable[[str, int], None],
        sampling: Sampling | None = None,
        number: int | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Written:
        """Answer a conversation, as `stream` does, in this thread.

        Args:
            messages: turns, see `stream`.
            show: called with each piece of text, and the number of tokens so far.
            sampling: instead of the model's own.
            number: of the answer, which decides its noise; the next one where it is None.
            is_stopped: asked after every token; true ends the answer.
        """
        settings = sampling or self.sampling
        prompt, dropped = self._prompt(messages, settings)
        tokenizer = self.policy.tokenizer
        spelling = Spelling(
            lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
            lambda token: tokenizer.convert_ids_to_tokens(token),  # type: ignore[arg-type, return-value]
        )

        def add(i: int, k: int, token: int) -> None:
            if is_stopped():
                raise _Stopped
            if piece := spelling.add(token):
                show(piece, len(spelling.tokens))

        finished = None
        with self._lock:
            since = time.perf_counter()
            try:
                key = next(self._keys) if number is None else number
                groups = self.policy.generate([prompt], 1, settings, [key], on_token=add)
                finished = groups[0][0].finished
            except _Stopped:
                pass
            seconds = time.perf_counter() - since
        tokens = len(spelling.tokens)
        if piece := spelling.end(finished is True):
            show(piece, tokens)
        reason = "stopped" if finished is None else "end" if finished else "length"
        cut = reason == "length" and tokens < settings.max_new_tokens
        return Written("positions" if cut else reason, tokens, seconds, dropped)

    def _prompt(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling) -> tuple[list[int], int]:
        """Token ids of a prompt, and the number of turns that it leaves out."""
        turns = [Message(role=turn["role"], content=turn["content"]) for turn in messages]
        system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
        if not turns or turns[-1]["role"] != "user":
            raise UserError("a conversation ends with a turn of the user, which is answered")
        conversation = Conversation(self.template, self.positions, sampling.max_new_tokens, system)
        conversation.turns = turns[:-1]
        return conversation.ask(turns[-1]["content"])


class _Stopped(Exception):
    """Nobody reads on."""
