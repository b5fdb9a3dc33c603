"""Log-probabilities of given continuations: each context is run once for all that may follow it, many in one row.

A continuation of n tokens is predicted by the states of the context's last token and of its own first n - 1 tokens. So
its last token is never run, and choices of one token (A, B, C, D) cost no more than their context.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from leyden.batch.forest import Tree, pack
from leyden.batch.tree import Span, chunk_by_tokens
from leyden.models.backbone import Backbone, innermost
from leyden.models.causal_lm import CausalLM
from leyden.models.logprobs import blocks
from leyden.policy.policy import eval_mode
from leyden.policy.predictions import chunks

BUDGET = {"cpu": 2048, "cuda": 16384}
"""Tokens of one row, by the type of the device."""


class Request(NamedTuple):
    """Token ids of a context, at least one, and of a continuation, at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Of a continuation: its summed log-probability in nats, and whether each of its tokens is the most probable."""

    logp: float
    greedy: bool


@dataclass
class Group:
    """Requests with the same context, which are run together as one tree."""

    context: list[int]
    inputs: list[list[int]] = field(default_factory=list)
    """What is run after the context, none the beginning of another"""
    asked: list[tuple[int, int, list[int]]] = field(default_factory=list)
    """(number of the request, number of its input or -1, continuation)"""

    def __len__(self) -> int:
        return len(self.context) + sum(map(len, self.inputs))

    def tree(self) -> Tree:
        return Tree(self.context, self.inputs)


class Pair(NamedTuple):
    """A state of the row, the token whose log-probability it gives, and the number of the request."""

    state: int
    token: int
    request: int


def grouped(requests: Sequence[Request], budget: int) -> list[Group]:
    """Requests by their context, the largest group first. A group of more tokens than the budget is split."""
    contexts: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        contexts.setdefault(tuple(request.context), []).append(number)
    groups = [
        group for context, numbers in contexts.items() for group in _of_one(list(context), requests, numbers, budget)
    ]
    return sorted(groups, key=len, reverse=True)


def _of_one(context: list[int], requests: Sequence[Request], numbers: Iterable[int], budget: int) -> list[Group]:
    """The groups of requests that share a context. A shorter continuation finds its tokens in a longer one."""
    groups = [Group(context)]
    for number in sorted(numbers, key=lambda number: -len(requests[number].continuation)):
        continuation = list(requests[number].continuation)
        needed, group = continuation[:-1], groups[-1]
        found = next((i for i, other in enumerate(group.inputs) if other[: len(needed)] == needed), -1)
        if needed and found < 0:
            if group.asked and len(group) + len(needed) > budget:
                groups.append(group := Group(context))
            found = len(group.inputs)
            group.inputs.append(needed)
        group.asked.append((number, found if needed else -1, continuation))
    return groups


def pairs_of(group: Group, span: Span) -> list[Pair]:
    """The states that predict the continuations of a group which stands at `span`."""
    pairs = []
    for number, place, continuation in group.asked:
        start = span.responses[place][1] if place >= 0 else 0
        for i, token in enumerate(continuation):
            pairs.append(Pair(span.cut - 1 if i == 0 else start + i - 1, token, number))
    return pairs


@torch.no_grad()
def score(
    policy: CausalLM,
    requests: Sequence[Request],
    budget: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Score]:
    """The score of each request under the policy, fp32, dropout off.

    Args:
        policy: built.
        requests: contexts and continuations, in any order.
        budget: tokens of one row; a larger context is a row by itself.
        on_progress: called with the number of requests that were just scored.
    """
    budget = budget or BUDGET.get(policy.device.type, BUDGET["cuda"])
    backbone, found = policy.backbone, [Score(0.0, True)] * len(requests)
    with eval_mode(policy):
        for groups in chunk_by_tokens(grouped(requests, budget), budget):
            batch = pack([group.tree() for group in groups])
            spans = batch.structure()
            pairs = sorted(pair for group, span in zip(groups, spans, strict=True) for pair in pairs_of(group, span))
            hidden = backbone.hidden(batch.to(policy.device))
            logp, greedy = predicted(backbone, hidden, pairs)
            for pair, value, best in zip(pairs, logp, greedy, strict=True):
                before = found[pair.request]
                found[pair.request] = Score(before.logp + value, before.greedy and best)
            on_progress(sum(len(group.asked) for group in groups))
    return found


def predicted(backbone: Backbone, hidden: Tensor, pairs: Sequence[Pair]) -> tuple[list[float], list[bool]]:
    """Of each pair, in the order of their states: the log-probability of its token, and whether no other is larger.

    Args:
        backbone: gives the head.
        hidden: [T, H] states of the row.
        pairs: sorted.
    """
    states = sorted({pair.state for pair in pairs})
    at = {state: place for place, state in enumerate(states)}
    rows, tokens = [at[pair.state] for pair in pairs], torch.tensor([pair.token for pair in pairs])
    head, squash = backbone.head, backbone.squash
    chosen = hidden[torch.tensor(states, device=hidden.device)]
    logp, greedy = list[Tensor](), list[Tensor]()
    for large in chunks(len(states), innermost(head).weight.shape[0]):
        x = head(chosen[large])
        for small in blocks(x):
            z = squash(x[small])
            first = large.start + small.start
            cut = slice(bisect_left(rows, first), bisect_left(rows, first + len(z)))
            row = (torch.tensor(rows[cut]) - first).to(z.device)
            token = tokens[cut].to(z.device)
            logp.append(z[row, token] - z.logsumexp(-1)[row])
            greedy.append(z.argmax(-1)[row] == token)
    return torch.cat(logp).double().tolist(), torch.cat(greedy).tolist()
