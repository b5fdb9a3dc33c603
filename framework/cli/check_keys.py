"""Keys of a configuration, checked before anything is built: each must be a parameter of its class.

The parser checks them again, but its messages cannot name the file and line of a key.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from enum import Enum
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse._parameter_resolvers import get_signature_parameters

from leyden.cli import class_names
from leyden.cli.config_keys import Key
from leyden.cli.hints import full_key
from leyden.errors import UserError, nearest

_NAME = re.compile(r"(?!(?:None|True|False)$)(?:[A-Za-z_]\w*\.)*[A-Z]\w*$")
_LIBRARIES = (
    "torch.optim",
    "torch.optim.lr_scheduler",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.strategies",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "peft",
)
"""Modules in which short names of classes that are not ours are looked up, in this order."""
_BASES = ("Algorithm", "DataModule", "Policy", "Evaluator")
"""Kinds of which a class must derive; others, such as rewards, may be any class that does the same."""
LINKED = {("data", "tokenizer"): "model.policy.path"}
"""Key -> the key that sets it, so that it must not be typed."""


def check_keys(keys: Iterable[Key], groups: dict[str, Any], free: Iterable[str]) -> None:
    """Check all keys, and replace short class names by full class paths.

    Args:
        keys: in the order in which they apply.
        groups: top-level key -> the class or type it builds (`trainer`, `model`, `data`, …).
        free: the other top-level keys.

    Raises:
        UserError: an unknown key or class; the message says where it stands and names the nearest.
    """
    top = groups | dict.fromkeys(free)
    chosen: dict[tuple[str, ...], Any] = {(name,): kind for name, kind in groups.items()}
    final: set[tuple[str, ...]] = set()
    for key in keys:
        if key.path in LINKED:
            raise UserError(f"{key.where}: {'.'.join(key.path)} follows {LINKED[key.path]}; leave it out")
        annotation = _follow(key, top, chosen)
        if isinstance(key.value, str) and (key.is_class or (_NAME.match(key.value) and takes_class(annotation))):
            cls = _resolve_class(key, strict=key.is_class or not _mentions(annotation, str))
            if cls is not None and key.path not in final:
                chosen[key.path] = cls
                final |= {key.path} & {tuple(kind.split(".")) for kind in class_names.KINDS}  # it stands first


def _follow(key: Key, top: dict[str, Any], chosen: dict[tuple[str, ...], Any]) -> Any:
    """The annotation of a key's value, by way of the classes chosen so far; None where it is not known."""
    options: dict[str, Any] | None = top
    owner, annotation = "", None
    for depth, part in enumerate(key.path, 1):
        if not part.isdigit():
            if options is not None and part not in options:
                whole = f"{'.'.join(key.path)}: " if not key.where.startswith("--") else ""
                subject = f"{owner} has no key '{part}'" if owner else f"there is no key '{part}'"
                meant = full_key(part, chosen, load_class, parameters)
                dashes = "--" if key.where.startswith("--") else ""
                hint = nearest(part, options) if meant is None else f"; did you mean {dashes}{meant}?"
                raise UserError(f"{key.where}: {whole}{subject}{hint}")
            annotation = None if options is None else options[part]
        cls = chosen.get(key.path[:depth]) or _dataclass(annotation)
        options, owner = (parameters(cls), cls.__name__) if cls is not None else (None, "")
    return annotation


@cache  # read from the source of a class and of all its bases: a tenth of a second each, for every key below it
def parameters(kind: Any) -> dict[str, Any]:
    """Name -> annotation of the parameters of a class or function, those behind its `**kwargs` included.

    Read by the function that the parser itself uses (a private one of jsonargparse 4.53), so that both accept the same
    keys.
    """
    try:
        return {parameter.name: parameter.annotation for parameter in get_signature_parameters(kind, None)}
    except ValueError:  # a class without a constructor of its own, derived from one that is not written in Python
        return {}


def takes_class(annotation: Any) -> bool:
    """Whether a value of this type can be given as the name of a class."""
    if typing.get_origin(annotation) is typing.get_origin(Callable[..., Any]):
        return True
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__module__ != "builtins" and not issubclass(annotation, Enum | Path)
    return any(takes_class(part) for part in typing.get_args(annotation))


def _mentions(annotation: Any, kind: type) -> bool:
    return annotation is kind or any(_mentions(part, kind) for part in typing.get_args(annotation))


def _dataclass(annotation: Any) -> Any:
    """The dataclass in an annotation such as `Sampling | None`, whose fields are keys without naming a class."""
    if is_dataclass(annotation):
        return annotation
    return next((part for part in typing.get_args(annotation) if is_dataclass(part)), None)


def _resolve_class(key: Key, strict: bool) -> Any:
    """The class that a key names; its class path replaces the name. None where the value may be plain text."""
    name, flag = key.value, ".".join(key.path)
    known = class_names.classes()
    if flag in class_names.KINDS:
        path = class_names.class_path(flag, name, key.where)
    elif name in known:
        path = known[name]
    else:
        path = name if "." in name else _library_path(name)
    try:
        cls = load_class(path)
    except (ImportError, AttributeError, ValueError) as error:
        if not strict:
            return None
        known_names = [*known, *(n for library in _LIBRARIES for n in _classes(library))]
        reason = f" ({error})" if "." in path else nearest(name, known_names)
        raise UserError(f"{key.where}: no class is called '{name}'{reason}") from error
    if not callable(cls):
        if strict:
            raise UserError(f"{key.where}: {path} is no class, but {type(cls).__name__}")
        return None
    root = class_names.KINDS.get(flag)
    if root in _BASES and not any(base.__name__ == root for base in getattr(cls, "__mro__", ())):
        raise UserError(f"{key.where}: {path} does not derive from {root}")
    key.box[key.slot] = path
    return cls


def load_class(path: str) -> Any:
    """The object at a class path; an ImportError, AttributeError or ValueError where there is none."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _library_path(name: str) -> str:
    return next((f"{library}.{name}" for library in _LIBRARIES if name in _classes(library)), name)


def _classes(module: str) -> list[str]:
    loaded = import_module(module)
    return [name for name in dir(loaded) if isinstance(getattr(loaded, name, None), type)]


def explain(message: str, keys: list[Key]) -> str:
    """The parser's message as one line: the key, where it stands, and what is wrong with its value."""
    missing = re.search(r"the following arguments are required: ((?:[\w.]+, )*[\w.]*\w)", message)
    path = ".".join(re.findall(r'Parser key "([\w.]+)"', message.split(" - Expected a <class 'NoneType'>")[0]))
    if missing:
        missing_keys = [f"{path}.{name}".strip(".") for name in missing[1].split(", ")]
        flag = "model.policy.path NAME" if missing_keys == ["model.policy"] else f"{missing_keys[0]} VALUE"
        return f"{', '.join(missing_keys)}: missing; add --{flag}"
    refused = re.search(r"(?:Option|option) '([\w.]+)' is not accepted", message)
    if refused and path.endswith(f".{refused[1]}"):  # another class of the same kind has no such key; this one has
        refused = None
    if refused:
        path = f"{path}.{refused[1]}"
    place = next((key.where for key in reversed(keys) if ".".join(key.path) == path), "")
    place = place.rstrip("+")
    where = f"{place}: {path}" if place and place != f"--{path}" else f"--{path}" if place else path
    if abstract := re.search(r"but ([\w.]+) is abstract", message):
        return f"{where}: its class is missing; name one first: --{path} {_some_class(abstract[1])}"
    if refused:
        kinds = re.findall(r"class_path='([\w.]+)'", message[refused.end() :])
        options = parameters(load_class(kinds[0])) if kinds else {}
        return f"{where}: {kinds[0] if kinds else 'this'} has no such key{nearest(refused[1], options)}"
    return f"{where}: {_complaint(message)}".lstrip(": ")


def _some_class(base: str) -> str:
    """The name of a class that stands beside an abstract one and derives from it."""
    kind = load_class(base)
    classes = (one for one in vars(import_module(kind.__module__)).values() if isinstance(one, type))
    return next((one.__name__ for one in classes if issubclass(one, kind) and one is not kind), "NAME")


def _complaint(message: str) -> str:
    """The type that the parser expected of a value, and the value that it got."""
    kinds = [kind for kind in re.findall(r"Expected an? (.+?)(?:\. Got value|\n|$)", message) if "NoneType" not in kind]
    # where text is expected it might be a file, and where a function is, an import path: nobody means these
    named = [kind for kind in kinds if not kind.startswith(("path but", "dot import path"))]
    named += re.findall(r"correspond to a subclass of (\w+)", message)
    kinds = named or ["import path"] * any(kind.startswith("dot import path") for kind in kinds)
    ends = r"(?!NestedArg|Namespace)(.*?)(?:\. Got value|\n|$)"
    values = (f"Got value: {ends}", f"Given value: {ends}", r"Import path ([\w.]+) does not correspond")
    value = next((match for pattern in values if (match := re.search(pattern, message))), None)
    if not kinds:
        return " ".join(message.split())[:300]
    plain = [re.sub(r"<class '(?:builtins\.)?([\w.]+)'>", r"\1", kind) for kind in dict.fromkeys(kinds)]
    plain = [re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind) for kind in plain]
    # sorted, since Python has one `int | float`, in the order in which anything in the process wrote it first
    return f"expected {' or '.join(sorted(plain))}" + (f", not {value[1]}" if value else "")
