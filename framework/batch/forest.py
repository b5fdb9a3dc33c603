"""One batch for every algorithm: a packed forest of token trees.

Prompts are stored once, each followed depth-first by its responses; many prompts share one row of T tokens::

    tokens    p p p  a a  b b b | q q  c c          two prompts; p has the responses a and b, q has c
    position  0 1 2  3 4  3 4 5 | 0 1  2 3
    parent   -1 0 1  2 3  2 5 6 |-1 8  9 10
    end       8 8 8  5 5  8 8 8 |12 12 12 12
    branch    - - -  0 0  1 1 1 | - -  2 2

`end` is the whole structure: query q sees key k iff `k <= q < end[k]`. That one condition gives causality, packing
and prefix sharing. The prediction of token t lives at `parent[t]`: there is no shift by one and no ignored label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from leyden.batch.tree import PER_TOKEN, Span, Totals, Tree, lay_out, walk

__all__ = ["Batch", "Rows", "Span", "Totals", "Tree", "pack"]


class Rows(NamedTuple):
    """A forest unrolled to one right-padded row per response (R rows, L columns); see `Batch.rows`."""

    tokens: Tensor
    """[R, L] int64, 0 on padding"""
    mask: Tensor
    """[R, L] int64, 1 on tokens and 0 on padding"""
    source: Tensor
    """[T] int64, where each token of the forest stands in the rows: `hidden.flatten(0, 1)[source]` is [T, …]"""


class _Predicted(NamedTuple):
    """What `Batch.predicted` has looked up, and where: the tensors, and how often each had been written to."""

    at: Tensor
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, batch: Batch, at: Tensor) -> _Predicted:
        tensors = batch.branch, batch.parent, batch.weight
        return cls(at, tensors, tuple(map(_version, tensors)))

    def holds(self, batch: Batch) -> bool:
        tensors = batch.branch, batch.parent, batch.weight
        same = all(a is b for a, b in zip(tensors, self.tensors, strict=True))
        return same and tuple(map(_version, tensors)) == self.versions


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


@dataclass
class Batch:
    """A packed forest in depth-first order: T tokens, N responses (branches), P prompts. See the module's drawing.

    An algorithm that needs more columns declares a dataclass that extends this one and names the axis of each in
    `axes`, so that `select` and `split` can cut it.
    """

    tokens: Tensor
    """[T] int64, token ids"""
    position: Tensor
    """[T] int64, depth in the tree: the position that rotary or learned embeddings see"""
    parent: Tensor
    """[T] int64, index of the preceding token in the tree, -1 at a root"""
    end: Tensor
    """[T] int64, one past the token's last descendant"""
    branch: Tensor
    """[T] int64, the response a token belongs to, -1 on prompts and padding"""
    weight: Tensor
    """[T] float32, loss weight; 0 is not trained, and roots always have 0"""
    group: Tensor
    """[N] int64, the prompt that each response answers"""
    score: Tensor
    """[N] float32, label or reward of each response"""
    row: Tensor
    """[P] int64, stable id of the example each prompt comes from"""
    totals: Totals
    """Denominators of the whole optimizer step; of this batch alone when it was made by hand"""
    spans: tuple[Span, ...] | None = field(default=None, repr=False, compare=False, kw_only=True)
    """The same structure as plain numbers, kept from `pack` to spare a copy from the device; see `structure`"""
    _predicted: _Predicted | None = field(default=None, init=False, repr=False, compare=False)

    axes: ClassVar[dict[str, str]] = dict.fromkeys(PER_TOKEN, "T") | {
        "group": "N",
        "score": "N",
        "row": "P",
    }

    def __len__(self) -> int:
        return len(self.tokens)

    def structure(self) -> tuple[Span, ...]:
        """Where every tree, prompt and response stands, padding left out."""
        if self.spans is None:
            self.spans = tuple(walk(self.end.tolist(), self.branch.tolist()))
        return self.spans

    @property
    def size(self) -> int:
        """Number of real tokens: T without padding."""
        return sum(span.stop - span.start for span in self.structure())

    @property
    def mask(self) -> Tensor:
        """[T, T] bool, True where the row's query may attend to the column's key."""
        index = torch.arange(len(self), device=self.end.device)
        return (index <= index[:, None]) & (index[:, None] < self.end)

    @property
    def last(self) -> Tensor:
        """[N] int64, index of each response's last token, found by structure and not by looking for padding."""
        stops = {branch: stop - 1 for span in self.structure() for branch, _, stop in span.responses}
        numbers = torch.tensor([stops[n] for n in range(len(self.group))], dtype=torch.long)
        return numbers.to(self.end.device, non_blocking=True)

    def per_branch(self, x: Tensor) -> Tensor:
        """Weighted sum of `x` [T] over the tokens of each response: [N]."""
        size = len(self.group)  # other tokens go to a place beyond, since to pick some would wait for the device
        place = torch.where(self.branch < 0, size, self.branch)
        return x.new_zeros(size + 1).index_add(0, place, x * self.weight)[:size]

    def branch_mean(self, x: Tensor) -> Tensor:
        """Weighted mean of `x` [T] over the tokens of each response: [N]; 0 where none of them is trained."""
        length = self.per_branch(torch.ones_like(x))
        return self.per_branch(x) / torch.where(length > 0, length, 1.0)

    def per_prompt(self, x: Tensor) -> Tensor:
        """Sum of `x` [N] over the responses of each prompt: [P]."""
        return x.new_zeros(len(self.row)).index_add(0, self.group, x)

    def token_mean(self, x: Tensor) -> Tensor:
        """This batch's share of the step's weighted mean of `x` [T] over trained tokens: a scalar."""
        return (x * self.weight).sum() / (self.totals.tokens or 1.0)

    def response_mean(self, x: Tensor) -> Tensor:
        """This batch's share of the step's mean of `x` [N] over responses: a scalar."""
        return x.sum() / (self.totals.responses or 1)

    def prompt_mean(self, x: Tensor) -> Tensor:
        """This batch's share of the step's mean of `x` [P] over prompts (pairs, in preference data): a scalar."""
        return x.sum() / (self.totals.prompts or 1)

    def predicted(self) -> Tensor:
        """Indices of the predicted tokens with a nonzero weight. They are looked up once, at best before the batch is
        sent to a GPU, since their number has to be known on the host."""
        if self._predicted is None or not self._predicted.holds(self):
            at = ((self.branch >= 0) & (self.parent >= 0) & (self.weight != 0)).nonzero()[:, 0]
            self._predicted = _Predicted.of(self, at)
        return self._predicted.at

    def _map(self, f: Any) -> Self:
        tensors = {d.name: f(v) for d in fields(self) if d.init and isinstance(v := getattr(self, d.name), Tensor)}
        out = replace(self, **tensors)
        if self._predicted is not None and self._predicted.holds(self):
            out._predicted = _Predicted.of(out, f(self._predicted.at))
        return out

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The batch on another device. A GPU gets it from page-locked memory, so that the host need not wait."""
        if torch.device(device).type == "cuda" and self.tokens.device.type == "cpu":
            self.predicted()
            return self.pin_memory()._map(lambda x: x.to(device, non_blocking=True))
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory, from where a GPU copies without waiting."""
        return self._map(lambda x: x.pin_memory())

    def select(self, trees: Sequence[int]) -> Self:
        """The batch of these trees alone (numbers into `structure()`). `totals` stay those of the whole step, so the
        parts of a batch have losses and gradients that add up to the whole."""
        spans = [self.structure()[i] for i in trees]
        device = self.tokens.device
        at = torch.tensor([t for s in spans for t in range(s.start, s.stop)], dtype=torch.long, device=device)
        kept = torch.tensor([b for s in spans for b, _, _ in s.responses], dtype=torch.long, device=device)
        prompts = torch.unique_consecutive(self.group[kept])
        return self._gather({"T": at, "N": kept, "P": prompts})

    def _gather(self, index: dict[str, Tensor], **changed: Tensor) -> Self:
        """Take rows along each axis and renumber `parent`, `end`, `branch` and `group` (each tree must be whole)."""
        cut = {name: getattr(self, name)[index[axis]] for name, axis in self.axes.items() if axis in index}
        out = replace(self, **(cut | changed), spans=None)
        if "parent" not in changed:
            shift = torch.arange(len(index["T"]), device=out.end.device) - index["T"]
            out.parent = torch.where(out.parent < 0, out.parent, out.parent + shift)
            out.end = out.end + shift
        for name, axis, far in (("branch", "N", self.group), ("group", "P", self.row)):
            if axis in index:
                number = torch.full((len(far) + 1,), -1, dtype=torch.long, device=out.end.device)
                number[index[axis]] = torch.arange(len(index[axis]), device=out.end.device)
                setattr(out, name, number[getattr(out, name)])
        return out

    def split(self, parts: int) -> list[Self]:
        """At most `parts` batches of whole trees, balanced by tokens, in the order of the forest."""
        return [self.select(cut) for cut in self.cuts(parts)]

    def cuts(self, parts: int) -> list[list[int]]:
        """The numbers of the trees in each of the batches that `split` gives."""
        spans, parts, size = self.structure(), min(parts, len(self.structure())), self.size
        cuts: list[list[int]] = [[] for _ in range(parts)]
        done, part = 0, -1
        for i, span in enumerate(spans):
            middle = int(parts * (done + (span.stop - span.start) / 2) / size)
            part = max(min(middle, part + 1), parts - (len(spans) - i))  # every part gets a tree
            cuts[part].append(i)
            done += span.stop - span.start
        return cuts

    def blank(self) -> Self:
        """Two tokens of weight 0 in this batch's place, for a process that has to run one more forward than it has
        trees."""
        none = torch.zeros(0, dtype=torch.long, device=self.tokens.device)
        at = torch.arange(min(2, len(self)), device=none.device)
        out = self._gather({"T": at, "N": none, "P": none}, parent=at - 1, end=torch.full_like(at, len(at)))
        out.position, out.weight, out.branch = at, torch.zeros_like(out.weight), torch.full_like(at, -1)
        return out

    def _paths(self) -> list[list[int]]:
        """Token indices from root to leaf, for each response in order and then each prompt that has none."""
        paths = {b: [*range(s.start, s.cut), *range(i, j)] for s in self.structure() for b, i, j in s.responses}
        bare = [list(range(s.start, s.cut)) for s in self.structure() if not s.responses]
        return [paths[n] for n in range(len(self.group))] + bare

    def with_prompts(self, prompts: Sequence[list[int]]) -> Batch:
        """The same responses after other prompts: what predicts them has the order that it has here. `totals` stay.

        Args:
            prompts: token ids for each prompt that has responses, in their order.
        """
        tokens, weight = self.tokens.tolist(), self.weight.tolist()
        spans = [span for span in self.structure() if span.responses]
        trees = []
        for prompt, span in zip(prompts, spans, strict=True):
            said = [[x[start:stop] for _, start, stop in span.responses] for x in (tokens, weight)]
            trees.append(Tree(prompt, said[0], weights=said[1]))
        return pack(trees, self.totals).to(self.tokens.device) if trees else self

    def carried_to(self, other: Batch, x: Tensor) -> Tensor:
        """Numbers of the predicted tokens here, [T], at the same tokens of a batch with other prompts: [T'], 0 on the
        others."""
        if other is self:
            return x
        return x.new_zeros(len(other)).index_put((other.predicted(),), x[self.predicted()])

    def unshare(self) -> Self:
        """The same batch with each prompt repeated for each of its responses: slower, equal, a reference in tests.

        `group`, `row` and `totals` stay what they were, so that groups and means do not change.
        """
        paths, device = self._paths(), self.tokens.device
        at = torch.tensor([t for path in paths for t in path], dtype=torch.long, device=device)
        lengths = torch.tensor([len(path) for path in paths], device=device)
        stops = lengths.cumsum(0)
        end = stops.repeat_interleave(lengths)
        start = (stops - lengths).repeat_interleave(lengths)
        index = torch.arange(len(at), device=device)
        return self._gather({"T": at}, parent=torch.where(index == start, -1, index - 1), end=end)

    def rows(self) -> Rows:
        """One right-padded row per response, with the way back, for models that cannot take the forest's mask.

        In a packed row the state of a recurrent layer would leak from one tree into the next.
        """
        paths = self._paths()
        length = max(map(len, paths), default=0)
        at = torch.full((len(paths), length), -1, dtype=torch.long)
        source = torch.zeros(len(self), dtype=torch.long)
        for r, path in reversed(list(enumerate(paths))):  # a shared prompt is read from its first response's row
            at[r, : len(path)] = torch.tensor(path)
            source[path] = r * length + torch.arange(len(path))
        device = self.tokens.device
        at, source = at.to(device), source.to(device)
        return Rows(torch.where(at < 0, 0, self.tokens[at]), (at >= 0).long(), source)


def pack(trees: Sequence[Tree], totals: Totals | None = None, length: int | None = None) -> Batch:
    """Lay trees out in one row, depth-first.

    A tree without responses is carried along but counts nowhere (a batch of weight 0 is made of such). A tree without
    a prompt is plain text: it has one response, whose first token is the root and is not predicted.

    Args:
        trees: prompts with their responses; the best response first where that matters.
        totals: what the whole optimizer step holds; default: what these trees hold.
        length: pad the row to this many tokens.

    Raises:
        ValueError: an empty response, several responses without a prompt, or more tokens than `length`.
    """
    columns, spans = lay_out(trees, length)
    tensors = {
        name: torch.tensor(values, dtype=torch.float32 if name in ("weight", "score") else torch.long)
        for name, values in columns.items()
    }
    if totals is None:
        totals = sum((tree.totals() for tree in trees), Totals(0.0, 0, 0))
    return Batch(**tensors, totals=totals, spans=spans)
