"""A value function beside a policy: an adapter and a head of its own on the very weights that the policy keeps frozen.

Two adapters in one tree of modules would have to be switched at every forward, and gradient checkpointing, which runs
a forward again during the backward pass, would find whichever was switched on last. So the critic has its own tree of
modules, and only the frozen tensors in it are the policy's: nothing is switched, and nothing of the base exists twice.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from leyden.batch import Batch
from leyden.errors import UserError
from leyden.models.reference import adapter_weights

if TYPE_CHECKING:
    from leyden.models.causal_lm import CausalLM


class Critic(nn.Module):
    """Values [T] of the state before each response token, as `Outputs.value`. Without dropout.

    Args:
        policy: a built policy that trains an adapter. Its configuration serves here too, for a new adapter that starts
            as no change.

    Raises:
        UserError: the policy trains more than an adapter, so that the weights below it are not fixed.
    """

    def __init__(self, policy: CausalLM) -> None:
        super().__init__()
        _check(policy)
        self.policy = _beside(policy)
        self.policy.build(("value",), dropout=False)

    def forward(self, batch: Batch) -> Tensor:
        value: Tensor | None = self.policy(batch, {"value"}).value
        assert value is not None
        return value


def _check(policy: CausalLM) -> None:
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    instead = "set --model.value head, or give a model in --model.value_policy"
    if not hasattr(policy.model, "peft_config"):
        raise UserError(f"value adapter: all weights of {policy.path} are trained, so it has no fixed base; {instead}")
    if others := sorted(trained - adapter_weights(policy.model)):
        raise UserError(f"value adapter: more than the adapter is trained ({others[0]}), in the base itself; {instead}")


def _beside(policy: CausalLM) -> CausalLM:
    """A policy with a new adapter on the tensors of this one's base."""
    from peft import get_peft_model

    from leyden.models.causal_lm import CausalLM

    model = copy.deepcopy(policy.model, _shared(policy.model))
    config = copy.deepcopy(model.peft_config[model.active_adapters[0]])
    base: Any = model.unload()
    changes = {"inference_mode": False}
    if hasattr(config, "init_lora_weights"):  # some starts (PiSSA, OLoRA) rewrite the base
        changes["init_lora_weights"] = True
    beside = CausalLM(policy.path, adapter=policy.adapter, attention=policy.attention)  # type: ignore[arg-type]
    beside.dtype, beside.source, beside.positions = policy.dtype, policy.source, policy.positions
    beside._native, beside._tokenizer = policy._native, policy._tokenizer
    beside.model = get_peft_model(base, dataclasses.replace(config, **changes))
    return beside


def _shared(model: nn.Module) -> dict[int, Any]:
    """What a deep copy of a model takes over as it is: its tensors, and what 4-bit weights are unpacked with."""
    states = [m.quant_state for m in model.modules() if getattr(m, "quant_state", None) is not None]
    return {id(x): x for x in (*model.parameters(), *model.buffers(), *states)}
