"""The loop of a chat: lines in, answers out while they are sampled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from leyden.errors import UserError, nearest
from leyden.models.causal_lm import CausalLM
from leyden.models.chat.conversation import Conversation
from leyden.models.chat.streaming_text import Spelling
from leyden.policy.policy import Sampling

COMMANDS = {
    "/new": "start over; the system prompt stays",
    "/system TEXT": "another system prompt from the next answer on; without TEXT none",
    "/regenerate": "another answer to the last question (or /again)",
    "/save FILE": "add the conversation to a JSONL file, as a row of instruction data",
    "/quit": "end (or Ctrl-D); Ctrl-C ends only the answer that is being written",
    "/help": "this; a line that starts with a blank is a question even if a / follows",
}


class Talk:
    """Reads lines and answers them until they end.

    On a terminal a note says what is no answer; through pipes answers alone go to standard output.

    Args:
        policy: a built model.
        conversation: what was said so far.
        sampling: how answers are sampled; the noise of the n-th answer is that of the prompt with key n, from 0.
    """

    def __init__(self, policy: CausalLM, conversation: Conversation, sampling: Sampling) -> None:
        self.policy, self.conversation, self.sampling = policy, conversation, sampling
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.answers = 0
        """How many were begun."""
        self.failed = False
        """Whether a line could not be done."""

    def run(self) -> int:
        """Talk. The exit code is 1 if a line of a pipe could not be done."""
        if self.terminal:
            with suppress(ImportError):  # lines can be edited and called back, but not on Windows
                import readline  # noqa: F401
            size = sum(parameter.numel() for parameter in self.policy.parameters())
            self.note(f"{self.policy.path}, {size / 1e6:,.1f} M parameters; /help for commands, Ctrl-D to end")
        while (line := self._read()) is not None and line.rstrip() != "/quit":
            try:
                self.take(line)
            except UserError as error:
                self.failed = True
                self.note(f"error: {error}")
        return int(self.failed and not self.terminal)

    def _read(self) -> str | None:
        """The next line, None at the end."""
        if not self.terminal:
            return sys.stdin.readline() or None
        while True:
            try:
                return input("> ")
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                print("  (Ctrl-D ends the chat)")

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        sys.stdout.flush()
        print(text, file=sys.stderr, flush=True)

    def take(self, line: str) -> None:
        """Do what a line asks for. UserError if it cannot be done."""
        if line.startswith("/"):
            self.command(*line.strip().partition(" ")[::2])
        elif words := line.strip():
            self.conversation.answer(self.say(*self.conversation.ask(words)))

    def command(self, name: str, words: str) -> None:
        """Do a command. UserError if there is none of this name, or it cannot be done."""
        words = words.strip()
        if name == "/new":
            self.conversation.clear()
            self.note("(a new conversation)")
        elif name == "/system":
            self.conversation.direct(words)
            self.note("(another system prompt)" if words else "(no system prompt)")
        elif name in ("/regenerate", "/again"):
            before = self.conversation.turns[-1:]
            said = self.say(*self.conversation.again())
            self.conversation.answer(said or before[0]["content"])
        elif name == "/save":
            if not words:
                raise UserError("/save: into which file? Type /save chat.jsonl, for example")
            self.note(f"({self.conversation.save(Path(words))} turns added to {words})")
        elif name == "/help":
            self.note("\n".join(f"  {command:<14}{text}" for command, text in COMMANDS.items()))
        else:
            names = [*(command.split()[0] for command in COMMANDS), "/again"]
            raise UserError(f"no command is called '{name}'{nearest(name, names) or '; /help lists them'}")

    def say(self, prompt: Sequence[int], dropped: int) -> str:
        """Answer a prompt, as far as Ctrl-C lets it: the text, shown while it is sampled.

        Args:
            prompt: token ids.
            dropped: turns that had to be left out of it since the last answer.
        """
        if dropped:
            self.note(f"(the {dropped} oldest turns no longer fit the model's {self.policy.positions:,} positions)")
        tokenizer, pieces = self.policy.tokenizer, list[str]()
        spelling = Spelling(
            lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=True)),
            lambda token: tokenizer.convert_ids_to_tokens(token),  # type: ignore[arg-type, return-value]
        )

        def show(piece: str) -> None:
            if piece:
                pieces.append(piece)
                print(piece, end="", flush=True)

        key, self.answers, finished = self.answers, self.answers + 1, None
        try:
            groups = self.policy.generate(
                [list(prompt)], 1, self.sampling, [key], on_token=lambda i, k, token: show(spelling.add(token))
            )
            finished = groups[0][0].finished
        except KeyboardInterrupt:
            if not self.terminal:
                raise
        show(spelling.end(finished is True))
        print(flush=True)
        self._explain(finished, len(spelling.tokens), "".join(pieces))
        return "".join(pieces)

    def _explain(self, finished: bool | None, tokens: int, text: str) -> None:
        """Say what ended an answer, unless it did so by itself."""
        if finished is None:
            self.note("(stopped)" if text else "(stopped before the first word; the question is taken back)")
        elif not finished and tokens < self.sampling.max_new_tokens:
            self.note(f"(cut after {tokens:,} tokens: the model has positions for {self.policy.positions:,})")
        elif not finished:
            self.note(f"(cut after {tokens:,} tokens; --max-new-tokens {2 * tokens} allows more)")
        elif not text:
            self.note("(the model says nothing; the question is taken back)")
