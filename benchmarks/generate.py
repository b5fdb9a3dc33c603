"""Sampling, side by side with transformers: `generate`, and its continuous batching.

    python benchmarks/generate.py --model MODEL_FOLDER

All sample the same number of tokens, from the same prompts, weights and distribution (temperature 1, nothing cut
off), in processes of their own that take turns. Stop tokens are off, so that everyone does the same work; `--stop 1`
leaves them on, and then tokens after a response has ended do not count. Leyden also returns log-probs and text, the
peer only token ids. First, all answer greedily in fp32, and their tokens are compared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import baseline
import contest
import sides

CONTESTANTS: dict[str, sides.Settings] = {
    contest.OURS: {},
    "generate, 64 rows": {"rows": 64},
    "generate, one batch": {"rows": 1 << 30},
    "generate, static cache": {"rows": 64, "cache_implementation": "static", "disable_compile": True},
    "continuous batching": {"continuous": True},
}
"""Who samples; `rows` is how many samples `generate` is given at once, prompts of similar length together."""
Answers = list[list[int]]
PACKAGES = ("leyden", "torch", "transformers")


def leyden(options: argparse.Namespace) -> Any:
    """A function from prompts, n and how many tokens to token ids."""
    from leyden.models import CausalLM
    from leyden.policy.policy import Sampling

    class Unstopped(CausalLM):
        stop = frozenset()  # type: ignore[assignment]

    policy = (CausalLM if options.stop else Unstopped)(options.model, dtype=options.dtype)
    policy.build()
    policy.to(options.device)

    def sample(prompts: Answers, n: int, tokens: int) -> Answers:
        sampling = Sampling(max_new_tokens=tokens, temperature=options.temperature)
        return [response.tokens for group in policy.generate(prompts, n, sampling) for response in group]

    return sample


def transformers(options: argparse.Namespace, settings: sides.Settings) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

    settings = dict(settings)
    rows, continuous = settings.pop("rows", 1), settings.pop("continuous", False)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model.to(options.device).eval()
    stop = model.generation_config.eos_token_id if options.stop else None
    ends = {stop} if isinstance(stop, int) else set(stop or ())
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=0)
    pad = AutoTokenizer.from_pretrained(options.model).pad_token_id or 0
    greedy = options.temperature == 0
    how = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def config(n: int, tokens: int) -> Any:
        return GenerationConfig(
            max_new_tokens=tokens, num_return_sequences=n, eos_token_id=stop, pad_token_id=pad, **how, **settings
        )

    def cut(answer: list[int]) -> list[int]:
        end = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
        return answer[:end]

    def batched(prompts: Answers, n: int, tokens: int) -> Answers:
        answers: dict[int, Answers] = {}
        order, step = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), max(1, rows // n)
        for chunk in (order[at : at + step] for at in range(0, len(order), step)):
            longest = max(len(prompts[i]) for i in chunk)
            ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in chunk])
            mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chunk])
            inputs = {"input_ids": ids.to(options.device), "attention_mask": mask.to(options.device)}
            out = model.generate(**inputs, generation_config=config(n, tokens))[:, longest:].tolist()
            answers |= {i: out[k * n : (k + 1) * n] for k, i in enumerate(chunk)}
        return [cut(answer) for i in range(len(prompts)) for answer in answers[i]]

    def paged(prompts: Answers, n: int, tokens: int) -> Answers:
        pages = -(-(max(map(len, prompts)) + tokens) // 256)
        most = min(64, n * len(prompts))  # left to itself it takes nine tenths of the memory, and fills them first
        room = ContinuousBatchingConfig(
            num_blocks=(most + 1) * pages, max_batch_tokens=512, max_requests_per_batch=most
        )
        out = model.generate_batch(prompts, config(n, tokens), room, max_new_tokens=tokens)
        return [cut(result.generated_tokens) for result in out.values()]

    return paged if continuous else batched


def run(options: argparse.Namespace, settings: sides.Settings | None) -> sides.Result:
    """Sample once after a short warm-up: seconds, tokens, and the first prompt's answer."""
    prompts = json.loads(Path(options.trees).read_text(encoding="utf-8"))
    sample = leyden(options) if settings is None else transformers(options, settings)
    sample(prompts[:2], 1, 20)
    began = sides.now(options)
    answers = sample(prompts, options.n, options.tokens)
    seconds = sides.now(options) - began
    if len(answers) != len(prompts) * options.n:
        sys.exit(f"{len(answers)} answers for {len(prompts)} prompts and n = {options.n}")
    kept = answers if options.temperature == 0 else []
    return {"seconds": seconds, "tokens": sum(map(len, answers)), "answers": kept}


def compare(options: argparse.Namespace) -> baseline.Figures:
    """Prove that all predict the same, run all rounds for every n, and print the figures."""
    print(contest.machine(PACKAGES), flush=True)
    longest = max(map(len, json.loads(Path(options.trees).read_text(encoding="utf-8"))))
    print(
        f"{options.prompts} prompts of at most {longest} tokens, {options.tokens} tokens a sample, {options.rounds} "
        f"rounds, {options.dtype} on {options.device}\n\ngreedy in fp32: tokens of the first that are equal to ours",
        flush=True,
    )
    able, ours = [contest.OURS], None
    for name in CONTESTANTS:
        try:
            found = contest.work(name, options, __file__, dtype="float32", temperature=0.0, n=1, tokens=16)["answers"]
        except SystemExit as problem:
            print(f"{name:<24} does not run here: {str(problem).strip().splitlines()[-1]}", flush=True)
            continue
        ours = ours or found
        same = sum(a == b for x, y in zip(ours, found, strict=True) for a, b in zip(x, y, strict=False))
        print(f"{name:<24} {same} of {sum(map(len, ours))}", flush=True)
        able += [name] if name != contest.OURS else []
    figures: baseline.Figures = {}
    for n in map(int, options.numbers.split(",")):
        runs: dict[str, list[sides.Result]] = {name: [] for name in able}
        for number in range(options.rounds):
            for name in able:
                runs[name].append(contest.work(name, options, __file__, n=n))
                last = runs[name][-1]
                print(f"n {n}, round {number + 1}: {name} {last['tokens'] / last['seconds']:.0f}", file=sys.stderr)
        figures |= {f"{name}, n = {n}": found for name, found in report(n, runs).items()}
    return figures


def report(n: int, runs: dict[str, list[sides.Result]]) -> baseline.Figures:
    speeds = {name: [result["tokens"] / result["seconds"] for result in results] for name, results in runs.items()}
    figures = contest.figures(speeds, runs, "tokens_per_second")
    print(f"\nn = {n}: generated tokens/s, median [quartiles]")
    for name, values in speeds.items():
        print(f"{name:<24} {contest.spread(values, 0):>22}  {contest.beside(figures[name])}", flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="model folder; tiny is the embedded one")
    parser.add_argument(
        "--data", default="", help="instruction rows whose prompts are answered; default: generated ones"
    )
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256, help="rows with more tokens are left out")
    parser.add_argument("--numbers", default="1,4,16", help="samples a prompt, one after the other")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--stop", type=int, default=0, help="1 lets stop tokens end a response")
    baseline.add_arguments(parser)
    for name, kind in (("--n", int), ("--temperature", float), ("--trees", str), ("--worker", str)):
        parser.add_argument(name, type=kind, default=1 if kind is not str else "", help=argparse.SUPPRESS)
    options = parser.parse_args()
    from leyden.paths import resolve

    options.model = resolve(options.model)
    if options.worker:
        found = run(options, None if options.worker == contest.OURS else CONTESTANTS[options.worker])
        print(json.dumps(found | {"peak_gb": contest.peak_memory(options)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            options.data = f"{folder}/rows.jsonl"
            wanted = ["--kind", "instruction", "--rows", str(4 * options.prompts), "--language", "both"]
            command = [sys.executable, "-m", "leyden", "data", "sample", *wanted, "--output", options.data]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wanted_rows = argparse.Namespace(**vars(options), batch_size=options.prompts, warmup=0, steps=1)
        rows = sides.make_trees(wanted_rows, "instruction")
        options.trees = f"{folder}/prompts.json"
        Path(options.trees).write_text(json.dumps([row.prompt for row in rows[: options.prompts]]), encoding="utf-8")
        contest.hold(options, __file__, baseline.versions(PACKAGES), lambda: compare(options))


if __name__ == "__main__":
    main()
