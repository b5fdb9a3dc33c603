"""Keys of config files and flags, each with the place where it stands."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from leyden.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-4` is a number, as everybody means it; YAML 1.1 wants `1.0e-4`."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


@dataclass
class Key:
    """A key and its value. The path of `model: {init_args: {policy: {class_path: X}}}` is ("model", "policy")."""

    path: tuple[str, ...]
    """Without `init_args` and `class_path`; list items by their number"""
    box: Any
    """The value's container, in which it can be replaced: a mapping or list of the file, or a flag's [name, value]"""
    slot: Any
    """The value's key or index in `box`"""
    where: str
    """`file:line`, or the flag as typed"""
    is_class: bool = False
    """The value is the class of the object at `path`"""

    @property
    def value(self) -> Any:
        return self.box[self.slot]


def flags(args: Sequence[str]) -> list[list[str]]:
    """Arguments as [name, value] pairs: `--a.b=1`, `--a.b 1` and `--a.b+=1` alike (the `+` stays in the name)."""
    pairs, rest = [], list(args)
    while rest:
        item = rest.pop(0)
        if item == "-c":
            item = "--config"
        if not item.startswith("--"):
            raise UserError(f"'{item}' is neither a flag nor a flag's value; flags look like --data.path FILE")
        name, equals, value = item[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals and not name.startswith("print_config") and not name.endswith("help"):
            raise UserError(f"--{name} needs a value: --{name} VALUE")
        pairs.append([name, value])
    return pairs


def flag_keys(pairs: list[list[str]]) -> list[Key]:
    """The keys of flags other than `--config`. A value in braces or brackets is read like a file's."""
    keys = []
    for pair in pairs:
        path = tuple(part for part in pair[0].rstrip("+").split(".") if part != "init_args")
        where = f"--{pair[0]}"
        if path[-1] in ("help", "print_config"):
            continue
        if path[-1] == "class_path":
            keys.append(Key(path[:-1], pair, 1, where, is_class=True))
        elif pair[1][:1] in ("{", "["):
            keys += _nested(pair, path, where)
        else:
            keys.append(Key(path, pair, 1, where, is_class=len(path) == 1 and path[0] in ("model", "data", "eval")))
    return keys


def _nested(pair: list[str], path: tuple[str, ...], where: str) -> list[Key]:
    """Keys inside a flag's value; the value is parsed so that they can be replaced, and dumped again by `render`."""
    try:
        node = yaml.compose(pair[1], _Loader)
    except yaml.YAMLError:
        return [Key(path, pair, 1, where)]
    content = _construct(node)
    if isinstance(content, dict) and all(value is None for value in content.values()):
        return [Key(path, pair, 1, where)]  # text such as {step:06d}
    holder: list[Any] = pair
    holder[1] = content
    return [Key(path, pair, 1, where), *_walk(node, holder[1], path, lambda line: where)]


def render(pair: list[Any]) -> str:
    """The flag as one argument for the parser."""
    name, value = pair
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"--{name}={text}" if text or not name.endswith(("print_config", "help")) else f"--{name}"


def read(file: Path) -> tuple[dict[str, Any], list[Key]]:
    """A config file's content and its keys, classes before the arguments they take.

    Raises:
        UserError: the file cannot be read, is not YAML, is not a mapping, or says a key twice.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, _Loader)
        content = _construct(node)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); config files are UTF-8 YAML") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not valid"
        raise UserError(f"{file}{line}: not valid YAML: {problem}") from error
    if node is None:
        return {}, []
    if not isinstance(content, dict):
        raise UserError(f"{file}: a config is a mapping of keys such as 'model:' and 'data:'")
    return content, list(_walk(node, content, (), lambda line: f"{file}:{line}"))


def _construct(node: yaml.Node | None) -> Any:
    loader = _Loader("")
    try:
        return loader.construct_document(node) if node is not None else None
    finally:
        loader.dispose()


def _walk(node: Any, content: Any, path: tuple[str, ...], where: Any) -> Iterator[Key]:
    """The keys below a mapping or list, in the order of the file but classes first."""
    if isinstance(content, list):
        for i, (item, child) in enumerate(zip(content, node.value, strict=True)):
            place = where(child.start_mark.line + 1)
            if isinstance(item, str):
                yield Key((*path, str(i)), content, i, place)
            yield from _walk(child, item, (*path, str(i)), where)
    if not isinstance(content, dict):
        return
    names = [name.value for name, _ in node.value]
    entries = list(zip(names, content, node.value, strict=False))
    for name, slot, (at, child) in sorted(entries, key=lambda entry: entry[0] != "class_path"):
        place = where(at.start_mark.line + 1)
        if names.count(name) > 1:
            raise UserError(f"{place}: the key '{name}' stands twice in the same mapping; keep one")
        if name == "class_path":
            yield Key(path, content, slot, place, is_class=True)
        elif name in ("init_args", "dict_kwargs"):
            yield from _walk(child, content[slot], path, where)
        else:
            if not isinstance(content[slot], dict) or not content[slot]:
                yield Key((*path, str(name)), content, slot, place)
            yield from _walk(child, content[slot], (*path, str(name)), where)
