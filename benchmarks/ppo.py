"""Proximal policy optimisation, side by side with TRL's PPOTrainer, which its releases had until 1.12.0.

That release needs an environment of its own:

    python -m venv PEER && PEER/bin/pip install trl==1.12.0 torch==TORCH
    python benchmarks/ppo.py --peer-python PEER/bin/python --model MODEL_FOLDER

TORCH is the version that Leyden runs with. Both sides see the same token ids of prompts and train on as many
responses, one a prompt, of the same length (stop tokens are off), with the same reward (a rule on the text, rule.py),
epochs and optimizer steps, and all weights. TRL's value function is a whole model of its own, and its reference another
copy. Leyden runs with a value head on the policy, its default, and with a separate value model, which is the same
algorithm as TRL's. TRL runs with its defaults and at its best, without gradient checkpointing and autocast.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import baseline
import contest
import sides
from rule import rule

CONTESTANTS: dict[str, sides.Settings] = {
    contest.OURS: {"value": "head"},
    "leyden, value model": {"value": "model"},
    "trl, defaults": {},
    "trl, best": {"gradient_checkpointing": False, "bf16": False},
}
PARTS = ("generation", "reward", "scoring", "update")
PACKAGES = ("leyden", "torch", "transformers", "lightning")


def leyden(options: argparse.Namespace, settings: sides.Settings) -> sides.Result:
    import torch
    from lightning.pytorch import Callback, LightningDataModule, Trainer
    from peer_ppo import Clocks

    from leyden.algos import PPO
    from leyden.data.prompts import Prompt, PromptLoader
    from leyden.example import Example
    from leyden.models import CausalLM
    from leyden.policy.engine import Native
    from leyden.policy.policy import Sampling

    prompts = json.loads(Path(options.trees).read_text(encoding="utf-8"))
    clocks = Clocks(options)

    class Unstopped(CausalLM):
        stop = frozenset()  # type: ignore[assignment]

    class Timed(Native):
        def generate(self, *args: Any) -> Any:
            return clocks.timed("generation", super().generate)(*args)

    class Looking(PPO):
        def compute_log_probs(self, batch: Any) -> Any:
            return clocks.timed("scoring", super().compute_log_probs)(batch)

    class Data(LightningDataModule):
        def train_dataloader(self) -> Any:
            rows = [Prompt(i, Example([], []), prompt) for i, prompt in enumerate(prompts)]
            return self.trainer.lightning_module.experience(PromptLoader(rows, options.batch_size, 0))

    class Watch(Callback):
        steps = 0

        def on_train_start(self, *_: Any) -> None:
            clocks.began = now(options)

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step // (options.epochs * options.minibatches) > len(clocks.rollouts):
                clocks.end()

    now = sides.now

    def reward(samples: Any) -> Any:
        return torch.tensor([rule(sample.response) for sample in samples])

    def model() -> Any:
        return Unstopped(options.model, dtype=options.dtype)

    algorithm = Looking(
        model(),
        reward=clocks.timed("reward", reward),
        engine=Timed(),
        samples=1,
        epochs=options.epochs,
        minibatches=options.minibatches,
        sampling=Sampling(max_new_tokens=options.tokens),
        kl_coef=0.05,
        optimizer=sides.adamw,
        lr_scheduler=None,
        value_policy=model() if settings["value"] == "model" else None,
    )
    quiet = {n: False for n in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    steps = (options.warmup + options.steps) * options.epochs * options.minibatches
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=options.device,
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            callbacks=[Watch()],
            default_root_dir=folder,
            **quiet,
        )
        trainer.fit(algorithm, Data())
    return {"rollouts": clocks.rollouts, "optimizer_steps": trainer.global_step}


def run(options: argparse.Namespace, name: str) -> sides.Result:
    if name.startswith("trl"):
        from peer_ppo import trl

        return trl(options, CONTESTANTS[name])
    return leyden(options, CONTESTANTS[name])


def summary(result: sides.Result, options: argparse.Namespace) -> dict[str, float]:
    """Responses a second of the rollouts after the warm-up, and what share of their time went where."""
    counted = result["rollouts"][options.warmup :]
    seconds = sum(rollout["seconds"] for rollout in counted)
    shares = {part: sum(rollout[part] for rollout in counted) / seconds for part in PARTS}
    return {"speed": options.batch_size * len(counted) / seconds, **shares}


def peer_versions(python: str) -> dict[str, str]:
    said = "from importlib.metadata import version as v; print(*map(v, ('trl', 'transformers', 'torch')))"
    done = subprocess.run([python, "-c", said], capture_output=True, text=True, check=True)
    return dict(zip(("trl", "transformers", "torch"), done.stdout.split(), strict=True))


def compare(options: argparse.Namespace, peer: dict[str, str]) -> baseline.Figures:
    print(f"{contest.machine(PACKAGES)}\npeer: {' '.join(f'{n} {v}' for n, v in peer.items())}")
    print(
        f"{options.batch_size} prompts a rollout, 1 response of {options.tokens} tokens each, {options.epochs} epochs "
        f"of {options.minibatches} minibatches, {options.rounds} rounds of {options.steps} rollouts after "
        f"{options.warmup}, {options.dtype} on {options.device}",
        flush=True,
    )
    runs: dict[str, list[sides.Result]] = {name: [] for name in CONTESTANTS}
    for number in range(options.rounds):
        for name, results in runs.items():
            python = options.peer_python if name.startswith("trl") else sys.executable
            results.append(contest.work(name, options, __file__, python))
            figure = summary(results[-1], options)["speed"]
            print(f"round {number + 1}: {name} {figure:.2f} responses/s", file=sys.stderr, flush=True)
    print(f"\nmedian [quartiles] of {options.rounds} rounds")
    found = {name: [summary(result, options) for result in results] for name, results in runs.items()}
    speeds = {name: [r["speed"] for r in rounds] for name, rounds in found.items()}
    figures = contest.figures(speeds, runs, "responses_per_second")
    for name, rounds in found.items():
        shares = ", ".join(f"{part} {100 * statistics.median(r[part] for r in rounds):.0f} %" for part in PARTS)
        print(
            f"{name:<20} {contest.spread(speeds[name]):>20} responses/s  {contest.beside(figures[name])}\n"
            f"    {shares}; {runs[name][0]['optimizer_steps']} optimizer steps"
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="python of an environment with trl 1.12.0")
    parser.add_argument("--model", default="tiny", help="model folder; tiny is the embedded one")
    parser.add_argument(
        "--data", default="", help="instruction rows whose prompts are answered; default: generated ones"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="prompts in a rollout")
    parser.add_argument("--max-length", type=int, default=128, help="rows with more tokens are left out")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a response")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="rollouts of each run that do not count")
    parser.add_argument("--steps", type=int, default=2, help="rollouts of each run that count")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    baseline.add_arguments(parser)
    parser.add_argument("--worker", choices=[*CONTESTANTS], help=argparse.SUPPRESS)
    parser.add_argument("--trees", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        result = run(options, options.worker)
        print(json.dumps(result | {"peak_gb": contest.peak_memory(options)}))
        return
    from leyden.paths import resolve

    options.model = resolve(options.model)
    with tempfile.TemporaryDirectory() as folder:
        if not options.data:
            options.data = f"{folder}/rows.jsonl"
            generate = ["--kind", "instruction", "--rows", "400", "--language", "both", "--output", options.data]
            command = [sys.executable, "-m", "leyden", "data", "sample", *generate]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        options.trees = f"{folder}/prompts.json"
        prompts = [tree.prompt for tree in sides.make_trees(options, "instruction")]
        Path(options.trees).write_text(json.dumps(prompts), encoding="utf-8")
        peer = peer_versions(options.peer_python)
        packages = baseline.versions(PACKAGES) | {f"peer's {name}": number for name, number in peer.items()}
        contest.hold(options, __file__, packages, lambda: compare(options, peer))


if __name__ == "__main__":
    main()
