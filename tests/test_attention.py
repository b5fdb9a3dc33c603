"""Packed forests against separate Hugging Face runs, values and gradients, for every architecture that is listed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from small import small

from leyden.batch.forest import Batch, Tree, pack
from leyden.errors import UserError
from leyden.models import CausalLM
from leyden.models.attention import flex, varlen
from leyden.models.attention.backend import Needs
from leyden.models.attention.dispatch import Forest, choose, forest_attention, server
from leyden.models.attention.segments import segment_mask
from leyden.models.backbone import base_of

COMMON = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
GQA = COMMON | dict(intermediate_size=48, num_key_value_heads=2)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GQA),
    "qwen2": ("Qwen2Config", GQA),
    "qwen3": ("Qwen3Config", GQA | dict(head_dim=8)),
    "mistral": ("MistralConfig", GQA | dict(sliding_window=4)),
    "gemma3": (
        "Gemma3TextConfig",
        GQA | dict(head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    ),
    "gemma2": (
        "Gemma2Config",
        GQA | dict(head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=1.5),
    ),
    "exaone4": (
        "Exaone4Config",
        GQA | dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    ),
    "gpt_neox": ("GPTNeoXConfig", COMMON | dict(intermediate_size=48)),
    "gpt2": ("GPT2Config", dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "phi3": ("Phi3Config", GQA | dict(pad_token_id=0)),
    "cohere": ("CohereConfig", GQA | dict(logit_scale=0.3)),
    "granite": ("GraniteConfig", GQA | dict(logits_scaling=4.0, attention_multiplier=0.2)),
}


def trees() -> list[Tree]:
    g = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(0, 97, (n,), generator=g).tolist()

    weights = [[0.5, 1.0, 0.0, 1.0], [1.0] * 9]
    return [
        Tree(ids(7), [ids(4), ids(9)], weights=weights),
        Tree(ids(5), [ids(6)], row=1),
        Tree(ids(1), [ids(3), ids(1), ids(8)], row=2),
        Tree([], [ids(6)], row=3),
    ]


def separate_logp(policy: CausalLM, batch: Batch) -> torch.Tensor:
    """Each prompt and response alone through the plain Hugging Face model: [T]."""
    out = torch.zeros(len(batch))
    base = base_of(policy.model)
    with policy.backbone.native_attention():
        for n, last in enumerate(batch.last.tolist()):
            path, t = [], last
            while t >= 0:
                path.append(t)
                t = int(batch.parent[t])
            path.reverse()
            logits = base(input_ids=batch.tokens[path][None], use_cache=False).logits[0].float().log_softmax(-1)
            at = [(i, t) for i, t in enumerate(path) if batch.branch[t] == n and i > 0 and batch.weight[t] != 0]
            for i, t in at:
                out = out.index_put((torch.tensor(t),), logits[i - 1, batch.tokens[t]])
    return out


def gradients(policy: CausalLM, logp: torch.Tensor) -> torch.Tensor:
    probe = torch.linspace(-1, 2, len(logp))
    parameters = [p for p in policy.parameters() if p.requires_grad]
    grads = torch.autograd.grad((logp * probe).sum(), parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, grads, strict=True)]
    )


def error(policy: CausalLM, batch: Batch, reference: Batch) -> tuple[float, float]:
    ours, theirs = policy(batch).logp, separate_logp(policy, reference)
    a, b = gradients(policy, ours), gradients(policy, theirs)
    return float((ours - theirs).detach().abs().max()), float((a - b).norm() / b.norm())


@pytest.fixture(scope="module", params=[*ARCHITECTURES])
def policy(request: pytest.FixtureRequest) -> CausalLM:
    configuration, options = ARCHITECTURES[request.param]
    return small(request.param, configuration, options)


def test_packed_equals_separate(policy: CausalLM) -> None:
    assert policy.backbone.backend(torch.device("cpu")) == ("dense" if policy.path == "gemma2" else "segments")
    for batch in (pack(trees()), pack(trees(), length=80), pack(trees()).unshare()):
        logp, gradient = error(policy, batch, batch)
        assert logp < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize("backend", ["dense", "rows"])
def test_backends_agree(policy: CausalLM, backend: str) -> None:
    batch, chosen = pack(trees()), policy.attention
    expected = policy(batch).logp
    policy.attention = backend
    try:
        logp = policy(batch).logp
        assert (logp - expected).abs().max() < 1e-5
        a, b = gradients(policy, logp), gradients(policy, policy(batch).logp)
        assert (a - b).norm() / b.norm() < 1e-5
    finally:
        policy.attention = chosen


def test_a_wrong_position_parent_or_mask_is_seen(policy: CausalLM) -> None:
    right = pack(trees())
    position = right.position.clone()
    position[7:11] += 1  # the first response one step late
    parent = right.parent.clone()
    parent[11] = 10  # the second response predicted from the end of the first
    end = right.end.clone()
    end[7:11] = right.end[11]  # the second response sees the first
    for wrong in ({"position": position}, {"parent": parent}, {"end": end}):
        chosen, policy.attention = policy.attention, "dense"
        try:
            logp, gradient = error(policy, dataclasses.replace(right, **wrong), right)
        finally:
            policy.attention = chosen
        assert logp > 1e-4 or gradient > 1e-4, wrong


def test_a_wrong_segment_is_seen() -> None:
    policy = small("llama", *ARCHITECTURES["llama"])
    batch = pack(trees())
    expected = policy(batch).logp
    batch.spans = None
    batch.end[7:11] = batch.end[11]  # read back from the tensors, the first response now swallows the second
    assert (policy(batch).logp - expected).abs().max() > 1e-3


def test_sliding_window_counts_positions() -> None:
    policy = small("mistral", *ARCHITECTURES["mistral"])
    batch = pack(trees())
    windowed = policy(batch).logp
    for layer in policy.backbone.body.layers:
        layer.self_attn.sliding_window = None
    base_of(policy.model).config.sliding_window = None
    assert (policy(batch).logp - windowed).abs().max() > 1e-3


def test_mamba_goes_through_rows_by_itself(caplog: pytest.LogCaptureFixture) -> None:
    options = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=8)
    policy = small("mamba", "MambaConfig", options)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("leyden")]
    assert policy.attention == "rows" and len(said) == 1 and "MambaForCausalLM" in said[0]
    logp, gradient = error(policy, pack(trees()), pack(trees()))
    assert logp < 1e-5 and gradient < 1e-5


def test_forest_that_does_not_arrive_raises() -> None:
    policy = small("llama", *ARCHITECTURES["llama"])
    with pytest.raises(RuntimeError, match="did not reach"):
        policy.model(input_ids=torch.tensor([[1, 2, 3]]))


def test_masks_are_shared_by_layers() -> None:
    forest = Forest(pack(trees()), "segments")
    assert segment_mask(forest, 4, 7, None) is segment_mask(forest, 4, 7, None)
    assert forest.mask(3) is forest.mask(3) and forest.mask(3) is not forest.mask(None)


def test_auto_takes_what_the_device_and_the_model_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose(cpu, None) == choose(cpu, None, torch.bfloat16) == "segments" and choose(cpu, 30.0) == "dense"
    monkeypatch.setattr(flex, "find_spec", lambda name: None)  # no triton
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # no flash attention
    assert choose(gpu, None, torch.bfloat16) == "segments" and choose(gpu, 30.0, torch.bfloat16) == "dense"
    monkeypatch.setattr(flex, "find_spec", lambda name: name)
    assert choose(gpu, None, torch.bfloat16) == choose(gpu, 30.0, torch.bfloat16) == "flex"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert choose(gpu, None, torch.bfloat16) == "varlen"
    assert choose(gpu, None, torch.float32) == choose(gpu, 30.0, torch.bfloat16) == "flex"
    assert choose(gpu, None, torch.bfloat16, width=8) == "varlen" and choose(gpu, None, width=8) == "segments"
    assert choose(gpu, None, torch.bfloat16, width=60) == "flex" and choose(gpu, 30.0, width=8) == "dense"


def test_a_layer_that_the_back_end_cannot_serve_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    server.cache_clear()  # what it answered without those patches

    def served(name: str, dtype: torch.dtype = torch.bfloat16, **asked: Any) -> str:
        return server(name, Needs(torch.device("cuda"), dtype, **asked)).name

    windows = "varlen" if "window_size" in varlen.ABILITIES else "flex"  # torch 2.10's kernel has none
    assert served("varlen", width=128, value_width=128, window=True) == windows
    assert served("varlen", width=192, value_width=128) == "flex"  # the heads of DeepSeek's attention
    assert served("varlen", torch.float32, width=128) == served("varlen", softcap=True, width=128) == "flex"
    assert served("varlen", dropout=True) == "segments" and served("flex", softcap=True, dropout=True) == "dense"
    server.cache_clear()


@pytest.mark.parametrize(
    ("wanted", "softcap", "reason"),
    [("varlen", None, "NVIDIA"), ("flex", None, "GPUs"), ("segments", 30.0, "soft-capped"), ("varlen", 30.0, "soft")],
)
def test_a_backend_that_cannot_run_here_is_refused(wanted: str, softcap: float | None, reason: str) -> None:
    with pytest.raises(UserError, match=f"attention {wanted}.*{reason}.*--model.policy.attention auto"):
        choose(torch.device("cpu"), softcap, torch.bfloat16, wanted)


def test_backends_without_dropout_leave_it_to_one_that_has_it() -> None:
    x = torch.ones(1, 2, 40, 4)  # without dropout every output is 1
    for backend in ("varlen", "flex"):
        forest = Forest(pack([Tree([1] * 10, [[2] * 30])]), backend)
        out, _ = forest_attention(torch.nn.Module(), x, x, x, None, dropout=0.5, forest=forest)
        assert out.std() > 0.01
