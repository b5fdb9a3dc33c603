"""The back-ends for GPUs against the dense mask, forward and backward."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from leyden.batch.forest import Batch, Tree, pack
from leyden.errors import UserError
from leyden.models.attention.dispatch import choose, forest_attention
from leyden.models.attention.forest import Forest

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("ignore"),  # compilers warn of much
]
CASES = [("flex", "float32"), ("flex", "bfloat16"), ("varlen", "bfloat16"), ("varlen", "float16")]


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


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("heads", [3, 9])
@pytest.mark.parametrize("asked", [{}, {"sliding_window": 50}, {"softcap": 1.5}])
def test_equals_dense_with_gradients(backend: str, dtype: str, heads: int, asked: dict[str, Any]) -> None:
    kind = getattr(torch, dtype)
    try:
        choose(torch.device("cuda"), asked.get("softcap"), kind, backend)
    except UserError as problem:
        pytest.skip(str(problem))
    torch.manual_seed(0)
    for seed in range(2):
        batch = some_batch(seed).to("cuda")
        inputs = [torch.randn(1, n, len(batch), 64, device="cuda") for n in (9, heads, heads)]
        exact = results(batch, "dense", inputs, **asked)
        ours = results(batch, backend, [x.to(kind) for x in inputs], **asked)
        for a, b in zip(ours, exact, strict=True):
            assert (a.float() - b).norm() / b.norm() < (1e-3 if kind == torch.float32 else 1e-2)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_a_model_gives_the_log_probs_and_gradients_of_separate_rows(backend: str, dtype: str) -> None:
    from small import small

    policy = small("llama", dtype="float32")
    policy.model.to(device="cuda", dtype=getattr(torch, dtype))
    r = random.Random(0)
    batch = pack([Tree([r.randrange(97) for _ in range(9)], [[r.randrange(97)] * 5, [3] * 20])]).to("cuda")
    found = []
    for attention in ("rows", backend):
        policy.attention = attention
        logp = policy(batch).logp
        grads = torch.autograd.grad(logp.sum(), [p for p in policy.parameters() if p.requires_grad])
        found.append((logp, torch.cat([g.float().flatten() for g in grads])))
    (rows, slow), (ours, fast) = found
    near = 1e-3 if dtype == "float32" else 5e-2
    assert (ours - rows).norm() / rows.norm() < near and (fast - slow).norm() / slow.norm() < near
