"""Reward models against TRL's trainer: the same batch and weights give the same loss and the same gradient."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from small import LLAMA, TreeData, fit

from leyden.algos import RewardModel
from leyden.batch.forest import Tree
from leyden.models import CausalLM

pytest.importorskip("trl", reason="compares with TRL: pip install 'leyden[bench]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # its libraries warn of much

Found = tuple[float, dict[str, torch.Tensor]]
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Bradley-Terry": ({}, {}),
    "margin": ({"margin": 0.7}, {}),
    "centring": ({"centre": 0.05}, {"center_rewards_coefficient": 0.05}),
    "one ranking of two": ({"ranking": "plackett_luce"}, {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as it is exported, with the embedded tokenizer: both sides start from it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("model")
    tokenizer = CausalLM("tiny").tokenizer
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(LLAMA | {"vocab_size": len(tokenizer)})))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path / "start")
    tokenizer.save_pretrained(path / "start")
    policy = CausalLM(str(path / "start"))
    policy.build(("score",), dropout=False)
    policy.save(path / "reward")
    return path / "reward"


@pytest.fixture(scope="module")
def trees() -> list[Tree]:
    r = random.Random(0)

    def ids(longest: int) -> list[int]:
        return [r.randrange(10, 500) for _ in range(r.randint(1, longest))]

    return [Tree(ids(20), [ids(9), ids(9)], [r.random() + 1, r.random()], row=row) for row in range(5)]


def ours(folder: Path, trees: list[Tree], options: dict[str, Any]) -> Found:
    """The loss and the gradient that the optimizer is given in the first step."""
    from lightning.pytorch import Callback

    found: dict[str, torch.Tensor] = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            for name, parameter in module.policy.named_parameters():
                if parameter.grad is not None:
                    found[name.removeprefix("model.").removeprefix("heads.")] = parameter.grad.clone()

    still: Any = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    algorithm = RewardModel(CausalLM(str(folder)), optimizer=still, lr_scheduler=None, **options)
    trainer = fit(algorithm, TreeData(trees, batch_size=len(trees)), callbacks=[Watch()])
    return float(trainer.callback_metrics["train/loss"]), found


def theirs(folder: Path, trees: list[Tree], margin: float, settings: dict[str, Any], output: Path) -> Found:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    rows = [{"chosen_ids": t.prompt + t.responses[0], "rejected_ids": t.prompt + t.responses[1]} for t in trees]
    if margin:
        rows = [r | {"margin": margin * (t.scores[0] - t.scores[1])} for r, t in zip(rows, trees, strict=True)]  # type: ignore[index, dict-item]
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    plain = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": []}
    trainer = RewardTrainer(
        model,
        args=RewardConfig(output_dir=str(output), **(plain | settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*OPTIONS])
def test_loss_and_gradient_equal_those_of_trl(name: str, folder: Path, trees: list[Tree], tmp_path: Path) -> None:
    options, settings = OPTIONS[name]
    loss, gradient = ours(folder, trees, options)
    expected, reference = theirs(folder, trees, options.get("margin", 0.0), settings, tmp_path)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradient.keys() == reference.keys() and "score.weight" in gradient and len(gradient) > 10
    apart = sum(float((gradient[n] - reference[n]).norm() ** 2) for n in gradient) ** 0.5
    assert apart < 1e-5 * sum(float(g.norm() ** 2) for g in reference.values()) ** 0.5
