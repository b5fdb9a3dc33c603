"""Saving policies as folders that plain transformers and PEFT can load."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leyden.distributed import full_tensor
from leyden.models.backbone import Backbone, base_of, innermost
from leyden.models.heads import ONE, SCORE, TOLD, blank, body_of
from leyden.models.saving.scoring_tokenizer import scoring_tokenizer
from leyden.policy.policy import Labels, Policy
from leyden.sharding import is_sharded

log = logging.getLogger(__name__)
State = dict[str, Tensor]


def save(policy: Policy, backbone: Backbone, folder: str | Path | None) -> None:
    """Save a policy as a language model, or as a reward model if it has a score head; see `Policy.save`.

    Args:
        policy: the policy, whose weights have names below `model.` and `heads.NAME.`.
        backbone: the policy's model.
        folder: the folder to write; None on processes that only help to gather sharded weights.
    """
    state = _whole_weights(policy, _saved(policy, backbone)) if is_sharded(policy) or folder is not None else None
    if folder is None or state is None:
        return
    if "heads.score.weight" in state:
        _save_reward(policy, backbone, state, Path(folder))
    else:
        _save_language(policy, backbone, state, Path(folder))


def save_adapter(policy: Policy, backbone: Backbone, folder: str | Path | None) -> None:
    """Save a policy's adapter alone, without heads and tokenizer: what an engine needs of it; see `Policy.save`."""
    names = {name for name in _saved(policy, backbone) if name.startswith("model.")}
    state = _whole_weights(policy, names) if is_sharded(policy) or folder is not None else None
    if folder is not None and state is not None:
        _save_pretrained(policy, backbone.model, state, Path(folder))


def _saved(policy: Policy, backbone: Backbone) -> set[str]:
    """Names of the weights that a save writes: of a policy with an adapter neither of its frozen ones, which need not
    be put together where they are sharded."""
    state = dict(policy.state_dict())
    if not backbone.adapted:
        return set(state)
    from peft import get_peft_model_state_dict

    own = {id(x) for x in get_peft_model_state_dict(backbone.model, state_dict=_of_model(state)).values()}
    return {name for name, x in state.items() if id(x) in own or name.startswith("heads.")}


def _whole_weights(policy: nn.Module, names: Collection[str]) -> State:
    """These weights by name; those of a sharded policy are gathered on every process."""
    state = {name: x for name, x in policy.state_dict().items() if name in names}
    if not is_sharded(policy):
        return state
    gathered: dict[int, Tensor] = {}

    def gather(x: Tensor) -> Tensor:
        """The gathered tensor; tied weights stay tied."""
        address = x.to_local().data_ptr() if hasattr(x, "to_local") else x.data_ptr()
        if address not in gathered:
            gathered[address] = full_tensor(x)
        return gathered[address]

    return {name: gather(x) for name, x in state.items()}


def _of_model(state: State) -> State:
    """The weights of the model itself, under their names in the model."""
    return {name.removeprefix("model."): x for name, x in state.items() if name.startswith("model.")}


def _save_pretrained(policy: nn.Module, model: Any, state: State, folder: Path) -> None:
    """Call the model's own `save_pretrained`, with gathered weights if the policy is sharded. An adapter names the
    whole path of its base, so that it can be loaded from any folder."""
    if hasattr(model, "peft_config"):
        origin = base_of(model).config.name_or_path
        for config in model.peft_config.values():
            config.base_model_name_or_path = os.path.abspath(origin) if Path(origin).is_dir() else origin
    model.save_pretrained(folder, state_dict=_of_model(state) if is_sharded(policy) else None)


def _save_language(policy: Policy, backbone: Backbone, state: State, folder: Path) -> None:
    generation = getattr(backbone.base, "generation_config", None)
    if generation is not None:  # so that plain transformers stops at the same tokens as `generate` here
        generation.eos_token_id = sorted(policy.stop)
    _save_pretrained(policy, backbone.model, state, folder)
    if generation is not None:
        generation.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def _save_reward(policy: Policy, backbone: Backbone, state: State, folder: Path) -> None:
    """Write the policy and its score head as a folder for `AutoModelForSequenceClassification`, or as a PEFT adapter
    of the task SEQ_CLS that contains the head, with a tokenizer that makes plain transformers score the same token.

    The head is stored in fp32 whatever the dtype of the body. transformers loads a folder in bfloat16, head included,
    in bfloat16, unless it is given another dtype.
    """
    tokenizer = scoring_tokenizer(policy.tokenizer, policy.stop, backbone.config.pad_token_id)
    head, labels = state["heads.score.weight"].detach(), policy.labels or ONE
    if backbone.adapted:
        _save_pretrained(policy, backbone.model, state, folder)
        _add_head(backbone, head, labels, int(tokenizer.pad_token_id), folder)
    else:
        _save_classifier(backbone, _of_model(state), head, labels, int(tokenizer.pad_token_id), folder)
    tokenizer.save_pretrained(folder)


def _save_classifier(backbone: Backbone, weights: State, head: Tensor, labels: Labels, pad: int, folder: Path) -> None:
    """Write a whole model as a sequence classifier."""
    base = backbone.base
    model, tensors = blank(backbone, pad, labels), {name: weights[name] for name in body_of(base)} | {SCORE: head}
    for name, target in model.state_dict().items():  # rows for a pad token that was added; they are never used
        if missing := len(target) - len(tensors[name]) if target.ndim else 0:
            tensors[name] = torch.cat([tensors[name], tensors[name][:1].expand(missing, -1)])
    model.load_state_dict(tensors, assign=True)
    model._weight_conversions = getattr(base, "_weight_conversions", None)  # maps names in files, if they differ
    model.save_pretrained(folder)


def _add_head(backbone: Backbone, head: Tensor, labels: Labels, pad: int, folder: Path) -> None:
    """Turn the adapter in a folder into that of a sequence classifier, and add the head with the names of its labels,
    for which PEFT has no place."""
    from peft import PeftConfig
    from safetensors.torch import load_file, save_file

    base, file = backbone.base, folder / "adapter_model.safetensors"
    tensors = load_file(file) | {f"base_model.model.{SCORE}": head.cpu()}
    told = json.dumps({"names": labels.names, "problem": labels.problem}, ensure_ascii=False)
    save_file(tensors, file, metadata={"format": "pt", TOLD: told})
    config = PeftConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save = "SEQ_CLS", [*(config.modules_to_save or []), "score"]
    config.save_pretrained(folder)
    if backbone.config.pad_token_id != pad:
        new = pad >= innermost(base.get_input_embeddings()).num_embeddings
        log.warning(
            "%s has no pad token that suits a reward model; to load the adapter in plain transformers, %sset "
            "config.pad_token_id = %s on the base model first",
            base.config.name_or_path,
            "call resize_token_embeddings(len(tokenizer)) and " if new else "",
            pad,
        )
