"""What the variable-length kernel is given, against a slow kernel written here; the real one needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from leyden.batch.forest import Tree, pack
from leyden.models.attention import varlen
from leyden.models.attention.dispatch import forest_attention
from leyden.models.attention.forest import Forest

TREES = [
    Tree([1] * 7, [[2] * 4, [3] * 9]),
    Tree([1] * 5, [[2] * 6]),
    Tree([1], [[2] * 3, [3], [4] * 8]),
    Tree([], [[5] * 6]),
    Tree([1] * 3, []),
]


def slow(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """Causal attention sequence by sequence, the last query beside the last key, as the flash kernel documents it."""
    assert queries.dtype == keys.dtype == torch.int32 and window_size[1] == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert int(queries.diff().max()) == most_queries and int(keys.diff().max()) == most_keys
    assert queries[-1] == len(query) and keys[-1] == len(key) == len(value)
    repeat, out = query.shape[1] // key.shape[1], []
    for a, b, c, d in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        q, k, v = query[a:b], key[c:d].repeat_interleave(repeat, 1), value[c:d].repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        ago = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (ago >= 0) & (ago <= (window_size[0] if window_size[0] >= 0 else len(k)))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.cat(out)


@pytest.fixture(autouse=True)
def _slow_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", slow)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("asked", [{}, {"sliding_window": 4}, {"scaling": 0.5}])
@pytest.mark.parametrize("length", [None, 70])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [1, 3]])
def test_equals_dense_with_gradients(heads: int, asked: dict[str, Any], length: int | None, chosen: list[int]) -> None:
    batch = pack([TREES[i] for i in chosen], length=length)
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, n, len(batch), 8, generator=g, requires_grad=True) for n in (4, heads, heads)]
    mix, results = torch.randn(batch.size, 4, 8, generator=g), []
    for backend in ("varlen", "dense"):
        out, _ = forest_attention(torch.nn.Module(), *inputs, None, forest=Forest(batch, backend), **asked)
        out = out[0, : batch.size]
        results.append([out, *torch.autograd.grad((out * mix).sum(), inputs)])
    for ours, reference in zip(*results, strict=True):
        assert (ours - reference).abs().max() < 2e-6 * reference.abs().max()


def test_keys_are_gathered_only_where_a_prompt_is_shared() -> None:
    assert varlen.layout(Forest(pack([TREES[1], TREES[3]]), "varlen")).source is None
    made = varlen.layout(Forest(pack(TREES[:2]), "varlen"))
    assert made.queries.tolist() == [0, 7, 11, 20, 31] and made.keys.tolist() == [0, 7, 18, 34, 45]
    prompt, first, second, alone = range(7), range(7, 11), range(11, 20), range(20, 31)
    assert made.source is not None
    assert made.source.tolist() == [*prompt, *prompt, *first, *prompt, *second, *alone]


def test_copies_of_a_key_add_up_in_fp32() -> None:
    """256 + 1 is 256 in bf16, so adding one copy after the other would lose all but the first."""
    x = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    copies = varlen._Gather.apply(x, torch.zeros(65, dtype=torch.long))
    grad = torch.ones_like(copies)
    grad[0] = 256
    copies.backward(grad)
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and x.grad.item() == 320
