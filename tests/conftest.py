"""Fixtures for every test: one thread, no network, and the command line in process."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

if os.environ.get("SIMULATED_GPU", "0") != "0" and "torch" not in sys.modules:  # processes that tests start have none
    import simulated_gpu  # noqa: F401

from ranks import Ranks

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "JSONARGPARSE_DEPRECATION_WARNINGS": "off"}
os.environ["LEYDEN_LANG"] = "en"  # whatever language the machine speaks
os.environ.setdefault("OMP_NUM_THREADS", "1")

Run = Callable[..., tuple[int, str, str]]


def pytest_configure() -> None:
    if os.environ.get("SIMULATED_GPU", "0") != "0" and "simulated_gpu" not in sys.modules:
        raise pytest.UsageError("SIMULATED_GPU: torch was imported before, by a plugin or at startup; leave that out")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_seed_of_another_test() -> None:
    """The command line leaves its seed in the environment, and several processes would start from it again."""
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tokenised data from another test, or from the user's own runs."""
    monkeypatch.setenv("LEYDEN_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes for all tests of a worker: each import of torch and Lightning takes seconds."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that is the current one, with a user's module `toy` and 18 rows of data in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("LEYDEN_RUN", raising=False)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # what a run sets it to ends with the test
    shutil.copy(Path(__file__).with_name("toy.py"), tmp_path)
    rows = [{"prompt": [1 + i % 5, 2], "response": [3 + i % 7, 4, 0]} for i in range(18)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    yield tmp_path
    for name, module in list(sys.modules.items()):  # another test may have a module of the same name
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def leyden(workplace: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `leyden ARGS` in process: (exit code, standard output, standard error)."""
    from leyden.cli.launcher import main

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run
