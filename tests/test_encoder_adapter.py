"""Adapters on encoders: what they train, and the classifier that is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from encoders import KINDS, PAIRS, RATE, encoder, lora, ragged, save_encoders, sgd
from peft import IA3Config, LoHaConfig, PromptTuningConfig, VeraConfig
from prepared import write
from ranks import Ranks
from small import TreeData, fit, weights_of
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from leyden.algos import RewardModel
from leyden.batch.forest import pack
from leyden.errors import UserError
from leyden.example import Message, Sample
from leyden.models import Classifier, Encoder
from leyden.rewards import score


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_encoders(tmp_path_factory.mktemp("encoders"))


def check_gradients(policy: Encoder, again: Encoder, path: str) -> None:
    """Of the adapter by the chain rule, and of the head, from those of the classifier that both make."""
    found, merged = (one(pack(ragged(path)), {"score"}).score for one in (policy, again))
    assert found is not None and merged is not None
    torch.testing.assert_close(merged, found, atol=1e-5, rtol=1e-5)
    found.sum().backward()
    merged.sum().backward()
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    own, adapters = dict(again.model.named_parameters()), {name for name in trained if ".lora_" in name}
    assert adapters
    for layer in {name.partition(".lora_")[0] for name in adapters}:
        a, b = (trained[f"{layer}.lora_{letter}.default.weight"] for letter in "AB")
        grad = own[f"{layer}.weight"].grad  # of W + 2 B A
        assert grad is not None
        torch.testing.assert_close(a.grad, 2 * b.T @ grad, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(b.grad, 2 * grad @ a.T, atol=1e-4, rtol=1e-3)
    for name in set(trained) - adapters:
        torch.testing.assert_close(trained[name].grad, own[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_trained_beside_a_whole_head(
    kind: str, checkpointing: bool, folders: dict[str, str], tmp_path: Path
) -> None:
    path = folders[f"{kind} plain"]
    policy = encoder(path, adapter=lora(), gradient_checkpointing=checkpointing)
    body, whole = f"{policy.model.base_model_prefix}.", encoder(path)
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    plain = {name for name in trained if ".lora_" not in name}
    assert plain == {n for n, _ in whole.model.named_parameters() if not n.startswith(body) or n in whole._new}
    assert all(name.startswith(body) for name in trained - plain)
    policy.save(tmp_path / "merged")
    again = encoder(str(tmp_path / "merged"))
    assert not again.fresh
    check_gradients(policy, again, path)
    policy.save(tmp_path / "twice")  # saving leaves the policy as it is
    assert torch.equal(weights_of(encoder(str(tmp_path / "twice"))), weights_of(again))


@pytest.mark.parametrize(
    "asked",
    [
        {"modules_to_save": ["classifier"]},
        {"target_modules": ["dense", "out_proj", "query"]},
        {"target_modules": r".*dense|.*out_proj"},
        {"target_modules": "ALL-linear"},
        {"exclude_modules": "nothing"},
        {"exclude_modules": ["key"]},
    ],
    ids=["to_save", "names", "pattern", "all", "excluded_pattern", "excluded_names"],
)
def test_what_is_trained_whole_gets_no_adapter_and_no_copy(
    asked: dict[str, Any], folders: dict[str, str], tmp_path: Path
) -> None:
    for kind in ("bert", "roberta"):
        path = folders[f"{kind} plain"]
        policy = encoder(path, adapter=lora(**asked))
        names = {name for name, _ in policy.model.named_parameters()}
        assert not any("modules_to_save" in name or "original_module" in name for name in names)
        assert not any(".lora_" in name for name in names if "classifier" in name or "pooler" in name)
        policy.save(tmp_path / kind)
        check_gradients(policy, encoder(str(tmp_path / kind)), path)


@pytest.mark.parametrize("adapter", [lora(use_dora=True), lora(use_rslora=True), LoHaConfig(target_modules=["query"])])
def test_other_adapters_are_merged_truly(adapter: Any, folders: dict[str, str], tmp_path: Path) -> None:
    path = folders["bert plain"]
    policy = encoder(path, adapter=adapter)
    torch.manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    policy.save(tmp_path / "merged")
    found, merged = (p(pack(ragged(path)), {"score"}).score for p in (policy, encoder(str(tmp_path / "merged"))))
    assert found is not None and merged is not None
    torch.testing.assert_close(merged, found, atol=1e-5, rtol=1e-5)


def step(path: str, accumulate: int, devices: int = 1) -> Tensor:
    """What one optimizer step over 8 ragged trees adds to adapter and head."""
    policy = encoder(path, adapter=lora(modules_to_save=["classifier"]))
    algorithm = RewardModel(policy, optimizer=sgd, lr_scheduler=None, centre=0.1)
    before = weights_of(policy)
    strategy = "ddp" if devices > 1 else "auto"
    fit(algorithm, TreeData(ragged(path), batch_size=8), accumulate_grad_batches=accumulate, devices=devices,
        strategy=strategy)  # fmt: skip
    return (before - weights_of(policy)) / RATE


def on_one_rank(path: str) -> Tensor:
    return step(path, 2, 2)


def test_any_split_of_a_step_takes_the_same_step(folders: dict[str, str], ranks: Ranks) -> None:
    whole, cut, (first, second) = (
        step(folders["bert"], 1),
        step(folders["bert"], 4),
        ranks(on_one_rank, folders["bert"]),
    )
    assert torch.equal(first, second) and whole.norm() > 1e-3
    assert all((found - whole).norm() < 1e-5 * whole.norm() for found in (cut, first))


def test_an_adapter_from_the_command_line(folders: dict[str, str], leyden: Any, workplace: Path) -> None:
    """Trained, stopped, gone on with, exported from a checkpoint, and read as any classifier."""
    write(workplace / "pairs.jsonl", PAIRS)
    words = "fit --config reward_model --config lora --data.path pairs.jsonl --data.batch_size 8 --data.max_length 60"
    words += f" --model.policy Encoder --model.policy.path {folders['bert plain']} --data.val_fraction 0"
    words += " --trainer.accelerator cpu --model.optimizer.lr 1e-2 --model.lr_scheduler null --seed_everything 3"

    def run(folder: str, *more: str) -> Tensor:
        code, _, err = leyden(*words.split(), "--trainer.default_root_dir", folder, *more)
        assert code == 0, err
        return weights_of(AutoModelForSequenceClassification.from_pretrained(workplace / folder / "export"))

    whole = run("whole", "--trainer.max_steps", "4")
    run("half", "--trainer.max_steps", "2")
    assert torch.equal(run("half", "--trainer.max_steps", "4", "--ckpt_path", "auto"), whole)
    saved = torch.load(next((workplace / "half").rglob("*.ckpt")), weights_only=True)["state_dict"]
    assert all(".lora_" in name or "pooler" in name or "classifier" in name for name in saved)
    code, _, err = leyden("export", "whole", "again", "--checkpoint", "last")
    assert code == 0, err
    assert torch.equal(weights_of(AutoModelForSequenceClassification.from_pretrained("again")), whole)
    code, _, err = leyden("export", "whole", "merged", "--merge")
    assert code != 0 and "a whole encoder, with no adapter to merge; it can be used as it is" in err
    samples = [Sample([Message(role="user", content="3 + 1?")], text) for text in ("yes yes", "no")]
    good, bad = score(Classifier("again"), samples).tolist()
    assert good > bad


def test_adapters_that_an_encoder_cannot_take(folders: dict[str, str], leyden: Any, workplace: Path) -> None:
    path = folders["bert plain"]
    with pytest.raises(UserError, match="adapter on an encoder in bfloat16, .* leave out --model.policy.dtype"):
        encoder(path, adapter=lora(), dtype="bfloat16")
    with pytest.raises(UserError, match="adds virtual tokens"):
        encoder(path, adapter=PromptTuningConfig(num_virtual_tokens=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.tuners.ia3.layer.Linear.merge", Mock(side_effect=RuntimeError("no such merge")))
        with pytest.raises(UserError, match="IA3Config: PEFT cannot merge it .*no such merge.* use LoraConfig"):
            encoder(path, adapter=IA3Config(target_modules=["query"], feedforward_modules=[]))
    with pytest.raises(UserError, match="VeraConfig would adapt .*, which is trained whole; name layers of the body"):
        encoder(path, adapter=VeraConfig(target_modules=["classifier"], r=2))
    (workplace / "adapter").mkdir()
    (workplace / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="adapter: an adapter, and an encoder starts from a whole model"):
        encoder("adapter")
    with pytest.raises(UserError, match="target_modules .* match nothing .* whose linear layers are .*query"):
        encoder(path, adapter=lora(target_modules=["q_proj"]))
    write(workplace / "pairs.jsonl", PAIRS)
    words = "fit --config reward_model --config qlora --data.path pairs.jsonl --model.policy Encoder"
    code, _, err = leyden(*words.split(), "--model.policy.path", path)
    assert code != 0 and "not loaded in four bits; give --config lora for --config qlora" in err
