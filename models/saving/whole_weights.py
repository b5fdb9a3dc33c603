"""All weights of a model under the names of its folder, whole, and only a block of them at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from leyden.distributed import full_tensor
from leyden.models import quantized
from leyden.models.backbone import Backbone

Entry = tuple[str, Tensor, nn.Module]
"""Name in the plain model, weight, and the module that holds it"""
_BLOCK = re.compile(r"^.*?\.\d+\.")
"""What the names of a block's weights begin with: `model.layers.3.`"""


def whole_weights(backbone: Backbone) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the model without its adapter, as `from_pretrained` finds them in a folder: four-bit layers by
    their values, sharded weights put together, a tied head left out.

    Weights of one block exist whole at a time, so that a model that fits no single device can be sent. A collective
    where weights are sharded: every process has to run it to the end.
    """
    base, conversions = backbone.base, conversions_of(backbone.base)
    holder = SimpleNamespace(_weight_conversions=conversions, config=base.config)
    for block in blocks(base):
        state = {name: _values(weight, module) for name, weight, module in block}
        if conversions:
            from transformers.core_model_loading import revert_weight_conversion

            state = revert_weight_conversion(holder, state)  # type: ignore[arg-type]
        yield from state.items()


def conversions_of(base: Any) -> list[Any]:
    """How the model's own weights were made from those of a folder, where that can be undone: experts that are kept
    together, names of older versions."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    known = getattr(base, "_weight_conversions", None)
    if known is None:
        known = get_model_conversion_mapping(base, add_legacy=False)
        known = [one for one in known if type(one).__name__ != "PrefixChange"]  # unknown whether the folder had it
    return [one for one in known if quantized.reversible(one)]


def blocks(base: nn.Module) -> Iterator[list[Entry]]:
    """The weights block by block, and those outside of blocks together."""
    found: dict[str, list[Entry]] = {}
    for entry in entries(base):
        match = _BLOCK.match(entry[0])
        found.setdefault(match[0] if match else "", []).append(entry)
    yield from found.values()


def entries(base: nn.Module) -> Iterator[Entry]:
    """Every parameter and buffer that a folder holds, once; those of adapters are left out."""
    seen: set[int] = set()
    for path, module in base.named_modules():
        buffers = {k: x for k, x in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for kind, weight in [*module._parameters.items(), *buffers.items()]:
            name = f"{path}.{kind}" if path else kind
            if weight is None or id(weight) in seen or ".lora_" in name or ".modules_to_save." in name:
                continue
            seen.add(id(weight))
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), weight, module


def _values(weight: Tensor, module: nn.Module) -> Tensor:
    whole = full_tensor(weight.detach())
    state = getattr(module, "quant_state", None)
    if state is None or weight is not module._parameters.get("weight"):
        return whole
    return quantized.unpacked_by(whole, state)
