"""Checkpoints: what they are held against, which are kept, how a run stops, and what a full disk leaves."""

from __future__ import annotations

import csv
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kill import _unequal
from peft import LoraConfig, get_peft_model
from small import Numbers, TreeData, fit, small, some_trees, weights_of

from leyden.algos import PPO, SFT
from leyden.atomic import truncate_jsonl, write_whole, writing
from leyden.batch.forest import Tree
from leyden.checkpoint.callback import Checkpoint, RNGState, interval
from leyden.checkpoint.find import FORMAT, AtomicCheckpointIO, damage, find_checkpoint, header
from leyden.data import Prompt
from leyden.errors import UserError
from leyden.example import Example, Message
from leyden.fingerprint import fingerprint_trees, fingerprint_weights
from leyden.on_policy import AnsweredPrompt
from leyden.on_policy.rollout_file import RolloutFile
from leyden.run.metrics_csv import MetricsCSV

FIT = "fit --model toy.Toy --model.policy toy.Bigrams --data toy.ToyData --data.path rows.jsonl".split()
ALL = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]
LAST = ["--ckpt_path", "last"]
USER = '''
import os
import torch
from toy import Toy


class Scripted(Toy):
    """Measures what it is told to at each epoch."""

    def __init__(self, *args, values: list[float], stage: str = "val", **kwargs):
        super().__init__(*args, **kwargs)
        self.values, self.stage = values, stage

    def validation_sums(self, batch):
        return {"loss": torch.tensor(self.values[self.global_step // 4])}

    def _stage(self):
        return self.stage


class Signalled(Toy):
    """Sends itself a signal in the middle of a micro-batch."""

    def __init__(self, *args, at: int, number: int, times: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        self.at, self.number, self.times, self.calls = at, number, times, 0

    def loss(self, batch):
        self.calls += self.training
        if self.training and self.calls == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        return super().loss(batch)
'''


@pytest.fixture
def user(workplace: Path) -> Path:
    (workplace / "user.py").write_text(USER, encoding="utf-8")
    return workplace


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def kept(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints").iterdir())


def state(file: Path) -> dict[str, Any]:
    return dict(torch.load(file, weights_only=True))


def same(one: Path, other: Path, ended: bool = False) -> bool:
    """Whether two runs have come to the same end: the newest checkpoint and metrics.csv, but for clocks. If one was
    stopped in its last step, its checkpoint knows nothing of the validation that followed."""
    newest: list[Any] = [state(Path(str(find_checkpoint("last", str(run))))) for run in (one, other)]
    newest = [found["state_dict"] for found in newest] if ended else newest
    clocks = ("perf/", "train/seconds")
    metrics = [
        [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows(run / "metrics.csv")]
        for run in (one, other)
    ]
    return not _unequal(*newest) and metrics[0] == metrics[1]


# -- what a checkpoint was made from ---------------------------------------------------------------------------------


def sft(policy: Any = None, **options: Any) -> SFT:
    return SFT(policy or small(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), **options)


def resume(algorithm: Any, file: Path, trees: Any = None, **options: Any) -> Any:
    from lightning.pytorch import Trainer

    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = Trainer(accelerator="cpu", devices=1, **(quiet | dict(max_epochs=2) | options))
    trainer.fit(algorithm, TreeData(trees or some_trees(8), batch_size=4), ckpt_path=file, weights_only=True)
    return trainer


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of full training at the end of an epoch of two steps."""
    fit(sft(), TreeData(some_trees(8), batch_size=4)).save_checkpoint(file := tmp_path / "a.ckpt")
    return file


def moved(policy: Any) -> Any:
    """The same shapes with other weights."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.01)
    return policy


def lora(policy: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    policy.adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    policy.model = get_peft_model(policy.model, policy.adapter)
    return policy


@pytest.mark.parametrize("wrap", [lambda policy: policy, lora], ids=["full", "lora"])
def test_another_base_is_refused_and_the_same_is_not(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    """The checkpoint's own weights are trained ones: it is what training began from that is held against the base."""
    trained = sft(wrap(small()))
    before = trained.policy.fingerprint()
    fit(trained, TreeData(some_trees(8), batch_size=4)).save_checkpoint(file := tmp_path / "a.ckpt")
    assert before == "" and trained.policy.fingerprint() == header(file)["base"]["policy"] != ""
    resume(sft(wrap(small())), file)
    with pytest.raises(UserError, match="weights of llama are not those that the checkpoint was trained from"):
        resume(sft(wrap(moved(small()))), file)
    with pytest.raises(UserError, match=r"of llama, and those of other are others; set --model\.policy\.path llama"):
        resume(sft(wrap(moved(small("other")))), file)


def test_the_start_of_a_new_adapter_is_no_part_of_the_base() -> None:
    one, two = lora(small(), 1), lora(small(), 2)
    assert not torch.equal(weights_of(one), weights_of(two))
    for policy in (one, two):
        policy.build()
    assert one.fingerprint() == two.fingerprint()


def test_packed_weights_have_a_fingerprint() -> None:
    packed = torch.randint(0, 256, (5000, 1), dtype=torch.uint8)
    assert (
        fingerprint_weights([("w", packed)])
        == fingerprint_weights([("w", packed.clone())])
        != fingerprint_weights([("w", packed + 1)])
    )
    assert fingerprint_weights([("w", torch.ones(3))]) != fingerprint_weights(
        [("w", torch.ones(3, dtype=torch.bfloat16))]
    )


def test_a_fingerprint_keeps_no_tensor_that_was_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the whole of a sharded model would lie on every process."""
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    most = [0]

    def together(x: torch.Tensor) -> torch.Tensor:
        whole = x.clone()
        alive.append(weakref.ref(whole.untyped_storage()))
        most[0] = max(most[0], sum(one() is not None for one in alive))
        return whole

    weights = [(str(i), torch.full((1000,), float(i))) for i in range(5)]
    expected = fingerprint_weights(weights)
    monkeypatch.setattr("leyden.fingerprint.full_tensor", together)
    assert fingerprint_weights(weights) == expected and len(alive) == 5
    assert most[0] == 1


class Words(Numbers):
    def __init__(self, last: str = "z", template: str | None = None) -> None:
        self.last, self.chat_template = last, template  # type: ignore[assignment]

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, self.last: 1}


def test_another_tokenizer_or_template_is_refused(tmp_path: Path) -> None:
    def speaking(tokenizer: Any) -> SFT:
        policy = small()
        policy._tokenizer = tokenizer
        return sft(policy)

    trainer = fit(speaking(Words(template="{{ x }}")), TreeData(some_trees(8), batch_size=4))
    trainer.save_checkpoint(file := tmp_path / "a.ckpt")
    resume(speaking(Words(template="{{ x }}")), file)
    with pytest.raises(UserError, match="trained with another tokenizer than that of llama; put the one back"):
        resume(speaking(Words("q", "{{ x }}")), file)
    with pytest.raises(UserError, match="another chat template; set --data.chat_template"):
        resume(speaking(Words(template="{{ y }}")), file)
    held = TreeData(some_trees(4), some_trees(4), batch_size=4)
    trainer.validate(speaking(Words(template="{{ y }}")), held, ckpt_path=file, verbose=False, weights_only=True)


def test_other_weights_to_train_are_refused(saved: Path) -> None:
    wide = dict(small().model.config.to_dict()) | {"intermediate_size": 64}
    options = {k: wide[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings")}  # fmt: skip
    found = torch.load(saved, weights_only=True)
    found["leyden"]["base"] = {}
    torch.save(found, saved)
    with pytest.raises(UserError, match=r"does not fit this model: \S+ is \(\d+, \d+\) in the checkpoint and"):
        resume(sft(small(options=options)), saved)


def test_rows_are_told_apart_as_they_are_trained_on() -> None:
    def of(trees: list[Tree]) -> str:
        return TreeData(trees).fingerprint

    one = some_trees(8)
    assert of(one) == of(some_trees(8)) != of(one[:-1])
    assert of(one) != of([Tree([*t.prompt[:-1], 96], t.responses, None, t.weights, t.row) for t in one])
    assert fingerprint_trees(SimpleNamespace(fingerprint="abc")) == "abc"


def test_files_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    from prepared import prepared, write

    from leyden.datamodules import InstructionData, PromptData

    def of(kind: Any, name: str, answer: str, **options: Any) -> str:
        path = write(tmp_path / name, [{"prompt": f"{i}?", "response": answer} for i in range(9)])
        sampling = SimpleNamespace(sampling=SimpleNamespace(max_new_tokens=4), experience=lambda loader: loader)
        return str(prepared(kind(path, **options), tmp_path, lightning_module=sampling).fingerprint)

    assert of(InstructionData, "a.jsonl", "1") == of(InstructionData, "b.jsonl", "1")  # not by where they stand
    assert of(InstructionData, "a.jsonl", "1") != of(InstructionData, "a.jsonl", "2")
    assert of(InstructionData, "a.jsonl", "1") != of(InstructionData, "a.jsonl", "1", val_fraction=0.5)
    assert of(PromptData, "a.jsonl", "1") != of(PromptData, "a.jsonl", "2")  # a reward may look at the row


def test_other_rows_wait_for_the_next_epoch(leyden, workplace: Path) -> None:
    two = [*FIT, "--trainer.max_epochs", "2", "--trainer.default_root_dir"]
    text = (workplace / "rows.jsonl").read_text()
    other = text.replace("[4, 2]", "[5, 2]")
    assert other != text
    for stop, code in ((3, 2), (4, 0)):
        (workplace / "rows.jsonl").write_text(text)
        assert leyden(*two, f"{stop}", "--trainer.max_steps", stop)[0] == 0
        (workplace / "rows.jsonl").write_text(other)
        found, _, err = leyden(*two, f"{stop}", *LAST)
        assert found == code, err
    assert "the rows are others than those that the checkpoint was trained on; the next epoch takes the new" in err
    refused = leyden(*two, "3", *LAST)[2].splitlines()[-1]
    assert refused.startswith("error: the checkpoint is from the middle of an epoch, and its rows were others")


# -- files that are refused ------------------------------------------------------------------------------------------


def damaged(file: Path, how: str) -> None:
    raw = bytearray(file.read_bytes())
    found: Any = None if how in ("cut", "flipped") else state(file)
    if how == "cut":
        file.write_bytes(raw[: len(raw) // 2])
    elif how == "flipped":
        at = raw.index(state(file)["state_dict"]["policy.table.weight"].cpu().numpy().tobytes()[:16])
        raw[at] ^= 1
        file.write_bytes(raw)
    elif how == "foreign":
        torch.save({"state_dict": found["state_dict"], "pytorch-lightning_version": "2.6.6"}, file)
    elif how == "list":
        torch.save([1, 2], file)
    elif how == "code":
        torch.save({**found, "more": SimpleNamespace(x=1)}, file)
    elif how == "pickle":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif how == "newer":
        torch.save(found | {"leyden": found["leyden"] | {"format": FORMAT + 1, "version": "9.9"}}, file)
    elif how == "another":
        torch.save(found | {"leyden": found["leyden"] | {"algorithm": "DPO"}}, file)
    elif how == "weights":
        torch.save({k: v for k, v in found.items() if k not in ("optimizer_states", "lr_schedulers")}, file)


REASONS = {
    "cut": "not a whole checkpoint; --ckpt_path last finds",
    "flipped": "is not what was written; --ckpt_path last finds",
    "pickle": "not a whole checkpoint; --ckpt_path last finds",
    "foreign": "not a checkpoint of leyden; --ckpt_path takes what a run keeps in its checkpoints/",
    "list": "not a checkpoint of leyden",
    "code": "it holds more than weights and numbers, so it is not a checkpoint of leyden",
    "newer": f"leyden 9.9 wrote it in format {FORMAT + 1}, and leyden",
    "another": "the checkpoint is of DPO and this run is Toy; go on with --model DPO, or start a new run",
    "weights": "holds weights alone (--checkpoint.save_weights_only)",
}


def test_a_file_that_cannot_be_gone_on_from_says_why_in_one_line(leyden, workplace: Path) -> None:
    assert leyden(*FIT, "--trainer.max_steps", "2")[0] == 0
    file = workplace / "runs/toy-1/checkpoints/step=000002.ckpt"
    good = file.read_bytes()
    for how, reason in REASONS.items():
        file.write_bytes(good)
        damaged(file, how)
        code, _, err = leyden(*FIT, "--trainer.default_root_dir", "again", "--ckpt_path", file)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and reason in errors[0], (how, err)
        assert "Traceback" not in err


def test_a_run_that_goes_on_says_the_steps_of_the_whole(leyden, workplace: Path) -> None:
    run = ["--trainer.default_root_dir", "run", "--data.batch_size"]
    code, _, err = leyden(*FIT, *ALL, *run, "6", "--trainer.max_epochs", "1")
    taken = int(rows(workplace / "run/metrics.csv")[-1]["step"])
    assert code == 0 and f", {taken} steps" in err, err
    code, _, err = leyden(*FIT, *ALL, *run, "3", "--trainer.max_epochs", "2", *LAST)
    total = int(rows(workplace / "run/metrics.csv")[-1]["step"])
    assert code == 0 and total > 2 * taken and f", {total} steps" in err, err


def test_a_damaged_newest_is_passed_over(leyden, workplace: Path) -> None:
    run = ["--trainer.default_root_dir", "run", "--trainer.max_steps"]
    assert leyden(*FIT, *ALL, *run, "3")[0] == 0
    damaged(workplace / "run/checkpoints/step=000003.ckpt", "flipped")
    code, _, err = leyden(*FIT, *ALL, *run, "4", *LAST)
    assert code == 0 and "resuming run at step 2" in err
    assert "step=000003.ckpt is passed over: not a whole checkpoint: " in err
    assert damage(workplace / "run/checkpoints/step=000003.ckpt") is None  # written anew


def test_auto_starts_or_goes_on(leyden, workplace: Path) -> None:
    run = ["--trainer.default_root_dir", "run", "--ckpt_path", "auto", "--trainer.max_steps"]
    code, _, err = leyden(*FIT, *run, "2")
    assert code == 0 and "resuming" not in err
    code, _, err = leyden(*FIT, *run, "3")
    assert code == 0 and "resuming run at step 2" in err
    shutil.rmtree(workplace / "run/checkpoints")
    code, _, err = leyden(*FIT, *run, "2")  # what was killed before its first checkpoint starts again
    assert (
        code == 0
        and "resuming" not in err
        and [row["step"] for row in rows(workplace / "run/metrics.csv")] == ["1", "2"]
    )
    shutil.rmtree(workplace / "run/checkpoints")
    code, _, err = leyden("validate", "--config", "run/config.yaml", "--ckpt_path", "auto")
    assert code == 2 and "no checkpoint in run/checkpoints" in err
    assert leyden(*FIT, "--ckpt_path", "auto")[0] == 2  # of which run?
    for said in ("", "resuming run at step 2"):
        code, _, err = leyden(*FIT, *run, "2", "--checkpoint.dirpath", "elsewhere")
        assert code == 0 and said in err and [file.name for file in Path("elsewhere").iterdir()] == ["step=000002.ckpt"]


def test_a_checkpoint_says_what_it_is(leyden, workplace: Path) -> None:
    from leyden import __version__

    assert leyden(*FIT, "--trainer.max_steps", "1")[0] == 0
    entry = header(workplace / "runs/toy-1/checkpoints/step=000001.ckpt")
    assert (entry["version"], entry["format"], entry["algorithm"]) == (__version__, FORMAT, "Toy")
    assert {"base", "tokenizer", "template", "data", "saved"} <= set(entry)
    assert header(workplace / "rows.jsonl") == {}


def test_what_was_begun_by_a_killed_process_is_removed(leyden, workplace: Path) -> None:
    run = ["--trainer.default_root_dir", "run", "--trainer.max_steps"]
    assert leyden(*FIT, *run, "1")[0] == 0
    left = [".config.yaml.1", ".export.1", "checkpoints/.step=000002.ckpt.1"]
    for name in left:
        (workplace / "run" / name).write_bytes(b"half")
    (workplace / "run/.keep").touch()
    assert leyden(*FIT, *run, "2", *LAST)[0] == 0
    assert not any((workplace / "run" / name).exists() for name in left) and (workplace / "run/.keep").exists()


# -- which are kept --------------------------------------------------------------------------------------------------

SCRIPTED = [*FIT, "--model", "user.Scripted", "--trainer.max_epochs", "5", "--trainer.default_root_dir", "run"]
VALUES = ["--model.values", "[9, 3, 1, 2, 5, 4]"]


@pytest.mark.parametrize(
    ("options", "best"),
    [
        (["--checkpoint.monitor", "val/loss"], 8),
        (["--checkpoint.monitor", "eval/loss", "--model.stage", "eval", "--checkpoint.mode", "max"], 16),
        (["--checkpoint.monitor", "val/loss", "--checkpoint.every_n_train_steps", "3"], 8),
        (["--checkpoint.monitor", "val/loss", "--trainer.check_val_every_n_epoch", "4"], 20),
    ],
    ids=["every epoch", "max", "other rhythm", "every fourth epoch"],
)
def test_the_best_and_the_newest_are_kept(options: list[str], best: int, leyden, user: Path) -> None:
    assert leyden(*SCRIPTED, *VALUES, *options, "--checkpoint.save_last", "true")[0] == 0
    assert kept(user / "run") == ["last.ckpt", f"step={best:06}.ckpt"]
    found = state(user / "run/checkpoints" / f"step={best:06}.ckpt")
    assert found["global_step"] == best and state(user / "run/checkpoints/last.ckpt")["global_step"] == 20
    assert find_checkpoint("last", "run") == Path("run/checkpoints/last.ckpt")


def test_a_touched_best_is_not_the_newest(leyden, user: Path) -> None:
    assert leyden(*SCRIPTED, *VALUES, "--checkpoint.monitor", "val/loss", "--checkpoint.save_last", "true")[0] == 0
    (user / "run/checkpoints/step=000008.ckpt").touch()
    assert str(find_checkpoint("last", "run")).endswith("last.ckpt")


def test_the_best_stay_the_best_when_a_run_goes_on_elsewhere(leyden, user: Path) -> None:
    """The folder has been moved, and another rhythm is asked for."""
    best = ["--checkpoint.monitor", "val/loss", "--checkpoint.save_last", "true"]
    assert leyden(*SCRIPTED, *VALUES, *best, "--trainer.max_steps", "12")[0] == 0
    shutil.move(user / "run", user / "moved")
    more = ["--checkpoint.every_n_train_steps", "2", "--trainer.default_root_dir", "moved"]
    assert leyden(*SCRIPTED, *VALUES, *best, *more, *LAST)[0] == 0
    assert kept(user / "moved") == ["last.ckpt", "step=000008.ckpt"]


@pytest.mark.parametrize(
    ("monitor", "more", "said"),
    [
        ("val/los", (), "no such measure; did you mean 'val/loss'?"),
        ("train/los", (), "no such measure; did you mean 'train/loss'?"),
        ("val/loss", ("--trainer.limit_val_batches", "0"), "no rows are held out"),
    ],
)
def test_a_measure_that_there_is_not_ends_a_run_at_its_start(
    monitor: str, more: Any, said: str, leyden, user: Path
) -> None:
    code, _, err = leyden(*FIT, "--checkpoint.monitor", monitor, *more)
    assert code == 2 and said in err and not (user / "runs/toy-1/checkpoints").exists()


def test_a_measure_of_training_is_judged_too(leyden, user: Path) -> None:
    best = ["--checkpoint.monitor", "train/loss", "--checkpoint.every_n_train_steps", "1"]
    assert leyden(*FIT, *best, "--trainer.default_root_dir", "run", "--trainer.max_epochs", "2")[0] == 0
    losses = [float(row["train/loss"]) for row in rows(user / "run/metrics.csv")]
    assert kept(user / "run") == [f"step={losses.index(min(losses)) + 1:06}.ckpt"]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "rhythm",
    [
        ["--checkpoint.train_time_interval", "00:00:00:00"],
        ["--checkpoint.every_n_train_steps", "1"],
        ["--checkpoint.every_n_epochs", "1"],
    ],
    ids=["time", "steps", "epochs"],
)
def test_every_checkpoint_is_of_a_whole_step(rhythm: list[str], accumulate: int, leyden, user: Path) -> None:
    """Each can be gone on from, and nothing is written again for that; every second epoch ends without validation."""
    args = ["--checkpoint.save_top_k", "-1", "--trainer.accumulate_grad_batches", accumulate, "--data.batch_size", "8"]
    args += ["--trainer.max_epochs", "4", "--trainer.check_val_every_n_epoch", "2", "--trainer.default_root_dir"]
    assert leyden(*signalled(0, signal.SIGTERM), *rhythm, *args, "whole")[0] == 0
    steps = [2, 4, 6, 8] if "epochs" in rhythm[0] else list(range(1, 9))
    assert kept(user / "whole") == [f"step={step:06}.ckpt" for step in steps]
    for first, second in ((1, 2), (2, 3), (4, 7)):
        if first not in steps:
            continue
        part = user / f"part-{first}"
        (part / "checkpoints").mkdir(parents=True)
        lines = (user / "whole/metrics.csv").read_text().splitlines(keepends=True)
        (part / "metrics.csv").write_text("".join(lines[:first]))  # as if killed before the step's own row was written
        shutil.copy(user / "whole/checkpoints" / f"step={first:06}.ckpt", part / "checkpoints")
        stop = signalled((second - first) * accumulate, signal.SIGTERM)
        assert leyden(*stop, *rhythm, *args, part.name, *LAST)[0] == 143
        start, now = (run / "checkpoints" / f"step={first:06}.ckpt" for run in (user / "whole", part))
        assert start.read_bytes() == now.read_bytes() and kept(part)[-1] == f"step={second:06}.ckpt"
        assert leyden(*signalled(0, signal.SIGTERM), *rhythm, *args, part.name, *LAST)[0] == 0
        assert same(part, user / "whole"), first


def test_a_time_that_is_over_in_the_middle_of_a_step_waits_for_its_end(
    leyden, workplace: Path, monkeypatch: Any
) -> None:
    clock = count(int(time.monotonic()) + 1)
    monkeypatch.setattr("leyden.checkpoint.callback.time", SimpleNamespace(monotonic=lambda: next(clock)))
    args = ["--checkpoint.train_time_interval", "00:00:00:03", "--checkpoint.save_top_k", "-1"]
    assert leyden(*FIT, *args, "--trainer.accumulate_grad_batches", "3", "--trainer.max_steps", "12")[0] == 0
    files = list((workplace / "runs/toy-1/checkpoints").iterdir())
    loaders = [state(file)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0] for file in files]
    assert 3 <= len(files) < 12 and all(loader["done"] % 3 == 0 for loader in loaders)


@pytest.mark.usefixtures("handlers")
def test_restarts_around_the_end_of_an_epoch_without_validation(leyden, user: Path) -> None:
    """On the second of two Lightning would forget the loader's state."""
    args = [*ALL, "--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs", "4", "--trainer.default_root_dir"]
    assert leyden(*signalled(0, signal.SIGTERM), *args, "whole")[0] == 0
    for calls in (4, 1, 3, 1):
        assert leyden(*signalled(calls, signal.SIGTERM), *args, "part", "--ckpt_path", "auto")[0] == 143
    assert leyden(*signalled(0, signal.SIGTERM), *args, "part", *LAST)[0] == 0
    assert same(user / "part", user / "whole")


def test_what_was_killed_after_its_last_step_comes_to_its_end(leyden, workplace: Path) -> None:
    args = [*FIT, *ALL, "--trainer.max_steps", "6", "--trainer.default_root_dir"]
    assert leyden(*args, "whole")[0] == 0
    shutil.copytree(workplace / "whole", workplace / "part")
    shutil.rmtree(workplace / "part/export")
    code, out, err = leyden(*args, "part", *LAST)
    assert (code, out) == (0, "exported to part/export\n") and "resuming part at step 6" in err
    assert same(workplace / "part", workplace / "whole")


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:00:30:00", 1800), ("1:30:00", 5400), ("02:00:00:01", 172801), (None, None)]
)
def test_times_are_written_as_elsewhere(text: str | None, seconds: int | None) -> None:
    """The parser alone would take 00:00:30:00 for thirty seconds."""
    found = interval(text)
    assert (found and found.total_seconds()) == seconds


def test_a_time_that_is_none(leyden, workplace: Path) -> None:
    code, _, err = leyden(*FIT, "--checkpoint.train_time_interval", "30 min")
    assert code == 2 and "give DAYS:HOURS:MINUTES:SECONDS, such as 00:00:30:00" in err and err.count("\n") == 1
    with pytest.raises(UserError):
        Checkpoint(train_time_interval="5")


# -- stopping --------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    """Handlers of signals as they were, whatever a run did to them."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def signalled(at: int, number: int, times: int = 1) -> list[str]:
    options = {"at": at, "number": number, "times": times}
    return [*FIT, "--model", "user.Signalled", *(x for k, v in options.items() for x in (f"--model.{k}", str(v)))]


STOPS = [
    (signal.SIGTERM, 143, "stopped by SIGTERM", [], 5),
    (signal.SIGINT, 130, "interrupted", [], 5),
    (signal.SIGTERM, 143, "stopped by SIGTERM", ["--trainer.accumulate_grad_batches", "3"], 5),  # in the second step
    (signal.SIGTERM, 143, "stopped by SIGTERM", [], 8),  # at the end of an epoch, before validation
    (signal.SIGTERM, 143, "stopped by SIGTERM", ["--trainer.check_val_every_n_epoch", "3"], 8),
    (signal.SIGTERM, 143, "stopped by SIGTERM", [], 12),  # in the last step of all
]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "code", "said", "more", "at"), STOPS)
def test_a_signal_ends_training_after_the_step_and_nothing_is_lost(
    number: int, code: int, said: str, more: list[str], at: int, leyden, user: Path
) -> None:
    run = ["--trainer.max_epochs", "3", *more, "--trainer.default_root_dir"]
    assert leyden(*signalled(0, number), *run, "whole")[0] == 0
    found, _, err = leyden(*signalled(at, number), *run, "part")
    assert found == code and not (user / "part/export").exists()
    assert err.splitlines()[-1] == f"{said}; go on with leyden fit --config part/config.yaml --ckpt_path last"
    stopped = 2 if "--trainer.accumulate_grad_batches" in more else at
    assert kept(user / "part") == [f"step={stopped:06}.ckpt"]
    assert rows(user / "part/metrics.csv")[-1]["step"] == str(stopped)
    assert leyden(*signalled(0, number), *run, "part", *LAST)[0] == 0
    assert same(user / "part", user / "whole", ended=at == 12)


@pytest.mark.usefixtures("handlers")
def test_a_signal_saves_the_newest_beside_the_best(leyden, user: Path) -> None:
    best = ["--checkpoint.monitor", "val/loss", "--trainer.max_epochs", "3", "--trainer.default_root_dir", "run"]
    assert leyden(*signalled(7, signal.SIGTERM), *best)[0] == 143
    assert kept(user / "run") == ["last.ckpt", "step=000004.ckpt"]
    assert state(user / "run/checkpoints/last.ckpt")["global_step"] == 7
    code, _, err = leyden(*signalled(0, signal.SIGTERM), *best, *LAST)
    assert code == 0 and "resuming run at step 7" in err


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(number: int, code: int, leyden, user: Path, monkeypatch: Any) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("leyden.checkpoint.signals.os._exit", leave)
    found, _, err = leyden(*signalled(3, number, 2), *ALL)
    assert found == code and kept(user / "runs/signalled-1") == ["step=000001.ckpt", "step=000002.ckpt"]


@pytest.mark.usefixtures("handlers")
def test_slurm_is_asked_to_queue_the_job_again(leyden, user: Path, monkeypatch: Any) -> None:
    """As far as it can be seen without SLURM: its variables, its signal, and a `scontrol` that writes down its call."""
    (user / "bin").mkdir()
    (user / "bin/scontrol").write_text('#!/bin/sh\necho "$@" >> queued\n')
    (user / "bin/scontrol").chmod(0o755)
    job = {"JOB_ID": "77", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "JOB_NAME": "train"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{user / 'bin'}{os.pathsep}{os.environ['PATH']}")
    run = ["--trainer.default_root_dir", "run", "--ckpt_path", "auto", "--trainer.max_steps", "6"]
    code, _, err = leyden(*signalled(3, signal.SIGUSR1), *run)
    assert code == 128 + signal.SIGUSR1 and "stopped by SIGUSR1; go on with" in err
    assert (user / "queued").read_text() == "requeue 77\n"
    assert kept(user / "run") == ["step=000003.ckpt"] and not list((user / "run").glob("hpc_*"))
    code, _, err = leyden(*signalled(0, signal.SIGUSR1), *run)
    assert code == 0 and "resuming run at step 3" in err


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """`disk("100k")` is a file system of that size; called again, it gets another size."""
    place = tmp_path_factory.mktemp("disk")
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system takes root")

    def mounted(size: str) -> Path:
        option = f"remount,size={size}" if os.path.ismount(place) else f"size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
        return place

    yield mounted
    if os.path.ismount(place):
        subprocess.run(["umount", place], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(disk: Callable[[str], Path], leyden, workplace: Path) -> None:
    run = disk("120k") / "run"
    args = [*FIT, *ALL, "--trainer.max_epochs", "3", "--trainer.default_root_dir"]
    code, _, err = leyden(*args, run)
    error = err.splitlines()[-1]
    assert code == 2 and error.startswith(f"error: {run}/checkpoints/step=0000") and "Traceback" not in err
    assert "cannot be written (No space left on device); what was saved before is whole: make room, then go on" in error
    assert kept(run) and not any(name.startswith(".") for name in kept(run))
    assert all(damage(file) is None for file in (run / "checkpoints").iterdir())
    disk("8m")
    assert leyden(*args, run, *LAST)[0] == 0 and leyden(*args, "whole")[0] == 0
    assert same(run, workplace / "whole")


def test_a_full_disk_is_said_of_every_file(disk: Callable[[str], Path]) -> None:
    place = disk("64k")
    log, rollouts = MetricsCSV(place), RolloutFile(place / "rollouts.jsonl")
    log.log_metrics({"a": 1.0}, 0)
    log.flush()
    (place / "much").write_bytes(b"")
    try:
        with (place / "much").open("wb", buffering=0) as stream:
            while True:
                stream.write(b"x" * 512)
    except OSError:
        pass
    said = r"cannot be written \(No space left on device\)"
    with pytest.raises(UserError, match=rf"metrics\.csv: {said}"):
        for step in range(1, 999):
            log.log_metrics({"a": 1.0}, step)
    log.finalize("failed")  # a second error would hide the first
    with pytest.raises(UserError, match=rf"rollouts\.jsonl: {said}"):
        prompt = Prompt(0, Example([Message(role="user", content="x" * 9000)]), [1])
        rollouts.append([AnsweredPrompt(prompt, 0, [])], 0, "")
    with pytest.raises(UserError, match=rf"a\.ckpt: {said}"):
        AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(10_000)}, place / "a.ckpt")
    assert sorted(file.name for file in place.iterdir()) == ["metrics.csv", "much", "rollouts.jsonl"]
    (place / "much").unlink()
    again = MetricsCSV(place)
    again.truncate(1)  # the row that was cut off is none
    again.log_metrics({"a": 2.0}, 1)
    again.finalize("success")
    assert [row["step"] for row in rows(place / "metrics.csv")] == ["1", "2"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_late(call: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Where no file system can be mounted: some systems tell of a full disk only when files are handed over."""
    io, file = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"x": torch.ones(2)}, file)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match=r"a\.ckpt: cannot be written \(No space left on device\)"):
        io.save_checkpoint({"x": torch.zeros(2)}, file)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"] and torch.equal(state(file)["x"], torch.ones(2))


def test_a_text_may_have_ends_of_lines_of_its_own(tmp_path: Path) -> None:
    """U+2028 and U+0085 end lines for `str.splitlines`, but not in JSONL."""
    file, answer = tmp_path / "samples.jsonl", "a\u2028b\u0085c"
    lines = [json.dumps({"step": step, "response": answer}, ensure_ascii=False) + "\n" for step in (1, 2)]
    file.write_text("".join(lines) + '{"step": 1', encoding="utf-8")
    truncate_jsonl(file, 1)
    assert file.read_text(encoding="utf-8") == lines[0]
    truncate_jsonl(tmp_path / "missing.jsonl", 1)
    assert not (tmp_path / "missing.jsonl").exists()


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path: Path, monkeypatch: Any) -> None:
    """Some network file systems refuse it, and the file has its name already."""
    sync, opened = os.fsync, os.open
    folders: set[int] = set()

    def opening(path: Any, *args: Any, **kwargs: Any) -> int:
        handle = opened(path, *args, **kwargs)
        if Path(path).is_dir():
            folders.add(handle)
        return handle

    def syncing(handle: int) -> None:
        if handle in folders:
            raise OSError(22, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", syncing)
    write_whole(tmp_path / "a.txt", "x")
    assert folders and (tmp_path / "a.txt").read_text() == "x"


def test_errors_that_libraries_hide_are_found() -> None:
    with pytest.raises(UserError, match=r"export: cannot be written \(No space left on device\)"):
        with writing(Path("export")):  # as safetensors says it
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="something else"), writing(Path("export")):
        raise RuntimeError("something else")


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_the_row_of_a_checkpoint_is_not_lost(tmp_path: Path) -> None:
    """It reaches the file with the next step, and until then only the checkpoint has it."""
    log = MetricsCSV(tmp_path)
    for step in range(3):
        log.log_metrics({"a": step}, step)
    row = log.state_dict(4, {"a": 7.5, "b": 1.0})
    assert row == {"step": 4, "a": 7.5, "b": 1.0}
    assert [line["step"] for line in rows(tmp_path / "metrics.csv")] == ["1", "2", "3"]  # those before are on disk
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("12")  # of 123, which was cut off
    again = MetricsCSV(tmp_path)
    again.truncate(4, row)
    again.log_metrics({"a": 9.0}, 4)
    again.finalize("success")
    found = [list(line.values()) for line in rows(tmp_path / "metrics.csv")]
    assert found == [["1", "0", ""], ["2", "1", ""], ["3", "2", ""], ["4", "7.5", "1.0"], ["5", "9.0", ""]]


def test_validation_draws_no_random_numbers_of_training() -> None:
    def draw(samples: Any) -> list[float]:
        return torch.rand(len(samples)).tolist()

    from test_on_policy import Questions, algorithm

    ends = []
    for held in (0, 4):
        found = algorithm(PPO, {"epochs": 2}, reward=draw)
        torch.manual_seed(3)
        fit(found, Questions(held=held), max_epochs=3, callbacks=[RNGState()], num_sanity_val_steps=0)
        ends.append(weights_of(found.policy))
    assert torch.equal(*ends)


def test_a_rollout_that_was_left_early_is_gone_on_from(tmp_path: Path) -> None:
    """From every step, so also from the last one before the rest was left out."""
    from lightning.pytorch.callbacks import ModelCheckpoint
    from test_on_policy import Questions, Watched, algorithm

    free = algorithm(Watched, {"epochs": 3, "minibatches": 2})
    fit(free, Questions(), max_epochs=2)
    limit = sorted(now["policy/approx_kl"] for now in free.seen)[7]
    options = {"epochs": 3, "minibatches": 2, "stop_kl": limit}
    whole = algorithm(Watched, options)
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    trainer = fit(whole, Questions(), max_epochs=4, callbacks=[saver, RNGState()], enable_checkpointing=True)
    assert trainer.global_step < 24
    from test_on_policy import resume as again

    for step in range(1, trainer.global_step):
        found = algorithm(Watched, options)
        again(found, Questions(), tmp_path / f"{step}.ckpt", max_epochs=4, callbacks=[RNGState()])
        assert torch.equal(weights_of(found.policy), weights_of(whole.policy)), step


def test_the_page_on_checkpoints_runs(leyden, workplace: Path) -> None:
    from prepared import write
    from test_docs import ROOT, pieces

    write(workplace / "chat.jsonl", [{"prompt": f"{i}?", "response": f"{i}."} for i in range(12)])
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for line in [line for _, kind, block in pieces(text) if kind == "bash" for line in block.splitlines()]:
        words = shlex.split(line)
        batch = ["--data.batch_size", "4"] if "sft" in words else []
        code, _, error = leyden(*words[1:], *batch)
        assert code == 0, (line, error)
    assert [row["step"] for row in rows(workplace / "runs/a/metrics.csv") if row["train/loss"]] == list("1234")


def test_killed_runs_end_as_if_nothing_had_happened() -> None:
    """Two algorithms, two kills each; `python tests/kill.py` does it for all, and more often."""
    script = Path(__file__).with_name("kill.py")
    done = subprocess.run(
        [sys.executable, script, "--only", "SFT", "PPO", "--kills", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    assert [(line[0], line[-1]) for line in table if line[0] in ("SFT", "PPO")] == [("SFT", "yes"), ("PPO", "yes")]
