"""What the project makes public, and whether it is documented.

Public is what the packages hand on (`leyden.lazy.EXPORTS`), what users name in YAML by a short name, and the single
files in `FILES`. Read from the source text by griffe, so that docstrings under fields count; whether a method has a
docstring or inherits one is asked of the classes themselves.
"""

from __future__ import annotations

import inspect
import re
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import griffe

ROOT = Path(__file__).parent.parent.parent
FILES = ("leyden.trainer", "leyden.losses", "leyden.example", "leyden.errors")
"""Single files that users import from, beside those whose classes have short names."""
MORE = {
    "leyden.datamodules.formats": ("leyden.datamodules.formats.format.Format",),
    "leyden.datamodules.sample": ("leyden.datamodules.sample.sample_rows", "leyden.datamodules.sample.write_sample"),
    "leyden.models.attention": ("leyden.models.attention.backend.Backend",),
}
"""Room that hands on nothing -> what a user's own part is made of all the same."""
FIRST = (
    "trainer algos datamodules models models.engines rewards objectives surrogates advantages corrections divergences "
    "losses evaluation checkpoint run diagnostics precision sharding cluster wandb algorithm on_policy policy batch "
    "data"
).split()
"""Rooms in the order in which people look for them; others follow by name."""


class Public(NamedTuple):
    """One public name."""

    room: str
    """The package or file that it is imported from, `leyden.algos`"""
    name: str
    path: str
    """Where it is defined, `leyden.algos.ppo.PPO`"""

    @property
    def page(self) -> str:
        """Its page below docs/, which is made and not kept."""
        return f"reference/{short(self.room)}/{self.name}.md"


def short(room: str) -> str:
    """`models.engines` of `leyden.models.engines`."""
    return room.removeprefix("leyden.")


@cache
def setuptools() -> dict[str, Any]:
    """How pyproject.toml maps folders to packages."""
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"])


@cache
def package() -> Path:
    """A folder to read `leyden` from: a copy, since the package lies in several folders of the repository."""
    folder = Path(tempfile.mkdtemp(prefix="leyden-reference-"))
    for name, source in setuptools()["package-dir"].items():
        target = folder.joinpath(*name.split("."))
        shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__", "tiny"))
    return folder


@cache
def source() -> Any:
    """The package as griffe reads it."""
    quiet = {"warn_unknown_params": False, "warn_missing_types": False}  # a subclass may explain what it passes on
    folder = [str(package())]
    return griffe.load("leyden", search_paths=folder, docstring_parser="google", docstring_options=quiet)


@cache
def public_names() -> list[Public]:
    """Everything public, room by room."""
    from leyden.cli.class_names import MODULES
    from leyden.lazy import EXPORTS

    for name in setuptools()["packages"]:  # an editable install does not list them
        import_module(name)
    rooms = {room: [f"{room}.{file}.{name}" for name, file in names.items()] for room, names in EXPORTS.items()}
    rooms |= {file: list(_defined(file)) for file in (*MODULES, *FILES)} | {room: list(p) for room, p in MORE.items()}
    order = {f"leyden.{name}": place for place, name in enumerate(FIRST)}
    ordered = sorted(rooms, key=lambda room: (order.get(room, len(order)), room))
    paths = [(room, path) for room in ordered for path in sorted(rooms[room], key=str.lower)]
    return [Public(room, path.rpartition(".")[2], path) for room, path in paths]


@cache
def rooms() -> dict[str, list[str]]:
    """Room -> its pages below docs/, its own first."""
    found: dict[str, list[str]] = {}
    for public in public_names():
        found.setdefault(public.room, [f"reference/{short(public.room)}/index.md"]).append(public.page)
    return found


def _defined(file: str) -> Iterator[str]:
    """Paths of the public classes and functions that a file defines itself."""
    for name, member in read(file).members.items():
        if not name.startswith("_") and not member.is_alias and (member.is_class or member.is_function):
            yield member.path


def read(path: str) -> Any:
    """A module, class or function as griffe reads it."""
    return source()[path.removeprefix("leyden.")]


# -- what is missing ---------------------------------------------------------------------------------------------------


def undocumented() -> list[str]:
    """Public names, their arguments, fields and methods that nothing explains, as `path: what is missing`."""
    return [line for public in public_names() for line in missing(public)]


def missing(public: Public) -> Iterator[str]:
    """What is missing of one name."""
    thing = read(public.path)
    if not thing.docstring:
        yield f"{public.path}: no docstring"
    explained = _explained(thing)
    for name in _arguments(thing):
        if name not in explained:
            yield f"{public.path}: argument {name} is not in its docstring"
    if not thing.is_class:
        return
    cls = getattr(import_module(public.path.rpartition(".")[0]), public.name)
    for name, member in vars(cls).items():
        ours = inspect.isfunction(member) or isinstance(member, (property, classmethod, staticmethod))
        if ours and not name.startswith("_") and not inspect.getdoc(getattr(cls, name)):
            yield f"{public.path}.{name}: no docstring, and none that it inherits"


def _arguments(thing: Any) -> Iterator[str]:
    """Arguments that a caller gives: of a function, of a constructor, or the fields of a dataclass."""
    function = thing
    if thing.is_class:
        function = thing.members.get("__init__")
        if function is None:
            yield from (name for name, member in thing.members.items() if _is_field(thing, name, member))
            return
    if not getattr(function, "is_function", False):
        return
    named = (p.name for p in function.parameters if "variadic" not in str(p.kind.value))
    yield from (name for name in named if name not in ("self", "cls"))


def _is_field(cls: Any, name: str, member: Any) -> bool:
    """Whether an attribute is a field of a dataclass or a named tuple."""
    record = any("NamedTuple" in str(base) for base in cls.bases) or "dataclass" in {
        str(decorator.value).partition("(")[0].rpartition(".")[2] for decorator in cls.decorators
    }
    annotated = member.is_attribute and member.annotation is not None and "ClassVar" not in str(member.annotation)
    return record and annotated and not name.startswith("_") and "init=False" not in str(member.value or "")


def _explained(thing: Any) -> set[str]:
    """Arguments and fields that a docstring explains: its own, that of a constructor, or one under a field."""
    found = set[str]()
    constructor = thing.members.get("__init__") if thing.is_class else None
    for part in (thing, constructor):
        if part is None or not part.docstring:
            continue
        for section in part.docstring.parsed:
            if section.kind.value in ("parameters", "attributes", "other parameters"):
                found |= {item.name.lstrip("*") for item in section.value}
        if not thing.is_class:  # a short function may say it in its sentence
            found |= set(re.findall(r"`(\w+)`", part.docstring.value))
    for cls in (thing, *thing.mro()) if thing.is_class else ():  # fields of a dataclass may be those of its base
        found |= {name for name, member in cls.members.items() if member.is_attribute and member.docstring}
    return found


def inherited(public: Public) -> list[Public]:
    """Public classes whose arguments a class takes too, nearest first."""
    thing = read(public.path)
    if not thing.is_class:
        return []
    constructor = thing.members.get("__init__")
    passes_on = constructor is None or any(p.name == "kwargs" for p in constructor.parameters)
    known = {other.path: other for other in public_names()}
    return [known[base.path] for base in thing.mro() if base.path in known] if passes_on else []
