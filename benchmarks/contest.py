"""What the side-by-side benchmarks share: rows, processes, clocks, memory, and how figures are compared.

Every contestant runs in a process of its own, in rounds (A B C A B C …) since the speed of a machine drifts. All of
them see the same token ids, model, dtype, optimizer and examples a step. A first pair of runs in fp32 proves that both
sides do the same work: loss and gradient norm of the first step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import baseline
from sides import Result, Settings, make_trees, now, read, tokens_of, written

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # HF_HUB_OFFLINE=0 lets --model name one of the hub
os.environ |= {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
OURS, PEAK = "leyden", "matrix product"
PACKAGES = ("leyden", "trl", "torch", "transformers", "lightning")
SLOWER = 0.05
"""Part by which a ratio to a peer may be worse than in an earlier run, beside the spread of both."""
FREE = {"worker", "data", "trees", "rounds", "peers", "peer_python", "output", "against"}
"""Options that may differ from those of an earlier run: rows are compared as token ids, more rounds only tell more."""
GROUPED = {
    "gradient_checkpointing": False,
    "train_sampling_strategy": "group_by_length",
    "remove_unused_columns": False,  # or the lengths are taken away before they are read
    "grouped": True,
}
FOR_PAIRS: dict[str, Settings] = {
    OURS: {},
    "trl, defaults": {},
    "trl, best, bf16 weights": GROUPED | {"bf16": False},
    "trl, best, bf16 autocast": GROUPED,
}
"""Who trains on pairs: us, the peer with its defaults, and at its best, where rows of one length share a batch."""


def peak_memory(options: argparse.Namespace) -> float:
    """The most memory this process has held so far, in GB: of the GPU if there is one, else resident."""
    if options.device != "cpu":
        import torch

        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def product_speed(options: argparse.Namespace, size: int = 2048) -> Result:
    """How many floating-point operations a second a large matrix product reaches: the best of 20."""
    import torch

    a, b = (torch.randn(size, size, device=options.device).to(getattr(torch, options.dtype)) for _ in range(2))
    best = 0.0
    for _ in range(20):
        began = now(options)
        a @ b
        best = max(best, 2.0 * size**3 / (now(options) - began))
    return {"peak": best}


def work(name: str, options: argparse.Namespace, script: str, python: str = sys.executable, **changes: Any) -> Result:
    """Run one contestant in a process of its own, of this Python or another."""
    command = [python, script, "--worker", name]
    for key, value in (vars(options) | changes).items():
        if key != "worker":
            command += [f"--{key.replace('_', '-')}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def speed(result: Result, warmup: int) -> float:
    """Real tokens a second over the steps after the warm-up."""
    return float(sum(result["tokens"][warmup:]) / sum(result["seconds"][warmup:]))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median [lower quartile, upper quartile]`"""
    low, middle, high = baseline.quartiles(values)
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def machine(names: Sequence[str] = PACKAGES) -> str:
    """The processor, and the versions of these packages."""
    return f"{baseline.processor()}; " + ", ".join(f"{n} {v}" for n, v in baseline.versions(names).items())


# -- figures, and those of an earlier run --------------------------------------------------------------------------


def conditions(options: argparse.Namespace, script: str) -> dict[str, Any]:
    """What two runs have to share for their ratios to mean the same."""
    kept = {name: value for name, value in vars(options).items() if name not in FREE}
    rows = hashlib.sha256(Path(options.trees).read_bytes()).hexdigest()[:12]
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    kept |= {"model": Path(options.model).name, "rows": rows, "threads": threads}
    return {"benchmark": Path(script).stem} | kept


def figures(speeds: Mapping[str, Sequence[float]], runs: Mapping[str, Sequence[Result]], unit: str) -> baseline.Figures:
    """Of every contestant speed and peak memory round by round, and what ours are relative to them in the same round.

    Args:
        unit: of the speeds, as they are called in a file.
    """
    memory = {name: [float(result["peak_gb"]) for result in runs[name]] for name in speeds}

    def relative(all_of: Mapping[str, Sequence[float]], name: str) -> baseline.Figures:
        return baseline.summary([ours / other for ours, other in zip(all_of[OURS], all_of[name], strict=True)])

    return {
        name: {unit: baseline.summary(speeds[name]), "peak_gb": baseline.summary(memory[name])}
        | {"times_as_fast": relative(speeds, name), "times_the_memory": relative(memory, name)}
        for name in speeds
    }


def beside(found: baseline.Figures) -> str:
    """What is said of a contestant beside its speed."""
    ratio = spread(found["times_as_fast"]["rounds"])
    return f"peak {found['peak_gb']['median']:5.2f} GB  {OURS} is {ratio} times as fast"


def worse(earlier: baseline.Figures, now: baseline.Figures) -> list[str]:
    """Where we have lost against a peer: a line for each ratio that got worse, and for each peer that is missing."""
    lines = []
    for name in (name for name in earlier if not name.startswith(OURS)):
        if name not in now:
            lines.append(f"{name}: not in this run, so nothing can be said of it")
            continue
        for key, more_is_better in (("times_as_fast", True), ("times_the_memory", False)):
            old, new = (found[name][key]["rounds"] for found in (earlier, now))
            if baseline.is_worse(old, new, SLOWER, more_is_better):
                lines.append(f"{name}: {OURS} {key.replace('_', ' ')} {spread(new)}, earlier {spread(old)}")
    return lines


def hold(
    options: argparse.Namespace, script: str, packages: Mapping[str, str], measure: Callable[[], baseline.Figures]
) -> None:
    """Measure, and do what `--output` and `--against` ask for."""
    baseline.hold(options, conditions(options, script), packages, measure, worse)


# -- the whole -----------------------------------------------------------------------------------------------------


def compare(
    options: argparse.Namespace, script: str, contestants: Mapping[str, Settings], unit: str
) -> baseline.Figures:
    """Prove that both sides do the same work, run all rounds and print the figures."""
    print(machine(), flush=True)
    print(
        f"{Path(options.data).name}, {options.batch_size} {unit} a step, {options.rounds} rounds of {options.steps} "
        f"steps after {options.warmup}, {options.dtype} on {options.device}\n\nfirst step in fp32: loss, gradient norm",
        flush=True,
    )
    for name in [*contestants][:2]:  # ours, and the peer with its defaults, whose first step has the same rows
        loss, norm = work(name, options, script, dtype="float32", steps=1, warmup=0)["first"]
        print(f"{name:<26} {loss:.6f} {norm:.5f}", flush=True)
    chosen = [name for name in contestants if name == OURS or name.startswith(options.peers)]
    runs: dict[str, list[Result]] = {name: [] for name in (PEAK, *chosen)}
    for number in range(options.rounds):
        for name, results in runs.items():
            results.append(work(name, options, script))
            done = "" if name == PEAK else f" {speed(results[-1], options.warmup):.0f} tokens/s"
            print(f"round {number + 1}: {name}{done}", file=sys.stderr, flush=True)
    return report(options, runs, unit)


def report(options: argparse.Namespace, runs: Mapping[str, Sequence[Result]], unit: str) -> baseline.Figures:
    """Print the figures of all rounds."""
    trees = read(options.trees)
    per_example = sum(map(tokens_of, trees)) / len(trees)
    speeds = {name: [speed(result, options.warmup) for result in runs[name]] for name in runs if name != PEAK}
    found = figures(speeds, runs, "tokens_per_second")
    print(f"\nmedian [quartiles] of {options.rounds} rounds")
    for name, values in speeds.items():
        print(
            f"{name:<26} {spread(values, 0):>20} tokens/s  {spread([s / per_example for s in values]):>20} {unit}/s  "
            f"{beside(found[name])}"
        )
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    best = max((name for name in speeds if name != OURS), key=lambda name: middle[name])
    memories = [statistics.median(result["peak_gb"] for result in runs[name]) for name in (OURS, best)]
    print(
        f"\nagainst TRL at its best ({best}): {middle[OURS] / middle[best]:.2f} times the speed, "
        f"{memories[0] / memories[1]:.2f} times the memory"
    )
    reached = [
        100 * sum(r["work"][options.warmup :]) / sum(r["seconds"][options.warmup :]) / p["peak"]
        for r, p in zip(runs[OURS], runs[PEAK], strict=True)
    ]
    peaks = [result["peak"] / 1e9 for result in runs[PEAK]]
    print(f"{OURS} uses {spread(reached, 0)} % of a {options.dtype} matrix product's {spread(peaks, 0)} GFLOP/s")
    return found


def main(
    script: str,
    description: str | None,
    contestants: Mapping[str, Settings],
    run: Callable[[argparse.Namespace, Settings | None], Result],
    kind: str,
    max_length: int,
) -> None:
    """The command line of one benchmark.

    Args:
        contestants: settings of each side by name; ours first, then the one with the peer's defaults.
        run: one run of a side; settings are None for ours.
        kind: of rows, as `leyden data` names it.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="model folder; tiny is the embedded one")
    parser.add_argument("--data", default="", help=f"{kind} rows; default: generated ones")
    parser.add_argument("--batch-size", type=int, default=8, help="examples a step")
    parser.add_argument("--max-length", type=int, default=max_length, help="longer rows are left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="steps of each run that do not count")
    parser.add_argument("--steps", type=int, default=6, help="steps of each run that count")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peers", default="", help="only those whose names begin so; default: all")
    baseline.add_arguments(parser)
    parser.add_argument("--worker", choices=[PEAK, *contestants], help=argparse.SUPPRESS)
    parser.add_argument("--trees", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not any(name.startswith(options.peers) for name in contestants if name != OURS):
        parser.error(f"no peer's name begins with {options.peers}: {'; '.join(n for n in contestants if n != OURS)}")
    from leyden.paths import resolve

    options.model = resolve(options.model)
    if options.worker:
        if options.worker == PEAK:
            result = product_speed(options)
        else:
            result = run(options, None if options.worker == OURS else contestants[options.worker])
        print(json.dumps(result | {"peak_gb": peak_memory(options)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            options.data = f"{folder}/rows.jsonl"
            generate = ["--kind", kind, "--rows", "400", "--language", "both", "--output", options.data]
            command = [sys.executable, "-m", "leyden", "data", "sample", *generate]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        options.trees = f"{folder}/trees.json"
        Path(options.trees).write_text(written(make_trees(options, kind)), encoding="utf-8")
        unit = "pairs" if kind == "preference" else "examples"
        hold(options, script, baseline.versions(PACKAGES), lambda: compare(options, script, contestants, unit))
