"""FlexAttention over a forest, forward only: there is no backward on CPUs."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from leyden.batch.forest import Batch, Tree, pack
from leyden.models.attention import flex
from leyden.models.attention.dispatch import forest_attention
from leyden.models.attention.forest import Forest

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


def forest_of(tokens: int, longest: int, seed: int = 0, length: int | None = None) -> Batch:
    """Trees of one to three responses, until there are so many tokens."""
    r = random.Random(seed)

    def ids() -> list[int]:
        return [0] * r.randint(1, longest)

    trees: list[Tree] = []
    while sum(map(len, trees)) < tokens:
        trees.append(Tree(ids(), [ids() for _ in range(r.randint(1, 3))]))
    return pack(trees, length=length)


def attended(batch: Batch, backend: str, heads: int, **asked: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, len(batch), 16, generator=g)
    key, value = torch.randn(2, 1, heads, len(batch), 16, generator=g).unbind(0)
    with torch.no_grad():
        out, _ = forest_attention(torch.nn.Module(), query, key, value, None, forest=Forest(batch, backend), **asked)
    return out[0, : batch.size]


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("asked", [{}, {"sliding_window": 7}, {"softcap": 1.5}, {"scaling": 0.5}])
def test_equals_dense(heads: int, asked: dict[str, Any]) -> None:
    batch = forest_of(150, 20, length=230)
    ours, reference = (attended(batch, backend, heads, **asked) for backend in ("flex", "dense"))
    assert ours.shape == (batch.size, 4, 16) and (ours - reference).abs().max() < 1e-5


def test_a_wrong_end_is_seen() -> None:
    batch = forest_of(150, 20)
    reference = attended(batch, "dense", 4)
    batch.end[batch.end == batch.end[0]] += 1  # the first tree's last branch now reaches into the next tree
    assert (attended(batch, "flex", 4) - reference).abs().max() > 1e-3


@pytest.mark.parametrize("window", [None, 5, 150, 400])
@pytest.mark.parametrize("longest", [3, 40, 200, 700])
def test_blocks_hold_what_the_mask_holds(longest: int, window: int | None) -> None:
    """A block that is left out must be empty, and one called full must be full; without a window, exactly those."""
    batch = forest_of(1500, longest, length=3000 if longest == 700 else None)
    batch = forest_of(1500, longest, length=(len(batch) + 127) // 128 * 128)
    forest = Forest(batch, "flex")
    made = flex.block_mask(batch.end.int(), batch.position.int(), window)
    blocks = forest.mask(window).view(len(batch) // 128, 128, -1, 128).transpose(1, 2)
    some, full = blocks.flatten(2).any(2), blocks.flatten(2).all(2)
    visited, called_full = torch.zeros_like(some), torch.zeros_like(full)
    for q in range(len(some)):
        called_full[q, made.full_kv_indices[0, 0, q, : made.full_kv_num_blocks[0, 0, q]].long()] = True
        visited[q, made.kv_indices[0, 0, q, : made.kv_num_blocks[0, 0, q]].long()] = True
    assert not (visited & called_full).any()
    visited |= called_full
    assert not (some & ~visited).any() and not (called_full & ~full).any()
    if window is None:
        assert torch.equal(visited, some) and torch.equal(called_full, full)
    assert visited.sum() < 0.7 * visited.numel()
    index = torch.arange(len(batch))
    assert torch.equal(made.mask_mod(None, None, index[:, None], index), forest.mask(window))


def test_rows_are_padded_to_a_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "DYNAMIC", False)
    assert [flex.padded(n) for n in (1, 1024, 1025, 5000, 8192)] == [1024, 1024, 2048, 8192, 8192]


def test_another_batch_of_the_same_length_is_not_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    run = torch.compile(flex_attention, backend=backend, dynamic=False, fullgraph=True)
    monkeypatch.setattr(flex, "flex_attention", run)
    reference = [attended(forest_of(150, 20, seed), "dense", 2, sliding_window=w) for seed in range(3) for w in (5, 9)]
    ours = [attended(forest_of(150, 20, seed), "flex", 2, sliding_window=w) for seed in range(3) for w in (5, 9)]
    assert len(graphs) == 1
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(ours, reference, strict=True))
