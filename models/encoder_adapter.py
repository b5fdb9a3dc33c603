"""An adapter on an encoder with a classification head."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from torch import Tensor

from leyden.errors import UserError, first_line
from leyden.models.load import wrapped

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def with_adapter(model: PreTrainedModel, adapter: PeftConfig, new: Collection[str]) -> PeftModel:
    """A classifier with a new adapter in its body. Only the adapter and the whole head are trained.

    Args:
        model: the encoder with its head.
        adapter: of weights; layers of the head that it names are left out.
        new: names of the weights that started at random, which are trained whole, as the head is.

    Raises:
        UserError: it is not an adapter of weights, it does not fit, or it cannot be merged.
    """
    kind = type(adapter).__name__
    if getattr(adapter, "is_prompt_learning", False):
        raise UserError(
            f"{kind} adds virtual tokens, which rows of pairs have no place for; use an adapter of weights such as "
            "LoraConfig"
        )
    body = f"{model.base_model_prefix}."
    whole = {name for name, _ in model.named_parameters() if not name.startswith(body) or name in new}
    trained = [parameter for name, parameter in model.named_parameters() if name in whole]
    made = wrapped(model, dataclasses.replace(adapter, task_type=None, **_left_out(model, adapter, whole)))
    _check_layers(made, kind, whole)
    for parameter in trained:
        parameter.requires_grad_(True)
    return made


def merged(model: PreTrainedModel, adapter: PeftConfig, new: Collection[str], state: dict[str, Tensor]) -> Any:
    """The classifier with these weights of body, adapter and head, as one without an adapter.

    Args:
        model: a classifier with the adapter in it, which is left as it is.
        adapter: the adapter's settings.
        new: as for `with_adapter`.
        state: the weights of `model`, whole.
    """
    bare: Any = type(model)(copy.deepcopy(model.config))
    bare._weight_conversions = getattr(model, "_weight_conversions", None)  # maps names in files, if they differ
    if hasattr(adapter, "init_lora_weights"):
        adapter = dataclasses.replace(adapter, init_lora_weights=False)  # some ways to begin take long
    made = with_adapter(bare, adapter, new)
    made.get_base_model().load_state_dict(state)
    return made.merge_and_unload()


def _left_out(model: PreTrainedModel, adapter: PeftConfig, whole: Collection[str]) -> dict[str, Any]:
    """Arguments of the adapter that keep it from what is trained whole, and keep PEFT from making a copy of that."""
    inside = [
        name
        for name, part in model.named_modules()
        if {f"{name}.{own}" for own, _ in part.named_parameters()} & {*whole}
    ]
    changed: dict[str, Any] = {}
    if hasattr(adapter, "exclude_modules"):  # as a pattern, since names of a list stand for all that end like them
        given, ours = adapter.exclude_modules or [], [re.escape(name) for name in inside if name]
        asked = [given] if isinstance(given, str) else [rf"(?:.*\.)?{re.escape(name)}" for name in given]
        changed["exclude_modules"] = "|".join(f"(?:{one})" for one in (*asked, *ours))
    if saved := getattr(adapter, "modules_to_save", None):
        changed["modules_to_save"] = [
            name for name in saved if not any(f".{one}".endswith(f".{name}") for one in inside)
        ]
    return changed


def _check_layers(made: PeftModel, kind: str, whole: Collection[str]) -> None:
    """Refuse an adapter in what is trained whole, or one that PEFT cannot merge after training. Raises `UserError`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: part for name, part in made.get_base_model().named_modules() if isinstance(part, BaseTunerLayer)}
    if inside := [name for name in layers if f"{name}.weight" in whole]:  # not all kinds can be told to leave it out
        raise UserError(
            f"{kind} would adapt {inside[0]}, which is trained whole; name layers of the body in target_modules"
        )
    few = {(type(layer), getattr(layer.get_base_layer(), "bias", None) is None): layer for layer in layers.values()}
    for layer in few.values():
        try:  # PEFT's kinds say in many ways that they cannot
            copy.deepcopy(layer).merge()
        except (NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{kind}: PEFT cannot merge it ({first_line(error)}), and the adapter of an encoder is merged when it "
                "is saved; use LoraConfig"
            ) from error
