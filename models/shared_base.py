"""A second model on the frozen weights of a policy: one base, several adapters.

Several adapters in one tree of modules would have to be switched at every forward, and gradient checkpointing, which
runs a forward again during the backward pass, would find whichever was switched on last. So each has its own tree of
modules, and only the frozen tensors in it are the policy's: nothing is switched, and nothing of the base exists twice.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

from leyden.errors import UserError
from leyden.models.load import base_of
from leyden.models.reference import adapter_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from leyden.models.causal_lm import CausalLM


def check_frozen(policy: CausalLM, what: str, instead: str) -> None:
    """That the policy trains an adapter and nothing below it.

    Args:
        what: that wants to share its weights, for messages.
        instead: what to do otherwise.

    Raises:
        UserError: it trains more.
    """
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    if not hasattr(policy.model, "peft_config"):
        raise UserError(f"{what}: all weights of {policy.path} are trained, so it has no fixed base; {instead}")
    if others := sorted(trained - adapter_weights(policy.model)):
        raise UserError(f"{what}: more than the adapter is trained ({others[0]}), in the base itself; {instead}")


def bare(policy: CausalLM) -> PreTrainedModel:
    """The policy's base without its adapter, as modules of their own around the same tensors."""
    model = copy.deepcopy(policy.model, _shared(policy.model))
    base: PreTrainedModel = base_of(model.unload())
    return base


def around(policy: CausalLM, model: nn.Module, path: str) -> CausalLM:
    """A policy that runs `model` the way that another runs its own.

    Args:
        policy: on whose base `model` stands.
        path: where heads and tokenizer of the new one come from.
    """
    from leyden.models.causal_lm import CausalLM

    beside = CausalLM(path, attention=policy.attention)  # type: ignore[arg-type]
    beside.dtype, beside.source, beside.positions = policy.dtype, policy.source, policy.positions
    beside.gradient_checkpointing, beside._native = policy.gradient_checkpointing, policy._native
    beside.model = model
    return beside


def _shared(model: nn.Module) -> dict[int, Any]:
    """What a deep copy of a model takes over as it is: its tensors, and what 4-bit weights are unpacked with."""
    states = [m.quant_state for m in model.modules() if getattr(m, "quant_state", None) is not None]
    return {id(x): x for x in (*model.parameters(), *model.buffers(), *states)}
