"""`leyden plan`: what it says of runs, what it says to change, and its exit codes."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from leyden.cli.command import read_command
from leyden.models.planner.alternatives import alternatives, rule_of_thumb
from leyden.models.planner.budget import budget
from leyden.models.planner.reading import resolved, settings
from leyden.models.planner.settings import Settings

LLAMA = "meta-llama/Llama-2-7b-hf"
ON_GPU = ["--trainer.accelerator", "gpu"]
PARAMETERS = {
    "LGAI-EXAONE/EXAONE-4.0-1.2B": 1_279_391_488,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    LLAMA: 6_738_415_616,
}


@pytest.fixture(autouse=True)
def _models(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders that are named like models of the hub and hold their configurations alone."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import shapes

    for name, shape in shapes.PUBLISHED.items():
        shapes.write(shape, workplace / name)


def read(*args: str, devices: int | None = None) -> Settings:
    return settings(resolved(read_command("fit", [*args])), devices)[0]


def items(out: str) -> dict[str, float]:
    """The breakdown: GB by name, those of phases too."""
    return {name: float(size.replace(",", "")) for name, size in re.findall(r"^ +(\S.*?) {2,}([\d.,]+) GB", out, re.M)}


def sizes(found: Settings) -> dict[str, float]:
    """Bytes of what stays, by name."""
    return {item.name: item.size for item in budget(found.run()).kept}


def test_a_plan_is_a_breakdown_and_leaves_nothing_behind(leyden, workplace: Path) -> None:
    before = sorted(workplace.rglob("*"))
    code, out, err = leyden("plan", "--config", "sft", "--config", "qlora", "--model.policy.path", LLAMA, *ON_GPU)
    assert (code, err) == (0, "")
    found = items(out)
    stays, _, rest = out.partition("  while training:")
    added = items(rest.partition("  while ")[0])
    assert [*added] == ["activations", "a layer's backward pass"] and "in all" not in items(stays)
    whole = sum(items(stays).values()) + sum(added.values())
    assert whole == pytest.approx(found["in all"], abs=0.05) and "added while training" in out
    assert found["a forward pass"] < sum(added.values()) and "GB with gradient checkpointing" in out
    assert found["weights in 4 bits"] == 3.34 and found["other weights"] == 0.52  # 6.476 B at 0.5159, 0.262 B at 2
    assert found["optimizer (AdamW)"] == pytest.approx(2 * found["adapter and heads"], abs=0.02)
    for way in ("full, float32", "full, bf16-mixed", "full, bfloat16", "LoRA on bfloat16", "QLoRA"):
        assert len(re.findall(rf"^  {way} ", out, re.M)) == 1
    assert "rejection sampling for a reward and caution" in out and "6.74 B parameters" in out
    assert sorted(workplace.rglob("*")) == before


def test_published_shapes_have_their_published_sizes() -> None:
    found = read("--config", "sft", "--model.policy.path", LLAMA)
    for name, parameters in PARAMETERS.items():
        assert replace(found, policy=replace(found.policy, path=name)).run().policy.plan.total == parameters


def test_the_rule_of_thumb_holds_for_bfloat16_and_not_for_mixed_precision(leyden) -> None:
    found = read("--config", "sft", "--model.policy.path", LLAMA, *ON_GPU)
    rule = rule_of_thumb(found)
    ways = [rule[name] / 1e9 for name in ("full, bfloat16", "LoRA on bfloat16", "QLoRA")]
    assert ways == pytest.approx([60, 16, 6], rel=0.1)
    assert rule["full, bf16-mixed"] > (16 + 2) * 6.4e9  # master weights, gradients, two moments, and copies
    code, out, _ = leyden("plan", "--config", "sft", "--model.policy.path", LLAMA, *ON_GPU)
    assert code == 0 and "60, 16 and 6 GB" in out and "wrong for bf16-mixed" in out


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux says of processes")
def test_the_plan_is_what_a_process_holds() -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "memory.py"
    done = subprocess.run([sys.executable, script, "--sizes", "20M"], capture_output=True, text=True, check=True)
    off = [float(found) for found in re.findall(r"([+-][\d.]+) %", done.stdout)]
    assert len(off) == 3 and max(map(abs, off)) < 10, done.stdout


@pytest.mark.parametrize("config", ["sft", "dpo", "grpo"])
def test_what_it_says_to_change_makes_the_run_fit(config: str, leyden) -> None:
    command = ["plan", "--model.policy.path", "Qwen/Qwen3-1.7B", "--memory", "8GB", *ON_GPU]
    code, out, _ = leyden(*command, "--config", config)
    assert code == 1 and "It does not fit in 8.00 GB" in out
    lines = re.findall(r"^\s+([\d.,]+) GB   (--.+)$", out.partition("What helps")[2], re.M)
    flags = [line.partition(", instead")[0].partition(" (")[0] for _, line in lines]
    last = max(i for i, line in enumerate(flags) if line.startswith("--config"))
    flags = [line for i, line in enumerate(flags) if i >= last or not line.startswith("--config")]
    code, out, err = leyden(*command, "--config", config, *(word for line in flags for word in shlex.split(line)))
    assert code == 0, (flags, out, err)
    assert items(out)["in all"] == pytest.approx(float(lines[-1][0]), abs=0.02)


def test_it_fits_or_it_does_not(leyden) -> None:
    tiny = ["plan", "--config", "sft", "--model.policy.path", "tiny", "--data.max_tokens", "2048"]
    assert leyden(*tiny, "--memory=2GB")[0] == 0
    code, out, _ = leyden(*tiny, "--memory", "100MB")
    assert code == 1 and "That is not enough: take a smaller model" in out


WRONG = {
    "--config sft --model.policy.path nowhere/none": ["nowhere/none: its configuration cannot be read"],
    "--config sft --model.policy.path ./none": ["./none: no such model folder"],
    "--config sft --memory eight": ["--memory eight: give a size such as 8GB"],
    "--config sft --memory": ["--memory needs a value"],
    "--config sft --devices 0": ["--devices 0: give a number of devices"],
    "--config sft --data.max_tokns 5": ["no key 'max_tokns'; did you mean 'max_tokens'?"],
    "--config sfd": ["--config sfd", "did you mean 'sft'?"],
    "--config sft --data.max_tokens many": ["--data.max_tokens", "expected int"],
    "--config sft --trainer.precision bf16-true": ["bf16-true", "--model.policy.dtype"],
    "--config sft --model.policy.adapter LoraConfig --model.policy.adapter.target_modules [nothing]": ["match nothing"],
    "--config sft --model.policy toy.Bigrams": ["plan knows what a CausalLM holds"],
}


@pytest.mark.parametrize("typed", WRONG)
def test_a_mistake_is_one_line(typed: str, leyden) -> None:
    code, out, err = leyden("plan", *typed.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert [part for part in WRONG[typed] if part not in err] == [], err


def test_devices_share_a_model_or_hold_it_each() -> None:
    args = ["--config", "sft", "--model.policy.path", "Qwen/Qwen3-1.7B", *ON_GPU]
    one, ddp = sizes(read(*args)), sizes(read(*args, "--trainer.strategy", "ddp", devices=4))
    assert ddp.pop("gradients on their way") == one["gradients"] and ddp == one
    views = ["--trainer.strategy", "DDPStrategy", "--trainer.strategy.gradient_as_bucket_view", "true"]
    assert sizes(read(*args, *views, devices=4)) == one
    shared = read(*args, "--trainer.strategy", "ModelParallelStrategy", "--trainer.devices", "4")
    parts = sizes(shared)
    assert all(parts[name] == one[name] / 4 for name in ("weights", "gradients", "optimizer (AdamW)"))
    assert 0 < parts["gathered weights"] < one["weights"]
    assert shared.rows == read(*args).rows / 4


def test_what_algorithms_hold_beside_the_policy() -> None:
    model = ["--model.policy.path", "Qwen/Qwen3-1.7B", *ON_GPU]
    weights = sizes(read("--config", "sft", *model))["weights"]
    assert sizes(read("--config", "dpo", *model))["reference, copy"] == weights
    assert "reference, copy" not in sizes(read("--config", "dpo", *model, "--model.reference", "precomputed"))
    assert not any("reference" in name for name in sizes(read("--config", "dpo", "--config", "lora", *model)))
    assert "reference, copy" not in sizes(read("--config", "dpo", *model, "--model.objective", "SimPO"))
    assert sizes(read("--config", "online_dpo", "--model.reward", "Gold", *model, "--model.objective", "SimPO"))[
        "reference, copy"
    ]
    other = [
        "--model.reference_policy.path",
        "LGAI-EXAONE/EXAONE-4.0-1.2B",
        "--model.reference_policy.dtype",
        "bfloat16",
    ]
    assert sizes(read("--config", "dpo", *model, *other))["reference model"] == 2 * 1_279_391_488
    reward = read("--config", "reward_model", "--model.policy.path", "Qwen/Qwen3-8B", *ON_GPU).run().policy
    assert (reward.heads, reward.language) == (1, False) and reward.trained[4] == 8_190_735_360 - 151936 * 4096 + 4096
    base = ["--config", "ppo", "--config", "qlora", "--config", "one_base", *model]
    shared = sizes(read(*base))
    adapter = 4 * read(*base).run().policy.plan.adapter
    assert shared["reward model"] == adapter and shared["value adapter"] == pytest.approx(4 * adapter, rel=0.01)
    apart = ["--model.value_policy.path", "Qwen/Qwen3-1.7B", "--model.reward.path", "Qwen/Qwen3-1.7B"]
    alone = sizes(read("--config", "ppo", *model, *apart))
    assert alone["reward model"] == weights + 4 * 2048 and alone["value model"] == pytest.approx(4 * weights, rel=0.1)
    assert "reward model" not in sizes(read("--config", "grpo", "--model.reward", "Gold", *model))


def test_a_subclass_holds_what_its_parent_holds(workplace: Path) -> None:
    (workplace / "mine_dpo.py").write_text("from leyden.algos import DPO\n\n\nclass Mine(DPO):\n    '''The same.'''\n")
    found = read("--config", "dpo", "--model", "mine_dpo.Mine", "--model.policy.path", "tiny")
    assert found.algorithm.__name__ == "Mine" and "reference, copy" in sizes(found)


def test_a_reward_model_that_is_not_there_yet_is_supposed(leyden) -> None:
    command = ["plan", "--config", "ppo", "--model.policy.path", "tiny"]
    for path in ([], ["--model.reward.path", "runs/reward/export"]):
        code, out, err = leyden(*command, *path)
        assert code == 0 and "Note: the reward model cannot be read yet" in out, err
        assert items(out)["reward model"] == items(out)["weights"] > 0


def test_a_teacher_is_held_and_run_beside_the_policy() -> None:
    """Its weights, the hidden states of its forward pass and its logits; answers are sampled without a reward."""
    distilled = ["--config", "distillation", "--model.policy.path", "Qwen/Qwen3-1.7B"]
    alone = read(*distilled, "--model.teacher_system", "짧게")
    taught = read(*distilled, "--model.teacher.path", "Qwen/Qwen3-4B")
    assert alone.new == taught.new == 256 and taught.prompt == 768 and alone.run().teacher is None
    found = sizes(taught)
    assert found["teacher model"] == pytest.approx(4 * PARAMETERS["Qwen/Qwen3-4B"], rel=0.02)
    assert budget(taught.run()).total > budget(alone.run()).total + found["teacher model"]


def test_tokens_of_a_micro_batch() -> None:
    sft = read("--config", "sft", "--model.policy.path", "tiny", "--trainer.accumulate_grad_batches", "16")
    assert (sft.rows, sft.run().tokens, sft.run().looked) == (2, 2048, 16384)
    dpo = read("--config", "dpo", "--model.policy.path", "tiny", "--data.max_tokens", "3000")
    assert (dpo.row, dpo.run().tokens) == (2048, 3000)
    assert read("--config", "kto", "--model.policy.path", "tiny").row == dpo.row  # its own answer and a borrowed one
    assert read("--config", "bco", "--model.policy.path", "tiny").row == 1024
    grpo = read("--config", "grpo", "--model.reward", "Gold", "--model.policy.path", "tiny")
    assert (grpo.rows, grpo.row) == (8, 768 + 8 * 256) and grpo.run().predicted == 8 * 8 * 256
    best = read("--config", "rejection_sampling", "--model.reward", "Gold", "--model.policy.path", "tiny")
    assert (best.rows, best.row) == (32, 1024) and best.run().looked == 16384


def test_checkpointing_and_quantisation_only_ever_save() -> None:
    found = read("--config", "sft", "--model.policy.path", "Qwen/Qwen3-4B", *ON_GPU)
    totals = {way.name: budget(way.settings.run()).total for way in alternatives(found)}
    assert totals["QLoRA"] < totals["LoRA on bfloat16"] < totals["full, bfloat16"] < totals["full, float32"]
    assert totals["full, bf16-mixed"] < totals["full, float32"]  # activations in half precision outweigh the copies
    again = replace(found, policy=replace(found.policy, checkpointing=True))
    assert budget(again.run()).total < budget(found.run()).total


RECIPES: dict[str, list[str]] = {
    "sft": [],
    "dpo": [],
    "reward_model": [],
    "rejection_sampling": ["--model.reward.base", "policy", "--model.reward.batch_tokens", "2560"],
    "grpo": ["--model.reward.base", "policy", "--model.reward.batch_tokens", "2560"],
    "ppo": ["--config", "one_base", "--model.reward.batch_tokens", "2560"],
}


def recipes(config: str) -> dict[str, Settings]:
    """An algorithm's recipe for 8 GB by model. Of 8 B parameters PPO's three adapters are of half the rank."""
    found, out = read("--config", config, "--config", "qlora", "--config", "8gb", *RECIPES[config], *ON_GPU), {}
    for name, parameters in PARAMETERS.items():
        policy: Any = replace(found.policy, path=name)
        if config == "ppo" and parameters > 8e9:
            policy = replace(policy, choice=replace(policy.choice, adapter=replace(policy.choice.adapter, r=8)))
        out[name] = replace(found, policy=policy)
    return out


def gigabytes() -> dict[str, list[float]]:
    """What docs/memory.md says of them: GB by model, in the order of the algorithms."""
    columns = [recipes(config) for config in RECIPES]
    return {name: [round(budget(column[name].run(), 8e9).total / 1e9, 1) for column in columns] for name in PARAMETERS}


@pytest.mark.parametrize("config", RECIPES)
def test_recipes_fit_in_eight_gigabytes(config: str) -> None:
    for name, found in recipes(config).items():
        several = config == "grpo" and PARAMETERS[name] > 8e9
        assert (budget(found.run(), 8e9).total < 8e9) is not several, name  # several answers to a prompt need the room


def test_rows_are_as_long_as_the_file_says(leyden, workplace: Path) -> None:
    from prepared import write

    write(workplace / "chat.jsonl", [{"prompt": "가" * (1 + i % 9), "response": "나" * (1 + i % 5)} for i in range(90)])
    sft = ("--config", "sft", "--model.policy.path", "tiny")
    code, out, err = leyden("plan", *sft, "--data.path", "chat.jsonl")
    found, supposed = read(*sft, "--data.path", "chat.jsonl"), read(*sft)
    longest = max(found.lengths)
    assert code == 0 and f"chat.jsonl: 90 rows, the longest of {longest} tokens" in out, err
    assert f"32 rows of at most {longest}" in out and longest < 60 and supposed.row == 1024
    assert longest * 10 < found.run().tokens < longest * 32  # a step's own rows, not the longest of all 32 times
    fit = ["fit", *sft, "--data.path", "chat.jsonl", "--data.val_fraction", "0", "--trainer.max_epochs", "1"]
    assert leyden(*fit, "--trainer.default_root_dir", "run")[0] == 0
    with (workplace / "run/metrics.csv").open(encoding="utf-8") as stream:
        tokens = [float(row["train/tokens"]) for row in csv.DictReader(stream) if row.get("train/tokens")]
    assert max(b - a for a, b in zip([0.0, *tokens], tokens, strict=False)) == found.run().tokens

    grpo = ("--config", "grpo", "--model.reward", "Gold", "--model.policy.path", "tiny")
    asked = read(*grpo, "--data.path", "chat.jsonl")
    assert asked.row == max(asked.lengths) + 8 * 256 and max(asked.lengths) < longest
    code, _, err = leyden("plan", *sft, "--data.path", "chart.jsonl")
    assert code == 2 and "chart.jsonl" in err


def test_prompts_are_shared_among_devices_as_a_rollout_shares_them() -> None:
    """Every process has some steps with more than its fair share: no permutation can be fair in each."""
    grpo = ("--config", "grpo", "--model.reward", "Gold", "--model.policy.path", "tiny", "--model.epochs", "4")
    assert read(*grpo).rows == 8
    assert read(*grpo, devices=2).rows > 4
