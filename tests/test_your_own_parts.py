"""Doors that a user opens by class path: the page runs as written, and what is wrong is said in one line."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from test_docs import ROOT, SHORT

from leyden.datamodules.formats.formats import format_named, parse
from leyden.errors import UserError

TEXT = (ROOT / "docs" / "your-own-parts.md").read_text(encoding="utf-8")


def write_page(workplace: Path) -> list[list[str]]:
    """The files of the page, written; and its commands."""
    lines: list[str] = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        if match[1] == "bash":
            lines += match[2].splitlines()
        else:
            file = re.findall(r"to\s+`([\w.]+)`", TEXT[: match.start()])[-1]
            (workplace / file).write_text(match[2], encoding="utf-8")
    return [shlex.split(line)[1:] for line in lines]


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_runs_as_written(leyden: Any, workplace: Path) -> None:
    shown = ""
    for words in write_page(workplace):
        batch = ["--data.batch_size", "8"] if "grpo" in words else SHORT[2:]
        code, out, error = leyden(*words, *([*SHORT[:2], *batch] if words[0] == "fit" else []))
        assert code == 0, (words, error)
        shown += out
    runs = workplace / "runs"
    assert [row["eval/questions"] for row in metrics(runs / "measured") if row.get("eval/questions")]
    assert "asks back" in shown  # in the table of `leyden compare`, from the run's folder alone
    assert "with-facts (q, facts, a)" in shown
    own, usual = (metrics(runs / name)[0]["train/loss"] for name in ("plain", "facts"))
    assert float(own) == pytest.approx(float(usual), rel=1e-4)
    assert "policy/clip_fraction" in metrics(runs / "median")[0]


def test_what_a_format_reads_is_what_is_trained(workplace: Path) -> None:
    write_page(workplace)
    row = {"q": "Who?", "facts": ["A.", "B."], "a": "Bo."}
    example = parse(row, "my_formats.WithFacts", "instruction")
    assert [turn["content"] for turn in example.messages] == ["A.\nB.\nWho?"]
    assert [[turn["content"] for turn in turns] for turns in example.responses] == [["Bo."]]
    assert parse({"q": "Who?", "facts": []}, "my_formats.WithFacts", "prompts").responses == []
    duel = parse({"question": "Who?", "better": "Bo.", "worse": "Al."}, "my_pairs.Duel", "preference")
    assert [turns[0]["content"] for turns in duel.responses] == ["Bo.", "Al."]
    with pytest.raises(UserError, match="read as instruction or prompts or candidates data, not preference"):
        format_named("my_formats.WithFacts", "preference")


def test_a_file_may_be_named_like_a_shipped_format(leyden: Any, workplace: Path) -> None:
    (workplace / "ranked_rows.py").write_text(
        "from leyden.datamodules.formats.preference_readers import Pair\n\n\nclass Mine(Pair):\n    name = 'mine'\n"
    )
    (workplace / "pairs.jsonl").write_text('{"prompt": "Who?", "chosen": "Bo.", "rejected": "Al."}\n')
    code, _, error = leyden("data", "check", "--kind", "preference", "--format", "ranked_rows.Mine", "pairs.jsonl")
    assert code == 0, error


def test_tokenised_rows_follow_the_code_of_a_format(leyden: Any, workplace: Path) -> None:
    """What was kept of an earlier version of the file is not trained on."""
    import subprocess
    import sys

    write_page(workplace)
    fit = "fit --config sft --data.path facts.jsonl --data.format my_formats.WithFacts --data.val_fraction 0".split()
    few = "--model.policy.path tiny --trainer.max_steps 1 --data.batch_size 4 --trainer.default_root_dir".split()
    losses = []
    for number, separator in enumerate(("\\n", "\\n\\n")):
        source = workplace / "my_formats.py"
        source.write_text(source.read_text().replace('"\\n"', f'"{separator}"'))
        words = [sys.executable, "-m", "leyden", *fit, *few, f"runs/{number}"]
        subprocess.run(words, check=True, capture_output=True, cwd=workplace)
        losses.append(metrics(workplace / "runs" / str(number))[0]["train/loss"])
    assert losses[0] != losses[1]


GRPO = "--config grpo --data.path prompts.jsonl --model.reward Gold --print_config"


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ("--config sft --data.path facts.jsonl --data.format my_formats.Nothing", ["my_formats has no 'Nothing'"]),
        ("--config sft --data.path facts.jsonl --data.format my_formats.WithFact", ["did you mean 'WithFacts'?"]),
        ("--config sft --data.path facts.jsonl --data.format not_there.X", ["no module 'not_there' in this folder"]),
        ("--config sft --data.path facts.jsonl --data.format my_formats.Parts", ["not a class that derives from"]),
        ("--config sft --data.path facts.jsonl --model.policy.attention flexx", ["flexx: unknown", "mean 'flex'"]),
        ("--config sft --data.path facts.jsonl --model.policy.attention my_attention.No", ["has no 'No'"]),
        (f"{GRPO} --model.surrogate my_gradient.ClipHigh", ["defines no class 'ClipHigh'", "ClipHigher"]),
        (f"{GRPO} --model.correction TISS", ["no Correction is called 'TISS'", "TIS"]),
        (f"{GRPO} --model.estimator GAEE", ["no Estimator is called 'GAEE'", "GAE"]),
    ],
)
def test_a_mistyped_part_is_one_line(typed: str, parts: list[str], leyden: Any, workplace: Path) -> None:
    write_page(workplace)
    (workplace / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    code, _, error = leyden("fit", *typed.split(), "--trainer.default_root_dir", "runs/x")
    assert code == 2 and error.splitlines()[-1].startswith("error: "), error
    assert [part for part in parts if part not in error] == [], error
    assert "Traceback" not in error


def test_options_that_would_be_ignored_are_errors() -> None:
    from small import small

    from leyden.advantages import GAE, GroupRelative, LeaveOneOut
    from leyden.algos import GRPO, PPO
    from leyden.on_policy import PolicyGradient
    from leyden.surrogates import Clip

    def reward(samples: Any) -> list[float]:
        return [0.0] * len(samples)

    given: dict[str, Any] = {"reward": reward}
    for kind, options, message in (
        (PPO, {"surrogate": Clip(0.1), "clip": 0.3}, "--model.surrogate is given"),
        (PPO, {"estimator": GAE(), "trace": 0.9}, "--model.estimator is given"),
        (GRPO, {"estimator": LeaveOneOut(), "scale": True}, "--model.estimator is given"),
        (GRPO, {"estimator": GAE()}, "it needs values; use PPO"),
        (PolicyGradient, {"estimator": GroupRelative()}, "give 2 or more"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            kind(small(), **given, **options)
    assert PPO(small(), **given, clip=0.3).surrogate == Clip(0.3)
    assert PPO(small(), **given, discount=0.9, trace=0.8).estimator == GAE(0.9, 0.8)
    assert GRPO(small(), **given, scale=True).estimator == GroupRelative(True)


def test_a_measure_may_not_take_the_column_of_another() -> None:
    from test_evaluation import Fixed

    from leyden.evaluation import Column, Measure

    class Twice(Measure):
        columns = (Column("eval/reward", "reward"),)

        def __call__(self, rows: Any, text: Any) -> dict[str, float]:
            return {"reward": 0.0}

    with pytest.raises(UserError, match=r"its column eval/reward is taken"):
        Fixed(measures=Twice())
