"""Import paths that users type: classes and functions in files of the current folder, or of installed packages."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from leyden.errors import UserError, nearest


def import_object(path: str, what: str, example: str = "my_file") -> Any:
    """The object at an import path.

    Args:
        path: MODULE.NAME.
        what: it is for, to begin messages with, such as `--data.format`.
        example: a module to name where there is none.

    Raises:
        UserError: there is no such module or name, or the module cannot be imported; it names the nearest.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise UserError(f"{what} {path}: give MODULE.NAME, such as {example}.{path}")
    loaded = _import_module(path, module, what)
    try:
        return getattr(loaded, name)
    except AttributeError:
        names = [other for other, value in vars(loaded).items() if callable(value) and not other.startswith("_")]
        raise UserError(f"{what} {path}: {module} has no '{name}'{nearest(name, names)}") from None


def import_class(path: str, what: str, kind: type) -> Any:
    """The class at an import path, which must derive from `kind`. Raises `UserError` as `import_object` does."""
    loaded = import_object(path, what)
    if not isinstance(loaded, type) or not issubclass(loaded, kind):
        raise UserError(f"{what} {path}: not a class that derives from {kind.__module__}.{kind.__qualname__}")
    return loaded


def _import_module(path: str, module: str, what: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # last, so that a file here hides nothing installed
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            here = [file.stem for file in Path.cwd().glob("*.py")]
            raise UserError(f"{what} {path}: no module '{module}' in this folder{nearest(module, here)}") from None
        problem = (str(error).splitlines() or [""])[0]  # of what the module itself does or imports
        raise UserError(
            f"{what} {path}: {module} cannot be imported ({type(error).__name__}: {problem}); mend it"
        ) from error
