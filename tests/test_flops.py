"""Arithmetic of training, counted by hand."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from small import LLAMA, small
from torch import nn

from leyden.run.callbacks import flops_per_token, peak_flops


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


def test_nobody_says_the_peak_of_a_processor() -> None:
    assert peak_flops(torch.device("cpu")) is None
