"""Tasks of lm-eval by name, local YAML file or folder; what cannot be loaded becomes one line."""

from __future__ import annotations

import difflib
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from glob import has_magic
from pathlib import Path
from typing import Any

import yaml
from jinja2.exceptions import SecurityError
from lm_eval.api.group import Group
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind, TaskIndex
from lm_eval.tasks._yaml_loader import load_yaml

from leyden.errors import UserError, first_line
from leyden.models.benchmark.templates import stopped

SHIPPED = Path(str(__import__("lm_eval").__file__)).parent / "tasks"


@dataclass
class Loaded:
    """Tasks and groups under their names, each with its data: all leaves of groups are among the tasks."""

    tasks: dict[str, Task] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)


def load(typed: Sequence[str], allow_code: bool = False) -> Loaded:
    """Load tasks with their data.

    Args:
        typed: names of tasks, groups or tags, patterns of names, YAML files and folders of them.
        allow_code: run Python that local files name, and code that a model writes.

    Raises:
        UserError: there is no such task, it would run code, its data cannot be reached, or a package is missing.
    """
    words = [word for one in typed for word in one.split(",") if word]
    local = [path for word in words if (path := _local(word)) is not None]
    for path in local:
        _check_files(path, allow_code)
    if allow_code:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")  # what the metric `code_eval` asks for
    manager = _manager([word for word in words if _local(word) is None], local)
    loaded = Loaded()
    for spec in dict.fromkeys(spec for word in words for spec in _specs(word, manager)):
        _check_entry(spec, manager, allow_code)
        _add(loaded, spec, manager)
    for name, task in loaded.tasks.items():
        if getattr(task, "UNSAFE_CODE", False) and not allow_code:
            raise _unsafe(name)
        if getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"{name}: its questions have pictures or sound, which the model does not read; leave it out"
            )
        _check_measures(name, task)
    return loaded


def _local(word: str) -> Path | None:
    """The path of a file or folder. A word without a slash or an ending is a name."""
    path = Path(word).expanduser()
    if path.is_file() and path.suffix not in ("", ".yaml", ".yml"):
        raise UserError(
            f"--tasks {word}: no YAML file of a task; write one that says what to ask of these data, such as "
            f"{path.with_suffix('.yaml')}"
        )
    is_path = path.suffix in (".yaml", ".yml") or "/" in word or os.sep in word or word.startswith((".", "~"))
    if is_path and not path.exists():
        raise UserError(f"--tasks {word}: no such file or folder; give a YAML file, or the name of a task")
    return path if is_path else None


def _yaml_files(path: Path) -> list[Path]:
    """The YAML files that a path stands for: those in a folder, or a file and, of a group, its members beside it."""
    if path.is_dir():
        return sorted(path.rglob("*.yaml"))
    found, waiting, beside = [path], [path], dict[str, Path]()
    while waiting:
        entry = _entry(waiting.pop())
        names = [] if entry is None else _members(entry)
        if names and not beside:
            beside = {
                one.name: file for file in sorted(path.parent.glob("*.yaml")) if (one := _entry(file)) is not None
            }
        new = [beside[name] for name in names if name in beside and beside[name] not in found]
        found, waiting = found + new, waiting + new
    return found


def _check_files(path: Path, allow_code: bool) -> None:
    """That local files are YAML, and name no Python unless it may run."""
    files = _yaml_files(path)
    if not files:
        raise UserError(f"--tasks {path}: no YAML file in it; give one that describes a task")
    for file in files:
        if not allow_code and (name := next(_python_in(file, set()), None)):
            raise UserError(f"{file}: it runs Python of its own ({name}); if you trust it, add --allow_code")


def _python_in(file: Path, seen: set[Path]) -> Iterator[str]:
    """What a YAML file and those that it includes name by `!function` or `class`, and measures that are none of
    lm-eval's, for which it runs a script that it finds in a folder or on the hub."""
    if file in seen or not file.is_file():
        return
    seen.add(file)
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}" if mark is not None else str(file)
        raise UserError(f"{place}: no YAML ({getattr(error, 'problem', None) or first_line(error)}); mend it") from None
    yield from (str(node.value) for node in _nodes(root) if node.tag == "!function")
    yield from _scripts(root)
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        if key.value == "class":
            yield str(value.value)
        if key.value == "include":
            names = [value] if isinstance(value, yaml.ScalarNode) else value.value
            for one in names:
                yield from _python_in(file.parent / str(one.value), seen)


def _scripts(root: Any) -> Iterator[str]:
    """The measures of tasks that are none of lm-eval's own."""
    for node in (node for node in _nodes(root) if isinstance(node, yaml.MappingNode)):
        told = {key.value: value.value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
        metric = told.get("metric")
        if isinstance(metric, str) and ("hf_evaluate" in told or metric not in metric_registry):
            yield f"metric {metric}"


def _nodes(node: Any) -> Iterator[Any]:
    if node is None:
        return
    yield node
    for child in node.value if isinstance(node.value, list) else ():
        for part in child if isinstance(child, tuple) else (child,):
            yield from _nodes(part)


# -- the index of tasks ------------------------------------------------------------------------------------------------


def _manager(names: Sequence[str], local: Sequence[Path]) -> TaskManager:
    """An index with these names and files in it. lm-eval's whole list takes half a minute to read, so only the folders
    that speak of a name are read, unless something is missing in them."""
    folders = [path for path in local if path.is_dir()]
    files = [file for path in local if not path.is_dir() for file in _yaml_files(path)]
    own = dict[str, Any]()
    for entry in filter(None, map(_entry, dict.fromkeys(files))):
        if own.setdefault(entry.name, entry) is not entry:
            raise UserError(
                f"{entry.yaml_path}: a task named {entry.name}, as in {own[entry.name].yaml_path}; rename one of them"
            )
    needed = [*names, *own, *(name for folder in folders for name in TaskIndex.build([folder]))]
    if not any(map(has_magic, names)):
        manager = TaskManager(include_path=[*_folders(names), *folders], include_defaults=False)
        manager.task_index.update(own)
        if _complete(needed, manager):
            return manager
    manager = TaskManager(include_path=folders or None)
    manager.task_index.update(own)
    return manager


def _folders(names: Sequence[str]) -> list[Path]:
    """lm-eval's own folders of tasks with a file that names one of these."""
    if not names:
        return []
    either = "|".join(map(re.escape, names))
    named = re.compile(rf"^\s*(?:-\s+)?(?:(?:task|group|tag)\s*:\s*)?[\"']?(?:{either})[\"']?\s*$", re.MULTILINE)
    found = dict[Path, None]()
    for file in sorted(SHIPPED.rglob("*.yaml")):
        top = SHIPPED / file.relative_to(SHIPPED).parts[0]
        if top not in found and named.search(file.read_text(encoding="utf-8", errors="replace")):
            found[top] = None
    return list(found)


def _complete(names: Sequence[str], manager: TaskManager) -> bool:
    """Whether an index has these names, and the members of all groups that they lead to."""
    index, waiting = manager.task_index, list(names)
    seen = set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name not in index:
            return False
        waiting += _members(index[name])
    return True


def _entry(path: Path) -> Any:
    """What a YAML file describes; None where it describes no task or group, or includes a file that is not there."""
    try:
        entry = TaskIndex.entry_from_path(path)
        if entry is not None and entry.kind is Kind.GROUP:  # which lm-eval calls by the list of its members
            entry = replace(entry, name=str(load_yaml(path, resolve_func=False)["group"]))
        return entry
    except (ValueError, OSError, yaml.YAMLError):
        return None


def _members(entry: Any) -> list[str]:
    """Names of the members of a group or tag. Members that are described in place are left out."""
    if entry.kind is Kind.TAG:
        return sorted(entry.tags)
    if entry.kind is not Kind.GROUP:
        return []
    config = entry.cfg or yaml.load(entry.yaml_path.read_text(encoding="utf-8"), yaml.BaseLoader)
    members = config.get("task") or []
    found = []
    for member in members if isinstance(members, list) else [members]:
        if isinstance(member, str):
            found.append(member)
        elif "group" in member:
            inner = member.get("task") or []
            found += [one for one in inner if isinstance(one, str)]
        elif not {"dataset_path", "include"} & set(member):
            found.append(member["task"])
    return found


def _specs(word: str, manager: TaskManager) -> list[str]:
    """What a typed word means to lm-eval's index: names, or the path of a file."""
    path = _local(word)
    if path is None:
        matched = manager.match_tasks([word]) if has_magic(word) else [word] if word in manager.task_index else []
        if not matched:
            raise UserError(f"--tasks {word}: lm-eval has no such task{_nearest(word, manager.all_tasks)}")
        return matched
    if not path.is_dir():
        entry = _entry(path)
        if entry is None:
            raise UserError(f"{path}: no task in it; give it a name, such as task: {path.stem}")
        return [entry.name]
    entries = TaskIndex.build([path])
    inside = {name for entry in entries.values() for name in _members(entry)}
    names = [name for name, entry in entries.items() if entry.kind is not Kind.TAG and name not in inside]
    if not names:
        raise UserError(f"--tasks {path}: no task in it; give a YAML file that describes one")
    return names


def _nearest(word: str, names: Sequence[str]) -> str:
    found = difflib.get_close_matches(word.lower(), names, n=3, cutoff=0.5)
    return (
        f"; nearest are {', '.join(found)}"
        if found
        else "; lm-eval ls tasks prints all, and a YAML file of yours does too"
    )


# -- loading -----------------------------------------------------------------------------------------------------------


def _unsafe(name: str) -> UserError:
    return UserError(
        f"{name}: it runs code that the model writes; if you accept that on this machine, add --allow_code"
    )


def _check_entry(spec: str, manager: TaskManager, allow_code: bool) -> None:
    """That a task which runs a model's code is not even loaded unless it may."""
    entry = manager.task_index.get(spec)
    for name in [] if entry is None or allow_code else [spec, *_members(entry)]:
        one = manager.task_index.get(name)
        if one is not None and (one.cfg or {}).get("unsafe_code"):
            raise _unsafe(name)


def _check_measures(name: str, task: Task) -> None:
    """That the measures of answers are there, before hours of sampling: lm-eval goes on without those of the library
    `evaluate` where the hub cannot be reached."""
    if task.OUTPUT_TYPE != "generate_until" or task.get_config("process_results") is not None:
        return
    missing = [metric for metric, function in getattr(task, "_metric_fn_list", {}).items() if function is None]
    if missing:
        raise UserError(
            f"{name}: its measure {missing[0]} cannot be reached; type this once where there is a network, with the "
            f'same HF_HOME: python -c "import evaluate; evaluate.load({missing[0]!r})"'
        )


def _add(loaded: Loaded, spec: str, manager: TaskManager) -> None:
    try:
        found = manager.load([spec])
    except Exception as error:  # whatever a task's own code and the libraries raise
        raise _problem(spec, error) from error
    loaded.tasks |= found["tasks"]
    loaded.groups |= found.get("groups") or {}


def _problem(spec: str, error: Exception) -> UserError:
    """What kept a task from being loaded, in one line."""
    name, data = _source(error) or (spec, "")
    chain = list(_causes(error))
    if (unsafe := next((one for one in chain if isinstance(one, SecurityError)), None)) is not None:
        return stopped(name, unsafe)
    missing = next((one for one in chain if isinstance(one, ImportError)), None)
    if missing is not None:
        command = re.search(r"pip install [\w.\-]+(?:\[[\w,]+\])?", str(missing).replace("`", ""))
        package = getattr(missing, "name", None) or "the package that it names"
        how = command[0] if command else f"pip install {package}"
        return UserError(f"{name}: it needs a package that is not installed ({first_line(missing)[:120]}); {how}")
    reason = first_line(chain[-1])[:120]
    if data and any(_is_network(one) for one in chain):
        return UserError(
            f"{name}: its data {data} cannot be reached ({reason}); type this once where there is a network, with the "
            f'same HF_HOME: python -c "import datasets; datasets.load_dataset({_arguments(data)})"'
        )
    if any(isinstance(one, FileNotFoundError) for one in chain):
        return UserError(f"{name}: its data cannot be found ({reason}); paths in a task count from the current folder")
    return UserError(f"{name}: it cannot be loaded ({type(error).__name__}: {first_line(error)[:160]}); mend the task")


def _arguments(data: str) -> str:
    return ", ".join(repr(part) for part in data.split(" "))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _source(error: Exception) -> tuple[str, str] | None:
    """The name of the task that was being loaded, and its data on the hub as `path name`; without its data where they
    are local."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        task = frame.f_locals.get("self")
        if isinstance(task, Task) and getattr(task, "_config", None) is not None:
            path, part = getattr(task, "DATASET_PATH", None), getattr(task, "DATASET_NAME", None)
            is_local = path in (None, "json", "csv", "parquet", "text", "arrow") or Path(str(path)).exists()
            return task.task_name, "" if is_local else f"{path} {part}" if part else str(path)
    return None


def _is_network(error: BaseException) -> bool:
    names = {one.__name__ for one in type(error).__mro__}
    known = {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError", "DatasetNotFoundError", "HTTPError"}
    known |= {"HfHubHTTPError", "RequestException", "TransportError", "ConnectError", "TimeoutException"}
    return bool(names & known) or "Couldn't find any data file" in str(error) or "Couldn't reach" in str(error)
