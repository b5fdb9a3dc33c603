"""Every page of docs/ runs as written, in an empty folder."""

from __future__ import annotations

import ast
import csv
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
SHORT = ["--trainer.max_steps", "2", "--data.batch_size", "4"]


def pieces(text: str) -> list[tuple[str, str, str]]:
    """(file named just before it, language, content) of every block, in order."""
    found = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        named = re.findall(r"to `([\w.]+)`", text[: match.start()])
        found.append((named[-1] if named else "", match[1], match[2]))
    return found


def test_your_own_algorithm_runs_from_an_empty_folder(leyden, workplace: Path) -> None:
    for left in workplace.iterdir():
        left.unlink()
    text = (ROOT / "docs" / "your-own-algorithm.md").read_text(encoding="utf-8")
    for file, language, content in pieces(text):
        if language != "bash":
            (workplace / file).write_text(content, encoding="utf-8")
            continue
        for line in content.splitlines():
            words = shlex.split(line)
            code, _, error = leyden(*words[1:], *(SHORT if words[1] == "fit" else []))
            assert code == 0, (line, error)
    for run in ("apo", "simpo", "simpo-lora", "online-dpo"):
        with (workplace / "runs" / run / "metrics.csv").open(encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        assert any(row.get("train/accuracy") for row in rows) and (workplace / "runs" / run / "export").is_dir()
    assert (workplace / "runs/simpo-lora/export/adapter_model.safetensors").is_file()


def test_the_subclass_is_short() -> None:
    text = (ROOT / "docs" / "your-own-algorithm.md").read_text(encoding="utf-8")
    source = next(content for file, language, content in pieces(text) if file == "my_simpo.py" and language == "python")
    (cls,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert cls.end_lineno is not None and cls.end_lineno - cls.lineno + 1 <= 20


def test_simpo_is_simpo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The page's class against the paper's equation 6, in loops."""
    from small import small, some_trees

    from leyden.batch import pack

    text = (ROOT / "docs" / "your-own-algorithm.md").read_text(encoding="utf-8")
    (tmp_path / "my_simpo.py").write_text(next(c for f, k, c in pieces(text) if f == "my_simpo.py"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import my_simpo  # type: ignore[import-not-found]

    algorithm, batch = my_simpo.SimPO(small(), beta=1.5, gamma=0.4), pack(some_trees(5, responses=2))
    logp, losses = algorithm.policy(batch).logp, []
    for span in batch.structure():
        means = [logp[a:b][batch.weight[a:b] > 0].mean() for _, a, b in span.responses]
        losses.append(-F.logsigmoid(1.5 * means[0] - 1.5 * means[1] - 0.4))
    expected = torch.stack(losses).mean()
    assert float(algorithm.loss(batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
