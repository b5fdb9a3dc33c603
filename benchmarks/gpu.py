"""One GPU, one script: correctness, training and sampling beside the peer, memory, and where the time goes.

    python benchmarks/gpu.py [--output CARD.json] [--against benchmarks/baselines/CARD.json]

Needs no network: the model is a Llama shape of 1.2 billion random weights, and rows are random tokens whose lengths are
those of preference data (log-normal: prompts of 120 tokens and responses of 60 at the median). Every contestant runs in
a process of its own, on the same rows, in the same dtype, with the same optimizer; the first steps, in which kernels
are compiled, are given apart. TRL runs at its best: no gradient checkpointing, rows of one length together (packed for
SFT), with and without the kernels of liger-kernel. `--device cpu --tiny` runs all of it small.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import baseline
import contest
import shapes
import sides

SHAPE = shapes.LLAMA | {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}  # fmt: skip
LIGER = {"use_liger_kernel": True}
TRAINED = ("dpo", "reward_model", "sft")
WAYS: dict[str, sides.Settings | None] = {
    "leyden": None,
    "leyden compiled": None,
    "leyden compiled in halves": None,
    "trl best": {"bf16": False},
    "trl best liger": {"bf16": False} | LIGER,
}
"""Who trains; weights are in bf16 on both sides. In halves: each step in two micro-batches."""
SLOWER = 0.1
"""Part by which a figure, which is that of one run, may be worse than the one it is compared with."""
PACKAGES = ("leyden", "trl", "liger-kernel", "torch", "transformers", "lightning")
Figures = baseline.Figures


def rows(kind: str, count: int, longest: int, seed: int = 0) -> list[Any]:
    """Trees of random tokens with lengths like those of preference data."""
    from leyden.batch.forest import Tree

    r = random.Random(seed)

    def ids(middle: int, most: int) -> list[int]:
        return [r.randrange(10, 4000) for _ in range(max(4, min(most, round(r.lognormvariate(0, 0.8) * middle))))]

    made = []
    for row in range(count):
        prompt = ids(longest // 4, longest // 2)
        responses = [ids(longest // 8, longest // 2) for _ in range(1 if kind == "sft" else 2)]
        weights = [[1.0] * len(response) for response in responses] if kind == "sft" else None
        made.append(Tree(prompt, responses, None, weights, row))
    return made


# -- workers: one process each -------------------------------------------------------------------------------------


def train(options: argparse.Namespace, kind: str, way: str) -> Figures:
    module = importlib.import_module(kind)
    if way.startswith("trl"):
        own = (module.PACKED if kind == "sft" else contest.GROUPED) | (WAYS[way] or {})
        result = module.run(options, own)
    else:
        options.policy = {"compile": True} if "compiled" in way else {}
        options.parts = 2 if way.endswith("halves") else 1
        result = module.run(options, None)
    seconds, tokens = (result[name][options.warmup :] for name in ("seconds", "tokens"))
    figures = {
        "step_ms": 1e3 * statistics.median(seconds),
        "tokens_per_second": sum(tokens) / sum(seconds),
        "warm_up_s": sum(result["seconds"][: options.warmup]),
        "slowest_over_median": max(seconds) / statistics.median(seconds),
        "loss": result["first"][0],
    }
    if "work" in result:
        work = result["work"][options.warmup :]
        figures["flops"] = sum(work) / sum(seconds)
    return figures


def sample(options: argparse.Namespace, who: str, n: str) -> Figures:
    generate = importlib.import_module("generate")
    vars(options).update(stop=0, temperature=1.0)
    prompts = [tree.prompt for tree in sides.read(options.trees)[: 4 if options.tiny else 32]]
    new = 8 if options.tiny else 96
    run = generate.leyden(options) if who == "leyden" else generate.transformers(options, {"rows": 1 << 30})
    run(prompts[:4], int(n), 8)
    seconds = []
    for _ in range(2):
        began = sides.now(options)
        answers = run(prompts, int(n), new)
        seconds.append(sides.now(options) - began)
    return {"tokens_per_second": sum(map(len, answers)) / min(seconds), "ms_per_token": 1e3 * min(seconds) / new}


def profile(options: argparse.Namespace, kind: str, way: str = "") -> Figures:
    """The kernels that take most of a step, the part of the time in which the GPU does nothing, and the lines of code
    at which the host waits for it in one step. Of sampling, a step is a token of every row."""
    if kind == "sample":
        return profile_sampling(options)
    import torch

    module = importlib.import_module(kind)
    options.policy = {"compile": True} if "compiled" in way else {}
    options.warmup, options.steps = 4, 4
    steps, waits, made, clock = list[int](), list[str](), recorder(options), sides.now

    def watched(given: argparse.Namespace) -> float:
        at = clock(given)
        steps.append(1)
        if options.device != "cpu" and len(steps) == 2 * options.warmup - 1:
            warnings.showwarning = lambda text, kind, file, number, *_: waits.append(
                f"{Path(file).parent.name}/{Path(file).name}:{number}"
            )
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if options.device != "cpu" and len(steps) == 2 * options.warmup:
            torch.cuda.set_sync_debug_mode("default")
        if len(steps) == 2 * options.warmup + 1:
            made.start()
            options.began = at
        if len(steps) == 2 * (options.warmup + options.steps):
            options.took = at - options.began
            made.stop()
        return at

    sides.now = watched
    module.run(options, None)
    return kernels(made, options, options.took, options.steps) | {"waits": sorted(Counter(waits).items())}


def profile_sampling(options: argparse.Namespace) -> Figures:
    vars(options).update(stop=0, temperature=1.0)
    run = importlib.import_module("generate").leyden(options)
    prompts = [tree.prompt for tree in sides.read(options.trees)[: 2 if options.tiny else 16]]
    run(prompts[:4], 1, 8)
    made, new = recorder(options), 8 if options.tiny else 64
    made.start()
    began = sides.now(options)
    run(prompts, 16, new)
    took = sides.now(options) - began
    made.stop()
    return kernels(made, options, took, new)


def recorder(options: argparse.Namespace) -> Any:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] if options.device == "cpu" else [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    return profile(activities=activities)


def kernels(made: Any, options: argparse.Namespace, took: float, steps: int) -> Figures:
    """The kernels of a recording of so many seconds and steps, those that take the most first."""
    import torch

    cuda = options.device != "cpu"
    time_of: Callable[[Any], float] = lambda e: e.self_device_time_total if cuda else e.self_cpu_time_total  # noqa: E731
    events = [
        e for e in made.key_averages() if time_of(e) and (not cuda or e.device_type == torch.autograd.DeviceType.CUDA)
    ]
    total = sum(map(time_of, events)) / 1e6
    top = sorted(events, key=time_of, reverse=True)[:15]
    return {
        "idle_share": 1 - total / took,
        "step_ms": 1e3 * took / steps,
        "kernels": [[e.key[:90], round(time_of(e) / 1e3 / steps, 3), e.count // steps] for e in top],
        "launches": sum(e.count for e in events) // steps,
    }


def ppo(options: argparse.Namespace) -> Figures:
    """Responses a second of PPO's rollouts, and the share of the time that each part takes."""
    module = importlib.import_module("ppo")
    prompts = [tree.prompt for tree in sides.read(options.trees)]
    count = 4 if options.tiny else 128
    vars(options).update(
        batch_size=count, tokens=8 if options.tiny else 96, epochs=2, minibatches=2, warmup=1, steps=1, rounds=1
    )
    folder = Path(options.trees).parent
    options.trees = str(folder / "prompts.json")
    Path(options.trees).write_text(json.dumps(prompts[: 2 * count]), encoding="utf-8")
    return module.summary(module.leyden(options, {"value": "head"}), options)  # type: ignore[no-any-return]


def four_bits(options: argparse.Namespace) -> Figures:
    """QLoRA by the recipe `8gb` on the shape of an 8-billion model: peak memory and seconds of a micro-batch."""
    import torch
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    from leyden.algos import SFT
    from leyden.models import CausalLM
    from leyden.precision import QLoRAPrecision

    shape = shapes.SMALL["1M"] if options.tiny else shapes.PUBLISHED["meta-llama/Meta-Llama-3-8B"]
    folder = Path(options.trees).parent / "large"
    shapes.write(shape, folder)
    if options.device != "cpu":
        torch.set_default_device("cuda")
    torch.set_default_dtype(torch.bfloat16)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    del model
    torch.set_default_device("cpu")
    torch.set_default_dtype(torch.float32)
    shapes.copy_tokenizer(folder)
    written = time.perf_counter() - began
    if options.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    from bitsandbytes.optim import AdamW8bit
    from lightning.pytorch import Trainer

    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    policy = CausalLM(str(folder), dtype="bfloat16", adapter=adapter, gradient_checkpointing=True)
    algorithm = SFT(policy, optimizer=lambda p: AdamW8bit(p, lr=2e-4), lr_scheduler=None)
    trees = rows("sft", 32, 64 if options.tiny else 512)
    data = sides.rows_in_order(trees, 4, max_tokens=2560)
    quiet = {n: False for n in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    began = time.perf_counter()
    Trainer(accelerator=options.device, devices=1, max_epochs=1, plugins=[QLoRAPrecision()], **quiet).fit(
        algorithm, data
    )
    seconds = sides.now(options) - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device != "cpu" else 0.0
    return {"peak_gib": peak, "seconds": seconds, "model_written_s": written}


LONG: dict[str, tuple[int, Sequence[int], sides.Settings]] = {
    "32k": (1, (2, 2), {"gradient_checkpointing": True}),
    "32k shared": (1, (2, 4, 4), {"gradient_checkpointing": True}),
    "8k": (2, (2, 2), {"compile": True}),
}
"""Rows a step; the shares of a row, 1 / n each, that its prompt and its responses have; options of the policy."""


def long(options: argparse.Namespace, kind: str) -> Figures:
    """SFT on rows of 32,768 or 8,192 tokens: peak memory, the optimizer's state included, and speed."""
    import torch

    from leyden.algos import SFT
    from leyden.batch.forest import Tree
    from leyden.models import CausalLM

    size, shares, policy = LONG[kind]
    row, r = (1024 if options.tiny else 32768) // (1 if kind.startswith("32k") else 4), random.Random(0)
    trees = []
    for number in range(size * (options.warmup + options.steps)):
        prompt, *responses = ([r.randrange(10, 4000) for _ in range(row // share)] for share in shares)
        trees.append(Tree(prompt, responses, None, [[1.0] * len(response) for response in responses], number))
    options.trees, options.batch_size = str(Path(options.trees).parent / "long.json"), size
    Path(options.trees).write_text(sides.written(trees), encoding="utf-8")
    algorithm = SFT(CausalLM(options.model, dtype=options.dtype, **policy), optimizer=sides.adamw, lr_scheduler=None)
    result = sides.fit(algorithm, options, passes=3)
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device != "cpu" else 0.0
    seconds, work = (result[name][options.warmup :] for name in ("seconds", "work"))
    taken = statistics.median(seconds)
    speed = {"step_ms": 1e3 * taken, "tokens_per_second": size * row / taken, "flops": sum(work) / sum(seconds)}
    return {"peak_gib": peak} | speed


def product(options: argparse.Namespace) -> Figures:
    return contest.product_speed(options, 512 if options.tiny else 8192)


def worker(options: argparse.Namespace) -> Figures:
    job, *rest = options.worker.split(":")
    jobs: dict[str, Callable[..., Figures]] = {
        "train": train, "sample": sample, "profile": profile, "ppo": ppo, "qlora": four_bits, "long": long,
        "product": product,
    }  # fmt: skip
    return jobs[job](options, *rest) | {"peak_gb": contest.peak_memory(options)}


# -- the whole -----------------------------------------------------------------------------------------------------


def jobs_of(options: argparse.Namespace) -> list[str]:
    names = ["product"]
    names += [f"train:{kind}:{way}" for kind in TRAINED for way in WAYS]
    names += [f"sample:{who}:{n}" for n in (1, 16) for who in ("leyden", "transformers")]
    names += ["profile:dpo:leyden", "profile:dpo:leyden compiled", "profile:sample", "ppo", "qlora"]
    names += [f"long:{kind}" for kind in LONG]
    wanted = [part for part in options.only.split(",") if part]
    return [name for name in names if not wanted or any(name.startswith(part) for part in wanted)]


def tests() -> Figures:
    """The tests of kernels and algorithms on this machine's GPU."""
    here = Path(__file__).parent.parent / "tests"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "test_attention_gpu.py"),
               str(here / "test_gpu.py")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=here.parent)
    lines = done.stdout.strip().splitlines()
    return {"passed": done.returncode == 0, "last": lines[-1] if lines else done.stderr[-300:]} | {
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    }


def start(name: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """The process of a part, which loads its libraries and then waits for its turn."""
    command = [sys.executable, __file__, "--worker", name]
    for key in ("device", "dtype", "trees", "model", "batch_size", "max_length", "warmup", "steps"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    if name.startswith("train:sft"):
        command[command.index("--trees") + 1] = options.trees.replace("dpo", "sft")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command + (["--tiny"] if options.tiny else []), text=True, **pipes)


def finish(process: subprocess.Popen[str]) -> Figures:
    """Let a part begin, and wait for its figures."""
    began = time.perf_counter()
    output, said = process.communicate("begin\n")
    if process.returncode:
        return {"error": (said.strip().splitlines() or ["no output"])[-1], "trace": said[-3000:]}
    figures: Figures = json.loads(output.splitlines()[-1])
    return figures | {"process_s": round(time.perf_counter() - began, 1)}


def run_jobs(names: list[str], options: argparse.Namespace) -> Iterator[tuple[str, Figures | None]]:
    """The figures of each part, one after the other; None once the time is up. The next one loads meanwhile."""
    began, ahead = time.perf_counter(), start(names[0], options) if names else None
    for number, name in enumerate(names):
        if time.perf_counter() - began > options.seconds or ahead is None:
            yield name, None
            continue
        process = ahead
        ahead = start(names[number + 1], options) if number + 1 < len(names) else None
        yield name, finish(process)
    if ahead is not None:
        ahead.kill()


def load_libraries(name: str) -> None:
    """What a part imports before its turn; its errors come in its turn."""
    with contextlib.suppress(ImportError):
        importlib.import_module("leyden.algos")
        importlib.import_module("lightning.pytorch")
        importlib.import_module("leyden.models.causal_lm")
        if ":trl" in name:
            importlib.import_module("trl.trainer.dpo_trainer")


def line(name: str, figures: Figures, results: dict[str, Figures]) -> str:
    if "error" in figures:
        return f"{name:<34} does not run here: {figures['error']}"
    if "peak" in figures:
        return f"{name:<34} {figures['peak'] / 1e12:.0f} TFLOP/s"
    words = [f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, float) and key != "flops"]
    if "flops" in figures and "product" in results:
        words.append(f"{100 * figures['flops'] / results['product']['peak']:.0f} % of the product's speed")
    more = [f"\n    {ms:8.3f} ms {count:5d} x {key}" for key, ms, count in figures.get("kernels", [])]
    more += [f"\n    waits {count} x at {where}" for where, count in figures.get("waits", [])]
    return f"{name:<34} " + ", ".join(words) + "".join(more)


def compare_with(earlier: dict[str, Figures], results: dict[str, Figures]) -> list[str]:
    """What is slower, or needs more memory, than an earlier run on the same kind of card."""
    worse = []
    for name in earlier.keys() & results.keys():
        for key, better in (("tokens_per_second", True), ("peak_gib", False), ("peak_gb", False)):
            old, new = earlier[name].get(key), results[name].get(key)
            if old and new and baseline.is_worse([old], [new], SLOWER, better):
                worse.append(f"{name}: {key} {new:.4g}, earlier {old:.4g}")
    return sorted(worse)


def card(options: argparse.Namespace) -> str:
    if options.device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name()


def measure(options: argparse.Namespace, keep: Callable[[Figures], None]) -> Figures:
    """Run all parts and print their figures. All so far are kept after each, since a borrowed machine may go away."""
    results: Figures = {}
    print(f"{card(options)}; {contest.machine(PACKAGES)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        options.model, options.trees = f"{folder}/model", f"{folder}/dpo.json"
        shapes.write(shapes.SMALL["1M"] if options.tiny else SHAPE, Path(options.model))
        shapes.fill(Path(options.model))
        for kind in ("dpo", "sft"):
            made = rows(kind, (20 if options.tiny else 50) * options.batch_size, options.max_length)
            Path(folder, f"{kind}.json").write_text(sides.written(made), encoding="utf-8")
        if not options.no_tests and options.device != "cpu":
            results["tests"] = tests()
            print("tests", results["tests"]["last"], *results["tests"]["failures"], sep="\n  ", flush=True)
        for name, figures in run_jobs(jobs_of(options), options):
            if figures is None:
                print(f"{name:<34} left out: the time is up", flush=True)
                continue
            results[name] = figures
            print(line(name, figures, results), flush=True)
            keep(results)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="small shapes and few steps, to see that all of it runs")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=32, help="pairs or examples a step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--warmup", type=int, default=4, help="steps of each run that do not count")
    parser.add_argument("--steps", type=int, default=8, help="steps of each run that count")
    parser.add_argument("--seconds", type=float, default=420, help="no further part is begun after so long")
    parser.add_argument("--only", default="", help="parts to run: beginnings of their names, with commas between")
    parser.add_argument("--no-tests", action="store_true")
    baseline.add_arguments(parser)
    for name in ("--worker", "--trees", "--model"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.worker:
        load_libraries(options.worker)
        sys.stdin.readline()
        print(json.dumps(worker(options)))
        return
    if options.tiny:
        vars(options).update(batch_size=2, max_length=64, warmup=1, steps=2)
    sized = ("tiny", "dtype", "batch_size", "max_length", "warmup", "steps")
    conditions = {"card": card(options)} | {name: getattr(options, name) for name in sized}
    packages = baseline.versions(PACKAGES)

    def keep(figures: Figures) -> None:
        record = {"options": conditions, "machine": baseline.processor(), "packages": packages, "figures": figures}
        baseline.write(options.output, record)

    baseline.hold(options, conditions, packages, lambda: measure(options, keep), compare_with)


if __name__ == "__main__":
    main()
