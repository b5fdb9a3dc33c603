"""An adapter on an encoder with a classification head, and the classifier that both make in the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

from torch import nn

from leyden.errors import UserError
from leyden.models.load import wrapped

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def with_adapter(model: PreTrainedModel, adapter: PeftConfig, new: Collection[str]) -> PeftModel:
    """A classifier with a new adapter in its body, of which only the adapter is trained, and the head whole.

    Args:
        model: the encoder with its head.
        adapter: of weights; `all-linear` is every linear layer of the body.
        new: names of the weights that started at random, which are trained whole, as the head is.

    Raises:
        UserError: the adapter is none of weights, or does not fit.
    """
    if getattr(adapter, "is_prompt_learning", False):
        raise UserError(
            f"{type(adapter).__name__} adds virtual tokens, which rows of pairs have no place for; use an adapter of "
            "weights such as LoraConfig"
        )
    body = f"{model.base_model_prefix}."
    whole = {name for name, _ in model.named_parameters() if not name.startswith(body) or name in new}
    if getattr(adapter, "target_modules", None) == "all-linear":
        linear = (name for name, part in model.named_modules() if isinstance(part, nn.Linear))
        targets = [name for name in linear if f"{name}.weight" not in whole]
        adapter = dataclasses.replace(adapter, target_modules=targets)
    trained = [parameter for name, parameter in model.named_parameters() if name in whole]
    made = wrapped(model, dataclasses.replace(adapter, task_type=None))
    for parameter in trained:
        parameter.requires_grad_(True)
    return made
