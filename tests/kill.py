"""Runs of every algorithm that are killed again and again and gone on with, against runs that nobody disturbed.

    python tests/kill.py                                  # 20 kills of SFT and PPO, 5 of the others
    python tests/kill.py --only SFT PPO --kills 2 --seed 7
    python tests/kill.py --only PPO GRPO --kills 10 --vllm .venv-vllm --server-kills 3

A run is killed by SIGKILL at a random moment, or just before or after it hands a file to the disk or renames one. Then
it is gone on with until it ends. Weights, optimizer, loops, random generators, metrics.csv but for clocks, and
rollouts.jsonl must be those of the undisturbed run, bit for bit, and no checkpoint may ever be unreadable. Everything
heavy is imported once, by the process that runs are forked from.

With --vllm a server samples, which has to end with every run that is killed, and which is killed by itself as well.
What it says of log-probs, whose last digits depend on what it samples side by side, may differ; samples may not.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

CLOCKS: tuple[str, ...] = ("perf/", "train/seconds")
"""Columns of metrics.csv that tell of time and memory."""
SMALL = "--trainer.accelerator cpu --trainer.devices 1 --trainer.enable_progress_bar false --model.policy.path small"
PROMPTED = "--data.path prompts.jsonl --data.batch_size 8 --data.max_length 40 --model.sampling.max_new_tokens 6"
SAMPLING = f"{PROMPTED} --model.reward leyden.rewards.Function --model.reward.path kill_reward.vowels"
CASES = {
    "SFT": "--config sft --data.path rows.jsonl --data.batch_size 6 --data.val_fraction 0.2 --trainer.max_epochs 3 "
    "--trainer.accumulate_grad_batches 2 --checkpoint.every_n_train_steps 1 --model.optimizer.lr 1e-3",
    "RewardModel": "--config reward_model --data.path pairs.jsonl --data.batch_size 6 --data.val_fraction 0.2 "
    "--trainer.max_steps 7 --trainer.max_epochs 4 --trainer.val_check_interval 0.5 --checkpoint.every_n_train_steps 2 "
    "--model.optimizer.lr 1e-3",
    "DPO": "--config dpo --config lora --data.path pairs.jsonl --data.batch_size 6 --data.val_fraction 0.2 "
    "--trainer.max_epochs 2 --checkpoint.monitor val/loss --checkpoint.save_last true "
    "--checkpoint.every_n_train_steps 2",
    "WPO": "--config dpo --model.wpo true --data.path pairs.jsonl --data.batch_size 6 --data.val_fraction 0.2 "
    "--trainer.accumulate_grad_batches 2 --trainer.max_epochs 2 --checkpoint.every_n_train_steps 1 "
    "--model.optimizer.lr 1e-3",
    "AttributeModel": "--config attribute_model --data.path grades.jsonl --data.attributes [grade] --data.batch_size 6 "
    "--data.val_fraction 0.2 --trainer.max_epochs 2 --checkpoint.every_n_train_steps 1 --model.optimizer.lr 1e-3",
    "KTO": "--config kto --data.path labels.jsonl --data.batch_size 6 --data.val_fraction 0.2 --trainer.max_epochs 2 "
    "--checkpoint.every_n_train_steps 1 --model.optimizer.lr 1e-3",
    "PPO": f"--config ppo {SAMPLING} --model.epochs 3 --model.minibatches 2 --trainer.max_epochs 5 "
    "--trainer.check_val_every_n_epoch 2 --data.val_fraction 0.2 --checkpoint.every_n_train_steps 1 "
    "--model.optimizer.lr 1e-3 --model.kl_target 0.1 --model.score.normalise true --model.stop_kl 1e-4",
    "GRPO": f"--config grpo {SAMPLING} --model.samples 3 --model.minibatches 2 --trainer.max_epochs 4 "
    "--trainer.check_val_every_n_epoch 1 --data.val_fraction 0.2 --checkpoint.monitor val/reward "
    "--checkpoint.mode max --checkpoint.every_n_train_steps 1 --checkpoint.save_last true --model.optimizer.lr 1e-3",
    "DAPO": f"--config dapo {SAMPLING} --model.samples 3 --model.minibatches 2 --trainer.max_epochs 4 "
    "--data.val_fraction 0 --checkpoint.every_n_train_steps 1 --checkpoint.save_last true --model.optimizer.lr 1e-3",
    "RejectionSampling": f"--config rejection_sampling {SAMPLING} --model.samples 3 --model.minibatches 2 "
    "--model.epochs 2 --trainer.max_steps 10 --trainer.max_epochs 4 --data.val_fraction 0.2 "
    "--checkpoint.every_n_train_steps 3 --model.optimizer.lr 1e-3",
    "Distillation": f"--config distillation {SAMPLING} --model.teacher_system brief --model.samples 2 --model.epochs 2 "
    "--model.minibatches 2 --trainer.max_epochs 4 --data.val_fraction 0.2 --checkpoint.every_n_train_steps 1 "
    "--model.optimizer.lr 1e-3",
    "OnlineDPO": f"--config online_dpo {SAMPLING} --model.samples 3 --model.minibatches 2 --trainer.max_epochs 4 "
    "--data.val_fraction 0.2 --checkpoint.every_n_train_steps 1 --model.optimizer.lr 1e-3",
}
ENGINE: list[str] = []
"""Arguments that let a server sample."""
SAMPLE = ("PPO", "GRPO", "RejectionSampling", "OnlineDPO", "Distillation")
KILLS = {"SFT": 20, "PPO": 20}
"""How often; 5 times where nothing stands here."""


@dataclass
class Fault:
    """When a process is killed: after some seconds, or around the nth time that it calls a function of `os`."""

    seconds: float | None = None
    call: str = ""
    number: int = 0
    after: bool = False

    def arm(self, counts: Path | None) -> None:
        """In the process that is to die, or that counts how often it could have."""
        if self.seconds is not None:
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
        made = {"fsync": 0, "replace": 0}

        def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                made[name] += 1
                fatal = name == self.call and made[name] == self.number
                if fatal and not self.after:
                    os.kill(os.getpid(), signal.SIGKILL)
                found = function(*args)
                if fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                if counts is not None:
                    counts.write_text(json.dumps(made), encoding="utf-8")
                return found

            return call

        os.fsync, os.replace = around("fsync", os.fsync), around("replace", os.replace)


@dataclass
class Result:
    """What became of one algorithm's runs."""

    name: str
    kills: int = 0
    deaths: int = 0
    """Of its server"""
    resumes: int = 0
    runs: int = 0
    """Runs that were killed and gone on with to their end"""
    files: int = 0
    """Checkpoints that were read after kills"""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def prepare() -> None:
    """Data, a model and a reward in the current folder, and everything that runs will import."""
    import peft  # noqa: F401
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    import leyden.cli.lightning_cli  # noqa: F401
    from leyden.algos import (  # noqa: F401
        DPO,
        GRPO,
        KTO,
        PPO,
        SFT,
        AttributeModel,
        Distillation,
        OnlineDPO,
        RejectionSampling,
        RewardModel,
    )
    from leyden.data.tokenizer import load_tokenizer
    from leyden.datamodules import AttributeData, InstructionData, PreferenceData, PromptData  # noqa: F401
    from leyden.models import CausalLM  # noqa: F401

    draw = random.Random(5)
    words = "하나 둘 셋 one two three four 다섯 six 일곱".split()

    def text() -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, 5)))

    rows = [{"prompt": f"{i} {text()}?", "response": text()} for i in range(30)]
    pairs = [{"prompt": row["prompt"], "chosen": row["response"], "rejected": text() + " no"} for row in rows]
    labels = [row | {"label": number % 3 == 0} for number, row in enumerate(rows)]
    grades = [row | {"grade": len(row["response"]) / 8} for row in rows]
    prompts = [{"prompt": row["prompt"]} for row in rows[:20]]
    files = {"rows": rows, "pairs": pairs, "labels": labels, "grades": grades, "prompts": prompts}
    for name, made in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        Path(f"{name}.jsonl").write_text(lines, encoding="utf-8")
    Path("kill_reward.py").write_text(
        "def vowels(samples):\n    return [sum(s.response.count(v) for v in 'aeiou') / 4 for s in samples]\n"
    )
    disable_progress_bar()
    tokenizer: Any = load_tokenizer("tiny")
    torch.manual_seed(0)
    width = 64 if ENGINE else 16  # vLLM knows no narrower heads
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
                         bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained("small")
    tokenizer.save_pretrained("small")


def run(name: str, folder: Path, fault: Fault, counts: Path | None = None, server_dies: bool = False) -> int:
    """Start or go on with a run in a process of its own: its exit code, or minus the signal that ended it.

    Args:
        server_dies: whether its server is killed, once it has sampled something.
    """
    there = any(folder.glob("checkpoints/*.ckpt"))
    args = ["fit", *CASES[name].split(), *SMALL.split(), "--trainer.default_root_dir", str(folder)]
    args += ["--ckpt_path", "last" if there else "auto", *ENGINE]
    rows = len(_rows(folder))
    child = os.fork()
    if child == 0:
        code = 70
        try:
            log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            torch.set_num_threads(1)
            fault.arm(counts)
            from leyden.cli.launcher import main

            code = main(args)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended:
        if server_dies and len(_rows(folder)) > rows:
            server_dies = not kill_server(folder)
        time.sleep(0.02)
        ended, status = os.waitpid(child, os.WNOHANG)
    if ENGINE:
        wait_for_server(folder)
    return os.waitstatus_to_exitcode(status)


def port(folder: Path) -> int | None:
    """Where the last server of a run listens."""
    log = folder / "vllm.log"
    found = re.findall(r"api_server .*--port (\d+)", log.read_text(encoding="utf-8")) if log.is_file() else []
    return int(found[-1]) if found else None


def servers(folder: Path) -> list[int]:
    """The processes of a run's server, but for its guard."""
    command = ["pgrep", "-f", f"^[^ ]*python[^ ]* -m vllm.*--port {port(folder)}( |$)"]
    return [int(number) for number in subprocess.run(command, capture_output=True, text=True).stdout.split()]


def kill_server(folder: Path) -> bool:
    found = servers(folder)
    for number in found:
        os.killpg(number, signal.SIGKILL)
    return bool(found)


def wait_for_server(folder: Path) -> None:
    """Until the server of a run that has ended is gone; an error where it stays."""
    deadline = time.monotonic() + 30
    while port(folder) is not None and servers(folder):
        if time.monotonic() > deadline:
            raise SystemExit(f"{folder}: its server outlives it")
        time.sleep(0.1)


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rollouts of a run, without what depends on which samples were drawn side by side."""
    rows = []
    for file in sorted(folder.glob("rollouts.jsonl*")):
        for line in file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # it is being written
                rows.append({name: value for name, value in json.loads(line).items() if name != "logp"})
    return rows


def unreadable(folder: Path) -> tuple[int, list[str]]:
    """How many checkpoints a run has, and which of them cannot be read."""
    from leyden.checkpoint.find import damage

    files = sorted(folder.glob("checkpoints/*.ckpt"))
    bad = []
    for file in files:
        try:
            torch.load(file, weights_only=True)
        except Exception as error:
            bad.append(f"{file.name}: {error}")
        if (problem := damage(file)) is not None:
            bad.append(f"{file.name}: {problem}")
    return len(files), bad


def differences(folder: Path, reference: Path) -> list[str]:
    """Where a run differs from another."""
    if ENGINE and _rows(folder) != _rows(reference):
        return ["rollouts.jsonl has other samples"]
    found = [
        name
        for name in (
            *(() if ENGINE else ("rollouts.jsonl",)),
            "export/model.safetensors",
            "export/adapter_model.safetensors",
        )
        if _bytes(folder / name) != _bytes(reference / name)
    ]
    rows, expected = _metrics(folder / "metrics.csv"), _metrics(reference / "metrics.csv")
    found += [f"metrics.csv {a} instead of {b}" for a, b in zip(rows, expected, strict=False) if a != b][:2]
    found += [f"metrics.csv has {len(rows)} rows instead of {len(expected)}"] if len(rows) != len(expected) else []
    # where the best are kept, a run killed between two files of one step has it as the best and not as last.ckpt too
    one, other = (torch.load(_newest(place), weights_only=True) for place in (folder, reference))
    return found + [f"checkpoint: {place}" for place in _unequal(one, other)][:3]


def _bytes(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _metrics(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in csv.DictReader(stream)]


def _newest(folder: Path) -> Path:
    from leyden.checkpoint.find import find_checkpoint

    found = find_checkpoint("last", str(folder))
    assert found is not None
    return found


def _unequal(one: Any, other: Any, place: str = "") -> list[str]:
    """Where two checkpoints differ, but for clocks and for where they stand."""
    if place.endswith(("saved", "seconds", "_path", "dirpath", "best_k_models")) or any(
        clock in place for clock in CLOCKS
    ):
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [line for key in keys for line in _unequal(one.get(key), other.get(key), f"{place}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [
            line for i, (a, b) in enumerate(zip(one, other, strict=True)) for line in _unequal(a, b, f"{place}.{i}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [f"{place} differs"]
    same = one == other or (one != one and other != other)
    return [] if same else [f"{place}: {str(one)[:60]} instead of {str(other)[:60]}"]


def check(name: str, kills: int, draw: random.Random, deaths: int = 0) -> Result:
    """Kill one algorithm's run so many times, and its server, starting a new run whenever one comes to its end."""
    result, began, reference = Result(name), time.monotonic(), Path(f"{name}-whole")
    code = run(name, reference, Fault(), counts := Path(f"{name}-counts.json"))
    whole = time.monotonic() - began
    if code != 0:
        return Result(name, problems=[f"the undisturbed run ended with {code}; see {reference}.log"])
    calls = json.loads(counts.read_text(encoding="utf-8"))
    while result.kills < kills or result.runs == 0 or result.deaths < deaths:
        folder, code = Path(f"{name}-{result.runs + 1}"), -9
        while code == -9:
            call, after = draw.choice(("", "fsync", "replace")), draw.random() < 0.5
            left = calls.get(call, 1) // (2 if any(folder.glob("checkpoints/*.ckpt")) else 1)
            number = draw.randint(1, max(1, left))
            fault = Fault(None, call, number, after) if call else Fault(draw.uniform(0.3, 1.0) * whole)
            dies = result.deaths < deaths
            code = run(name, folder, fault if result.kills < kills and not dies else Fault(), server_dies=dies)
            result.deaths += dies
            result.kills += code == -9
            result.resumes += code == -9 and any(folder.glob("checkpoints/*.ckpt"))
            files, bad = unreadable(folder)
            result.files, result.problems = result.files + files, result.problems + bad
        if code != 0:
            result.problems.append(f"{folder} ended with {code}; see {folder}.log")
        else:
            result.problems += [f"{folder}: {line}" for line in differences(folder, reference)]
        result.runs += 1
    result.seconds = time.monotonic() - began
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(CASES), default=list(CASES), help="algorithms")
    parser.add_argument("--kills", type=int, default=None, help="of each (default: 20 of SFT and PPO, 5 of others)")
    parser.add_argument("--vllm", default=None, help="an environment with vLLM, which samples then")
    parser.add_argument("--server-kills", type=int, default=0, help="of each algorithm's server")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--folder", default=None, help="where runs are kept; a temporary one, which is removed, if not given"
    )
    args = parser.parse_args()
    if args.vllm is not None:
        global CLOCKS
        ENGINE.extend(["--model.engine", "VLLM", "--model.engine.python", str(Path(args.vllm).absolute())])
        CLOCKS = (*CLOCKS, "rollout/mismatch", "sampled_logp")
        args.only = [name for name in args.only if name in SAMPLE]
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(args.folder or temporary)
        place.mkdir(parents=True, exist_ok=True)
        os.environ["LEYDEN_CACHE"] = str(place.absolute() / "cache")
        os.chdir(place)
        prepare()
        print(
            f"{'algorithm':<18}{'kills':>7}{'resumes':>9}{'runs':>6}{'files read':>12}{'seconds':>9}  equal", flush=True
        )
        good = True
        for name in args.only:
            kills = KILLS.get(name, 5) if args.kills is None else args.kills
            found = check(name, kills, random.Random(f"{args.seed} {name}"), args.server_kills)
            line = f"{name:<18}{found.kills:>7}{found.resumes:>9}{found.runs:>6}{found.files:>12}{found.seconds:>9.0f}"
            print(f"{line}  {'no' if found.problems else 'yes'}", *found.problems, sep="\n    ", flush=True)
            good &= not found.problems
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
