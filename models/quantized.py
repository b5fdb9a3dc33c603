"""Four-bit weights: how they are asked for, made safe to train over, counted, and unpacked again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from leyden.errors import UserError
from leyden.precision import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def loading(spec: Quantization | None) -> dict[str, Any]:
    """What `from_pretrained` is told, so that it quantises every layer as it is read."""
    if spec is None:
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.kind,
        bnb_4bit_use_double_quant=spec.double,
        bnb_4bit_compute_dtype=spec.compute,
        llm_int8_skip_modules=["lm_head", *spec.keep] if spec.keep else None,  # None finds the heads itself
    )
    return {"quantization_config": config, "device_map": {"": spec.device}}


def layers(model: nn.Module) -> Iterator[Any]:
    """The layers of a model that are stored in four bits."""
    return (module for module in model.modules() if getattr(module, "quant_state", None) is not None)


def finish(model: PreTrainedModel, spec: Quantization | None) -> None:
    """Make a loaded model's four-bit layers fit to train adapters over.

    Raises:
        UserError: four bits were asked for, and the model has no layer that takes them.
    """
    found = [module for module in model.modules() if type(getattr(module, "weight", None)).__name__ == "Params4bit"]
    for layer in found:
        # FSDP puts a plain tensor in the weight's place, and then it is asked of the layer
        layer.quant_state = layer.weight.quant_state
        # else the first evaluation lays the weights out anew in place: rounded otherwise, and without gradients
        layer.support_avx512bf16_for_cpu = False
        if spec is not None:
            layer.compute_dtype, layer.compute_type_is_set = spec.compute, True
    if spec is None:
        return
    if not found:
        raise UserError(
            f"{model.config.name_or_path}: {type(model).__name__} has no linear layer that could be stored in four "
            "bits; leave QLoRAPrecision out, or use another model"
        )
    model.requires_grad_(False)


def unpacked(weight: Tensor) -> Tensor:
    """A four-bit weight as the numbers that are computed with, in the dtype it was quantised from."""
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
    return found
