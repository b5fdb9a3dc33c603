"""Names of classes and shipped configs that a user may type, read from the source tree: nothing heavy is imported."""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from leyden.errors import UserError, nearest
from leyden.lazy import EXPORTS

PACKAGES = (
    "leyden.algos",
    "leyden.datamodules",
    "leyden.models",
    "leyden.models.engines",
    "leyden.algorithm",
    "leyden.checkpoint",
    "leyden.data",
    "leyden.diagnostics",
    "leyden.evaluation",
    "leyden.on_policy",
    "leyden.policy",
    "leyden.rewards",
    "leyden.run",
)
"""Packages whose exports users may name without a path. Where two export the same name, the earlier wins."""
MODULES = (
    "leyden.objectives",
    "leyden.divergences",
    "leyden.surrogates",
    "leyden.advantages",
    "leyden.corrections",
    "leyden.precision",
    "leyden.sharding",
    "leyden.wandb",
)
"""Single files whose classes have short names too."""
KINDS = {
    "model": "Algorithm",
    "data": "DataModule",
    "model.policy": "Policy",
    "model.reference_policy": "Policy",
    "model.value_policy": "Policy",
    "model.teacher": "Policy",
    "model.objective": "Objective",
    "model.divergence": "Divergence",
    "model.reward": "Reward",
    "model.engine": "Engine",
    "model.estimator": "Estimator",
    "model.surrogate": "Surrogate",
    "model.correction": "Correction",
    "eval": "Evaluator",
    "eval.reference": "Policy",
    "eval.reward": "Reward",
    "eval.measures": "Measure",
}
"""Flag -> the base class, in the framework, of everything given there."""
_CLASS = re.compile(r"^class (\w+)\s*(?:\[[^\]]*\])?\s*(?:\(([^)]*)\))?\s*:", re.MULTILINE)
_ABSTRACT = re.compile(r"^    @(?:abc\.)?abstractmethod\b", re.MULTILINE)


class Source(NamedTuple):
    """Facts about a class, from its source text."""

    bases: tuple[str, ...]
    """Names of the classes that it derives from, without their modules"""
    abstract: bool
    """Whether its body has an abstract method, so that it cannot be built itself"""


def folder(package: str) -> Path:
    """The folder of a package's files. The package is not imported, but its parents are."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed")
    return Path(spec.origin).parent


@cache
def sources() -> dict[str, Source]:
    """Every class of the project by its name, from the text of its files.

    Importing them would take seconds, and parsing them whole a tenth of one, while help and typos are to be answered at
    once; so a regular expression looks for the lines that begin a class. tests/test_cli.py compares the result with the
    real classes.
    """
    by_name: dict[str, Source] = {}
    for top in ("leyden.algos", "leyden.datamodules", "leyden.models", "leyden"):
        for file in sorted(folder(top).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            heads = list(_CLASS.finditer(text))
            for head, after in zip(heads, [*heads[1:], None], strict=False):
                bases = (re.sub(r"\[.*\]", "", base).split(".")[-1].strip() for base in (head[2] or "").split(","))
                body = text[head.end() : after.start() if after else len(text)]
                by_name.setdefault(head[1], Source(tuple(bases), bool(_ABSTRACT.search(body))))
    return by_name


@cache
def classes() -> dict[str, str]:
    """Short name -> class path of every class that users may name by it."""
    names: dict[str, str] = {}
    for package in PACKAGES:
        import_module(package)
        for name in EXPORTS.get(package, ()):
            if name in sources():
                names.setdefault(name, f"{package}.{name}")
    for module in MODULES:
        file = folder("leyden") / f"{module.partition('.')[2]}.py"
        for name, _ in _CLASS.findall(file.read_text(encoding="utf-8")):
            if not name.startswith("_"):
                names.setdefault(name, f"{module}.{name}")
    return names


def of_kind(kind: str) -> dict[str, str]:
    """Short name -> class path of the classes that `--model`, `--data` or `--model.policy` accepts."""
    known, root = sources(), KINDS[kind]

    def descends(name: str) -> bool:
        return any(base == root or descends(base) for base in (known[name].bases if name in known else ()))

    return {name: path for name, path in classes().items() if descends(name) and not known[name].abstract}


def class_path(kind: str, name: str, where: str) -> str:
    """The class path of a class given as `SFT` or as `my_file.MyAlgorithm` (a module in the current folder).

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
            modules = [path.stem for path in Path.cwd().glob("*.py")]
            raise UserError(f"{where}: no module '{module}' in this folder{nearest(module, modules)}")
    elif not re.search(rf"\b{re.escape(short)}\b", text := file.read_text(encoding="utf-8")):
        defined = [class_name for class_name, _ in _CLASS.findall(text)]
        raise UserError(f"{where}: {file.name} defines no class '{short}'{nearest(short, defined)}")
    return name


def _module_file(module: str) -> Path | None:
    """The source of a module of the current folder or of ours."""
    tops = ("leyden.algos", "leyden.datamodules", "leyden.models", "leyden")
    own = next((top for top in tops if f"{module}.".startswith(f"{top}.")), None)
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
    files = [str(path) for path in Path(name).parent.glob("*.y*ml")]
    listed = ", ".join(shipped)
    raise UserError(
        f"--config {name}: neither a file nor a shipped config{nearest(name, [*shipped, *files])} ({listed})"
    )
