"""The model card: description, use, measurements, origin and configuration of an exported folder."""

from __future__ import annotations

import csv
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from leyden import __version__
from leyden.checkpoint.find import header

SHOWN = ("val/", "eval/", "test/", "train/loss")
PACKAGES = ("torch", "transformers", "peft", "lightning")


def card(run: Path, config: dict[str, Any], folder: Path, checkpoint: Path | None, cost: object | None = None) -> str:
    """README.md of an exported folder.

    Args:
        run: the run's folder.
        config: its resolved configuration.
        folder: the exported folder, complete except for the card.
        checkpoint: the exported checkpoint, if it was not the state at the end.
        cost: the cost of merging, if an adapter was merged.
    """
    settings = config.get("model", {}).get("init_args", {})
    algorithm = str(config.get("model", {}).get("class_path", "")).rpartition(".")[2]
    base = str(settings.get("policy", {}).get("init_args", {}).get("path", ""))
    adapter = (folder / "adapter_config.json").is_file()
    data = config.get("data", {}).get("init_args", {}).get("path", "")
    head = {"library_name": "peft" if adapter else "transformers", "tags": ["leyden", algorithm.lower()]}
    if base and not Path(base).exists() and base != "tiny":
        head["base_model"] = base
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {run.resolve().name}",
        f"{'An adapter for' if adapter else 'Trained from'} `{base}` with {algorithm} on `{_names(data)}`, by Leyden "
        f"{__version__} ({', '.join(f'{name} {version(name)}' for name in PACKAGES)}).",
        f"## Use\n\n```python\n{_usage(folder, adapter, base)}\n```",
        *([f"## Merged\n\nThe adapter was worked into the weights: {cost}."] if cost is not None else []),
        *_measured(run, checkpoint),
        *_origin(run, checkpoint),
        f"## Configuration\n\n```yaml\n{yaml.safe_dump(config, sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _names(data: Any) -> str:
    """Names of the data files, without their folders, which may be private."""
    paths = data if isinstance(data, list | dict) else [data]
    return ", ".join(Path(str(path)).name for path in paths)


def _usage(folder: Path, adapter: bool, base: str) -> str:
    """Python that loads the folder."""
    config = json.loads((folder / ("adapter_config.json" if adapter else "config.json")).read_text(encoding="utf-8"))
    scores = config.get("task_type") == "SEQ_CLS" or "Classification" in str(config.get("architectures"))
    auto, more = ("AutoModelForSequenceClassification", ", num_labels=1") if scores else ("AutoModelForCausalLM", "")
    lines = [f"from transformers import {auto}, AutoTokenizer", ""]
    lines.append('tokenizer = AutoTokenizer.from_pretrained("FOLDER")')
    if not adapter:
        return "\n".join([*lines, f'model = {auto}.from_pretrained("FOLDER")'])
    loaded = [f'model = {auto}.from_pretrained("{base}"{more})', 'model = PeftModel.from_pretrained(model, "FOLDER")']
    return "\n".join(["from peft import PeftModel", *lines, *loaded])


def _measured(run: Path, checkpoint: Path | None) -> list[str]:
    """Section with the last value of each metric on held-out rows, up to the exported state."""
    file = run / "metrics.csv"
    if not file.is_file():
        return []
    limit = None
    if checkpoint is not None:
        limit = int(torch.load(checkpoint, mmap=True, map_location="meta", weights_only=True)["global_step"])
    last: dict[str, str] = {}
    with file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            if limit is None or float(row["step"]) <= limit:
                last |= {name: value for name, value in row.items() if value and name.startswith(SHOWN)}
                last["step"] = row["step"]
    names = [name for name in last if name != "step"]
    rows = "\n".join(f"| {name} | {float(last[name]):.4g} |" for name in names)
    return [f"## Measured\n\nAt step {last['step']}:\n\n| | |\n|---|---|\n{rows}"] if names else []


def _origin(run: Path, checkpoint: Path | None) -> list[str]:
    """Section with the fingerprints of tokenizer, data and base models, from the checkpoint."""
    files = [checkpoint] if checkpoint is not None else sorted((run / "checkpoints").glob("*.ckpt"))[-1:]
    if not files:
        return []
    entry = header(files[0])
    hashes = {"tokenizer": entry.get("tokenizer"), "data": entry.get("data")} | {
        f"weights of {name}": value for name, value in (entry.get("base") or {}).items()
    }
    rows = "\n".join(f"| {name} | `{value}` |" for name, value in hashes.items() if value)
    return [f"## Made from\n\n| | fingerprint |\n|---|---|\n{rows}"] if rows else []
