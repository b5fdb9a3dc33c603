"""The model of a run, an adapter or a folder, built as it was trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leyden.checkpoint.find import find_checkpoint
from leyden.errors import UserError
from leyden.fingerprint import fingerprint_weights
from leyden.models.benchmark.results import run_of
from leyden.models.causal_lm import CausalLM
from leyden.models.load import is_reward
from leyden.models.restore import config_of, four_bits_of, restored
from leyden.paths import resolve

if TYPE_CHECKING:
    from leyden.precision import QLoRAPrecision


@dataclass
class Opened:
    """A built policy on its device."""

    policy: CausalLM
    name: str
    """as it was typed"""
    forward: Callable[[], Any]
    """The context of forward passes"""
    four_bits: bool

    def fingerprint(self) -> str:
        """Of all weights, frozen and trained."""
        return fingerprint_weights(self.policy.named_parameters())


def opened(typed: str, dtype: str | None = None, base: str | None = None, checkpoint: str | None = None) -> Opened:
    """Load a model and build it, on a GPU if there is one; over weights in four bits where its run trained so.

    Raises:
        UserError: there is no such model or checkpoint, it is a reward model, or no answers can be asked of it.
    """
    run = run_of(typed)
    if checkpoint is not None and run is None:
        raise UserError(f"--checkpoint {checkpoint}: {typed} is no run's folder; leave it out, or give the run")
    config = {} if run is None else config_of(run / "config.yaml")
    precision, device = four_bits_of(config), "cuda" if torch.cuda.is_available() else "cpu"
    building = nullcontext() if precision is None else precision.module_init_context()
    try:
        with torch.device(device) if precision is not None else nullcontext(), building:
            if checkpoint is not None and run is not None:
                policy = _of_checkpoint(run, checkpoint, base, config)
            else:
                policy = _of_folder(typed, dtype or _dtype(config, precision, device), base)
    except UserError as error:  # it names the flag of `fit`
        raise UserError(str(error).replace("--model.policy.base", "--base")) from None
    forward = nullcontext if precision is None else precision.forward_context
    return Opened(policy.to(device), typed, forward, precision is not None)


def _dtype(config: dict[str, Any], precision: QLoRAPrecision | None, device: str) -> str:
    """The dtype of the weights: under QLoRA that of the training, else the usual one of the device."""
    if precision is not None:
        policy = config.get("model", {}).get("init_args", {}).get("policy", {}).get("init_args", {})
        return str(policy.get("dtype") or "float32")
    return "bfloat16" if device == "cuda" else "float32"


def _of_folder(typed: str, dtype: str, base: str | None) -> CausalLM:
    folder = resolve(typed)
    if is_reward(folder):
        raise UserError(f"{typed}: a reward model scores answers and gives none; give the model that it judges")
    kind: Any = dtype
    policy = CausalLM(folder, kind, base=base)
    _ = policy.tokenizer  # first, since its error is the clearest where there is no model
    policy.build()
    return policy


def _of_checkpoint(folder: Path, checkpoint: str, base: str | None, config: dict[str, Any]) -> CausalLM:
    place = (config.get("checkpoint") or {}).get("dirpath")
    file = find_checkpoint(checkpoint, str(folder), place, "--checkpoint")
    assert file is not None  # only `auto` may find none
    policy = restored(file, {} if base is None else {"base": base}, config)
    if not isinstance(policy, CausalLM):
        raise UserError(f"{file}: of {type(policy).__name__}, which gives no answers; benchmarks take a CausalLM")
    return policy
