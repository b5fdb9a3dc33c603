"""`leyden plan`: the memory that a run would take, before anything is downloaded or loaded."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence

from leyden.cli.command import read_command
from leyden.errors import UserError
from leyden.language import say

UNITS = {"": 1.0, "B": 1.0, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40}


def main(argv: Sequence[str]) -> int:
    """Print the plan of a run and return the exit code.

    0 if the run fits or no memory is given, 1 if it does not fit. Raises `UserError` for mistakes.
    """
    if not argv or {"-h", "--help", "help"} & set(argv):
        say(_help())
        return 0
    fit_arguments, options = _split_arguments(argv)
    room, devices = _bytes(options.get("memory")), _count(options.get("devices"))
    command = read_command("fit", fit_arguments)
    warnings.filterwarnings("ignore")
    from leyden.models.planner.budget import budget
    from leyden.models.planner.reading import resolved, settings
    from leyden.models.planner.report import report, verdict

    logging.getLogger("transformers").setLevel(logging.ERROR)
    planned, notes = settings(resolved(command), devices)
    plan = budget(planned.run(), room)
    say(report(planned, plan, notes, room))
    if room is None:
        return 0
    say(f"\n{verdict(planned, plan, room)}")
    return 0 if plan.total <= room else 1


def _split_arguments(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments of `leyden fit`, and the values of `--memory` and `--devices` by name."""
    fit_arguments, options, words = list[str](), dict[str, str](), list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in ("memory", "devices"):
            fit_arguments.append(word)
            continue
        if not equals and (not words or words[0].startswith("--")):
            raise UserError(f"--{name} needs a value, such as --{name} {'8GB' if name == 'memory' else 2}")
        options[name] = value if equals else words.pop(0)
    return fit_arguments, options


def _bytes(text: str | None) -> float | None:
    """Bytes of a size: `8GB` is 8e9, `8GiB` is 8 · 2³⁰; None for None."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d*\.?\d+)\s*([a-zA-Z]*)", text.strip(), re.ASCII)
    if match is None or match[2].upper() not in UNITS or not float(match[1]):
        raise UserError(f"--memory {text}: give a size such as 8GB or 24GiB")
    return float(match[1]) * UNITS[match[2].upper()]


def _count(text: str | None) -> int | None:
    if text is not None and (not text.isdigit() or not int(text)):
        raise UserError(f"--devices {text}: give a number of devices, 1 or more")
    return None if text is None else int(text)


def _help() -> str:
    return """leyden plan: what a run would hold in memory on each device, before anything is downloaded

usage: leyden plan --config NAME [--config NAME …] [--KEY VALUE …] [--memory 8GB] [--devices N]

  --memory SIZE                     of one device, such as 8GB or 24GiB: says what fits, and what to change
  --devices N                       instead of --trainer.devices
  --trainer.accelerator gpu         plans for a GPU where there is none

It takes the configs and flags of `leyden fit` and reads the model's configuration, no weights. With
--data.path it reads the lengths of the rows; without, they are as long as --data.max_length lets them be.
Exit code: 0 if the run fits or no memory is given, 1 if it does not fit, 2 for mistakes."""
