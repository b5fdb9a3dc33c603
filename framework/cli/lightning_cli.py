"""The composition root: LightningCLI with our names, our errors, and a folder for every run."""

from __future__ import annotations

import argparse
import logging
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from leyden import __version__
from leyden.algorithm.algorithm import Algorithm
from leyden.algorithm.microbatches import MEMORY_ADVICE, out_of_memory
from leyden.algorithm.trainer_checks import check_callbacks
from leyden.checkpoint.callback import Checkpoint
from leyden.checkpoint.find import AtomicCheckpointIO, resolve_ckpt_path
from leyden.checkpoint.monitors import Monitors
from leyden.cli.check_keys import check_keys, explain
from leyden.cli.command import Command
from leyden.cli.hints import kept_rate
from leyden.cli.replaced import drop_replaced
from leyden.data.datamodule import DataModule
from leyden.errors import UserError, first_line
from leyden.evaluation.evaluator import Evaluator
from leyden.precision import advise
from leyden.run.console import no_loading_bars, quiet_libraries
from leyden.run.folder import RunFolder, claim_folder
from leyden.run.metrics_csv import MetricsCSV
from leyden.run.predictions import PredictionWriter
from leyden.run.progress import Progress
from leyden.trainer import DEFAULTS, folder_callbacks, run_callbacks

log = logging.getLogger("leyden")
# defaults of callbacks are dumped when they are checked, and enumerations among them have no YAML of their own
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, item: dumper.represent_str(str(item.value)))


def run(command: Command) -> int:
    """Run `fit`, `validate`, `test` or `predict` on what the launcher read.

    Raises:
        UserError: a key, value or setting that cannot work, in one line.
    """
    quiet_libraries()
    cli = CLI(command)
    try:
        cli.start()
    except argparse.ArgumentError as error:
        raise UserError(explain(str(error), command.keys)) from error
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("Early stopping conditioned on metric"):
            raise UserError(str(error)) from error
        if not out_of_memory(error):
            raise
        raise UserError(f"the memory is full ({first_line(error)[:160]}); {MEMORY_ADVICE}") from error
    finally:
        if cli.run is not None:
            cli.run.release()
    return 0


def show_keys(verb: str) -> int:
    """Print every key of a command."""
    return run(Command(verb, flags=[["help", ""]]))


def _root_cause(error: BaseException) -> BaseException:
    """The first cause of an error; or, before it, a `UserError`, which says it better than its own cause."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


SEEDS = "a seed that is null here follows seed_everything"
"""Stands above every written-out configuration."""


class CLI(LightningCLI):
    """One command. Constructing it does nothing; `start` parses, checks, builds and runs."""

    def __init__(self, command: Command) -> None:
        self.command, self.verb = command, command.verb
        self.run: RunFolder | None = None

    def start(self) -> None:
        """Parse and run.

        Raises:
            ArgumentError: a value of the wrong type, or a missing key.
            UserError: everything else that the user can mend.
        """
        parser_options = {"exit_on_error": False, "dump_header": [f"leyden {__version__}", SEEDS]}
        super().__init__(
            Algorithm,
            DataModule,
            save_config_callback=None,
            trainer_defaults=DEFAULTS,
            seed_everything_default=0,
            parser_kwargs=parser_options | {verb: dict(parser_options) for verb in self.subcommands()},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_subclass_arguments(Evaluator, "eval", required=False, help="what evaluates the policy")
        parser.link_arguments("model.init_args.policy.init_args.path", "data.init_args.tokenizer")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--output", type=str | None, default=None, help="where the answers go (JSONL)")
        elif subcommand != "fit":
            parser.set_defaults({"verbose": False})  # Lightning's table of the numbers that `Progress` prints
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        actions = self._subcommand_parsers[self.verb]._actions
        groups = {
            "trainer": Trainer,
            "model": Algorithm,
            "data": DataModule,
            "checkpoint": Checkpoint,
            "eval": Evaluator,
        }
        drop_replaced(self.command)
        check_keys(self.command.keys, groups, {action.dest.split(".")[0] for action in actions} - {*groups, "help"})
        self.config = parser.parse_args(self.command.arguments())
        if (seed := self.config[self.verb].seed_everything) is not True and not 0 <= int(seed or 0) < 2**32:
            raise UserError(f"--seed_everything {seed}: give a whole number from 0 to {2**32 - 1}")
        if self.verb == "fit":
            self._check_rate()

    def _check_rate(self) -> None:
        """Refuse a learning rate of 0, and say where the rate is still that of another optimizer."""
        optimizer = self.config[self.verb].model.init_args.get("optimizer")
        rate = getattr(optimizer, "init_args", {}).get("lr")
        if rate == 0:
            raise UserError("--model.optimizer.lr 0: nothing would be learnt; give a rate above 0, or leyden validate")
        if rate is not None and (key := kept_rate(self.command.keys)) is not None:
            name = optimizer.class_path.rpartition(".")[2]
            text = "%s: %s keeps the learning rate %s of another optimizer; set --model.optimizer.lr for it"
            log.warning(text, key.where, name, rate)

    def _parse_ckpt_path(self) -> None:
        """Do nothing: on resume the configuration decides, and the checkpoint is only state."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.verb]
        trainer = config.trainer
        self._check_options(trainer)
        if trainer.precision == "bf16-mixed":
            advise(torch.bfloat16, "--trainer.precision bf16-mixed", "--trainer.precision 32-true")
        if trainer.max_epochs is None:  # Lightning would take 1000 epochs
            trainer.max_epochs = 1 if trainer.max_steps < 0 and trainer.max_time is None else -1
        resume = config.get("ckpt_path")
        config.ckpt_path = resolve_ckpt_path(resume, self.verb, trainer.default_root_dir, config.checkpoint.dirpath)
        if self.verb == "fit" and not trainer.fast_dev_run:
            name = config.model.class_path.rpartition(".")[2].lower()
            self.run = claim_folder(trainer.default_root_dir, name, resume is not None, alone=True)
        elif self.verb == "predict" and config.output is None:
            self.run = claim_folder(trainer.default_root_dir, "predict", resume=True)
        if self.run is not None:
            trainer.default_root_dir = str(self.run.folder)
        no_loading_bars()

    def _check_options(self, trainer: Any) -> None:
        """Refuse options of the Trainer that it cannot be built with, or that would change nothing."""
        precision = "64-true" if str(trainer.precision) == "64" else str(trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            kind = {"bf16-true": "bfloat16", "16-true": "float16"}.get(precision, "float32")
            raise UserError(
                f"trainer.precision {trainer.precision} would round position tables and heads too; the weights' type "
                f"is --model.policy.dtype {kind}, the arithmetic's --trainer.precision bf16-mixed"
            )
        if trainer.barebones:
            raise UserError("--trainer.barebones true: a run without metrics and checkpoints is none; leave it out")
        if trainer.sync_batchnorm:
            raise UserError("--trainer.sync_batchnorm true: language models have no batch norms; leave it out")
        typed = next((key.where for key in self.command.keys if key.where.startswith("--checkpoint.")), None)
        if trainer.enable_checkpointing is False and typed is not None:
            raise UserError(f"{typed}: nothing is saved under --trainer.enable_checkpointing false; leave out one")

    def instantiate_classes(self) -> None:
        """Build model, data and trainer. Errors of their constructors about arguments become `UserError`s."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # the parser wraps errors in its own
            root = _root_cause(error)
            if isinstance(root, (UserError, ValueError, ImportError)):
                flag = "--eval.reward" if f".{Evaluator.__name__}'" in str(error) else "--model.reward"
                raise UserError(first_line(root).replace("--model.reward", flag)) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = dict(self._get(self.config_init, "trainer"))
        given = _as_list(config.pop("callbacks", None))
        plugins = _as_list(config.pop("plugins", None))
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpointIO())
        own = self._own_callbacks(config)
        own = [callback for callback in own if not any(isinstance(other, _replacing_type(callback)) for other in given)]
        check_callbacks(given)
        first = [Monitors()] if self.verb == "fit" else []  # before those that would fail later and say less
        config |= {"logger": self._loggers(config), "callbacks": first + given + own, "plugins": plugins}
        try:
            return Trainer(**config, **kwargs)
        except (TypeError, ValueError, ImportError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def _own_callbacks(self, config: dict[str, Any]) -> list[Any]:
        """The callbacks of this verb, which show progress, measure and write files."""
        callbacks: list[Any] = [] if config.get("enable_progress_bar") is False else [Progress()]
        if self.verb == "predict":
            output = self.config[self.verb].output
            return [*callbacks, PredictionWriter(output or Path(config["default_root_dir"]) / "answers.jsonl")]
        evaluator = self._get(self.config_init, "eval")
        evaluators = [] if evaluator is None else [evaluator]
        if self.verb != "fit":
            return callbacks + evaluators
        callbacks += run_callbacks(evaluator)
        if self.run is not None:
            saves = config.get("enable_checkpointing") is not False
            checkpoint = self._get(self.config_init, "checkpoint") if saves else None
            callbacks += folder_callbacks(self.run.folder, self.resolved(), checkpoint)
        return callbacks

    def _loggers(self, config: dict[str, Any]) -> Any:
        """The logger of metrics.csv and the configured ones, unless logging is off."""
        given = config.get("logger")
        if self.run is None or self.verb != "fit" or given is False:
            return given or False
        return [MetricsCSV(self.run.folder), *(_as_list(given) if given is not True else [])]

    def resolved(self) -> str:
        """The whole configuration as YAML, ready for `--config`: without the checkpoint, which is state."""
        config = self.config[self.verb].clone()
        for name in ("config", "ckpt_path"):
            config.pop(name, None)
        return str(self._parser(self.verb).dump(config, skip_none=False, skip_check=True))


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _replacing_type(callback: Any) -> type:
    """The type of configured callback that takes the place of this callback of ours."""
    return ProgressBar if isinstance(callback, Progress) else type(callback)
