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
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    "leyden, compiled": None,
    "trl, best": {"bf16": False},
    "trl, best, liger": {"bf16": False} | LIGER,
}
"""Who trains; weights are in bf16 on both sides."""
SLOWER = 0.1
"""Part by which a figure may be worse than the one it is compared with, beside the spread."""
Figures = dict[str, Any]


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
        options.policy = {"compile": True} if way.endswith("compiled") else {}
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


def profile(options: argparse.Namespace, kind: str, way: str) -> Figures:
    """The kernels that take most of a step, and the part of the time in which the GPU does nothing."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorder

    module = importlib.import_module(kind)
    options.policy = {"compile": True} if way.endswith("compiled") else {}
    options.warmup, options.steps = 4, 4
    steps: list[int] = []
    activities = [ProfilerActivity.CPU] if options.device == "cpu" else [ProfilerActivity.CUDA, ProfilerActivity.CPU]
    made = recorder(activities=activities)
    clock = sides.now

    def watched(given: argparse.Namespace) -> float:
        at = clock(given)
        steps.append(1)
        if len(steps) == 2 * options.warmup + 1:
            made.start()
            options.began = at
        if len(steps) == 2 * (options.warmup + options.steps):
            options.took = at - options.began
            made.stop()
        return at

    sides.now = watched
    module.run(options, None)
    device = "cpu" if options.device == "cpu" else "cuda"
    time_of: Callable[[Any], float] = lambda e: e.self_device_time_total if device == "cuda" else e.self_cpu_time_total  # noqa: E731
    events = [
        e
        for e in made.key_averages()
        if time_of(e) and (device == "cpu" or e.device_type == torch.autograd.DeviceType.CUDA)
    ]
    total = sum(map(time_of, events)) / 1e6
    top = sorted(events, key=time_of, reverse=True)[:15]
    return {
        "idle_share": 1 - total / options.took,
        "step_ms": 1e3 * options.took / options.steps,
        "kernels": [[e.key[:90], round(time_of(e) / 1e3 / options.steps, 3), e.count // options.steps] for e in top],
        "launches": sum(e.count for e in events) // options.steps,
    }


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


def long(options: argparse.Namespace, kind: str) -> Figures:
    """SFT on rows of 32,768 tokens with gradient checkpointing: peak memory and speed, the optimizer's state included.

    Args:
        kind: `one` response a row, or `shared`: a prompt of half the row, with two responses.
    """
    import torch
    from lightning.pytorch import Callback, Trainer

    from leyden.algos import SFT
    from leyden.batch.forest import Tree
    from leyden.models import CausalLM

    row, seconds, r = 256 if options.tiny else 32768, list[float](), random.Random(0)
    parts = [row // 2, row // 2] if kind == "one" else [row // 2, row // 4, row // 4]
    trees = []
    for number in range(options.warmup + options.steps):
        prompt, *responses = ([r.randrange(10, 4000) for _ in range(length)] for length in parts)
        trees.append(Tree(prompt, responses, None, [[1.0] * len(response) for response in responses], number))

    class Clock(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.began = sides.now(options)

        def on_train_batch_end(self, *_: Any) -> None:
            seconds.append(sides.now(options) - self.began)

    policy = CausalLM(options.model, dtype=options.dtype, gradient_checkpointing=True)
    algorithm = SFT(policy, optimizer=sides.adamw, lr_scheduler=None)
    quiet = {n: False for n in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    settings = {"max_epochs": 1, "devices": 1, "callbacks": [Clock()]}
    Trainer(accelerator=options.device, **settings, **quiet).fit(algorithm, sides.rows_in_order(trees, 1))
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device != "cpu" else 0.0
    taken = statistics.median(seconds[options.warmup :])
    return {"peak_gib": peak, "step_ms": 1e3 * taken, "tokens_per_second": row / taken}


def product(options: argparse.Namespace) -> Figures:
    return contest.product_speed(options, 512 if options.tiny else 8192)


def worker(options: argparse.Namespace) -> Figures:
    job, *rest = options.worker.split(":")
    jobs: dict[str, Callable[..., Figures]] = {
        "train": train, "sample": sample, "profile": profile, "qlora": four_bits, "long": long, "product": product,
    }  # fmt: skip
    return jobs[job](options, *rest) | {"peak_gb": contest.peak_memory(options)}


# -- the whole -----------------------------------------------------------------------------------------------------


def jobs_of(options: argparse.Namespace) -> list[str]:
    names = ["product"]
    names += [f"train:{kind}:{way}" for kind in TRAINED for way in WAYS]
    names += [f"sample:{who}:{n}" for n in (1, 16) for who in ("leyden", "transformers")]
    names += ["profile:dpo:leyden", "profile:dpo:leyden, compiled", "qlora", "long:one", "long:shared"]
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


def run_job(name: str, options: argparse.Namespace) -> Figures:
    command = [sys.executable, __file__, "--worker", name]
    for key in ("device", "dtype", "trees", "model", "batch_size", "max_length", "warmup", "steps"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    began = time.perf_counter()
    if name.startswith("train:sft"):
        command[command.index("--trees") + 1] = options.trees.replace("dpo", "sft")
    done = subprocess.run(command + (["--tiny"] if options.tiny else []), capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1], "trace": done.stderr[-3000:]}
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures | {"process_s": round(time.perf_counter() - began, 1)}


def line(name: str, figures: Figures, results: dict[str, Figures]) -> str:
    if "error" in figures:
        return f"{name:<34} does not run here: {figures['error']}"
    if "peak" in figures:
        return f"{name:<34} {figures['peak'] / 1e12:.0f} TFLOP/s"
    words = [f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, float) and key != "flops"]
    if "flops" in figures and "product" in results:
        words.append(f"{100 * figures['flops'] / results['product']['peak']:.0f} % of the product's speed")
    more = [f"\n    {ms:8.3f} ms {count:5d} x {key}" for key, ms, count in figures.get("kernels", [])]
    return f"{name:<34} " + ", ".join(words) + "".join(more)


def compare_with(earlier: dict[str, Figures], results: dict[str, Figures]) -> list[str]:
    """What is slower, or needs more memory, than an earlier run on the same kind of card."""
    worse = []
    for name in earlier.keys() & results.keys():
        for key, better in (("tokens_per_second", 1), ("peak_gib", -1), ("peak_gb", -1)):
            old, new = earlier[name].get(key), results[name].get(key)
            if old and new and (new / old) ** better < 1 - SLOWER:
                worse.append(f"{name}: {key} {new:.4g}, earlier {old:.4g}")
    return sorted(worse)


def card(options: argparse.Namespace) -> str:
    if options.device == "cpu":
        return "cpu"
    import torch

    return torch.cuda.get_device_name()


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
    parser.add_argument("--output", default="", help="JSON file to write")
    parser.add_argument("--against", default="", help="JSON file of an earlier run; exits with 1 if this one is worse")
    for name in ("--worker", "--trees", "--model"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.worker:
        print(json.dumps(worker(options)))
        return
    if options.tiny:
        vars(options).update(batch_size=2, max_length=64, warmup=1, steps=2)
    began, results = time.perf_counter(), dict[str, Figures]()
    packages = ("leyden", "torch", "transformers", "lightning")
    print(f"{card(options)}; {contest.machine(packages)}", flush=True)
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
        for name in jobs_of(options):
            if time.perf_counter() - began > options.seconds:
                print(f"{name:<34} left out: the time is up", flush=True)
                continue
            results[name] = run_job(name, options)
            print(line(name, results[name], results), flush=True)
    if options.output:
        text = {"card": card(options), "machine": contest.machine(packages), "figures": results}
        Path(options.output).write_text(json.dumps(text, indent=1), encoding="utf-8")
    if options.against:
        worse = compare_with(json.loads(Path(options.against).read_text(encoding="utf-8"))["figures"], results)
        print("\n".join(worse) or f"nothing is worse than in {options.against}")
        sys.exit(bool(worse))


if __name__ == "__main__":
    main()
