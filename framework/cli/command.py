"""A Trainer command as typed, read and checked as far as possible without importing anything heavy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leyden.cli import class_names
from leyden.cli.config_keys import Key, flag_keys, flags, read, render
from leyden.errors import UserError, nearest

_USUAL = {"Policy": "CausalLM", "Evaluator": "Evaluation"}
"""Abstract class -> the subclass that is built where only arguments are given."""


@dataclass
class Command:
    """A Trainer command, `leyden VERB …`."""

    verb: str
    classes: list[list[str]] = field(default_factory=list)
    """The classes chosen for `model`, `data`, `model.policy` …, as flags. They come first, so that a file that only
    sets arguments may stand anywhere."""
    files: list[dict[str, Any]] = field(default_factory=list)
    """Content of the config files, merged left to right"""
    shipped: list[str | None] = field(default_factory=list)
    """The name of each of these that is a shipped config or was written by a run; None for files of the user"""
    flags: list[list[Any]] = field(default_factory=list)
    """The other flags as [name, value]; they win over files"""
    keys: list[Key] = field(default_factory=list)
    """The keys of all of these in the order in which they apply"""

    def arguments(self) -> list[str]:
        """The arguments for the parser."""
        files = [f"--config={json.dumps(content, ensure_ascii=False)}" for content in self.files]
        return [self.verb, *map(render, self.classes), *files, *map(render, self.flags)]


def read_command(verb: str, args: list[str]) -> Command:
    """Read config files and flags.

    Raises:
        UserError: a config file, a class or a flag's value is missing, or a file is not a config.
    """
    pairs = flags(args)
    if not pairs:
        raise UserError(f"say what to {verb}: leyden {verb} --config sft --data.path FILE (see leyden {verb} --help)")
    help_flag = next((pair for pair in pairs if pair[0].endswith(".help")), None)
    if help_flag is not None:
        return Command(verb, flags=[_help_on(help_flag)])
    command = Command(verb)
    for name, value in pairs:
        if name == "config":
            content, keys = read(file := class_names.config_file(value))
            command.files.append(content)
            command.shipped.append(value if file in class_names.configs().values() or _is_written(file) else None)
            command.keys += keys
    # A class is chosen before its arguments are given, in whatever order they were typed.
    order = {kind: kind.count(".") for kind in class_names.KINDS}
    command.flags = sorted((pair for pair in pairs if pair[0] != "config"), key=lambda pair: order.get(pair[0], 2))
    command.keys += flag_keys(command.flags)
    _choose_classes(command)
    return command


def _is_written(file: Path) -> bool:
    """Whether a run wrote this config, so that nobody typed its keys."""
    return file.read_text(encoding="utf-8-sig").startswith("# leyden ")


def _help_on(flag: list[str]) -> list[str]:
    """`--model.help SFT` with the class path, which the parser needs."""
    kind = flag[0].removesuffix(".help")
    return [
        flag[0],
        class_names.class_path(kind, flag[1], f"--{flag[0]}") if kind in class_names.KINDS and flag[1] else flag[1],
    ]


def _choose_classes(command: Command) -> None:
    """Replace short class names by class paths in all keys, and put the final choices first, as flags."""
    chosen: dict[str, str] = {}
    for key in command.keys:
        kind = ".".join(key.path)
        if kind in class_names.KINDS and isinstance(key.value, str):
            chosen[kind] = key.box[key.slot] = class_names.class_path(kind, key.value, key.where)
            key.is_class = True
    for kind in ("model", "data"):
        if kind not in chosen:
            for name in (name for name, _ in command.flags if "." not in name):
                if typo := nearest(name, ["config", kind]):
                    raise UserError(f"--{name}: no such flag{typo}")
            known = " or ".join(sorted(class_names.of_kind(kind)))
            raise UserError(f"--{kind}: missing; add --config NAME or --{kind} CLASS (such as {known})")
    for kind, root in class_names.KINDS.items():  # where there is one class of a kind, nobody has to name it
        place = tuple(kind.split("."))
        if root in _USUAL and any(key.path[: len(place)] == place for key in command.keys):
            chosen.setdefault(kind, class_names.class_path(kind, _USUAL[root], f"--{kind}"))
    command.classes = [[kind, chosen[kind]] for kind in class_names.KINDS if kind in chosen]
    first = [Key(tuple(pair[0].split(".")), pair, 1, f"--{pair[0]}", is_class=True) for pair in command.classes]
    command.keys = [*first, *command.keys]
