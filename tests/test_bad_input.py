"""Real files, models and flags: every mistake is one line, exit code 2, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from leyden.paths import resolve

GOOD = "".join(json.dumps({"prompt": f"{i} 더하기 1은?", "response": f"{i + 1}입니다."}) + "\n" for i in range(6))
FILES: dict[str, bytes] = {
    "good.jsonl": GOOD.encode(),
    "empty.jsonl": b"",
    "half.jsonl": GOOD.encode() + b'{"prompt": "half',
    "latin.jsonl": GOOD.encode() + b'{"prompt": "caf\xe9", "response": "x"}\n',
    "types.jsonl": GOOD.encode() + b'{"prompt": 7, "response": "x"}\n',
    "blank.jsonl": GOOD.encode() + b'{"prompt": "?", "response": ""}\n',
    "unknown.jsonl": b'{"frage": "x", "antwort": "y"}\n',
    "missing.jsonl": GOOD.encode() + b'{"prompt": "?"}\n',
}
FIT = ["fit", "--config", "sft", "--trainer.accelerator", "cpu", "--trainer.max_steps", "1"]


def tokenizer_without(what: str, folder: Path) -> str:
    """The embedded model, its tokenizer short of a chat template or a pad token."""
    shutil.copytree(resolve("tiny"), folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop(what, None)
    file.write_text(json.dumps(config), encoding="utf-8")
    if what == "chat_template":
        (folder / "chat_template.jinja").unlink(missing_ok=True)
    return str(folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.path", "god.jsonl"], "god.jsonl: .*did you mean 'good.jsonl'"),
        (["--data.path", "empty.jsonl"], "empty.jsonl: .*empty"),
        (["--data.path", "half.jsonl"], r"half.jsonl:7: .*cut off"),
        (["--data.path", "latin.jsonl"], r"latin.jsonl:7: .*UTF-8"),
        (["--data.path", "types.jsonl"], r"types.jsonl:7: 'prompt' is 7, not a text"),
        (["--data.path", "blank.jsonl"], r"blank.jsonl:7: 'response' is empty"),
        (["--data.path", "missing.jsonl"], r"missing.jsonl:7: .*response"),
        (["--data.path", "unknown.jsonl"], r"unknown.jsonl: .*frage.*antwort.*--data.columns"),
        (
            ["--data.path", "good.jsonl", "--data.columns", "{prompt: promt}"],
            r"good.jsonl: .*promt.*did you mean 'prompt'",
        ),
        (["--data.path", "good.jsonl", "--data.format", "alpacca"], "alpacca.*did you mean 'alpaca'"),
        (
            ["--data.path", "good.jsonl", "--data.max_length", "12", "--data.overlength", "error"],
            r"good.jsonl:1: \d+ tok",
        ),
        (["--data.path", "good.jsonl", "--data.max_length", "12"], "no training rows are left"),
        (["--data.path", "good.jsonl", "--data.max_tokens", "10"], r"longest row has \d+ tokens .*--data.max_tokens"),
        (["--data.path", "good.jsonl", "--data.max_tokens", "50"], r"--trainer.accumulate_grad_batches \d"),
        (["--data.path", "good.jsonl", "--model.policy.path", "./no/model"], "./no/model: no such model folder"),
        (
            ["--data.path", "good.jsonl", "--model.policy.path", "nobody/nothing"],
            "nobody/nothing: .*cannot be loaded|no tok",
        ),
        (
            ["--data.path", "good.jsonl", "--config", "lora", "--model.policy.adapter.target_modules", "[q_prj]"],
            "q_prj.*did you mean 'q_proj'",
        ),
        (
            ["--data.path", "good.jsonl", "--trainer.default_root_dir", "good.jsonl/run"],
            "not a folder that can be written",
        ),
    ],
)
def test_a_mistake_is_one_line(flags: list[str], message: str, leyden: Callable[..., tuple[int, str, str]]) -> None:
    import re

    for name, content in FILES.items():
        Path(name).write_bytes(content)
    before = sorted(Path().iterdir())
    code, _, error = leyden(*FIT, *flags)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in error, error
    assert re.search(message, lines[0]), lines[0]
    assert [p for p in sorted(Path().iterdir()) if p not in before and p.name != "runs"] == []
    assert not list(Path().glob("runs/*"))


def test_a_tokenizer_without_chat_template(leyden: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    Path("good.jsonl").write_bytes(FILES["good.jsonl"])
    path = tokenizer_without("chat_template", tmp_path / "bare")
    arguments = [*FIT, "--data.path", "good.jsonl", "--model.policy.path", path]
    code, _, error = leyden(*arguments)
    assert code == 2 and "has no chat template; add --data.chat_template plain" in error
    code, _, error = leyden(*arguments, "--data.chat_template", "plain")
    assert code == 0, error
    exported = json.loads(Path("runs/sft-1/export/tokenizer_config.json").read_text(encoding="utf-8"))
    beside = Path("runs/sft-1/export/chat_template.jinja")
    assert "Assistant:" in (beside.read_text(encoding="utf-8") if beside.exists() else exported["chat_template"])


def test_a_tokenizer_without_pad_token_needs_none(leyden: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Batches are packed, so nothing is ever padded with a token that could be taken for another."""
    Path("good.jsonl").write_bytes(FILES["good.jsonl"])
    path = tokenizer_without("pad_token", tmp_path / "bare")
    code, _, error = leyden(*FIT, "--data.path", "good.jsonl", "--model.policy.path", path)
    assert code == 0, error


def test_pretrain_cuts_long_texts_and_trains(leyden: Callable[..., tuple[int, str, str]]) -> None:
    rows = [{"text": f"{i}. " + "긴 글은 조각으로 나뉜다. " * 400} for i in range(8)]
    Path("corpus.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    flags = ["--data.path", "corpus.jsonl", "--trainer.max_steps", "1", "--data.max_length", "128"]
    code, _, error = leyden("fit", "--config", "pretrain", "--trainer.accelerator", "cpu", *flags)
    assert code == 0 and "text" in error, error
