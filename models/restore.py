"""Restoring a policy from a checkpoint: built as in its run, with the trained weights of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from leyden.atomic import is_whole
from leyden.errors import UserError
from leyden.models.encoder import Encoder
from leyden.policy.policy import Labels, Policy, class_name
from leyden.precision import QLoRAPrecision


def config_of(file: Path) -> dict[str, Any]:
    """Configuration of the run that a checkpoint, or another file in its folder, belongs to.

    Raises:
        UserError: there is no config.yaml in the file's folder or the one above.
    """
    for folder in file.absolute().parents[:2]:
        if (folder / "config.yaml").is_file():
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            return config if isinstance(config, dict) else {}
    raise UserError(
        f"{file}: there is no config.yaml in its folder or the one above, which would say what it was made from; give "
        "the folder that its run exported"
    )


def four_bits_of(config: dict[str, Any]) -> QLoRAPrecision | None:
    """The precision of a run that trained over weights in four bits; None for other runs."""
    plugins = (config.get("trainer") or {}).get("plugins") or []
    for plugin in plugins if isinstance(plugins, list) else [plugins]:
        if isinstance(plugin, dict) and str(plugin.get("class_path")).endswith(".QLoRAPrecision"):
            return QLoRAPrecision(**(plugin.get("init_args") or {}))
    return None


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    """Trained weights of a checkpoint's policy, by name.

    Raises:
        UserError: the file is not a complete checkpoint of a run.
    """
    if not is_whole(file):
        raise UserError(f"{file}: no checkpoint of a run, or not a whole one; give the folder that its run exported")
    weights = torch.load(file, map_location="cpu", weights_only=True).get("state_dict", {})
    return {name.removeprefix("policy."): value for name, value in weights.items() if name.startswith("policy.")}


def restored(file: Path, changed: dict[str, Any] | None = None, config: dict[str, Any] | None = None) -> Policy:
    """The policy of a checkpoint, built with the checkpoint's heads.

    Args:
        file: the checkpoint, in its run's folder.
        changed: arguments of the policy that replace those of the training.
        config: of its run; by default that beside it.

    Raises:
        UserError: the file is no checkpoint, or does not fit the model in its config.yaml.
    """
    run = config_of(file) if config is None else config
    weights, spec = weights_of(file), run.get("model", {}).get("init_args", {}).get("policy")
    if not weights or spec is None:
        raise UserError(f"{file}: no checkpoint of a policy; give the folder that its run exported")
    arguments = spec.get("init_args", {})
    replacements = {name: value for name, value in (changed or {}).items() if name in arguments or name == "base"}
    policy = _policy(file, spec | {"init_args": arguments | replacements})
    heads = {name.split(".")[1] for name in weights if name.startswith("heads.")}
    heads |= {"score"} if isinstance(policy, Encoder) else set()  # a part of its model
    policy.labels = _labels(run)
    policy.build(("score",) if "score" in heads else ("logp", *heads), dropout=False)
    trained = {(name, p.shape) for name, p in policy.named_parameters() if p.requires_grad}
    saved = {(name, value.shape) for name, value in weights.items()}
    if trained != saved:
        mismatch = min(trained ^ saved)[0]
        raise UserError(
            f"{file}: it does not fit {policy.path}, which its config.yaml names ({mismatch}); give the export"
        )
    policy.load_state_dict(weights, strict=False)
    policy.fresh = policy.fresh - heads
    return policy


def _labels(run: dict[str, Any]) -> Labels | None:
    """What the head of a run on `AttributeData` gives, as its data name it."""
    data = (run.get("data") or {}).get("init_args") or {}
    if not data.get("attributes"):
        return None
    if data.get("classes"):
        return Labels(tuple(map(class_name, data["classes"])), "single_label_classification")
    return Labels(tuple(data["attributes"]))


def _policy(file: Path, spec: dict[str, Any]) -> Policy:
    """The policy that a class path and arguments describe."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=Policy)
    try:
        policy: Policy = parser.instantiate_classes(parser.parse_object({"policy": spec})).policy
    except (ArgumentError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: the policy in its config.yaml cannot be made ({reason}); give the export") from error
    return policy
