"""Local tasks for lm-eval: questions of the sample world with four choices, texts, and questions to answer."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import yaml

from leyden.datamodules.sample import sample_rows

CHOICES = 4


def choices(count: int, language: str = "en", seed: int = 0) -> list[dict[str, Any]]:
    """Questions with four different choices: the right answer and wrong ones of the same kind."""
    draw, found = Random(seed), list[dict[str, Any]]()
    rows = list(sample_rows("prompts", language, 8 * count + 200, seed))
    kinds: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        kinds.setdefault((row["language"], row["topic"]), []).append(row["answer"])
    for row in rows:
        others = [*filter(None, row["rivals"].split("|")), *kinds[row["language"], row["topic"]]]
        wrong = [text for text in dict.fromkeys(others) if text != row["answer"]]
        if len(wrong) < CHOICES - 1:
            continue
        options = [row["answer"], *draw.sample(wrong, CHOICES - 1)]
        draw.shuffle(options)
        found.append({"question": row["prompt"], "choices": options, "answer": options.index(row["answer"])})
    return found[:count]


def write(folder: Path, name: str, rows: list[dict[str, Any]], **config: Any) -> Path:
    """A task's YAML beside its rows; examples come from the rows themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    usual = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "metadata": {"version": 1.0},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(usual | config, allow_unicode=True), encoding="utf-8")
    return file


def choice_task(folder: Path, name: str = "world", count: int = 20, language: str = "en", **config: Any) -> Path:
    usual: dict[str, Any] = dict(
        output_type="multiple_choice",
        fewshot_split="test",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_target="answer",
        doc_to_choice="choices",
        metric_list=[
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    )
    return write(folder, name, choices(count, language), **(usual | config))


def text_task(folder: Path, name: str = "texts", count: int = 6) -> Path:
    rows = [{"text": row["text"]} for row in sample_rows("text", "both", count, 0)]
    return write(
        folder, name, rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="text",
        metric_list=[{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )  # fmt: skip


def answer_task(folder: Path, name: str = "sums", count: int = 8, **config: Any) -> Path:
    """Questions to answer, whose answers are read by a regular expression."""
    rows = [{"question": row["question"], "answer": row["choices"][row["answer"]]} for row in choices(count)]
    usual: dict[str, Any] = dict(
        output_type="generate_until",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n", "Question:"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
        filter_list=[
            {"name": "first", "filter": [
                {"function": "regex", "regex_pattern": r"(\w+)"}, {"function": "take_first"},
            ]},
        ],
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    return write(folder, name, rows, **(usual | config))
