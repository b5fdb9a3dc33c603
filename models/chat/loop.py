"""The chat loop: reads lines, and prints answers while they are sampled."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from leyden.errors import UserError, nearest
from leyden.language import say
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
    """A chat that reads lines and answers them until the input ends.

    Answers go to standard output, and all notes and errors to standard error.

    Args:
        policy: a built model.
        conversation: the turns so far.
        sampling: sampling settings; the n-th answer, from 0, has the noise of a prompt with key n.
    """

    def __init__(self, policy: CausalLM, conversation: Conversation, sampling: Sampling) -> None:
        self.policy, self.conversation, self.sampling = policy, conversation, sampling
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.answers = 0
        """Number of answers begun."""
        self.failed = False
        """Whether a line failed."""

    def run(self) -> int:
        """Run the chat and return the exit code: 1 if a line from a pipe failed, else 0."""
        if self.terminal:
            with suppress(ImportError):  # line editing and history; not on Windows
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
        """The next line of input, None at the end."""
        if not self.terminal:
            return sys.stdin.readline() or None
        while True:
            try:
                return input("> ")
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:
                say("  (Ctrl-D ends the chat)")

    def note(self, text: str) -> None:
        """Print a note or an error to standard error."""
        sys.stdout.flush()
        say(text, file=sys.stderr, flush=True)

    def take(self, line: str) -> None:
        """Process a line: a command or a question. UserError if it fails."""
        if line.startswith("/"):
            self.command(*line.strip().partition(" ")[::2])
        elif words := line.strip():
            self.conversation.answer(self.say(*self.conversation.ask(words)))

    def command(self, name: str, words: str) -> None:
        """Run a command. UserError if no command has this name, or it fails."""
        words = words.strip()
        if name == "/new":
            self.conversation.clear()
            self.note("(a new conversation)")
        elif name == "/system":
            self.conversation.direct(words)
            self.note("(another system prompt)" if words else "(no system prompt)")
        elif name in ("/regenerate", "/again"):
            last_turn = self.conversation.turns[-1:]
            answer = self.say(*self.conversation.again())
            self.conversation.answer(answer or last_turn[0]["content"])
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
        """Answer a prompt, and print the answer while it is sampled. Ctrl-C ends it early.

        Args:
            prompt: token ids.
            dropped: number of turns that the prompt newly leaves out.

        Returns:
            The text of the answer.
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
        self._note_end(finished, len(spelling.tokens), "".join(pieces))
        return "".join(pieces)

    def _note_end(self, finished: bool | None, tokens: int, text: str) -> None:
        """Note the reason why an answer ended, unless the model ended it."""
        if finished is None:
            self.note("(stopped)" if text else "(stopped before the first word; the question is taken back)")
        elif not finished and tokens < self.sampling.max_new_tokens:
            self.note(f"(cut after {tokens:,} tokens: the model has positions for {self.policy.positions:,})")
        elif not finished:
            self.note(f"(cut after {tokens:,} tokens; --max-new-tokens {2 * tokens} allows more)")
        elif not text:
            self.note("(the model says nothing; the question is taken back)")
