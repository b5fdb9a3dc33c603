"""What all runs of comparison.py start from: a model, prompts, ranked answers, rewards, and a budget.

The embedded model has the exact reward `Gold`. A real model has what researchers have: human preferences, and two
reward models that were trained on different rows of them. One is learnt from, and the other judges."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Words = Sequence[object]
"""Of a command line."""
LONGEST_PROMPT = 48
"""Most tokens of a prompt for a real model."""


@dataclass(frozen=True)
class Start:
    """Where runs start, and their budget.

    Attributes:
        files: `prompts` and `pairs` to learn from; `choose` and `judge`, held-out prompts; `text`, general text.
        policy: flags of the model that runs start from.
        reward: the reward that is learnt from: its class, and its flags behind a dot.
        judge: the reward by which seeds are measured, likewise.
        fragments: configs that every run has.
        rates: learning rates of the sweep, of which the three in the middle are tried first.
        most_kl: nats an answer from the model before, beyond which a rate is out of the sweep: a reward that was learnt
            may well be highest where answers have become nonsense.
        answers: scored answers a rollout.
        rollouts: of each run.
        temperature: of sampling, for training and for evaluation.
        new_tokens: longest answer.
        max_length: longest prompt and answer together, in tokens.
        values: flags of PPO's value function.
    """

    files: Mapping[str, Path]
    policy: Words
    reward: Words = ("Gold",)
    judge: Words = ("Gold",)
    fragments: Sequence[str] = ()
    rates: Sequence[str] = ("6e-6", "3e-5", "1.5e-4", "7e-4", "3e-3")
    most_kl: float = math.inf
    answers: int = 256
    rollouts: int = 6
    temperature: float = 1.0
    new_tokens: int = 64
    max_length: int = 256
    values: Words = ()

    @property
    def budget(self) -> int:
        """Scored answers of a run."""
        return self.answers * self.rollouts


def rewarded(flag: str, reward: Words) -> list[object]:
    """A reward behind a flag: `--eval.reward ModelReward --eval.reward.path FOLDER`."""
    return [flag, *(f"{flag}{word}" if str(word).startswith(".") else word for word in reward)]


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


def embedded(folder: Path, heldout: int) -> Start:
    """The embedded model, fine-tuned on generated questions, and what it answers to others."""
    files = {name: folder / f"{name}.jsonl" for name in ("rows", "prompts", "choose", "judge", "text", "pairs")}
    kinds: dict[str, Words] = {
        "rows": ["--kind", "instruction", "--rows", 4000, "--seed", 1],
        "prompts": ["--kind", "prompts", "--rows", 2000, "--seed", 2],
        "choose": ["--kind", "prompts", "--rows", heldout, "--seed", 3, "--split", "heldout"],
        "judge": ["--kind", "prompts", "--rows", heldout, "--seed", 4, "--split", "heldout"],
        "text": ["--kind", "text", "--rows", 200, "--seed", 5],
    }
    for name, words in kinds.items():
        sample(files[name], "both", words)
    policy = folder / "sft" / "export"
    if not policy.exists():
        leyden(folder / "sft", "fit", "--config", "demo", "--data.path", files["rows"], "--trainer.max_epochs", 2,
               "--ckpt_path", "auto", "--trainer.default_root_dir", folder / "sft")  # fmt: skip
    # values on the policy's own trunk would pull it away from what it can say
    start = Start(files, ["--model.policy.path", policy], values=["--model.value_policy.path", policy])
    rank(folder, start, "demo")
    return start


def real(folder: Path, model: Path, preferences: Path, heldout: int, pool: ThreadPoolExecutor) -> Start:
    """A model that follows instructions as it is, and human preferences, half of them for each reward model (see
    `split`). A prompt is what a conversation begins with. Adapters on weights in bfloat16."""
    names = ("learn", "other", "last", "prompts", "choose", "judge", "text", "pairs")
    files = {name: folder / f"{name}.jsonl" for name in names}
    if not files["judge"].exists():
        split(preferences, model, files, heldout)
    sample(files["text"], "en", ["--kind", "text", "--rows", 60, "--seed", 5])
    rewards = [folder / f"reward_{name}" for name in ("learn", "other")]
    made = [pool.submit(reward_model, out, model, files) for out in rewards if not (out / "export").exists()]
    for one in made:
        one.result()
    learn, judge = (["ModelReward", ".path", out / "export"] for out in rewards)
    policy = ["--model.policy.path", model, "--model.policy.dtype", "bfloat16"]
    start = Start(
        files, policy, learn, judge, ("lora",), ("3e-5", "1.5e-4", "7e-4", "3e-3", "1.5e-2"), most_kl=10,
        temperature=0.7, new_tokens=128, max_length=256, values=["--model.value", "adapter"],
    )  # fmt: skip
    rank(folder, start, "sft")
    return start


def reward_model(out: Path, model: Path, files: Mapping[str, Path]) -> None:
    """A reward model from the rows that its folder is named after."""
    leyden(out, "fit", "--config", "reward_model", "--config", "lora", "--model.policy.path", model,
           "--model.policy.dtype", "bfloat16", "--data.path", files[out.name.removeprefix("reward_")],
           "--data.val_path", files["last"], "--data.on_error", "skip", "--data.max_length", 256,
           "--data.batch_size", 16, "--data.max_tokens", 4096, "--ckpt_path", "auto",
           "--trainer.default_root_dir", out)  # fmt: skip


def sample(file: Path, language: str, words: Words) -> None:
    if not file.exists():
        leyden(file, "data", "sample", "--language", language, *words, "--output", file)


def split(preferences: Path, model: Path, files: Mapping[str, Path], heldout: int) -> None:
    """Rows of preferences into those of each reward model and the last, and what conversations begin with into prompts:
    held-out ones from the last rows. A prompt, and all rows that begin with it, is in one place alone. Rows that cannot
    be read, or begin with more than `LONGEST_PROMPT` tokens, are left out."""
    from leyden.data.tokenizer import load_tokenizer
    from leyden.datamodules.files.files import read_rows
    from leyden.datamodules.formats.formats import detect, parse
    from leyden.datamodules.formats.row_error import LeftOut, RowError

    rows = [row for _, row in read_rows(preferences)]
    kind, tokenizer, found = detect(rows[:100], "preference"), load_tokenizer(str(model)), list[tuple[str, Any]]()
    for row in rows:
        try:
            turns = parse(row, kind, "preference").messages
        except (RowError, LeftOut):
            continue
        asked = next(turn["content"] for turn in turns if turn["role"] == "user")
        if len(tokenizer(asked)["input_ids"]) <= LONGEST_PROMPT:
            found.append((asked, row))
    prompts = list(dict.fromkeys(asked for asked, _ in found))
    first, held = prompts[: -2 * heldout], prompts[-2 * heldout :]
    if len(first) < heldout:
        raise SystemExit(
            f"{preferences}: {len(prompts)} short prompts, and --heldout {heldout} takes {2 * heldout} of them"
        )
    places = {"learn": first[::2], "other": first[1::2], "last": held}
    for name, inside in places.items():
        among = set(inside)
        write(files[name], [row for asked, row in found if asked in among])
    for name, inside in {"prompts": first, "choose": held[:heldout], "judge": held[heldout:]}.items():
        write(files[name], [{"prompt": asked} for asked in inside])


def same_start(folder: Path, asked: Mapping[str, object]) -> None:
    """Keep what a folder was begun with. Exits where it was begun with something else."""
    file = folder / "start.json"
    given = {name: str(value) for name, value in asked.items()}
    if file.exists() and (known := json.loads(file.read_text(encoding="utf-8"))) != given:
        raise SystemExit(f"{folder} was begun with {known}, not with {given}; give another folder")
    file.write_text(json.dumps(given), encoding="utf-8")


def rank(folder: Path, start: Start, config: str) -> None:
    """Four answers to each prompt, ranked by the reward that is learnt from: as many as the budget has."""
    if start.files["pairs"].exists():
        return
    asked, answers = folder / "asked.jsonl", folder / "answers"
    lines = start.files["prompts"].read_text(encoding="utf-8").splitlines(keepends=True)
    if len(lines) < start.budget // 4:
        raise SystemExit(f"{start.files['prompts']}: {len(lines)} prompts, {start.budget // 4} are needed")
    asked.write_text("".join(lines[: start.budget // 4]), encoding="utf-8")
    answers.mkdir(exist_ok=True)
    for number in range(4):
        (answers / f"{number}.jsonl").unlink(missing_ok=True)
        leyden(folder / "predict", "predict", "--config", config, *start.policy, "--data.path", asked,
               "--model.sampling.temperature", start.temperature, "--model.sampling.seed", 500 + number,
               "--model.sampling.max_new_tokens", start.new_tokens,
               "--output", answers / f"{number}.jsonl")  # fmt: skip
    leyden(folder / "label", "data", "label", answers, start.files["pairs"], *rewarded("--reward", start.reward))


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
