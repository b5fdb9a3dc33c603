"""The shape of the house: imports form a star, arrows between rooms run one way, names do not clash."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from leyden.lazy import EXPORTS

ROOT = Path(__file__).parent.parent
ROOMS = {"framework": set[str](), "models": {"framework"}, "datamodules": {"framework"}, "algos": {"framework"}}
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 400, 40
ORDER = {
    "leyden": """
        errors language lazy example shapes atomic paths class_paths distributed rng lightning_loop precision sharding
        cluster losses objectives divergences
        batch surrogates advantages corrections fingerprint
        policy rewards data
        checkpoint run wandb trackio
        algorithm on_policy
        evaluation diagnostics
        trainer votes web
        cli compare
    """,
    "leyden.models": """
        quantized logprobs divergence compiled experts attention compile_ahead load backbone heads build_checks
        reference shared_base critic generation saving causal_lm classifier_input encoder_adapter encoder restore labels
        reward classifier engines
        planner chat export benchmark tiny_recipe
    """,
    "leyden.datamodules": """
        files formats sample storage source predict_loader file_data
        instruction preference attributes prompts evaluation commands annotate
    """,
}
"""Package -> its rooms and files from the ground up: each may import those before it, and none after it."""


# -- the star --------------------------------------------------------------------------------------------------------


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those inside functions and for type hints included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.lineno, node.module or ""
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def room_of(module: str) -> str | None:
    """The top-level folder that `leyden.models.x` belongs to; None for other people's modules."""
    parts = module.split(".")
    if parts[0] != "leyden":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS and parts[1] != "framework" else "framework"


def against_the_star(room: str, source: str) -> list[str]:
    """Imports that a file of this top-level folder may not make."""
    return [
        f"line {line}: {module}"
        for line, module in imported(ast.parse(source))
        if module.split(".")[0] in ROOMS or room_of(module) not in {None, room, *ROOMS[room]}
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_form_a_star(file: Path) -> None:
    assert against_the_star(file.relative_to(ROOT).parts[0], file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source", "allowed"),
    [
        ("framework", "import leyden.batch", True),
        ("framework", "def f():\n    from leyden.models import CausalLM", False),
        ("framework", "from leyden import models", False),
        ("models", "from leyden.algos.sft import SFT", False),
        ("models", "from leyden.policy import Policy", True),
        ("algos", "import models.causal_lm", False),
    ],
)
def test_the_star_test_sees_what_it_should(room: str, source: str, allowed: bool) -> None:
    assert (against_the_star(room, source) == []) is allowed


# -- one way, and no circles -----------------------------------------------------------------------------------------


def module_of(file: Path) -> str:
    """`leyden.batch.forest` for framework/batch/forest.py; a package's `__init__` is the package."""
    parts = [part for part in file.relative_to(ROOT).with_suffix("").parts if part not in ("framework", "__init__")]
    return ".".join(("leyden", *parts))


def all_sources() -> dict[str, str]:
    return {module_of(file): file.read_text(encoding="utf-8") for file in FILES}


def arrows(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of the project that it imports. A name that a package only hands on counts as an import of
    the module that defines it, since that is what is imported in the end."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        is_face = "= lazy_exports(" in source
        found[module] = set()
        for node in ast.walk(ast.parse(source)) if not is_face else ():
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names if alias.name in sources}
            elif isinstance(node, ast.ImportFrom) and (node.module or "") in sources:
                found[module] |= {defined(str(node.module), alias.name, sources) for alias in node.names}
    return found


def defined(package: str, name: str, sources: Mapping[str, str]) -> str:
    """Where a name comes from that is imported from a package or module."""
    if f"{package}.{name}" in sources:
        return f"{package}.{name}"
    home = EXPORTS.get(package, {}).get(name)
    return package if home is None else f"{package}.{home}"


def circle(sources: Mapping[str, str]) -> list[str]:
    """Modules that import each other in a circle; none where there is no circle."""
    try:
        list(TopologicalSorter(arrows(sources)).static_order())
    except CycleError as error:
        return [str(name) for name in error.args[1]]
    return []


def against_the_order(sources: Mapping[str, str]) -> list[str]:
    """Imports of a room or file that stands later in its package's order."""
    wrong = []
    for package, text in ORDER.items():
        order = {name: place for place, name in enumerate(text.split())}
        for module, targets in arrows(sources).items():
            for target in targets:
                here, there = (name.removeprefix(f"{package}.").split(".")[0] for name in (module, target))
                inside = module.startswith(f"{package}.") and target.startswith(f"{package}.")
                if inside and here in order and there in order and order[here] < order[there]:
                    wrong.append(f"{module} imports {target}: {here} stands before {there}")
    return wrong


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    for module, source in all_sources().items():  # so that what packages hand on is known
        if "lazy_exports(" in source and module != "leyden.lazy":
            import_module(module)
    return all_sources()


def test_there_are_no_circles(sources: dict[str, str]) -> None:
    assert circle(sources) == []


def test_arrows_run_one_way(sources: dict[str, str]) -> None:
    assert against_the_order(sources) == []


@pytest.mark.parametrize("package", ORDER)
def test_every_room_has_its_place_in_the_order(package: str) -> None:
    folder = ROOT / "framework" if package == "leyden" else ROOT / package.rpartition(".")[2]
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert names - {"__init__", "__main__"} == set(ORDER[package].split())


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("leyden.batch.forest", "from leyden.batch.trajectory import Trajectory"),
        ("leyden.policy.policy", "def f():\n    from leyden.algorithm import Algorithm"),
        ("leyden.checkpoint.provenance", "if TYPE_CHECKING:\n    from leyden.algorithm.algorithm import Algorithm"),
        ("leyden.models.heads", "if TYPE_CHECKING:\n    from leyden.models.causal_lm import CausalLM"),
        ("leyden.models.reference", "if TYPE_CHECKING:\n    from leyden.models import CausalLM"),
    ],
)
def test_a_circle_is_seen(module: str, line: str, sources: dict[str, str]) -> None:
    assert circle(sources | {module: f"{sources[module]}\n{line}\n"}) != []


def test_an_arrow_the_wrong_way_is_seen(sources: dict[str, str]) -> None:
    broken = {"leyden.errors": sources["leyden.errors"] + "\nfrom leyden.compare.numbers import number\n"}
    assert circle(sources | broken) == []
    assert against_the_order(sources | broken) == [
        "leyden.errors imports leyden.compare.numbers: errors stands before compare"
    ]


# -- files and names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_are_not_long(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {f.name: length(f) for f in functions if length(f) > LONGEST_FUNCTION} == {}


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's body, its docstring left out."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_every_room_explains_itself() -> None:
    """What it is for, who calls it, what it may import, and where to begin reading."""
    for file in (file for file in FILES if file.name == "__init__.py" and file.parent.parent != ROOT):
        text = " ".join((ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split())
        missing = [
            words for words in ("Called by ", "May import ", "Begin reading at ") if words.lower() not in text.lower()
        ]
        assert missing == [], file.relative_to(ROOT)


def test_what_packages_hand_on_is_there(sources: dict[str, str]) -> None:
    for package, names in EXPORTS.items():
        face = import_module(package)
        assert sorted(face.__all__) == sorted(names), package
        for name in names:
            assert name not in {file.stem for file in Path(str(face.__file__)).parent.glob("*.py")}, (package, name)
            assert getattr(face, name) is getattr(import_module(f"{package}.{names[name]}"), name), (package, name)


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
    inits = [file.parent for room in (*ROOMS, "configs") for file in (ROOT / room).rglob("__init__.py")]
    assert sorted(setuptools["packages"]) == sorted(module_of(folder / "__init__.py") for folder in inits)
    assert setuptools["package-dir"] == {"leyden": "framework"} | {
        f"leyden.{room}": room for room in ("models", "datamodules", "algos", "configs")
    }
