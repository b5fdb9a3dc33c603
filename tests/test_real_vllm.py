"""The real vLLM, on a processor: run by `make test-vllm` in an environment that has it, and skipped elsewhere.

What needs no vLLM is tested against a stand-in for its server, in test_vllm.py.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from leyden.batch import Tree, pack
from leyden.errors import UserError
from leyden.models import CausalLM
from leyden.models.engines import VLLM, ServedModel
from leyden.policy import Sampling
from leyden.policy.engine_session import EngineSession
from leyden.policy.sync_proof import differences

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM in this environment; see make test-vllm")
QUESTIONS = ("서울은 어느 나라의 수도야?", "What is 3 + 4?", "Say good morning politely.", "사과는 무슨 색이야?")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def prompts_of(policy: CausalLM) -> list[list[int]]:
    tokenizer: Any = policy.tokenizer
    return [[int(token) for token in tokenizer(f"{question}\n")["input_ids"]] for question in QUESTIONS]


def step(policy: CausalLM, scale: float = 0.02) -> None:
    """As if a rollout had been learnt from."""
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * parameter.std().nan_to_num(1.0).clamp_min(1e-3) * torch.randn_like(parameter))


class Run:
    """A policy with its engine, as an algorithm has them."""

    def __init__(self, policy: CausalLM, folder: Path, **options: Any) -> None:
        policy.build(dropout=False)
        self.policy, self.folder, self.version = policy, folder, 0
        self.engine = VLLM(**options)
        self.session = EngineSession(self.engine)
        self.sync()

    def sync(self) -> None:
        self.session.sync(self.policy, self.version, self.folder, 384)
        self.version += 1

    def largest(self, temperature: float = 1.0) -> float:
        """The largest difference of log-probs over samples, nats."""
        prompts = prompts_of(self.policy)
        groups = self.engine.generate(prompts, 4, Sampling(24, temperature, seed=3), range(len(prompts)))
        if temperature == 1.0:
            return float(differences(self.policy, prompts, groups).max())
        raise AssertionError(temperature)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    torch.manual_seed(0)
    run = Run(CausalLM("tiny"), tmp_path_factory.mktemp("full"))
    yield run
    run.session.stop()


def test_log_probs_are_those_of_training_before_and_after_each_sync(full: Run) -> None:
    assert full.largest() < 1e-4
    for _ in range(3):
        step(full.policy)
        assert full.largest() > 1e-2  # these samples are of the weights before
        full.sync()
        assert full.largest() < 1e-4


def test_noise_depends_on_seed_prompt_and_sample_alone(full: Run) -> None:
    prompts, sampling = prompts_of(full.policy), Sampling(24, seed=11)
    together = full.engine.generate(prompts, 6, sampling, range(4))
    turned = full.engine.generate(prompts[::-1], 6, sampling, [3, 2, 1, 0])[::-1]
    alone = full.engine.generate(prompts[2:3], 6, sampling, [2])
    tokens = [[response.tokens for response in group] for group in together]
    assert tokens == [[response.tokens for response in group] for group in turned]
    assert tokens[2] == [response.tokens for response in alone[0]]
    assert len({tuple(sample) for sample in tokens[2]}) > 1
    other = full.engine.generate(prompts, 6, Sampling(24, seed=12), range(4))
    assert tokens != [[response.tokens for response in group] for group in other]


def test_answers_end_where_the_policy_does(full: Run) -> None:
    groups = full.engine.generate(prompts_of(full.policy), 8, Sampling(60, seed=2), range(4))
    for response in (response for group in groups for response in group):
        assert response.finished == (response.tokens[-1] in full.policy.stop) and len(response.tokens) <= 60
        assert not any(token in full.policy.stop for token in response.tokens[:-1])
        assert len(response.logp) == len(response.tokens)


def test_a_teacher_behind_the_server_says_what_the_model_says(full: Run) -> None:
    groups = full.engine.generate(prompts_of(full.policy), 2, Sampling(24, seed=4), range(4))
    batch = pack([Tree(p, [r.tokens for r in g]) for p, g in zip(prompts_of(full.policy), groups, strict=True)])
    served = ServedModel("tiny", full.engine._replicas[0].client.url)
    served.build()
    with torch.no_grad():
        torch.testing.assert_close(served(batch).logp, full.policy(batch).logp, atol=1e-4, rtol=0)


def leave_out_the_reload(run: Run) -> Callable[..., Any]:
    return lambda client, path, body: {} if path == "/collective_rpc" else client(path, body)


def leave_out_the_reset(run: Run) -> Callable[..., Any]:
    return lambda client, path, body: {"success": True} if path == "/reset_prefix_cache" else client(path, body)


@pytest.mark.parametrize("left_out", [leave_out_the_reload, leave_out_the_reset])
def test_what_a_sync_leaves_out_is_seen(full: Run, left_out: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = full.engine._replicas[0].client
    post, around = client.post, left_out(full)
    step(full.policy)
    with monkeypatch.context() as patch:
        patch.setattr(client, "post", lambda path, body=None, timeout=None: around(post, path, body))
        with pytest.raises(UserError, match="VLLM is no longer in step with the policy"):
            full.sync()
    full.sync()
    assert full.largest() < 1e-4


def test_a_head_that_is_left_out_is_seen(full: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from leyden.models.engines import published

    whole, kept = published.weights, full.policy.model.lm_head.weight.detach().clone()
    step(full.policy, 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(
            published,
            "weights",
            lambda policy: ((n, kept if n == "lm_head.weight" else x) for n, x in whole(policy)),
        )
        with pytest.raises(UserError, match="VLLM is no longer in step with the policy"):
            full.sync()
    full.sync()
    assert full.largest() < 1e-4


def test_a_server_that_is_killed_comes_back_with_the_same_weights(full: Run) -> None:
    prompts, sampling = prompts_of(full.policy), Sampling(24, seed=11)
    before = full.engine.generate(prompts, 6, sampling, range(4))
    assert full.engine._server is not None
    group = subprocess.run(
        ["pgrep", "-P", str(full.engine._server.process.pid)], capture_output=True, text=True, check=True
    )
    os.killpg(int(group.stdout.split()[0]), signal.SIGKILL)
    again = full.engine.generate(prompts, 6, sampling, range(4))
    assert [[r.tokens for r in g] for g in before] == [[r.tokens for r in g] for g in again]


@pytest.mark.parametrize("quantised", [False, True])
def test_an_adapter_travels_alone(quantised: bool, tmp_path: Path) -> None:
    from leyden.precision import QLoRAPrecision

    torch.manual_seed(0)
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="gaussian")
    policy = CausalLM("tiny", adapter=adapter)
    if quantised:
        with QLoRAPrecision(compute_dtype="float32").module_init_context():
            policy.build(dropout=False)
    run = Run(policy, tmp_path)
    try:
        for _ in range(2):
            step(run.policy, 0.3)
            assert run.largest() > 1e-2
            run.sync()
            assert run.largest() < 1e-4
    finally:
        run.session.stop()


FIT = (
    "fit --config {} --data.path prompts.jsonl --data.val_fraction 0.1 --model.policy.path tiny "
    "--model.reward Function --model.reward.path vowels.vowels --data.batch_size 8 --data.max_length 64 "
    "--model.sampling.max_new_tokens 12 --model.optimizer.lr 1e-4 --trainer.max_epochs 2 "
    "--trainer.default_root_dir run"
)


def fit(folder: Path, *arguments: str) -> list[dict[str, str]]:
    """A run by the command line: its rows of metrics.csv that rollouts have."""
    rows = [{"prompt": f"{n} + {n + 1}?"} for n in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "vowels.py").write_text(
        "def vowels(samples):\n    return [float(len(s.response) % 5) for s in samples]\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "leyden", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    with (folder / "run" / "metrics.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row.get("rollout/mismatch")]


@pytest.mark.parametrize(
    "arguments",
    [
        [*FIT.format("ppo").split(), "--config", "vllm", "--config", "fsdp2", "--trainer.devices", "2"],
        [*FIT.format("grpo").split(), "--model.samples", "3", "--config", "vllm", "--model.lag", "1"],
        [*FIT.format("grpo").split(), "--model.samples", "3", "--config", "vllm_colocated"],
    ],
    ids=["ppo on two processes", "grpo one rollout ahead", "grpo colocated"],
)
def test_runs_of_the_command_line(arguments: list[str], tmp_path: Path) -> None:
    rows = fit(tmp_path, *arguments)
    ahead = "--model.lag" in arguments
    assert len(rows) == 2 and all(float(row["rollout/mismatch_max"]) < 1e-4 for row in rows[: 1 if ahead else 2])
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    log = tmp_path / "run" / "vllm.log"
    if log.is_file():  # the server has ended with the run
        port = re.search(r"--port (\d+)", log.read_text(encoding="utf-8").splitlines()[0])
        assert port is not None
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port[1]))).close()
