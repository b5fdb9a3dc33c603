"""Sampled responses with the log-probs of sampler, policy and reference, values, advantages and returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from leyden.batch.forest import Batch, pack
from leyden.batch.tree import Span, Totals, Tree

COLUMNS = ("sampled_logp", "old_logp", "ref_logp", "value", "advantage", "returns", "correction")
"""Columns with one number a token beyond those of a batch."""


@dataclass
class Trajectory(Batch):
    """Sampled responses: T tokens, N responses, P prompts. Values of tokens are 0 on prompts and padding, where
    `correction` is 1."""

    sampled_logp: Tensor
    """[T] log-prob of each response token as the engine reported it, nats"""
    old_logp: Tensor
    """[T] the same by the forward pass of training, under the policy that sampled it"""
    ref_logp: Tensor
    """[T] the same under the reference"""
    value: Tensor
    """[T] value of the state before each response token"""
    advantage: Tensor
    """[T] how much better each response token was than expected"""
    returns: Tensor
    """[T] regression target of the value function"""
    correction: Tensor
    """[T] what the loss of each token is multiplied by, 1 unless the engine sampled from another distribution"""
    draw: Tensor
    """[P] int64, place of each prompt in the run's sequence of prompts"""

    axes: ClassVar[dict[str, str]] = Batch.axes | dict.fromkeys(COLUMNS, "T") | {"draw": "P"}

    @classmethod
    def of(
        cls,
        trees: Sequence[Tree],
        logp: Sequence[Sequence[Sequence[float]]] | None = None,
        draws: Sequence[int] | None = None,
    ) -> Self:
        """Responses of which nothing is known yet but how they were sampled and their scores.

        Args:
            trees: prompts with their responses.
            logp: of each tree and response, one number a token: what the sampler said.
            draws: of each tree that has responses, the number of its draw.
        """
        batch = pack(trees)
        own: dict[str, Any] = {d.name: getattr(batch, d.name) for d in fields(batch) if d.init}
        columns: dict[str, Any] = {name: torch.zeros(len(batch)) for name in COLUMNS}
        columns["correction"] = torch.ones(len(batch))
        if logp is not None:
            said = [value for tree in logp for response in tree for value in response]
            columns["sampled_logp"][batch.branch >= 0] = torch.tensor(said, dtype=torch.float32)
        number = torch.zeros(len(batch.row), dtype=torch.long) if draws is None else torch.tensor(draws).long()
        return cls(**own, **columns, draw=number)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Where the tokens of each response stand: indices into T and a mask, [N, L] each, tokens on the left."""
        places = {branch: (start, stop) for span in self.structure() for branch, start, stop in span.responses}
        ends = torch.tensor([places[n] for n in range(len(places))], dtype=torch.long).reshape(-1, 2)
        start, length = ends[:, :1], ends[:, 1:] - ends[:, :1]
        steps = torch.arange(int(length.max()) if len(places) else 0)
        mask = steps < length
        return (start + steps).masked_fill(~mask, 0), mask

    def lengths(self) -> Tensor:
        """[N] number of tokens of each response, whatever their weight."""
        return self.grid()[1].sum(1).float()

    def per_token(self, x: Tensor) -> Tensor:
        """A number of each response to all its tokens: [N] -> [T], 0 on prompts and padding."""
        return torch.where(self.branch >= 0, x[self.branch.clamp_min(0)] if len(x) else 0.0, 0.0)

    @classmethod
    def cat(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """Trajectories one after the other in one row."""
        names = [d.name for d in fields(cls) if d.init and d.name not in ("totals", "spans")]
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
        return cls(**{name: torch.cat(x) for name, x in columns.items()}, totals=totals, spans=tuple(spans))

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, for a checkpoint."""
        tensors = {d.name: v for d in fields(self) if d.init and isinstance(v := getattr(self, d.name), Tensor)}
        return tensors | {"totals": list(self.totals)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Self:
        """The inverse of `state_dict`; a checkpoint from before there were corrections has none."""
        none = {"correction": torch.ones(len(state["tokens"]))}
        return cls(**(none | state | {"totals": Totals(*state["totals"])}))
