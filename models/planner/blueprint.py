"""The blueprint of a model: its numbers of parameters, from its configuration alone.

The model is built by the same code as for training, adapter included, but without memory for its weights. Then its
parameters are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from leyden.errors import UserError, first_line
from leyden.models.backbone import base_of
from leyden.models.load import add_adapter, text_model
from leyden.models.planner.memory import Kept, Shape
from leyden.paths import resolve

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_LINEAR = (nn.Linear, Conv1D)
_BLUEPRINTS: dict[tuple[Any, ...], Blueprint] = {}


@dataclass(frozen=True)
class Blueprint:
    """Numbers of parameters of a model."""

    shape: Shape
    kept: Kept
    total: int
    """All parameters of the base model"""
    quantised: int
    """Parameters of layers that can be quantised"""
    reached: int
    """Parameters that text reaches; these are trained where there is no adapter"""
    head: int
    """Parameters of the language-model head alone, 0 where it is tied to the embedding"""
    adapter: int = 0
    """Trained parameters of the adapter"""
    doubt: str = ""
    """Reason why the activation memory is a guess, if it is"""


def blueprint(
    path: str,
    adapter: PeftConfig | None = None,
    keep: Sequence[str] = (),
    flag: str = "model.policy.path",
    **source: Any,
) -> Blueprint:
    """Blueprint of the model at `path`, or of the base model of the adapter there. Cached after the first call.

    Args:
        path: hub name, folder of a model or of an adapter, or `tiny`.
        adapter: a new adapter.
        keep: parts of names of layers that are not quantised, as QLoRAPrecision takes them.
        flag: the flag that set the path, for messages.
        source: revision and trust_remote_code, as `CausalLM` takes them.

    Raises:
        UserError: the configuration cannot be read or is not that of a causal language model, or the adapter does not
            fit.
    """
    stored = _stored(resolve(path)) if adapter is None else None
    if stored is not None:
        path, adapter = stored.base_model_name_or_path or "", stored
    folder = Path(resolve(path))
    arguments = str(folder.absolute()) if folder.is_dir() else path, flag, tuple(sorted(source.items()))
    key = (*arguments, repr(adapter), tuple(keep))
    if key not in _BLUEPRINTS:
        model = _blank(*arguments)
        bare = _count(model, keep)
        _BLUEPRINTS[key] = bare if adapter is None else _adapted(bare, model, adapter)
    return _BLUEPRINTS[key]


def base_path(path: str) -> str:
    """Path of the base model of an adapter's folder; the path itself if there is no adapter."""
    stored = _stored(resolve(path))
    return path if stored is None else stored.base_model_name_or_path or path


def _stored(folder: str) -> PeftConfig | None:
    from peft import PeftConfig

    if not (Path(folder) / "adapter_config.json").is_file():
        return None
    config: PeftConfig = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    if config.task_type == "SEQ_CLS":  # a reward model, whose head is not part of the model
        config.task_type = "CAUSAL_LM"
        config.modules_to_save = [name for name in config.modules_to_save or () if name != "score"] or None
    return config


def _blank(path: str, flag: str, source: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    """The model without memory for its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {name: value for name, value in source if value}
    try:
        config = AutoConfig.from_pretrained(resolve(path), **options)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=bool(options.get("trust_remote_code"))
            )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"{path}: its configuration cannot be read ({reason}); give --{flag} a folder with a config.json, or a hub "
            "name while the hub can be reached"
        ) from error
    return model


def _count(model: PreTrainedModel, keep: Sequence[str]) -> Blueprint:
    body, head = text_model(model), model.get_output_embeddings()
    if head is None:
        raise UserError(f"{model.config.name_or_path}: {type(model).__name__} has no language-model head")
    linear = [module for module in body.modules() if isinstance(module, _LINEAR)]
    body_ids = {id(parameter) for parameter in body.parameters()}
    head_size = sum(p.numel() for p in head.parameters() if id(p) not in body_ids)
    largest = max((module.weight.numel() for module in linear), default=0)
    numbers = {"linear": sum(module.weight.numel() for module in linear), "largest": largest}
    layer = _decoder_layer(model)
    return Blueprint(
        _shape(model, layer, numbers),
        _all_trained(layer),
        sum(p.numel() for p in model.parameters()),
        _quantised(model, keep),
        sum(p.numel() for p in body.parameters()) + head_size,
        head_size,
        doubt=_uncovered(model.config.get_text_config(), layer),
    )


def _uncovered(config: Any, layer: nn.Module) -> str:
    """Part of a model that the formulas do not cover, as a note; empty if there is none."""
    attention, mlp = _attention_and_mlp(layer)
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "this is a mixture of experts, whose activations are not known, so those given are a guess"
    if not attention or not mlp:
        return "the layers of this model are of a kind that is not known, so its activations are a guess"
    if getattr(config, "attn_logit_softcapping", None):
        return "soft-capped attention keeps the scores of all pairs of tokens on a processor, which are not counted"
    return ""


def _quantised(model: PreTrainedModel, keep: Sequence[str]) -> int:
    """Number of parameters that transformers stores in four bits with the options of `leyden.models.quantized`."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = ["lm_head", *keep] if keep else get_keys_to_not_convert(model)
    kinds = (Conv1D, nn.Linear)
    linear = (
        (name, m) for name, m in model.named_modules() if type(m) in kinds and should_convert_module(name, skipped)
    )
    return sum(module.weight.numel() for _, module in linear)  # type: ignore[union-attr]


def _decoder_layer(model: PreTrainedModel) -> nn.Module:
    """A decoder layer of the model: the first module of its longest list of modules."""
    lists = [module for module in text_model(base_of(model)).modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=len, default=None)
    if not longest:
        raise UserError(
            f"{model.config.name_or_path}: {type(model).__name__} repeats no layers, so nothing is known of it"
        )
    return longest[0]


def _shape(model: PreTrainedModel, layer: nn.Module, numbers: dict[str, int]) -> Shape:
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_width = (getattr(config, "num_key_value_heads", None) or heads) * width
    mlp_inputs, mlp_output = _mlp(layer)
    inner = sum(_widths(module)[0] for module in mlp_output)
    norms, per_head = _norms(layer, width, config.hidden_size)
    counts = [key_width // width if "k_" in name else heads for name in per_head]
    gated = sum(_widths(module)[1] for module in mlp_inputs) >= 2 * inner > 0
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        heads * width,
        key_width,
        inner,
        gated,
        sum(norms),
        width * sum(counts),
        len(norms) + sum(counts),
        model.get_output_embeddings().weight.shape[0],
        **numbers,
    )


def _norms(layer: nn.Module, width: int, hidden: int) -> tuple[list[int], list[str]]:
    """Widths of a decoder layer's norms of hidden states, and names of its norms of single heads."""
    widths, heads = list[int](), list[str]()
    for name, module in layer.named_modules():
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 1)
        if type(module).__name__.endswith("Norm") and size:
            size //= len(list(module.parameters(recurse=False)))
            if size == width != hidden:
                heads.append(name.rpartition(".")[2])
            else:
                widths.append(size)
    return widths, heads


def _widths(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear layer."""
    weight: Any = module.weight
    outputs, inputs = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
    return int(inputs), int(outputs)


def _attention_and_mlp(layer: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, nn.Module]]]:
    """Linear layers of attention and of the MLP in a decoder layer, with names, in order. The last one of each part
    reads the results of the others."""
    linear = [(name, m) for name, m in layer.named_modules() if isinstance(m, _LINEAR) and "lora_" not in name]
    attention = [pair for pair in linear if "att" in pair[0].lower()]
    return attention, [pair for pair in linear if pair not in attention]


def _mlp(layer: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    _, mlp = _attention_and_mlp(layer)
    return [module for _, module in mlp[:-1]], [module for _, module in mlp[-1:]]


def _all_trained(layer: nn.Module) -> Kept:
    """Kept inputs where all linear layers of a decoder layer are trained."""
    attention, mlp = _attention_and_mlp(layer)
    return Kept(max(0, len(attention) - 1), min(1, len(attention)), max(0, len(mlp) - 1), min(1, len(mlp)))


def _adapted(bare: Blueprint, model: PreTrainedModel, adapter: PeftConfig) -> Blueprint:
    """The blueprint with an adapter, which alone is trained."""
    model.requires_grad_(False)
    trained = sum(p.numel() for p in add_adapter(model, adapter).parameters() if p.requires_grad)
    layer = _decoder_layer(model)
    halves = [[name.endswith(".base_layer") for name, _ in half] for half in _attention_and_mlp(layer)]
    ranks = sum(_widths(m)[1] for name, m in layer.named_modules() if ".lora_A." in name and isinstance(m, nn.Linear))
    counts = [(sum(half[:-1]), int(half[-1])) if half else (0, 0) for half in halves]
    dropout = bool(getattr(adapter, "lora_dropout", 0.0))
    kept = Kept(*counts[0], *counts[1], norms=False, ranks=max(ranks, 1), dropout=dropout)
    return replace(bare, kept=kept, adapter=trained)
