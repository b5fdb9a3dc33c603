"""Weights on their way to an engine: folders on a disk that both sides see, each whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leyden.errors import UserError, first_line
from leyden.models import quantized
from leyden.models.causal_lm import CausalLM
from leyden.models.saving.save import save_adapter
from leyden.paths import resolve
from leyden.sharding import is_sharded

SHARD_BYTES = 4 << 30
"""Most bytes of a file of weights."""
TIED = "tie_word_embeddings"
NEVER_UNTIED = ("gemma2", "cohere", "cohere2")
"""Types of models whose class in vLLM has no place for a head of its own."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM has room for."""


def base_of(policy: CausalLM) -> str | None:
    """The folder or hub name that an engine may load the frozen weights of an adapter from; None where they are in
    memory alone, since they are trained, or were quantised as they were loaded."""
    backbone = policy.backbone
    if not backbone.adapted:
        return None
    name = resolve(str(backbone.base.config.name_or_path))
    if any(quantized.layers(policy.model)) and not quantized.is_stored(name, policy.source["revision"]):
        return None
    return name


def weights(policy: CausalLM) -> Iterator[tuple[str, Tensor]]:
    """`policy.weights()` with a head of its own: an engine on a processor keeps a packed copy of a tied head, which no
    reload reaches. A collective where weights are sharded."""
    base = policy.backbone.base
    names = {id(module): name for name, module in base.named_modules()}
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0) and is_untied(policy)
    for name, weight in policy.weights():
        yield name, weight
        if tied and name.endswith(f"{names[id(embedding)].rpartition('.')[2]}.weight"):
            yield f"{names[id(head)]}.weight", weight


def is_untied(policy: CausalLM) -> bool:
    """Whether a tied head is sent by itself."""
    return policy.backbone.config.model_type not in NEVER_UNTIED


def publish_model(policy: CausalLM, folder: Path, writes: bool) -> None:
    """Write a model's weights, its configuration and its tokenizer. A collective where weights are sharded.

    Args:
        policy: whose model.
        folder: to make.
        writes: whether this process does; else it only helps to put weights together.
    """
    if not writes and not is_sharded(policy):
        return  # there is nothing to help with
    part = folder.with_name(folder.name + ".part")
    if writes:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    files = _ShardWriter(part) if writes else None
    problem: Exception | None = None
    for name, weight in weights(policy):  # to the end, whatever happens: others put weights together with us
        try:
            if files is not None and problem is None:
                files.add(name, weight)
        except (OSError, RuntimeError) as error:  # a full disk, mostly
            problem = error
    if files is None:
        return
    try:
        if problem is not None:
            raise problem
        files.close()
        (part / "config.json").write_text(json.dumps(config_of(policy), indent=2), encoding="utf-8")
        policy.tokenizer.save_pretrained(part)
        _put(part, folder)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{folder}: weights cannot be written there ({first_line(error)}); give --model.engine.folder a disk with "
            "room"
        ) from error


def publish_adapter(policy: CausalLM, folder: Path, writes: bool) -> None:
    """Write a policy's adapter. A collective where weights are sharded; see `publish_model`."""
    part = folder.with_name(folder.name + ".part")
    if writes:
        shutil.rmtree(part, ignore_errors=True)
    save_adapter(policy, policy.backbone, part if writes else None)
    if writes:
        _put(part, folder)


class _ShardWriter:
    """Writes tensors to files of at most `SHARD_BYTES`, as they come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.size = folder, 0
        self.held: dict[str, Tensor] = {}
        self.files: list[list[str]] = []

    def add(self, name: str, weight: Tensor) -> None:
        size = weight.numel() * weight.element_size()
        if self.held and self.size + size > SHARD_BYTES:
            self._write()
        copied = weight.detach().to("cpu").contiguous()
        self.held[name] = (
            copied.clone() if any(copied.data_ptr() == x.data_ptr() for x in self.held.values()) else copied
        )
        self.size += size

    def close(self) -> None:
        self._write()
        total, index = len(self.files), dict[str, str]()
        for number, names in enumerate(self.files):
            final = "model.safetensors" if total == 1 else f"model-{number + 1:05}-of-{total:05}.safetensors"
            os.replace(self.folder / f"{number}.safetensors", self.folder / final)
            index |= dict.fromkeys(names, final)
        if total > 1:
            text = json.dumps({"metadata": {}, "weight_map": index})
            (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _write(self) -> None:
        from safetensors.torch import save_file

        save_file(self.held, self.folder / f"{len(self.files)}.safetensors", metadata={"format": "pt"})
        self.files.append(list(self.held))
        self.held, self.size = {}, 0


def config_of(policy: CausalLM) -> dict[str, Any]:
    """The model's configuration: not quantised, and with a head of its own."""
    found: dict[str, Any] = json.loads(policy.backbone.base.config.to_json_string(use_diff=False))
    found.pop("quantization_config", None)
    found["dtype"] = str(policy.dtype).removeprefix("torch.")
    if is_untied(policy):
        for part in (found, *(value for value in found.values() if isinstance(value, dict))):
            if TIED in part or part is found:
                part[TIED] = False
    return found


def _put(part: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def room_for(policy: CausalLM, folder: Path) -> bool:
    """Whether a disk has room for three copies of what is sent: the present one, the next, and one to spare."""
    parameters = policy.model.parameters()
    if base_of(policy) is not None:
        parameters = (p for p in policy.model.parameters() if p.requires_grad)
    size = sum(p.numel() * max(p.element_size(), torch.bfloat16.itemsize) for p in parameters)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return False
    return bool(free > 3 * size)


def lora_room(policy: CausalLM) -> int:
    """The rank that vLLM has to have room for: one of its own sizes."""
    rank = max(int(kind.r) for kind in policy.model.peft_config.values())
    return next((size for size in RANKS if size >= rank), rank)


def check_policy(policy: Any) -> CausalLM:
    """That an engine can take over a policy's weights.

    Raises:
        UserError: it cannot.
    """
    if not isinstance(policy, CausalLM):
        raise UserError(
            f"{type(policy).__name__} gives its weights to no engine; use CausalLM, or leave the engine out"
        )
    if policy.backbone.adapted:
        kind = next(iter(policy.model.peft_config.values()))
        wrong = next((name for name in ("use_dora", "modules_to_save") if getattr(kind, name, None)), None)
        if str(getattr(kind.peft_type, "value", kind.peft_type)) != "LORA" or wrong:
            what = f"{type(kind).__name__} with {wrong}" if wrong else type(kind).__name__
            raise UserError(f"vLLM runs no {what}; use a LoraConfig without it, or leave the engine out")
    return policy
