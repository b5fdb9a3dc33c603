"""Checks of a model when it is built, by forward passes over a handful of tokens.

Two assumptions would fail silently: that the head on hidden states gives the model's own logits (Cohere, Granite and
Gemma 2 scale or cap them), and that the forest's mask reaches every layer (recurrent and linear attention mix all
tokens of a row). That every token has an embedding is read from the tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from leyden.batch.forest import Batch, Tree, pack
from leyden.data.tokenizer import beyond_embeddings
from leyden.errors import UserError
from leyden.models.backbone import Backbone

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase, embeddings: int, stop: Collection[int]) -> None:
    """That the model has an embedding for the tokens that text is made of, and for those that end an answer. Added
    tokens that no text uses may lie beyond (the image token of the smallest Gemma 3).

    Raises:
        UserError: it has none.
    """
    if tokenizer.vocab_size > embeddings:
        raise UserError(
            f"{path}: the tokenizer knows {tokenizer.vocab_size} tokens but the model only {embeddings}; use the "
            "tokenizer that belongs to the model"
        )
    if (last := max(stop, default=0)) >= embeddings:
        raise UserError(f"{path}: answers end with {beyond_embeddings(tokenizer, last, embeddings)}")


def probe_batch(vocabulary: int) -> Batch:
    """Two trees with shared prompts, small enough that even the largest model runs them in a moment."""
    ids = [(7 * i * i + 3 * i + 5) % vocabulary for i in range(13)]
    return pack([Tree(ids[:3], [ids[3:5], ids[5:8]]), Tree(ids[8:10], [ids[10:13]])])


def _distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-6))


@torch.no_grad()
def check_head(backbone: Backbone, tolerance: float) -> None:
    """Compare the logits of `Backbone` with the model's own.

    Raises:
        UserError: they differ, so log-probabilities would be wrong.
    """
    base = backbone.base
    tokens = torch.tensor([[5, 17, 3, 11]], device=backbone.device) % backbone.config.vocab_size
    logits = base(input_ids=tokens, use_cache=False).logits
    ours = backbone.squash(backbone.head(backbone.body(input_ids=tokens, use_cache=False).last_hidden_state))
    if _distance(ours, logits) > tolerance:
        raise UserError(
            f"{backbone.path}: the logits of {type(base).__name__} are not its head on its hidden states, by a rule "
            "that is not known here; use another model"
        )


@torch.no_grad()
def takes_forest(backbone: Backbone, tolerance: float) -> bool:
    """Whether hidden states over a packed forest equal those of separate rows."""
    batch = probe_batch(backbone.config.vocab_size).to(backbone.device)
    try:
        packed = backbone.hidden(batch)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # the keyword or the mask did not reach the layers
        return False
    return _distance(packed, backbone.hidden_by_rows(batch)) <= tolerance
