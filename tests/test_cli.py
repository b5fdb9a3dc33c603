"""The command line before and around a run: help, names, keys, one-line errors."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from leyden.class_paths import import_object
from leyden.cli import class_names, launcher
from leyden.cli.check_keys import parameters
from leyden.cli.command import read_command
from leyden.cli.config_keys import flag_keys, flags, read
from leyden.errors import UserError

TOY = """\
model:
  class_path: toy.Toy
  init_args:
    policy: {class_path: toy.Bigrams}
    optimizer: {class_path: AdamW, init_args: {lr: 1e-2}}
data:
  class_path: toy.ToyData
  init_args: {path: rows.jsonl}
"""


@pytest.fixture(autouse=True)
def _toy_config(workplace: Path) -> None:
    (workplace / "toy.yaml").write_text(TOY)


LIGHT = ["--help", "fti", "fit --help", "fit --model STF", "chat --help", "export --help", "export none", "plan --help"]


@pytest.mark.parametrize("args", [line.split() for line in [*LIGHT, "compare --help", "demo --help", "data --help"]])
def test_the_launcher_imports_nothing_heavy(args: list[str], workplace: Path) -> None:
    code = (
        "import sys; from leyden.cli.launcher import main; main(sys.argv[1:]); "
        "print([m for m in ('torch', 'lightning', 'transformers', 'jsonargparse', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_installed_command_answers(workplace: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "leyden", "fti"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no command is called 'fti'; did you mean 'fit'? (see leyden --help)\n"


@pytest.mark.parametrize("command", ["--help", "--version", "data --help", "fit --help", "data show rows.jsonl"])
def test_a_reader_that_has_gone_ends_a_command_without_a_word(command: str, workplace: Path) -> None:
    """As in `leyden --help | head -1`: the code of a program that SIGPIPE ends."""
    with subprocess.Popen(
        [sys.executable, "-m", "leyden", *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        assert (process.wait(60), said) == (141, "")


@pytest.mark.parametrize("closed", [True, False])
def test_a_pipe_of_another_program_that_breaks_is_an_error(closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where standard output itself has no reader does a command end quietly."""
    reads, writes = os.pipe()
    if closed:
        os.close(reads)
    kept = os.dup(writes)

    def broken(args: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(launcher, "_dispatch", broken)
    with os.fdopen(writes, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        if closed:
            assert launcher.main([]) == 141
        else:
            with pytest.raises(BrokenPipeError):
                launcher.main([])
    for handle in (kept, *([] if closed else [reads])):
        os.close(handle)


def test_optional_kernels_of_a_library_are_not_missed_aloud(leyden) -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.NOTSET)
    assert leyden("--help")[0] == 0
    assert not logging.getLogger("bitsandbytes").isEnabledFor(logging.WARNING)


def test_help_lists_only_commands_that_exist(leyden) -> None:
    code, out, err = leyden("--help")
    assert (code, err) == (0, "")
    listed = set(re.findall(r"^  (\w+) {2}", out, re.MULTILINE))
    others = {"data", "plan", "export", "compare", "annotate", "benchmark", "chat", "demo"}
    assert {"fit", "validate", "test", "predict"} | others == listed


def test_help_on_fit_names_classes_and_configs_that_exist(leyden) -> None:
    code, out, _ = leyden("fit", "--help")
    assert code == 0
    assert all(word in out for word in ("SFT", "InstructionData", "sft", "lora", "pretrain", "--ckpt_path last"))
    assert "FileData" not in out


WRONG = {
    # what is typed after `leyden`: what the one line must say
    "fit": ["say what to fit", "--config sft"],
    "fit --model STF": ["--model", "'STF'", "did you mean 'SFT'"],
    "fit --config stf": ["--config stf", "did you mean 'sft'"],
    "fit --config sft --data InstructoinData": ["--data", "did you mean 'InstructionData'"],
    "fit --config sft --model.policy CausalML": ["--model.policy", "did you mean 'CausalLM'"],
    "fit --config toy.yaml --model toy.Toyy": ["toy.py defines no class 'Toyy'", "did you mean 'Toy'"],
    "fit --config toy.yaml --model tiy.Toy": ["no module 'tiy'", "did you mean 'toy'"],
    "fit --data.path rows.jsonl": ["--model: missing", "--config", "SFT"],
    "fit --confg sft": ["--confg: no such flag", "did you mean 'config'"],
    "fit --modl SFT": ["--modl: no such flag", "did you mean 'model'"],
    "fit --config toy.yaml --data.path": ["--data.path needs a value"],
    "fit --config toy.yaml rows.jsonl": ["'rows.jsonl' is neither a flag nor a flag's value"],
    "fit --config sft --data.path a.jsonl --data.chat_template_kwargs {}": [
        "InstructionData has no key 'chat_template_kwargs'",
        "did you mean 'chat_template_args'",
    ],
    "fit --config toy.yaml --model.sclae 2": ["--model.sclae", "Toy has no key 'sclae'", "did you mean 'scale'"],
    "fit --config toy.yaml --model.optimizer.lrr 2": ["--model.optimizer.lrr", "AdamW has no key 'lrr'", "'lr'"],
    "fit --config toy.yaml --model.optimizer AdmaW": ["--model.optimizer", "did you mean 'AdamW'"],
    "fit --config toy.yaml --model.policy.pth x": ["--model.policy.pth", "Bigrams has no key 'pth'", "'path'"],
    "fit --config toy.yaml --model.sampling.top_pp 1": ["Sampling has no key 'top_pp'", "did you mean 'top_p'"],
    "fit --config toy.yaml --trainer.max_step 3": ["Trainer has no key 'max_step'", "did you mean 'max_steps'"],
    "fit --config toy.yaml --checkpoint.save_topk 3": ["no key 'save_topk'", "did you mean 'save_top_k'"],
    "fit --config toy.yaml --dta.path x": ["there is no key 'dta'", "did you mean 'data'"],
    "fit --config toy.yaml --data.tokenizer x": ["--data.tokenizer", "follows model.policy.path"],
    "fit --config toy.yaml --data.batch_size many": ["--data.batch_size: expected int, not many"],
    "fit --config toy.yaml --trainer.max_steps many": ["--trainer.max_steps: expected int, not many"],
    "fit --config toy.yaml --model.policy.dtype f8": ["--model.policy.dtype: expected one of 'float32'", "not f8"],
    "fit --config toy.yaml --trainer.limit_val_batches x": ["expected float or int, not x"],
    "fit --config toy.yaml --trainer.accelerator foo": ["accelerator", "'foo'"],
    "fit --config toy.yaml --trainer.precision bf16-true": ["bf16-true", "--model.policy.dtype bfloat16"],
    "fit --model toy.Toy --data toy.ToyData --data.path x": ["model.policy: missing; add --model.policy.path NAME"],
    "fit --config toy.yaml --config key.yaml": ["key.yaml:4: model.sclae", "Toy has no key", "did you mean 'scale'"],
    "fit --config toy.yaml --config group.yaml": ["group.yaml:2: trainer.max_step", "did you mean 'max_steps'"],
    "fit --config toy.yaml --config type.yaml": ["type.yaml:3: data.batch_size: expected int, not many"],
    "fit --config toy.yaml --config class.yaml": [
        "class.yaml:2",
        "toy.py defines no class 'Toi'",
        "did you mean 'Toy'",
    ],
    "fit --config toy.yaml --config twice.yaml": ["twice.yaml:2: the key 'max_steps' stands twice"],
    "fit --config broken.yaml": ["broken.yaml:2: not valid YAML"],
    "fit --config list.yaml": ["list.yaml: a config is a mapping"],
    "fit --config bytes.yaml": ["bytes.yaml: cannot be read", "UTF-8"],
    "fit --config toy.yaml --config callback.yaml": ["callback.yaml:3", "did you mean 'RichProgressBar'"],
    "fit --config toy.yaml --data.batch_size 0": ["--data.batch_size 0: a step needs at least one example"],
    "fit --config toy.yaml --model.sampling.temperature -1": ["temperature >= 0"],
    "fit --config toy.yaml --trainer.logger CometLogger": ["comet"],
    "test --config toy.yaml": ["nothing to test on"],
}
FILES = {
    "key.yaml": b"model:\n  init_args:\n    # a comment\n    sclae: 3\n",
    "group.yaml": b"trainer:\n  max_step: 3\n",
    "type.yaml": b"data:\n  init_args:\n    batch_size: many\n",
    "class.yaml": b"model:\n  class_path: toy.Toi\n",
    "twice.yaml": b"trainer:\n  max_steps: 1\n  max_steps: 2\n",
    "broken.yaml": b"model: [\n",
    "list.yaml": b"- a\n",
    "bytes.yaml": "model: 질문".encode("cp949"),
    "callback.yaml": b"trainer:\n  callbacks:\n  - class_path: RichProgresBar\n",
}


@pytest.mark.parametrize("typed", WRONG)
def test_a_mistake_is_one_line_that_says_what_to_type(typed: str, leyden, workplace: Path) -> None:
    for name, content in FILES.items():
        (workplace / name).write_bytes(content)
    before = sorted(workplace.rglob("*"))
    code, out, err = leyden(*typed.split())
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert [part for part in WRONG[typed] if part not in err] == [], err
    assert [path for path in workplace.rglob("*") if path not in before and "__pycache__" not in str(path)] == []


def resolved(leyden, *args: str) -> dict:
    """The configuration that `leyden fit ARGS --print_config` shows."""
    import yaml

    code, out, err = leyden("fit", *args, "--print_config")
    assert code == 0, err
    return yaml.safe_load(out)


def test_configs_merge_left_to_right_and_flags_win_in_any_order(leyden, workplace: Path) -> None:
    (workplace / "a.yaml").write_text("model: {init_args: {scale: 2}}\ndata: {init_args: {batch_size: 8, seed: 5}}\n")
    (workplace / "b.yaml").write_text("data: {init_args: {batch_size: 6}}\n")
    flags_first = ["--data.batch_size", "7", "--model.optimizer.lr", "1e-4"]
    config = resolved(leyden, *flags_first, "--config", "toy.yaml", "--config", "a.yaml", "--config", "b.yaml")
    assert config["data"]["init_args"] == {"path": "rows.jsonl", "batch_size": 7, "seed": 5}
    assert config["model"]["init_args"]["scale"] == 2
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 1e-4
    assert config["model"]["init_args"]["policy"]["class_path"] == "toy.Bigrams"
    assert resolved(leyden, "--config", "toy.yaml", "--config", "b.yaml")["data"]["init_args"]["batch_size"] == 6


def test_a_fragment_may_stand_before_the_config_it_belongs_to(leyden, workplace: Path) -> None:
    (workplace / "part.yaml").write_text("model: {init_args: {policy: {init_args: {dropout: 0.1}}}}\n")
    config = resolved(leyden, "--config", "part.yaml", "--config", "toy.yaml")
    assert config["model"]["init_args"]["policy"]["init_args"]["dropout"] == 0.1


def test_causal_lm_is_the_policy_where_only_its_path_is_given(leyden) -> None:
    config = resolved(leyden, *"--model SFT --data toy.ToyData --data.path x --model.policy.path y".split())
    policy = config["model"]["init_args"]["policy"]
    assert policy["class_path"] == "leyden.models.CausalLM" and policy["init_args"]["path"] == "y"


OWN = """
from leyden.algorithm import Algorithm
from leyden.datamodules import PreferenceData


class ORPO(Algorithm):
    def __init__(self, *args, lam: float = 0.1, **kwargs):
        super().__init__(*args, **kwargs)

    def loss(self, batch):
        return batch.token_mean(-self.policy(batch).logp)


class Rows(PreferenceData):
    def __init__(self, path: str, tokenizer: str, batch_size: int = 4, seed: int = 0) -> None:
        super().__init__(path=path, tokenizer=tokenizer, batch_size=batch_size, seed=seed)
"""


@pytest.fixture
def own(workplace: Path) -> Iterator[str]:
    """A module of the user's with an algorithm and data."""
    (workplace / "own_parts.py").write_text(OWN)
    yield "own_parts"
    sys.modules.pop("own_parts", None)


@pytest.mark.parametrize("config", ["dpo", "reward_model", "ppo", "grpo", "rejection_sampling", "distillation", "sft"])
@pytest.mark.parametrize("first", [True, False])
def test_keys_of_a_class_that_was_replaced_are_left_out(leyden, own: str, config: str, first: bool) -> None:
    """Those that a shipped config says and nobody typed, whatever the order; the others are taken from there."""
    ours = ["--model", f"{own}.ORPO", "--data", f"{own}.Rows", "--data.path", "p.jsonl"]
    theirs = ["--config", config]
    found = resolved(leyden, *(ours + theirs if first else theirs + ours), "--model.lam", "0.3")
    assert found["model"]["class_path"] == f"{own}.ORPO" and found["model"]["init_args"]["lam"] == 0.3
    shipped = yaml.safe_load(class_names.config_file(config).read_text(encoding="utf-8"))
    for part, cls in (("model", f"{own}.ORPO"), ("data", f"{own}.Rows")):
        known = set(parameters(import_object(cls, "test", "own_parts")))
        assert set(found[part]["init_args"]) <= known
    rate = shipped["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    assert found["model"]["init_args"]["optimizer"]["init_args"]["lr"] == float(rate)


@pytest.mark.parametrize(
    ("typed", "problem"),
    [
        (["--model.objective.beta", "0.2"], "ORPO has no key 'objective'"),
        (["--model.objective", "Hinge"], "ORPO has no key 'objective'"),
        (["--model.reference", "copy"], "ORPO has no key 'reference'"),
        (["--config", "mine.yaml"], "mine.yaml:3: model.sft_weight: ORPO has no key 'sft_weight'"),
    ],
)
def test_keys_that_the_user_typed_are_never_left_out(leyden, workplace: Path, own: str, typed: list[str], problem: str):
    (workplace / "mine.yaml").write_text("model:\n  init_args:\n    sft_weight: 0.1\n")
    code, _, err = leyden("fit", "--config", "dpo", "--model", f"{own}.ORPO", "--data.path", "p.jsonl", *typed)
    assert code == 2 and problem in err


def test_an_argument_of_no_class_says_to_name_one(leyden) -> None:
    code, _, err = leyden("fit", "--config", "ppo", "--data.path", "p.jsonl", "--model.surrogate.dual", "3")
    assert code == 2 and "its class is missing; name one first: --model.surrogate Clip" in err, err


@pytest.mark.parametrize(
    ("config", "surrogate", "expected"),
    [
        ("gspo", "Clip", {"clip": 0.2, "clip_high": None, "dual": None}),
        ("dapo", "SequenceRatio", {"clip": 3e-4, "clip_high": 4e-4}),
        ("dapo", "CISPO", {"cap": 5.0}),
    ],
)
def test_numbers_of_one_surrogate_are_not_those_of_another(leyden, config: str, surrogate: str, expected: Any) -> None:
    typed = ["--data.path", "p.jsonl", "--model.reward", "Gold", "--model.surrogate", surrogate]
    found = resolved(leyden, "--config", config, *typed)["model"]["init_args"]["surrogate"]
    assert found["class_path"] == f"leyden.surrogates.{surrogate}" and found["init_args"] == expected


def test_what_is_left_out_is_said(leyden, own: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "leyden"):
        resolved(leyden, "--config", "dpo", "--model", f"{own}.ORPO", "--data.path", "p.jsonl")
        resolved(leyden, "--config", "dpo", "--data.path", "p.jsonl")
    said = [message for message in caplog.messages if "left out" in message]
    assert said == ["--config dpo: objective is a key of DPO, not of ORPO; left out"]


FRAGMENTS = dict.fromkeys("lora qlora 8gb ddp fsdp2 eval wandb vllm vllm_colocated ray ray_vllm".split(), "sft")
FRAGMENTS |= {"one_base": "ppo"}
"""What stands after another config, and one that it goes with."""


@pytest.mark.parametrize("name", sorted(class_names.configs()))
def test_every_shipped_config_parses(name: str, leyden) -> None:
    base = [] if name not in FRAGMENTS else ["--config", FRAGMENTS[name]]
    samples = {"ppo": "algos.PPO", "rejection_sampling": "algos.RejectionSampling"}
    samples |= dict.fromkeys(("grpo", "dr_grpo", "dapo", "gspo", "cispo"), "algos.GRPO")
    samples |= dict.fromkeys(("rloo", "reinforce_pp"), "on_policy.PolicyGradient")
    samples |= {"distillation": "algos.Distillation", "online_dpo": "algos.OnlineDPO"}
    base += ["--model.reward", "Gold"] if name in samples else []
    base += ["--model.reward.path", "judge"] if name == "one_base" else []
    base += ["--eval.path", "rows.jsonl"] if name == "eval" else []
    base += ["--data.attributes", "[helpfulness]"] if name == "attribute_model" else []
    config = resolved(leyden, *base, "--config", name, "--data.path", "rows.jsonl")
    name = FRAGMENTS[name] if name == "one_base" else name
    compares = {"dpo": "algos.DPO", "kto": "algos.KTO", "bco": "algos.BCO", "reward_model": "algos.RewardModel"}
    others = compares | samples | {"attribute_model": "algos.AttributeModel"}
    algorithm = others.get(name, "algos.SFT")
    assert config["model"]["class_path"] == f"leyden.{algorithm}"
    data = "PreferenceData" if name in compares else "InstructionData"
    data = "PromptData" if name in samples else "AttributeData" if name == "attribute_model" else data
    assert config["data"]["class_path"] == f"leyden.datamodules.{data}"
    adapter = config["model"]["init_args"]["policy"]["init_args"]["adapter"]
    assert (adapter is not None) is (name in ("lora", "qlora"))
    assert adapter is None or adapter["init_args"]["r"] == 16
    if algorithm == "algos.SFT":
        assert config["data"]["init_args"]["train_on"] == ("all" if name == "pretrain" else "response")


def test_another_objective_has_its_own_defaults(leyden) -> None:
    """0.1 is the β of sums, and would be far too small for averages over tokens."""
    config = resolved(leyden, "--config", "dpo", "--data.path", "rows.jsonl", "--model.objective", "SimPO")
    found = config["model"]["init_args"]["objective"]
    assert found == {"class_path": "leyden.objectives.SimPO", "init_args": {"beta": 2.0, "gamma": 1.0}}


def test_lora_by_flags(leyden) -> None:
    adapter = "--model.policy.adapter LoraConfig --model.policy.adapter.r 8".split()
    config = resolved(leyden, "--config", "sft", "--data.path", "rows.jsonl", *adapter)
    assert config["model"]["init_args"]["policy"]["init_args"]["adapter"]["init_args"]["r"] == 8


def test_flags_are_pairs_in_every_spelling() -> None:
    typed = ["--a.b=1", "--c", "2", "-c", "x.yaml", "--d+=X", "--e", "-1", "--print_config"]
    pairs = [["a.b", "1"], ["c", "2"], ["config", "x.yaml"], ["d+", "X"], ["e", "-1"], ["print_config", ""]]
    assert flags(typed) == pairs
    (key,) = flag_keys([["model.init_args.policy.init_args.path", "x"]])
    assert key.path == ("model", "policy", "path")


def test_keys_of_a_file_know_their_lines(workplace: Path) -> None:
    content, keys = read(workplace / "toy.yaml")
    places = {".".join(key.path): key.where.rpartition(":")[2] for key in keys}
    assert places["model"] == "2" and places["model.optimizer.lr"] == "5" and places["data.path"] == "8"
    assert content["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01  # a number, not the text "1e-2"
    assert [key.value for key in keys if key.path == ("data",)] == ["toy.ToyData"]


def test_a_class_in_a_value_with_braces_is_checked(workplace: Path) -> None:
    value = json.dumps({"class_path": "toy.Nothing"})
    with pytest.raises(UserError, match="defines no class 'Nothing'"):
        read_command("fit", ["--config", "toy.yaml", "--model.policy", value])


@pytest.mark.parametrize("kind", sorted(class_names.KINDS))
def test_names_read_from_the_text_are_those_of_the_classes(kind: str) -> None:
    """What help lists without an import is what an import finds: all public classes of a kind, and no others."""
    root = class_names.KINDS[kind]
    real = {name: import_object(path, kind) for name, path in class_names.classes().items()}
    bases = {base for one in real.values() if isinstance(one, type) for base in one.__mro__ if base.__name__ == root}
    expected = {
        name
        for name, one in real.items()
        if isinstance(one, type) and bases & set(one.__mro__[1:]) and "abstractmethod" not in own_text(one)
    }
    assert set(class_names.of_kind(kind)) == expected


def own_text(kind: type) -> str:
    return inspect.getsource(kind)


def test_short_names_have_short_paths() -> None:
    assert class_names.of_kind("model")["SFT"] == "leyden.algos.SFT"
    assert class_names.of_kind("data")["InstructionData"] == "leyden.datamodules.InstructionData"
    assert class_names.of_kind("model.reward")["Gold"] == "leyden.rewards.Gold"
    assert class_names.of_kind("model.objective")["IPO"] == "leyden.objectives.IPO"
    assert "StoredRows" in class_names.sources() and "StoredRows" not in class_names.classes()
    assert "Algorithm" not in class_names.of_kind("model") and "CausalLM" not in class_names.of_kind("model")


def test_unexpected_errors_keep_their_traceback(leyden, workplace: Path) -> None:
    text = (workplace / "toy.py").read_text().replace("        rows = [json", "        1 / 0\n        rows = [json")
    (workplace / "broken_toy.py").write_text(text)
    with pytest.raises(ZeroDivisionError):
        leyden("fit", "--config", "toy.yaml", "--data", "broken_toy.ToyData")
