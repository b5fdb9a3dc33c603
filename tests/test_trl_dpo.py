"""Preference algorithms against TRL's trainers: the same batch and weights give the same loss and the same gradient."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from small import LLAMA, TreeData, fit

from leyden.algos import DPO, KTO
from leyden.batch.forest import Tree
from leyden.batch.tree import BORROWED
from leyden.models import CausalLM
from leyden.objectives import CPO, EXO, IPO, NCA, ORPO, APODown, APOZero, Hinge, Objective, Robust, Sigmoid, SimPO

pytest.importorskip("trl", reason="compares with TRL: pip install 'leyden[bench]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # its libraries warn of much

Found = tuple[float, dict[str, torch.Tensor]]
OBJECTIVES: dict[str, tuple[Objective, dict[str, Any]]] = {
    "sigmoid": (Sigmoid(beta=0.3), {"loss_type": ["sigmoid"], "beta": 0.3}),
    "robust": (Robust(beta=0.3), {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.1}),
    "hinge": (Hinge(beta=0.3), {"loss_type": ["hinge"], "beta": 0.3}),
    "ipo, averaged over tokens as TRL does": (IPO(beta=0.3, per_token=True), {"loss_type": ["ipo"], "beta": 0.3}),
    "apo_zero": (APOZero(beta=0.3), {"loss_type": ["apo_zero"], "beta": 0.3}),
    "apo_down": (APODown(beta=0.3), {"loss_type": ["apo_down"], "beta": 0.3}),
    "nca": (NCA(beta=0.3), {"loss_type": ["nca_pair"], "beta": 0.3}),
    "exo": (EXO(beta=0.3, label_smoothing=0.1), {"loss_type": ["exo_pair"], "beta": 0.3, "label_smoothing": 0.1}),
    "wpo": (Sigmoid(beta=0.3), {"loss_type": ["sigmoid"], "beta": 0.3, "use_weighting": True}),
}
PLAIN = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "report_to": []}


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


def ours(folders: tuple[Path, Path], trees: list[Tree], kind: Any = DPO, point: float = 0.0, **options: Any) -> Found:
    """The loss and the gradient that the optimizer is given in the first step."""
    from lightning.pytorch import Callback

    found: dict[str, torch.Tensor] = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            found.update({n: p.grad.clone() for n, p in module.policy.model.named_parameters() if p.grad is not None})

    policy, other = (CausalLM(str(folder)) for folder in folders)
    still: Any = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    compared = {} if not options.get("objective", Sigmoid()).needs_reference else {"reference_policy": other}
    algorithm = kind(policy, optimizer=still, lr_scheduler=None, **compared, **options)
    algorithm.point = point
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
    trainer = Given(
        policy,
        ref_model=other,
        args=DPOConfig(output_dir=str(output), **(PLAIN | settings)),
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
    found = ours(folders, trees, objective=objective, wpo=name == "wpo")
    same(found, theirs(folders, trees, settings, tmp_path))


def same(found: Found, expected_found: Found) -> None:
    (loss, gradient), (expected, reference) = found, expected_found
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradient.keys() == reference.keys() and len(gradient) > 10
    apart = sum(float((gradient[n] - reference[n]).norm() ** 2) for n in gradient) ** 0.5
    assert apart < 1e-5 * sum(float(g.norm() ** 2) for g in reference.values()) ** 0.5


# -- without a reference ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def even() -> list[Tree]:
    """Better answers of one length after prompts of one token: so TRL's cross-entropies, which are means over all
    tokens of a batch (ORPO's over the prompts' too), are those of single answers."""
    r = random.Random(1)
    ids = lambda n: [r.randrange(10, 500) for _ in range(n)]  # noqa: E731
    return [Tree(ids(1), [ids(6), ids(r.randint(1, 9))], row=row) for row in range(5)]


WITHOUT: dict[str, tuple[Objective, float, str, dict[str, Any]]] = {
    "simpo": (SimPO(2.0, 0.7), 0.0, "cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0}),
    "cpo": (CPO(0.3, 0.1), 0.8, "cpo", {"beta": 0.3, "label_smoothing": 0.1, "cpo_alpha": 0.8}),
    "orpo": (ORPO(0.4), 0.0, "orpo", {"beta": 0.4}),
}


def theirs_without(folder: Path, trees: list[Tree], name: str, settings: dict[str, Any], output: Path) -> Found:
    from importlib import import_module

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = import_module(f"trl.experimental.{name}")
    config, trainer_of = getattr(module, f"{name.upper()}Config"), getattr(module, f"{name.upper()}Trainer")
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = trainer_of(
        policy,
        args=config(output_dir=str(output), **(PLAIN | settings)),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    rows = []
    for tree in trees:
        row: dict[str, list[int]] = {"prompt_input_ids": tree.prompt, "prompt_attention_mask": [1] * len(tree.prompt)}
        for which, response in zip(("chosen", "rejected"), tree.responses, strict=True):
            row[f"{which}_input_ids"] = tree.prompt + response
            row[f"{which}_attention_mask"] = [1] * len(row[f"{which}_input_ids"])
            row[f"{which}_labels"] = [-100] * len(tree.prompt) + response
        rows.append(row)
    policy.eval()
    loss = trainer.compute_loss(policy, trainer.data_collator(rows))
    loss.backward()
    return float(loss), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*WITHOUT])
def test_objectives_without_a_reference_equal_those_of_trl(
    name: str, folders: tuple[Path, Path], even: list[Tree], tmp_path: Path
) -> None:
    objective, weight, trainer, settings = WITHOUT[name]
    found = ours(folders, even, objective=objective, sft_weight=weight)
    same(found, theirs_without(folders[0], even, trainer, settings, tmp_path))


# -- single answers ---------------------------------------------------------------------------------------------------


def theirs_unpaired(folders: tuple[Path, Path], trees: list[Tree], settings: dict[str, Any], output: Path) -> Any:
    """What TRL says, and the KL that it worked out in this very batch."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    class Given(KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset  # token ids already

    rows = [
        {
            "prompt_ids": t.prompt,
            "completion_ids": t.responses[0],
            "KL_completion_ids": t.responses[1],
            "label": bool(t.scores and t.scores[0]),
        }
        for t in trees
    ]
    policy, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    trainer = Given(
        policy,
        ref_model=other,
        args=KTOConfig(output_dir=str(output), **(PLAIN | settings)),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folders[0]),
    )
    loss = trainer.compute_loss(policy, trainer.data_collator(rows))
    loss.backward()
    found = float(loss), {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    return found, float(trainer._metrics["train" if policy.training else "eval"]["kl"][-1])


@pytest.mark.parametrize("good", [2, 4])
def test_kto_equals_that_of_trl(good: int, folders: tuple[Path, Path], trees: list[Tree], tmp_path: Path) -> None:
    """Given the KL of this very batch, which Leyden takes from the step before."""
    for row, tree in enumerate(trees):
        tree.scores = [float(row < good), BORROWED]
    settings, folders = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}, folders[::-1]
    expected, kl = theirs_unpaired(folders, trees, settings, tmp_path)
    same(ours(folders, trees, KTO, 0.3 * kl, **settings), expected)
    assert kl > 0.1, "this way round it is not 0"


def test_the_kl_point_is_that_of_trl(folders: tuple[Path, Path], trees: list[Tree], tmp_path: Path) -> None:
    for row, tree in enumerate(trees):
        tree.scores = [float(row % 2), BORROWED]
    folders = folders[::-1]
    _, kl = theirs_unpaired(folders, trees, {"beta": 0.3}, tmp_path)
    assert kl > 0.1
    policy, other = (CausalLM(str(folder)) for folder in folders)
    still: Any = lambda p: torch.optim.SGD(p, lr=0.0)  # noqa: E731
    algorithm = KTO(policy, reference_policy=other, optimizer=still, lr_scheduler=None, beta=0.3)
    fit(algorithm, TreeData(trees, batch_size=len(trees)))
    assert algorithm.point == pytest.approx(0.3 * kl, rel=1e-5)
