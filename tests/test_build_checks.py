"""What building proves of a model: what cannot be packed runs by rows, and what is no causal LM is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import tiny_config
from peft import LoraConfig
from small import LLAMA, small
from test_architectures import built, checked
from transformers import AutoModelForCausalLM

from leyden.batch.forest import Tree, pack
from leyden.errors import UserError
from leyden.models.attention.dispatch import FOREST
from leyden.models.attention.forest import Forest
from leyden.models.attention.kv_cache import Cache, Layer
from leyden.models.backbone import Backbone
from leyden.models.build_checks import cautions, check_rows, short_windows, takes_forest
from leyden.models.load import add_adapter


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("diffllama", "forest"),  # one module attends twice in a forward pass
        ("qwen2_moe", "forest"),  # only its mask knows the window
        ("gemma3_text", "forest"),
        ("deepseek_v3", "forest"),  # keys and values differ in width
        ("lfm2", "rows"),  # short convolutions
        ("llama4_text", "rows"),  # chunks instead of windows
        ("gpt_oss", "rows"),  # sinks
        ("bloom", "rows"),  # a bias of positions
        ("opt", "forest"),  # learned positions with an offset
    ],
)
def test_packed_sampled_and_plain_are_the_same(kind: str, attention: str) -> None:
    assert checked(built(kind)) == attention


def test_a_leak_however_small_is_seen() -> None:
    """Short convolutions with the initialisation that training starts from hardly mix tokens: 2e-4 and less."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("lfm2")).eval()
    backbone = Backbone(model, "lfm2", torch.float32, "auto", model.config._attn_implementation)
    for scale in (1.0, 1e-3):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "conv.out_proj" in name:
                    weight.mul_(scale)
        model.set_attn_implementation(FOREST)
        assert not takes_forest(backbone, 1e-3)


def test_a_cache_that_forgets_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Cache.layer

    def overwritten(self: Cache, call: int, key: torch.Tensor, value: torch.Tensor) -> Layer:
        return layer(self, 0, key, value)

    monkeypatch.setattr(Cache, "layer", overwritten)
    assert small().attention == "rows"


def test_probes_leave_windows_as_they_were() -> None:
    options = LLAMA | dict(sliding_window=30)
    policy = small("mistral", "MistralConfig", options)
    with short_windows(policy.backbone):
        assert policy.model.config.sliding_window == 3
    assert policy.model.config.sliding_window == 30


def test_a_window_that_is_not_kept_is_seen_however_long_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Forest.mask
    policy = small("mistral", "MistralConfig", LLAMA | dict(sliding_window=4096))
    assert policy.attention == "auto"
    monkeypatch.setattr(Forest, "mask", lambda self, window: whole(self, None))
    policy.attention = "dense"
    assert not takes_forest(policy.backbone, 1e-4)


def test_a_model_that_looks_ahead_is_refused() -> None:
    config = tiny_config("bert")
    config.is_decoder = False
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match="BertLMHeadModel is not causal here: its tokens see later ones"):
        check_rows(Backbone(model, "bert", torch.float32, "rows", model.config._attn_implementation), 1e-4)


ROPE = dict(rope_theta=1e4, factor=4.0)
LONGROPE = ROPE | dict(rope_type="longrope", original_max_position_embeddings=16)
LONGROPE |= dict(short_factor=[1.0] * 4, long_factor=[3.0] * 4)


@pytest.mark.parametrize(
    ("configuration", "rope", "limit"),
    [("Phi3Config", LONGROPE, 16), ("LlamaConfig", ROPE | dict(rope_type="dynamic"), 64)],
)
def test_no_row_changes_beside_a_longer_one(configuration: str, rope: dict[str, Any], limit: int) -> None:
    """Rotary frequencies that depend on the longest position are used no further than where they begin to."""
    options = LLAMA | dict(pad_token_id=0, rope_parameters=rope)
    if configuration == "Phi3Config":  # its own field holds before that of the rotary embedding
        options["original_max_position_embeddings"] = limit
    policy = small("model", configuration, options)
    assert policy.backbone.positions == limit
    short, long = Tree([5, 6], [[7, 8, 9]]), Tree([*range(1, limit - 4)], [[7] * 5])
    longer = Tree([1, *long.prompt], long.responses)
    alone, beside, beyond = (policy(pack([short, *more])).logp[: len(short)] for more in ([], [long], [longer]))
    torch.testing.assert_close(alone, beside)
    assert len(long) == limit and (alone - beyond).abs().max() > 1e-4  # one token more, and it moves
    said = [line for line in cautions(policy.backbone) if f"no row may be longer than {limit} tokens" in line]
    assert len(said) == (configuration == "Phi3Config")  # elsewhere it is the model's own limit


def test_that_no_router_is_balanced_is_said_where_it_is_trained() -> None:
    policy = built("qwen3_moe")
    assert "trained without the auxiliary loss" in cautions(policy.backbone)[0]
    policy.model = add_adapter(policy.model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert not cautions(policy.backbone) and not cautions(small().backbone)
