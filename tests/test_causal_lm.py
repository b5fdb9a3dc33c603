"""Building, saving and refusing: the policy around a real folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig
from small import LLAMA, small, some_trees
from transformers import AutoModelForCausalLM, AutoTokenizer

from leyden.batch.forest import Batch, Tree, pack
from leyden.errors import UserError
from leyden.models import CausalLM
from leyden.models.backbone import base_of
from leyden.models.compiled import compile_blocks
from leyden.paths import resolve
from leyden.policy import Sampling


def batch_of(policy: CausalLM) -> Batch:
    ids = policy.tokenizer("한국의 수도는 서울입니다.").input_ids
    return pack([Tree(ids[:3], [ids[3:], ids[2:5]])])


def folder_of(tmp_path: Path, configuration: str, options: dict[str, Any], model: str | None = None) -> str:
    """A folder with random weights and the embedded tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"))
    torch.manual_seed(0)
    config = getattr(transformers, configuration)(**options)
    made = getattr(transformers, model)(config) if model else AutoModelForCausalLM.from_config(config)
    made.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_construction_is_cheap_and_building_happens_once() -> None:
    policy = CausalLM("no/such-model")
    assert policy.model is None and not list(policy.parameters())
    policy = CausalLM()
    policy.build()
    model = policy.model
    policy.build()
    assert policy.model is model and all(module.training for module in policy.modules())


def test_full_weights_and_adapter_differ_in_what_is_trained() -> None:
    full, lora = CausalLM(), CausalLM(adapter=LoraConfig(r=4, target_modules="all-linear"))
    full.build()
    lora.build()
    assert all(p.requires_grad for p in full.parameters())
    assert all(("lora_" in name) == p.requires_grad for name, p in lora.named_parameters())
    batch = batch_of(full)
    assert (full(batch).logp - lora(batch).logp).abs().max() < 1e-6  # a fresh adapter changes nothing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_fp32_and_the_base_is_what_was_asked(dtype: Any) -> None:
    policy = CausalLM(dtype=dtype, adapter=LoraConfig(r=4, target_modules=["q_proj"]))
    policy.build()
    kinds = {("lora_" in name, p.dtype) for name, p in policy.named_parameters()}
    assert kinds == {(True, torch.float32), (False, getattr(torch, dtype))}
    policy(batch_of(policy)).logp.sum().backward()
    assert policy(batch_of(policy)).logp.dtype == torch.float32


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=4, target_modules="all-linear")])
def test_gradient_checkpointing_is_really_on_and_changes_nothing(adapter: LoraConfig | None) -> None:
    calls, grads = [], []
    for on in (False, True):
        torch.manual_seed(0)
        policy = CausalLM(adapter=adapter, gradient_checkpointing=on)
        policy.build()
        layer = base_of(policy.model).get_decoder().layers[0]
        count = [0]
        layer.mlp.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        policy(batch_of(policy)).logp.sum().backward()
        calls.append(count[0])
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert calls == [1, 2]
    assert (grads[0] - grads[1]).norm() <= 1e-6 * grads[0].norm()


def test_a_saved_model_loads_in_plain_transformers(tmp_path: Path) -> None:
    policy = CausalLM()
    policy.build()
    with torch.no_grad():
        base_of(policy.model).get_decoder().layers[0].mlp.down_proj.weight.mul_(1.5)
    policy.save(tmp_path)
    batch = batch_of(policy)
    plain, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == policy.tokenizer.chat_template
    ids = batch.tokens[torch.arange(len(batch)) < int(batch.last[0]) + 1]
    logp = plain(ids[None]).logits[0].log_softmax(-1)
    cut = int((batch.branch >= 0).nonzero()[0])
    expected = logp[cut - 1 : -1].gather(-1, ids[cut:, None])[:, 0]
    assert (policy(batch).logp[cut : len(ids)] - expected).abs().max() < 1e-5


def test_a_saved_adapter_loads_in_plain_peft_and_is_trained_on(tmp_path: Path) -> None:
    policy = CausalLM(adapter=LoraConfig(r=4, target_modules="all-linear"))
    policy.build()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    policy.save(tmp_path)
    batch = batch_of(policy)
    origin = json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    base = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = batch.tokens[: int(batch.last[0]) + 1]
    again = CausalLM(str(tmp_path))
    again.build()
    assert (again(batch).logp - policy(batch).logp).abs().max() < 1e-6
    assert all(("lora_" in name) == p.requires_grad for name, p in again.named_parameters())
    logp = plain(ids[None]).logits[0].log_softmax(-1)
    cut = int((batch.branch >= 0).nonzero()[0])
    expected = logp[cut - 1 : -1].gather(-1, ids[cut:, None])[:, 0]
    assert (policy(batch).logp[cut : len(ids)] - expected).abs().max() < 1e-5
    asked = CausalLM(str(tmp_path), adapter=LoraConfig())
    asked.build()  # goes on with the adapter that there is
    assert (asked(batch).logp - policy(batch).logp).abs().max() < 1e-6 and asked.reference().kind == "snapshot"
    with pytest.raises(UserError, match="an adapter already, of LoraConfig, and IA3Config is asked for"):
        CausalLM(str(tmp_path), adapter=IA3Config()).build()


GEMMA3 = LLAMA | dict(
    vocab_size=4096, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
)


@pytest.mark.parametrize("adapter", [None, LoraConfig(r=2, target_modules="all-linear")])
def test_a_multimodal_gemma3_folder_trains_its_text_model(tmp_path: Path, adapter: LoraConfig | None) -> None:
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14)
    options = dict(text_config=GEMMA3, vision_config=vision, mm_tokens_per_image=4, image_token_index=9)
    path = folder_of(tmp_path, "Gemma3Config", options, "Gemma3ForConditionalGeneration")
    policy = CausalLM(path, adapter=adapter)
    policy.build()
    assert type(base_of(policy.model)).__name__ == "Gemma3ForConditionalGeneration"
    assert policy.backbone.backend(torch.device("cpu")) == "segments"
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and not any("vision" in name or "projector" in name for name in trained)
    policy(batch_of(policy)).logp.sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)
    (response,) = policy.generate([[5, 6, 7]], 1)[0]
    assert response.tokens
    policy.save(tmp_path / "out")
    CausalLM(str(tmp_path / "out")).build()


def test_a_head_that_is_not_understood_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small()
    forward = type(policy.model).forward

    def odd(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * 1.1
        return out

    monkeypatch.setattr(type(policy.model), "forward", odd)
    policy.model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="are not its head on its hidden states"):
        policy._choose_attention()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(path="./nowhere/model"), "no such model folder"),
        (dict(path="some-model-that-is-not-there"), "cannot be loaded"),
        (dict(adapter=LoraConfig(target_modules=["q_prj"])), r"match nothing .* did you mean 'q_proj'\?"),
        (dict(adapter=PromptTuningConfig(num_virtual_tokens=2)), "virtual tokens"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        CausalLM(**options).build()
    assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path: Path) -> None:
    path = folder_of(tmp_path, "LlamaConfig", LLAMA)  # 97 embeddings
    with pytest.raises(UserError, match="knows 4096 tokens but the model only 97"):
        CausalLM(path).build()


def test_attention_that_a_model_cannot_take_is_refused(tmp_path: Path) -> None:
    options = dict(vocab_size=4096, hidden_size=16, num_hidden_layers=1, state_size=4)
    path = folder_of(tmp_path, "MambaConfig", options)
    with pytest.raises(UserError, match="use --model.policy.attention rows"):
        CausalLM(path, attention="segments").build()
    policy = CausalLM(path, attention="rows")
    policy.build()
    assert policy(batch_of(policy)).logp.abs().sum() > 0


def test_added_tokens_that_text_never_uses_may_lie_beyond_the_embeddings() -> None:
    policy = CausalLM()
    policy.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    policy.build()
    assert len(policy.tokenizer) == base_of(policy.model).get_input_embeddings().num_embeddings + 1


def test_exports_stop_where_generation_here_stops(tmp_path: Path) -> None:
    """Also where the model's own generation config knows nothing of the template's turn end."""
    for adapter in (None, LoraConfig(r=2, target_modules=["q_proj"])):
        policy = CausalLM(adapter=adapter)
        policy.build()
        stop = sorted(policy.stop)
        base_of(policy.model).generation_config.eos_token_id = 0
        policy.save(tmp_path / str(adapter is None))
        saved = json.loads((tmp_path / str(adapter is None) / "generation_config.json").read_text(encoding="utf-8"))
        assert saved["eos_token_id"] == stop and len(stop) == 2


def test_prompts_beyond_the_positions_are_refused_and_answers_end_there() -> None:
    policy = small()
    (response,) = policy.generate([[5] * 60], 1)[0]
    assert len(response.tokens) <= 4
    with pytest.raises(UserError, match="a prompt has 64 tokens but llama has positions for 64"):
        policy.generate([[5] * 64])


def test_an_adapter_s_own_mistakes_are_passed_on() -> None:
    with pytest.raises(UserError, match="LoraConfig: .*r"):
        CausalLM(adapter=LoraConfig(r=-1, target_modules=["q_proj"])).build()


def test_compiled_and_checkpointed_layers_are_refused() -> None:
    with pytest.raises(UserError, match="compile does nothing under --model.policy.gradient_checkpointing"):
        CausalLM(compile=True, gradient_checkpointing=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # compilers warn of much
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_layers_equal_plain_ones(dtype: str) -> None:
    """Values and gradients, for rows of other lengths without a new compilation, and what is sampled."""
    from torch._dynamo.utils import counters

    kind = getattr(torch, dtype)
    plain, compiled = (small(dtype=dtype) for _ in range(2))
    for policy in (plain, compiled):
        policy.model.to(kind)
    compile_blocks(compiled.backbone.blocks())
    graphs = []
    for count in (4, 7, 9):
        batch = pack(some_trees(count, seed=count, responses=2))
        logps = [policy(batch).logp for policy in (plain, compiled)]
        grads = [
            torch.autograd.grad(x.sum(), list(p.parameters())) for x, p in zip(logps, (plain, compiled), strict=True)
        ]
        near = 1e-5 if kind == torch.float32 else 0
        assert (logps[0] - logps[1]).abs().max() <= near
        a, b = (torch.cat([g.float().flatten() for g in one]) for one in grads)
        assert (a - b).norm() / a.norm() < (1e-5 if kind == torch.float32 else 2e-2)
        with torch.no_grad():
            assert torch.equal(compiled(batch).logp, logps[1])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2] > 0
    answers = [policy.generate([[1, 2, 3], [4] * 7], 2, Sampling(max_new_tokens=5)) for policy in (plain, compiled)]
    assert [[r.tokens for r in g] for g in answers[0]] == [[r.tokens for r in g] for g in answers[1]]
