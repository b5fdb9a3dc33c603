"""The packed forest of token trees: the one batch that every algorithm trains on.

Called by data (which packs examples), policies (which run it) and algorithms (whose losses are means over it). May
import torch and `errors`, nothing else of the project. Begin reading at `forest`, whose drawing shows the layout;
`tree` is one prompt with its responses before packing, `pairs` compares responses, `trajectory` adds the
columns of rollouts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.batch.forest import Batch, Rows, pack
    from leyden.batch.pairs import Pairs, pairwise_wins, preference_pairs, rank_table
    from leyden.batch.trajectory import Trajectory
    from leyden.batch.tree import Span, Totals, Tree, chunk_by_tokens

__all__ = [
    "Batch",
    "chunk_by_tokens",
    "pack",
    "Pairs",
    "pairwise_wins",
    "preference_pairs",
    "rank_table",
    "Rows",
    "Span",
    "Totals",
    "Trajectory",
    "Tree",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "forest": "Batch Rows pack",
        "tree": "Span Totals Tree chunk_by_tokens",
        "pairs": "Pairs pairwise_wins preference_pairs rank_table",
        "trajectory": "Trajectory",
    },
)
