"""Reading and sampling with the cache inside attention.

A model that takes a forest mixes tokens nowhere but in attention, so attention itself can keep the cache, and the model
is called as if it had none. First it reads prompts as a packed forest (`Prefill`). Then at every step it gets the
newest token of each row, side by side as in a packed batch (`DecodeStep`); a query sees two sets of keys, its prompt's
and its row's own, which are attended to apart and joined.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leyden.batch.forest import Batch
from leyden.models.attention.forest import AttentionArgs, Forest
from leyden.models.attention.kv_cache import Cache
from leyden.models.attention.partial import join, partial

UNSEEN = -1e9
"""Added to the scores of keys that a query does not see. Finite, for a window may hide a whole prompt."""
Masks = tuple[Tensor | None, Tensor | None]


class Prefill(Forest):
    """Prompts being read: attention as for any forest, while their keys and values are kept.

    Args:
        batch: the prompts alone.
        backend: name of the back-end that attends.
        cache: where they are opened.
    """

    def __init__(self, batch: Batch, backend: str, cache: Cache) -> None:
        super().__init__(batch, backend)
        self.cache, self.spans = cache, [(span.start, span.cut) for span in batch.structure()]
        self.first = cache.open([stop - start for start, stop in self.spans])

    def keep(self, module: nn.Module, key: Tensor, value: Tensor) -> None:
        """Take the keys and values of a layer, [1, K, T, D] each."""
        layer = self.cache.layer(module, key, value)
        for kept, x in zip(layer.prompts, (key, value), strict=True):
            for place, (start, stop) in enumerate(self.spans, self.first):
                kept[place, :, : stop - start] = x[0, :, start:stop]


class DecodeStep:
    """The newest token of each of R rows: what its query sees is worked out once and shared by all layers."""

    def __init__(self, cache: Cache) -> None:
        cache.advance()
        self.cache, self.plan = cache, cache.plan
        first = cache.at - (cache.now - self.plan.oldest)
        self.seen = slice(first, cache.at + 1) if first >= 0 else slice(0, cache.filled)
        """The columns that are looked at: all that some row sees"""
        self.whole = first >= 0 and self.plan.oldest == self.plan.youngest
        """Whether every row sees all of them"""
        self._masks: dict[int | None, Masks] = {}

    def masks(self, window: int | None) -> Masks:
        """What is added to scores of prompts' keys, [P, 1, m or 1, L], and of own keys, [R, 1, 1, C]; None: nothing."""
        plan, now = self.plan, self.cache.now
        if window is not None and plan.longest + now - plan.oldest < window:
            window = None
        if window not in self._masks:
            position = torch.arange(plan.longest, device=plan.lengths.device)
            shared = (position < plan.lengths[:, None])[:, None, None]
            alone = (self.cache.stamp[self.seen] >= plan.born[:, None])[:, None, None]
            if window is None:
                self._masks[None] = _added(shared) if plan.padded else None, None if self.whole else _added(alone)
            else:
                age = now - plan.born if plan.there is None else (now - plan.born)[plan.there]
                far = plan.lengths[:, None] + age.view(len(plan.lengths), -1)  # position of each query, [P, m]
                near = self.cache.stamp[self.seen] > now - window
                self._masks[window] = _added(shared & (far[:, None, :, None] - position < window)), _added(alone & near)
        return self._masks[window]

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, args: AttentionArgs) -> Tensor:
        """Attention of a layer: [1, R, H, D] from queries [1, H, R, D], keys and values [1, K, R, D]."""
        layer, heads, rows = self.cache.layer(module, key, value), key.shape[1], query.shape[2]
        for kept, x in zip(layer.own, (key, value), strict=True):
            kept[:rows, :, self.cache.at] = x[0].transpose(0, 1)
        shared, alone = self.masks(args.window)
        q = query[0].transpose(0, 1).reshape(rows, heads, -1, query.shape[-1])  # [R, K, G, D]: G heads share a key's
        own = partial(q, [x[:rows, :, self.seen] for x in layer.own], alone, args)
        prompt = self._prompts(q, layer.prompts, shared, args)
        return join(prompt, own).flatten(1, 2)[None]

    def _prompts(
        self, q: Tensor, kept: list[Tensor], mask: Tensor | None, args: AttentionArgs
    ) -> tuple[Tensor, Tensor]:
        """Attention of queries [R, K, G, D] to their prompts: [R, K, G, D] and its log-sum-exp [R, K, G]."""
        plan, group = self.plan, q.shape[2]
        prompts = len(plan.lengths)
        q = q if plan.there is None else q[plan.there]
        q = q.view(prompts, plan.most, *q.shape[1:]).transpose(1, 2).flatten(2, 3)  # [P, K, m * G, D]
        if mask is not None and mask.shape[2] > 1:
            mask = mask.repeat_interleave(group, 2)
        found = partial(q, [x[:prompts, :, : plan.longest] for x in kept], mask, args)
        places = (prompts, q.shape[1], plan.most, group)
        out, lse = (x.reshape(*places, *x.shape[3:]).transpose(1, 2).flatten(0, 1) for x in found)
        return (out, lse) if plan.there is None else (out[plan.back], lse[plan.back])


def _added(seen: Tensor) -> Tensor:
    """A mask of what is seen as numbers to add to scores."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, UNSEEN)
