"""Runs on a Ray cluster of two nodes, both on this machine: processes that train, vLLM servers, and what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FAULTS, JOURNAL, environment, journal
from safetensors.torch import load_file
from small import save_llama

pytest.importorskip("ray")

CLUSTER = """
import signal, sys
from ray.cluster_utils import Cluster

signal.signal(signal.SIGTERM, lambda *_: sys.exit())
small = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args=small | {"include_dashboard": False})
try:
    cluster.add_node(**small)
    print(cluster.address, flush=True)
    signal.pause()
finally:
    cluster.shutdown()
"""
GRPO = (
    "fit --config grpo --data.path prompts.jsonl --data.batch_size 8 --data.val_fraction 0 --data.max_length 64 "
    "--model.policy.path model --model.reward Function --model.reward.path my_reward.even --model.samples 2 "
    "--model.minibatches 1 --model.sampling.max_new_tokens 6 --model.optimizer.lr 1e-3 --trainer.accelerator cpu "
    "--trainer.devices 1 --trainer.max_steps 3 --trainer.enable_progress_bar false"
)
TWO = "--config ray --trainer.strategy.placement SPREAD"
SERVERS = "--model.engine.python env --model.engine.folder shared --model.engine.placement SPREAD"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: a small Llama, prompts, a reward, and an environment with what passes for vLLM."""
    folder = tmp_path_factory.mktemp("ray")
    save_llama(folder / "model")
    environment(folder / "env")
    (folder / "shared").mkdir()
    rows = [{"prompt": f"What is {i} and {i + 1}?"} for i in range(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "my_reward.py").write_text(
        "import os\n\n\ndef even(samples):\n"
        "    if os.environ.get('RANK') == os.environ.get('DIES', 'none'):\n        os._exit(7)\n"
        "    return [sum(ord(c) % 2 == 0 for c in s.response) / max(len(s.response), 1) for s in samples]\n"
    )
    return folder


@pytest.fixture(scope="module")
def cluster(place: Path) -> Iterator[str]:
    """The address of two nodes with two processors each. Servers on them write one journal, and answer slowly."""
    own = {"RAY_USAGE_STATS_ENABLED": "0", JOURNAL: str(place / "journal.jsonl"), FAULTS: json.dumps({"slow": 0.3})}
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], env=variables() | own, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.communicate(timeout=60)


def variables(**more: str) -> dict[str, str]:
    """Of a command: that of the tests, and no rank."""
    ours = {name: value for name, value in os.environ.items() if name not in ("LEYDEN_RUN", "PL_GLOBAL_SEED", "RANK")}
    return ours | {"OMP_NUM_THREADS": "1"} | more


def begin(place: Path, options: str, address: str = "", **more: str) -> subprocess.Popen[str]:
    """A command, begun."""
    own = variables(**more) | ({"RAY_ADDRESS": address} if address else {})
    return subprocess.Popen(
        [sys.executable, "-m", "leyden", *options.split()], cwd=place, env=own, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def said(place: Path, options: str, address: str = "", code: int = 0, **more: str) -> str:
    """What a command says, which has to end with this code."""
    process = begin(place, options, address, **more)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == code, text
    return text


def until(holds: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def until_it_trains(run: subprocess.Popen[str], folder: Path) -> None:
    """Until two steps of a run are in its table."""
    table = folder / "metrics.csv"
    until(lambda: run.poll() is not None or (table.is_file() and len(table.read_text().splitlines()) > 2), 120)
    assert run.poll() is None, run.communicate()[0]


def processes(place: Path, word: str) -> list[int]:
    """Ids of the processes of a run whose command has this word."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace")
            if word in words and os.readlink(folder / "cwd").startswith(str(place)):
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def test_two_nodes_learn_what_one_process_does(place: Path, cluster: str) -> None:
    one = f"{GRPO} --config vllm --model.engine.python env --trainer.default_root_dir one"
    said(place, one)
    two = f"{GRPO} {TWO} --config ray_vllm {SERVERS} --model.engine.servers 2 --trainer.default_root_dir two"
    text = said(place, two, cluster)
    assert "Ray has placed 2 processes" in text and "Ray starts 2 vLLM servers" in text
    alone, together = (load_file(place / name / "export" / "model.safetensors") for name in ("one", "two"))
    before = load_file(place / "model" / "model.safetensors")
    assert max(float((alone[name] - together[name]).abs().max()) for name in alone) < 1e-5
    assert max(float((alone[name] - before[name]).abs().max()) for name in before) > 1e-4
    starts = [row for row in journal(place / "journal.jsonl") if row["did"] == "start"]
    assert len(starts) == 2
    until(lambda: not processes(place, "two/rank") and not list((place / "shared").iterdir()), 20)


def test_a_run_that_is_killed_leaves_nothing(place: Path, cluster: str) -> None:
    options = f"{GRPO} {TWO} --config ray_vllm {SERVERS} --trainer.default_root_dir killed --trainer.max_steps 500"
    run = begin(
        place, f"{options} --trainer.max_epochs 500 --trainer.strategy.class_path leyden.cluster.RayFSDP2", cluster
    )
    until_it_trains(run, place / "killed")
    others = set(processes(place, "killed")) - {run.pid}
    servers = [int(path.name) for path in Path("/proc").glob("[0-9]*") if serves(path, place)]
    assert others and servers
    run.kill()
    run.communicate()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in [*others, *servers]), 40)


def serves(process: Path, place: Path) -> bool:
    try:
        return f"{place}/shared".encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_a_rank_that_ends_ends_the_run(place: Path, cluster: str) -> None:
    text = said(place, f"{GRPO} {TWO} --trainer.default_root_dir dies", cluster, code=2, DIES="1")
    assert "error: rank 1 ended with status 7: " in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (f"{TWO} --trainer.strategy.workers 9 --trainer.strategy.start_timeout 2",
         "error: Ray found no room for 9 processes that train, the first of them on this machine within 2 s: asked for "
         "9 CPU (SPREAD), the cluster has 4 CPU, free are 4 CPU; give it more, or less --trainer.strategy.workers"),
        (f"{TWO} --trainer.strategy.address 127.0.0.1:1", "error: no Ray cluster at '127.0.0.1:1'"),
        (f"{TWO} --trainer.devices 2", "error: --trainer.devices 2: Ray gives each process one device"),
        (f"{TWO} --trainer.num_nodes 3", "error: --trainer.num_nodes 3: Ray places processes"),
        ("--config ray_vllm --model.engine.python env --model.engine.folder model/config.json",
         "error: --model.engine.folder model/config.json: "),
        (f"--config ray_vllm {SERVERS} --model.engine.servers 5 --model.engine.room_timeout 2",
         "error: Ray found no room for 5 vLLM servers within 2 s: asked for 5 CPU"),
        (f"--config ray_vllm {SERVERS} --model.engine.python elsewhere", "error: --model.engine.python "),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_in_a_line(options: str, expected: str, place: Path, cluster: str) -> None:
    text = said(place, f"{GRPO} {options}", cluster, code=2)
    assert expected in text and "Traceback" not in text, text
    assert not list((place / "shared").iterdir())


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from leyden.cluster import ray
    from leyden.errors import UserError

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed: pip install 'leyden\[ray\]'"):
        ray.connect("auto")


def test_an_interrupted_run_is_saved_on_all_ranks(place: Path, cluster: str) -> None:
    options = f"{GRPO} {TWO} --trainer.default_root_dir stopped --trainer.max_steps 500 --trainer.max_epochs 500"
    run = begin(place, options, cluster)
    until_it_trains(run, place / "stopped")
    run.send_signal(signal.SIGTERM)
    text, _ = run.communicate(timeout=60)
    assert run.returncode == 143 and "stopped by SIGTERM" in text and "Traceback" not in text, text
    assert list((place / "stopped" / "checkpoints").glob("*.ckpt"))
