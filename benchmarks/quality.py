"""Are the models as good as the peer's? Both sides train on the same pairs, and one judge looks at both.

    python benchmarks/quality.py FOLDER --model MODEL_FOLDER --data PAIRS [--only reward_model dpo]

Of the usable rows of at most --max-length tokens, the first --pairs are trained on for one epoch and the others held
out: AdamW, the same learning rate, warm-up and cosine, weights in fp32, and arithmetic too unless --precision
bf16-mixed is given, which suits GPUs and processors with bf16 arithmetic. Leyden trains by its command line, TRL at its
fastest settings. `leyden validate` then says of both models how often they prefer the chosen
answer of held-out pairs, with a 95% interval of the proportion; of DPO also by what margin of rewards, against one
reference.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sides

RATES = {"reward_model": 1e-5, "dpo": 5e-6}
SIZE = 8
"""Pairs a step."""


def split(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Two files: the pairs to train on, and those held out."""
    from leyden.data.chat_template import ChatTemplate
    from leyden.data.tokenizer import load_tokenizer
    from leyden.datamodules.files.files import read_rows
    from leyden.datamodules.formats.formats import RowError, detect, parse
    from leyden.datamodules.storage.truncation import longest

    template, usable, dropped = ChatTemplate(load_tokenizer(options.model)), [], {"unusable": 0, "longer": 0}
    rows = [row for _, row in read_rows(options.data)]
    name = detect(rows[:100], "preference")
    for row in rows:
        try:
            tree = template.encode(parse(row, name, "preference"))
        except RowError:
            dropped["unusable"] += 1
            continue
        fits = longest(tree) <= options.max_length
        dropped["longer"] += not fits
        usable += [row] if fits else []
    counts = f"{len(usable)} kept, {dropped['unusable']} unusable, {dropped['longer']} over {options.max_length} tokens"
    print(f"{len(rows)} rows: {counts}; {options.pairs} trained on, {len(usable) - options.pairs} held out", flush=True)
    files = folder / "train.jsonl.gz", folder / "heldout.jsonl.gz"
    for file, part in zip(files, (usable[: options.pairs], usable[options.pairs :]), strict=True):
        with gzip.open(file, "wt", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
    return files


def leyden(*words: object) -> str:
    """Run a command and give back what it printed."""
    done = subprocess.run([sys.executable, "-m", "leyden", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout


def ours(kind: str, options: argparse.Namespace, train: Path, heldout: Path, out: Path) -> Path:
    leyden(
        "fit", "--config", kind, "--model.policy.path", options.model, "--data.path", train, "--data.val_path", heldout,
        "--data.batch_size", SIZE, "--data.max_length", options.max_length, "--model.optimizer.lr", RATES[kind],
        "--model.optimizer.weight_decay", 0, "--trainer.precision", options.precision, "--trainer.max_epochs", 1,
        "--trainer.gradient_clip_val", 1, "--trainer.default_root_dir", out,
    )  # fmt: skip
    return out / "export"


def theirs(kind: str, options: argparse.Namespace, train: Path, out: Path) -> Path:
    """Train TRL on the same token ids, in a process of its own."""
    settings = ["--worker", kind, "--train", train, "--out", out, "--model", options.model]
    command = [sys.executable, __file__, "-", *settings, "--data", "-", "--max-length", options.max_length,
               "--precision", options.precision]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return out


def worker(options: argparse.Namespace) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    dpo = options.worker == "dpo"
    sized = argparse.Namespace(
        **(vars(options) | {"data": options.train, "batch_size": 10**6, "warmup": 0, "steps": 0})
    )
    trees = sides.make_trees(sized, "preference")
    tokenizer, used = AutoTokenizer.from_pretrained(options.model), {r[-1] for tree in trees for r in tree.responses}
    free = next(i for i in (tokenizer.pad_token_id, *tokenizer.all_special_ids) if i is not None and i not in used)
    rows = [
        {"prompt_ids": t.prompt, "chosen_ids": t.responses[0], "rejected_ids": t.responses[1]}
        if dpo
        else {"chosen_ids": t.prompt + t.responses[0], "rejected_ids": t.prompt + t.responses[1]}
        for t in trees
    ]
    for row, tree in zip(rows, trees, strict=True):
        row["length"] = len(tree.prompt) + max(map(len, tree.responses))
    base, config = (DPOTrainer, DPOConfig) if dpo else (RewardTrainer, RewardConfig)

    class Trainer(base):  # type: ignore[misc, valid-type]
        def _prepare_dataset(self, dataset: Any, *rest: Any, **kwargs: Any) -> Any:
            return dataset if dpo else super()._prepare_dataset(dataset, *rest, **kwargs)

    loader = AutoModelForCausalLM if dpo else AutoModelForSequenceClassification
    model = loader.from_pretrained(options.model, dtype=torch.float32, **({} if dpo else {"num_labels": 1}))
    own: dict[str, Any] = {"beta": 0.1} if dpo else {"pad_token": tokenizer.convert_ids_to_tokens(free)}
    steps = math.ceil(len(rows) / SIZE)
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            output_dir=folder, learning_rate=RATES[options.worker], lr_scheduler_type="cosine",
            warmup_steps=round(0.03 * steps), weight_decay=0.0, max_grad_norm=1.0, num_train_epochs=1,
            per_device_train_batch_size=SIZE, gradient_checkpointing=False, remove_unused_columns=False,
            train_sampling_strategy="group_by_length", bf16=options.precision == "bf16-mixed",
            max_length=options.max_length, report_to=[],
            save_strategy="no", use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False, disable_tqdm=True,
            logging_steps=10, **own,
        )  # fmt: skip
        trainer = Trainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.train()
        trainer.model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


def judged(kind: str, options: argparse.Namespace, model: Path, heldout: Path) -> dict[str, float]:
    """What `leyden validate` says of a model."""
    reference = ["--model.reference_policy", "CausalLM", "--model.reference_policy.path", options.model]
    printed = leyden(
        "validate", "--config", kind, "--model.policy.path", model, "--data.path", heldout, "--data.val_path", heldout,
        "--data.max_length", options.max_length, *(reference if kind == "dpo" else []),
    )  # fmt: skip
    words = [line.split() for line in printed.splitlines()]
    return {two[0]: float(two[1]) for two in words if len(two) == 2 and two[0].startswith("val/")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=320)
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--only", nargs="+", choices=[*RATES], default=[*RATES])
    for hidden in ("worker", "train", "out"):
        parser.add_argument(f"--{hidden}", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    options.folder.mkdir(parents=True)
    train, heldout = split(options, options.folder)
    with gzip.open(heldout, "rt", encoding="utf-8") as lines:
        n = sum(1 for _ in lines)
    for kind in options.only:
        for side in ("leyden", "trl"):
            began, out = time.monotonic(), options.folder / f"{side}-{kind}"
            made = ours(kind, options, train, heldout, out) if side == "leyden" else theirs(kind, options, train, out)
            minutes = (time.monotonic() - began) / 60
            found = judged(kind, options, made, heldout)
            p = found["val/accuracy"]
            margin = f", margin {found['val/margin']:.3f}" if "val/margin" in found else ""
            print(
                f"{kind:<13} {side:<7} accuracy {p:.3f} ± {1.96 * math.sqrt(p * (1 - p) / n):.3f}{margin}, "
                f"loss {found['val/loss']:.4f}, {minutes:.0f} minutes",
                flush=True,
            )


if __name__ == "__main__":
    main()
