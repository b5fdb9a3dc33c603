"""What cannot work is refused before the first step, in one line that says what to do instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from leyden.algorithm.optimizer_checks import make_schedule
from leyden.algorithm.schedules import WarmupCosine
from leyden.cli.config_keys import flag_keys, flags
from leyden.cli.hints import kept_rate
from leyden.data.tokenizer import loading_problem
from leyden.errors import UserError
from leyden.paths import resolve

FIT = "fit --model toy.Toy --model.policy toy.Bigrams --data toy.ToyData --data.path rows.jsonl".split()
STEPS = ["--trainer.max_steps", "3"]
LIGHTNING = "lightning.pytorch.callbacks"


def refused(leyden: Any, *args: str) -> str:
    """The one line of a run that is refused before it has taken a step."""
    code, _, err = leyden(*FIT, *STEPS, *args)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err, err
    assert "step 1/" not in err
    return lines[0]


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        ({"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 1, 1: 4}}}, "accumulate_grad"),
        ({"class_path": "BatchSizeFinder"}, "--data.batch_size"),
        ({"class_path": "LearningRateFinder"}, "--model.optimizer.lr"),
        ({"class_path": "StochasticWeightAveraging", "init_args": {"swa_lrs": 0.1}}, "EMAWeightAveraging"),
        ({"class_path": "BackboneFinetuning"}, "--config lora"),
        ({"class_path": "OnExceptionCheckpoint", "init_args": {"dirpath": "x"}}, "--checkpoint.every_n_train_steps"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # the parser's, of a default that it cannot write down
def test_callbacks_that_break_steps_or_do_nothing(callback: Any, instead: str, leyden, workplace: Path) -> None:
    (workplace / "mine.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    said = refused(leyden, "--config", "mine.yaml")
    assert callback["class_path"] in said and instead in said


OPTIONS = [
    ("--trainer.accumulate_grad_batches 0", "--trainer.accumulate_grad_batches 0: .*give 1"),
    ("--trainer.gradient_clip_val -1", "--trainer.gradient_clip_val -1: .*give 0"),
    ("--trainer.gradient_clip_algorithm value", "--trainer.gradient_clip_algorithm value: .*gradient_clip_val"),
    ("--trainer.limit_train_batches 0", "no step would be taken"),
    ("--trainer.max_steps 0", "no step would be taken"),
    (
        "--trainer.val_check_interval 100",
        "an epoch has 4 .*; add --trainer.check_val_every_n_epoch null",
    ),
    ("--trainer.val_check_interval 0", "--trainer.limit_val_batches 0"),
    ("--trainer.check_val_every_n_epoch 0", "--trainer.limit_val_batches 0"),
    ("--trainer.reload_dataloaders_every_n_epochs 1", "order of the first"),
    ("--trainer.log_every_n_steps 0", "give 1 or more"),
    ("--trainer.barebones true", "leave it out"),
    ("--trainer.sync_batchnorm true", "leave it out"),
    ("--trainer.precision 64", "--model.policy.dtype float32"),
    ("--trainer.devices -1 --trainer.accelerator cpu", "trainer: .*devices.*> 0"),
    (
        "--trainer.enable_checkpointing false --checkpoint.monitor val/loss",
        "--checkpoint.monitor: nothing is",
    ),
    ("--seed_everything -1", "--seed_everything -1: .*from 0"),
    ("--model.optimizer LBFGS", "LBFGS: it needs several losses a step; take AdamW"),
    ("--model.optimizer SparseAdam", "SparseAdam: it needs sparse gradients; take AdamW"),
    ("--model.optimizer.lr 0", "nothing would be learnt"),
    ("--model.optimizer.lr -1", "--model.optimizer: Invalid learning rate"),
    ("--model.optimizer.lr 1e-2x", "--model.optimizer.lr: expected float, not 1e-2x$"),
    ("--model.optimizer.betas [0.9]", r"expected tuple with 2 elements, not \[0.9\]$"),
    ("--model.lr_scheduler ReduceLROnPlateau", "ReduceLROnPlateau: .*take WarmupCosine"),
    ("--model.lr_scheduler ChainedScheduler", "--model.lr_scheduler: .*take WarmupCosine"),
    ("--model.lr_scheduler WarmupCosine --model.lr_scheduler.warmup 3", "warmup 3: training has 3 steps"),
    ("--model torch.nn.Linear", "torch.nn.Linear does not derive from Algorithm"),
    ("--trainer.plugins AdamW", "--trainer.plugins: expected .*Precision.*, not torch.optim.AdamW$"),
    ("--trainer.callbacks+=torch.nn.Linear", "--trainer.callbacks: expected Callback, not torch.nn.Linear"),
    ("--lr 1e-3", "did you mean --model.optimizer.lr[?]"),
    ("--optimizer SGD", "did you mean --model.optimizer[?]"),
    ("--model.learning_rate 1e-3", "did you mean --model.optimizer.lr[?]"),
    ("--batch_size 4", "did you mean --data.batch_size[?]"),
    ("--epochs 4", "did you mean --trainer.max_epochs[?]"),
    ("--seed 4", "did you mean --seed_everything[?]"),
]
QUICK = ("--trainer.accumulate_grad_batches", "--trainer.max_steps", "--trainer.val_check", "--trainer.plugins")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param(*one, marks=() if one[0].startswith(QUICK) or "--trainer" not in one[0] else pytest.mark.slow)
        for one in OPTIONS
    ],
)
def test_options_that_cannot_work(args: str, said: str, leyden, workplace: Path) -> None:
    import re

    assert re.search(said, line := refused(leyden, *args.split())), line


@pytest.mark.parametrize(
    ("monitor", "more", "said"),
    [
        ("val/loss", "--trainer.limit_val_batches 0", "no rows are held out, so it will never be measured"),
        ("val/los", "--trainer.num_sanity_val_steps -1", "did you mean 'val/loss'.*logged: val/loss"),
        ("val_loss", "--trainer.num_sanity_val_steps -1", "did you mean 'val/loss'"),
        ("train/los", "", "did you mean 'train/loss'.*train/grad_norm"),
    ],
)
def test_a_callback_that_watches_what_is_never_measured(
    monitor: str, more: str, said: str, leyden, workplace: Path
) -> None:
    import re

    kind = "ModelCheckpoint" if monitor == "val_loss" else "EarlyStopping"
    watching = [f"--trainer.callbacks+={kind}", "--trainer.callbacks.monitor", monitor, *more.split()]
    assert re.search(said, line := refused(leyden, *watching)) and f"{kind} monitor {monitor}" in line, line


def test_a_measure_of_the_users_own_may_be_watched(leyden, workplace: Path) -> None:
    (workplace / "mine.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Bleu(Callback):\n"
        "    def on_validation_epoch_end(self, trainer, module):\n"
        "        module.log('bleu', 1.0)\n"
    )
    watching = ["--trainer.callbacks+=mine.Bleu", f"--trainer.callbacks+={LIGHTNING}.{EarlyStopping.__name__}"]
    code, _, err = leyden(*FIT, *STEPS, *watching, "--trainer.callbacks.monitor", "bleu")
    assert code == 0, err


def test_an_unknown_measure_ends_in_one_line(leyden, workplace: Path) -> None:
    code, _, err = leyden(*FIT, *STEPS, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "bleu")
    assert code == 2 and "error: Early stopping conditioned on metric `bleu`" in err


# -- said before the first step ---------------------------------------------------------------------------------------


def test_the_measure_before_training_is_shown_and_the_rate_is_said(leyden, workplace: Path) -> None:
    code, _, err = leyden(*FIT, *STEPS, "--trainer.num_sanity_val_steps", "-1", "--model.optimizer.lr", "0.01")
    assert code == 0 and "AdamW at learning rate 0.01, WarmupCosine, 3 steps" in err
    before, after = (line for line in err.splitlines() if "· val/loss" in line)
    assert before.startswith("step 0 · val/loss ") and after.startswith("step 3 · val/loss ")
    metrics = (workplace / "runs/toy-1/metrics.csv").read_text().splitlines()
    column = metrics[0].split(",").index("val/loss")
    assert before.split()[4] == f"{float(metrics[1].split(',')[column]):.4g}"
    code, _, err = leyden(*FIT, *STEPS, "--trainer.num_sanity_val_steps", "1")
    assert code == 0 and "step 0" not in err  # a few batches are no measure


def test_what_a_profiler_and_a_summary_were_asked_for_is_printed(leyden, workplace: Path) -> None:
    asked = ["--trainer.profiler", "simple", "--trainer.callbacks+=ModelSummary"]
    code, _, err = leyden(*FIT, *STEPS, *asked)
    assert code == 0 and "FIT Profiler Report" in err and "Trainable params" in err


@pytest.mark.parametrize(
    ("args", "warned"),
    [
        ("--model.optimizer SGD", True),
        ("--model.optimizer SGD --model.optimizer.lr 1", False),
        ("--model.optimizer.lr 1 --model.optimizer SGD", False),
        ("--model.optimizer AdamW", False),
        ("--model.optimizer.weight_decay 0", False),
    ],
)
def test_another_optimizer_at_the_old_rate_is_said(args: str, warned: bool, leyden, workplace: Path) -> None:
    code, _, err = leyden(*FIT, "--trainer.max_steps", "1", *args.split())
    assert code == 0 and ("SGD keeps the learning rate" in err) is warned, err


def test_a_rate_of_an_earlier_file_is_that_of_another_optimizer() -> None:
    keys = flag_keys(flags(["--model.optimizer.lr", "1", "--model.optimizer", "torch.optim.SGD"]))
    for key, place in zip(keys, ("a.yaml:1", "b.yaml:1"), strict=True):
        key.where = place
    assert kept_rate(keys) is keys[1] and kept_rate(keys[::-1]) is None


@pytest.mark.parametrize(
    ("name", "options", "total", "flag"),
    [
        ("CosineAnnealingLR", {"T_max": 10}, 9, "T_max 9"),
        ("CosineAnnealingLR", {"T_max": 10}, 10, None),
        ("OneCycleLR", {"max_lr": 1.0, "total_steps": 10}, 11, "total_steps 11"),
        ("LinearLR", {"total_iters": 10}, 9, "total_iters 9"),
        ("StepLR", {"step_size": 10}, 9, None),
        ("CosineAnnealingLR", {"T_max": 10}, None, None),
    ],
)
def test_schedules_that_outlast_training(name: str, options: Any, total: int | None, flag: str | None) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    make = lambda o: getattr(torch.optim.lr_scheduler, name)(o, **options)  # noqa: E731
    if flag is None:
        assert type(make_schedule(make, optimizer, total)).__name__ == name
    else:
        with pytest.raises(UserError, match=f"{name}: .*{flag}"):
            make_schedule(make, optimizer, total)
    with pytest.raises(UserError, match="floor 2"):
        WarmupCosine(optimizer, floor=2)


# -- models -----------------------------------------------------------------------------------------------------------


def model_with(folder: Path, name: str, **changes: Any) -> Path:
    """The embedded model with changes to one of its JSON files."""
    if not folder.is_dir():
        shutil.copytree(resolve("tiny"), folder)
    file = folder / name
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(content | changes), encoding="utf-8")
    return folder


def rows(folder: Path, *texts: str) -> Path:
    file = folder / "rows.jsonl"
    content = [json.dumps({"prompt": "?", "response": text}) + "\n" for text in texts]
    file.write_text("".join(content), encoding="utf-8")
    return file


def fit(leyden: Any, model: Path, data: Path, *more: str) -> tuple[int, str]:
    flags = ["--model.policy.path", model, "--data.path", data, "--data.val_fraction", "0", *more]
    code, _, err = leyden("fit", "--config", "sft", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu", *flags)
    return code, err


def test_full_training_of_quantised_weights_is_refused(leyden, tmp_path: Path) -> None:
    model = model_with(tmp_path / "four", "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    code, err = fit(leyden, model, rows(tmp_path, "a"))
    assert code == 2 and f"{model}: its weights are quantised already (gptq)" in err and "--config lora" in err


def test_tokens_beyond_the_embedding(leyden, tmp_path: Path) -> None:
    """A tokenizer may know more tokens than the model, as long as no row and no answer's end uses them."""
    from transformers import AutoTokenizer

    model = model_with(tmp_path / "more", "config.json")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)
    assert fit(leyden, model, rows(tmp_path, "a", "b"))[0] == 0
    code, err = fit(leyden, model, rows(tmp_path, "a", "b <extra>"))
    assert code == 2 and "rows.jsonl:2: " in err and "'<extra>' (id 4096), beyond the model's 4096 embeddings" in err
    assert "resize_token_embeddings(4097)" in err
    code, _, err = leyden(
        *("predict", "--config", "sft", "--model.policy.path", model, "--data.path", rows(tmp_path, "a")),
        *("--data.system_prompt", "<extra>", "--data.val_fraction", "0"),
    )
    assert code == 2 and "a prompt holds the token '<extra>'" in err
    model_with(model, "generation_config.json", eos_token_id=[0, 9000])
    code, err = fit(leyden, model, rows(tmp_path, "a"))
    assert code == 2 and "answers end with the token id 9000" in err and "generation_config.json" in err


def test_a_measure_of_an_evaluation_that_there_is_not(leyden, tmp_path: Path) -> None:
    watching = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "eval/reward"]
    code, err = fit(leyden, Path(resolve("tiny")), rows(tmp_path, "a"), *watching)
    assert code == 2 and "eval/reward: nothing is evaluated; add --eval.path FILE" in err and "step 1/" not in err


@pytest.mark.slow
def test_settings_of_an_adapter_that_change_nothing(leyden, tmp_path: Path) -> None:
    data, tiny = rows(tmp_path, "a"), Path(resolve("tiny"))
    for flag, value, said in (
        ("modules_to_save", "[lm_hed]", "did you mean 'lm_head'"),
        ("lora_alpha", "0", "nothing"),
    ):
        code, err = fit(leyden, tiny, data, "--config", "lora", f"--model.policy.adapter.{flag}", value)
        assert code == 2 and f"LoraConfig: {flag}" in err and said in err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("Loading it requires optimum (`pip install optimum`)"), "pip install optimum"),
        (ImportError("\nConverter requires the protobuf library but it was not found"), "pip install protobuf"),
        (ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken"), "pip install tiktoken"),
        (ValueError("Please pass `trust_remote_code=True`"), "--model.policy.trust_remote_code true"),
        (OSError("no file named x\nin it"), "look elsewhere"),
    ],
)
def test_what_a_model_needs_is_named(error: Exception, said: str) -> None:
    reason, mend = loading_problem(error, "look elsewhere")
    assert said in mend and "\n" not in reason
