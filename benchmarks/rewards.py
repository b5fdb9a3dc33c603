"""Does learning from rewards help? PPO, GRPO (unbiased) and rejection sampling on the embedded model and exact rewards.

    python benchmarks/rewards.py FOLDER [--seeds 3] [--grid]

Fine-tunes the embedded model once, then lets every algorithm learn from the gold reward of its own answers, with other
prompts and noise for each seed. Reports the gold reward of answers (temperature 1) to held-out questions before and
after, with the KL divergence from the fine-tuned model (nats summed over an answer, averaged over answers), the length
of answers, what was forgotten (loss on fixed general text), and minutes. With --grid: PPO over nine settings of
learning rate and price of KL, a factor of ten each.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

from trial import improvement, last, run

SETTINGS: dict[str, list[object]] = {
    "ppo": [
        "--model.samples", 2, "--data.batch_size", 128, "--model.optimizer.lr", 1e-4, "--trainer.max_epochs", 12,
        "--model.value_weight", 1, "--model.value_clip", "null", "--model.value_policy", "CausalLM",
    ],
    "dr_grpo": [
        "--model.samples", 8, "--data.batch_size", 32, "--model.optimizer.lr", 1e-4, "--trainer.max_epochs", 30,
        "--model.average", "tokens", "--model.kl_coef", 0.05,
    ],
    "rejection_sampling": [
        "--model.samples", 8, "--data.batch_size", 128, "--model.optimizer.lr", 1e-4, "--trainer.max_epochs", 10,
    ],
}  # fmt: skip
RATES, PRICES = (3e-5, 1e-4, 3e-4), (0.016, 0.05, 0.16)


def prepare(folder: Path, heldout: int) -> dict[str, Path]:
    """The files and the fine-tuned model that all runs start from."""
    files = {name: folder / f"{name}.jsonl" for name in ("questions", "rows", "text")}
    sample = ["data", "sample", "--language", "both"]
    run(*sample, "--kind", "instruction", "--rows", 4000, "--seed", 1, "--output", files["rows"])
    run(*sample, "--kind", "prompts", "--split", "heldout", "--seed", 7, "--rows", heldout, "--output",
        files["questions"])  # fmt: skip
    run(*sample, "--kind", "text", "--seed", 99, "--rows", 300, "--output", files["text"])
    run("fit", "--config", "demo", "--data.path", files["rows"], "--trainer.max_epochs", 2,
        "--trainer.default_root_dir", folder / "sft")  # fmt: skip
    files["sft"] = folder / "sft" / "export"
    return files


def answer(model: Path, questions: Path, output: Path, seed: int) -> None:
    """One answer to each question, at temperature 1."""
    run("predict", "--config", "demo", "--model.policy.path", model, "--data.path", questions,
        "--model.sampling.temperature", 1, "--model.sampling.seed", 1000 + seed, "--output", output)  # fmt: skip


def retained(model: Path, text: Path) -> float:
    """Loss on fixed general text, nats a token."""
    from lightning.pytorch import Trainer

    from leyden.algos import SFT
    from leyden.datamodules import InstructionData
    from leyden.models import CausalLM

    data = InstructionData(str(text), tokenizer=str(model), test_path=str(text), val_fraction=0.0, max_length=256)
    quiet = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", devices=1, **quiet)
    trainer.test(SFT(CausalLM(str(model))), data, verbose=False)
    return float(trainer.callback_metrics["test/loss"])


def one(folder: Path, files: dict[str, Path], name: str, seed: int, *more: object) -> dict[str, Any]:
    """Train once and measure."""
    prompts = folder / f"prompts-{seed}.jsonl"
    if not prompts.exists():
        run("data", "sample", "--language", "both", "--kind", "prompts", "--rows", 4000, "--seed", 20 + seed,
            "--output", prompts)  # fmt: skip
    began = time.monotonic()
    out = folder / "-".join([name, str(seed), *(str(word) for word in more[1::2])])
    more = (*more, *(["--model.value_policy.path", files["sft"]] if name == "ppo" else []))
    run("fit", "--config", name, "--model.policy.path", files["sft"], "--model.reward", "Gold", "--data.path", prompts,
        "--data.val_fraction", 0, "--data.max_length", 256, "--model.sampling.max_new_tokens", 64,
        "--seed_everything", seed, *SETTINGS[name], *more,
        "--trainer.default_root_dir", out)  # fmt: skip
    minutes = (time.monotonic() - began) / 60
    said = folder / f"answers-{out.name}.jsonl"
    first = folder / f"answers-sft-{seed}.jsonl"
    answer(files["sft"], files["questions"], first, seed)
    answer(out / "export", files["questions"], said, seed)
    return improvement(out / "export", files["sft"], said, first) | {
        "name": out.name,
        "length": last(out / "metrics.csv", "rollout/length"),
        "retained": retained(out / "export", files["text"]),
        "minutes": minutes,
    }


def report(r: dict[str, Any]) -> None:
    print(
        f"{r['name']:<28} {r['before']:6.3f} {r['after']:6.3f}  {r['gain']:6.3f} ({r['error']:.3f}) "
        f"{r['gain'] / r['error']:6.1f}  {r['kl']:6.2f} ({r['kl_error']:.2f})  {r['length']:5.1f}  {r['retained']:.3f}"
        f"  {r['minutes']:.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--heldout", type=int, default=1000)
    parser.add_argument("--algorithms", nargs="+", choices=[*SETTINGS], default=[*SETTINGS])
    parser.add_argument("--grid", action="store_true", help="PPO over learning rates and prices of KL instead")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True)
    files = prepare(folder, options.heldout)
    runs: list[tuple[Any, ...]] = [(name, seed) for name in options.algorithms for seed in range(options.seeds)]
    if options.grid:
        grid = itertools.product(RATES, PRICES)
        short = ("--trainer.max_epochs", 6)  # half of what the trials above take
        runs = [("ppo", 0, "--model.optimizer.lr", rate, "--model.kl_coef", price, *short) for rate, price in grid]
    results = []
    for name, seed, *more in runs:
        results.append(one(folder, files, name, seed, *more))
        report(results[-1])
    print(f"\n{options.heldout} held-out questions, temperature 1; loss on general text before: "
          f"{retained(files['sft'], files['text']):.3f}\n")  # fmt: skip
    print(
        "run                            gold   after    gain (s.e.)  in s.e.  KL (s.e.)  length  general text  minutes"
    )
    for result in results:
        report(result)


if __name__ == "__main__":
    main()
