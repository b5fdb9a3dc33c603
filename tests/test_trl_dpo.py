"""DPO against TRL's trainer: the same batch and weights give the same loss and the same gradient."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from small import LLAMA, TreeData, fit

from leyden.algos import DPO
from leyden.batch.forest import Tree
from leyden.models import CausalLM
from leyden.objectives import IPO, Hinge, Objective, Robust, Sigmoid

pytest.importorskip("trl", reason="compares with TRL: pip install 'leyden[bench]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # its libraries warn of much

Found = tuple[float, dict[str, torch.Tensor]]
OBJECTIVES: dict[str, tuple[Objective, dict[str, Any]]] = {
    "sigmoid": (Sigmoid(beta=0.3), {"loss_type": ["sigmoid"], "beta": 0.3}),
    "robust": (Robust(beta=0.3), {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.1}),
    "hinge": (Hinge(beta=0.3), {"loss_type": ["hinge"], "beta": 0.3}),
    "ipo, averaged over tokens as TRL does": (IPO(beta=0.3, per_token=True), {"loss_type": ["ipo"], "beta": 0.3}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy and a reference that differs from it, with the embedded tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, paths = CausalLM("tiny").tokenizer, []
    for seed in range(2):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**(LLAMA | {"vocab_size": len(tokenizer)})))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        paths.append(tmp_path_factory.mktemp("model"))
        model.save_pretrained(paths[-1])
        tokenizer.save_pretrained(paths[-1])
    return paths[0], paths[1]


@pytest.fixture(scope="module")
def trees() -> list[Tree]:
    r = random.Random(0)

    def ids(longest: int) -> list[int]:
        return [r.randrange(10, 500) for _ in range(r.randint(1, longest))]

    return [Tree(ids(20), [ids(9), ids(9)], row=row) for row in range(5)]


def ours(folders: tuple[Path, Path], trees: list[Tree], objective: Objective) -> Found:
    """The loss and the gradient that the optimizer is given in the first step."""
    from lightning.pytorch import Callback

    found: dict[str, torch.Tensor] = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            found.update({n: p.grad.clone() for n, p in module.policy.model.named_parameters() if p.grad is not None})

    policy, other = (CausalLM(str(folder)) for folder in folders)
    still: Any = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    algorithm = DPO(policy, reference_policy=other, objective=objective, optimizer=still, lr_scheduler=None)
    trainer = fit(algorithm, TreeData(trees, batch_size=len(trees)), callbacks=[Watch()])
    return float(trainer.callback_metrics["train/loss"]), found


def theirs(folders: tuple[Path, Path], trees: list[Tree], settings: dict[str, Any], output: Path) -> Found:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Given(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # token ids already

    rows = [{"prompt_ids": t.prompt, "chosen_ids": t.responses[0], "rejected_ids": t.responses[1]} for t in trees]
    policy, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    plain = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": []}
    trainer = Given(
        policy,
        ref_model=other,
        args=DPOConfig(output_dir=str(output), **(plain | settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folders[0]),
    )
    loss = trainer.compute_loss(policy, trainer.data_collator(rows))
    loss.backward()
    return float(loss), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*OBJECTIVES])
def test_loss_and_gradient_equal_those_of_trl(
    name: str, folders: tuple[Path, Path], trees: list[Tree], tmp_path: Path
) -> None:
    objective, settings = OBJECTIVES[name]
    (loss, gradient), (expected, reference) = (
        ours(folders, trees, objective),
        theirs(folders, trees, settings, tmp_path),
    )
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradient.keys() == reference.keys() and len(gradient) > 10
    apart = sum(float((gradient[n] - reference[n]).norm() ** 2) for n in gradient) ** 0.5
    assert apart < 1e-5 * sum(float(g.norm() ** 2) for g in reference.values()) ** 0.5
