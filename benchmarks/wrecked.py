"""What does a run say of settings that wreck it? Each of them on the embedded model, and a healthy run of each kind.

    python benchmarks/wrecked.py FOLDER [--only NAME …]

Fine-tunes the embedded model once, then trains with one setting spoilt at a time and prints what stands in the run's
diagnostics.jsonl: the step at which each thing was said, and the sentence. A healthy run should say nothing. An exit
before the end is shown too: a loss or gradient that is not finite stops a run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rewards import SETTINGS, prepare

from leyden.cli.launcher import main as leyden

LONG = '''"""A reward that likes length."""


def length(samples):
    return [len(sample.response) / 20 for sample in samples]


def constant(samples):
    return [1.0 for _ in samples]
'''
RATE = 1e-4
"""The learning rate of the healthy runs."""
GOLD: list[object] = ["--model.reward", "Gold"]
LENGTH: list[object] = ["--model.reward", "Function", "--model.reward.path", "wrecked_rewards.length"]
CONSTANT: list[object] = ["--model.reward", "Function", "--model.reward.path", "wrecked_rewards.constant"]
ROLLOUTS: list[object] = ["--trainer.max_epochs", 12]
PAIRS: list[object] = ["--model.optimizer.lr", 3e-5, "--data.batch_size", 16, "--trainer.max_epochs", 1]
UNBIASED: list[object] = ["--model.average", "tokens", "--model.kl_coef", 0.05]
RUNS: dict[str, tuple[str, list[object]]] = {
    "PPO, healthy": ("ppo", GOLD),
    "PPO, learning rate x 100": ("ppo", [*GOLD, "--model.optimizer.lr", 100 * RATE]),
    "PPO, KL free and learning rate x 10": ("ppo", [*GOLD, "--model.kl_coef", 0, "--model.optimizer.lr", 10 * RATE]),
    "PPO, a reward that likes length": ("ppo", [*LENGTH, "--model.kl_coef", 0]),
    "PPO, answers of 8 tokens at most": ("ppo", [*GOLD, "--model.sampling.max_new_tokens", 8]),
    "GRPO, healthy": ("dr_grpo", [*GOLD, *UNBIASED]),
    "GRPO, a reward that is constant": ("dr_grpo", [*CONSTANT, *UNBIASED]),
    "DPO, healthy": ("dpo", PAIRS),
    "DPO, learning rate x 100": ("dpo", [*PAIRS, "--model.optimizer.lr", 3e-3]),
}


def run(*words: object) -> int:
    print("leyden", *words, flush=True)
    return leyden([str(word) for word in words])


def one(folder: Path, files: dict[str, Path], name: str) -> list[dict[str, object]]:
    """Train with one setting; what its diagnostics say."""
    kind, more = RUNS[name]
    out = folder / name.replace(" ", "-").replace(",", "")
    given: list[object] = ["--config", kind, "--model.policy.path", files["sft"], "--data.max_length", 256]
    if kind == "dpo":
        given += ["--data.path", files["pairs"]]
    else:
        given += ["--data.path", files["prompts"], "--data.val_fraction", 0, "--model.sampling.max_new_tokens", 64]
        given += [*SETTINGS[kind], *ROLLOUTS]
        given += ["--model.value_policy.path", files["sft"]] if kind == "ppo" else []
    code = run("fit", *given, *more, "--trainer.default_root_dir", out)
    file = out / "diagnostics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    stopped = [{"step": "-", "name": "stopped", "sentence": f"the run stopped with exit code {code}"}] if code else []
    return [*(json.loads(line) for line in lines), *stopped]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*RUNS], default=[*RUNS], metavar="NAME", help="some of the runs")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True)
    (folder / "wrecked_rewards.py").write_text(LONG, encoding="utf-8")
    sys.path.append(str(folder))
    files = prepare(folder, 100) | {"prompts": folder / "prompts.jsonl", "pairs": folder / "pairs.jsonl"}
    sample = ["data", "sample", "--language", "both"]
    run(*sample, "--kind", "prompts", "--rows", 4000, "--seed", 20, "--output", files["prompts"])
    run(*sample, "--kind", "preference", "--rows", 1000, "--seed", 10, "--output", files["pairs"])
    found = {name: one(folder, files, name) for name in options.only}
    print("\n| run | step | what it says |\n|---|---|---|")
    for name, rows in found.items():
        for row in rows or [{"step": "", "sentence": "nothing"}]:
            print(f"| {name} | {row['step']} | {row['sentence']} |")


if __name__ == "__main__":
    main()
