"""Answers of one model to conversations, piece by piece: what pages ask for, by this class's path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

from leyden.errors import UserError
from leyden.example import Message
from leyden.models.chat.conversation import Conversation
from leyden.models.chat.main import load, template_of
from leyden.models.chat.streaming_text import Spelling
from leyden.policy.policy import Sampling


class Answers:
    """A loaded model that answers conversations.

    Args:
        path: model or adapter folder, a run's folder, hub name, or `tiny`.
        sampling: how it samples; the n-th answer, from 0, has the noise of a prompt with key n.
        dtype: of the weights; default: bfloat16 on a GPU, else float32.
        chat_template: instead of the model's own.

    Raises:
        UserError: there is no such model, or it cannot chat.
    """

    def __init__(
        self, path: str, sampling: Sampling | None = None, dtype: str | None = None, chat_template: str | None = None
    ) -> None:
        self.policy = load(path, dtype)
        self.template = template_of(self.policy, chat_template, None)
        self.sampling = sampling or Sampling(512, 0.7)
        self._keys = count()
        self._lock = Lock()  # a model writes one answer at a time

    def stream(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling | None = None) -> Iterator[str]:
        """The answer to a conversation, as text that no later piece changes. Closing the iterator ends the sampling.

        Args:
            messages: turns, `role` and `content` each, of which the last is the user's; the oldest are left out where
                they no longer fit the model's positions.
            sampling: instead of the model's own.

        Raises:
            UserError: the last turn alone has no room in the model's positions.
        """
        prompt, settings = self._prompt(messages, sampling or self.sampling), sampling or self.sampling
        pieces: SimpleQueue[str | BaseException | None] = SimpleQueue()
        stopped = Event()
        thread = Thread(target=self._sample, args=(prompt, settings, pieces.put, stopped), daemon=True)
        thread.start()
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                if piece:
                    yield piece
        finally:
            stopped.set()
            thread.join()

    def _prompt(self, messages: Sequence[Mapping[str, Any]], sampling: Sampling) -> list[int]:
        turns = [Message(role=turn["role"], content=turn["content"]) for turn in messages]
        system = turns.pop(0)["content"] if turns and turns[0]["role"] == "system" else ""
        if not turns or turns[-1]["role"] != "user":
            raise UserError("a conversation ends with a turn of the user, which is answered")
        conversation = Conversation(self.template, self.policy.positions, sampling.max_new_tokens, system)
        conversation.turns = turns[:-1]
        return conversation.ask(turns[-1]["content"])[0]

    def _sample(
        self, prompt: list[int], sampling: Sampling, put: Callable[[str | BaseException | None], None], stopped: Event
    ) -> None:
        """Sample an answer and put its pieces, then None, or what went wrong."""
        tokenizer = self.policy.tokenizer
        spelling = Spelling(
            lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
            lambda token: tokenizer.convert_ids_to_tokens(token),  # type: ignore[arg-type, return-value]
        )

        def add(i: int, k: int, token: int) -> None:
            if stopped.is_set():
                raise _Stopped
            put(spelling.add(token))

        try:
            with self._lock:
                groups = self.policy.generate([prompt], 1, sampling, [next(self._keys)], on_token=add)
            put(spelling.end(bool(groups[0][0].finished)))
            put(None)
        except _Stopped:
            put(None)
        except BaseException as error:
            put(error)


class _Stopped(Exception):
    """Nobody reads on."""
