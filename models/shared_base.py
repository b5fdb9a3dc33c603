"""Several models on one frozen base, each with its own adapter.

Several adapters in one tree of modules would have to be switched at every forward pass, and gradient checkpointing,
which repeats a forward pass during the backward pass, would use the adapter that was switched on last. So each model
has its own tree of modules around the policy's frozen tensors: nothing is switched, and no base weight exists twice.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn

from leyden.errors import UserError
from leyden.models import quantized
from leyden.models.backbone import Backbone, base_of
from leyden.models.reference import adapter_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_frozen(backbone: Backbone, what: str, instead: str) -> None:
    """Check that a model trains an adapter and nothing of its base.

    Args:
        what: the feature that shares the base, for messages.
        instead: advice for the user, for messages.

    Raises:
        UserError: the model trains more than an adapter.
    """
    trained = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    if not backbone.adapted:
        raise UserError(f"{what}: all weights of {backbone.path} are trained, so it has no fixed base; {instead}")
    if others := sorted(trained - adapter_weights(backbone.model)):
        raise UserError(f"{what}: more than the adapter is trained ({others[0]}), in the base itself; {instead}")


def without_adapter(backbone: Backbone) -> PreTrainedModel:
    """The base model without its adapter: new modules around the same tensors."""
    model = copy.deepcopy(backbone.model, _shared(backbone.model))
    adapted: Any = model
    base: PreTrainedModel = base_of(adapted.unload())
    return base


def with_new_adapter(backbone: Backbone) -> nn.Module:
    """The base model with another adapter of the same configuration, which starts as the identity."""
    from peft import get_peft_model

    model: Any = backbone.model
    config = copy.deepcopy(model.peft_config[model.active_adapters[0]])
    changes: dict[str, Any] = {"inference_mode": False}
    if hasattr(config, "init_lora_weights"):  # some initialisations (PiSSA, OLoRA) change the base
        changes["init_lora_weights"] = True
    adapted: nn.Module = get_peft_model(without_adapter(backbone), dataclasses.replace(config, **changes))
    return adapted


def _shared(model: nn.Module) -> dict[int, Any]:
    """Objects that a deep copy of a model shares with it, by id: its tensors, and the states of its 4-bit weights."""
    states = [layer.quant_state for layer in quantized.layers(model)]
    return {id(x): x for x in (*model.parameters(), *model.buffers(), *states)}
