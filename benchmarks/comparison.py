"""Which algorithm? All of them on the embedded model, from one fine-tuned model, under one definition of everything.

    python benchmarks/comparison.py FOLDER [--only ppo dpo …] [--jobs 2] [--table docs/comparison.json] [--plot FILE]

One SFT model on generated questions, the exact reward `Gold`, the same prompts, the same budget of scored answers for
each. Algorithms that sample spend it on answers of their own; those of preferences on answers of the SFT model, four to
a prompt, ranked by the same reward. A sweep of learning rates runs each once (seed 100) at half of the budget, three
to begin with, until the one with the most reward on one half of the held-out questions lies between two others; that
one is kept. Then five other seeds are run, and measured on the other half at temperature 1: reward, win rate against
the SFT model, KL from it (nats summed over an answer), length in tokens, the loss on general text (what was forgotten),
tokens trained on, and seconds of processor time, all in all. Runs that FOLDER has from an earlier call are not run
again. Distillation is not here, since it has a teacher and no reward.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import baseline

PACKAGES = ("leyden", "torch", "transformers", "lightning")
ANSWERS, ROLLOUTS, EPOCHS = 256, 6, 2
"""Scored answers a rollout, and rollouts: the budget is their product. Epochs over as many answers that are given."""
SEEDS, TRIAL = (0, 1, 2, 3, 4), 100
RATES = ("6e-6", "3e-5", "1.5e-4", "7e-4", "3e-3")
"""Learning rates of the sweep, of which the three in the middle are tried for each algorithm."""
GROUPS = ["--model.samples", 8, "--data.batch_size", ANSWERS // 8]
SAMPLED: dict[str, list[object]] = {
    "ppo": ["--config", "ppo", "--model.samples", 2, "--data.batch_size", ANSWERS // 2, "--model.value_weight", 1],
    "grpo": ["--config", "grpo", *GROUPS],
    "dr_grpo": ["--config", "dr_grpo", *GROUPS],
    "dapo": ["--config", "dapo", *GROUPS],
    "gspo": ["--config", "gspo", *GROUPS, "--model.surrogate.clip", 3e-3, "--model.surrogate.clip_high", 4e-3],
    "cispo": ["--config", "cispo", *GROUPS],
    "rloo": ["--config", "rloo", "--model.samples", 4, "--data.batch_size", ANSWERS // 4],
    "reinforce_pp": ["--config", "reinforce_pp", "--data.batch_size", ANSWERS],
    "rejection_sampling": ["--config", "rejection_sampling", *GROUPS],
    "online_dpo": ["--config", "online_dpo", "--model.samples", 4, "--data.batch_size", ANSWERS // 4],
}  # fmt: skip
OBJECTIVES = ("Sigmoid", "IPO", "SimPO", "ORPO", "CPO", "APOZero", "APODown", "EXO", "NCA")
GIVEN: dict[str, list[object]] = {
    "dpo" if name == "Sigmoid" else name: ["--config", "dpo", "--model.objective", name] for name in OBJECTIVES
} | {"kto": ["--config", "kto"], "bco": ["--config", "bco"]}
GIVEN["CPO"] += ["--model.sft_weight", 1]  # as published
MEASURES = {
    "reward": "eval/reward",
    "win_rate": "eval/win_rate",
    "kl": "eval/kl",
    "length": "eval/length",
    "forgotten": "eval/retained_loss",
    "tokens": "train/tokens",
}

FORMS = dict(zip([*MEASURES, "seconds"], "{:.2f} {:.2f} {:.2f} {:.1f} {:.2f} {:,.0f} {:.0f}".split(), strict=True))
WITH_INTERVAL = ("reward", "win_rate", "kl")


def leyden(folder: Path, *words: object) -> float:
    """Run a command in a process of its own, with one thread; its output goes to a file beside the folder.

    Returns:
        Seconds of processor time, which other work on the machine hardly changes.
    """
    log = folder.with_name(f"{folder.name}.log")  # a rate has a dot of its own
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w", encoding="utf-8") as out:
        command = [sys.executable, "-m", "leyden", *map(str, words)]
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        _, status, used = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"leyden {' '.join(map(str, words))}: failed, see {log}")
    return used.ru_utime + used.ru_stime


def prepare(folder: Path, heldout: int) -> dict[str, Path]:
    """Data, the fine-tuned model, and its ranked answers: what all runs start from."""
    names = ("rows", "prompts", "choose", "judge", "text")
    files = {name: folder / f"{name}.jsonl" for name in names}
    sample = ["data", "sample", "--language", "both"]
    kinds: dict[str, list[object]] = {
        "rows": ["--kind", "instruction", "--rows", 4000, "--seed", 1],
        "prompts": ["--kind", "prompts", "--rows", 2000, "--seed", 2],
        "choose": ["--kind", "prompts", "--rows", heldout, "--seed", 3, "--split", "heldout"],
        "judge": ["--kind", "prompts", "--rows", heldout, "--seed", 4, "--split", "heldout"],
        "text": ["--kind", "text", "--rows", 200, "--seed", 5],
    }
    for name, words in kinds.items():
        if not files[name].exists():
            leyden(folder / "data", *sample, *words, "--output", files[name])
    files["sft"] = folder / "sft" / "export"
    if not files["sft"].exists():
        leyden(folder / "sft", "fit", "--config", "demo", "--data.path", files["rows"], "--trainer.max_epochs", 2,
               "--trainer.default_root_dir", folder / "sft")  # fmt: skip
    files["pairs"] = folder / "pairs.jsonl"
    if not files["pairs"].exists():
        asked, answers = folder / "asked.jsonl", folder / "answers"
        lines = files["prompts"].read_text(encoding="utf-8").splitlines(keepends=True)
        asked.write_text("".join(lines[: ROLLOUTS * ANSWERS // 4]), encoding="utf-8")
        answers.mkdir(exist_ok=True)
        for number in range(4):
            (answers / f"{number}.jsonl").unlink(missing_ok=True)
            leyden(folder / "predict", "predict", "--config", "demo", "--model.policy.path", files["sft"],
                   "--data.path", asked, "--model.sampling.temperature", 1, "--model.sampling.seed", 500 + number,
                   "--output", answers / f"{number}.jsonl")  # fmt: skip
        leyden(folder / "label", "data", "label", answers, files["pairs"], "--reward", "Gold")
    return files


def train(folder: Path, files: Mapping[str, Path], name: str, rate: str, seed: int) -> dict[str, float]:
    """One run, unless it is there already; the last value of each measure."""
    out = folder / f"{name}-{rate}-{seed}"
    done = out / "done.json"
    if done.exists():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    asked, part = (files["choose"], 2) if seed == TRIAL else (files["judge"], 1)
    words: list[object] = ["fit", *(SAMPLED | GIVEN)[name], "--config", "eval", "--model.policy.path", files["sft"]]
    words += ["--model.optimizer.lr", rate, "--seed_everything", seed, "--data.max_length", 256]
    words += ["--data.val_fraction", 0, "--trainer.num_sanity_val_steps", 0, "--trainer.default_root_dir", out]
    words += ["--eval.path", asked, "--eval.text_path", files["text"], "--eval.reward", "Gold", "--eval.size", 10**6]
    words += ["--eval.sampling.max_new_tokens", 64, "--eval.max_length", 256, "--ckpt_path", "auto"]
    if name == "ppo":  # values on the policy's own trunk would pull it away from what it can say
        words += ["--model.value_policy.path", files["sft"]]
    if name in SAMPLED:
        words += ["--data.path", files["prompts"], "--model.reward", "Gold", "--model.sampling.max_new_tokens", 64]
        words += ["--trainer.max_epochs", ROLLOUTS // part, "--trainer.check_val_every_n_epoch", ROLLOUTS]
    else:
        words += ["--data.path", files["pairs"], "--trainer.max_epochs", EPOCHS // part]
    seconds = leyden(out, *words)
    with (out / "metrics.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    found = {name: [float(row[of]) for row in rows if row.get(of)] for name, of in MEASURES.items()}
    result = {name: values[-1] for name, values in found.items() if values}
    result |= {f"{name}_before": values[0] for name, values in found.items() if values} | {"seconds": seconds}
    done.write_text(json.dumps(result), encoding="utf-8")
    return result


def untried(rewards: Mapping[str, float]) -> list[str]:
    """Rates that a sweep runs next: those beside the best so far, the middle three at first."""
    at = RATES.index(max(rewards, key=rewards.__getitem__)) if rewards else 2
    return [rate for rate in RATES[max(0, at - 1) : at + 2] if rate not in rewards]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of a few seeds, and half of its 95 % interval by Student's t."""
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), math.nan)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), quantile * spread / math.sqrt(len(values))


def table(results: Mapping[str, dict[str, Any]]) -> str:
    """The table as Markdown, most reward first."""
    lines = ["| | rate | reward | win rate | KL | length | loss on text | tokens | seconds |", "|---" * 9 + "|"]
    for name, found in sorted(results.items(), key=lambda item: -interval(item[1]["reward"])[0]):
        cells = [found["rate"]]
        for measure, form in FORMS.items():
            mean, half = interval(found[measure]) if found.get(measure) else (math.nan, math.nan)
            cells.append(form.format(mean) + (f" ± {form.format(half)}" if measure in WITH_INTERVAL else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: Mapping[str, dict[str, Any]], before: float, file: Path) -> None:
    """Reward against KL, on the left of algorithms that sample, on the right of those that learn from given answers:
    every seed a point, the mean a larger one, and those of the other side grey."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, both = pyplot.subplots(1, 2, figsize=(11, 5.5), sharex=True, sharey=True)
    for axes, group, title in zip(
        both, (SAMPLED, GIVEN), ("learn from what they sample", "learn from given answers"), strict=True
    ):
        means = {n: (statistics.fmean(f["kl"]), statistics.fmean(f["reward"])) for n, f in results.items()}
        others = [at for name, at in means.items() if name not in group]
        axes.scatter([kl for kl, _ in others], [reward for _, reward in others], s=12, color="0.8", zorder=1)
        names = sorted((name for name in results if name in group), key=lambda name: means[name][1])
        heights = spread_out([means[name][1] for name in names], 0.012)
        for number, (name, height) in enumerate(zip(names, heights, strict=True)):
            colour = f"C{number % 10}"
            axes.scatter(results[name]["kl"], results[name]["reward"], s=14, color=colour, alpha=0.5, linewidths=0)
            axes.scatter(*means[name], s=40, color=colour, zorder=3)
            axes.annotate(
                name, means[name], (1.02, height), xycoords="data", textcoords=axes.get_yaxis_transform(), fontsize=8,
                color=colour, va="center", arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6},
            )  # fmt: skip
        axes.axhline(before, color="0.6", lw=0.8, ls=":")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("KL from the SFT model (nats an answer)")
    both[0].set_ylabel("gold reward (dotted: the SFT model)")
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def spread_out(heights: Sequence[float], apart: float) -> list[float]:
    """Heights in ascending order, moved as little as lets neighbours lie so far apart."""
    blocks: list[list[float]] = []  # each is [sum of what its heights would be without the distance, how many]
    for number, height in enumerate(heights):
        blocks.append([height - number * apart, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count]
    free = [total / count for total, count in blocks for _ in range(int(count))]
    return [height + number * apart for number, height in enumerate(free)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=[*SAMPLED, *GIVEN], default=[*SAMPLED, *GIVEN])
    parser.add_argument("--heldout", type=int, default=300, help="questions in each half of the held-out ones")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--table", type=Path, help="where all figures go, as JSON")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    files = prepare(folder, options.heldout)
    with ThreadPoolExecutor(options.jobs) as pool:
        sweeps: dict[str, dict[str, float]] = {name: {} for name in options.only}
        while asked := [(name, rate) for name, rewards in sweeps.items() for rate in untried(rewards)]:
            trials = [pool.submit(train, folder, files, name, rate, TRIAL) for name, rate in asked]
            for (name, rate), trial in zip(asked, trials, strict=True):
                sweeps[name][rate] = trial.result()["reward"]
                print(json.dumps({"sweep": name, "rate": rate, "reward": sweeps[name][rate]}), flush=True)
        best = {name: max(rewards, key=rewards.__getitem__) for name, rewards in sweeps.items()}
        runs = {(n, s): pool.submit(train, folder, files, n, best[n], s) for n in options.only for s in SEEDS}
        results: dict[str, dict[str, Any]] = {}
        for name in options.only:
            each = [runs[name, seed].result() for seed in SEEDS]
            results[name] = {"rate": best[name], "sweep": sweeps[name]} | {
                m: [one[m] for one in each if m in one] for m in FORMS
            }
            print(json.dumps({name: results[name]}), flush=True)
    before = next(iter(runs.values())).result()["reward_before"]
    print(f"\nthe SFT model: {before:.3f}; {ROLLOUTS * ANSWERS} scored answers each\n\n{table(results)}\n")
    print(f"{baseline.processor()}; {baseline.versions(PACKAGES)}")
    if options.table is not None:
        options.table.write_text(json.dumps({"before": before, "results": results}, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(results, before, options.plot)


if __name__ == "__main__":
    main()
