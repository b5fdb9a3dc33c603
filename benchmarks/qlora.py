"""What four bits cost, and what one base saves.

    python benchmarks/qlora.py FOLDER --model MODEL_FOLDER --data ROWS [--steps 60]

Fine-tunes a LoRA adapter over the model and over the model in four bits, with the same rows and seeds, and compares
the loss of every step; says how many bytes a quantised parameter takes, whether the four-bit weights are the same bits
after training, and what merging the adapter costs. Then PPO holds policy, values and reward model as adapters on one
four-bit model, or as models of their own: peak memory of both, in processes of their own.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from pathlib import Path

SMALL = ["--data.max_length", 256, "--model.sampling.max_new_tokens", 32, "--data.val_fraction", 0]


def leyden(*words: object) -> str:
    """Run a command in a process of its own and give back what it printed."""
    print("leyden", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", "leyden", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def stored(options: argparse.Namespace) -> None:
    """Bytes of a quantised parameter, and whether they stay what they are in training."""
    import torch

    from leyden.batch.forest import Tree, pack
    from leyden.models import CausalLM, quantized
    from leyden.precision import QLoRAPrecision

    from peft import LoraConfig  # isort: skip

    policy, precision = CausalLM(options.model, adapter=LoraConfig(target_modules="all-linear")), QLoRAPrecision()
    with precision.module_init_context():
        policy.build()
    layers = list(quantized.layers(policy.model))
    before = [layer.weight.detach().clone() for layer in layers]
    count = sum(layer.quant_state.shape.numel() for layer in layers)
    size = sum(
        layer.weight.numel() + layer.quant_state.absmax.numel() + 4 * layer.quant_state.state2.absmax.numel()
        for layer in layers
    )
    batch = pack([Tree([1, 2, 3], [[4, 5, 6, 7]])])
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        with precision.forward_context():
            loss = -batch.token_mean(policy(batch).logp)
        loss.backward()
        optimizer.step()
    same = all(torch.equal(a, layer.weight) for a, layer in zip(before, layers, strict=True))
    print(f"\n{count / 1e6:.1f} M parameters in {len(layers)} layers take {size / count:.4f} bytes each; ", end="")
    print(f"after three steps the bits are {'the same' if same else 'OTHERS'}", flush=True)


def losses(options: argparse.Namespace) -> None:
    runs = {name: options.folder / name for name in ("lora", "qlora")}
    for name, run in runs.items():
        leyden("fit", "--config", "sft", "--config", name, "--model.policy.path", options.model, "--data.path",
               options.data, "--data.batch_size", 8, "--data.max_length", 256, "--trainer.max_steps", options.steps,
               "--model.policy.dtype", options.dtype, "--trainer.num_sanity_val_steps", 0, "--data.val_fraction", 0,
               "--trainer.default_root_dir", run)  # fmt: skip
    lora, qlora = (column(run, "train/loss") for run in runs.values())
    apart = [abs(b - a) / a for a, b in zip(lora, qlora, strict=True)]
    last = [statistics.fmean(run[-10:]) for run in (lora, qlora)]
    print(
        f"\nloss of {options.steps} steps over four bits against {options.dtype}: apart by "
        f"{100 * statistics.fmean(apart):.2f} % on average, {100 * max(apart):.2f} % at most; mean of the last ten "
        f"{last[1]:.4f} against {last[0]:.4f}"
    )
    peaks = [column(run, "perf/peak_memory_gb")[-1] for run in runs.values()]
    print(f"peak memory {peaks[1]:.2f} GB against {peaks[0]:.2f} GB")
    for base in ("full", "four_bit"):
        words = ("export", runs["qlora"], options.folder / f"merged-{base}", "--merge", "--base", base)
        print(f"merged, {base}: {leyden(*words, '--dtype', 'float32').splitlines()[0]}", flush=True)


def one_base(options: argparse.Namespace) -> None:
    pairs, prompts = options.folder / "pairs.jsonl", options.folder / "prompts.jsonl"
    leyden("data", "sample", "--kind", "preference", "--rows", 64, "--output", pairs)
    leyden("data", "sample", "--kind", "prompts", "--rows", 64, "--output", prompts)
    judges = {}
    for name, more in (("adapter", ["--config", "qlora", "--model.policy.dtype", options.dtype]), ("model", [])):
        judges[name] = options.folder / f"judge-{name}"
        leyden("fit", "--config", "reward_model", *more, "--model.policy.path", options.model, "--data.path", pairs,
               "--data.max_length", 256, "--data.batch_size", 8, "--trainer.max_steps", 1, "--data.val_fraction", 0,
               "--trainer.default_root_dir", judges[name])  # fmt: skip
    ways = {
        "one-base": ["--config", "qlora", "--config", "one_base", "--model.reward.path", judges["adapter"] / "export",
                     "--model.policy.dtype", options.dtype],
        "models": ["--model.reward.path", judges["model"] / "export", "--model.value_policy", "CausalLM",
                   "--model.value_policy.path", options.model],
    }  # fmt: skip
    for name, words in ways.items():
        run = options.folder / name
        leyden("fit", "--config", "ppo", *words, "--model.policy.path", options.model, "--data.path", prompts, *SMALL,
               "--data.batch_size", 16, "--trainer.max_epochs", 1, "--trainer.default_root_dir", run)  # fmt: skip
        print(f"PPO, {name}: peak memory {column(run, 'perf/peak_memory_gb')[-1]:.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", required=True, help="instruction rows")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", default="float32", help="of weights that are not in four bits")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    stored(options)
    losses(options)
    one_base(options)


if __name__ == "__main__":
    main()
