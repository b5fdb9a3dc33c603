"""Keys of shipped configs that belong to a class which the user has put another one in the place of.

`--config dpo --model my_file.MyAlgorithm` takes policy, optimizer and data from there, and has no use for `objective`.
Nobody typed that key, so it is left out and said; the same of a config that a run has written. What a user's own file
or flag says is never left out.
"""

from __future__ import annotations

import logging
from dataclasses import is_dataclass
from typing import Any

from leyden.cli.check_keys import load_class, parameters
from leyden.cli.command import Command

log = logging.getLogger("leyden")


def drop_replaced(command: Command) -> None:
    """Take the keys out of a command's shipped configs that the chosen classes do not have."""
    chosen = {kind: path for kind, path in command.classes}
    for content, name in zip(command.files, command.shipped, strict=True):
        for kind in (kind for kind in chosen if name is not None):
            node = _at(content, kind)
            if node is None or node.get("class_path") in (None, chosen[kind]):
                continue
            try:
                known = _kept(load_class(str(node["class_path"])), load_class(chosen[kind]))
            except (ImportError, AttributeError, ValueError):  # `check_keys` says it better
                continue
            replaced, node["class_path"] = node["class_path"], chosen[kind]  # or its defaults would stay as if given
            given = node.get("init_args") or {}
            if gone := sorted(key for key in given if key not in known):
                _drop(command, kind, {key: given.pop(key) for key in gone})
                classes = [path.rpartition(".")[2] for path in (replaced, chosen[kind])]
                are = "is a key" if len(gone) == 1 else "are keys"
                log.info("--config %s: %s %s of %s, not of %s; left out", name, ", ".join(gone), are, *classes)


def _kept(replaced: Any, chosen: Any) -> set[str]:
    """The keys of a class that mean the same of the class in its place. A dataclass is made of its own numbers: the ε
    of one surrogate is another's only where one of them derives from the other."""
    of_numbers = is_dataclass(replaced)
    apart = of_numbers and not (issubclass(chosen, replaced) or issubclass(replaced, chosen))
    return set() if apart else set(parameters(chosen))


def _at(content: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The part of a config that says what is built at `model.policy`."""
    node: Any = {"init_args": content}
    for part in kind.split("."):
        inside = node.get("init_args") if isinstance(node, dict) else None
        node = inside.get(part) if isinstance(inside, dict) else None
    return node if isinstance(node, dict) else None


def _drop(command: Command, kind: str, gone: dict[str, Any]) -> None:
    """Forget keys, and classes that only they named: what stands in another file or flag goes on as it is."""
    boxes = {id(part) for value in gone.values() for part in _containers(value)}
    first = {id(pair) for pair in command.classes}
    left = [key for key in command.keys if id(key.box) not in boxes and not _is_bare(key, kind, gone)]
    for pair in list(command.classes):
        place = tuple(pair[0].split("."))
        inside = any(pair[0] == f"{kind}.{name}" or pair[0].startswith(f"{kind}.{name}.") for name in gone)
        if inside and not any(key.path[: len(place)] == place and id(key.box) not in first for key in left):
            command.classes.remove(pair)
            left = [key for key in left if key.box is not pair]
    command.keys = left


def _containers(value: Any) -> list[Any]:
    """A mapping or list, and all that it holds."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ([value] if isinstance(value, dict | list) else []) + [part for one in inside for part in _containers(one)]


def _is_bare(key: Any, kind: str, gone: dict[str, Any]) -> bool:
    """Whether this is the key itself of a plain value that was taken out of its mapping."""
    return (
        ".".join(key.path[:-1]) == kind
        and key.path[-1] in gone
        and isinstance(key.box, dict)
        and (key.slot not in key.box)
    )
