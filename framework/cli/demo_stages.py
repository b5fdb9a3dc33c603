"""Commands run one after the other, and remembered, so that a sequence that broke off goes on where it was."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from leyden.errors import UserError
from leyden.run.folder import write_whole

Main = Callable[[list[str]], int]


class Stages:
    """Says what each command is for, runs it, and notes down in the folder that it has ended.

    Args:
        main: the command line.
        folder: of all that is made.
        settings: what the sequence depends on; with others it cannot go on.

    Raises:
        UserError: the folder belongs to a sequence with other settings.
    """

    def __init__(self, main: Main, folder: Path, settings: dict[str, Any]) -> None:
        self.main, self.file, self.settings = main, folder / "stages.json", settings
        self.count, self.seconds = 0, dict[str, float]()
        """What each command was for -> how long it took"""
        if (known := recorded(folder)) is not None:
            if known["settings"] != settings:
                raise UserError(f"{folder}: it holds another size of this; go on with that one, or name another folder")
            self.seconds = dict(known["seconds"])

    def __call__(self, what: str, *arguments: object, makes: Path | None = None) -> None:
        """Run a command, unless it has ended before.

        Args:
            what: it is for.
            arguments: the words after `leyden`.
            makes: a file that the command will not write twice; what is there of it is from a broken-off attempt.
        """
        self.count += 1
        words = [str(argument) for argument in arguments]
        print(f"\n[{self.count}] {what}\n    leyden {shlex.join(words)}", flush=True)
        if what in self.seconds:
            print("    done before", flush=True)
            return
        if makes is not None:
            shutil.rmtree(makes) if makes.is_dir() else makes.unlink(missing_ok=True)
        began = time.monotonic()
        if code := self.main(words):
            raise UserError(f"stage {self.count} ended with code {code}; see the message above")
        self.seconds[what] = time.monotonic() - began
        self.note()

    def note(self, **more: Any) -> None:
        """Write down what has ended."""
        write_whole(self.file, json.dumps({"settings": self.settings, "seconds": self.seconds} | more) + "\n")


def recorded(folder: Path) -> dict[str, Any] | None:
    """What stands in a folder of such a sequence; None where there is none."""
    file = folder / "stages.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def unfinished(folders: Sequence[Path], settings: dict[str, Any]) -> Path | None:
    """The last of these folders, if its sequence has these settings and broke off."""
    known = recorded(folders[-1]) if folders else None
    return folders[-1] if known and known["settings"] == settings and not known.get("ended") else None
