"""The command line before anything heavy is imported: help, verbs, class names, config names, one-line errors."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from leyden import __version__
from leyden.cli import class_names
from leyden.cli.command import read_command
from leyden.errors import UserError, nearest
from leyden.language import localised, say
from leyden.run.folder import rank

TRAINER_VERBS = {
    "fit": "train a model",
    "validate": "measure a model on the validation rows",
    "test": "measure a model on the test rows",
    "predict": "write a model's answers to prompts (answers.jsonl)",
}
OTHER_VERBS = {
    "data": ("leyden.datamodules.commands.main", "convert, check, show and label data files, and make sample rows"),
    "compare": ("leyden.compare.main", "runs beside each other: a table, and a page with curves and answers"),
    "benchmark": ("leyden.models.benchmark.main", "standard tasks of lm-eval over models, for leyden compare"),
    "plan": ("leyden.models.planner.main", "what a run would hold in memory, before anything is downloaded"),
    "annotate": ("leyden.datamodules.annotate.main", "a web page on which people rank answers, and what comes of it"),
    "chat": ("leyden.models.chat.main", "talk to a model or adapter in the terminal, through a pipe or on a web page"),
    "export": ("leyden.models.export.main", "a trained model as a folder for others: merge its adapter, upload it"),
    "demo": ("leyden.cli.demo", "the whole way from a spreadsheet to aligned models, on the embedded model in minutes"),
}
ENVIRONMENT = {
    "JSONARGPARSE_DEPRECATION_WARNINGS": "off",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
    "POSSIBLE_USER_WARNINGS": "off",
    "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait run ten times slower beside any other program
}
"""Set unless the user has set them, so that a run's terminal shows the run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for a mistake the user can mend, 130 for Ctrl-C, 141 where nobody
    reads on (`| head`), 143 for SIGTERM."""
    args = list(sys.argv[1:] if argv is None else argv)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels wherever it is imported
    if os.getcwd() not in sys.path:  # the user's own modules; last, so that a `datasets/` here hides nothing installed
        sys.path.append(os.getcwd())
    try:
        code = _dispatch(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter fails at its own flush
        return 141
    except UserError as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return _exit_code(stop)


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that its reader has closed: other pipes, such as a server's, may break too."""
    poll = select.poll()
    try:
        poll.register(sys.stdout, 0)
    except (OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _exit_code(stop: SystemExit) -> int:
    """The exit code of a stop. Lightning ends a run on SIGTERM with code 0, from which a scheduler reads success."""
    if isinstance(stop.__context__, BrokenPipeError):  # as rich ends where it cannot print
        return 141
    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    if isinstance(stop.__context__, KeyboardInterrupt):
        code = 130
    elif type(stop).__name__ == "SIGTERMException":
        code = code or 143
    else:
        return code
    if rank() == 0:
        name = "interrupted" if code == 130 else f"stopped by {signal.Signals(code - 128).name}"
        say(f"{name}{_resume_hint()}", file=sys.stderr)
    return code


def _resume_hint() -> str:
    """The command that resumes the run, phrased to end a sentence; empty if the run has no checkpoint."""
    folder = os.environ.get("LEYDEN_RUN", "")
    has_checkpoint = bool(folder) and any(Path(folder, "checkpoints").glob("*.ckpt"))
    return f"; go on with leyden fit --config {folder}/config.yaml --ckpt_path last" if has_checkpoint else ""


def _dispatch(args: list[str]) -> int:
    verb, rest = (args[0], args[1:]) if args else ("--help", [])
    if verb in ("-h", "--help", "help"):
        say(_help())
        return 0
    if verb == "--version":
        print(f"leyden {__version__}")
        return 0
    if verb in TRAINER_VERBS:
        return _train(verb, rest)
    others = _installed_verbs()
    if verb in others:
        return int(import_module(others[verb][0]).main(rest) or 0)
    raise UserError(f"no command is called '{verb}'{nearest(verb, [*TRAINER_VERBS, *others])} (see leyden --help)")


def _train(verb: str, args: list[str]) -> int:
    """Run a command of the Trainer, or print its help."""
    if {"-h", "--help"}.isdisjoint(args):
        command = read_command(verb, args)
        from leyden.cli.lightning_cli import run

        return run(command)
    if "all" in args:
        from leyden.cli.lightning_cli import show_keys

        return show_keys(verb)
    say(_verb_help(verb))
    return 0


def _installed_verbs() -> dict[str, tuple[str, str]]:
    """The commands whose modules are installed. The modules are not imported."""

    def is_installed(module: str) -> bool:
        package, _, name = module.rpartition(".")
        return (class_names.folder(package) / f"{name}.py").is_file()

    return {verb: entry for verb, entry in OTHER_VERBS.items() if is_installed(entry[0])}


def _table(rows: dict[str, str]) -> str:
    return "\n".join(f"  {name:<18}{localised(text)}" for name, text in rows.items())


def _help() -> str:
    verbs = TRAINER_VERBS | {verb: text for verb, (_, text) in _installed_verbs().items()}
    return f"""leyden {__version__}: post-training for language models on PyTorch Lightning

usage: leyden COMMAND …

commands:
{_table(verbs)}

first run:
  leyden fit --config sft --data.path FILE --model.policy.path MODEL

`leyden COMMAND --help` says more about each."""


def _verb_help(verb: str) -> str:
    flag_help = {
        "--config NAME": "YAML file or shipped config; several are merged left to right, then flags",
        "--model CLASS": f"algorithm: {', '.join(sorted(class_names.of_kind('model')))}, or my_file.MyAlgorithm",
        "--data CLASS": f"data: {', '.join(sorted(class_names.of_kind('data')))}, or my_file.MyData",
        "--data.path FILE": "jsonl, json, csv, tsv, parquet, a folder or a glob",
        "--model.policy.path": "hub name, model folder, or `tiny`, the embedded model",
        "--model.policy.adapter": "any PEFT config, such as LoraConfig; then --model.policy.adapter.r 8",
        "--model.reward CLASS": f"reward: {', '.join(sorted(class_names.of_kind('model.reward')))}, or my_file.Mine",
        "--model.optimizer.lr": "and the optimizer's other arguments; --model.optimizer CLASS changes it",
        "--trainer.max_steps": "and Lightning's other Trainer arguments",
        "--trainer.default_root_dir": "the run's folder (default: runs/NAME-N)",
        "--ckpt_path last": "go on from the newest checkpoint of the run's folder; best; auto: or start",
        "--checkpoint.every_n_train_steps": "and ModelCheckpoint's other arguments",
        "--print_config": "print the whole configuration and stop",
    }
    if verb == "predict":
        flag_help["--output FILE"] = "where the answers go (default: answers.jsonl in the run's folder)"
    lines = "\n".join(f"  {flag:<34}{localised(text)}" for flag, text in flag_help.items())
    return f"""leyden {verb}: {TRAINER_VERBS[verb]}

usage: leyden {verb} --config NAME [--config NAME …] [--KEY VALUE …]

{lines}

shipped configs: {", ".join(class_names.configs())}
every key: leyden {verb} --help all; of a class: leyden {verb} --model.help SFT, --data.help InstructionData"""
