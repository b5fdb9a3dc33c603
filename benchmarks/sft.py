"""Supervised fine-tuning, side by side with TRL: the same token ids, model, dtype, optimizer and examples a step.

    python benchmarks/sft.py --model MODEL_FOLDER --data ROWS

Every contestant runs in a process of its own, one after the other. TRL runs with its defaults and at its best
(gradient checkpointing off, best-fit packing; weights in bf16 with and without autocast, the faster one counts). A
first pair of runs in fp32 proves that both do the same work: loss and gradient norm of the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # HF_HUB_OFFLINE=0 lets --model name one of the hub
os.environ |= {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # for all: spinning threads suffer from any other program
RATE = 1e-6
CONTESTANTS = {
    "leyden": {},
    "trl, defaults": {"gradient_checkpointing": True},
    "trl, best, bf16 weights": {"gradient_checkpointing": False, "packing": True, "bf16": False},
    "trl, best, bf16 autocast": {"gradient_checkpointing": False, "packing": True, "bf16": True},
}


def rows_of(options: argparse.Namespace) -> list[Any]:
    """The first rows as trees: what both train on, token by token."""
    from leyden.chat import load_tokenizer
    from leyden.datamodules.files import read_rows
    from leyden.datamodules.formats import detect, parse
    from leyden.datamodules.overlength import longest
    from leyden.datamodules.template import Template

    template = Template(load_tokenizer(options.model))
    rows = [row for _, row in read_rows(options.data)]
    name = detect(rows[:100], "instruction")
    trees = (template.encode(parse(row, name, "instruction")) for row in rows)
    kept = [tree for tree in trees if longest(tree) <= options.max_length]
    needed = options.batch_size * (options.warmup + options.steps)
    if len(kept) < needed:
        sys.exit(f"{options.data} has {len(kept)} rows of at most {options.max_length} tokens, {needed} are needed")
    return kept[:needed]


def leyden(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """One run of ours through the Trainer, with callbacks that look at the clock."""
    import torch
    from lightning.pytorch import Callback, Trainer

    from leyden.algos import SFT
    from leyden.batch import Totals
    from leyden.data import DataModule
    from leyden.models import CausalLM

    trees = rows_of(options)

    class Rows:
        lengths = [len(tree) for tree in trees]
        totals: list[Totals] = [tree.totals() for tree in trees]

        def __len__(self) -> int:
            return len(trees)

        def __getitem__(self, index: int) -> Any:
            return trees[index]

    class Data(DataModule):
        train_trees = Rows()

        def train_plan(self) -> Any:  # in the order of the file, as TRL is told to
            from leyden.plan import plan

            return plan(range(len(trees)), Rows.lengths, self.batch_size, self.max_tokens)

        def source(self, row: int) -> str:
            return str(row)

    class Clock(Callback):
        seconds: list[float] = []
        losses: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)
            if not self.losses:
                self.losses = [float(trainer.callback_metrics[f"train/{n}"]) for n in ("loss", "grad_norm")]

    algorithm = SFT(
        CausalLM(options.model, dtype=options.dtype),
        optimizer=lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.0, fused=True),
        lr_scheduler=None,
    )
    quiet = {n: False for n in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    data = Data(options.batch_size, max_tokens=10**9, seed=0)
    data.seed = None  # type: ignore[assignment]
    clock = Clock()
    Trainer(
        accelerator="cpu", max_epochs=1, gradient_clip_val=1.0, log_every_n_steps=1, callbacks=[clock], **quiet
    ).fit(algorithm, data)
    size = options.batch_size
    tokens = [sum(map(len, trees[i : i + size])) for i in range(0, len(trees), size)]
    return {"seconds": clock.seconds, "tokens": tokens, "first": clock.losses}


def trl(options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """One run of TRL's SFTTrainer on the same token ids."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    trees = rows_of(options)
    rows = [
        {
            "input_ids": tree.prompt + tree.responses[0],
            "completion_mask": [0] * len(tree.prompt) + [int(w) for w in tree.weights[0]],
        }
        for tree in trees
    ]
    seconds: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    class Counting(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            return super().training_step(model, inputs, *rest, **kwargs)

    packed = settings.get("packing", False)
    size, length = options.batch_size, options.max_length
    if packed:  # as many tokens a step as the examples of one step have, in rows as long as allowed
        budget = options.batch_size * sum(map(len, trees)) / len(trees)
        length = max(max(map(len, trees)), min(length, round(budget)))
        size = max(1, round(budget / length))
    low = settings.get("bf16", True) and options.dtype == "bfloat16"
    with tempfile.TemporaryDirectory() as folder:
        trainer = Counting(
            AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)),
            args=SFTConfig(
                output_dir=folder,
                max_length=length,
                per_device_train_batch_size=size,
                packing=packed,
                packing_strategy="bfd",
                completion_only_loss=True,
                gradient_checkpointing=settings["gradient_checkpointing"],
                bf16=low,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=1.0,
                max_steps=options.warmup + options.steps,
                logging_steps=1,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                dataloader_pin_memory=False,
                train_sampling_strategy="sequential",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(options.model),
            callbacks=[Clock()],
        )
        trainer.train()
    first = trainer.state.log_history[0]
    return {"seconds": seconds, "tokens": tokens, "first": [float(first["loss"]), float(first["grad_norm"])]}


def contest(name: str, options: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Run one contestant in a process of its own and add its peak memory."""
    chosen = vars(options) | changes
    command = [sys.executable, __file__, "--worker", name]
    for key, value in chosen.items():
        if key not in ("worker",):
            command += [f"--{key.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def speed(result: dict[str, Any], warmup: int) -> list[float]:
    """Real tokens per second of each step after the warm-up."""
    return [t / s for t, s in zip(result["tokens"], result["seconds"], strict=True)][warmup:]


def show(name: str, result: dict[str, Any], rates: list[float], ours: float) -> None:
    quartiles = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
    print(
        f"{name:<26} {statistics.median(rates):8.0f} tokens/s  [{quartiles[0]:.0f}, {quartiles[2]:.0f}]  "
        f"peak {result['peak_gb']:.2f} GB  ratio {ours / statistics.median(rates):.2f}"
    )


def machine() -> str:
    names = ("leyden", "trl", "torch", "transformers", "lightning")
    known = Path("/proc/cpuinfo")  # Linux only, and not every processor has a name there
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{cpu or platform.processor() or platform.machine()}, {os.cpu_count()} cores; " + ", ".join(
        f"{n} {version(n)}" for n in names
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="model folder; tiny is the embedded one")
    parser.add_argument("--data", default="", help="rows; default: generated ones")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--warmup", type=int, default=2, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--worker", choices=[*CONTESTANTS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    from leyden.paths import resolve

    options.model = resolve(options.model)
    if options.worker:
        run = leyden if options.worker == "leyden" else trl
        result = run(options, CONTESTANTS[options.worker])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(result | {"peak_gb": peak / 1e6}))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            options.data = f"{folder}/rows.jsonl"
            generate = ["data", "sample", "--rows", "400", "--language", "both", "--output", options.data]
            subprocess.run([sys.executable, "-m", "leyden", *generate], check=True, stdout=subprocess.DEVNULL)
        compare(options)


def compare(options: argparse.Namespace) -> None:
    print(machine())
    print(f"{Path(options.data).name}, {options.batch_size} examples a step, {options.steps} steps, {options.dtype}\n")
    print("first step in fp32: loss, gradient norm")
    for name in ("leyden", "trl, defaults"):
        loss, norm = contest(name, options, dtype="float32", steps=1, warmup=0)["first"]
        print(f"{name:<26} {loss:.6f} {norm:.5f}")
    print()
    results = {name: contest(name, options) for name in CONTESTANTS}
    rates = {name: speed(result, options.warmup) for name, result in results.items()}
    ours = statistics.median(rates["leyden"])
    for name in CONTESTANTS:
        show(name, results[name], rates[name], ours)
    best = min(ours / statistics.median(rates[name]) for name in CONTESTANTS if name != "leyden")
    print(f"\nleyden runs at {best:.2f} times the speed of TRL at its best (median, quartiles in brackets)")


if __name__ == "__main__":
    main()
