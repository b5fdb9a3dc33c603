"""`leyden export`: what is written loads elsewhere and says the same; what merging costs is what it says."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prepared import write

ROWS = [{"prompt": f"{i} 더하기 {i}?", "response": f"{2 * i}입니다."} for i in range(12)]
PAIRS = [{"prompt": f"{i}?", "chosen": f"{i}입니다.", "rejected": "몰라."} for i in range(12)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every kind, two steps each, on the embedded model."""
    from leyden.cli.launcher import main

    folder = tmp_path_factory.mktemp("runs")
    rows, pairs = write(folder / "rows.jsonl", ROWS), write(folder / "pairs.jsonl", PAIRS)
    own = [
        "--data.batch_size",
        "4",
        "--trainer.max_steps",
        "2",
        "--data.max_length",
        "64",
        "--model.optimizer.lr",
        "1e-2",
    ]
    kinds = {
        "full": ["--config", "sft", "--data.path", rows, "--checkpoint.every_n_train_steps", "1"],
        "lora": ["--config", "sft", "--config", "lora", "--data.path", rows],
        "qlora": ["--config", "sft", "--config", "qlora", "--data.path", rows, "--model.policy.dtype", "float32"],
        "judge": ["--config", "reward_model", "--config", "lora", "--data.path", pairs],
    }
    # in this arithmetic on every processor: in bfloat16 rounding alone moves answers
    (folder / "exact.yaml").write_text(
        "trainer:\n  plugins:\n    - class_path: leyden.precision.QLoRAPrecision\n"
        "      init_args: {compute_dtype: float32}\n"
    )
    kinds["qlora"] += ["--config", str(folder / "exact.yaml")]
    for name, words in kinds.items():
        tail = ["--model.policy.path", "tiny", "--trainer.default_root_dir", str(folder / name)]
        assert main(["fit", *words, *own, *tail]) == 0
    return folder


def logits(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([tokens])).logits.float()


TOKENS = [5, 80, 300, 7, 1200]


@pytest.mark.parametrize("name", ["lora", "judge"])
def test_merged_is_the_model_with_its_adapter(name: str, runs: Path, tmp_path: Path, capsys: Any) -> None:
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from leyden.cli.launcher import main

    out = tmp_path / "merged"
    assert main(["export", str(runs / name), str(out), "--merge", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    score = name == "judge"
    assert ("scores of 6 texts moved by 0.0000" if score else "moved by 0.0000 nats on average") in printed
    auto = AutoModelForSequenceClassification if score else AutoModelForCausalLM
    peft = AutoPeftModelForSequenceClassification if score else AutoPeftModelForCausalLM
    merged = auto.from_pretrained(out, dtype=torch.float32)
    adapted = peft.from_pretrained(runs / name / "export", dtype=torch.float32, **({"num_labels": 1} if score else {}))
    if score:
        adapted.base_model.model.config.pad_token_id = merged.config.get_text_config().pad_token_id
    torch.testing.assert_close(logits(merged, TOKENS), logits(adapted, TOKENS), atol=1e-4, rtol=1e-4)
    assert not (out / "adapter_config.json").exists()


def test_over_four_bits_both_bases_say_what_they_cost(runs: Path, tmp_path: Path, capsys: Any) -> None:
    """Merged into the numbers that four bits stand for it is the model that was trained; into those as read, not."""
    from leyden.cli.launcher import main

    moved = {}
    for base in ("full", "four_bit"):
        out = tmp_path / base
        words = ["--merge", "--dtype", "float32", "--merge-into", base]
        assert main(["export", str(runs / "qlora"), str(out), *words]) == 0
        printed = capsys.readouterr().out
        moved[base] = float(printed.split("moved by ")[1].split(" nats")[0])
        assert f"moved by {moved[base]:.4f} nats" in (out / "README.md").read_text(encoding="utf-8")
    assert moved["four_bit"] < 0.01 < moved["full"]


def test_a_card_says_what_it_is(runs: Path, tmp_path: Path) -> None:
    from leyden.cli.launcher import main

    assert main(["export", str(runs / "lora"), str(tmp_path / "adapter")]) == 0
    text = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "peft" and "sft" in head["tags"]
    for part in ("with SFT on `rows.jsonl`", "| train/loss |", "weights of policy", "class_path: leyden.algos.SFT",
                 "PeftModel.from_pretrained"):  # fmt: skip
        assert part in text, part
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_an_earlier_state_is_that_of_its_checkpoint(runs: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from leyden.cli.launcher import main

    (file,) = (runs / "full" / "checkpoints").glob("*.ckpt")
    assert main(["export", str(runs / "full"), str(tmp_path / "last"), "--checkpoint", "last"]) == 0
    saved = torch.load(file, weights_only=True, map_location="cpu")["state_dict"]
    written = load_file(tmp_path / "last" / "model.safetensors")
    for name, weight in written.items():
        assert torch.equal(saved[f"policy.model.{name}"], weight)
    assert "At step 2" in (tmp_path / "last" / "README.md").read_text(encoding="utf-8")


def test_what_cannot_be_exported(runs: Path, tmp_path: Path, capsys: Any) -> None:
    from leyden.cli.launcher import main

    wrong = {
        (str(tmp_path), ""): "no run's folder",
        (str(runs / "full"), "--merge"): "a whole model, with no adapter to merge",
        (str(runs / "lora"), "--merge --merge-into four_bit"): "not trained over four-bit weights",
        (str(runs / "lora"), "--merge-into four_bit"): "only where an adapter is merged",
        (str(runs / "lora"), "--mrege"): "did you mean '--merge'",
        (str(runs / "lora"), "--checkpoint nothing.ckpt"): "no such file",
    }
    for (run, flags), message in wrong.items():
        assert main(["export", run, str(tmp_path / "out"), *flags.split()]) == 2
        assert message in capsys.readouterr().err, (run, flags)
        assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert main(["export", str(runs / "lora"), str(tmp_path / "out")]) == 2
    assert "it is there already" in capsys.readouterr().err


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for."""

    asked: list[tuple[str, str, Any]] = []

    def _answer(self, code: int, body: Any) -> None:
        text = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        Hub.asked.append((self.path, self.headers.get("Authorization", ""), sent))
        if self.path.endswith("/repos/create"):
            self._answer(200, {"url": "https://huggingface.co/me/model", "name": "me/model", "id": "x"})
        elif self.path.endswith("/validate-yaml"):
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(sent)["files"]
            ]
            self._answer(200, {"files": files})
        else:
            self._answer(403, {"error": "not yours"})

    do_GET = do_PUT = do_HEAD = do_POST

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    Hub.asked = []
    yield address
    server.shutdown()
    server.server_close()


def test_an_upload_asks_the_hub_and_says_why_it_was_refused(hub: str, runs: Path, tmp_path: Path, capsys: Any) -> None:
    from leyden.cli.launcher import main

    code = main(["export", str(runs / "lora"), str(tmp_path / "out"), "--push-to-hub", "me/model"])
    error = capsys.readouterr().err
    path, key, sent = Hub.asked[0]
    assert path == "/api/repos/create" and key == "Bearer hf_secret"
    asked = json.loads(sent)
    assert asked["name"] == "model" and (asked.get("visibility") == "private" or asked.get("private") is True)
    last, _, files = Hub.asked[-1]  # the files themselves, which this hub refuses
    assert "/models/me/model/commit/" in last and b"adapter_model.safetensors" in files and b"README.md" in files
    assert code == 2 and "--push-to-hub me/model" in error and "hf_secret" not in error and "HF_TOKEN" in error
    assert (tmp_path / "out" / "README.md").is_file()
