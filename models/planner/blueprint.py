"""What a model will be made of, from its configuration alone: it is built without memory for its weights, adapter and
all, by the same code that builds it for training, and then counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from leyden.errors import UserError
from leyden.models.backbone import base_of
from leyden.models.load import add_adapter
from leyden.models.planner.memory import Kept, Shape
from leyden.paths import resolve

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_LINEAR = (nn.Linear, Conv1D)
_DRAWN: dict[tuple[Any, ...], Blueprint] = {}


@dataclass(frozen=True)
class Blueprint:
    """A model in numbers of parameters."""

    shape: Shape
    kept: Kept
    total: int
    """All parameters of the base"""
    quantised: int
    """Those that four bits take"""
    reached: int
    """Those that text reaches, and that are trained where there is no adapter"""
    head: int
    """Those of the language-model head alone, 0 where it is the embedding"""
    adapter: int = 0
    """Those that the adapter trains"""
    doubt: str = ""
    """Why activations are a guess, if they are"""


def blueprint(
    path: str,
    adapter: PeftConfig | None = None,
    keep: Sequence[str] = (),
    flag: str = "model.policy.path",
    **source: Any,
) -> Blueprint:
    """The model at `path`, or the one that the adapter there stands on. Drawn once, however often it is asked for.

    Args:
        path: hub name, folder of a model or of an adapter, or `tiny`.
        adapter: a new adapter.
        keep: parts of names of layers that four bits leave alone, as QLoRAPrecision takes them.
        flag: what the path was given by, for messages.
        source: revision and trust_remote_code, as `CausalLM` takes them.

    Raises:
        UserError: its configuration cannot be read or is of no causal language model, or the adapter does not fit.
    """
    stored = _stored(resolve(path)) if adapter is None else None
    if stored is not None:
        path, adapter = stored.base_model_name_or_path or "", stored
    place = Path(resolve(path))
    options = str(place.absolute()) if place.is_dir() else path, flag, tuple(sorted(source.items()))
    key = (*options, repr(adapter), tuple(keep))
    if key not in _DRAWN:
        model = _blank(*options)
        bare = _count(model, keep)
        _DRAWN[key] = bare if adapter is None else _adapted(bare, model, adapter)
    return _DRAWN[key]


def base_path(path: str) -> str:
    """Where the weights below an adapter's folder come from; the path itself where there is no adapter."""
    stored = _stored(resolve(path))
    return path if stored is None else stored.base_model_name_or_path or path


def _stored(folder: str) -> PeftConfig | None:
    from peft import PeftConfig

    if not (Path(folder) / "adapter_config.json").is_file():
        return None
    found: PeftConfig = PeftConfig.from_pretrained(folder)
    found.inference_mode = False
    if found.task_type == "SEQ_CLS":  # a reward model, whose head is no module of the model
        found.task_type = "CAUSAL_LM"
        found.modules_to_save = [name for name in found.modules_to_save or () if name != "score"] or None
    return found


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
    except (OSError, ValueError) as problem:
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(
            f"{path}: its configuration cannot be read ({reason}); give --{flag} a folder with a config.json, or a hub "
            "name while the hub can be reached"
        ) from problem
    return model


def _count(model: PreTrainedModel, keep: Sequence[str]) -> Blueprint:
    body, head = model.get_decoder(), model.get_output_embeddings()
    if head is None:
        raise UserError(f"{model.config.name_or_path}: {type(model).__name__} has no language-model head")
    linear = [module for module in body.modules() if isinstance(module, _LINEAR)]
    inside = {id(parameter) for parameter in body.parameters()}
    own = sum(p.numel() for p in head.parameters() if id(p) not in inside)
    largest = max((module.weight.numel() for module in linear), default=0)
    numbers = {"linear": sum(module.weight.numel() for module in linear), "largest": largest}
    part = _decoder_layer(model)
    return Blueprint(
        _shape(model, part, numbers),
        _whole(part),
        sum(p.numel() for p in model.parameters()),
        _quantised(model, keep),
        sum(p.numel() for p in body.parameters()) + own,
        own,
        doubt=_doubt(model.config.get_text_config(), part),
    )


def _doubt(config: Any, part: nn.Module) -> str:
    """What of a model the formulas do not know."""
    attention, mlp = _halves(part)
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return "this is a mixture of experts, whose activations are not known, so those given are a guess"
    if not attention or not mlp:
        return "the layers of this model are of a kind that is not known, so its activations are a guess"
    if getattr(config, "attn_logit_softcapping", None):
        return "soft-capped attention keeps the scores of all pairs of tokens on a processor, which are not counted"
    return ""


def _quantised(model: PreTrainedModel, keep: Sequence[str]) -> int:
    """Parameters that transformers stores in four bits when it is asked as `leyden.models.quantized` asks."""
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    left = ["lm_head", *keep] if keep else get_keys_to_not_convert(model)
    plain = (Conv1D, nn.Linear)
    found = ((name, m) for name, m in model.named_modules() if type(m) in plain and should_convert_module(name, left))
    return sum(module.weight.numel() for _, module in found)  # type: ignore[union-attr]


def _decoder_layer(model: PreTrainedModel) -> nn.Module:
    """One of the layers that a model repeats: the first of its longest list of modules."""
    lists = [module for module in base_of(model).get_decoder().modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=len, default=None)
    if not longest:
        raise UserError(
            f"{model.config.name_or_path}: {type(model).__name__} repeats no layers, so nothing is known of it"
        )
    return longest[0]


def _shape(model: PreTrainedModel, part: nn.Module, numbers: dict[str, int]) -> Shape:
    config: Any = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = (getattr(config, "num_key_value_heads", None) or heads) * width
    outer, last = _mlp(part)
    inner = sum(_width(module)[0] for module in last)
    norms, per_head = _norms(part, width, config.hidden_size)
    counts = [keys // width if "k_" in name else heads for name in per_head]
    gated = sum(_width(module)[1] for module in outer) >= 2 * inner > 0
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        heads * width,
        keys,
        inner,
        gated,
        sum(norms),
        width * sum(counts),
        len(norms) + sum(counts),
        model.get_output_embeddings().weight.shape[0],
        **numbers,
    )


def _norms(part: nn.Module, width: int, hidden: int) -> tuple[list[int], list[str]]:
    """Widths of a layer's norms of hidden states, and names of its norms of single heads."""
    wholes, heads = list[int](), list[str]()
    for name, module in part.named_modules():
        size = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 1)
        if type(module).__name__.endswith("Norm") and size:
            size //= len(list(module.parameters(recurse=False)))
            if size == width != hidden:
                heads.append(name.rpartition(".")[2])
            else:
                wholes.append(size)
    return wholes, heads


def _width(module: nn.Module) -> tuple[int, int]:
    """Numbers that a linear layer takes and gives."""
    weight: Any = module.weight
    gives, takes = weight.shape if isinstance(module, nn.Linear) else reversed(weight.shape)
    return int(takes), int(gives)


def _halves(part: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, nn.Module]]]:
    """The linear layers of attention and the others of a decoder layer, by name and in their order: the last one of
    each reads what the others made."""
    found = [(name, m) for name, m in part.named_modules() if isinstance(m, _LINEAR) and "lora_" not in name]
    attention = [pair for pair in found if "att" in pair[0].lower()]
    return attention, [pair for pair in found if pair not in attention]


def _mlp(part: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    _, mlp = _halves(part)
    return [module for _, module in mlp[:-1]], [module for _, module in mlp[-1:]]


def _whole(part: nn.Module) -> Kept:
    """All linear layers are trained."""
    attention, mlp = _halves(part)
    return Kept(max(0, len(attention) - 1), min(1, len(attention)), max(0, len(mlp) - 1), min(1, len(mlp)))


def _adapted(bare: Blueprint, model: PreTrainedModel, adapter: PeftConfig) -> Blueprint:
    """The same with an adapter, which alone is trained."""
    model.requires_grad_(False)
    trained = sum(p.numel() for p in add_adapter(model, adapter).parameters() if p.requires_grad)
    part = _decoder_layer(model)
    halves = [[name.endswith(".base_layer") for name, _ in half] for half in _halves(part)]
    ranks = sum(_width(m)[1] for name, m in part.named_modules() if ".lora_A." in name and isinstance(m, nn.Linear))
    counts = [(sum(half[:-1]), int(half[-1])) if half else (0, 0) for half in halves]
    dropout = bool(getattr(adapter, "lora_dropout", 0.0))
    kept = Kept(*counts[0], *counts[1], norms=False, ranks=max(ranks, 1), dropout=dropout)
    return replace(bare, kept=kept, adapter=trained)
