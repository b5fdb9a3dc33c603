"""Do preferences help? A reward model and DPO on generated pairs, judged by the exact reward that made the pairs.

    python benchmarks/preferences.py FOLDER [--seeds 3]

Fine-tunes the embedded model once, then for every seed trains a reward model and a DPO policy on new noisy pairs. It
reports how often the reward model agrees with the true order of held-out pairs, and the gold reward of sampled answers
(temperature 1) to held-out questions before and after DPO, with the KL divergence from the fine-tuned model: nats
summed over an answer, averaged over answers.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

from trial import improvement, last, run


def one_seed(folder: Path, sft: Path, files: dict[str, Path], options: Any, seed: int) -> dict[str, float]:
    """Train on fresh pairs and measure."""
    pairs, rm, dpo = folder / f"pairs-{seed}.jsonl", folder / f"rm-{seed}", folder / f"dpo-{seed}"
    run("data", "sample", "--kind", "preference", "--language", "both", "--rows", options.rows,
        "--seed", 10 + seed, "--output", pairs)  # fmt: skip
    common = [
        "--model.policy.path",
        sft,
        "--data.path",
        pairs,
        "--data.val_path",
        files["pairs"],
        "--data.max_length",
        256,
    ]
    common += ["--seed_everything", seed]
    start = time.monotonic()
    run(
        "fit",
        "--config",
        "reward_model",
        *common,
        "--model.optimizer.lr",
        options.rm_lr,
        "--trainer.default_root_dir",
        rm,
    )
    middle = time.monotonic()
    run(
        "fit",
        "--config",
        "dpo",
        *common,
        "--model.optimizer.lr",
        options.dpo_lr,
        "--model.sft_weight",
        options.sft_weight,
        "--data.batch_size",
        16,
        "--trainer.default_root_dir",
        dpo,
    )
    end = time.monotonic()
    answers = {}
    for name, model in ("sft", sft), ("dpo", dpo / "export"):
        answers[name] = folder / f"answers-{name}-{seed}.jsonl"
        run("predict", "--config", "demo", "--model.policy.path", model, "--data.path", files["questions"],
            "--model.sampling.temperature", 1, "--model.sampling.seed", seed, "--output", answers[name])  # fmt: skip
    return improvement(dpo / "export", sft, answers["dpo"], answers["sft"]) | {
        "rm_accuracy": last(rm / "metrics.csv", "val/accuracy"),
        "rm_minutes": (middle - start) / 60,
        "dpo_minutes": (end - middle) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4000, help="pairs to train on")
    parser.add_argument("--heldout", type=int, default=800)
    parser.add_argument("--rm-lr", default="3e-4")
    parser.add_argument("--dpo-lr", default="1e-4")
    parser.add_argument("--sft-weight", default="1", help="of DPO: without it the small model forgets its facts")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True)
    files = {name: folder / f"{name}.jsonl" for name in ("questions", "rows", "pairs")}
    sample = ["data", "sample", "--language", "both"]
    heldout = ["--split", "heldout", "--seed", 7, "--rows", options.heldout]
    run(*sample, "--kind", "instruction", "--rows", 4000, "--seed", 1, "--output", files["rows"])
    run(*sample, "--kind", "prompts", *heldout, "--output", files["questions"])
    run(*sample, "--kind", "preference", "--noise", 0, *heldout, "--output", files["pairs"])
    run("fit", "--config", "demo", "--data.path", files["rows"], "--trainer.max_epochs", 2,
        "--trainer.default_root_dir", folder / "sft")  # fmt: skip
    results = [one_seed(folder, folder / "sft" / "export", files, options, seed) for seed in range(options.seeds)]
    n = options.heldout
    print(f"\n{options.rows} noisy pairs; {n} held-out pairs without noise, {n} held-out questions, temperature 1\n")
    print("seed  reward model  gold before  after  gain (s.e.)      in s.e.  KL (s.e.)      minutes: rm, dpo")
    for seed, r in enumerate(results):
        interval = 1.96 * math.sqrt(r["rm_accuracy"] * (1 - r["rm_accuracy"]) / n)
        print(
            f"{seed:<5} {r['rm_accuracy']:.3f} ± {interval:.3f} {r['before']:11.3f} {r['after']:7.3f} "
            f"{r['gain']:6.3f} ({r['error']:.3f}) {r['gain'] / r['error']:9.1f}   {r['kl']:6.2f} ({r['kl_error']:.2f})"
            f"   {r['rm_minutes']:.1f}, {r['dpo_minutes']:.1f}"
        )


if __name__ == "__main__":
    main()
