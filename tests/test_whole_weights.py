"""Weights as engines and exports get them: under the names of a folder, whole, the adapter left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_config
from peft import LoraConfig
from safetensors.torch import load_file
from small import small
from transformers import AutoModelForCausalLM

from leyden.models import CausalLM
from leyden.models.engines import published
from leyden.models.quantized import unpacked
from leyden.models.saving.whole_weights import blocks, whole_weights
from leyden.precision import QLoRAPrecision

KINDS = """llama qwen3 gemma2 gemma3_text gpt2 phi3 cohere2 opt bloom
    mixtral qwen2_moe qwen3_moe deepseek_v3 olmoe gpt_oss granitemoe llama4_text jamba gemma3""".split()
"""Dense models, mixtures of experts whose files hold each expert by itself, and one with a vision tower"""


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_values_are_those_of_a_saved_folder(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(kind)).save_pretrained(tmp_path)
    saved = {name: x for file in tmp_path.glob("*.safetensors") for name, x in load_file(file).items()}
    policy = CausalLM(str(tmp_path))
    policy.model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = dict(whole_weights(policy.backbone))
    assert set(found) == set(saved)
    for name, weight in saved.items():
        torch.testing.assert_close(found[name], weight.float(), rtol=0, atol=0)


def test_weights_come_block_by_block() -> None:
    names = [[name for name, _, _ in block] for block in blocks(small().model)]
    assert sorted(map(len, names)) == [3, 9, 9]  # embedding, last norm and head; two blocks
    assert all(len({name.split(".")[2] for name in block}) == 1 for block in names if len(block) > 3)


def test_an_adapter_is_left_out_and_four_bits_are_unpacked() -> None:
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian")
    policy = CausalLM("tiny", adapter=adapter)
    with QLoRAPrecision(compute_dtype="float32").module_init_context():
        policy.build()
    plain = CausalLM("tiny")
    plain.build()
    found, expected = dict(policy.weights()), dict(plain.weights())
    assert set(found) == set(expected)
    assert all(found[name].shape == x.shape and found[name].dtype == torch.float32 for name, x in expected.items())
    layer: Any = policy.backbone.blocks()[0].self_attn.q_proj.base_layer
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[name], unpacked(layer.weight)) and not torch.equal(found[name], expected[name])
    assert torch.equal(found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])


def test_a_tied_head_is_sent_by_itself(tmp_path: Path) -> None:
    """An engine on a processor keeps a copy of a tied head that no reload reaches."""
    policy = CausalLM("tiny")
    policy.build()
    assert "lm_head.weight" not in dict(policy.weights())
    published.publish_model(policy, tmp_path / "v1", writes=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "v1")
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(loaded.lm_head.weight, policy.model.lm_head.weight)
    assert {path.name for path in tmp_path.iterdir()} == {"v1"}


def test_large_models_are_written_to_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = CausalLM("tiny")
    policy.build()
    monkeypatch.setattr(published, "SHARD_BYTES", 3_000_000)
    published.publish_model(policy, tmp_path / "v1", writes=True)
    assert len(list((tmp_path / "v1").glob("model-*-of-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "v1", dtype=torch.float32)
    for (name, a), (_, b) in zip(loaded.named_parameters(), policy.model.named_parameters(), strict=False):
        assert torch.equal(a, b), name
