"""A second model on the frozen weights of another: one base, several adapters.

Several adapters in one tree of modules would have to be switched at every forward, and gradient checkpointing, which
runs a forward again during the backward pass, would find whichever was switched on last. So each has its own tree of
modules, and only the frozen tensors in it are the policy's: nothing is switched, and nothing of the base exists twice.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from torch import nn

from leyden.errors import UserError
from leyden.models.backbone import Backbone, base_of
from leyden.models.reference import adapter_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_frozen(backbone: Backbone, what: str, instead: str) -> None:
    """That a model trains an adapter and nothing below it.

    Args:
        what: that wants to share its weights, for messages.
        instead: what to do otherwise.

    Raises:
        UserError: it trains more.
    """
    trained = {name for name, p in backbone.model.named_parameters() if p.requires_grad}
    if not backbone.adapted:
        raise UserError(f"{what}: all weights of {backbone.path} are trained, so it has no fixed base; {instead}")
    if others := sorted(trained - adapter_weights(backbone.model)):
        raise UserError(f"{what}: more than the adapter is trained ({others[0]}), in the base itself; {instead}")


def without_adapter(backbone: Backbone) -> PreTrainedModel:
    """The base without its adapter, as modules of their own around the same tensors."""
    model = copy.deepcopy(backbone.model, _shared(backbone.model))
    unloaded: Any = model
    base: PreTrainedModel = base_of(unloaded.unload())
    return base


def with_new_adapter(backbone: Backbone) -> nn.Module:
    """The base with another adapter, of the same configuration, which starts as no change."""
    from peft import get_peft_model

    model: Any = backbone.model
    config = copy.deepcopy(model.peft_config[model.active_adapters[0]])
    changes: dict[str, Any] = {"inference_mode": False}
    if hasattr(config, "init_lora_weights"):  # some starts (PiSSA, OLoRA) rewrite the base
        changes["init_lora_weights"] = True
    adapted: nn.Module = get_peft_model(without_adapter(backbone), dataclasses.replace(config, **changes))
    return adapted


def _shared(model: nn.Module) -> dict[int, Any]:
    """What a deep copy of a model takes over as it is: its tensors, and what 4-bit weights are unpacked with."""
    states = [m.quant_state for m in model.modules() if getattr(m, "quant_state", None) is not None]
    return {id(x): x for x in (*model.parameters(), *model.buffers(), *states)}
