"""The back-ends for GPUs against the dense mask, forward and backward."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from leyden.batch.forest import Batch, Tree, pack
from leyden.models.attention.backend import Needs
from leyden.models.attention.dispatch import BACKENDS, choose, forest_attention
from leyden.models.attention.forest import Forest

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore"),  # compilers warn of much
]
CASES = [(name, kind) for name in ("flex", "varlen", "segments") for kind in ("float32", "bfloat16", "float16")]
NEAR = {"float32": 1e-3, "bfloat16": 1e-2, "float16": 2e-3}
"""Relative distance from the dense mask in fp32"""
SHAPE = dict(vocab_size=97, hidden_size=128, intermediate_size=64, num_hidden_layers=2, max_position_embeddings=64)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SHAPE | dict(num_attention_heads=2, num_key_value_heads=1)),
    "mistral": ("MistralConfig", SHAPE | dict(num_attention_heads=1, num_key_value_heads=1, sliding_window=4)),
    "gemma2": (
        "Gemma2Config",
        SHAPE | dict(num_attention_heads=2, num_key_value_heads=1, head_dim=64, sliding_window=4)
        | dict(attn_logit_softcapping=2.0, final_logit_softcapping=1.5),
    ),
}  # fmt: skip
"""Heads of 64, of 128 with a window, and of 64 with both a window and a soft cap"""


def some_batch(seed: int, tokens: int = 1500, longest: int = 200) -> Batch:
    r = random.Random(seed)
    trees: list[Tree] = []
    while sum(map(len, trees)) < tokens:
        lengths = [r.randint(1, longest) for _ in range(r.randint(2, 4))]
        trees.append(Tree([0] * lengths[0], [[0] * n for n in lengths[1:]]))
    return pack(trees)


def results(batch: Batch, backend: str, inputs: list[torch.Tensor], **asked: Any) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, _ = forest_attention(torch.nn.Module(), *inputs, None, forest=Forest(batch, backend), **asked)
    mix = torch.linspace(-1, 2, out.numel(), device="cuda").view(out.shape)
    return [out, *torch.autograd.grad((out.float() * mix).sum(), inputs)]


def able(backend: str, dtype: torch.dtype, width: int, asked: dict[str, Any]) -> None:
    """Skip what the back-end says it cannot do, as a run would be told."""
    options = {"softcap": "softcap" in asked, "window": "sliding_window" in asked}
    problem = BACKENDS[backend].lacks(Needs(torch.device("cuda"), dtype, **options, width=width, value_width=width))
    if problem is not None:
        pytest.skip(problem)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize(("heads", "width"), [(9, 64), (3, 64), (1, 128), (9, 128)])
@pytest.mark.parametrize("asked", [{}, {"sliding_window": 50}, {"softcap": 1.5}, {"scaling": 0.2}])
def test_equals_dense_with_gradients(backend: str, dtype: str, heads: int, width: int, asked: dict[str, Any]) -> None:
    kind = getattr(torch, dtype)
    able(backend, kind, width, asked)
    torch.manual_seed(0)
    batch = some_batch(heads).to("cuda")
    inputs = [torch.randn(1, n, len(batch), width, device="cuda") for n in (9, heads, heads)]
    exact = results(batch, "dense", inputs, **asked)
    ours = results(batch, backend, [x.to(kind) for x in inputs], **asked)
    for a, b in zip(ours, exact, strict=True):
        assert a.isfinite().all() and (a.float() - b).norm() / b.norm() < NEAR[dtype]


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("name", [*MODELS])
def test_a_model_gives_the_log_probs_and_gradients_of_separate_rows(backend: str, dtype: str, name: str) -> None:
    from small import small

    policy = small(name, *MODELS[name])
    kind = policy.dtype = getattr(torch, dtype)
    able(backend, kind, 64, {"softcap": 1} if name == "gemma2" else {})
    policy.model.to(device="cuda", dtype=kind)
    r = random.Random(0)
    batch = pack([Tree([r.randrange(97) for _ in range(9)], [[r.randrange(97)] * 5, [3] * 20])]).to("cuda")
    both = []
    for attention in ("rows", backend):
        policy.attention = attention
        logp = policy(batch).logp
        grads = torch.autograd.grad(logp.sum(), [p for p in policy.parameters() if p.requires_grad])
        both.append((logp, torch.cat([g.float().flatten() for g in grads])))
    (rows, slow), (ours, fast) = both
    near = 1e-3 if dtype == "float32" else 5e-2
    assert (ours - rows).norm() / rows.norm() < near and (fast - slow).norm() / slow.norm() < near


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("width", [8, 16, 60, 64, 128, 256, 272])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_auto_takes_one_that_runs(dtype: str, width: int, softcap: float | None) -> None:
    kind = getattr(torch, dtype)
    name = choose(torch.device("cuda"), softcap, kind, width=width)
    batch = some_batch(0, tokens=300, longest=40).to("cuda")
    inputs = [torch.randn(1, n, len(batch), width, device="cuda") for n in (4, 2, 2)]
    exact = results(batch, "dense", inputs, softcap=softcap)
    ours = results(batch, name, [x.to(kind) for x in inputs], softcap=softcap)
    for a, b in zip(ours, exact, strict=True):
        assert (a.float() - b).norm() / b.norm() < NEAR[dtype]
