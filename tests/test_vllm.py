"""vLLM as an engine, over a server that speaks as vLLM does: samples, syncs and their proof, outages, bad input."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FAULTS, JOURNAL, Fake, ask, environment, journal
from lightning.pytorch import Callback
from peft import LoraConfig
from ranks import Ranks
from small import fit, save_llama, weights_of

import leyden.cli.lightning_cli  # noqa: F401  (what processes that are forked from this one need)
from leyden.algos import GRPO, PPO, OnlineDPO, RejectionSampling
from leyden.corrections import NoCorrection
from leyden.data import Prompt, PromptLoader
from leyden.data.datamodule import DataModule
from leyden.datamodules import PromptData  # noqa: F401
from leyden.errors import UserError
from leyden.example import Example, Sample
from leyden.models import CausalLM
from leyden.models.engines import VLLM, guard, server
from leyden.models.engines.client import Client
from leyden.models.engines.requests import request_seed
from leyden.models.engines.server import free_port
from leyden.on_policy import OnPolicy
from leyden.policy import Native, Response, Sampling
from leyden.policy.engine_session import EngineSession
from leyden.policy.sync_proof import Mismatch, SyncProof, differences

SHORT = Sampling(max_new_tokens=6, temperature=0.7, seed=3)
LORA = dict(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
KINDS: dict[str, tuple[type[OnPolicy], dict[str, Any]]] = {
    "PPO": (PPO, {"samples": 2, "minibatches": 2}),
    "GRPO": (GRPO, {"samples": 3, "minibatches": 2}),
    "RejectionSampling": (RejectionSampling, {"samples": 3, "minibatches": 2}),
    "OnlineDPO": (OnlineDPO, {"samples": 3, "minibatches": 2}),
}
multiprocessing.set_forkserver_preload(
    [
        "leyden.cli.lightning_cli",
        "leyden.algos",
        "leyden.models.engines.vllm",
        "leyden.datamodules",
        "leyden.rewards",
        "peft",
        "transformers.models.llama",
    ]
)
EXACT = 1e-4
"""Nats that float32 may lie from float32."""


# -- what is trained -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small Llama, and an environment with what passes for vLLM."""
    folder = tmp_path_factory.mktemp("vllm")
    save_llama(folder / "model", 0.1)
    environment(folder / "env")
    return folder


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The journal of every server of a test."""
    monkeypatch.setenv(JOURNAL, str(tmp_path / "journal.jsonl"))
    monkeypatch.delenv(FAULTS, raising=False)
    return tmp_path / "journal.jsonl"


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that comes back is seen at once."""
    monkeypatch.setattr("leyden.models.engines.requests.PAUSE", 0.05)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with the faults of servers that start from then on."""
    return lambda **faults: monkeypatch.setenv(FAULTS, json.dumps(faults))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    group = Ranks(method="forkserver")
    yield group
    group.close()


@pytest.fixture
def started() -> Iterator[list[VLLM]]:
    """Engines that a test started, which end with it."""
    engines: list[VLLM] = []
    yield engines
    for engine in engines:
        engine.stop()


def even(samples: Sequence[Sample]) -> list[float]:
    """Share of characters with an even code."""
    return [sum(ord(c) % 2 == 0 for c in s.response) / max(len(s.response), 1) for s in samples]


class Questions(DataModule):
    """Prompts of two to nine tokens, and one of more than a block of keys."""

    max_length = 320

    def __init__(self, count: int = 8, held: int = 0, size: int = 8) -> None:
        super().__init__(size, 4096, 0)
        generator = torch.Generator().manual_seed(9)
        sizes = [2 + i % 8 for i in range(count + held - 1)] + [200]
        rows = [torch.randint(4, 4096, (size,), generator=generator).tolist() for size in sizes]
        prompts = [Prompt(i, Example([]), row) for i, row in enumerate(rows)]
        self.prompts, self.held = prompts[held:], prompts[:held]

    def source(self, row: int) -> str:
        return f"q.jsonl:{row + 1}"

    def train_dataloader(self) -> Any:
        return self._trainer().lightning_module.experience(PromptLoader(self.prompts, self.batch_size, self.seed))

    def val_dataloader(self) -> Any:
        mine = self.held if self._trainer().global_rank == 0 else []
        return torch.utils.data.DataLoader([mine, []], batch_size=None) if self.held else []  # type: ignore[arg-type]


def policy(place: Path, lora: bool = False, **more: Any) -> CausalLM:
    return CausalLM(str(place / "model"), adapter=LoraConfig(**(LORA | more)) if lora else None)


def algorithm(place: Path, engine: Any, kind: str = "GRPO", lora: bool = False, **more: Any) -> Any:
    made, options = KINDS[kind]
    given: dict[str, Any] = dict(reward=even, sampling=SHORT, lr_scheduler=None, engine=engine)
    given["optimizer"] = lambda parameters: torch.optim.AdamW(parameters, lr=2e-2, eps=1e-3)  # no sign of rounding
    return made(policy(place, lora), **(given | options | more))


def built(place: Path, lora: bool = False, **more: Any) -> CausalLM:
    torch.manual_seed(1)
    found = policy(place, lora, **more)
    found.build()
    return found


def changed(trained: CausalLM, by: float = 0.05) -> None:
    with torch.no_grad():
        for parameter in (p for p in trained.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * by)


def prompts_of(count: int = 6) -> list[list[int]]:
    return [prompt.tokens for prompt in Questions(count).prompts]


def tokens(groups: Sequence[Sequence[Response]]) -> list[list[list[int]]]:
    return [[response.tokens for response in group] for group in groups]


def did(log: Path, what: str) -> list[dict[str, Any]]:
    return [row for row in journal(log) if row["did"] == what]


def answered(log: Path) -> list[tuple[str, int]]:
    """Requests of rollouts that were answered: proofs ask for four samples, and validation for one."""
    return [(row["model"], row["seed"]) for row in did(log, "answer") if row["n"] == 3]


def rollouts(folder: Path) -> list[dict[str, Any]]:
    """Every row that a run has kept, in order: those that wait to be scored as well."""
    files = sorted(folder.glob("rollouts*.jsonl*"), reverse=True)
    rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [row for _, row in sorted({(row["rollout"], row["draw"]): row for row in rows}.items())]


class Measured(SyncProof):
    """Keeps every mismatch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Mismatch] = []

    def measure(self, *args: Any) -> Mismatch:
        self.seen.append(super().measure(*args))
        return self.seen[-1]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(holds: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


# -- training --------------------------------------------------------------------------------------------------------


class Sparse(Callback):
    """Keeps the mismatch of every rollout."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["rollout/mismatch_max"]))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_training_samples_what_the_policy_would(kind: str, lora: bool, place: Path, log: Path, tmp_path: Path) -> None:
    """Every token's log-prob, in every rollout and right after every sync, and one sync for each version."""
    found, seen = algorithm(place, VLLM(str(place / "env")), kind, lora), Sparse()
    found.session.proof = proof = Measured()
    torch.manual_seed(0)
    fit(found, Questions(held=2), max_epochs=3, default_root_dir=tmp_path / "run", callbacks=[seen])
    assert len(seen.seen) >= 6 and max(seen.seen) < EXACT
    assert proof.noise is not None and proof.noise.largest < EXACT and max(one.largest for one in proof.seen) < EXACT
    syncs = did(log, "load" if lora else "reload")
    # three rollouts and three validations, of which each but the last has the weights of the next rollout; the server
    # is started from the first ones
    assert len(syncs) == 4 - (not lora) and len(proof.seen) == 4
    assert len(did(log, "unload")) == (3 if lora else 0) and len(did(log, "reset")) == (0 if lora else 3)
    assert len(did(log, "start")) == 1 and (tmp_path / "run" / "vllm.log").is_file()
    names = [row.get("name", row.get("path")) for row in syncs]
    assert len(set(names)) == len(names)
    assert not list(Path("/dev/shm").glob(f"leyden-*/{os.path.basename(str(names[-1]))}"))
    assert not alive(did(log, "start")[0]["pid"])


def test_log_probs_are_those_of_training_before_and_after_a_sync(place: Path, log: Path, tmp_path: Path,
                                                                 started: list[VLLM]) -> None:  # fmt: skip
    """Also of a long prompt, which was asked before; in between the engine has the old weights."""
    trained, engine = built(place), VLLM(str(place / "env"))
    started.append(engine)
    engine.start(trained, tmp_path, 320)
    sampling, prompts = Sampling(max_new_tokens=6, seed=1), prompts_of()
    apart = []
    for _ in range(3):
        engine.sync(trained)
        groups = engine.generate(prompts, 3, sampling, range(6))
        apart.append(float(differences(trained, prompts, groups).max()))
        changed(trained)
        apart.append(float(differences(trained, prompts, groups).max()))
    assert max(apart[::2]) < EXACT and min(apart[1::2]) > 0.1


# -- samples ---------------------------------------------------------------------------------------------------------


def test_samples_depend_on_seed_key_and_number_alone(place: Path, log: Path, tmp_path: Path,
                                                     started: list[VLLM]) -> None:  # fmt: skip
    trained, engine = built(place), VLLM(str(place / "env"))
    started.append(engine)
    engine.start(trained, tmp_path, 320)
    prompts = prompts_of()
    whole = tokens(engine.generate(prompts, 3, SHORT, range(6)))
    assert whole == tokens(engine.generate(prompts, 3, SHORT, range(6)))
    assert whole[::-1] == tokens(engine.generate(prompts[::-1], 3, SHORT, range(6)[::-1]))
    assert whole == [tokens(engine.generate([p], 3, SHORT, [k]))[0] for k, p in enumerate(prompts)]
    groups: dict[int, Any] = {}
    for few in engine.stream(prompts, 3, SHORT, range(6)):
        groups |= dict(few)
    assert [tokens([groups[i]])[0] for i in range(6)] == whole
    assert [group[0] for group in tokens(engine.generate(prompts, 1, SHORT, range(6)))] == [g[0] for g in whole]
    assert whole != tokens(engine.generate(prompts, 3, SHORT, range(6, 12)))
    same = tokens(engine.generate([prompts[0]] * 4, 16, Sampling(max_new_tokens=6, seed=3), range(4)))
    assert len({tuple(one) for group in same for one in group}) == 64  # of one prompt, and all are different


def test_seeds_of_requests_lie_further_apart_than_samples() -> None:
    seeds = {request_seed(seed, key) for seed in (None, 1, 2, 1_000_003) for key in range(5000)}
    assert len(seeds) == 20_000 and all(seed % 65_536 == 0 and 0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, 5) == request_seed(None, 5) != request_seed(5, 0)


def test_greedy_answers_are_those_of_the_policy(place: Path, log: Path, tmp_path: Path, started: list[VLLM]) -> None:
    trained, engine = built(place), VLLM(str(place / "env"))
    started.append(engine)
    engine.start(trained, tmp_path, 320)
    greedy, prompts, own = Sampling(max_new_tokens=6, temperature=0.0), prompts_of(), Native()
    own.sync(trained)
    for n in (1, 2):
        found = engine.generate(prompts, n, greedy, range(6))
        assert tokens(found) == tokens(own.generate(prompts, n, greedy, range(6)))


def on_rank(place: str, folder: str, environment: dict[str, str], lora: bool) -> tuple[torch.Tensor, float]:
    from lightning.pytorch.strategies import DDPStrategy

    os.environ |= environment
    found = algorithm(Path(place), VLLM(str(Path(place) / "env")), lora=lora)
    torch.manual_seed(0)
    options = dict(devices=2, strategy=DDPStrategy(process_group_backend="gloo"), use_distributed_sampler=False)
    # one prompt is held out, and the first process alone has it
    trainer = fit(found, Questions(held=1), max_epochs=2, default_root_dir=folder, **options)
    return weights_of(found.policy), float(trainer.callback_metrics["rollout/mismatch_max"])


@pytest.mark.parametrize("lora", [False, True])
def test_two_processes_share_a_server_and_learn_what_one_does(lora: bool, place: Path, log: Path, ranks: Ranks,
                                                              tmp_path: Path) -> None:  # fmt: skip
    one = algorithm(place, VLLM(str(place / "env")), lora=lora)
    torch.manual_seed(0)
    fit(one, Questions(held=1), max_epochs=2, default_root_dir=tmp_path / "one")
    before = len(journal(log))
    own = {JOURNAL: str(log), FAULTS: "{}"}
    first, second = ranks(on_rank, str(place), str(tmp_path / "two"), own, lora, timeout=90.0)
    assert torch.equal(first[0], second[0]) and max(first[1], second[1]) < EXACT
    shared, alone = rollouts(tmp_path / "two"), rollouts(tmp_path / "one")
    torch.testing.assert_close(first[0], weights_of(one.policy), atol=1e-5, rtol=0)
    assert (first[0] - weights_of(built(place, lora))).abs().max() > 1e-3 or lora
    assert [row["tokens"] for row in shared] == [row["tokens"] for row in alone] and len(alone) == 16
    count = [row["did"] for row in journal(log)[before:]]
    assert count.count("start") == 1 and count.count("load" if lora else "reload") == 3 - (not lora)


# -- proof -----------------------------------------------------------------------------------------------------------

SKIPPED = {
    "reload": ({"ignore_reload": True}, "no longer in step.*weights were not taken over"),
    "head": ({"keep_head": True}, "no longer in step"),
    "keys": ({"keep_cache": True}, "no longer in step.*keys of older weights"),
    "vocabulary": ({"shifted": True}, "does not sample from this policy.*another tokenizer"),
    "busy": ({"busy_cache": True}, "cache of keys could not be emptied"),
    "tokens": ({"vocabulary": 50}, "refuses to sample.*out of vocabulary"),
}


@pytest.mark.parametrize("skipped", list(SKIPPED))
def test_a_sync_that_left_something_out_ends_the_run(skipped: str, place: Path, log: Path, tmp_path: Path,
                                                     broken: Callable[..., None]) -> None:  # fmt: skip
    faults, said = SKIPPED[skipped]
    broken(**faults)
    found = algorithm(place, VLLM(str(place / "env")))
    with pytest.raises(UserError, match=said):
        fit(found, Questions(), max_epochs=3, default_root_dir=tmp_path / "run")
    found.session.stop()


def test_an_adapter_that_was_not_taken_over_ends_the_run(place: Path, log: Path, tmp_path: Path,
                                                         broken: Callable[..., None]) -> None:  # fmt: skip
    broken(ignore_reload=True)
    found = algorithm(place, VLLM(str(place / "env")), lora=True)
    with pytest.raises(UserError, match="no longer in step"):
        fit(found, Questions(), max_epochs=3, default_root_dir=tmp_path / "run")
    found.session.stop()


# -- outages ---------------------------------------------------------------------------------------------------------


def sampled(place: Path, folder: Path, lora: bool = False, engine: VLLM | None = None) -> Any:
    """A run of two rollouts."""
    engine = engine or VLLM(str(place / "env"), requests=6)
    found = algorithm(place, engine, lora=lora, correction=NoCorrection())
    torch.manual_seed(0)
    try:
        fit(found, Questions(24, size=12), max_epochs=2, default_root_dir=folder)
    finally:
        found.session.stop()
    return (folder / "rollouts.jsonl").read_bytes().replace(b"policy", b"")


@pytest.fixture(scope="module")
def undisturbed(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, bytes]:
    """Rollouts of runs whose server lives, with full weights and with an adapter."""
    return {lora: sampled(place, tmp_path_factory.mktemp("whole"), lora) for lora in (False, True)}


@pytest.mark.parametrize(("fault", "lora"), [("die_after", False), ("die_after", True), ("core_dies_after", True)])
def test_a_server_that_dies_is_started_again_and_nothing_is_sampled_twice(
    fault: str, lora: bool, place: Path, log: Path, tmp_path: Path, undisturbed: dict[bool, bytes],
    broken: Callable[..., None],
) -> None:  # fmt: skip
    """In the middle of the first rollout, and in the middle of the second, whose weights it was not started from."""
    broken(**{fault: [4 + 5, 7 + 4 + 4]})
    assert sampled(place, tmp_path / "run", lora) == undisturbed[lora]
    starts = did(log, "start")
    assert len(starts) == 3 and len(answered(log)) == len(set(answered(log))) == 24
    if not lora:
        assert [Path(row["model"]).name for row in starts] == ["v0", "v0", "v1"]


def test_a_server_that_dies_during_a_sync_is_told_again(place: Path, log: Path, tmp_path: Path,
                                                        undisturbed: dict[bool, bytes]) -> None:  # fmt: skip
    class Fatal(VLLM):
        """Its server dies as it is told of the new weights, once."""

        killed = False

        def _reload(self, client: Client) -> None:
            if not self.killed:
                self.killed = True
                os.kill(did(log, "start")[-1]["pid"], signal.SIGKILL)
                until(lambda: not client.is_up())
            super()._reload(client)

    assert sampled(place, tmp_path / "run", engine=Fatal(str(place / "env"), requests=6)) == undisturbed[False]
    assert len(did(log, "start")) == 2


def test_a_server_that_keeps_dying_ends_the_run(place: Path, log: Path, tmp_path: Path,
                                                broken: Callable[..., None]) -> None:  # fmt: skip
    broken(die_after=[4 + 3, *[0] * 9])
    with pytest.raises(UserError, match="went away twice over the same requests.*ckpt_path auto goes on from there"):
        sampled(place, tmp_path / "run")
    kept = rollouts(tmp_path / "run")
    assert len(kept) == 3 == len(answered(log)) and not Path(did(log, "start")[0]["model"]).exists()


def test_a_server_that_cannot_start_again_ends_the_run(place: Path, log: Path, tmp_path: Path,
                                                       broken: Callable[..., None]) -> None:  # fmt: skip
    broken(die_after=[4 + 3], last_words="out of memory", unable_from=1)
    with pytest.raises(UserError, match="has gone and does not come back"):
        sampled(place, tmp_path / "run")
    assert len(rollouts(tmp_path / "run")) == 3 and "out of memory" in (tmp_path / "run" / "vllm.log").read_text()


# -- servers elsewhere -----------------------------------------------------------------------------------------------


def test_two_servers_share_the_work_and_one_takes_over(place: Path, log: Path, tmp_path: Path,
                                                       undisturbed: dict[bool, bytes]) -> None:  # fmt: skip
    model = str(place / "model")
    with Fake(model, free_port("127.0.0.1"), log, {"slow": 0.01}) as one, Fake(model, free_port("127.0.0.1"), log,
                                                                            {"slow": 0.01}) as two:  # fmt: skip
        urls = [one.url, two.url]
        whole = sampled(place, tmp_path / "whole", engine=VLLM(url=urls, folder=str(tmp_path), requests=6))
        assert whole == undisturbed[False]
        shares = [sum(row["port"] == fake.port for row in did(log, "answer")) for fake in (one, two)]
        assert min(shares) >= 8 and one.process.poll() is None
        log.unlink()
        one.ask("POST", "/fake", {"die_after": [one.ask("GET", "/fake")["answers"] + 4] * 9})
        again = sampled(place, tmp_path / "again", engine=VLLM(url=urls, folder=str(tmp_path), requests=6))
        assert again == undisturbed[False] and one.process.wait(5) == -signal.SIGKILL
        assert len(answered(log)) == len(set(answered(log))) == 24
        two.ask("POST", "/fake", {"die_after": [two.ask("GET", "/fake")["answers"] + 6] * 9})
        with pytest.raises(UserError, match="none of the 2 servers answers|nothing answers there"):
            sampled(place, tmp_path / "none", engine=VLLM(url=urls, folder=str(tmp_path), requests=6))
    assert not list(tmp_path.glob("leyden-*"))


@pytest.mark.parametrize("lora", [False, True])
def test_a_server_elsewhere_that_comes_back_gets_the_weights_again(lora: bool, place: Path, log: Path, tmp_path: Path,
                                                                   undisturbed: dict[bool, bytes]) -> None:  # fmt: skip
    """Whoever runs it has started it again from its own weights, in the middle of the second rollout."""
    port, options = free_port("127.0.0.1"), ("--enable-lora", "--served-model-name", "theirs")
    fakes = [Fake(str(place / "model"), port, log, {"die_after": [4 + 12 + 4 + 5]}, options=options)]

    def revive() -> None:
        fakes[0].process.wait(60)
        fakes.append(Fake(str(place / "model"), port, log, options=options))

    watch = threading.Thread(target=revive)
    watch.start()
    try:
        engine = VLLM(url=fakes[0].url, folder=str(tmp_path), requests=6, start_timeout=30)
        assert sampled(place, tmp_path / "run", lora, engine) == undisturbed[lora]
        watch.join()
        assert len(fakes) == 2 and len(set(answered(log))) == len(answered(log)) == 24
        models = ask(port, "GET", "/v1/models")["data"]
        assert [one["id"] for one in models] == ["theirs"]  # no adapter of ours is left
    finally:
        for fake in fakes:
            fake.__exit__()


# -- interruptions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def slowed(place: Path, log: Path, tmp_path: Path, started: list[VLLM]) -> Iterator[Callable[..., Iterator[Any]]]:
    """Streams whose first answers come at once, and all others in a minute."""
    with Fake(str(place / "model"), free_port("127.0.0.1"), log) as fake:
        engine = VLLM(url=fake.url, folder=str(tmp_path), requests=9)
        started.append(engine)
        trained = built(place)
        engine.start(trained, tmp_path, 320)
        engine.sync(trained)

        def stream(at_once: bool) -> Iterator[Any]:
            fake.ask("POST", "/fake", {"slow": 0.0 if at_once else 60.0})
            slow: Callable[[int], Any] = lambda count: fake.ask("POST", "/fake", {"slow": 60.0})  # noqa: E731
            return engine.stream(prompts_of(12), 3, SHORT, range(12), slow)

        yield stream


@pytest.mark.parametrize("at_once", [True, False])
def test_ctrl_c_waits_for_no_answer(at_once: bool, slowed: Callable[..., Iterator[Any]]) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(slowed(at_once))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 3.0


def test_an_error_of_the_reward_waits_for_no_answer(slowed: Callable[..., Iterator[Any]]) -> None:
    began, files = time.monotonic(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), closing(slowed(True)) as groups:  # type: ignore[type-var]
        for _ in groups:
            raise ZeroDivisionError
    assert time.monotonic() - began < 3.0
    assert len(os.listdir("/proc/self/fd")) <= files  # no connection is left of the threads that asked


def test_an_error_in_training_ends_the_server(place: Path, log: Path, tmp_path: Path) -> None:
    def fail(samples: Sequence[Sample]) -> list[float]:
        raise OSError("the judge is away")

    found = algorithm(place, VLLM(str(place / "env"), folder=str(tmp_path / "scratch")), reward=fail)
    with pytest.raises(UserError, match="the judge is away"):
        fit(found, Questions(), max_epochs=1, default_root_dir=tmp_path / "run")
    assert not alive(did(log, "start")[0]["pid"]) and not os.listdir(tmp_path / "scratch")


def test_an_interrupted_start_ends_the_server(place: Path, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              broken: Callable[..., None]) -> None:  # fmt: skip
    broken(deaf=True)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.Client, "is_up", interrupt)
    engine = VLLM(str(place / "env"), folder=str(tmp_path / "scratch"))
    with pytest.raises(KeyboardInterrupt):
        EngineSession(engine).sync(built(place), 0, tmp_path, 320)
    assert not os.listdir(tmp_path / "scratch")


def command(args: list[str], folder: str, log: str, environment: dict[str, str]) -> None:
    """Run `leyden ARGS` in a process of its own."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= environment
    os.chdir(folder)
    os.setpgrp()  # as a shell does, so that Ctrl-C is for all that it started
    torch.set_num_threads(1)
    from leyden.cli.launcher import main

    code = main(args)
    sys.stdout.flush()
    sys.exit(code)  # not os._exit: the server is ended at the end of the interpreter


FIT = (
    "fit --config grpo --config vllm --data.path prompts.jsonl --data.batch_size 8 --data.max_length 40 "
    "--model.sampling.max_new_tokens 6 --model.reward leyden.rewards.Function --model.reward.path vowels.count "
    "--model.samples 3 --model.minibatches 2 --model.optimizer.lr 1e-3 --trainer.max_epochs 3 --ckpt_path auto "
    "--trainer.accelerator cpu --trainer.devices 1 --trainer.enable_progress_bar false "
    "--checkpoint.every_n_train_steps 1"
)


class Runs:
    """Runs of `leyden fit` in a folder, which are started, watched and killed."""

    def __init__(self, place: Path, folder: Path, log: Path) -> None:
        self.place, self.folder, self.log = place, folder, log
        rows = [json.dumps({"prompt": f"{i} one two {'three' * (i % 4)}?"}) + "\n" for i in range(20)]
        (folder / "prompts.jsonl").write_text("".join(rows))
        code = "def count(samples):\n    return [sum(s.response.count(v) for v in 'aeiou') / 4 for s in samples]\n"
        (folder / "vowels.py").write_text(code)

    def start(self, name: str, **faults: Any) -> Any:
        args = [*FIT.split(), "--model.policy.path", str(self.place / "model"), "--trainer.default_root_dir", name,
                "--model.engine.python", str(self.place / "env"), "--model.engine.requests", "3"]  # fmt: skip
        own = {"LEYDEN_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        own |= {JOURNAL: str(self.log), FAULTS: json.dumps(faults), "LEYDEN_LANG": "en"}
        started = (args, str(self.folder), str(self.folder / f"{name}.log"), own)
        process = multiprocessing.get_context("forkserver").Process(target=command, args=started)
        process.start()
        return process

    def end(self, process: Any) -> int:
        process.join(60)
        return int(process.exitcode)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Rollouts of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    runs = Runs(place, folder, folder / "journal.jsonl")
    assert runs.end(runs.start("whole")) == 0, runs.said("whole")
    found = (folder / "whole" / "rollouts.jsonl").read_bytes()
    assert len(answered(runs.log)) == len(found.splitlines()) == 24
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_leaves_nothing_and_goes_on_as_if_it_was_not(
    number: int, place: Path, log: Path, whole: bytes, tmp_path: Path
) -> None:
    """In the middle of the second rollout. Ctrl-C, which a terminal sends to all, ends it once its step is saved."""
    runs = Runs(place, tmp_path, log)
    process = runs.start("cut", slow=0.05)
    assert until(lambda: len(answered(log)) >= 11 or not process.is_alive(), 60) and process.is_alive()
    first = did(log, "start")[0]
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert runs.end(process) == (-9 if number == signal.SIGKILL else 130), runs.said("cut")
    assert until(lambda: not alive(first["pid"]) and not Path(first["model"]).parent.exists(), 5)
    kept, asked = len(rollouts(tmp_path / "cut")), len(answered(log))
    assert 10 <= kept <= asked and kept == (asked if number == signal.SIGINT else kept)
    assert runs.end(runs.start("cut")) == 0, runs.said("cut")
    assert (tmp_path / "cut" / "rollouts.jsonl").read_bytes() == whole
    assert len(answered(log)) - asked == 24 - kept
    assert not alive(did(log, "start")[-1]["pid"])


# -- the guard -------------------------------------------------------------------------------------------------------

SERVER = """
import os, pathlib, signal, socket, subprocess, sys, time
place, port = pathlib.Path(sys.argv[1]), int(sys.argv[2])
starts = len(list(place.glob("start*")))
if starts >= int(sys.argv[3]):
    (place / "failed").touch()
    sys.exit(7)
if sys.argv[4] == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "1000"])
listener = socket.create_server(("127.0.0.1", port))
(place / f"part{starts}").write_text(f"{os.getpid()} {child.pid}")
os.rename(place / f"part{starts}", place / f"start{starts}")
while True:
    listener.accept()[0].close()
"""
PARENT = """
import os, subprocess, sys
command = [sys.executable, "-c", sys.argv[1], str(os.getpid()), *sys.argv[2:]]
print(subprocess.Popen(command, stdout=subprocess.DEVNULL).pid, flush=True)
input()
"""
GUARD = f"""
import sys
sys.path.insert(0, {str(Path(guard.__file__).parent)!r})
import guard
guard.PATIENCE = 1.0
folder, port = sys.argv[2], int(sys.argv[3])
sys.exit(guard.run(int(sys.argv[1]), folder, ("127.0.0.1", port), [sys.executable, "-c", *sys.argv[4:]]))
"""


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Callable[..., tuple[Any, int]]]:
    """Call it with how often the server can start, and what it is like: a process, and its guard's id."""
    parents, guards = [], []

    def start(starts: int, kind: str = "tame") -> tuple[Any, int]:
        (tmp_path / "scratch").mkdir()
        port = str(free_port("127.0.0.1"))
        given = [GUARD, str(tmp_path / "scratch"), port, SERVER, str(tmp_path), port, str(starts), kind]
        parent = subprocess.Popen([sys.executable, "-c", PARENT, *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        parents.append(parent)
        assert parent.stdout is not None
        guards.append(int(parent.stdout.readline()))
        return parent, guards[-1]

    yield start
    for parent in parents:
        parent.kill()
        parent.communicate()
    left = [int(word) for file in tmp_path.glob("start*") for word in file.read_text().split()]
    for pid in filter(alive, [*guards, *left]):  # of a test that failed
        os.kill(pid, signal.SIGKILL)


def processes(tmp_path: Path, number: int) -> list[int]:
    """Of a server that was started for this many times before, once it listens."""
    assert until(lambda: (tmp_path / f"start{number}").exists())
    return [int(word) for word in (tmp_path / f"start{number}").read_text().split()]


@pytest.mark.parametrize("kind", ["tame", "stubborn"])
def test_a_server_ends_with_its_parent_and_all_that_it_started(kind: str, guarded: Any, tmp_path: Path) -> None:
    parent, guard_id = guarded(9, kind)
    pids = processes(tmp_path, 0)
    assert all(map(alive, pids)) and (tmp_path / "scratch").is_dir()
    parent.kill()
    assert until(lambda: not any(map(alive, [*pids, guard_id])), 6) and not (tmp_path / "scratch").exists()
    assert not (tmp_path / "start1").exists()


def test_a_server_that_ended_is_started_again_while_it_can(guarded: Any, tmp_path: Path) -> None:
    _, guard_id = guarded(2)
    for number in range(2):
        pids = processes(tmp_path, number)
        time.sleep(0.8)  # until it was seen to listen
        os.kill(pids[0], signal.SIGKILL)
        assert until(lambda pids=pids: not any(map(alive, pids)), 6)
    assert until(lambda: not alive(guard_id), 6) and (tmp_path / "failed").exists()
    assert not (tmp_path / "scratch").exists()


def test_a_guard_that_is_told_to_stop_starts_nothing_again(guarded: Any, tmp_path: Path) -> None:
    _, guard_id = guarded(9)
    pids = processes(tmp_path, 0)
    time.sleep(0.8)
    os.kill(guard_id, signal.SIGTERM)
    assert until(lambda: not any(map(alive, [*pids, guard_id])), 6)
    assert not (tmp_path / "start1").exists() and not (tmp_path / "scratch").exists()


# -- bad input -------------------------------------------------------------------------------------------------------


def listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def started_with(place: Path, run: Path, trained: CausalLM | None = None, **options: Any) -> None:
    """Start an engine and sync it, as a run does."""
    session = EngineSession(VLLM(**({"folder": str(run / "scratch")} | options)))
    try:
        session.sync(trained or built(place), 0, run, 320)
    finally:
        session.stop()
        assert not (run / "scratch").exists() or not os.listdir(run / "scratch")


def old(folder: Path) -> dict[str, Any]:
    return {"python": environment(folder / "old", "0.9.1")}


def bare(folder: Path) -> dict[str, Any]:
    return {"python": sys.executable}


def absent(folder: Path) -> dict[str, Any]:
    return {"python": str(folder / "nowhere")}


def no_url(folder: Path) -> dict[str, Any]:
    return {"url": "127.0.0.1:8000"}


def silent(folder: Path) -> dict[str, Any]:
    return {"url": f"http://127.0.0.1:{free_port('127.0.0.1')}"}


def both(folder: Path) -> dict[str, Any]:
    return {"python": "x", "url": "http://127.0.0.1:1"}


def shared_nothing(folder: Path) -> dict[str, Any]:
    return {"url": "http://127.0.0.1:1", "folder": None}


def nothing(folder: Path) -> dict[str, Any]:
    return {"python": "x", "requests": 0}


WRONG: list[tuple[Callable[[Path], dict[str, Any]], str]] = [
    (absent, "--model.engine.python .*nowhere: no Python there; make an environment"),
    (bare, "has no vLLM; make an environment"),
    (old, r"has vllm 0\.9\.1; 0\.28 or later is needed"),
    (no_url, "give the address of a server"),
    (silent, "nothing answers there"),
    (both, "give one of the two"),
    (shared_nothing, "give it by --model.engine.folder"),
    (nothing, "give more than 0"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_what_cannot_work_is_said_in_a_line(given: Callable[[Path], dict[str, Any]], said: str, place: Path,
                                            log: Path, tmp_path: Path) -> None:  # fmt: skip
    began = time.monotonic()
    with pytest.raises(UserError, match=said) as found:
        started_with(place, tmp_path, **given(tmp_path))
    assert "\n" not in str(found.value) and time.monotonic() - began < 10


STARTS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"deaf": True}, {"start_timeout": 1.0}, "did not start within 1 s; see .*vllm.log"),
    ({"last_words": "ValueError: No available memory for the cache blocks."}, {}, "no room for its cache of keys"),
    ({"last_words": "Traceback\nValueError: Model architectures ['X'] are not supported for now."}, {},
     "vLLM does not know this model"),
    ({"last_words": "Traceback (most recent call last):\nRuntimeError: something new"}, {}, "RuntimeError: something"),
    ({"refuse": [500, "CUDA error: an illegal memory access"]}, {}, "refuses to sample .*CUDA error"),
]  # fmt: skip


@pytest.mark.parametrize(("faults", "options", "said"), STARTS)
def test_a_server_that_is_of_no_use_is_said_in_a_line(faults: dict[str, Any], options: dict[str, Any], said: str,
                                                      place: Path, log: Path, tmp_path: Path,
                                                      broken: Callable[..., None]) -> None:  # fmt: skip
    broken(**faults)
    with pytest.raises(UserError, match=said) as found:
        started_with(place, tmp_path, python=str(place / "env"), **options)
    assert "\n" not in str(found.value)


def test_a_port_that_is_taken_is_said(place: Path, log: Path, tmp_path: Path) -> None:
    """Also where what listens there would pass for the server."""
    with listening() as taken, pytest.raises(UserError, match="cannot listen on 127.0.0.1, port .*in use"):
        started_with(place, tmp_path, python=str(place / "env"), port=taken.getsockname()[1])


def test_another_program_is_no_server(place: Path, log: Path, tmp_path: Path) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        try:
            with pytest.raises(UserError, match="no vLLM server answers there"):
                started_with(place, tmp_path, url=f"http://127.0.0.1:{other.server_port}")
        finally:
            other.shutdown()


def test_servers_elsewhere_say_what_they_lack(place: Path, log: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    lora = built(place, lora=True)
    with Fake(str(place / "model"), free_port("127.0.0.1"), log, {}, {}) as plain:
        for trained in (built(place), lora):
            with pytest.raises(UserError, match="start it with VLLM_SERVER_DEV_MODE=1"):
                started_with(place, tmp_path, trained, url=plain.url)
        with pytest.raises(UserError, match="the servers call their models"):
            other = Fake(str(place / "model"), free_port("127.0.0.1"), log, options=("--served-model-name", "other"))
            with other:
                started_with(place, tmp_path, url=[plain.url, other.url])
    options = ("--enable-lora", "--max-lora-rank", "8")
    with Fake(str(place / "model"), free_port("127.0.0.1"), log, options=options) as ready:
        started_with(place, tmp_path, lora, url=ready.url)
        with pytest.raises(UserError, match="LoRA rank 12 is greater.*start it with a larger --max-lora-rank"):
            started_with(place, tmp_path, built(place, lora=True, r=12), url=ready.url)
        for trained in (lora, built(place)):  # the second ends the server
            hide(monkeypatch)
            with pytest.raises(UserError, match="does not see .*a disk that both sides share"):
                started_with(place, tmp_path, trained, url=ready.url)


def hide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have servers read folders that they do not see."""
    post = Client.post

    def elsewhere(self: Client, path: str, body: Any = None, timeout: float | None = None) -> Any:
        return post(self, path, json.loads(json.dumps(body).replace("/scratch/", "/elsewhere/")), timeout)

    monkeypatch.setattr(Client, "post", elsewhere)


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ["model.norm"]}])
def test_adapters_that_vllm_does_not_run_are_refused(more: dict[str, Any], place: Path, log: Path,
                                                     tmp_path: Path) -> None:  # fmt: skip
    with pytest.raises(UserError, match=f"vLLM runs no LoraConfig with {next(iter(more))}"):
        started_with(place, tmp_path, built(place, lora=True, **more), python=str(place / "env"))


def test_a_server_gets_its_own_environment(place: Path, log: Path, tmp_path: Path, started: list[VLLM],
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Not the packages of this process, and nothing that says which of several processes it is."""
    for name in ("PYTHONPATH", "VLLM_USE_V1", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT",
                 "TORCHELASTIC_USE_AGENT_STORE", "FRANK"):  # fmt: skip
        monkeypatch.setenv(name, "/nowhere")
    engine = VLLM(str(place / "env"))
    started.append(engine)
    engine.start(built(place), tmp_path, 320)
    given = engine._replicas[0].client.get("/fake")["environment"]
    assert "/nowhere" not in {value for name, value in given.items() if name != "FRANK"} and given["FRANK"]
    assert given["VLLM_SERVER_DEV_MODE"] == "1"


def test_a_mistake_in_a_command_is_one_line(leyden: Any, place: Path, log: Path, workplace: Path) -> None:
    runs = Runs(place, workplace, log)
    args = [*FIT.split(), "--model.policy.path", str(place / "model"), "--model.engine.python", "nowhere"]
    code, _, err = leyden(*args, "--trainer.default_root_dir", "run")
    assert code == 2 and "error: --model.engine.python nowhere: no Python there" in err and "Traceback" not in err
    assert runs.folder == workplace


def test_a_prompt_that_is_too_long_is_said(place: Path, log: Path, tmp_path: Path) -> None:
    """The proof keeps to what the server takes; a prompt may not."""
    policy, session = built(place), EngineSession(VLLM(python=str(place / "env"), max_length=40))
    try:
        engine = session.sync(policy, 0, tmp_path, 320)
        with pytest.raises(UserError, match="longer than the server takes; give --model.engine.max_length"):
            engine.generate([[5] * 60], 1, Sampling(8, seed=1), [0])
    finally:
        session.stop()
