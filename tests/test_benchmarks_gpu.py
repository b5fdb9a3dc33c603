"""The GPU script small, on a CPU: every part that needs no peer runs, and gives the figures that it is asked for."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")  # its libraries warn of much
FIGURES = {
    "product": {"peak"},
    "train": {"step_ms", "tokens_per_second", "warm_up_s", "slowest_over_median", "loss", "flops"},
    "sample": {"tokens_per_second", "ms_per_token"},
    "profile": {"idle_share", "step_ms", "kernels", "launches"},
    "ppo": {"speed", "generation", "scoring", "update"},
    "qlora": {"peak_gib", "seconds", "model_written_s"},
    "long": {"peak_gib", "step_ms", "tokens_per_second"},
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script with its parts run in this process, whose libraries are loaded already."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    gpu, sides = importlib.import_module("gpu"), importlib.import_module("sides")
    now = sides.now

    def run_job(name: str, options: argparse.Namespace) -> dict[str, Any]:
        given = argparse.Namespace(**vars(options) | {"worker": name})
        if name.startswith("train:sft"):
            given.trees = options.trees.replace("dpo", "sft")
        figures = gpu.worker(given)
        sides.now = now  # what the profile puts in its place
        return dict(json.loads(json.dumps(figures)))

    monkeypatch.setattr(gpu, "run_jobs", lambda names, options: ((name, run_job(name, options)) for name in names))
    yield gpu
    sides.now = now


def test_all_of_it_runs(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(script, "WAYS", {"leyden": None})  # the peer has a test of its own, and layers compile below
    table = tmp_path / "cpu.json"
    words = ["gpu.py", "--device", "cpu", "--tiny", "--dtype", "float32", "--output", str(table)]
    monkeypatch.setattr("sys.argv", words)
    script.main()
    made = json.loads(table.read_text(encoding="utf-8"))["figures"]
    assert len(made) == 1 + 3 + 4 + 3 + 1 + 1 + 3
    for name, figures in made.items():
        assert FIGURES[name.partition(":")[0]] <= figures.keys(), (name, figures)
    assert made["train:dpo:leyden"]["loss"] == pytest.approx(0.693147, rel=1e-5)
    assert (
        made["profile:dpo:leyden"]["kernels"]
        and made["profile:sample"]["kernels"]
        and "does not run" not in capsys.readouterr().out
    )
    for factor, code in ((1.0, 0), (0.5, 1)):
        slower = {name: {key: x * factor if key == "tokens_per_second" else x for key, x in figures.items()}
                  for name, figures in made.items()}  # fmt: skip
        monkeypatch.setattr(script, "run_jobs", lambda names, options, slower=slower: ((n, slower[n]) for n in names))
        monkeypatch.setattr("sys.argv", [*words[:-2], "--against", str(table)])
        with pytest.raises(SystemExit) as stop:
            script.main()
        assert stop.value.code == code


def test_what_got_worse_is_said(script: Any) -> None:
    earlier = {"sample:leyden:1": {"tokens_per_second": 100.0, "peak_gb": 10.0}, "gone": {"peak_gb": 1.0}}
    assert script.compare_with(earlier, {"sample:leyden:1": {"tokens_per_second": 91.0, "peak_gb": 11.0}}) == []
    worse = {"sample:leyden:1": {"tokens_per_second": 89.0, "peak_gb": 11.2}}
    assert script.compare_with(earlier, worse) == [
        "sample:leyden:1: peak_gb 11.2, earlier 10",
        "sample:leyden:1: tokens_per_second 89, earlier 100",
    ]
