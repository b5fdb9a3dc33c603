"""The command line of `leyden data convert | check | show | sample | label`."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from leyden.cli.parser import Parser, run_verb
from leyden.errors import UserError
from leyden.language import say

if TYPE_CHECKING:
    from leyden.datamodules.source import Source

KINDS = ("instruction", "preference", "unpaired", "prompts", "candidates")


def main(argv: list[str]) -> int:
    """Run one data verb and return the exit code. Raises `UserError` for what the user can mend."""
    return run_verb("data", VERBS, _help, argv)


class _Parser(Parser):
    """The flags that data verbs share."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(f"leyden data {verb}", description)

    def reading(self) -> None:
        """Add the flags of verbs that read data as training does."""
        self.add_argument("file", metavar="FILE", help="a file, a folder, a glob or hf:NAME")
        self.choice("--kind", KINDS, help="what the rows are for; candidates are scored (default: by columns)")
        self.add_argument("--format", default="auto", metavar="NAME", help="force a format by name")
        self.add_argument("--tokenizer", metavar="PATH", help="model folder or hub name (default: tiny)")
        names = ("--chat-template", "--chat_template", "--data.chat_template")
        self.add_argument(*names, dest="chat_template", metavar="plain|FILE", help="instead of the tokenizer's own")
        names = ("--chat-template-args", "--chat_template_args", "--data.chat_template_args")
        self.mapping(*names, metavar="'{NAME: VALUE}'", help="arguments of the chat template")
        self.choice("--rank-order", ("lower_is_better", "higher_is_better"), help="how to read a ranking column")
        self.columns("prompt", "response", "label", "chosen", "rejected", "text", "context", "system")

    def columns(self, *names: str) -> None:
        for name in names:
            self.add_argument(f"--{name}", metavar="COLUMN", help=f"the column of the {name}")


def _columns(args: argparse.Namespace) -> dict[str, str]:
    names = ("prompt", "response", "responses", "label", "chosen", "rejected", "text", "system", "context")
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _convert(argv: list[str]) -> int:
    parser = _Parser("convert", "Convert CSV, TSV, JSON or Parquet to JSONL: a file, or every one of a folder.")
    parser.add_argument("source", metavar="IN", help="a file, a folder or a glob")
    parser.add_argument("target", metavar="OUT", nargs="?", help="default: beside the original, as .jsonl")
    parser.choice("--kind", KINDS[:4], help="what the rows are for (default: by columns)")
    parser.columns("prompt", "response", "label", "chosen", "rejected", "text", "system")
    parser.add_argument("--encoding", metavar="NAME", help="default: UTF-8, else CP949 where the file is that")
    parser.add_argument("--delimiter", metavar="CHARACTER", help="default: found from the first rows; tab for a tab")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    args = parser.read(argv)
    from leyden.datamodules.commands.convert import Conversion, convert

    delimiter = {"tab": "\t", "\\t": "\t"}.get(args.delimiter, args.delimiter)
    conversion = Conversion(_columns(args), args.encoding, delimiter, args.overwrite, args.kind)
    return convert(args.source, args.target, conversion)


def _check(argv: list[str]) -> int:
    parser = _Parser("check", "Check every row of a data file. Exit code: 0 all usable, 1 some bad, 2 unusable.")
    parser.reading()
    parser.add_argument("--max-length", type=int, metavar="N", help="count rows with more tokens than this")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="prompts: what of it an answer may take")
    parser.add_argument("--min-gap", type=float, default=0.0, metavar="G", help="preference: as in training")
    parser.add_argument("--max-responses", type=int, metavar="K", help="preference: as in training")
    args = parser.read(argv)
    from leyden.datamodules.commands.check import Limits, check

    limits = Limits(args.max_length, args.max_new_tokens, args.min_gap, args.max_responses)
    return check(_source(args), limits)


def _show(argv: list[str]) -> int:
    parser = _Parser("show", "Show rows as the model sees them, with what is trained.")
    parser.reading()
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="how many (default: 3)")
    args = parser.read(argv)
    from leyden.datamodules.commands.show import show

    return show(_source(args), args.rows)


def _sample(argv: list[str]) -> int:
    parser = _Parser("sample", "Make sample rows with checkable answers.")
    kinds = ("instruction", "preference", "unpaired", "prompts", "text")
    parser.choice("--kind", kinds, "instruction", "what the rows are for (default: instruction)")
    parser.choice("--language", ("ko", "en", "both"), "ko", "(default: ko)")
    parser.choice("--split", ("train", "heldout"), "train", "what is asked in one is not asked in the other")
    parser.add_argument("--rows", type=int, default=1000, metavar="N", help="how many (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="other seeds give other rows")
    parser.add_argument("--noise", type=float, metavar="SHARE", help="labels that are wrong (default: 0.1)")
    parser.add_argument("--responses", type=int, metavar="K", help="preference: answers to each prompt (default: 2)")
    parser.add_argument("--output", metavar="FILE", help="a .jsonl, .csv or .tsv file (default: the terminal)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    args = parser.read(argv)
    from leyden.datamodules.commands.convert import whole_file
    from leyden.datamodules.sample import sample_rows

    choices = (args.split, args.noise, args.responses)
    rows = sample_rows(args.kind, args.language, args.rows, args.seed, *choices)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if args.output is None:
        sys.stdout.writelines(lines)
        return 0
    path = Path(args.output).expanduser()
    if path.exists() and not args.overwrite:
        raise UserError(f"{path}: exists already; add --overwrite, or name another output")
    with whole_file(path) as file:
        delimiter = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
        if delimiter is None:
            file.writelines(lines)
        else:
            first = next(rows)
            table = csv.DictWriter(file, list(first), delimiter=delimiter, lineterminator="\n")
            table.writeheader()
            table.writerows({name: _cell(value) for name, value in row.items()} for row in chain([first], rows))
    say(f"{path}: {args.rows:,} rows")
    return 0


def _label(argv: list[str]) -> int:
    from leyden.cli.class_flags import flags_as_text, maker, split_flags

    parser = _Parser("label", "Turn several responses to each prompt into preferences, by a reward.")
    parser.add_argument("source", metavar="IN", help="rows of prompts with responses: a file, a folder or a glob")
    parser.add_argument("output", metavar="OUT", help="a .jsonl file")
    text = "what scores them, such as Gold, ModelReward, HTTPJudge, Function or my_file.MyReward"
    parser.add_argument("--reward", metavar="CLASS", help=f"{text}; --reward.KEY VALUE for what it takes")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--scored", action="store_true", help="write prompt, responses, scores (default)")
    form.add_argument("--pairs", action="store_true", help="write prompt, chosen, rejected, margin instead")
    parser.add_argument("--min-gap", type=float, default=0.0, metavar="G", help="leave out what is closer than this")
    parser.add_argument("--max-responses", type=int, metavar="K", help="most of a prompt: best, worst and some between")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="responses scored at a time")
    parser.add_argument("--format", default="auto", metavar="NAME", help="force a format by name")
    parser.columns("prompt", "response", "responses")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    rest, flags = split_flags(argv, "reward")
    args = parser.read(rest)
    reward = maker(flags, "reward", _reward_class)
    from leyden.datamodules.commands.label import Labels, label
    from leyden.datamodules.source import Source

    labels = Labels(args.pairs, args.min_gap, args.max_responses, args.batch_size, args.overwrite)
    source = Source(args.source, "candidates", args.format, _columns(args))
    return label(source, args.output, reward, flags_as_text(flags), labels)


def _reward_class() -> type:
    from leyden.rewards.reward import Reward

    return Reward


def _cell(value: object) -> object:
    """A value as the cell of a table; lists are written as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _source(args: argparse.Namespace) -> Source:
    from leyden.datamodules.source import Source

    columns = _columns(args)
    template = (args.tokenizer, args.chat_template, args.chat_template_args)
    return Source(args.file, args.kind, args.format, columns, args.rank_order, *template)


def _help() -> str:
    lines = "\n".join(f"  {usage:<34} {what}" for usage, what in USAGE.items())
    return f"usage: leyden data VERB …\n\n{lines}\n\nleyden data VERB --help names the flags of a verb."


VERBS: dict[str, Callable[[list[str]], int]] = {
    "convert": _convert,
    "check": _check,
    "show": _show,
    "sample": _sample,
    "label": _label,
}
USAGE = {
    "convert IN [OUT] --prompt COLUMN …": "CSV, TSV, JSON or Parquet to JSONL: a file, or all of a folder",
    "check FILE": "counts, lengths, duplicates, and every bad row as file:line",
    "show FILE": "rows as the model sees them, with what is trained",
    "sample --output FILE": "sample rows with checkable answers",
    "label IN OUT --reward CLASS": "several responses to each prompt to preferences, by any reward",
}
