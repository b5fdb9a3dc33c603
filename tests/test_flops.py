"""Arithmetic of training, counted by hand."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_config
from peft import LoraConfig, get_peft_model
from small import LLAMA, small
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from leyden.run.flops import EXPERTS, experts, flops_per_token, peak_flops


def test_a_weight_costs_two_forward_and_two_for_each_gradient() -> None:
    module = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    assert flops_per_token(module) == 6 * (12 + 6)  # the embedding is only looked up
    module[1].requires_grad_(False)
    assert flops_per_token(module) == 4 * 12 + 6 * 6
    assert flops_per_token(module, has_reference=True) == 6 * 12 + 8 * 6
    assert flops_per_token(module.requires_grad_(False)) == 2 * 18


def test_tied_embeddings_are_a_head_too() -> None:
    tied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    tied[1].weight = tied[0].weight
    assert flops_per_token(tied) == 6 * 40


def test_an_adapter_trains_little_of_what_it_runs_through() -> None:
    model = get_peft_model(small(options=LLAMA).model, LoraConfig(r=2, target_modules="all-linear"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for n, p in model.named_parameters() if not p.requires_grad and "embed_tokens" not in n)
    assert 0 < trained < frozen and flops_per_token(model) == 6 * trained + 4 * frozen


def test_of_experts_those_count_that_a_token_goes_through() -> None:
    """A mixture of 30.5e9 weights, of which 3.0e9 work on a token, counted by hand."""
    layers, width, heads, keys, wide, expert, vocabulary = 48, 2048, 32, 4, 128, 768, 151936
    options = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys)
    options |= dict(head_dim=wide, moe_intermediate_size=expert, num_experts=128, num_experts_per_tok=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**options, vocab_size=vocabulary))
    attention = width * wide * (2 * heads + 2 * keys) + 2 * wide
    layer = attention + 128 * width + 8 * 3 * width * expert + 2 * width
    assert flops_per_token(model) == 6 * (layers * layer + vocabulary * width + width)
    assert 2.9e9 < flops_per_token(model) / 6 < 3.1e9 and sum(p.numel() for p in model.parameters()) > 30e9


@pytest.mark.parametrize("kind", ["mixtral", "granitemoe", "dbrx", "deepseek_v3", "gpt_oss", "llama4_text", "jetmoe"])
def test_experts_of_any_architecture_are_counted(kind: str) -> None:
    """Twice as many experts, of which a token goes through as many, cost only a larger router."""
    cost = []
    for number in (4, 8):
        config = tiny_config(kind)
        part = getattr(config, "ffn_config", config)
        name = next(name for name in EXPERTS if hasattr(part, name))
        setattr(part, name, number)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert experts(config) == (number, experts(config)[1])  # type: ignore[index]
        cost.append((flops_per_token(model), 6 * sum(p.numel() for p in model.parameters())))
    assert cost[1][0] - cost[0][0] < 0.2 * (cost[1][1] - cost[0][1])


def test_nobody_says_the_peak_of_a_processor() -> None:
    assert peak_flops(torch.device("cpu")) is None
