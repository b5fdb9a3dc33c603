"""A batch of sampled responses that remembers how they were sampled and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from leyden.batch.forest import Batch, Span, Totals, Tree, pack

COLUMNS = ("old_logp", "ref_logp", "value", "advantage", "returns")
"""What a trajectory has beyond a batch."""


@dataclass
class Trajectory(Batch):
    """Sampled responses: T tokens, N responses, P prompts. Values of tokens are 0 on prompts and padding."""

    old_logp: Tensor
    """[T] log-prob of each response token under the policy that sampled it, nats"""
    ref_logp: Tensor
    """[T] the same under the reference"""
    value: Tensor
    """[T] value of the state before each response token"""
    advantage: Tensor
    """[T] how much better each response token was than expected"""
    returns: Tensor
    """[T] what values should have been"""

    axes: ClassVar[dict[str, str]] = Batch.axes | dict.fromkeys(COLUMNS, "T")

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> Self:
        """Responses of which nothing is known yet but their scores."""
        batch = pack(trees)
        own: dict[str, Any] = {d.name: getattr(batch, d.name) for d in fields(batch)}
        return cls(**own | {name: torch.zeros(len(batch)) for name in COLUMNS})

    def grid(self) -> tuple[Tensor, Tensor]:
        """Where the tokens of each response stand: indices into T and a mask, [N, L] each, tokens on the left."""
        places = {branch: (start, stop) for span in self.structure() for branch, start, stop in span.responses}
        ends = torch.tensor([places[n] for n in range(len(places))], dtype=torch.long).reshape(-1, 2)
        start, length = ends[:, :1], ends[:, 1:] - ends[:, :1]
        steps = torch.arange(int(length.max()) if len(places) else 0)
        mask = steps < length
        return (start + steps).masked_fill(~mask, 0), mask

    def spread(self, x: Tensor) -> Tensor:
        """A number of each response to all its tokens: [N] -> [T], 0 on prompts and padding."""
        return torch.where(self.branch >= 0, x[self.branch.clamp_min(0)] if len(x) else 0.0, 0.0)


def joined(parts: Sequence[Trajectory]) -> Trajectory:
    """Rollouts one after the other in one row."""
    names = [d.name for d in fields(Trajectory) if d.name not in ("totals", "spans")]
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    spans: list[Span] = []
    tokens = responses = prompts = 0
    for part in parts:
        shift = {"parent": tokens, "end": tokens, "branch": responses, "group": prompts}
        for name in names:
            x = getattr(part, name)
            columns[name].append(torch.where(x < 0, x, x + shift[name]) if name in shift else x)
        for span in part.structure():
            placed = tuple((b + responses, i + tokens, j + tokens) for b, i, j in span.responses)
            spans.append(Span(span.start + tokens, span.cut + tokens, placed))
        tokens, responses, prompts = tokens + len(part), responses + len(part.group), prompts + len(part.row)
    totals = sum((part.totals for part in parts), Totals(0.0, 0, 0))
    return Trajectory(**{name: torch.cat(x) for name, x in columns.items()}, totals=totals, spans=tuple(spans))


def stored(whole: Trajectory) -> dict[str, Any]:
    """A rollout as tensors and plain values, for a checkpoint or another process."""
    tensors = {d.name: v for d in fields(whole) if isinstance(v := getattr(whole, d.name), Tensor)}
    return tensors | {"totals": list(whole.totals)}


def restored(state: dict[str, Any]) -> Trajectory:
    """From `stored`."""
    return Trajectory(**(state | {"totals": Totals(*state["totals"])}))
