import random
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leyden.batch.forest import Batch, Totals, Tree, pack

# the drawing in the module's docstring: p p p, a a, b b b | q q, c c
DRAWN = [Tree([1, 2, 3], [[4, 5], [6, 7, 8]], [1.0, 0.0], row=7), Tree([9, 10], [[11, 12]], [2.0], row=3)]


def forest(seed: int, trees: int = 4, bare: bool = False) -> list[Tree]:
    r = random.Random(seed)
    out = []
    for i in range(trees):
        responses = [[r.randrange(90) for _ in range(r.randint(1, 6))] for _ in range(r.randint(1, 4))]
        weights = [[r.choice([0.0, 0.5, 1.0]) for _ in x] for x in responses]
        out.append(Tree([r.randrange(90) for _ in range(r.randint(1, 5))], responses, None, weights, row=10 + i))
    if bare:
        out.insert(1, Tree([], [[r.randrange(90) for _ in range(4)]], row=99))
        out.append(Tree([5, 6, 7], []))
    return out


def test_layout_is_the_drawing() -> None:
    b = pack(DRAWN)
    assert b.position.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3]
    assert b.parent.tolist() == [-1, 0, 1, 2, 3, 2, 5, 6, -1, 8, 9, 10]
    assert b.end.tolist() == [8, 8, 8, 5, 5, 8, 8, 8, 12, 12, 12, 12]
    assert b.branch.tolist() == [-1, -1, -1, 0, 0, 1, 1, 1, -1, -1, 2, 2]
    assert b.group.tolist() == [0, 0, 1] and b.row.tolist() == [7, 3] and b.score.tolist() == [1, 0, 2]
    assert b.totals == Totals(7.0, 3, 2) and b.last.tolist() == [4, 7, 11]


def test_mask_is_ancestry() -> None:
    b = pack(forest(1, bare=True), length=80)
    parent = b.parent.tolist()
    for q in range(len(b)):
        ancestors, k = set(), q
        while k >= 0:
            ancestors.add(k)
            k = parent[k]
        assert set(b.mask[q].nonzero()[:, 0].tolist()) == ancestors


def test_padding_counts_nowhere_and_sees_only_itself() -> None:
    trees = forest(2)
    b, padded = pack(trees), pack(trees, length=100)
    assert padded.size == b.size == len(b) and len(padded) == 100 and padded.totals == b.totals
    assert padded.weight[len(b) :].sum() == 0 and (padded.branch[len(b) :] == -1).all()
    padded.spans = None
    assert padded.structure() == b.structure()


def test_structure_is_read_back_from_the_tensors() -> None:
    b = pack(forest(3, bare=True), length=90)
    kept, b.spans = b.spans, None
    assert b.structure() == kept


def test_predicted_tokens_follow_the_weights() -> None:
    """Looked up once, and again where weights were replaced or written to; it moves with the batch."""
    batch = pack([Tree([5, 6], [[7, 8, 9], [4]])])
    assert batch.predicted().tolist() == [2, 3, 4, 5] and batch.predicted() is batch.predicted()
    batch.weight[3] = 0.0
    assert batch.predicted().tolist() == [2, 4, 5]
    batch.weight = torch.zeros_like(batch.weight)
    assert batch.predicted().tolist() == []
    assert replace(batch, weight=torch.ones(6)).predicted().tolist() == [2, 3, 4, 5]
    moved = batch.to("meta")
    assert moved.predicted().device.type == "meta" and moved.predicted().shape == (0,)


def test_roots_are_never_predicted() -> None:
    b = pack([Tree([], [[1, 2, 3]])])
    assert b.parent.tolist() == [-1, 0, 1] and b.weight.tolist() == [0, 1, 1] and b.totals == Totals(2.0, 1, 1)


def test_a_tree_without_responses_counts_nowhere() -> None:
    b = pack([Tree([1, 2], [])])
    assert b.totals == Totals(0.0, 0, 0) and len(b.group) == len(b.row) == 0 and b.size == 2
    assert b.token_mean(torch.ones(2)) == 0 and b.response_mean(torch.ones(0)) == 0


@pytest.mark.parametrize(
    "tree", [Tree([1], [[]]), Tree([], [[1], [2]]), Tree([], []), Tree([1], [[2, 3]], None, [[1.0]])]
)
def test_trees_that_cannot_be_packed(tree: Tree) -> None:
    with pytest.raises(ValueError):
        pack([tree])


def test_sums_and_means() -> None:
    b = pack([Tree([1], [[2, 3], [4]], weights=[[1.0, 0.5], [2.0]])])
    x = torch.tensor([9.0, 1.0, 2.0, 3.0])
    assert b.per_branch(x).tolist() == [2.0, 6.0] and b.per_prompt(b.per_branch(x)).tolist() == [8.0]
    assert float(b.token_mean(x)) == pytest.approx(8.0 / 3.5)
    assert float(b.response_mean(b.per_branch(x))) == 4.0 and float(b.prompt_mean(torch.tensor([8.0]))) == 8.0


def paths(b: Batch) -> list[tuple[list[int], list[float], int]]:
    """Tokens, weights and prompt of each response, read by climbing `parent`."""
    out = []
    for n, last in enumerate(b.last.tolist()):
        at, t = [], last
        while t >= 0:
            at.append(t)
            t = int(b.parent[t])
        at.reverse()
        assert b.position[at].tolist() == list(range(len(at)))
        out.append((b.tokens[at].tolist(), b.weight[at].tolist(), int(b.row[b.group[n]])))
    return out


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_unshare_split_and_rows_hold_the_same_responses(seed: int, parts: int) -> None:
    b = pack(forest(seed, trees=random.Random(seed).randint(1, 5), bare=True))
    expected = paths(b)
    apart = b.unshare()
    assert paths(apart) == expected and apart.totals == b.totals
    assert all(len(span.responses) <= 1 for span in apart.structure())
    pieces = b.split(parts)
    assert [path for piece in pieces for path in paths(piece)] == expected
    assert sum(piece.size for piece in pieces) == b.size and {piece.totals for piece in pieces} == {b.totals}
    assert len(pieces) == min(parts, len(b.structure())) and all(piece.size for piece in pieces)
    rows = b.rows()
    assert (rows.tokens.flatten()[rows.source] == b.tokens).all() and (rows.mask.flatten()[rows.source] == 1).all()
    for n, (tokens, _, _) in enumerate(expected):
        assert rows.tokens[n][rows.mask[n] == 1].tolist() == tokens


def test_split_is_balanced() -> None:
    b = pack([Tree([1] * 10, [[2] * 10], row=i) for i in range(8)])
    assert [piece.size for piece in b.split(4)] == [40, 40, 40, 40]


@dataclass
class Trajectory(Batch):
    old_logp: Tensor
    advantage: Tensor
    axes: ClassVar[dict[str, str]] = Batch.axes | {"old_logp": "T", "advantage": "N"}


def test_columns_of_a_subclass_are_moved_and_cut() -> None:
    b = pack(DRAWN)
    t = Trajectory(**vars(b), old_logp=torch.arange(12.0), advantage=torch.tensor([5.0, 6.0, 7.0]))
    first, second = t.to("cpu").split(2)
    assert second.old_logp.tolist() == [8, 9, 10, 11] and second.advantage.tolist() == [7.0]
    assert first.unshare().old_logp.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert isinstance(second, Trajectory) and second.row.tolist() == [3] and second.group.tolist() == [0]
