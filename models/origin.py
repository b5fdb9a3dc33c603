"""What weights a policy was built from, so that a checkpoint is not put on top of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.fingerprint import of_weights
from leyden.models.reference import adapter_weights

if TYPE_CHECKING:
    from leyden.models.causal_lm import CausalLM


def origin(policy: CausalLM) -> str:
    """A hash of the weights as a folder gave them: the base, an adapter that is trained on, heads that were there. New
    adapters and heads start at random and are left out, and names are those without one: the same model is the same
    with an adapter over it."""
    model = policy.model
    new = adapter_weights(model) if policy.adapter is not None and hasattr(model, "peft_config") else set()
    heads = {f"heads.{name}." for name in policy.fresh}
    return of_weights(
        (name.replace("base_model.model.", "").replace(".base_layer.", "."), weight)
        for name, weight in policy.named_parameters()
        if name.removeprefix("model.") not in new and not any(name.startswith(head) for head in heads)
    )
