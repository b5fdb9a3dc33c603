"""Every algorithm on a GPU: its first steps are those of the CPU, in every precision that GPUs train in."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from peft import LoraConfig
from small import LLAMA, Numbers, TreeData, fit, labelled_trees, saved, small, some_trees
from test_on_policy import Questions
from waits import waits

from leyden.advantages import Whitened
from leyden.algos import BCO, DPO, GRPO, KTO, PPO, SFT, Distillation, OnlineDPO, RejectionSampling, RewardModel
from leyden.divergences import JensenShannon, SampledReverseKL
from leyden.example import Sample
from leyden.models import CausalLM, quantized
from leyden.objectives import ORPO
from leyden.on_policy import ScoreTransform
from leyden.policy import Sampling
from leyden.precision import QLoRAPrecision
from leyden.surrogates import SequenceRatio

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore"),  # compilers warn of much
]
KINDS = [SFT, RewardModel, DPO, KTO, BCO, PPO, GRPO, RejectionSampling, OnlineDPO, Distillation]
SAMPLING = [PPO, GRPO, RejectionSampling, OnlineDPO, Distillation]
WIDE = LLAMA | {"hidden_size": 256, "intermediate_size": 128}
"""Heads of 64, which every kernel takes"""


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.all: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.device = module.device.type
        self.all.append(float(trainer.callback_metrics["train/loss"]))


class Waits(Callback):
    """Keeps where the host waits for the device from the start of each step to its end."""

    def __init__(self) -> None:
        self.all: list[list[str]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._watch = waits()
        self.all.append(self._watch.__enter__())

    def on_train_batch_end(self, *_: Any) -> None:
        self._watch.__exit__(None, None, None)

    def on_exception(self, *_: Any) -> None:
        self._watch.__exit__(None, None, None)


def turns(samples: Sequence[Sample]) -> list[float]:
    """Scores that do not depend on what was sampled, since another rounding samples other tokens."""
    return [float(index % 2) for index, _ in enumerate(samples)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model"), WIDE)


def train(
    kind: Any, folder: str, adapter: bool = False, options: Any = None, watch: Any = None, **trainer: Any
) -> tuple[Any, Any]:
    """A few steps: their losses, or what `watch` saw, and the algorithm."""
    policy = CausalLM(folder, adapter=LoraConfig(r=4, target_modules="all-linear") if adapter else None)
    policy._tokenizer = Numbers()  # type: ignore[assignment]
    given: dict[str, Any] = dict(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), lr_scheduler=None)
    trees = labelled_trees(16) if kind in (KTO, BCO) else some_trees(16, responses=1 if kind is SFT else 2)
    data: Any = TreeData(trees, batch_size=4)
    if kind in SAMPLING:
        given |= dict(reward=turns, sampling=Sampling(max_new_tokens=6), keep_rollouts=False, samples=2)
        data = Questions(4, 12)
    if kind is Distillation:
        given |= dict(teacher=small("teacher", options=WIDE | {"num_hidden_layers": 1}), given=0.3)
    given |= options or {}
    torch.manual_seed(1)
    algorithm, losses = kind(policy, **given), watch or Losses()
    fit(algorithm, data, callbacks=[losses], **({"max_epochs": 3} | trainer))
    return losses, algorithm


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("precision", "near"), [("32-true", 1e-3), ("bf16-mixed", 5e-2), ("16-mixed", 5e-2)])
def test_first_step_is_that_of_a_cpu(kind: Any, precision: str, near: float, folder: str) -> None:
    ours, _ = train(kind, folder, accelerator="gpu", precision=precision)
    theirs, _ = train(kind, folder)
    assert ours.device == "cuda" and theirs.device == "cpu"
    assert len(ours.all) >= 3 and all(torch.isfinite(torch.tensor(ours.all)))
    assert ours.all[0] == pytest.approx(theirs.all[0], rel=near, abs=near)


VARIANTS: dict[str, tuple[Any, bool, dict[str, Any]]] = {
    "orpo": (DPO, False, dict(objective=ORPO())),
    "wpo": (DPO, False, dict(wpo=True)),
    "precomputed": (DPO, True, dict(reference="precomputed")),
    "a critic": (PPO, True, dict(value="adapter")),
    "gspo": (GRPO, False, dict(surrogate=SequenceRatio(), estimator=Whitened())),
    "dapo": (GRPO, False, dict(dynamic_sampling=1, score=ScoreTransform(overlong=0.5), mask_truncated=True)),
    "log-probs alone": (Distillation, False, dict(divergence=SampledReverseKL(), given=0.0)),
    "Jensen-Shannon": (Distillation, False, dict(divergence=JensenShannon(0.3))),
}


@pytest.mark.parametrize("name", [*VARIANTS])
def test_variants_begin_as_on_a_cpu(name: str, folder: str) -> None:
    kind, adapter, options = VARIANTS[name]
    ours, theirs = (train(kind, folder, adapter, options, accelerator=where)[0] for where in ("gpu", "cpu"))
    assert ours.device == "cuda" and len(ours.all) == len(theirs.all) >= 3
    assert ours.all[0] == pytest.approx(theirs.all[0], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_host_waits_once_a_step(kind: Any, precision: str, folder: str) -> None:
    """For the figures of the step; where answers are sampled, for these as well, however many there are."""
    watch, _ = train(kind, folder, watch=Waits(), accelerator="gpu", precision=precision)
    later = watch.all[1:]  # in the first step, policy and reference are held against each other
    # of each of the seventeen columns of a rollout that comes back, of its tokens, fingerprint and figures
    most = max(later, key=len)
    assert len(most) <= (25 if kind in SAMPLING else 1), most


class Weights(Callback):
    """Keeps what was learnt, and how much memory was taken in the end."""

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.memory = torch.cuda.memory_allocated()
        self.learnt = torch.cat([p.detach().flatten().cpu() for p in module.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", [SFT, RewardModel, DPO], ids=lambda kind: kind.__name__)
def test_what_does_not_fit_the_memory_is_cut(kind: Any, folder: str, caplog: pytest.LogCaptureFixture) -> None:
    """The same steps from smaller micro-batches, with a memory between what stays in it and what a step adds."""
    if "simulated" not in torch.cuda.get_device_name():
        pytest.skip("blocks of a real allocator are larger than this model")
    plain = dict(optimizer=lambda p: torch.optim.SGD(p, lr=0.05, foreach=False))
    torch.cuda.reset_peak_memory_stats()
    usual = train(kind, folder, False, plain, Weights(), accelerator="gpu")[0]
    gc.collect()  # what the run held is in circles
    limit = usual.memory + 0.8 * (torch.cuda.max_memory_allocated() - usual.memory)
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        with caplog.at_level("WARNING"):
            tight = train(kind, folder, False, plain, Weights(), accelerator="gpu")[0]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "did not fit the memory; it is cut" in caplog.text
    torch.testing.assert_close(tight.learnt, usual.learnt, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_four_bits(kind: Any, folder: str) -> None:
    ours, algorithm = train(kind, folder, adapter=True, accelerator="gpu", plugins=[QLoRAPrecision()])
    assert all(torch.isfinite(torch.tensor(ours.all))) and any(quantized.layers(algorithm.policy.model))
    if kind is SFT:
        assert ours.all[-1] < ours.all[0]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_command(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`leyden fit` on the embedded model, from file to export."""
    from leyden.__main__ import main

    monkeypatch.chdir(tmp_path)
    names = {RewardModel: "reward_model", RejectionSampling: "rejection_sampling", OnlineDPO: "online_dpo"}
    name = names.get(kind, kind.__name__.lower())
    rows = {SFT: "instruction", RewardModel: "preference", DPO: "preference", KTO: "unpaired", BCO: "unpaired"}
    rows = rows.get(kind, "prompts")
    main(["data", "sample", "--kind", rows, "--rows", "40", "--output", "rows.jsonl"])
    (tmp_path / "tell.py").write_text("def length(samples):\n    return [len(s.response) for s in samples]\n")
    reward = ["--model.reward", "Function", "--model.reward.path", "tell.length"]
    more = [*reward, "--model.sampling.max_new_tokens", "16"] if kind in SAMPLING else []
    more += ["--model.teacher.path", "tiny"] if kind is Distillation else []
    main(
        [
            "fit",
            "--config",
            name,
            "--data.path",
            "rows.jsonl",
            "--model.policy.path",
            "tiny",
            *more,
            "--trainer.max_steps",
            "2",
            "--trainer.precision",
            "bf16-mixed",
            "--trainer.default_root_dir",
            "run",
        ]
    )
    assert (tmp_path / "run/export/model.safetensors").is_file()
