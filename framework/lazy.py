"""Packages that hand on names of their modules and import each module on first use.

Help and typos must answer before torch is there, and `leyden data` before Lightning is: so no `__init__` of the project
imports what it hands on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

EXPORTS: dict[str, dict[str, str]] = {}
"""Package -> name that it hands on -> module that defines it, for every package that was imported."""


def lazy_exports(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package.

    Args:
        package: its `__name__`.
        modules: module of the package -> the names that it defines, with blanks between them.
    """
    home = EXPORTS[package] = {name: module for module, names in modules.items() for name in names.split()}

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home[name]}"), name)

    return find
