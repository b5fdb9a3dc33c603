"""Every command and every piece of code in the READMEs runs, in order, in one folder."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHORT = {
    "fit": ["--trainer.max_steps", "2", "--data.batch_size", "2"],
    "predict": ["--model.sampling.max_new_tokens", "4"],
    "look": ["--eval.size", "3", "--eval.sampling.max_new_tokens", "4"],
    "sampled": ["--trainer.max_steps", "2", "--data.batch_size", "8", "--data.val_size", "4"],
}
"""Added to the README's commands so that the tests take seconds."""


def blocks(language: str, text: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The lines of all shell blocks, comments left out."""
    return [
        words
        for block in blocks("bash", text)
        for line in block.splitlines()
        if (words := shlex.split(line, comments=True))
    ]


def test_both_readmes_hold_the_same_commands_and_code() -> None:
    english, korean = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ko.md"))
    assert commands(english) == commands(korean)
    assert blocks("python", english) == blocks("python", korean)


def test_the_two_first_commands_are_make_targets_and_ci_runs_the_second() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert commands(text)[:2] == [["make", "demo"], ["make", "test"]]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in ("demo", "test", "lint", "bench"))
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_readme_runs(leyden, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("안녕?\n"))
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    with (workplace / "chat.csv").open("w", encoding="cp949", newline="") as stream:
        rows = [(f"{i} 더하기 {i}는?", f"{2 * i}입니다.") for i in range(30)]
        csv.writer(stream).writerows([("질문", "답변"), *rows])
    (workplace / "questions.jsonl").write_text(json.dumps({"prompt": "안녕?"}) + "\n", encoding="utf-8")
    load, own = blocks("python", text)
    (workplace / "my_algo.py").write_text(own, encoding="utf-8")
    for words in commands(text)[2:]:
        assert words[0] == "leyden"
        resumed = [] if "--ckpt_path" not in words else ["--trainer.max_steps", "3"]
        short = [] if "reward_model" in words and words[1] == "predict" else SHORT.get(words[1], [])
        short = [*short, *SHORT["look"]] if "eval" in words else short
        short = SHORT["sampled"] if words[1] == "fit" and {"ppo", "rejection_sampling"} & {*words} else short
        code, out, err = leyden(*words[1:], *(resumed or short))
        # of answers of four tokens some are empty, and then labelling says so with 1
        assert code == 0 or (code == 1 and "label" in words), (words, err)
    (answer,) = (workplace / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert {"response", "finished"} <= set(json.loads(answer))
    assert (workplace / "runs/lora/export/adapter_model.safetensors").is_file()
    scored = [json.loads(line) for line in (workplace / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(scored) == 1000 and all(len(row["responses"]) == len(row["scores"]) == 2 for row in scored)
    labelled = [json.loads(line) for line in (workplace / "labelled.jsonl").read_text(encoding="utf-8").splitlines()]
    assert labelled and all(row["scores"] == sorted(row["scores"], reverse=True) for row in labelled)
    assert (workplace / "runs/ppo/rollouts.jsonl").is_file() and (workplace / "runs/best/export").is_dir()
    exec(compile(load, "README.md", "exec"), {})
