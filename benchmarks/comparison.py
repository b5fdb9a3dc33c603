"""Which algorithm? All of them from one model, under one definition of everything.

    python benchmarks/comparison.py FOLDER [--only ppo dpo …] [--jobs 2] [--table FILE] [--plot FILE]
    python benchmarks/comparison.py FOLDER --model MODEL --preferences FILE --only dpo rloo --seeds 3

The first compares on the embedded model, fine-tuned on generated questions, by the exact reward `Gold`; the second on a
model of yours with adapters, by reward models that learn from preferences of yours (see comparison_start.py).

All draw from the same prompts and have the same budget of scored answers. Algorithms that sample spend it on answers of
their own; those of preferences on answers of the model before training, four to a prompt, ranked by the same reward. A
sweep of learning rates runs each once (seed 100) at half of the budget, three to begin with, until the one with the
most reward on held-out questions lies between two others; that one is kept. Then other seeds are run, and measured on
other held-out questions: reward, win rate against the model before training, KL from it (nats summed over an answer),
length in tokens, share that ends by itself, the loss on general text (what was forgotten), tokens trained on, and
seconds of processor time of the latest call. Runs that FOLDER has from an earlier call are not run again. Distillation
is not here, since it has a teacher and no reward.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import baseline
from comparison_start import Start, Words, embedded, leyden, real, rewarded, same_start

PACKAGES = ("leyden", "torch", "transformers", "lightning")
EPOCHS = 2
"""Over answers that are given: their budget is that of answers that are sampled."""
SEEDS, TRIAL = (0, 1, 2, 3, 4), 100
SAMPLES = {"ppo": 2, "rloo": 4, "online_dpo": 4, "reinforce_pp": 1}
"""Answers to a prompt; 8 where nothing is said. A rollout has as many prompts as give its answers."""
NAMES = "ppo grpo dr_grpo dapo gspo cispo rloo reinforce_pp rejection_sampling online_dpo"
SAMPLED: dict[str, Words] = {name: [] for name in NAMES.split()}
SAMPLED["ppo"] = ["--model.value_weight", 1]
SAMPLED["gspo"] = ["--model.surrogate.clip", 3e-3, "--model.surrogate.clip_high", 4e-3]  # for short answers
OBJECTIVES = ("Sigmoid", "IPO", "SimPO", "ORPO", "CPO", "APOZero", "APODown", "EXO", "NCA")
GIVEN: dict[str, Words] = {
    "dpo" if name == "Sigmoid" else name: ["--config", "dpo", "--model.objective", name] for name in OBJECTIVES
} | {"kto": ["--config", "kto"], "bco": ["--config", "bco"]}
GIVEN["CPO"] = [*GIVEN["CPO"], "--model.sft_weight", 1]  # as published
MEASURES = {
    "reward": "eval/reward",
    "win_rate": "eval/win_rate",
    "kl": "eval/kl",
    "length": "eval/length",
    "ended": "eval/eos_rate",
    "forgotten": "eval/retained_loss",
    "tokens": "train/tokens",
}
COLUMNS = {
    "reward": ("reward", "{:.2f}"),
    "win_rate": ("win rate", "{:.2f}"),
    "learnt_from": ("reward learnt from", "{:.2f}"),
    "kl": ("KL", "{:.2f}"),
    "length": ("length", "{:.1f}"),
    "ended": ("ended", "{:.2f}"),
    "forgotten": ("loss on text", "{:.2f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "seconds": ("seconds", "{:.0f}"),
}
"""Of the table: title and form of each measure."""
WITH_INTERVAL = ("reward", "win_rate", "learnt_from", "kl")


def train(folder: Path, start: Start, name: str, rate: str, seed: int) -> dict[str, float]:
    """One run, unless it is there already; the last value of each measure."""
    out = folder / f"{name}-{rate}-{seed}"
    done = out / "done.json"
    if done.exists():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    seconds = leyden(out, *words_of(start, name, rate, seed), "--trainer.default_root_dir", out)
    with (out / "metrics.csv").open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    found = {name: [float(row[of]) for row in rows if row.get(of)] for name, of in MEASURES.items()}
    result = {name: values[-1] for name, values in found.items() if values}
    result |= {f"{name}_before": values[0] for name, values in found.items() if values} | {"seconds": seconds}
    done.write_text(json.dumps(result), encoding="utf-8")
    return result


def learnt_from(out: Path, start: Start) -> list[float]:
    """The mean score that the reward that was learnt from gives the answers that the judge was shown, before training
    and after it."""
    from leyden.example import Sample
    from leyden.models import ModelReward
    from leyden.rewards import score

    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row["step"] for row in rows]
    samples = [Sample(row["prompt"], row["response"], finished=row["finished"]) for row in rows]
    scores = score(ModelReward(str(start.reward[-1])), samples).tolist()
    return [
        statistics.fmean(x for x, at in zip(scores, steps, strict=True) if at == end)
        for end in (min(steps), max(steps))
    ]


def words_of(start: Start, name: str, rate: str, seed: int) -> list[object]:
    """The command of one run, but for its folder. The sweep has half of the rollouts, or of the passes, and is measured
    by what is learnt from; seeds have all of them, and are measured by the judge."""
    asked, judge, part = ("choose", start.reward, 2) if seed == TRIAL else ("judge", start.judge, 1)
    words: list[object] = ["fit"]
    if name in SAMPLED:
        samples = SAMPLES.get(name, 8)
        words += ["--config", name, *fragments(start), "--data.batch_size", start.answers // samples]
        words += [*rewarded("--model.reward", start.reward), *([] if samples == 1 else ["--model.samples", samples])]
        words += [*SAMPLED[name], *(start.values if name == "ppo" else []), "--data.path", start.files["prompts"]]
        words += ["--model.sampling.max_new_tokens", start.new_tokens]
        words += ["--model.sampling.temperature", start.temperature]
        words += ["--trainer.max_epochs", start.rollouts // part, "--trainer.check_val_every_n_epoch", start.rollouts]
    else:
        words += [*GIVEN[name], *fragments(start), "--data.batch_size", start.answers // 8]
        words += ["--data.path", start.files["pairs"], "--trainer.max_epochs", EPOCHS // part]
    words += [*start.policy, "--model.optimizer.lr", rate, "--seed_everything", seed, "--ckpt_path", "auto"]
    words += ["--data.max_length", start.max_length, "--data.val_fraction", 0, "--trainer.num_sanity_val_steps", 0]
    words += ["--eval.path", start.files[asked], "--eval.text_path", start.files["text"], "--eval.size", 10**6]
    words += [*rewarded("--eval.reward", judge), "--eval.max_length", start.max_length]
    words += ["--eval.sampling.temperature", start.temperature]
    return [*words, "--eval.sampling.max_new_tokens", start.new_tokens]


def fragments(start: Start) -> list[object]:
    return [word for name in (*start.fragments, "eval") for word in ("--config", name)]


def compare(
    folder: Path, start: Start, names: Sequence[str], seeds: Sequence[int], pool: ThreadPoolExecutor
) -> dict[str, dict[str, Any]]:
    """The rate, the sweep as reward and KL of each rate, and each measure's value of each seed, by algorithm."""
    sweeps: dict[str, dict[str, tuple[float, float]]] = {name: {} for name in names}
    while asked := [(name, rate) for name, found in sweeps.items() for rate in untried(start, found)]:
        trials = [pool.submit(train, folder, start, name, rate, TRIAL) for name, rate in asked]
        for (name, rate), trial in zip(asked, trials, strict=True):
            sweeps[name][rate] = trial.result()["reward"], trial.result()["kl"]
            print(json.dumps({"sweep": name, "rate": rate, "reward and KL": sweeps[name][rate]}), flush=True)
    best = {name: chosen(start, found) for name, found in sweeps.items()}
    runs = {(n, s): pool.submit(train, folder, start, n, best[n], s) for n in names for s in seeds}
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        each = [runs[name, seed].result() for seed in seeds]
        before = {m: each[0][f"{m}_before"] for m, of in MEASURES.items() if of.startswith("eval/") and m in each[0]}
        found = {measure: [one[measure] for one in each] for measure in COLUMNS if all(measure in one for one in each)}
        if start.judge != start.reward:
            ends = [learnt_from(folder / f"{name}-{best[name]}-{seed}", start) for seed in seeds]
            before["learnt_from"], found["learnt_from"] = ends[0][0], [end for _, end in ends]
        results[name] = {"rate": best[name], "sweep": sweeps[name]} | found | {"before": before}
        print(json.dumps({name: results[name]}), flush=True)
    return results


def chosen(start: Start, found: Mapping[str, tuple[float, float]]) -> str:
    """The rate with the most reward, of those that stay near enough; the lowest where none does."""
    near = {rate: reward for rate, (reward, kl) in found.items() if kl <= start.most_kl}
    return max(near, key=near.__getitem__) if near else min(found, key=start.rates.index)


def untried(start: Start, found: Mapping[str, tuple[float, float]]) -> list[str]:
    """Rates that a sweep runs next: those beside the best so far, the middle three at first."""
    at = start.rates.index(chosen(start, found)) if found else 2
    return [rate for rate in start.rates[max(0, at - 1) : at + 2] if rate not in found]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of a few seeds, and half of its 95 % interval by Student's t."""
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(values), math.nan)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), quantile * spread / math.sqrt(len(values))


def table(results: Mapping[str, dict[str, Any]]) -> str:
    """The table as Markdown, most reward first, with the columns that all runs have."""
    shown = [measure for measure in COLUMNS if all(found.get(measure) for found in results.values())]
    lines = [f"| | rate | {' | '.join(COLUMNS[measure][0] for measure in shown)} |", "|---" * (len(shown) + 2) + "|"]
    for name, found in sorted(results.items(), key=lambda item: -interval(item[1]["reward"])[0]):
        cells = [found["rate"]]
        for measure in shown:
            (mean, half), form = interval(found[measure]), COLUMNS[measure][1]
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
        axes.set_xlabel("KL from the model before training (nats an answer)")
    both[0].set_ylabel("reward (dotted: before training)")
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
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 6))
    parser.add_argument("--model", type=Path, help="a model that follows instructions, in place of the embedded one")
    parser.add_argument("--preferences", type=Path, help="what its reward models learn from")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--table", type=Path, help="where all figures go, as JSON")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if (options.model is None) != (options.preferences is None):
        parser.error("--model and --preferences need each other")
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    same_start(folder, {"model": options.model, "preferences": options.preferences, "heldout": options.heldout})
    with ThreadPoolExecutor(options.jobs) as pool:
        if options.model is None:
            start = embedded(folder, options.heldout)
        else:
            start = real(folder, options.model, options.preferences, options.heldout, pool)
        results = compare(folder, start, options.only, SEEDS[: options.seeds], pool)
    before = results[options.only[0]]["before"]
    if options.table is not None:
        options.table.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nbefore: {json.dumps(before)}; {start.budget} scored answers each\n\n{table(results)}\n")
    print(f"{baseline.processor()}; {baseline.versions(PACKAGES)}")
    if options.plot is not None:
        plot(results, before["reward"], options.plot)


if __name__ == "__main__":
    main()
