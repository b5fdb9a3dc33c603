"""Every command and every piece of code in the READMEs runs, in order, in one folder."""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

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
    """The blocks of code in a language, but for those that need what a test has not, such as people."""
    text = re.sub(r"^<!-- needs [^>]*-->\n```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
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
    load, rewards, own = blocks("python", text)
    (workplace / "my_rewards.py").write_text(rewards, encoding="utf-8")
    (workplace / "my_algo.py").write_text(own, encoding="utf-8")
    (workplace / "few.py").write_text("def length(samples):\n    return [len(s.response) for s in samples]\n")
    for line in (line for block in blocks("bash", text) for line in block.splitlines()):
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            continue
        if words[0] != "leyden":
            subprocess.run(line, shell=True, check=True)
            continue
        if words[1:3] == ["data", "label"]:  # of answers of four tokens none is formal
            words = [*words[:-1], "few.length"]
        resumed = [] if "--ckpt_path" not in words else ["--trainer.max_steps", "3"]
        short = [] if "reward_model" in words and words[1] == "predict" else SHORT.get(words[1], [])
        short = [*short, *SHORT["look"]] if "eval" in words else short
        short = SHORT["sampled"] if words[1] == "fit" and {"ppo", "rejection_sampling"} & {*words} else short
        short = ["--rows", "240"] if words[1:3] == ["data", "sample"] else short
        code, out, err = leyden(*words[1:], *(resumed or short))
        # of answers of four tokens some are empty, and then labelling says so with 1
        assert code == 0 or (code == 1 and "label" in words), (words, err)
    answers = [json.loads(line) for line in (workplace / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 200 and all({"response", "finished"} <= set(answer) for answer in answers)
    assert (workplace / "runs/lora/export/adapter_model.safetensors").is_file()
    pairs = [json.loads(line) for line in (workplace / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert pairs and all(row["scores"] == sorted(row["scores"], reverse=True) for row in pairs)
    scored = [json.loads(line) for line in (workplace / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(scored) == len(pairs) and all(len(row["responses"]) == len(row["scores"]) for row in scored)
    assert (workplace / "runs/ppo/rollouts.jsonl").is_file() and (workplace / "runs/best/export").is_dir()
    exec(compile(load, "README.md", "exec"), {})


def test_the_reward_that_the_readme_writes_wants_formal_and_brief_answers() -> None:
    """One point for the ending, and one less for every 30 characters too many."""
    from leyden.example import Sample

    scope: dict[str, Any] = {}
    exec(blocks("python", (ROOT / "README.md").read_text(encoding="utf-8"))[1], scope)
    texts = ["알겠습니다.", "알겠어요.", "가" * 58 + "니다!", ""]
    assert scope["formal"]([Sample([], text) for text in texts]) == [1, 0, 0, 0]


def test_every_command_of_the_pages_is_found_and_none_twice() -> None:
    import commands as every

    found = [page.name for page in every.pages()]
    assert found[0] == "README.md" and len(found) == len(set(found)) and "walkthrough.md" in found
    assert not [name for name in found if name.endswith(".ko.md")]
    text = "To `a.py`:\n\n```python\nimport a\n```\n\n<!-- needs a network -->\n```bash\nleyden x\n```\n"
    text += "```bash\nmake\n```\n"
    assert [tuple(block) for block in every.blocks(text)] == [("python", "import a\n", "a.py"), ("bash", "make\n", "")]
    assert any("rejection_sampling" in block.content for block in every.blocks((ROOT / "README.md").read_text("utf-8")))
