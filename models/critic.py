"""A value function beside a policy: an adapter and a head of its own on the weights that the policy keeps frozen."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor, nn

from leyden.batch.forest import Batch
from leyden.models.shared_base import around, bare, check_frozen

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
        check_frozen(policy, "value adapter", "set --model.value head, or give a model in --model.value_policy")
        self.policy = _beside(policy)
        self.policy.build(("value",), dropout=False)

    def forward(self, batch: Batch) -> Tensor:
        value: Tensor | None = self.policy(batch, {"value"}).value
        assert value is not None
        return value


def _beside(policy: CausalLM) -> CausalLM:
    """A policy with a new adapter on the tensors of this one's base."""
    from peft import get_peft_model

    config = copy.deepcopy(policy.model.peft_config[policy.model.active_adapters[0]])
    changes = {"inference_mode": False}
    if hasattr(config, "init_lora_weights"):  # some starts (PiSSA, OLoRA) rewrite the base
        changes["init_lora_weights"] = True
    model = get_peft_model(bare(policy), dataclasses.replace(config, **changes))
    beside = around(policy, model, policy.path)
    beside.adapter, beside._tokenizer = policy.adapter, policy._tokenizer
    return beside
