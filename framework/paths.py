"""Paths of models (the embedded one, a local folder, a name on the hub), and of the cache."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from leyden.errors import UserError, nearest


def resolve(path: str) -> str:
    """A path or name that transformers can load: `tiny` becomes the embedded folder (a folder of yours is `./tiny`).

    Raises `UserError` where `path` looks like a local folder (it starts with `.`, `/` or `~`, has a backslash, or more
    than one slash) and is not there. Hub names (`name` or `owner/name`) cannot be checked without the network.
    """
    if path == "tiny":
        return str(_embedded())
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local)
    if local.is_file():
        raise UserError(f"{path}: a file, not a model folder; give the folder that holds config.json")
    if path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1:
        parent = local.parent
        names = [folder.name for folder in parent.iterdir() if folder.is_dir()] if parent.is_dir() else []
        raise UserError(f"{path}: no such model folder{nearest(local.name, names) or '; check the path'}")
    return path


def _embedded() -> Path:
    """The folder of the embedded model, found without running any code of the package that holds it."""
    spec = importlib.util.find_spec("leyden.models")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (embedded := Path(folder) / "tiny").is_dir():
            return embedded
    raise UserError("tiny: the embedded model is missing from this installation; install leyden again")


def cache_folder() -> Path:
    """Where what was worked out once is kept, tokenised data for one: `$LEYDEN_CACHE`, or `~/.cache/leyden`."""
    folder = Path(os.environ.get("LEYDEN_CACHE") or Path.home() / ".cache" / "leyden")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: the cache cannot be written ({error}); set LEYDEN_CACHE to a folder") from None
    return folder
