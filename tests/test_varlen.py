"""What the variable-length kernel is given, against a slow kernel written here; the real one needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from leyden.batch.forest import Tree, pack
from leyden.models.attention import varlen
from leyden.models.attention.dispatch import forest_attention, server
from leyden.models.attention.forest import Forest

TREES = [
    Tree([1] * 7, [[2] * 4, [3] * 9]),
    Tree([1] * 5, [[2] * 6]),
    Tree([1], [[2] * 3, [3], [4] * 8]),
    Tree([], [[5] * 6]),
    Tree([1] * 3, []),
]


FULL = ("scale", "window_size", "enable_gqa")
"""Options of the newest kernel"""


def slow(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    most_queries: int,
    most_keys: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] | None = None,
    enable_gqa: bool = False,
    is_causal: bool = False,
) -> Tensor:
    """Causal attention sequence by sequence, the last query beside the last key, as the flash kernel documents it."""
    assert is_causal == (window_size is None) and (window_size is None or window_size[1] == 0)
    assert queries.dtype == keys.dtype == torch.int32
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert int(queries.diff().max()) == most_queries and int(keys.diff().max()) == most_keys
    assert queries[-1] == len(query) and keys[-1] == len(key) == len(value)
    window = -1 if window_size is None else window_size[0]
    repeat, out = query.shape[1] // key.shape[1], []
    for a, b, c, d in zip(queries[:-1], queries[1:], keys[:-1], keys[1:], strict=True):
        q, k, v = query[a:b], key[c:d].repeat_interleave(repeat, 1), value[c:d].repeat_interleave(repeat, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        ago = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = (ago >= 0) & (ago <= (window if window >= 0 else len(k)))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v))
    return torch.cat(out)


@pytest.fixture(params=[FULL, ("scale", "window_size"), ("is_causal",)], ids=len)
def abilities(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """A kernel with these options, as versions of torch have them."""
    monkeypatch.setattr(varlen, "varlen_attn", slow)
    monkeypatch.setattr(varlen, "ABILITIES", frozenset(request.param))
    monkeypatch.setattr(varlen.Varlen, "window", "window_size" in request.param)
    server.cache_clear()  # it has seen what the real kernel can do
    yield request.param
    server.cache_clear()


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("asked", [{}, {"sliding_window": 4}, {"scaling": 0.5}])
@pytest.mark.parametrize("length", [None, 70])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [1, 3]])
def test_equals_dense_with_gradients(
    abilities: tuple[str, ...], heads: int, asked: dict[str, Any], length: int | None, chosen: list[int]
) -> None:
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
