"""Short hashes of large things."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from leyden.batch.forest import Tree
from leyden.distributed import full_tensor


def fingerprint_weights(named: Iterable[tuple[str, Tensor]]) -> str:
    """16 hex digits that differ where weights do. Of each tensor some 64 elements are looked at: another model, another
    dtype or another quantisation differs in nearly all of them."""
    tensors = sorted(named, key=lambda pair: pair[0])
    # copies, for a view would keep each tensor that FSDP2 puts together in memory, and its storage from being freed
    some = [_some(full_tensor(x.detach())).to(torch.float32, copy=True) for _, x in tensors]
    digest = hashlib.sha256()
    for (name, tensor), values in zip(tensors, _to_host(some), strict=True):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _some(tensor: Tensor) -> Tensor:
    return tensor.flatten()[:: max(1, tensor.numel() // 64)]


def _to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """1-D tensors on the CPU: the host waits once for each device, and not for each tensor."""
    together: dict[torch.device, list[int]] = {}
    for index, x in enumerate(tensors):
        together.setdefault(x.device, []).append(index)
    copies: dict[int, Tensor] = {}
    for indices in together.values():
        parts = torch.split(torch.cat([tensors[i] for i in indices]).cpu(), [len(tensors[i]) for i in indices])
        copies |= zip(indices, parts, strict=True)
    return [copies[i] for i in range(len(tensors))]


def fingerprint_trees(trees: Any) -> str:
    """16 hex digits that differ where tokenised rows do: their own account (`fingerprint`), or all of them read."""
    known = getattr(trees, "fingerprint", None)
    if known is not None:
        return str(known)
    digest = hashlib.sha256()
    for tree in (trees[index] for index in range(len(trees))):
        assert isinstance(tree, Tree)
        digest.update(repr((tree.prompt, tree.responses, tree.scores, tree.weights)).encode())
    return digest.hexdigest()[:16]


def fingerprint_text(text: str | None) -> str:
    """16 hex digits of a text, none for None."""
    return "" if text is None else hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_vocabulary(tokenizer: Any) -> str:
    """16 hex digits of a tokenizer's tokens and their ids, none where it has no list of them."""
    return _fingerprint_vocabulary(tokenizer) if hasattr(tokenizer, "get_vocab") else ""


@lru_cache(maxsize=8)
def _fingerprint_vocabulary(tokenizer: Any) -> str:
    tokens: Mapping[str, int] = tokenizer.get_vocab()
    return fingerprint_text(repr(sorted(tokens.items(), key=lambda pair: (pair[1], pair[0]))))
