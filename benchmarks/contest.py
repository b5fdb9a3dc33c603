"""What the side-by-side benchmarks share: rows, processes, clocks, memory, and how figures are compared.

Every contestant runs in a process of its own, in rounds (A B C A B C …) since the speed of a machine drifts. All of
them see the same token ids, model, dtype, optimizer and examples a step. A first pair of runs in fp32 proves that both
sides do the same work: loss and gradient norm of the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sides import Result, Settings, make_trees, now, read, tokens_of, written

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # HF_HUB_OFFLINE=0 lets --model name one of the hub
os.environ |= {"WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
OURS, PEAK = "leyden", "matrix product"
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
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def machine(names: Sequence[str] = ("leyden", "trl", "torch", "transformers", "lightning")) -> str:
    """The processor, and the versions of these packages."""
    known = Path("/proc/cpuinfo")  # Linux only, and not every processor has a name there
    lines = known.read_text(encoding="utf-8").splitlines() if known.is_file() else []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{cpu or platform.processor() or platform.machine()}, {os.cpu_count()} cores; " + ", ".join(
        f"{n} {version(n)}" for n in names
    )


def compare(options: argparse.Namespace, script: str, contestants: Mapping[str, Settings], unit: str) -> None:
    """Prove that both sides do the same work, run all rounds and print the figures."""
    print(machine(), flush=True)
    print(
        f"{Path(options.data).name}, {options.batch_size} {unit} a step, {options.rounds} rounds of {options.steps} "
        f"steps after {options.warmup}, {options.dtype} on {options.device}\n\nfirst step in fp32: loss, gradient norm",
        flush=True,
    )
    theirs = [name for name in contestants if name != OURS]
    for name in (OURS, theirs[0]):
        loss, norm = work(name, options, script, dtype="float32", steps=1, warmup=0)["first"]
        print(f"{name:<26} {loss:.6f} {norm:.5f}", flush=True)
    runs: dict[str, list[Result]] = {name: [] for name in (PEAK, *contestants)}
    for number in range(options.rounds):
        for name, results in runs.items():
            results.append(work(name, options, script))
            done = "" if name == PEAK else f" {speed(results[-1], options.warmup):.0f} tokens/s"
            print(f"round {number + 1}: {name}{done}", file=sys.stderr, flush=True)
    trees = read(options.trees)
    per_example = sum(map(tokens_of, trees)) / len(trees)
    speeds = {name: [speed(result, options.warmup) for result in runs[name]] for name in contestants}
    print(f"\nmedian [quartiles] of {options.rounds} rounds")
    for name in contestants:
        ratios = [ours / other for ours, other in zip(speeds[OURS], speeds[name], strict=True)]
        memory = statistics.median(result["peak_gb"] for result in runs[name])
        print(
            f"{name:<26} {spread(speeds[name], 0):>20} tokens/s  {spread([s / per_example for s in speeds[name]]):>20} "
            f"{unit}/s  peak {memory:5.2f} GB  {OURS} is {spread(ratios)} times as fast"
        )
    best = max(theirs, key=lambda name: statistics.median(speeds[name]))
    memories = [statistics.median(result["peak_gb"] for result in runs[name]) for name in (OURS, best)]
    print(
        f"\nagainst TRL at its best ({best}): {statistics.median(speeds[OURS]) / statistics.median(speeds[best]):.2f} "
        f"times the speed, {memories[0] / memories[1]:.2f} times the memory"
    )
    reached = [
        sum(r["work"][options.warmup :]) / sum(r["seconds"][options.warmup :]) / p["peak"]
        for r, p in zip(runs[OURS], runs[PEAK], strict=True)
    ]
    peaks = [result["peak"] / 1e9 for result in runs[PEAK]]
    print(f"{OURS} uses {spread([100 * r for r in reached], 0)} % of a {options.dtype} matrix product's ", end="")
    print(f"{spread(peaks, 0)} GFLOP/s")


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
    parser.add_argument("--worker", choices=[PEAK, *contestants], help=argparse.SUPPRESS)
    parser.add_argument("--trees", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
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
        compare(options, script, contestants, "pairs" if kind == "preference" else "examples")
