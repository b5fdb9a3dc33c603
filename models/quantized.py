"""Quantised layers: loading in four bits, preparation for training adapters, listing and unpacking."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leyden.errors import UserError, first_line
from leyden.precision import Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def loading(spec: Quantization | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise every layer as it is loaded; none without a specification."""
    if spec is None:
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.kind,
        bnb_4bit_use_double_quant=spec.double,
        bnb_4bit_compute_dtype=spec.compute,
        llm_int8_skip_modules=["lm_head", *spec.keep] if spec.keep else None,  # with None transformers finds the heads
    )
    return {"quantization_config": config, "device_map": {"": spec.device}}


def is_stored(folder: str, revision: str | None = None) -> bool:
    """Whether the weights in a folder or under a hub name are quantised as they are stored."""
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(folder, revision=revision)
    except (OSError, ValueError):
        return False
    return bool(config.get("quantization_config"))


def check_float(path: str, folder: str, revision: str | None) -> None:
    """That the weights of a model are not stored quantised: such weights have no gradients of their own.

    Args:
        path: of the model, as it was typed.
        folder: or hub name that its configuration is read from.

    Raises:
        UserError: they are.
    """
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(folder, revision=revision)
    except (OSError, ValueError):  # loading it will raise the error
        return
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "in a way of its own")
        raise UserError(
            f"{path}: its weights are quantised already ({method}) and cannot be trained; add --config lora to train "
            "an adapter over them, or give the model that they were made from"
        )


def layers(model: nn.Module) -> Iterator[Any]:
    """The quantised layers of a model, stored in four bits."""
    return (module for module in model.modules() if getattr(module, "quant_state", None) is not None)


def finish(model: PreTrainedModel, spec: Quantization | None) -> None:
    """Prepare the quantised layers of a loaded model for the training of adapters.

    Raises:
        UserError: four bits are configured, and the model has no layer that can be quantised.
    """
    four_bit = [module for module in model.modules() if type(getattr(module, "weight", None)).__name__ == "Params4bit"]
    if any(layer.weight.device.type == "cpu" for layer in four_bit):
        unpack_across_rows()
    for layer in four_bit:
        # FSDP replaces the weight by a plain tensor, after which the quantisation state is read from the layer
        layer.quant_state = layer.weight.quant_state
        # else the first evaluation repacks the weights in place, with other rounding and without gradients
        layer.support_avx512bf16_for_cpu = False
        if spec is not None:
            layer.compute_dtype, layer.compute_type_is_set = spec.compute, True
    if spec is None:
        return
    if not four_bit:
        raise UserError(
            f"{model.config.name_or_path}: {type(model).__name__} has no linear layer that could be stored in four "
            "bits; leave QLoRAPrecision out, or use another model"
        )
    model.requires_grad_(False)


_mended: list[torch.library.Library | None] = []
"""What holds the mend in place for the rest of the process; None where nothing had to be mended."""
_mending = threading.Lock()


def unpack_across_rows() -> None:
    """Mend bitsandbytes' kernel for processors with AVX-512 (0.50.2) where it is wrong: it takes every row of a matrix
    to begin a block of values, but blocks go on from row to row. Such matrices are unpacked as one long row."""
    with _mending:
        if not _mended:
            _mended.append(_mend())


def _mend() -> torch.library.Library | None:
    from bitsandbytes.functional import quantize_4bit

    # two rows to a block, on the processor, which need not be the default device while a model is built
    weight = torch.arange(1, 129, dtype=torch.float32, device="cpu").view(4, 32)
    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    asked = packed, state.absmax, 64, "nf4", weight.shape, torch.float32
    usual = torch.library.get_kernel("bitsandbytes::dequantize_4bit", "CPU")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

    def unpack(x: Tensor, absmax: Tensor, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        rows = list(shape) if shape[-1] % block == 0 else [math.prod(shape)]
        return usual.call_boxed(key, x, absmax, block, kind, rows, dtype).reshape(shape)  # type: ignore[no-any-return]

    if torch.equal(usual.call_boxed(key, *asked), unpack(*asked)):
        return None
    library = torch.library.Library("bitsandbytes", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there was a kernel before
        library.impl("dequantize_4bit", unpack, "CPU", allow_override=True)  # type: ignore[no-untyped-call]
    return library


def unpacked_model(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose layers of few bits are plain ones, with the values of their weights.

    Raises:
        UserError: they are stored in a form whose values cannot be read.
    """
    if getattr(model.config, "quantization_config", None) is None:
        return model
    try:
        plain: PreTrainedModel = model.dequantize()
    except (AttributeError, RuntimeError, ImportError) as error:
        reason = first_line(error)
        raise UserError(
            f"{model.config.name_or_path}: its weights are quantised in a form that no adapter can be merged into "
            f"({reason}); use the adapter over it as it is, or --base the model that it was quantised from"
        ) from error
    conversions = [one for one in getattr(plain, "_weight_conversions", None) or () if reversible(one)]
    plain._weight_conversions = conversions or None  # saving reverses them, and needs none for packed weights
    for holder in (plain, plain.config):
        for name in ("quantization_config", "hf_quantizer", "_pre_quantization_dtype"):
            if hasattr(holder, name):
                delattr(holder, name)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(plain, name, False)
    plain.config.dtype = dtype
    return plain.to(dtype)


def reversible(conversion: Any) -> bool:
    """Whether what a conversion did to weights as they were loaded can be undone."""
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def unpacked(weight: Tensor) -> Tensor:
    """The values of a four-bit weight, in the dtype that it was quantised from."""
    return unpacked_by(weight.data, weight.quant_state)  # type: ignore[attr-defined]


def unpacked_by(packed: Tensor, state: Any) -> Tensor:
    """The same from the bytes of a weight and its quantisation state."""
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(packed, state)
    return values
