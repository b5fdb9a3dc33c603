"""`leyden demo`: the whole way from a table to an aligned model, on the embedded model, in minutes on a CPU.

Every stage is a command that a user could type, and is printed as such; they only share one process here, because
starting Python and its libraries takes longer than some of the stages.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from leyden.atomic import write_whole
from leyden.cli.parser import Parser
from leyden.errors import UserError
from leyden.language import say

Main = Callable[[list[str]], int]


@dataclass(frozen=True)
class Size:
    """The amounts of data and training in the demo."""

    rows: int = 4000
    epochs: int = 2
    pairs: int = 2000
    prompts: int = 2000
    batch: int = 128
    """Prompts of a batch for PPO, with two answers to each; rejection sampling takes half as many, with eight."""
    rollouts: int = 6
    rounds: int = 10
    heldout: int = 200


QUICK = Size(rows=1000, epochs=1, pairs=400, prompts=200, batch=32, rollouts=3, rounds=2, heldout=40)


def main(argv: Sequence[str]) -> int:
    """`leyden demo [FOLDER] [--quick]`: by default in the next free folder `runs/demo-N`, or the last, if it broke
    off."""
    from leyden.cli.launcher import main as leyden

    options = _options(list(argv))
    size = QUICK if options.quick else Size()
    if options.folder:
        return run(leyden, Path(options.folder), size)
    existing = []
    for n in count(1):
        if not (path := Path("runs", f"demo-{n}")).exists():
            break
        existing.append(path)
    return run(leyden, unfinished(existing, asdict(size)) or path, size)


def _options(argv: list[str]) -> argparse.Namespace:
    parser = Parser("leyden demo", __doc__)
    parser.add_argument("folder", nargs="?", help="a new folder for all that the demo makes, or one to go on with")
    parser.add_argument("--quick", action="store_true", help="less of everything: to see it work, not to see it good")
    return parser.read(argv)


def _make(folder: Path) -> None:
    """Make the demo's folder, which must be new, empty or a demo's, and check that it can be written to."""
    advice = "type leyden demo ANOTHER_FOLDER"
    try:
        if folder.is_dir() and any(folder.iterdir()) and recorded(folder) is None:
            raise UserError(f"{folder}: there is something in it; remove it, or {advice}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        file = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "there is a file in its place" if file else error.strerror
        raise UserError(f"{folder}: not a folder that can be written to ({reason}); {advice}") from None


def run(main: Main, folder: Path, size: Size | None = None) -> int:
    """Run the demo in `folder`, or resume one that broke off there, through the command line's `main`."""
    size = size or Size()
    _make(folder)
    stages = Stages(main, folder, asdict(size))
    stages.note()
    data = _data(stages, folder, size)
    purposes = train(stages, folder, data, size)
    runs = [folder / name for name in ("sft", "dpo", "ppo", "rejection_sampling")]
    stages("All runs beside each other, with what they answered", "compare", *runs, "--output", folder / "report.html",
           makes=folder / "report.html")  # fmt: skip
    report(folder, {name: stages.seconds[what] / 60 for name, what in purposes.items()})
    say(f"\nThe tuned models are ordinary transformers folders: {folder}/*/export")
    say(f"Their answers side by side: {folder / 'report.html'}. Talk to one: leyden chat {folder / 'dpo'}")
    say(f"The whole demo took {sum(stages.seconds.values()) / 60:.1f} minutes.")
    stages.note(ended=True)
    return 0


def _data(stages: Stages, folder: Path, size: Size) -> dict[str, Path]:
    """Make the data files for training and evaluation; returns their paths by name."""
    names = {"table": "questions.csv", "rows": "questions.jsonl", "pairs": "pairs.jsonl", "prompts": "prompts.jsonl",
             "heldout": "heldout.jsonl", "text": "text.jsonl"}  # fmt: skip
    files = {name: folder / file for name, file in names.items()}

    def sample(what: str, kind: str, name: str, rows: int, seed: int, *more: object) -> None:
        words = ["data", "sample", "--kind", kind, "--language", "both", "--rows", rows, "--seed", seed, *more]
        stages(what, *words, "--output", files[name], makes=files[name])

    sample("A spreadsheet of questions and answers, Korean and English, like one you may have",
           "instruction", "table", size.rows, 1)  # fmt: skip
    stages("The same as JSONL", "data", "convert", files["table"], files["rows"], makes=files["rows"])
    stages("Is every row usable?", "data", "check", "--kind", "instruction", files["rows"])
    sample("Pairs of a better and a worse answer; one in ten is the wrong way round, as with people",
           "preference", "pairs", size.pairs, 2, "--noise", 0.1)  # fmt: skip
    sample("Questions without answers, to learn from a reward", "prompts", "prompts", size.prompts, 3)
    sample("Other questions, which nothing is trained on", "prompts", "heldout", size.heldout, 4, "--split", "heldout")
    sample("General text, to see what is forgotten", "text", "text", size.heldout, 5)
    return files


def train(stages: Stages, folder: Path, data: dict[str, Path], size: Size) -> dict[str, str]:
    """Fine-tune, train a reward model, and align in three ways, each evaluated on the same questions; returns what
    each run was for, by name."""
    evaluation = ["--config", "eval", "--eval.path", data["heldout"], "--eval.text_path", data["text"], "--eval.reward",
            "Gold", "--eval.size", size.heldout, "--eval.sampling.max_new_tokens", 64]  # fmt: skip
    start, scores, purposes = folder / "sft" / "export", folder / "reward_model" / "export", dict[str, str]()

    def fit(what: str, name: str, *words: object, evaluated: bool = True, config: str | None = None) -> None:
        purposes[name] = what
        own = ["--data.max_length", 256, "--trainer.default_root_dir", folder / name, "--ckpt_path", "auto"]
        stages(what, "fit", "--config", config or name, *(evaluation if evaluated else []), *words, *own)

    fit("Supervised fine-tuning: how to answer at all",
        "sft", "--data.path", data["rows"], "--trainer.max_epochs", size.epochs, config="demo")  # fmt: skip
    fit("A reward model: which of two answers is better", "reward_model", "--model.policy.path", start,
        "--data.path", data["pairs"], "--model.optimizer.lr", 3e-4, evaluated=False)  # fmt: skip
    fit("DPO: align with the pairs themselves", "dpo", "--model.policy.path", start, "--data.path", data["pairs"],
        "--model.optimizer.lr", 1e-4, "--trainer.num_sanity_val_steps", 0)  # fmt: skip
    sampled = [
        "--model.policy.path", start, "--model.reward.path", scores, "--data.path", data["prompts"],
        "--data.val_fraction", 0, "--model.sampling.max_new_tokens", 64, "--model.optimizer.lr", 1e-4,
    ]  # fmt: skip
    fit("PPO: align with the reward model, on answers sampled while training", "ppo", *sampled, "--data.batch_size",
        size.batch, "--model.samples", 2, "--trainer.max_epochs", size.rollouts, "--model.value_policy.path", start,
        "--model.value_weight", 1)  # fmt: skip
    fit("Rejection sampling: imitate the best of eight answers", "rejection_sampling", *sampled, "--data.batch_size",
        size.batch // 2, "--model.samples", 8, "--trainer.max_epochs", size.rounds)  # fmt: skip
    return purposes


class Stages:
    """Runs a sequence of commands, prints what each is for, and records in the folder those that have ended.

    Args:
        main: the command line.
        folder: for all that the commands make.
        settings: of the sequence; with others it cannot be resumed.

    Raises:
        UserError: the folder belongs to a sequence with other settings.
    """

    def __init__(self, main: Main, folder: Path, settings: dict[str, Any]) -> None:
        self.main, self.file, self.settings = main, folder / "stages.json", settings
        self.count, self.seconds = 0, dict[str, float]()
        """Purpose of each command that has ended -> seconds that it took"""
        if (record := recorded(folder)) is not None:
            if record["settings"] != settings:
                raise UserError(f"{folder}: it holds another size of this; go on with that one, or name another folder")
            self.seconds = dict(record["seconds"])

    def __call__(self, what: str, *arguments: object, makes: Path | None = None) -> None:
        """Run a command, unless it has ended before.

        Args:
            what: the purpose of the command.
            arguments: the words after `leyden`.
            makes: a file that the command does not overwrite; one left by a broken-off attempt is removed.
        """
        self.count += 1
        words = [str(argument) for argument in arguments]
        say(f"\n[{self.count}] {what}\n    leyden {shlex.join(words)}", flush=True)
        if what in self.seconds:
            say("    done before", flush=True)
            return
        if makes is not None:
            shutil.rmtree(makes) if makes.is_dir() else makes.unlink(missing_ok=True)
        began = time.monotonic()
        if code := self.main(words):
            raise UserError(f"stage {self.count} ended with code {code}; see the message above")
        self.seconds[what] = time.monotonic() - began
        self.note()

    def note(self, **more: Any) -> None:
        """Write stages.json: the commands that have ended, and `more`."""
        write_whole(self.file, json.dumps({"settings": self.settings, "seconds": self.seconds} | more) + "\n")


def recorded(folder: Path) -> dict[str, Any] | None:
    """The content of stages.json in a folder of such a sequence; None where there is no such file."""
    file = folder / "stages.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def unfinished(folders: Sequence[Path], settings: dict[str, Any]) -> Path | None:
    """The last of these folders, if its sequence has these settings and broke off."""
    record = recorded(folders[-1]) if folders else None
    return folders[-1] if record and record["settings"] == settings and not record.get("ended") else None


def scores(answers: Path) -> list[float]:
    """The gold reward of each answer in a file written by `leyden predict`."""
    from leyden.example import Sample
    from leyden.rewards.function import Gold

    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    samples = [Sample(row["prompt"], row["response"], row["row"], row["finished"]) for row in rows]
    rewards: list[float] = Gold()(samples).tolist()
    return rewards


def gain(before: list[float], after: list[float]) -> tuple[float, float]:
    """Mean difference of paired scores, and its standard error."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def report(folder: Path, minutes: dict[str, float]) -> None:
    """Print a table of the stages: gold reward on held-out questions, what it cost in KL and text loss, and minutes."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Held-out questions", title_justify="left", box=SIMPLE)
    for column in ("", "gold reward", "wins", "KL", "length", "text", "min"):
        table.add_column(column, justify="left" if not column else "right")
    names = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "rejection_sampling": "rejection sampling"}
    table.add_row("base", *_cells(evaluation_rows(folder / "sft" / "metrics.csv")[0], False), "")
    for name, label in names.items():
        last = evaluation_rows(folder / name / "metrics.csv")[-1]
        table.add_row(label, *_cells(last, name != "sft"), f"{minutes[name]:.1f}")
    Console().print("", table)
    say(
        "Gold reward: correct, polite and brief, 0 to 2, ± 95 % interval. Wins: over SFT. KL: nats an\n"
        "answer, from SFT. Text: loss in nats a token of general text, which grows with what is forgotten.\n"
        f"PPO and rejection sampling took the reward model's {minutes['reward_model']:.1f} minutes as well."
    )


def evaluation_rows(metrics: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv that hold evaluation passes."""
    with metrics.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("eval/reward")]


def _cells(row: dict[str, str], compared: bool) -> list[str]:
    reward = f"{float(row['eval/reward']):.3f} ± {1.96 * float(row['eval/reward_se']):.3f}"
    against = [f"{float(row['eval/win_rate']):.0%}", f"{float(row['eval/kl']):.2f}"] if compared else ["", ""]
    return [reward, *against, f"{float(row['eval/length']):.0f}", f"{float(row['eval/retained_loss']):.3f}"]
