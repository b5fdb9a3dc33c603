"""The parser of the commands that are not the Trainer's. A mistake becomes one line with the nearest flag."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from leyden.errors import UserError, nearest
from leyden.language import localised, say


class Parser(argparse.ArgumentParser):
    """Flags and words of one command.

    Args:
        prog: the command as typed, `leyden data check`.
        description: what it does, for --help.
    """

    def __init__(self, prog: str, description: str | None = None) -> None:
        super().__init__(prog=prog, description=localised(description or ""), allow_abbrev=False)

    def add_argument(self, *flags: Any, help: str | None = None, **how: Any) -> argparse.Action:
        return super().add_argument(*flags, help=help and localised(help), **how)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command's arguments. UserError for those that are not known."""
        options, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown[0].partition("=")[0]
            hint = nearest(word, flags) if word.startswith("-") else ""
            raise UserError(f"{self.prog}: '{word}' is not known{hint or f'; see {self.prog} --help'}")
        return options

    def mapping(self, *flags: str, metavar: str, help: str) -> None:
        """A flag with names and values in braces, as YAML or JSON."""

        def read(value: str) -> dict[str, Any]:
            import yaml

            try:
                content = yaml.safe_load(value)
            except yaml.YAMLError:
                content = None
            if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
                raise UserError(f"{flags[0]} {value}: write names and values in braces, {metavar}")
            return content

        self.add_argument(*flags, dest=flags[0].strip("-").replace("-", "_"), type=read, metavar=metavar, help=help)

    def choice(self, flag: str, options: Sequence[str], default: str | None = None, help: str = "") -> None:
        """A flag with one of a few values."""

        def one_of(value: str) -> str:
            if value not in options:
                raise UserError(f"{flag} {value}: use {', '.join(options)}{nearest(value, options)}")
            return value

        self.add_argument(flag, type=one_of, default=default, metavar="|".join(options), help=help)


def show_every_character() -> None:
    """Let a terminal that cannot show a character show its number, and not fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run_verb(
    command: str, verbs: Mapping[str, Callable[[list[str]], int]], help: Callable[[], str], argv: list[str]
) -> int:
    """Run one verb of a command that has several, or print its help, and return the exit code.

    Args:
        command: its name, `data`.
        verbs: what each verb runs, given the arguments behind it.
        help: makes the text for --help.
        argv: the verb and its arguments.

    Raises:
        UserError: there is no such verb, or the user can mend what it says.
    """
    show_every_character()
    if not argv or argv[0] in ("-h", "--help", "help"):
        say(help())
        return 0
    verb, *rest = argv
    if verb not in verbs:
        raise UserError(f"{command}: no verb '{verb}'{nearest(verb, verbs) or '; use ' + ', '.join(verbs)}")
    return verbs[verb](rest)
