"""Every page of docs/ runs as written, in an empty folder."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

ROOT = Path(__file__).parent.parent
SHORT = ["--trainer.max_steps", "2", "--data.batch_size", "4"]


def pieces(text: str) -> list[tuple[str, str, str]]:
    """(file named just before it, language, content) of every block, in order."""
    found = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        named = re.findall(r"to `([\w.]+)`", text[: match.start()])
        found.append((named[-1] if named else "", match[1], match[2]))
    return found


def test_your_own_algorithm_runs_from_an_empty_folder(leyden, workplace: Path) -> None:
    for left in workplace.iterdir():
        left.unlink()
    text = (ROOT / "docs" / "your-own-algorithm.md").read_text(encoding="utf-8")
    for file, language, content in pieces(text):
        if language != "bash":
            (workplace / file).write_text(content, encoding="utf-8")
            continue
        for line in content.splitlines():
            words = shlex.split(line)
            code, _, error = leyden(*words[1:], *(SHORT if words[1] == "fit" else []))
            assert code == 0, (line, error)
    assert all((workplace / "runs" / run / "export").is_dir() for run in ("seams", "hard"))
    for run in ("apo", "simpo", "simpo-lora", "online-dpo"):
        with (workplace / "runs" / run / "metrics.csv").open(encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        assert any(row.get("train/accuracy") for row in rows) and (workplace / "runs" / run / "export").is_dir()
    assert (workplace / "runs/simpo-lora/export/adapter_model.safetensors").is_file()


def test_the_gradients_of_the_page_are_the_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_surrogates import rewarded, some

    from leyden import advantages, surrogates

    text = (ROOT / "docs" / "your-own-algorithm.md").read_text(encoding="utf-8")
    code = {file: content for file, language, content in pieces(text) if language in ("python", "yaml")}
    (tmp_path / "my_gradients.py").write_text(code["my_gradients.py"], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import my_gradients  # type: ignore[import-not-found]

    pairs, reward = rewarded()
    pairs, reward = pairs.select([0]), reward[: pairs.structure()[0].stop]  # the other prompt has one answer
    mine, shipped = my_gradients.LeaveOneOut()(pairs, reward)[0], advantages.LeaveOneOut()(pairs, reward)[0]
    torch.testing.assert_close(mine, shipped)
    losses = [kind(0.01, 0.02)(*some()) for kind in (my_gradients.SequenceRatio, surrogates.SequenceRatio)]
    assert torch.equal(*losses)
    page = yaml.safe_load(code["dapo_again.yaml"])["model"]["init_args"]
    dapo = yaml.safe_load((ROOT / "configs" / "dapo.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    assert page == {name: dapo[name] for name in page}


def test_the_subclass_is_short() -> None:
    text = (ROOT / "docs" / "your-own-algorithm.md").read_text(encoding="utf-8")
    source = next(content for file, language, content in pieces(text) if file == "my_simpo.py" and language == "python")
    (cls,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert cls.end_lineno is not None and cls.end_lineno - cls.lineno + 1 <= 20


def test_simpo_is_simpo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The page's class against the paper's equation 6, in loops."""
    from small import small, some_trees

    from leyden.batch.forest import pack

    text = (ROOT / "docs" / "your-own-algorithm.md").read_text(encoding="utf-8")
    (tmp_path / "my_simpo.py").write_text(next(c for f, k, c in pieces(text) if f == "my_simpo.py"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    import my_simpo  # type: ignore[import-not-found]

    algorithm, batch = my_simpo.SimPO(small(), beta=1.5, gamma=0.4), pack(some_trees(5, responses=2))
    logp, losses = algorithm.policy(batch).logp, []
    for span in batch.structure():
        means = [logp[a:b][batch.weight[a:b] > 0].mean() for _, a, b in span.responses]
        losses.append(-F.logsigmoid(1.5 * means[0] - 1.5 * means[1] - 0.4))
    expected = torch.stack(losses).mean()
    assert float(algorithm.loss(batch).detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


ACCOUNT = "<!-- needs an account -->\n"
"""Stands before what asks a server."""


def run_page(leyden, workplace: Path, name: str) -> None:
    """Every command of a page but those for an account, made short, where `chat.csv` and some data lie."""
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    offline = re.sub(rf"{re.escape(ACCOUNT)}```bash\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for _, language, content in pieces(offline) if language == "bash" for line in content.splitlines()]
    for line in lines:
        if line.startswith("make "):
            continue
        words = shlex.split(line, comments=True)[1:]
        short = list(SHORT) if words[0] == "fit" else []
        sampled = {"ppo", "rejection_sampling", "distillation"} & {*words}, {"gspo", "rloo", "reinforce_pp"} & {*words}
        for config, tokens in zip(sampled, ("4", "16"), strict=True):  # of answers of four tokens few scores differ
            if config:  # answers of both policies, in one rollout of equal parts
                short += ["--data.batch_size", "8", "--model.sampling.max_new_tokens", tokens, "--data.val_size", "2"]
        if words[0] in ("fit", "validate") and "--eval.path" in words:
            short += ["--eval.size", "4", "--eval.sampling.max_new_tokens", "4"]
        if words[0] == "predict":
            short = ["--model.sampling.max_new_tokens", "16"]
        if words[:2] == ["data", "label"]:  # two steps teach nothing that Gold could tell apart
            (workplace / "tell.py").write_text("def length(samples):\n    return [len(s.response) for s in samples]\n")
            words = [*words[: words.index("--reward")], "--reward", "Function", "--reward.path", "tell.length"]
        code, _, error = leyden(*words, *short)
        assert code == 0 or (code == 1 and "label" in words), (line, error)


def table(workplace: Path) -> None:
    """The spreadsheet that pages begin with."""
    with (workplace / "chat.csv").open("w", encoding="utf-8", newline="") as stream:
        rows = [(f"{i} 더하기 {i}는?", f"{2 * i}입니다.") for i in range(30)]
        csv.writer(stream).writerows([("질문", "답변"), *rows])


def test_the_page_on_data_runs(leyden, workplace: Path) -> None:
    table(workplace)
    run_page(leyden, workplace, "data.md")


def test_the_page_on_algorithms_runs(leyden, workplace: Path) -> None:
    run_page(leyden, workplace, "algorithms.md")


@pytest.fixture
def _no_rewards_module() -> Any:
    """Other tests have a module of this name too."""
    sys.modules.pop("my_rewards", None)
    yield
    sys.modules.pop("my_rewards", None)


@pytest.mark.usefixtures("_no_rewards_module")
def test_the_rewards_that_the_page_writes_are_taken(leyden, workplace: Path) -> None:
    from leyden.example import Sample
    from leyden.rewards.function import Function

    commands = []
    for file, language, content in pieces((ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")):
        if language in ("python", "yaml"):
            (workplace / (file or {"python": "my_rewards.py", "yaml": "reward.yaml"}[language])).write_text(content)
        else:
            commands += [shlex.split(line)[1:] for line in content.splitlines()]
    assert leyden("data", "sample", "--kind", "prompts", "--rows", "8", "--output", "prompts.jsonl")[0] == 0
    for words in commands:
        code, _, error = leyden(*words, *SHORT, "--model.minibatches", "1")
        assert code == 0, error
    sampled = (workplace / "runs/engine/rollouts.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(text == text.strip() for row in sampled for text in json.loads(row)["responses"])
    fit = ["fit", "--config", "grpo", "--data.path", "prompts.jsonl", "--print_config"]
    code, out, error = leyden(*fit, "--config", "reward.yaml")
    assert code == 0, error
    reward = yaml.safe_load(out)["model"]["init_args"]["reward"]
    assert reward["class_path"].endswith("WeightedSum") and reward["init_args"]["weights"] == [1.0, 0.1]
    path = reward["init_args"]["rewards"][1]["init_args"]["path"]
    assert list(Function(path)([Sample([], "x" * 50)])) == [-0.5]
    code, out, error = leyden(*fit, "--config", "ensemble.yaml")
    assert code == 0, error
    reward = yaml.safe_load(out)["model"]["init_args"]["reward"]
    assert reward["class_path"].endswith("Ensemble") and reward["init_args"]["combine"] == "mean"
    flags = ["Classifier", "--model.reward.path", "OWNER/NAME", "--model.reward.label", "toxic"]
    code, out, error = leyden(*fit, "--model.reward", *flags)
    assert code == 0, error
    assert yaml.safe_load(out)["model"]["init_args"]["reward"]["init_args"]["label"] == "toxic"
    judge = ["--model.reward", "HTTPJudge", "--model.reward.url", "http://localhost:8000/v1"]
    code, out, error = leyden(*fit, *judge, "--model.reward.model", "NAME")
    init = yaml.safe_load(out)["model"]["init_args"]["reward"]["init_args"]
    assert code == 0 and init["scale"] == [1, 10] and init["key_env"] == "OPENAI_API_KEY", (error, init)


def test_the_page_on_preferences_runs(leyden, workplace: Path) -> None:
    from leyden.example import Sample
    from leyden.models import Classifier

    for _, language, content in pieces((ROOT / "docs" / "preferences.md").read_text(encoding="utf-8")):
        if language == "json":
            (workplace / "grades.jsonl").write_text(content, encoding="utf-8")
            continue
        for line in content.splitlines():
            words = shlex.split(line)[1:]
            code, _, error = leyden(*words, *(SHORT if words[0] == "fit" else []))
            assert code == 0, (line, error)
    rows = [json.loads(line) for line in (workplace / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    reward = Classifier("runs/grades", weights={"helpfulness": 1, "verbosity": -0.2})
    found = reward([Sample(row["prompt"], row["response"]) for row in rows]).tolist()
    assert found == pytest.approx([r["score"]["helpfulness"] - 0.2 * r["score"]["verbosity"] for r in rows], abs=1e-4)


def test_the_page_on_evaluation_runs(leyden, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(workplace / "netrc"))
    table(workplace)
    for kind, name in (("instruction", "chat"), ("preference", "pairs"), ("prompts", "prompts")):
        made = leyden("data", "sample", "--kind", kind, "--language", "ko", "--rows", "40", "--output", f"{name}.jsonl")
        assert made[0] == 0
    run_page(leyden, workplace, "evaluation.md")
    assert (workplace / "report.html").is_file() and list((workplace / "runs/wandb/wandb").glob("offline-run-*"))


def test_the_sweep_says_what_the_command_line_takes(leyden, workplace: Path) -> None:
    all_rows = yaml.safe_load((ROOT / "docs" / "sweep.yaml").read_text(encoding="utf-8"))
    chosen = [f"--{name}={given['values'][0]}" for name, given in all_rows["parameters"].items()]
    words = [word for word in all_rows["command"][1:] if word != "${args}"]
    code, printed, error = leyden(*words, *chosen, "--print_config")
    assert code == 0 and "kl_coef: 0.02" in printed and "leyden.wandb.WandB" in printed, error


def test_the_walk_through_runs_and_is_the_same_in_both_languages(
    leyden, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    english, korean = ((ROOT / "docs" / f"walkthrough{x}.md").read_text(encoding="utf-8") for x in ("", ".ko"))
    assert [c for _, _, c in pieces(english)] == [c for _, _, c in pieces(korean)]
    table(workplace)
    monkeypatch.setattr("sys.stdin", io.StringIO("수도는?\n"))
    run_page(leyden, workplace, "walkthrough.md")
    assert (workplace / "aligned" / "README.md").is_file() and (workplace / "report.html").is_file()


def test_the_first_page_runs(leyden, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an empty folder to an aligned model that answers."""
    for left in workplace.iterdir():
        left.unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO("수도는?\n"))
    run_page(leyden, workplace, "index.md")
    assert (workplace / "runs/dpo/export/model.safetensors").is_file()


def test_the_page_on_distillation_runs(leyden, workplace: Path) -> None:
    run_page(leyden, workplace, "distillation.md")


def test_korean_twins_have_the_blocks_of_their_pages_and_are_linked() -> None:
    index = (ROOT / "README.ko.md").read_text(encoding="utf-8")
    twins = sorted((ROOT / "docs").glob("*.ko.md"))
    names = {page.name.removesuffix(".md") for page in (ROOT / "docs").glob("*.md")}
    assert {f"{name}.ko" for name in names if "." not in name} == {twin.stem for twin in twins}
    for twin in twins:
        page = twin.with_name(twin.name.replace(".ko.md", ".md"))
        english, korean = page.read_text(encoding="utf-8"), twin.read_text(encoding="utf-8")
        assert [block[1:] for block in pieces(english)] == [block[1:] for block in pieces(korean)], twin.name
        assert f"](docs/{twin.name})" in index or twin.name == "index.ko.md"  # the site's first page, as README is
        assert f"]({page.name})" in korean and f"]({twin.name})" in english
        table = re.compile(r"^\|.*\d.*\|$", re.MULTILINE)
        numbers = [[re.findall(r"\d[\d.]*", row) for row in table.findall(text)] for text in (english, korean)]
        if twin.name == "architectures.ko.md":  # the table of a row a model stands in English alone, its sums in both
            sums = [text[text.index("transformers 5.") :].partition("\n\n")[0] for text in (english, korean)]
            numbers = [re.findall(r"\d[\d.]*\d", text) for text in sums]
        assert numbers[0] == numbers[1], twin.name


DEVICES = "<!-- needs several devices -->\n"
"""Stands before what one process cannot run."""


def test_the_page_on_devices_runs(leyden, workplace: Path) -> None:
    from prepared import write

    write(workplace / "chat.jsonl", [{"prompt": f"{i}?", "response": f"{i}."} for i in range(12)])
    write(workplace / "pairs.jsonl", [{"prompt": f"{i}?", "chosen": f"{i}.", "rejected": "?"} for i in range(12)])
    write(workplace / "prompts.jsonl", [{"prompt": f"{i}?"} for i in range(12)])
    text = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")
    several = re.findall(rf"{re.escape(DEVICES)}```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for _, _, content in pieces(text) if content not in several for line in content.splitlines()]
    assert len(lines) == 3 and len(several) == 3
    few = ["--data.max_length", "64", "--model.policy.dtype", "float32"]  # not every processor is fast in bfloat16
    for line in lines:
        words = shlex.split(line)[1:]
        sampled = ["--model.sampling.max_new_tokens", "4", "--data.val_fraction", "0"] if "ppo" in words else []
        code, _, error = leyden(*words, *SHORT, *few, *sampled)
        assert code == 0, (line, error)
    assert (workplace / "runs/one-base/export/adapter_model.safetensors").is_file()
    for line in "".join(several).splitlines():  # as far as reading them goes
        words = shlex.split(line)
        words = words[words.index("fit") :]
        at = words.index("--trainer.devices")
        code, printed, error = leyden(*words[:at], *words[at + 2 :], "--print_config")
        assert code == 0 and "strategy:" in printed, (line, error)


def test_the_page_on_engines_is_read(leyden, workplace: Path) -> None:
    """What needs vLLM as far as reading the flags goes; tests/test_real_vllm.py has the runs."""
    text = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    lines = [line for _, language, content in pieces(text) if language == "bash" for line in content.splitlines()]
    fits = [words[words.index("fit") :] for words in map(shlex.split, lines) if "fit" in words]
    samples = [shlex.split(line)[1:] for line in lines if line.startswith("leyden data")]
    assert len(fits) == 9 and len(samples) == 1 and leyden(*samples[0])[0] == 0
    for words in fits:
        at = words.index("--trainer.devices") if "--trainer.devices" in words else len(words)
        code, printed, error = leyden(*words[:at], *words[at + 2 :], "--print_config")
        assert code == 0, (words, error)
        model = yaml.safe_load(printed)["model"]["init_args"]
        name = "ColocatedVLLM" if "vllm_colocated" in words else "RayVLLM" if "ray_vllm" in words else "VLLM"
        assert model["engine"]["class_path"] == f"leyden.models.engines.{name}"
        assert model["lag"] == int("--model.lag" in words)
        if "--model.engine.url" in words:
            url = model["engine"]["init_args"]["url"]
            assert url == "http://HOST:8000" or url == ["http://HOST-1:8000", "http://HOST-2:8000"]


def test_the_page_on_memory_says_what_the_planner_says(
    leyden, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prepared import write

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import shapes
    from test_plan import ON_GPU, gigabytes, read

    from leyden.models.planner.alternatives import rule_of_thumb

    for name, shape in shapes.PUBLISHED.items():
        shapes.write(shape, workplace / name)
    write(workplace / "chat.jsonl", [{"prompt": f"{i}?", "response": f"{i}."} for i in range(12)])
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    blocks, said = pieces(text), list[str]()
    for line in (line for _, language, content in blocks if language == "bash" for line in content.splitlines()):
        words = shlex.split(line)[1:]
        few = [*SHORT, "--model.policy.dtype", "float32"] if words[0] == "fit" else []
        code, out, error = leyden(*words, *few)
        assert code == 0, (line, error)
        said.append(out)
    (shown,) = (content for _, language, content in blocks if language == "text")
    assert said[0].startswith(shown)
    rows = re.findall(r"^\| ([\w.-]+/[\w.-]+) \| (.*) \|$", text, re.MULTILINE)
    assert {name: [float(cell) for cell in cells.split(" | ")] for name, cells in rows} == gigabytes()
    for name in ("meta-llama/Llama-2-7b-hf", "Qwen/Qwen3-8B"):
        rule = rule_of_thumb(read("--config", "sft", "--model.policy.path", name, *ON_GPU))
        full, lora, qlora = (f"{rule[way] / 1e9:.1f}" for way in ("full, bfloat16", "LoRA on bfloat16", "QLoRA"))
        assert f"{full}, {lora} and {qlora}" in text


def test_the_map_names_files_that_there_are() -> None:
    """Paths may leave out the top-level folder, or begin in the room that the sentence is about."""
    files = [str(file.relative_to(ROOT)) for file in ROOT.rglob("*.py") if ".venv" not in file.parts]
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "checkpoints.md", ROOT / "docs" / "your-own-parts.md"):
        named = [name for name in re.findall(r"`([\w/]+\.py)`", page.read_text(encoding="utf-8")) if "my_" not in name]
        assert named and [name for name in named if not any(f"/{file}".endswith(f"/{name}") for file in files)] == []
