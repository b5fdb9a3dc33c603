"""Segment attention against the dense mask, in double precision so that only a wrong formula can differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from leyden.batch.forest import Tree, pack
from leyden.models.attention import segments
from leyden.models.attention.dispatch import forest_attention
from leyden.models.attention.forest import Forest

TREES = [
    Tree([1] * 70, [[2] * 4, [3] * 90, [4] * 40]),
    Tree([1] * 50, [[2] * 60]),
    Tree([1], [[2] * 3, [3], [4] * 80]),
    Tree([], [[5] * 100]),
    Tree([1] * 3, []),
]


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("asked", [{}, {"sliding_window": 2}, {"sliding_window": 37}, {"scaling": 0.5}])
@pytest.mark.parametrize("block", [1, segments.BLOCK])  # blocks of 32 queries, and whole segments
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_values_and_gradients_equal_dense(
    heads: int, asked: dict[str, Any], block: int, dtype: torch.dtype, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "BLOCK", block)
    monkeypatch.setattr(segments, "MASK", 1 if block == 1 else segments.MASK)
    batch = pack(TREES, length=530)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, n, 530, 8, generator=g, dtype=dtype, requires_grad=True) for n in (4, heads, heads)]
    mix, results = torch.randn(batch.size, 4, 8, generator=g, dtype=dtype), []
    for backend in ("segments", "dense"):
        out, _ = forest_attention(torch.nn.Module(), *inputs, None, forest=Forest(batch, backend), **asked)
        out = out[0, : batch.size]
        results.append([out, *torch.autograd.grad((out * mix).sum(), inputs)])
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).norm() < near * reference.norm()


def test_rounds_no_more_than_torch_does() -> None:
    """In bf16, against the exact gradients."""
    batch = pack(TREES)
    g = torch.Generator().manual_seed(0)
    exact = [torch.randn(1, n, len(batch), 8, generator=g, requires_grad=True) for n in (4, 2, 2)]
    low = [x.detach().bfloat16().requires_grad_() for x in exact]
    apart = {}
    out, _ = forest_attention(torch.nn.Module(), *exact, None, forest=Forest(batch, "dense"))
    reference = torch.autograd.grad(out.square().sum(), exact)
    for backend in ("segments", "dense"):
        out, _ = forest_attention(torch.nn.Module(), *low, None, forest=Forest(batch, backend))
        found = torch.autograd.grad(out.float().square().sum(), low)
        apart[backend] = sum(float((a.float() - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True))
    assert 0 < apart["segments"] < 1.2 * apart["dense"]
