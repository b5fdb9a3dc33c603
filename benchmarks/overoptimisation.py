"""What happens when a reward model is trusted too far? Its own score against the exact one, as the policy learns.

    python benchmarks/overoptimisation.py FOLDER [--plot docs/overoptimisation.png]

Trains a reward model on few, noisy pairs, and a policy on that reward model's scores with no price on KL (GRPO). Every
rollout's answers are scored by both rewards, so one run gives the whole curve: the reward model's score, which the
policy maximises, and the gold reward, which it never sees, against the KL divergence from where it started (Gao et al.
2023, figure 1).
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

from rewards import prepare
from trial import run

CONFIG = """
model:
  class_path: GRPO
  init_args:
    reward:
      class_path: WeightedSum
      init_args:
        rewards:
          - class_path: ModelReward
            init_args: {{path: {reward}}}
          - class_path: Gold
        weights: [1.0, 0.0] # gold is only watched
"""


def curve(metrics: Path, every: int) -> list[tuple[float, float, float]]:
    """KL, the reward model's score and the gold reward, averaged over so many rollouts."""
    with metrics.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("rollout/reward_Gold")]
    names = ("rollout/kl", "rollout/reward_ModelReward", "rollout/reward_Gold")
    points = [tuple(float(row[name]) for name in names) for row in rows]
    groups = [points[at : at + every] for at in range(0, len(points), every)]
    return [tuple(statistics.fmean(column) for column in zip(*group, strict=True)) for group in groups]  # type: ignore[misc]


def plot(points: list[tuple[float, float, float]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    right = left.twinx()
    distance = [max(kl, 0.0) ** 0.5 for kl, _, _ in points]
    (gold,) = left.plot(distance, [g for _, _, g in points], color="#b8860b", marker="o", label="gold reward (left)")
    (proxy,) = right.plot(distance, [p for _, p, _ in points], color="#4060a0", ls="--", label="reward model (right)")
    left.set_xlabel("distance from the start, √KL (√nats)")
    left.set_ylabel("gold reward")
    right.set_ylabel("score of the reward model")
    left.legend(handles=[gold, proxy], loc="lower center", frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=300, help="that the reward model learns from")
    parser.add_argument("--noise", type=float, default=0.25, help="share of them the wrong way round")
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--every", type=int, default=3, help="rollouts that a point of the curve averages over")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True)
    files = prepare(folder, 100)
    pairs, prompts, config = folder / "pairs.jsonl", folder / "prompts.jsonl", folder / "grpo.yaml"
    sample = ["data", "sample", "--language", "both"]
    run(
        *sample,
        "--kind",
        "preference",
        "--rows",
        options.pairs,
        "--noise",
        options.noise,
        "--seed",
        3,
        "--output",
        pairs,
    )
    run(*sample, "--kind", "prompts", "--rows", 4000, "--seed", 4, "--output", prompts)
    run("fit", "--config", "reward_model", "--model.policy.path", files["sft"], "--data.path", pairs,
        "--data.max_length", 256, "--model.optimizer.lr", 3e-4, "--trainer.max_epochs", 2,
        "--trainer.default_root_dir", folder / "reward")  # fmt: skip
    config.write_text(CONFIG.format(reward=folder / "reward" / "export"), encoding="utf-8")
    run("fit", "--config", "dr_grpo", "--config", config, "--model.policy.path", files["sft"], "--data.path", prompts,
        "--data.val_fraction", 0, "--data.max_length", 256, "--model.sampling.max_new_tokens", 64,
        "--model.average", "tokens",
        "--model.optimizer.lr", options.lr, "--trainer.max_epochs", options.rollouts,
        "--trainer.default_root_dir", folder / "policy")  # fmt: skip
    points = curve(folder / "policy" / "metrics.csv", options.every)
    print("\n    KL  reward model    gold")
    for kl, proxy, gold in points:
        print(f"{kl:6.2f}  {proxy:12.3f}  {gold:6.3f}")
    best = max(points, key=lambda point: point[2])
    print(f"\ngold is highest at a KL of {best[0]:.2f} nats: {best[2]:.3f}; at the end {points[-1][2]:.3f}")
    if options.plot:
        plot(points, options.plot)


if __name__ == "__main__":
    main()
