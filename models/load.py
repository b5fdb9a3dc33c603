"""Loading of causal language models, with an adapter or in four bits."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from leyden.algorithm.microbatches import out_of_memory
from leyden.data.tokenizer import loading_problem
from leyden.errors import UserError, first_line, nearest
from leyden.models import quantized
from leyden.models.experts import use_grouped
from leyden.paths import resolve
from leyden.precision import asked

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


_LINEAR = (nn.Linear, Conv1D)


def _load(what: str, path: str, loader: Any, **options: Any) -> Any:
    """Call a `from_pretrained`, and turn errors that the user can fix into one line."""
    from safetensors import SafetensorError

    try:
        return loader(resolve(path), **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        advice = "give --model.policy.path a folder with the model, or a hub name while the hub can be reached"
        reason, mend = loading_problem(error, advice)
        raise UserError(f"{path}: its {what} cannot be loaded ({reason}); {mend}") from error


def load_model(
    path: str,
    dtype: torch.dtype,
    adapter: PeftConfig | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    origin: str | None = None,
    unpack: bool = False,
) -> nn.Module:
    """A causal LM with a new adapter, with the adapter in the folder `path`, or without an adapter.

    Without an adapter every weight is trainable; with one, only the adapter is, in fp32. Under QLoRAPrecision linear
    layers are loaded in four bits and frozen.

    Args:
        path: hub name, or folder of a model or an adapter.
        dtype: of the weights.
        adapter: a new adapter; None where there is none, or where `path` is one.
        revision: branch, tag or commit of a hub name.
        trust_remote_code: run code that comes with the model.
        origin: the base model of the adapter at `path`, instead of the one that it names.
        unpack: whether weights that are stored in few bits get their values in `dtype`, to merge into.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # the run has its own progress bar
    options = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    if (Path(resolve(path)) / "adapter_config.json").is_file():
        return _continue_adapter(resolve(path), origin, options, unpack)
    if origin is not None:
        raise UserError(f"{path}: no adapter, so it has no base; leave out --model.policy.base")
    if kind := is_encoder(resolve(path), revision):
        raise UserError(
            f"{path}: an encoder ({kind}), whose tokens see later ones, so it has no answers; for a reward model give "
            "--model.policy Encoder, to score with one --model.reward Classifier"
        )
    base = _base("model", path, is_reward(resolve(path), revision), options)
    if getattr(base, "_hf_peft_config_loaded", False):
        raise UserError(
            f"{path} is an adapter on the hub; download it and give its folder, so that it can be trained on"
        )
    return base if adapter is None else add_adapter(base, adapter)


def _base(what: str, path: str, reward: bool, options: dict[str, Any]) -> PreTrainedModel:
    """The base model at `path`, in four bits under QLoRAPrecision."""
    from transformers import AutoModelForCausalLM

    spec = asked()
    with _quiet(reward):
        base: PreTrainedModel = _load(
            what, path, AutoModelForCausalLM.from_pretrained, **options, **quantized.loading(spec)
        )
    _freeze_unreachable(base)
    use_grouped(base)
    quantized.finish(base, spec)
    return base


def _continue_adapter(path: str, origin: str | None, options: dict[str, Any], unpack: bool) -> nn.Module:
    from peft import PeftConfig

    recorded = origin or PeftConfig.from_pretrained(path).base_model_name_or_path or ""
    try:
        base = _base("base model", recorded, is_reward(resolve(recorded), options["revision"]), options)
    except UserError as error:
        what = "the adapter's base" if origin is None else "--model.policy.base"
        hint = "name its folder, or a hub name, by --model.policy.base" if origin is None else "give another"
        raise UserError(f"{path}: {what} {recorded or '(none is recorded)'} cannot be loaded; {hint}") from error
    return adapter_on(quantized.unpacked_model(base, options["dtype"]) if unpack else base, path)


def check_continued(path: str, adapter: PeftConfig) -> str:
    """What is said where an adapter is asked for and `path` is one already: that one is trained on.

    Raises:
        UserError: they are of different kinds.
    """
    from peft import PeftConfig

    own = PeftConfig.from_pretrained(resolve(path))
    if type(own) is not type(adapter):
        raise UserError(
            f"{path}: an adapter already, of {type(own).__name__}, and {type(adapter).__name__} is asked for; leave "
            "out --model.policy.adapter to go on training it, or merge it (leyden export RUN --merge) and start from "
            "that"
        )
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora")
    rank = f" (r {own.r}, alpha {own.lora_alpha})" if hasattr(own, "lora_alpha") else ""
    pairs = {name: (_plain(getattr(own, name, None)), _plain(getattr(adapter, name, None))) for name in names}
    if isinstance(pairs["target_modules"][1], str):  # `all-linear` or a pattern, which the folder has as names
        del pairs["target_modules"]
    other = [name for name, (mine, theirs) in pairs.items() if mine != theirs]
    kept = f"; its own {', '.join(other)} hold, not those of --model.policy.adapter" if other else ""
    return f"{path}: an adapter already, which is trained on{rank}{kept}"


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | list | tuple) else value


def adapter_on(base: PreTrainedModel, path: str, trained: bool = True) -> nn.Module:
    """A base model with the adapter in the folder `path`."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(path)
    if config.task_type == "SEQ_CLS":  # a reward model: its head belongs to the policy's heads, not to the model
        config.task_type = "CAUSAL_LM"
        config.modules_to_save = [name for name in config.modules_to_save or () if name != "score"] or None
    _grow(base, path)
    try:
        model: nn.Module = PeftModel.from_pretrained(base, path, is_trainable=trained, config=config)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise UserError(
            f"{path}: the adapter does not fit {base.config.name_or_path}, whose weights have other shapes; name the "
            "model that it was trained on by --model.policy.base"
        ) from error
    return model


def _grow(base: PreTrainedModel, path: str) -> None:
    """Give a base the rows of its embedding that an adapter brings for tokens that were added."""
    from safetensors import safe_open

    file, embedding = Path(path) / "adapter_model.safetensors", base.get_input_embeddings()
    if not file.is_file():
        return
    name = next(name for name, module in base.named_modules() if module is embedding)
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118, since it is no dictionary
            if key.removeprefix("base_model.model.").replace(".base_layer.", ".") == f"{name}.weight":
                rows = tensors.get_slice(key).get_shape()[0]
                if rows > embedding.num_embeddings:
                    base.resize_token_embeddings(rows, mean_resizing=False)


def brings_embeddings(path: str) -> bool:
    """Whether the adapter in a folder holds rows of an embedding."""
    from safetensors import safe_open

    file = Path(path) / "adapter_model.safetensors"
    if not file.is_file():
        return True  # unknown
    with safe_open(file, "pt") as tensors:
        return any("embed" in key or ".wte." in key for key in tensors.keys())  # noqa: SIM118, since it is no dictionary


def load_classifier(path: str, dtype: torch.dtype, **source: Any) -> PreTrainedModel:
    """A trained sequence classifier, from safetensors alone.

    Args:
        path: hub name or folder.
        dtype: of the weights.
        source: `revision` and `trust_remote_code`.

    Raises:
        UserError: it cannot be loaded, or has no classification head, which would then be random.
    """
    try:
        model, missing = _classifier(path, dtype=dtype, use_safetensors=True, **source)
    except UserError as error:  # it names the flag of the trained policy
        raise UserError(str(error).replace("--model.policy.", "--model.reward.")) from error
    if missing:
        raise UserError(
            f"{path}: no trained classifier ({min(missing)} is missing), so its scores would be random; give one that "
            "was trained to classify"
        )
    return model


def load_encoder(path: str, dtype: torch.dtype, outputs: int, **source: Any) -> tuple[PreTrainedModel, set[str]]:
    """An encoder with a classification head, and the names of the weights that the folder has not, which start anew.

    Args:
        path: hub name or folder of a pretrained encoder, or of a classifier.
        dtype: of the weights.
        outputs: of the head.
        source: `revision` and `trust_remote_code`.

    Raises:
        UserError: it cannot be loaded, or is another kind of model.
    """
    model, missing = _classifier(path, dtype=dtype, num_labels=outputs, **source)
    body = {f"{model.base_model_prefix}.{name}" for name in model.base_model.state_dict()}
    if not model.base_model.state_dict() or len(body & missing) == len(body):
        raise UserError(f"{path}: none of its weights belong to {type(model).__name__}; give an encoder")
    return model, missing


def is_encoder(path: str, revision: str | None = None) -> str:
    """The type of a model whose tokens see later ones, such as `bert`; empty for other models, and where its
    configuration does not say."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if (Path(path) / "adapter_config.json").is_file():
        return ""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError):  # loading it will raise the error
        return ""
    kind, names = str(config.get("model_type", "")), " ".join(config.get("architectures") or ())
    answers = (
        config.get("is_encoder_decoder") or config.get("is_decoder") or re.search("Causal|LMHead|Generation", names)
    )
    return kind if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not answers else ""


def _classifier(path: str, **options: Any) -> tuple[PreTrainedModel, set[str]]:
    """A sequence classifier, and the names of the weights that its folder has not."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with _quiet(reward=True):
        model, info = _load(
            "classifier", path, AutoModelForSequenceClassification.from_pretrained, output_loading_info=True, **options
        )
    return model, set(info["missing_keys"])


def is_reward(path: str, revision: str | None = None) -> bool:
    """Whether a folder or hub name is declared a sequence classifier, the form in which reward models are stored."""
    from transformers import PreTrainedConfig

    adapter = Path(path) / "adapter_config.json"
    if adapter.is_file():
        return bool(json.loads(adapter.read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS")
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError):  # loading it will raise the error
        return False
    return any("ForSequenceClassification" in name for name in config.get("architectures") or ())


@contextmanager
def _quiet(reward: bool) -> Iterator[None]:
    """Silence transformers' warnings about a reward model's score head, loaded separately, and its missing LM head."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    if reward:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def enable_checkpointing(path: str, model: Any) -> None:
    """Recompute a model's activations in the backward pass. Raises `UserError` where it cannot."""
    if not model.supports_gradient_checkpointing:
        raise UserError(f"{path}: {type(model).__name__} has no gradient checkpointing; leave the option out")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # its name changed during transformers 5


def text_model(base: PreTrainedModel) -> nn.Module:
    """The part of a causal LM from tokens to hidden states.

    `get_decoder` finds it by names, and for some models it gives the whole model (Llama 4) or the head (ModernBERT).
    There the part is taken that holds the embeddings.
    """
    body: nn.Module = base.get_decoder()
    embeddings = base.get_input_embeddings()
    if body is not base and any(part is embeddings for part in body.modules()):
        return body
    holders = (child for child in base.children() if child is not embeddings and embeddings in list(child.modules()))
    found: nn.Module = next(holders, base)
    return found


def add_adapter(base: PreTrainedModel, adapter: PeftConfig) -> nn.Module:
    """A causal LM with a new adapter. Raises `UserError` where it does not fit."""
    if getattr(adapter, "is_prompt_learning", False):
        raise UserError(
            f"{type(adapter).__name__} adds virtual tokens, which a packed batch has no place for; "
            "use an adapter of weights such as LoraConfig"
        )
    adapter = dataclasses.replace(adapter, task_type=adapter.task_type or "CAUSAL_LM")
    if _inside_larger(base):  # a text model inside a larger one
        adapter.target_modules = _text_targets(base, adapter.target_modules)
    model: nn.Module = wrapped(base, adapter)
    return model


def wrapped(base: PreTrainedModel, adapter: PeftConfig) -> PeftModel:
    """PEFT's model with a new adapter. Raises `UserError` for settings that change nothing, or that PEFT refuses."""
    from peft import get_peft_model

    _check_adapter(base, adapter)
    try:
        model: PeftModel = get_peft_model(base, adapter)
    except ValueError as error:
        targets = adapter.target_modules or []
        names = sorted({name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, _LINEAR)})
        if "arget module" not in str(error):
            reason = first_line(error)
            raise UserError(f"{type(adapter).__name__}: {reason}; see --model.policy.adapter.*") from error
        first = next(
            (target for target in ([targets] if isinstance(targets, str) else sorted(targets)) if target not in names),
            "",
        )
        raise UserError(
            f"{type(adapter).__name__}: target_modules {targets} match nothing in {base.config.name_or_path}, "
            f"whose linear layers are {', '.join(names)}{nearest(first, names)}"
        ) from error
    return model


def _check_adapter(base: PreTrainedModel, adapter: PeftConfig) -> None:
    """Refuse settings of an adapter that peft takes and that change nothing. Raises `UserError`."""
    names = {name.rpartition(".")[2] for name, _ in base.named_modules()} - {""}
    for name in getattr(adapter, "modules_to_save", None) or ():
        if not any(path.endswith(name) for path, _ in base.named_modules()):
            raise UserError(f"{type(adapter).__name__}: modules_to_save {name} matches nothing{nearest(name, names)}")
    if getattr(adapter, "lora_alpha", None) == 0:
        raise UserError(f"{type(adapter).__name__}: lora_alpha 0 changes nothing; give as much as r, or more")


def _inside_larger(base: PreTrainedModel) -> bool:
    """Whether the text model stands inside a larger model, beside a vision tower for one."""
    return text_model(base) is base.get_decoder() is not base.base_model


def _text_targets(base: PreTrainedModel, targets: Any) -> Any:
    """Full names of the text model's linear layers that match `targets`, so that no vision tower gets an adapter."""
    text_modules = set(text_model(base).modules())
    names = [name for name, module in base.named_modules() if module in text_modules and isinstance(module, _LINEAR)]
    if targets is None or targets == "all-linear":
        return names
    if isinstance(targets, str):  # a regular expression, as peft reads it
        return [name for name in names if re.fullmatch(targets, name)] or targets
    return [
        name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)
    ] or targets


def _freeze_unreachable(base: PreTrainedModel) -> None:
    """Freeze parts that text never reaches (a vision tower), so that no optimizer or strategy waits for gradients."""
    if not _inside_larger(base):
        return
    base.requires_grad_(False)
    for part in (text_model(base), base.get_output_embeddings()):
        for parameter in part.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # packed four-bit weights cannot be trained
