"""The key of tokenised rows on disk: everything that they depend on.

That is the content of the files, the tokenizer, the text of the chat template, every option of the data module that it
does not declare to be without effect on a row, and code: Leyden's own that reads and renders rows, and the classes of a
user with the modules of theirs that these import. A key that has too much costs a second's work; one that has too
little trains on the wrong rows.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

_READING = ("leyden.data", "leyden.datamodules", "leyden.batch")
"""The rooms of Leyden that turn a row into token ids."""
_INSTALLED = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")})


def cache_key(files: Iterable[Path | str], options: Mapping[str, Any], tokenizer: Any, classes: Iterable[type]) -> str:
    """24 hex digits.

    Args:
        files: whose content is read, or names of hub data sets, whose content is not.
        options: name -> value of whatever changes what is stored.
        tokenizer: as a transformers tokenizer.
        classes: that turn rows into trees. Of their bases, those outside of Leyden count too.
    """
    facts = [dict(options), tokenizer_facts(tokenizer), reading_code(), own_code(classes)]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=_plain).encode())
    for file in files:
        digest.update(str(file).encode())
        if isinstance(file, Path):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:24]


def tokenizer_facts(tokenizer: Any) -> list[Any]:
    """Everything in a tokenizer that changes token ids, or what a chat template writes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    facts = [f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}", tokenizer.special_tokens_map]
    facts.append({str(number): repr(token) for number, token in tokenizer.added_tokens_decoder.items()})
    if backend is not None:
        return [*facts, backend.to_str()]
    # merges and scores of other tokenizers are in their files only
    vocabulary = [getattr(tokenizer, "vocab_file", None), getattr(tokenizer, "merges_file", None)]
    files = [_digest(Path(file).read_bytes()) for file in vocabulary if file and Path(file).is_file()]
    return [*facts, tokenizer.get_vocab(), files, own_code([type(tokenizer)])]


@cache
def reading_code() -> str:
    """A hash of the code of Leyden that makes token ids of a row."""
    specs = [find_spec(name) for name in _READING]
    folders = [Path(folder) for spec in specs if spec for folder in spec.submodule_search_locations or ()]
    files = sorted((file.name, file) for folder in folders for file in folder.rglob("*.py"))
    return _digest(b"".join(file.read_bytes() for _, file in files))


def own_code(classes: Iterable[type]) -> dict[str, str]:
    """Name -> hash of the code outside of Leyden that classes are made of.

    A class's module counts whole, and so do modules of the user's own that it imports, wherever in it.
    """
    bases = [base for one in classes for base in one.__mro__ if _counts(base.__module__)]
    code = {f"class {base.__module__}.{base.__qualname__}": _without_file(base) for base in bases}
    waiting = [base.__module__ for base in bases]
    while waiting:
        name = waiting.pop()
        if name in code or not _counts(name) or (file := _file(name)) is None:
            continue
        source = file.read_bytes()
        code[name] = _digest(source)
        if not _is_installed(file):
            waiting += (other for other in _imports(source, name) if (its := _file(other)) and not _is_installed(its))
    return code


def _counts(module: str) -> bool:
    return module.partition(".")[0] not in {"leyden", *sys.stdlib_module_names} - {"__main__"}


def _file(name: str) -> Path | None:
    """The Python file of a module; None where it has none, and for names that are no modules."""
    if not _counts(name):
        return None
    module = sys.modules.get(name)
    try:
        origin = module.__file__ if module is not None else getattr(find_spec(name), "origin", None)
    except Exception:  # looking for a part of a package runs the package
        return None
    return Path(origin) if origin and origin.endswith(".py") and Path(origin).is_file() else None


def _is_installed(file: Path) -> bool:
    return str(file.resolve()).startswith(_INSTALLED) or any(map(_holds_packages, file.resolve().parents))


@cache
def _holds_packages(folder: Path) -> bool:
    """Whether packages were installed into a folder, such as `pip install --target` names one."""
    return any(folder.glob("*.dist-info"))


def _imports(source: bytes, module: str) -> Iterator[str]:
    """The names of modules that a module imports; of `from a import b`, both `a` and `a.b`."""
    package = getattr(sys.modules.get(module), "__package__", None) or module.rpartition(".")[0]
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # changed since it was imported
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or package):
            dotted = "." * node.level + (node.module or "")
            name = resolve_name(dotted, package) if node.level else dotted
            yield from (name, *(f"{name}.{alias.name}" for alias in node.names))


def _without_file(one: type) -> str:
    """The text of a class that has no file, such as one of a notebook; else nothing, as its file counts."""
    if _file(one.__module__) is not None:
        return ""
    try:
        return inspect.getsource(one)
    except (OSError, TypeError):
        return repr(sorted(_bytecode(one)))


def _bytecode(one: type) -> Iterator[str]:
    """What the functions of a class do, where their text cannot be had."""
    for name, member in vars(one).items():
        code = getattr(getattr(member, "__func__", member), "__code__", None)
        if code is not None:
            yield f"{name} {code.co_code.hex()} {_without_address(repr(code.co_consts))} {code.co_names}"


def _plain(value: Any) -> Any:
    """A value as JSON that differs where it does, the same in every process."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, Mapping):
        return sorted((repr(name), value[name]) for name in value)
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Path):
        return str(value)
    try:
        return [f"{type(value).__module__}.{type(value).__qualname__}", vars(value)]
    except TypeError:
        return _without_address(repr(value))


def _without_address(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]
