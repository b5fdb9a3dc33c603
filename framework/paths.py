"""Paths of models (the embedded one, a local folder, a name on the hub), and of the cache."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from leyden.errors import UserError, nearest


def resolve(path: str) -> str:
    """A path or name that transformers can load: `tiny` becomes the embedded folder (a folder of yours is `./tiny`),
    and the folder of a run its export.

    Raises `UserError` where `path` looks like a local folder (it starts with `.`, `/` or `~`, has a backslash, or more
    than one slash) and is not there. Hub names (`name` or `owner/name`) cannot be checked without the network.
    """
    if path == "tiny":
        return str(_embedded())
    local = Path(path).expanduser()
    if local.is_dir():
        return _model_in(local, path)
    if local.is_file():
        raise UserError(f"{path}: a file, not a model folder; give the folder that holds config.json")
    if path.startswith((".", "/", "~")) or "\\" in path or path.count("/") > 1:
        parent = local.parent
        names = [folder.name for folder in parent.iterdir() if folder.is_dir()] if parent.is_dir() else []
        raise UserError(f"{path}: no such model folder{nearest(local.name, names) or '; check the path'}")
    return path


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Name -> path of models that are shown beside each other: as many of a path's last parts as tell it from the
    others. Raises `UserError` where one stands there twice."""
    parts = [tuple(part for part in Path(path).parts if part not in ("export", "/")) or (path,) for path in paths]
    for path, own in zip(paths, parts, strict=True):
        if parts.count(own) > 1:
            raise UserError(f"{path}: stands there twice; name it once")
    size = 1
    while len({own[-size:] for own in parts}) < len(parts):
        size += 1
    return {"/".join(own[-size:]): path for own, path in zip(parts, paths, strict=True)}


def _model_in(folder: Path, path: str) -> str:
    """The folder of the model, which for the folder of a run is its export.

    Raises:
        UserError: the run has no export, or it is a folder of runs.
    """
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json", "tokenizer_config.json")):
        return str(folder)
    if not (folder / "config.yaml").is_file():
        if runs := sorted(file.parent.parent for file in folder.glob("*/export/*config.json")):
            raise UserError(f"{path}: a folder of runs; give one of them, such as {runs[0]}")
        return str(folder)
    if (folder / "export").is_dir():
        return str(folder / "export")
    raise UserError(
        f"{path}: this run has no export, since it has not ended; type leyden export {path} --checkpoint last, and "
        f"give {folder / 'export-model'}"
    )


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


def kernel_folder() -> str:
    """Where torch's compiler keeps kernels, so that later runs find them: `$TORCHINDUCTOR_CACHE_DIR`, which is set to a
    folder in Leyden's own cache unless it is set already. Torch's default is a temporary folder."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    if name not in os.environ:
        try:
            os.environ[name] = str(cache_folder() / "kernels")
        except UserError:  # kernels can do without: torch makes a folder where it is told nothing
            return tempfile.gettempdir()
    return os.environ[name]
