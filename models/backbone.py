"""The parts of a transformers model that the rest of `models` uses: body, head, logit scaling and attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leyden.batch.forest import Batch
from leyden.errors import UserError
from leyden.models.attention.dispatch import choose
from leyden.models.attention.forest import Forest
from leyden.models.load import text_model
from leyden.models.logprobs import Squash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
"""Names of what logits are divided by (Granite, Inkling)"""
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Names of the logits' soft cap in configurations (Gemma 2, RecurrentGemma, xLSTM)"""


def base_of(model: Any) -> PreTrainedModel:
    """The transformers model under an adapter, or the model itself."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def innermost(part: Any) -> Any:
    """A layer itself, below what an adapter has put around it."""
    while (inner := getattr(part, "base_layer", getattr(part, "original_module", None))) is not None:
        part = inner
    return part


@dataclass(frozen=True)
class Backbone:
    """A view of a model that owns no weights; `CausalLM.backbone` makes it anew each time it is read.

    Args:
        model: a causal LM of transformers, alone or under a PEFT adapter.
        path: hub name or folder that it came from, for messages.
        dtype: dtype of its weights.
        attention: attention over packed batches: the name of a back-end, `auto`, or `rows` for one padded row per
            response.
        native: the attention implementation that the model came with.
    """

    model: nn.Module
    path: str
    dtype: torch.dtype
    attention: str = "auto"
    native: str = "sdpa"

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model under the adapter, or the model itself."""
        return base_of(self.model)

    @property
    def adapted(self) -> bool:
        """Whether the model has an adapter."""
        return hasattr(self.model, "peft_config")

    @property
    def config(self) -> Any:
        """Configuration of the text model."""
        return self.base.config.get_text_config()

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def body(self) -> nn.Module:
        """The base model without its head: tokens to hidden states."""
        return text_model(self.base)

    @property
    def head(self) -> nn.Module:
        """The language-model head: hidden states to logits before `squash`.

        Raises:
            UserError: the model has no language-model head.
        """
        head: nn.Module | None = self.base.get_output_embeddings()
        if head is None:
            raise UserError(f"{self.path}: {type(self.base).__name__} has no language-model head; use a causal LM")
        return head

    @property
    def rope_limit(self) -> int | None:
        """Length beyond which rotary frequencies depend on the longest sequence of a batch (longrope)."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # some have one for each layer type
        limits = [one.get("original_max_position_embeddings") for one in kinds if one.get("rope_type") == "longrope"]
        return min((limit for limit in limits if limit), default=None)

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model can read, whatever stands beside it; None without a limit.

        `dynamic` frequencies change beyond `max_position_embeddings` alone.
        """
        limits = [getattr(self.config, "max_position_embeddings", None), self.rope_limit]
        return min((limit for limit in limits if limit), default=None)

    @property
    def squash(self) -> Squash:
        """Scaling and soft cap that the model applies between its head and its logits."""
        scale = getattr(self.config, "logit_scale", None) or 1.0
        for name in DIVISORS:
            scale /= getattr(self.config, name, None) or 1.0
        caps = (getattr(self.config, name, None) for name in CAPS)
        return Squash(scale, next(filter(None, caps), None))

    def blocks(self) -> list[nn.Module]:
        """The decoder layers of the body: the modules that transformers keeps whole (`_no_split_modules`)."""
        names = set(getattr(self.base, "_no_split_modules", None) or ())
        return [module for module in self.body.modules() if type(module).__name__ in names]

    # -- packed batches ----------------------------------------------------------------------------------------------

    def backend(self, device: torch.device) -> str:
        """Name of the attention back-end for packed batches on this device.

        Raises:
            UserError: the configured back-end cannot run on the device.
        """
        config, kind = self.config, device.type
        cap = getattr(config, "attn_logit_softcapping", None)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.dtype
        return choose(device, cap, dtype, self.attention, getattr(config, "head_dim", None))

    def hidden(self, batch: Batch) -> Tensor:
        """The body's last hidden state of each token: [T, H]."""
        if self.attention == "rows":
            return self.hidden_by_rows(batch)
        forest = Forest(batch, self.backend(batch.tokens.device))
        out = self.body(input_ids=batch.tokens[None], position_ids=batch.position[None], use_cache=False, forest=forest)
        return out.last_hidden_state[0]  # type: ignore[no-any-return]

    def hidden_by_rows(self, batch: Batch) -> Tensor:
        """`hidden` from one right-padded row per response, with the attention that the model came with: [T, H]."""
        rows = batch.rows()
        with self.native_attention():
            out = self.body(input_ids=rows.tokens, attention_mask=rows.mask, use_cache=False).last_hidden_state
        return out.flatten(0, 1)[rows.source]  # type: ignore[no-any-return]

    @contextmanager
    def native_attention(self) -> Iterator[None]:
        """Run the model with the attention that it came with, for padded rows."""
        current = self.base.config._attn_implementation
        if current != self.native:
            self.base.set_attn_implementation(self.native)
        try:
            yield
        finally:
            if current != self.native:
                self.base.set_attn_implementation(current)
