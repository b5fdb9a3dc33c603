"""Names a user may type, classes and shipped configs, read from the source tree: nothing heavy is imported."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from leyden.errors import UserError, nearest

ROOMS = ("leyden.algos", "leyden.datamodules", "leyden.models", "leyden")
"""Packages whose classes have short names; where two share one, the earlier wins."""
KINDS = {
    "model": "Algorithm",
    "data": "DataModule",
    "model.policy": "Policy",
    "model.reference_policy": "Policy",
    "model.value_policy": "Policy",
    "model.objective": "Objective",
    "model.reward": "Reward",
    "model.engine": "Engine",
    "eval": "Evaluator",
    "eval.reference": "Policy",
    "eval.reward": "Reward",
}
"""Flag -> the class in the framework that everything given there descends from."""
_CLASS = re.compile(r"^class (\w+)\s*(?:\[[^\]]*\])?\s*(?:\(([^)]*)\))?\s*:", re.MULTILINE)
_ABSTRACT = re.compile(r"^    @(?:abc\.)?abstractmethod\b", re.MULTILINE)


def folder(package: str) -> Path:
    """Where a package's files stand, without importing it (its parents are imported)."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    return Path(spec.origin).parent


def _files(package: str) -> list[Path]:
    """The source files of a package and of the packages in it."""
    return list(folder(package).rglob("*.py"))


def _dotted(file: Path, package: str) -> str:
    return ".".join(file.relative_to(folder(package)).with_suffix("").parts)


@cache
def classes() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Short name -> (dotted path, names of its bases) of every public class in the rooms."""
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for room in ROOMS:
        for file in sorted(_files(room)):
            module = room if file.stem == "__init__" else f"{room}.{_dotted(file, room)}"
            for name, bases in _CLASS.findall(file.read_text(encoding="utf-8")):
                if not name.startswith("_"):
                    plain = tuple(re.sub(r"\[.*\]", "", base).split(".")[-1].strip() for base in bases.split(","))
                    found.setdefault(name, (f"{module}.{name}", plain))
    return found


@cache
def abstract() -> frozenset[str]:
    """Names of the rooms' classes that only others build on: there is an abstract method in their body."""
    found = set[str]()
    for room in ROOMS:
        for file in _files(room):
            # What stands between one class and the next; the text before the first class is left out.
            parts = re.split(r"^class (\w+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
            bodies = zip(parts[::2], parts[1::2], strict=True)
            found |= {
                name for name, body in bodies if re.search(r"^    @(?:abc\.)?abstractmethod\b", body, re.MULTILINE)
            }
    return frozenset(found)


def of_kind(kind: str) -> dict[str, str]:
    """Short name -> dotted path of the classes that `--model`, `--data` or `--model.policy` accepts."""
    known, root = classes(), KINDS[kind]

    def descends(name: str) -> bool:
        return any(base == root or descends(base) for base in known.get(name, ("", ()))[1])

    return {name: path for name, (path, _) in known.items() if descends(name) and name not in abstract()}


def class_path(kind: str, name: str, where: str) -> str:
    """The dotted path of a class given as `SFT` or as `my_file.MyAlgorithm` (a module in the current folder).

    Raises:
        UserError: there is no such class; the message names the nearest.
    """
    known = of_kind(kind)
    if name in known:
        return known[name]
    if "." not in name:
        listed = ", ".join(sorted(known)) or "none"
        raise UserError(f"{where}: no {KINDS[kind]} is called '{name}'{nearest(name, known)} (known: {listed})")
    module, _, short = name.rpartition(".")
    file = _module_file(module)
    if file is None:
        if module.split(".")[0] not in sys.modules and find_spec(module.split(".")[0]) is None:
            here = [path.stem for path in Path.cwd().glob("*.py")]
            raise UserError(f"{where}: no module '{module}' in this folder{nearest(module, here)}")
    elif not re.search(rf"\b{re.escape(short)}\b", text := file.read_text(encoding="utf-8")):
        defined = [found for found, _ in _CLASS.findall(text)]
        raise UserError(f"{where}: {file.name} defines no class '{short}'{nearest(short, defined)}")
    return name


def _module_file(module: str) -> Path | None:
    """The source of a module of the current folder or of ours."""
    own = next((room for room in ROOMS if module.startswith(room + ".")), None)
    root, rest = (folder(own), module[len(own) + 1 :]) if own else (Path.cwd(), module)
    stem = root / rest.replace(".", "/")
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)


def configs() -> dict[str, Path]:
    """Name -> file of the shipped configs."""
    return {file.stem: file for file in sorted(folder("leyden.configs").glob("*.yaml"))}


def config_file(name: str) -> Path:
    """The file that `--config NAME` means: a file, or a shipped config by its bare name.

    Raises:
        UserError: there is neither; the message names the nearest.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = configs()
    if name in shipped:
        return shipped[name]
    here = [str(path) for path in Path(name).parent.glob("*.y*ml")]
    listed = ", ".join(shipped)
    raise UserError(
        f"--config {name}: neither a file nor a shipped config{nearest(name, [*shipped, *here])} ({listed})"
    )
