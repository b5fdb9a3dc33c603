"""The command line before anything heavy is imported: help, verbs, class names, config names, one-line errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from leyden import __version__, names
from leyden.errors import UserError, nearest
from leyden.keys import Key, flag_keys, flags, read

TRAINER_VERBS = {
    "fit": "train a model",
    "validate": "measure a model on the validation rows",
    "test": "measure a model on the test rows",
    "predict": "write a model's answers to prompts (answers.jsonl)",
}
OTHER_VERBS = {
    "data": ("leyden.datamodules.commands", "convert, check and show data files"),
    "demo": ("leyden.demo", "fine-tune the embedded model on generated questions and compare before and after"),
}
ENVIRONMENT = {
    "JSONARGPARSE_DEPRECATION_WARNINGS": "off",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
    "POSSIBLE_USER_WARNINGS": "off",
}
"""Set unless the user has set them, so that a run's terminal shows the run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for a mistake the user can mend, 130 for Ctrl-C, 143 for SIGTERM."""
    args = list(sys.argv[1:] if argv is None else argv)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if os.getcwd() not in sys.path:  # the user's own modules; last, so that a `datasets/` here hides nothing installed
        sys.path.append(os.getcwd())
    try:
        return _dispatch(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except SystemExit as stop:
        return _exit_code(stop)


def _exit_code(stop: SystemExit) -> int:
    """The exit code of a stop. Lightning ends a run on SIGTERM with code 0, from which a scheduler reads success."""
    if type(stop).__name__ == "SIGTERMException":
        print("stopped by SIGTERM; go on with --ckpt_path last", file=sys.stderr)
        return 143
    if isinstance(stop.__context__, KeyboardInterrupt):
        print("interrupted; go on with --ckpt_path last", file=sys.stderr)
        return 130
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _dispatch(args: list[str]) -> int:
    verb, rest = (args[0], args[1:]) if args else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(_help())
        return 0
    if verb == "--version":
        print(f"leyden {__version__}")
        return 0
    if verb in TRAINER_VERBS:
        return _train(verb, rest)
    others = _others()
    if verb in others:
        from leyden.cli import command_of

        function: Callable[[list[str]], Any] = command_of(others[verb][0])
        return int(function(rest) or 0)
    raise UserError(f"no command is called '{verb}'{nearest(verb, [*TRAINER_VERBS, *others])} (see leyden --help)")


def _train(verb: str, args: list[str]) -> int:
    if {"-h", "--help"}.isdisjoint(args):
        command = prepare(verb, args)
        from leyden.cli import run

        return run(verb, *command)
    if "all" in args:
        from leyden.cli import show_keys

        return show_keys(verb)
    print(_verb_help(verb))
    return 0


def prepare(verb: str, args: list[str]) -> tuple[list[list[Any]], list[dict[str, Any]], list[Key]]:
    """Read flags and config files and check all that needs no import.

    Returns:
        The flags as [name, value] pairs, the content of the config files left to right, and the keys of both in the
        order in which they apply: files, then flags.

    Raises:
        UserError: a config, class or value that is not there.
    """
    pairs = flags(args)
    if not pairs:
        raise UserError(f"say what to {verb}: leyden {verb} --config sft --data.path FILE (see leyden {verb} --help)")
    contents, keys = [], []
    for name, value in pairs:
        if name == "config":
            content, found = read(names.config_file(value))
            contents.append(content)
            keys += found
    # A class is chosen before its arguments are given, in whatever order they were typed.
    order = {"model": 0, "data": 0, "model.policy": 1}
    typed = sorted((pair for pair in pairs if pair[0] != "config"), key=lambda pair: order.get(pair[0], 2))
    keys += flag_keys(typed)
    if any(name.startswith("model.policy.") for name, _ in typed) and not _gives(keys, ("model", "policy")):
        policy = ["model.policy", "CausalLM"]
        at = next(i for i, (name, _) in enumerate(typed) if name.startswith("model.policy."))
        typed.insert(at, policy)
        first = next(i for i, key in enumerate(keys) if key.path[:2] == ("model", "policy"))
        keys.insert(first, Key(("model", "policy"), policy, 1, "--model.policy", is_class=True))
    for key in keys:
        kind = ".".join(key.path)
        if kind in names.KINDS and isinstance(key.value, str) and not key.value.endswith((".yaml", ".yml")):
            key.box[key.slot] = names.class_path(kind, key.value, key.where)
            key.is_class = True
    return typed, contents, keys


def _gives(keys: list[Key], path: tuple[str, ...]) -> bool:
    """Whether some key names the class of the object at `path`."""
    return any(key.path == path and isinstance(key.value, str) for key in keys)


def _others() -> dict[str, tuple[str, str]]:
    """The commands whose modules are installed, found without importing them."""

    def there(module: str) -> bool:
        package, _, name = module.rpartition(".")
        return (names.folder(package) / f"{name}.py").is_file()

    return {verb: entry for verb, entry in OTHER_VERBS.items() if there(entry[0])}


def _table(rows: dict[str, str]) -> str:
    return "\n".join(f"  {name:<18}{text}" for name, text in rows.items())


def _help() -> str:
    verbs = TRAINER_VERBS | {verb: text for verb, (_, text) in _others().items()}
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
        "--model CLASS": f"algorithm: {', '.join(sorted(names.of_kind('model')))}, or my_file.MyAlgorithm",
        "--data CLASS": f"data: {', '.join(sorted(names.of_kind('data')))}, or my_file.MyData",
        "--data.path FILE": "jsonl, json, csv, tsv, parquet, a folder or a glob",
        "--model.policy.path": "hub name, model folder, or `tiny`, the embedded model",
        "--model.policy.adapter": "any PEFT config, such as LoraConfig; then --model.policy.adapter.r 8",
        "--model.optimizer.lr": "and the optimizer's other arguments; --model.optimizer CLASS changes it",
        "--trainer.max_steps": "and Lightning's other Trainer arguments",
        "--trainer.default_root_dir": "the run's folder (default: runs/NAME-N)",
        "--ckpt_path last": "go on from the newest checkpoint of the run's folder",
        "--checkpoint.every_n_train_steps": "and ModelCheckpoint's other arguments",
        "--print_config": "print the whole configuration and stop",
    }
    if verb == "predict":
        flag_help["--output FILE"] = "where the answers go (default: answers.jsonl in the run's folder)"
    lines = "\n".join(f"  {flag:<34}{text}" for flag, text in flag_help.items())
    return f"""leyden {verb}: {TRAINER_VERBS[verb]}

usage: leyden {verb} --config NAME [--config NAME …] [--KEY VALUE …]

{lines}

shipped configs: {", ".join(names.configs())}
every key: leyden {verb} --help all; of a class: leyden {verb} --model.help SFT, --data.help InstructionData"""
