"""Prefill and decode step: sampling with the KV cache inside attention.

In a model that takes a forest, tokens mix only in attention. So attention itself can keep the KV cache, and the model
is called as if it had none. The prefill reads prompts as a packed forest (`Prefill`). Each decode step then takes the
newest token of each row, side by side as in a packed batch (`DecodeStep`). A query sees two sets of keys, those of its
prompt and those of its own row; attention over each is computed separately, and the two are joined.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import count
from typing import Any

import torch
from torch import Tensor

from leyden.batch.forest import Batch
from leyden.models.attention.forest import AttentionArgs, Forest
from leyden.models.attention.kv_cache import Cache, KVCache, Layer
from leyden.models.attention.partial import join, partial

UNSEEN = -1e9
"""Added to the scores of keys that a query does not see. Finite, since a window may hide a whole prompt."""
Masks = tuple[Tensor | None, Tensor | None]


class Prefill(Forest):
    """Prefill: attention as for any forest, while the prompts' keys and values go into the KV cache.

    Args:
        batch: the prompts, without responses.
        backend: name of the attention back-end.
        cache: the KV cache, in which the prompts get places.
    """

    def __init__(self, batch: Batch, backend: str, cache: KVCache) -> None:
        super().__init__(batch, backend)
        self.cache, self.spans = cache, [(span.start, span.cut) for span in batch.structure()]
        self.places = cache.open([stop - start for start, stop in self.spans])
        self.calls = count()

    def keep(self, key: Tensor, value: Tensor) -> None:
        """Store the keys and values of the next layer, [1, K, T, D] each, in the KV cache."""
        layer = self.cache.layer(next(self.calls), key, value)
        for buffer, x in zip(layer.prompts, (key, value), strict=True):
            if x.is_cuda:  # one kernel, where a copy for each prompt would be one each
                buffer[self.once("place", self._place), :, self.position] = x[0].transpose(0, 1)
                continue
            for place, (start, stop) in zip(self.places, self.spans, strict=True):
                buffer[place, :, : stop - start] = x[0, :, start:stop]

    def _place(self) -> Tensor:
        """[T] place of each token's prompt."""
        lengths = torch.tensor([stop - start for start, stop in self.spans])
        places = torch.tensor(self.places).repeat_interleave(lengths)
        return places.to(self.position.device, non_blocking=True)


class CachedStep(ABC):
    """Decode step: the newest token of each of R rows. Its masks are computed once and shared by all layers."""

    seen: slice
    """The columns of own keys that at least one row sees"""

    def __init__(self, cache: Any, plan: Any) -> None:
        self.cache, self.plan, self.calls = cache, plan, count()
        self._masks: dict[int | None, Masks] = {}

    @abstractmethod
    def store(self, layer: Layer, key: Tensor, value: Tensor) -> None:
        """Store the keys and values of the newest tokens, [1, K, R, D] each."""

    @abstractmethod
    def masks(self, window: int | None) -> Masks:
        """Masks to add to the scores of prompts' keys, [P, 1, m or 1, L], and of own keys, [R, 1, 1, C].

        None where no key is hidden.
        """

    def attend(self, query: Tensor, key: Tensor, value: Tensor, args: AttentionArgs) -> Tensor:
        """The next layer's attention: queries [1, H, R, D], keys and values [1, K, R, D] to [1, R, H, D]."""
        layer, heads, rows = self.cache.layer(next(self.calls), key, value), key.shape[1], query.shape[2]
        self.store(layer, key, value)
        prompt_mask, own_mask = self.masks(args.window)
        q = query[0].transpose(0, 1).reshape(rows, heads, -1, query.shape[-1])  # [R, K, G, D]: G heads share a key's
        own = partial(q, [x[:rows, :, self.seen] for x in layer.own], own_mask, args)
        prompt = self._attend_to_prompts(q, layer.prompts, prompt_mask, args)
        return join(prompt, own).flatten(1, 2)[None]

    def _attend_to_prompts(
        self, q: Tensor, prompts_kv: list[Tensor], mask: Tensor | None, args: AttentionArgs
    ) -> tuple[Tensor, Tensor]:
        """Attention of queries [R, K, G, D] to their prompts: output [R, K, G, D] and log-sum-exp [R, K, G]."""
        plan, group = self.plan, q.shape[2]
        prompts = len(plan.lengths)
        q = q if plan.there is None else q[plan.there]
        q = q.view(prompts, plan.most, *q.shape[1:]).transpose(1, 2).flatten(2, 3)  # [P, K, m * G, D]
        if mask is not None and mask.shape[2] > 1:
            mask = mask.repeat_interleave(group, 2)
        parts = partial(q, [x[:prompts, :, : plan.longest] for x in prompts_kv], mask, args)
        shape = (prompts, q.shape[1], plan.most, group)
        out, lse = (x.reshape(*shape, *x.shape[3:]).transpose(1, 2).flatten(0, 1) for x in parts)
        return (out, lse) if plan.there is None else (out[plan.back], lse[plan.back])


class DecodeStep(CachedStep):
    """Decode step of the rows that are there, over the ring of columns."""

    def __init__(self, cache: Cache) -> None:
        cache.advance()
        super().__init__(cache, cache.plan)
        first = cache.at - (cache.now - self.plan.oldest)
        self.seen = slice(first, cache.at + 1) if first >= 0 else slice(0, cache.filled)
        self.whole = first >= 0 and self.plan.oldest == self.plan.youngest
        """Whether every row sees all of these columns"""

    def store(self, layer: Layer, key: Tensor, value: Tensor) -> None:
        for buffer, x in zip(layer.own, (key, value), strict=True):
            buffer[: x.shape[2], :, self.cache.at] = x[0].transpose(0, 1)

    def masks(self, window: int | None) -> Masks:
        plan, now = self.plan, self.cache.now
        if window is not None and plan.longest + now - plan.oldest < window:
            window = None
        if window not in self._masks:
            position = torch.arange(plan.longest, device=plan.lengths.device)
            prompt_seen = (position < plan.lengths[:, None])[:, None, None]
            own_seen = (self.cache.stamp[self.seen] >= plan.born[:, None])[:, None, None]
            if window is None:
                self._masks[None] = (
                    additive(prompt_seen) if plan.padded else None,
                    None if self.whole else additive(own_seen),
                )
            else:
                age = now - plan.born if plan.there is None else (now - plan.born)[plan.there]
                query_position = plan.lengths[:, None] + age.view(len(plan.lengths), -1)  # [P, m]
                in_window = self.cache.stamp[self.seen] > now - window
                self._masks[window] = (
                    additive(prompt_seen & (query_position[:, None, :, None] - position < window)),
                    additive(own_seen & in_window),
                )
        return self._masks[window]


def additive(seen: Tensor) -> Tensor:
    """Additive mask: 0 for keys that are seen, `UNSEEN` for others."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, UNSEEN)
