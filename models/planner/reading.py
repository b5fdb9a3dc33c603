"""The memory settings of a configuration, which is read exactly as `leyden fit` reads it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from leyden.cli import check_keys
from leyden.cli.command import Command
from leyden.cli.config_keys import flag_keys
from leyden.cli.lightning_cli import CLI
from leyden.errors import UserError
from leyden.models.causal_lm import CausalLM
from leyden.models.engines.served_model import ServedModel
from leyden.models.planner.blueprint import blueprint
from leyden.models.planner.memory import FLOAT, HALF, STATES
from leyden.models.planner.outline import Optimizer
from leyden.models.planner.settings import Choice, Part, Settings
from leyden.on_policy.on_policy import OnPolicy
from leyden.precision import fast_bfloat16

SIZES = {"float32": FLOAT, "bfloat16": HALF, "float16": HALF}
PLACEHOLDER = "<rows>"
"""The path of rows where none is given."""
Tree = dict[str, Any]


class _Parser(CLI):
    """The command line of `leyden fit`, without building or running anything."""

    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...

    def _set_seed(self) -> None: ...


def resolved(command: Command) -> Tree:
    """All keys with their values, defaults included. Paths of data and reward model, unused in planning, are optional.

    Raises:
        UserError: a key or a value that `leyden fit` would refuse.
    """
    classes, given_keys = dict(command.classes), {key.path for key in command.keys}
    placeholders = [("data", "path", PLACEHOLDER)] if "path" in check_keys.parameters(_class(classes["data"])) else []
    if classes.get("model.reward", "").endswith(".ModelReward"):
        placeholders.append(("model.reward", "path", ""))
    for kind, name, value in placeholders:
        if (*kind.split("."), name) not in given_keys:
            command.flags.append([f"{kind}.{name}", value])
            command.keys += flag_keys([command.flags[-1]])
    parser = _Parser(command)
    try:
        parser.start()
    except argparse.ArgumentError as error:
        raise UserError(check_keys.explain(str(error), command.keys)) from error
    config: Tree = parser.config[command.verb].as_dict()
    return config


def settings(config: Tree, devices: int | None = None) -> tuple[Settings, list[str]]:
    """The settings that decide the memory of a run, and notes on assumptions.

    Args:
        config: the result of `resolved`.
        devices: number of devices; None for the Trainer's.

    Raises:
        UserError: the policy, the precision or the number of devices is not supported.
    """
    args, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    cuda = _on_gpu(trainer["accelerator"])
    choice = _precision(trainer, cuda)
    policy = _part(args["policy"], "model.policy.path", choice)
    optimizer, notes = _optimizer(args.get("optimizer"))
    algorithm, kind = _class(config["model"]["class_path"]), getattr(_class(config["data"]["class_path"]), "kind", "")
    pairs = (data.get("max_responses") or 2) if kind == "preference" else 1
    pairs = pairs if not getattr(algorithm, "unpaired", False) else 1 + getattr(algorithm, "mismatched", False)
    rewards, assumptions = _rewards(args.get("reward"), policy)
    sharded, buckets = _strategy(trainer["strategy"])
    samples = args.get("samples") or pairs
    others = [
        _part(args[name], f"model.{name}.path", choice) if args.get(name) and not _served(args[name]) else None
        for name in ("reference_policy", "value_policy", "teacher")
    ]
    new = (args.get("sampling") or {}).get("max_new_tokens", 0) if issubclass(algorithm, OnPolicy) else 0
    rows, read = _rows(config, new)
    return Settings(
        algorithm,
        policy,
        optimizer,
        **rows,
        accumulate=trainer["accumulate_grad_batches"],
        responses=samples,
        kept=args.get("top") or samples,
        minibatches=args.get("minibatches") or 1,
        passes=args.get("epochs") or 1,
        new=new,
        reference="none" if _without_reference(algorithm, args.get("objective")) else args.get("reference") or "auto",
        value=args.get("value") or "none",
        reference_model=others[0],
        value_model=others[1],
        teacher_model=others[2],
        rewards=rewards,
        devices=devices or _devices(trainer, cuda),
        sharded=sharded,
        buckets=buckets,
        cuda=cuda,
    ), [*read, *notes, *assumptions, *_allocator(cuda)]


def _without_reference(algorithm: Any, objective: Any) -> bool:
    """Whether an objective compares with no reference, so that none is loaded; what samples has one for its KL."""
    return (
        bool(objective) and not algorithm.on_policy and not getattr(_class(_name(objective)), "needs_reference", True)
    )


def _rows(config: Tree, new: int) -> tuple[dict[str, Any], list[str]]:
    """The settings of a run that are about its rows, and notes on them.

    Args:
        new: tokens of the longest sampled answer.
    """
    data = config["data"]["init_args"]
    max_tokens = data.get("max_tokens") or 16384
    max_length = data.get("max_length") or max_tokens
    lengths, longest, notes = _row_lengths(config, max_length - new)
    return {
        "batch_size": data.get("batch_size") or 32,
        "max_tokens": max_tokens,
        "max_length": min(max_length, longest + new) if lengths else max_length,
        "lengths": lengths,
        "seed": data.get("seed") or config.get("seed_everything") or 0,
    }, notes


def _row_lengths(config: Tree, most: int) -> tuple[tuple[int, ...], int, list[str]]:
    """Tokens of every row of the data, and most of a prompt with one response, and a note; nothing where no path was
    given or the tokenizer cannot be read here. Prompts of more than `most` tokens leave no room to answer."""
    data, args = _class(config["data"]["class_path"]), config["data"]["init_args"]
    if args.get("path") in (None, PLACEHOLDER) or not hasattr(data, "row_lengths"):
        return (), 0, []
    built = data(**args)
    if hasattr(built, "read_for"):
        built.read_for(_class(config["model"]["class_path"]))
    try:
        built.template  # noqa: B018
    except UserError:
        return (), 0, ["the tokenizer cannot be read here, so rows are taken to be as long as --data.max_length"]
    lengths, longest = built.row_lengths()
    if built.kind == "prompts":
        lengths = [n for n in lengths if n <= most]
        longest = max(lengths, default=0)
    named = args["path"] if isinstance(args["path"], str) else ", ".join(args["path"])
    return tuple(lengths), longest, [f"{named}: {len(lengths):,} rows, the longest of {longest:,} tokens"]


def _allocator(cuda: bool) -> list[str]:
    """Note on the memory that Linux's allocator adds on a CPU, beyond all formulas (benchmarks/memory.py --allocator
    usual)."""
    if cuda or sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return []
    return [
        "this is what tensors hold; the allocator keeps freed memory, so that the process may grow to 1.2 times that, "
        "or twice with an adapter; MALLOC_MMAP_THRESHOLD_=65536 in the environment makes it give memory back"
    ]


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def _name(spec: Any) -> str:
    """The class path in a spec of a class with arguments, or the spec itself as text."""
    return str(spec["class_path"] if isinstance(spec, dict) else spec)


def _built(kind: type, spec: Tree) -> Any:
    """The object described by a class path with arguments."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=kind)
    return parser.instantiate_classes(parser.parse_object({"it": spec})).it


def _on_gpu(accelerator: Any) -> bool:
    """Whether a run uses GPUs; with `auto`, whether there is one here."""
    if accelerator == "auto":
        return torch.cuda.is_available()
    return str(accelerator) in ("gpu", "cuda")


def _devices(trainer: Tree, cuda: bool) -> int:
    """Number of processes of a run, each with its own device."""
    devices, nodes = trainer["devices"], int(trainer["num_nodes"])
    if isinstance(devices, list):
        return len(devices) * nodes
    text = str(devices)
    if text == "auto" or text == "-1":
        return max(1, torch.cuda.device_count() if cuda else 1) * nodes
    if "," in text:
        return len([part for part in text.split(",") if part.strip()]) * nodes
    if not text.isdigit() or not int(text):
        raise UserError(f"--trainer.devices {text}: give a number of devices")
    return int(text) * nodes


def _strategy(spec: Any) -> tuple[bool, bool]:
    """Whether one model is sharded over the devices, and whether gradients are copied for averaging.

    DDP copies them unless torch's `gradient_as_bucket_view` is set.
    """
    path = _name(spec)
    if "." in path and issubclass(_class(path), ModelParallelStrategy):
        return True, False
    args = spec.get("init_args") or {} if isinstance(spec, dict) else {}
    options = args | (spec.get("dict_kwargs") or {} if isinstance(spec, dict) else {})
    return False, not options.get("gradient_as_bucket_view")


def _precision(trainer: Tree, cuda: bool) -> Choice:
    """Quantisation and autocast of the models that are built for training."""
    plugins = trainer["plugins"]
    plugins = plugins if isinstance(plugins, list) else [plugins] if plugins else []
    for plugin in plugins:
        if _name(plugin).endswith("QLoRAPrecision"):
            args = plugin.get("init_args", {}) if isinstance(plugin, dict) else {}
            compute = args.get("compute_dtype", "auto")
            half = (cuda or fast_bfloat16()) if compute == "auto" else compute != "float32"
            keep = tuple(args.get("keep") or ())
            return Choice(autocast=half, quantised=True, double=args.get("double_quant", True), keep=keep)
    precision = str(trainer["precision"] or "32-true")
    if precision.endswith("-true") and precision != "32-true":
        raise UserError(
            f"trainer.precision {precision}: leyden fit takes 32-true, bf16-mixed or 16-mixed; the weights' type is "
            "--model.policy.dtype"
        )
    return Choice(autocast=precision in ("bf16-mixed", "16-mixed", "bf16", "16"))


def _part(spec: Tree, flag: str, choice: Choice) -> Part:
    """The model that a policy's class path and arguments describe."""
    from peft import PeftConfig

    if not issubclass(_class(spec["class_path"]), CausalLM):
        raise UserError(f"--{flag.removesuffix('.path')}: plan knows what a CausalLM holds, not {spec['class_path']}")
    args = spec["init_args"]
    adapter = _built(PeftConfig, args["adapter"]) if args.get("adapter") else None
    own_choice = Choice(SIZES[args["dtype"]], choice.autocast, adapter, choice.quantised, choice.double, choice.keep)
    source = tuple((name, args[name]) for name in ("revision", "trust_remote_code"))
    return Part(args["path"], flag, own_choice, bool(args["gradient_checkpointing"]), source)


def _optimizer(spec: Any) -> tuple[Optimizer, list[str]]:
    if not isinstance(spec, dict):
        return Optimizer(), []
    name, args = _name(spec).rpartition(".")[2], spec.get("init_args") or {}
    notes = [] if name in STATES else [f"nothing is known of {name}, so it is taken to keep as much as AdamW"]
    return Optimizer(name, bool(args.get("momentum")), bool(args.get("fused"))), notes


def _served(part: dict[str, Any]) -> bool:
    """Whether a model is held by a server, and not here."""
    return issubclass(_class(part["class_path"]), ServedModel)


def _rewards(spec: Any, policy: Part) -> tuple[tuple[tuple[Part | None, int], ...], list[str]]:
    """The reward models of a run, and notes. A model that cannot be read yet counts as large as the policy's base."""
    models: list[tuple[Part | None, int]] = []
    notes = [
        f"the classifier {args['path']} is not counted; its weights and one forward come on top"
        for args in _arguments_of("Classifier", spec)
    ]
    for args in _arguments_of("ModelReward", spec):
        if args["base"] == "policy":
            models.append((None, args["batch_tokens"]))
            continue
        source = tuple((name, args[name]) for name in ("revision", "trust_remote_code"))
        part = Part(args["path"], "model.reward.path", Choice(SIZES[args["dtype"]]), source=source)
        try:
            if not args["path"] or Path(args["path"]).is_file():
                raise UserError("")
            blueprint(part.path, flag=part.flag, **dict(source))
        except UserError:
            notes.append("the reward model cannot be read yet, so it is taken to be as large as the policy")
            part = Part(policy.path, policy.flag, part.choice, source=policy.source)
        models.append((part, args["batch_tokens"]))
    return tuple(models), notes


def _arguments_of(kind: str, spec: Any) -> Iterator[Tree]:
    """Arguments of every reward of a class in a reward, which may be made of several."""
    if isinstance(spec, dict):
        if str(spec.get("class_path", "")).rpartition(".")[2] == kind:
            yield spec["init_args"]
        else:
            for value in spec.values():
                yield from _arguments_of(kind, value)
    elif isinstance(spec, list):
        for item in spec:
            yield from _arguments_of(kind, item)
