"""Policies as folders that transformers and PEFT load with no line of ours."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from leyden.models.heads import SCORE, blank, body_of
from leyden.models.load import base_of
from leyden.models.saving.scoring_tokenizer import scoring_tokenizer
from leyden.sharding import is_sharded, plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from leyden.models.causal_lm import CausalLM

log = logging.getLogger(__name__)
State = dict[str, Tensor]


def save(policy: CausalLM, folder: str | Path | None) -> None:
    """Write a language model or a reward model; see `Policy.save`."""
    state = _together(policy)
    if folder is None:
        return
    if "score" in policy.heads:
        _save_reward(policy, state, Path(folder))
    else:
        _save_language(policy, state, Path(folder))


def _together(policy: CausalLM) -> State | None:
    """The weights of a sharded policy, put together on every process; None where they are whole already."""
    if not is_sharded(policy):
        return None
    found: dict[int, Tensor] = {}

    def one(x: Tensor) -> Tensor:
        """Tied weights stay tied."""
        place = x.to_local().data_ptr() if hasattr(x, "to_local") else x.data_ptr()
        if place not in found:
            found[place] = plain(x)
        return found[place]

    return {name: one(x) for name, x in policy.state_dict().items()}


def _part(state: State | None, prefix: str, module: nn.Module) -> State:
    """The weights below a prefix, or of a module that is whole."""
    if state is None:
        return dict(module.state_dict())
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def _save_language(policy: CausalLM, state: State | None, folder: Path) -> None:
    generation = getattr(base_of(policy.model), "generation_config", None)
    if generation is not None:  # so that plain transformers stops where `generate` here does
        generation.eos_token_id = sorted(policy.stop)
    policy.model.save_pretrained(folder, state_dict=None if state is None else _part(state, "model.", policy.model))
    if generation is not None:
        generation.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def _save_reward(policy: CausalLM, state: State | None, folder: Path) -> None:
    """Write the policy and its score head as a folder for `AutoModelForSequenceClassification`, or as a PEFT adapter
    of the task SEQ_CLS with the head in it, with a tokenizer that makes plain transformers score the same token.

    The head is stored in fp32 whatever the dtype of the body. A folder in bfloat16 is loaded in bfloat16, head
    included, unless another dtype is asked for.
    """
    base = base_of(policy.model)
    configured = base.config.get_text_config().pad_token_id
    tokenizer = scoring_tokenizer(policy.tokenizer, policy.stop, configured)
    head = _part(state, "heads.score.", policy.heads["score"])["weight"].detach()
    if hasattr(policy.model, "peft_config"):
        _save_adapter(policy, state, head, tokenizer, folder)
    else:
        _save_model(policy, state, head, tokenizer, folder)
    tokenizer.save_pretrained(folder)


def _save_model(
    policy: CausalLM, state: State | None, head: Tensor, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    base, pad = base_of(policy.model), int(tokenizer.pad_token_id)
    own = _part(state, "model.", policy.model)
    model, tensors = blank(policy, pad), {name: own[name] for name in body_of(base)} | {SCORE: head}
    for name, wanted in model.state_dict().items():  # rows for a pad token that was added; nothing looks at them
        if missing := len(wanted) - len(tensors[name]) if wanted.ndim else 0:
            tensors[name] = torch.cat([tensors[name], tensors[name][:1].expand(missing, -1)])
    model.load_state_dict(tensors, assign=True)
    model._weight_conversions = getattr(base, "_weight_conversions", None)  # how names in files differ, if they do
    model.save_pretrained(folder)


def _save_adapter(
    policy: CausalLM, state: State | None, head: Tensor, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    from peft import PeftConfig
    from safetensors.torch import load_file, save_file

    base = base_of(policy.model)
    policy.model.save_pretrained(folder, state_dict=None if state is None else _part(state, "model.", policy.model))
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file) | {f"base_model.model.{SCORE}": head.cpu()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = PeftConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save = "SEQ_CLS", [*(config.modules_to_save or []), "score"]
    config.save_pretrained(folder)
    pad = tokenizer.pad_token_id
    if base.config.get_text_config().pad_token_id != pad:
        new = pad >= base.get_input_embeddings().num_embeddings
        log.warning(
            "%s has no pad token that suits a reward model; to load the adapter in plain transformers, %sset "
            "config.pad_token_id = %s on the base model first",
            base.config.name_or_path,
            "call resize_token_embeddings(len(tokenizer)) and " if new else "",
            pad,
        )
