"""The shape of the house: imports form a star, files and functions stay short, names do not clash."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"framework": set[str](), "models": {"framework"}, "datamodules": {"framework"}, "algos": {"framework"}}
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
COMPOSITION_ROOT = ROOT / "framework" / "cli" / "lightning_cli.py"
LONGEST_FILE, LONGEST_FUNCTION = 250, 40


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(module: str) -> str | None:
    """The room that `leyden.models.x` belongs to; None for other people's modules."""
    parts = module.split(".")
    if parts[0] != "leyden":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS and parts[1] != "framework" else "framework"


def against_the_star(room: str, source: str) -> list[str]:
    """Imports that a file of this room may not make."""
    return [
        f"line {line}: {module}"
        for line, module in imported(ast.parse(source))
        if module.split(".")[0] in ROOMS or room_of(module) not in {None, room, *ROOMS[room]}
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_form_a_star(file: Path) -> None:
    if file != COMPOSITION_ROOT:
        assert against_the_star(file.relative_to(ROOT).parts[0], file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source", "allowed"),
    [
        ("framework", "import leyden.batch.forest", True),
        ("framework", "def f():\n    from leyden.models import CausalLM", False),
        ("framework", "from leyden import models", False),
        ("models", "from leyden.algos.sft import SFT", False),
        ("models", "from leyden.policy.policy import Policy", True),
        ("algos", "import models.causal_lm", False),
    ],
)
def test_the_star_test_sees_what_it_should(room: str, source: str, allowed: bool) -> None:
    assert (against_the_star(room, source) == []) is allowed


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: length(f) for f in functions if length(f) > LONGEST_FUNCTION}
    assert long == {}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, its docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_no_module_of_the_framework_shadows_a_room() -> None:
    clashing = [ROOT / "framework" / f"{room}{end}" for room in (*ROOMS, "configs") for end in ("", ".py")]
    assert [path for path in clashing if path.exists()] == []


def test_nothing_names_a_place_that_users_do_not_have() -> None:
    places = re.compile(r"\.\./" + "shared|" + "(?<![\\w.])/(?:" + "|".join(("work", "tmp", "home", "root")) + ")/")
    folders = ("configs/*", "tests/*.py", "benchmarks/*", "models/tiny/*.md", ".ci/*")
    shipped = [*FILES, *ROOT.glob("*.md"), *(file for glob in folders for file in ROOT.glob(glob)), ROOT / "Makefile"]
    texts = {file: file.read_text(encoding="utf-8") for file in shipped if file.is_file()}
    assert [str(file.relative_to(ROOT)) for file, text in texts.items() if places.search(text)] == []


def test_every_package_is_installed() -> None:
    """A folder that is left out of the lists is missing only from built packages, where no other test looks."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    inits = [
        file.parent.relative_to(ROOT) for room in (*ROOMS, "configs") for file in (ROOT / room).rglob("__init__.py")
    ]
    there = {".".join(("leyden", *folder.parts)).replace("leyden.framework", "leyden"): str(folder) for folder in inits}
    assert len(there) >= 5
    tops = {name: folder for name, folder in there.items() if "/" not in folder.replace("\\", "/")}
    assert setuptools["package-dir"] == tops
    assert sorted(setuptools["packages"]) == sorted(there)
