"""Attention with FlexAttention, for CUDA: soft caps and every precision. On a CPU it runs forward only, for tests.

The kernel works on blocks of 128 x 128 scores. `end` tells block by block which of them are not empty, since
`q < end[k]` is easiest for a block's first query and hardest for its last. So no T x T mask is ever made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from leyden.models.attention.backend import Backend
from leyden.models.attention.forest import AttentionArgs, Forest
from leyden.paths import kernel_folder

log = logging.getLogger(__name__)
BLOCK = 128
DYNAMIC = True
"""Whether the kernel is compiled once for rows of all lengths, which are then padded to whole blocks. Where torch
cannot, `give_up_dynamic` ends it."""
BLOCKS = 37
"""Blocks of the row that it is compiled for: a compiler takes equal sizes as one, and no model has so many heads."""
SHORTEST = 1024
"""Else rows are padded to this many tokens, or to the next power of two, since every new length is compiled anew."""
COMPILATIONS = 64
"""Limit on compiled variants: lengths, with and without gradients, with and without a window. Torch's own limit is 8,
beyond which compilation fails."""


def padded(length: int) -> int:
    """Padded length of a row of `length` tokens."""
    if DYNAMIC:  # never a single block, for a size of 1 is compiled in
        return max(2, -(-length // BLOCK)) * BLOCK
    return max(SHORTEST, 1 << (length - 1).bit_length())


def compiled_lengths(least: int, most: int) -> list[int]:
    """The lengths to compile for, where rows have `least` to `most` tokens."""
    low, high = padded(least), padded(most)
    return [BLOCKS * BLOCK] if DYNAMIC else [1 << n for n in range(low.bit_length() - 1, high.bit_length())]


class Call(NamedTuple):
    """What of a call of the kernel is compiled in, beside the length of the row."""

    shapes: tuple[tuple[int, int], ...]
    """heads and head width of query, key and value"""
    needs_gradient: tuple[bool, ...]
    """whether query, key and value do"""
    dtype: torch.dtype
    args: AttentionArgs
    gradients: bool
    """whether they are recorded"""
    autocast: bool


_recorded: list[set[Call]] = []


@contextmanager
def recording() -> Iterator[set[Call]]:
    """Take down what the kernel is called for, without a run of it: outputs inside are no attention."""
    _recorded.append(set())
    try:
        yield _recorded[-1]
    finally:
        _recorded.pop()


def _record(query: Tensor, key: Tensor, value: Tensor, args: AttentionArgs) -> Tensor:
    """Note a call down, and give something of the shape of its output that depends on the same tensors."""
    qkv = query, key, value
    shapes, needed = tuple((x.shape[1], x.shape[3]) for x in qkv), tuple(x.requires_grad for x in qkv)
    autocast = torch.is_autocast_enabled(query.device.type)
    _recorded[-1].add(Call(shapes, needed, query.dtype, args, torch.is_grad_enabled(), autocast))
    out = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return (out + 0 * (query.mean() + key.mean())).transpose(1, 2)


def visible(end: Tensor, position: Tensor, window: Tensor | None) -> Callable[..., Tensor]:
    """The forest's rule for one query and one key. `window` is a tensor, so that its value is not compiled in."""

    def tree(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k])

    if window is None:
        return tree
    limit = window

    def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k]) & (position[q] - position[k] < limit)

    return near


def block_mask(end: Tensor, position: Tensor, window: int | None) -> BlockMask:
    """FlexAttention's block mask of a row: blocks that are partly visible, and blocks that are fully visible.

    Args:
        end, position: [L] int32, L a multiple of 128.
    """
    end_blocks, position_blocks = end.view(-1, BLOCK), position.view(-1, BLOCK)
    block = torch.arange(len(end_blocks), device=end.device)
    first = block[:, None] * BLOCK  # first query of each block
    some = (block[:, None] > block) & (first < end_blocks.amax(1))
    full = (block[:, None] > block) & (first + BLOCK <= end_blocks.amin(1))
    limit = None
    if window is not None:
        low, high = position_blocks.amin(1), position_blocks.amax(1)
        some &= low[:, None] - high < window
        full &= high[:, None] - low < window
        limit = torch.tensor(window, dtype=torch.int32, device=end.device)
    some |= block[:, None] == block  # every token sees itself, but no block sees all of itself
    rule, shape = visible(end, position, limit), (len(end), len(end))
    return BlockMask.from_kv_blocks(*_block_lists(some & ~full), *_block_lists(full), BLOCK, rule, shape)


def _block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Number of set blocks per row of blocks, and indices with the set ones first: [1, 1, B] and [1, 1, B, B] int32."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


def _mask(forest: Forest, window: int | None) -> BlockMask:
    """Block mask of a forest, padded with tokens that see only themselves."""
    used = len(forest.end)
    extra = torch.arange(used, padded(used), device=forest.end.device)
    end, position = torch.cat([forest.end, extra + 1]), torch.cat([forest.position, torch.zeros_like(extra)])
    return block_mask(end.int(), position.int(), window)


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    def squeeze(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return squeeze


@cache
def _compiled() -> Callable[..., Any]:
    """Compiled FlexAttention; uncompiled it would make all T x T scores."""
    kernel_folder()
    config: Any = torch.compiler.config
    config.recompile_limit = max(config.recompile_limit, COMPILATIONS)
    # one full graph, so that reaching the limit is an error and not a silent fall back to T x T scores
    kernel = torch.compile(flex_attention, dynamic=DYNAMIC, fullgraph=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        # with dynamic lengths torch makes inputs of numbers too, and fails on those that scores are worked out with
        with torch._dynamo.config.patch(specialize_float=True):  # type: ignore[attr-defined]
            return kernel(*args, **kwargs)

    return run


def give_up_dynamic(error: Exception) -> bool:
    """Compile for each length by itself from now on; return whether that is a change that may help."""
    global DYNAMIC
    if not DYNAMIC or isinstance(error, torch.OutOfMemoryError):
        return False
    log.debug("FlexAttention is not compiled for all lengths at once", exc_info=error)
    DYNAMIC = False
    _compiled.cache_clear()
    return True


class Flex(Backend):
    """One call of FlexAttention for the whole padded row."""

    name = "flex"
    devices = ("cuda",)
    softcap = True
    widths = range(16, 1025)

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda":
            return "it trains on GPUs alone"
        return None if find_spec("triton") else "it needs the package triton"

    def attend(self, query: Tensor, key: Tensor, value: Tensor, forest: Forest, args: AttentionArgs) -> Tensor:
        if _recorded:
            return _record(query, key, value, args)
        try:
            return self._run(query, key, value, forest, args)
        except Exception as error:
            if not give_up_dynamic(error):
                raise
        return self._run(query, key, value, forest, args)

    def _run(self, query: Tensor, key: Tensor, value: Tensor, forest: Forest, args: AttentionArgs) -> Tensor:
        used, length = query.shape[2], padded(query.shape[2])
        mask = forest.once(("flex", args.window, length), lambda: _mask(forest, args.window))
        # contiguous, since where there is nothing to pad strides are the layer's own, and they are compiled in as well
        q, k, v = (F.pad(x, (0, 0, 0, length - used)).contiguous() for x in (query, key, value))
        run: Any = _compiled() if query.device.type == "cuda" else flex_attention
        squeeze = None if args.softcap is None else _capped(args.softcap)
        gqa = q.shape[1] != k.shape[1]
        out: Tensor = run(q, k, v, score_mod=squeeze, block_mask=mask, scale=args.scale, enable_gqa=gqa)
        return out[:, :, :used].transpose(1, 2)
