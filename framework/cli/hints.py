"""What somebody may have meant: full keys for short ones, and a learning rate that was chosen for another optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from leyden.cli.config_keys import Key

MEANT = {
    "learning_rate": "lr",
    "epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "num_train_epochs": "max_epochs",
    "steps": "max_steps",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "max_grad_norm": "gradient_clip_val",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "scheduler": "lr_scheduler",
    "output_dir": "default_root_dir",
    "max_seq_length": "max_length",
    "gpus": "devices",
}
"""Common name of a setting in other programs -> the last part of its key here."""
WHOLE = {
    "seed": "seed_everything",
    "resume": "ckpt_path",
    "resume_from_checkpoint": "ckpt_path",
    "checkpoint_path": "ckpt_path",
    "lora": "config lora",
    "qlora": "config qlora",
    "lora_r": "model.policy.adapter.r",
    "lora_alpha": "model.policy.adapter.lora_alpha",
    "lora_dropout": "model.policy.adapter.lora_dropout",
    "target_modules": "model.policy.adapter.target_modules",
    "dataset": "data.path",
    "model_name_or_path": "model.policy.path",
}
"""Common name of a setting in other programs -> its whole key here."""
USUAL = {
    ("model", "optimizer"): "torch.optim.AdamW",
    ("model", "lr_scheduler"): "leyden.algorithm.WarmupCosine",
}
"""Key -> the class whose keys are named where nothing else was chosen there."""
PLACES = (
    *(("model",), ("data",), ("trainer",), ("model", "policy"), ("model", "optimizer"), ("model", "lr_scheduler")),
    *(("model", "policy", "adapter"), ("checkpoint",), ("eval",)),
)


def full_key(
    name: str,
    chosen: Mapping[tuple[str, ...], Any],
    load: Callable[[str], Any],
    parameters: Callable[[Any], Mapping[str, Any]],
) -> str | None:
    """The key that ends in this name, or in what other programs call so; None where there is none.

    Args:
        name: as it was typed, without what stands before it.
        chosen: the classes chosen so far, by key.
        load: imports a class path.
        parameters: the parameters of a class.
    """
    if name in WHOLE:
        return WHOLE[name]
    name = MEANT.get(name, name)
    for place in PLACES:
        kind = chosen.get(place) or (load(USUAL[place]) if place in USUAL else None)
        if kind is not None and name in parameters(kind):
            return ".".join((*place, name))
    return None


def kept_rate(keys: Sequence[Key]) -> Key | None:
    """The key that changed the optimizer's class, where no learning rate was given with or after it: then the rate is
    still that of the optimizer before it, and rates of different optimizers mean different things."""
    changed, before, rated = None, "torch.optim.AdamW", False
    for key in keys:
        if key.path == ("model", "optimizer") and isinstance(key.value, str) and "." in key.value:
            if key.value != before:
                with_flags = rated and key.where.startswith("--") and _flag_sets_rate(keys)
                changed, before, rated = key, key.value, with_flags
        elif key.path == ("model", "optimizer", "lr"):
            rated = True
    return None if rated else changed


def _flag_sets_rate(keys: Sequence[Key]) -> bool:
    return any(key.path == ("model", "optimizer", "lr") and key.where.startswith("--") for key in keys)
