"""Are two processes one? Every algorithm on one process, on two by DDP, and on two that share the weights by FSDP2.

    python benchmarks/devices.py FOLDER [--steps 6]

Trains the embedded model in fp32 on the CPU, with the same rows, prompts and seeds, and compares the weights it ends
with: the largest difference of any weight, beside how far training moved the weight that moved most. What differs is
the order in which numbers are added up.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from leyden.paths import resolve

REWARD = "def vowels(samples):\n    return [sum(c in 'aeiou아이오우' for c in sample.response) for sample in samples]\n"
"""Tells answers apart that a model gives before it has learnt to answer."""
PAIRS = ["--data.path", "pairs.jsonl"]
PROMPTS = ["--data.path", "prompts.jsonl", "--model.reward", "Function", "--model.reward.path", "tell.vowels"]
SAMPLED = [*PROMPTS, "--model.sampling.max_new_tokens", 16, "--data.batch_size", 16, "--data.val_fraction", 0]
KINDS: dict[str, list[object]] = {
    "sft": ["--data.path", "rows.jsonl"],
    "reward_model": PAIRS,
    "dpo": PAIRS,
    "ppo": [*SAMPLED, "--model.epochs", 1],
    "grpo": [*SAMPLED, "--model.samples", 4],
    "rejection_sampling": [*SAMPLED, "--model.samples", 4, "--model.minibatches", 4],
}
WAYS: dict[str, list[object]] = {
    "one": [],
    "ddp": ["--config", "ddp", "--trainer.devices", 2],
    "fsdp2": ["--config", "fsdp2", "--trainer.devices", 2],
}


def leyden(folder: Path, *words: object) -> None:
    command = [sys.executable, "-m", "leyden", *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])


def weights(folder: Path) -> dict[str, object]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def apart(a: Path, b: Path) -> float:
    """The largest difference of any weight that both have; a folder of before training may lack a new head."""
    first, second = weights(a), weights(b)
    return max(float((first[name] - second[name]).abs().max()) for name in first.keys() & second.keys())  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    (options.folder / "tell.py").write_text(REWARD, encoding="utf-8")
    start = Path(resolve("tiny"))
    for kind, name in (("instruction", "rows"), ("preference", "pairs"), ("prompts", "prompts")):
        leyden(options.folder, "data", "sample", "--kind", kind, "--rows", 200, "--output", f"{name}.jsonl")
    print(f"{'after ' + str(options.steps) + ' steps':<20} moved by  ddp apart  fsdp2 apart", flush=True)
    for name, words in KINDS.items():
        for way, more in WAYS.items():
            leyden(options.folder, "fit", "--config", name, *more, "--model.policy.path", "tiny", *words,
                   "--data.max_length", 128, "--model.optimizer.lr", 1e-4, "--trainer.max_steps", options.steps,
                   "--trainer.max_epochs", -1, "--trainer.accelerator", "cpu", "--trainer.num_sanity_val_steps", 0,
                   "--trainer.default_root_dir", f"{name}-{way}")  # fmt: skip
        one, ddp, fsdp2 = (options.folder / f"{name}-{way}" / "export" for way in WAYS)
        print(f"{name:<20} {apart(one, start):8.1e}  {apart(one, ddp):9.1e}  {apart(one, fsdp2):11.1e}", flush=True)


if __name__ == "__main__":
    main()
