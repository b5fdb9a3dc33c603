"""`leyden benchmark --engine VLLM`, over a server that speaks as vLLM does: answers, stop strings, and its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_vllm import FAULTS, JOURNAL, environment, journal
from small import save_llama
from tasks import answer_task, choice_task

pytest.importorskip("lm_eval", reason="needs lm-eval: make test-extras")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Llama, what passes for an environment with vLLM, and tasks."""
    save_llama(tmp_path / "model", 0.1)
    environment(tmp_path / "env")
    answer_task(tmp_path, count=6, filter_list=[{"name": "all", "filter": [{"function": "take_first"}]}])
    choice_task(tmp_path, "world", 4)
    monkeypatch.setenv(JOURNAL, str(tmp_path / "journal.jsonl"))
    monkeypatch.delenv(FAULTS, raising=False)
    return tmp_path


def answers(folder: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(Path(folder, "benchmark.json").read_text(encoding="utf-8"))["tasks"]
    return record


def test_a_server_gives_the_answers_of_the_model(leyden: Any, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy ones token by token, cut at the same stop strings; choices are scored by the model itself."""
    from leyden.models.benchmark.lm import PolicyLM

    whole, said = PolicyLM.generate_until, list[list[str]]()

    def keep(self: PolicyLM, *args: Any, **named: Any) -> list[str]:
        said.append(whole(self, *args, **named))
        return said[-1]

    monkeypatch.setattr(PolicyLM, "generate_until", keep)
    command = ["benchmark", "model", "--tasks", "sums.yaml", "world.yaml", "--max_length", "200"]
    engine = ["--engine", "VLLM", "--engine.python", "env"]
    code, _, error = leyden(*command, "--output", "own")
    assert code == 0, error
    code, _, error = leyden(*command, "--output", "served", *engine)
    assert code == 0, error
    assert said[0] == said[1] and len(set(said[0])) > 1
    own, served = answers("own"), answers("served")
    assert own["world"]["outcomes"] == served["world"]["outcomes"]
    assert served["sums"]["settings"] == own["sums"]["settings"] | {"engine": "VLLM (python env)"}
    did = [line["did"] for line in journal(place / "journal.jsonl")]
    assert did.count("start") == 1 and "answer" in did
    assert Path("served/vllm.log").is_file()
    code, out, error = leyden(*command, "--output", "served", *engine)  # asked already: no server is started
    assert code == 0 and "already" in out + error
    assert [line["did"] for line in journal(place / "journal.jsonl")].count("start") == 1


def test_an_answer_ends_at_its_stop_string(leyden: Any, place: Path) -> None:
    """What the model would say after it is not sampled."""
    from leyden.models import CausalLM
    from leyden.models.engines import VLLM
    from leyden.policy import Sampling
    from leyden.policy.engine_session import EngineSession

    policy = CausalLM(str(place / "model"))
    policy.build()
    session = EngineSession(VLLM(python=str(place / "env")))
    try:
        engine = session.sync(policy, 0, place, 64)
        ((whole,),) = engine.generate([[5, 6, 7]], 1, Sampling(24, 0.0), [0])
        stop = policy.tokenizer.decode(whole.tokens[:6])[-2:]
        engine.stop_strings = [stop]
        ((cut,),) = engine.generate([[5, 6, 7]], 1, Sampling(24, 0.0), [0])
    finally:
        session.stop()
    assert cut.tokens == whole.tokens[: len(cut.tokens)] and 0 < len(cut.tokens) <= 6 < len(whole.tokens)
    assert stop in cut.text and cut.finished


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--engine", "VLM"], "--engine: no Engine is called 'VLM'"),
        (["--engine.python", "env"], "--engine: missing; add --engine CLASS"),
        (["--engine", "VLLM", "--engine.pyton", "env"], "did you mean"),
        (["--engine", "VLLM", "--engine.python", "nowhere"], "--engine.python nowhere"),
        (["--engine", "Gold"], "--engine"),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], said: str, leyden: Any, place: Path) -> None:
    code, _, error = leyden("benchmark", "model", "--tasks", "sums.yaml", "--output", "o", *flags)
    lines = [line for line in error.splitlines() if not line.startswith("reading tasks")]
    assert code == 2 and len(lines) == 1 and said in lines[0], error
    assert "--model.engine" not in error
