"""`leyden benchmark` beside lm-eval's own Hugging Face model: the same numbers, from the same requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import tiny_config
from small import save_llama
from tasks import answer_task, choice_task, choices, text_task

pytest.importorskip("lm_eval", reason="needs lm-eval: make test-extras")

from jinja2.exceptions import SecurityError, UndefinedError  # noqa: E402
from lm_eval import evaluator, utils  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from leyden.cli.launcher import main  # noqa: E402
from leyden.data.tokenizer import load_tokenizer  # noqa: E402
from leyden.errors import UserError  # noqa: E402
from leyden.models import CausalLM  # noqa: E402
from leyden.models.benchmark.evaluate import Settings, prepare, seeded  # noqa: E402
from leyden.models.benchmark.lm import PolicyLM  # noqa: E402
from leyden.models.benchmark.tasks import load  # noqa: E402
from leyden.models.benchmark.templates import sandboxed  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval's and its libraries' making
CLOSE = 1e-4


def save(folder: Path, kind: str, positions: int = 512) -> str:
    """A small model of random weights with the embedded tokenizer."""
    if kind == "llama":
        save_llama(folder, 0.1)
        return str(folder)
    tokenizer: Any = load_tokenizer("tiny")
    torch.manual_seed(0)
    config = tiny_config("llama" if kind == "short" else kind)
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    config.bos_token_id, config.pad_token_id = None, tokenizer.pad_token_id
    config.max_position_embeddings = 96 if kind == "short" else positions
    if kind == "gemma2":
        config.attn_logit_softcapping, config.final_logit_softcapping = 5.0, 3.0
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    choice_task(folder, "world", 10)
    choice_task(folder, "shots", 6, "ko", num_fewshot=3)
    choice_task(folder, "letters", 8, doc_to_text="{{question}}\n{% for one in choices %}{{'ABCD'[loop.index0]}}. "
                "{{one}}\n{% endfor %}Answer:", doc_to_choice=["A", "B", "C", "D"])  # fmt: skip
    choice_task(folder, "mutual", 4, metric_list=[{"metric": "acc_mutual_info", "aggregation": "mean",
                                                   "higher_is_better": True}])  # fmt: skip
    text_task(folder, count=4)
    answer_task(folder, count=6)
    return folder


def responses(lm: Any, folder: Path, name: str, **how: Any) -> dict[str, Any]:
    """Everything that a model said to a task's questions, and the measures."""
    seeded(1234)
    task = load([str(folder / f"{name}.yaml")]).tasks[name]
    prepare(task, Settings())
    found = evaluator.evaluate(lm=lm, task_dict={"tasks": {name: task}}, bootstrap_iters=0, **how)
    samples = found["samples"][name]
    numbers = {key: value for key, value in found["results"][name].items() if "," in key and "stderr" not in key}
    said, asked = ([one[key] for one in samples] for key in ("resps", "arguments"))
    return {"said": said, "asked": asked, "results": numbers}


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["asked"] == theirs["asked"]
    for mine, other in zip(ours["said"], theirs["said"], strict=True):
        for (one,), (two,) in zip(mine, other, strict=True):
            if isinstance(one, tuple):
                assert one[0] == pytest.approx(two[0], abs=CLOSE)
                assert one[1] == two[1]
            elif isinstance(one, float):
                assert one == pytest.approx(two, rel=1e-6, abs=CLOSE)
            else:
                assert one == two
    for key, value in theirs["results"].items():
        assert ours["results"][key] == pytest.approx(value, rel=1e-6, abs=CLOSE), key


KINDS = ("llama", "gpt2", "gemma2", "short", "rows")


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PolicyLM, HFLM]:
    path = save(tmp_path_factory.mktemp("model"), "llama" if request.param == "rows" else request.param)
    policy = CausalLM(path, attention="rows" if request.param == "rows" else "auto")
    policy.build()
    more = {"attn_implementation": "eager"} if request.param == "gemma2" else {}  # others leave the cap out
    theirs = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=4, **more)
    return PolicyLM(policy, batch_tokens=256), theirs


@pytest.mark.parametrize("name", ["world", "shots", "letters", "mutual", "texts", "sums"])
def test_numbers_are_those_of_lm_eval(both: tuple[PolicyLM, HFLM], folder: Path, name: str) -> None:
    ours, theirs = both
    assert ours.max_length == theirs.max_length
    same(responses(ours, folder, name), responses(theirs, folder, name))


@pytest.mark.parametrize("multiturn", [True, False])
def test_a_chat_template_is_applied_as_lm_eval_does(both: Any, folder: Path, multiturn: bool) -> None:
    ours, theirs = both
    how = dict(apply_chat_template=True, fewshot_as_multiturn=multiturn, system_instruction="Be brief.")
    for name in ("shots", "sums"):
        same(responses(ours, folder, name, **how), responses(theirs, folder, name, **how))
    assert ours.tokenizer_name == theirs.tokenizer_name
    assert ours.chat_template(True) == theirs.chat_template(True)


@pytest.mark.parametrize("bos", [None, True, False])
def test_bos_stands_where_lm_eval_puts_it(tmp_path: Path, bos: bool | None) -> None:
    path = save(tmp_path, "llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(5)
    tokenizer.save_pretrained(path)
    policy = CausalLM(path)
    policy.build()
    ours, theirs = PolicyLM(policy, add_bos_token=bos), HFLM(path, device="cpu", dtype="float32", add_bos_token=bos)
    begun = f"{tokenizer.bos_token}Good day"
    pairs = [("Good day", " friend"), ("Good day  ", "friend"), (begun, " friend"), ("", " friend")]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for mine, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert mine == (pytest.approx(other[0], abs=CLOSE), other[1])
    (blank,) = ours.loglikelihood([Instance("loglikelihood", {}, ("\n", "x"), 0)])  # which stops lm-eval
    assert blank[0] < 0
    for text in ("Good day", begun, " x ", ""):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special)
    answers = [Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 6}), 0) for text in ("Hi", begun)]
    assert ours.generate_until(answers) == [theirs.generate_until([one])[0] for one in answers]


def test_a_choice_that_is_most_probable_is_greedy(tmp_path: Path) -> None:
    policy = CausalLM("tiny")
    policy.build()
    ours, theirs = PolicyLM(policy), HFLM(policy.tokenizer.name_or_path, device="cpu", dtype="float32")
    start, how = "한국의 수도는", {"until": [], "max_gen_toks": 3}
    (text,) = ours.generate_until([Instance("generate_until", {}, (start, how), 0)])
    asked = [Instance("loglikelihood", {}, (start, end), 0) for end in (text, "x")]
    assert [greedy for _, greedy in ours.loglikelihood(asked)] == [True, False]
    assert [greedy for _, greedy in theirs.loglikelihood(asked)] == [True, False]


def test_what_the_sampler_does_not_have_is_refused() -> None:
    policy = CausalLM("tiny")
    policy.build()
    lm = PolicyLM(policy)
    with pytest.raises(UserError, match="num_beams 4"):
        lm.generate_until([Instance("generate_until", {}, ("a", {"until": [], "num_beams": 4}), 0)])
    with pytest.raises(UserError, match="max_gen_toks 4000"):
        lm.generate_until([Instance("generate_until", {}, ("a", {"until": [], "max_gen_toks": 4000}), 0)])
    with pytest.raises(UserError, match="a choice has 0 tokens"):
        lm.loglikelihood([Instance("loglikelihood", {}, ("a", ""), 0)])
    how = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    drawn = [lm.generate_until([Instance("generate_until", {}, ("a", how), 0)] * 3) for _ in range(2)]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1


# -- the command -------------------------------------------------------------------------------------------------------


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    return found


def test_the_command_keeps_what_is_done_and_merges(leyden: Any, folder: Path, tmp_path: Path) -> None:
    world, texts = (str(folder / f"{name}.yaml") for name in ("world", "texts"))
    code, out, error = leyden("benchmark", "tiny", "--tasks", world, "--limit", 4)
    assert code == 0, error
    file = Path("runs/benchmark-tiny")
    first = results(file)["tasks"]["world"]
    assert first["questions"] == 4 and len(first["outcomes"]["acc"]) == 4 and first["limit"] == 4
    assert "acc_norm" in out and str(file / "benchmark.json") in out
    code, out, error = leyden("benchmark", "tiny", "--tasks", f"{world},{texts}", "--limit", 4)
    assert code == 0 and "world is in" in out and results(file)["tasks"]["world"] == first
    assert set(results(file)["tasks"]) == {"world", "texts"}
    code, out, error = leyden("benchmark", "tiny", "--tasks", world, "--num_fewshot", 2)
    assert code == 0 and results(file)["tasks"]["world"]["shots"] == 2
    code, out, _ = leyden("compare", "runs")
    assert code == 0 and "benchmark/world" in out and "benchmark/texts" in out


def test_several_models_and_those_that_are_not_whole(leyden: Any, folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    save_llama(tmp_path / "base", 0.1)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    policy = CausalLM(str(tmp_path / "base"), adapter=lora)
    policy.build()
    policy.save(tmp_path / "adapter")
    task = str(folder / "world.yaml")
    code, _, error = leyden("benchmark", "base", "adapter", "--tasks", task, "--output", "out")
    assert code == 0, error
    base, adapter = (results(tmp_path / "out" / name)["tasks"]["world"] for name in ("base", "adapter"))
    assert base["model"] != adapter["model"] and base["documents"] == adapter["documents"]
    theirs = HFLM(str(tmp_path / "base"), peft=str(tmp_path / "adapter"), device="cpu", dtype="float32", batch_size=4)
    found = responses(theirs, folder, "world")
    same(responses(PolicyLM(policy), folder, "world"), found)
    assert adapter["metrics"]["acc"]["value"] == pytest.approx(found["results"]["acc,none"])


def test_a_run_over_four_bits_is_asked_over_four_bits(leyden: Any, folder: Path, tmp_path: Path) -> None:
    save_llama(tmp_path / "base", 0.1)
    rows = [{"prompt": f"Say {n}.", "response": str(n)} for n in range(8)]
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, _, error = leyden(
        "fit", "--config", "sft", "--config", "qlora", "--data.path", "chat.jsonl", "--data.batch_size", 4,
        "--model.policy.path", "base", "--trainer.max_steps", 2, "--trainer.default_root_dir", "runs/q",
        "--trainer.accelerator", "cpu",
    )  # fmt: skip
    assert code == 0, error
    code, _, error = leyden("benchmark", "runs/q", "--tasks", str(folder / "world.yaml"), "--limit", 3)
    assert code == 0, error
    record = results(Path("runs/q"))["tasks"]["world"]
    assert record["settings"]["dtype"] == "4 bits"
    code, _, error = leyden(
        "benchmark",
        "runs/q",
        "--tasks",
        str(folder / "world.yaml"),
        "--limit",
        3,
        "--checkpoint",
        "last",
        "--output",
        "l",
    )
    assert code == 0, error
    last = results(Path("l"))["tasks"]["world"]
    assert last["outcomes"] == record["outcomes"] and last["settings"]["dtype"] == "4 bits"


def test_a_killed_command_goes_on_with_the_tasks_that_are_left(folder: Path, tmp_path: Path) -> None:
    """It is killed in its second task, and the first is not asked again."""
    code = (
        "import os, sys\nfrom leyden.models.benchmark import session\nask = session.run\n"
        "def run(task, *rest):\n"
        "    os.kill(os.getpid(), 9) if task.task_name == 'texts' else None\n    return ask(task, *rest)\n"
        "session.run = run\nfrom leyden.cli.launcher import main\nmain(sys.argv[1:])"
    )
    command = ["benchmark", "tiny", "--tasks", *(str(folder / f"{name}.yaml") for name in ("world", "texts"))]
    done = subprocess.run([sys.executable, "-c", code, *command, "--output", str(tmp_path)], capture_output=True)
    assert done.returncode == -9
    first = results(tmp_path)
    assert set(first["tasks"]) == {"world"}
    assert main([*command, "--output", str(tmp_path)]) == 0
    assert set(results(tmp_path)["tasks"]) == {"world", "texts"}
    assert results(tmp_path)["tasks"]["world"] == first["tasks"]["world"]


def test_a_group_of_local_tasks_is_aggregated_as_lm_eval_does(leyden: Any, tmp_path: Path) -> None:
    for name, count in (("one", 5), ("two", 9)):
        choice_task(tmp_path / "own", name, count, "ko" if name == "two" else "en")
    for weighted in (True, False):
        (tmp_path / "own" / "all.yaml").write_text(
            f"group: all\ntask: [one, two]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: {weighted}\n"
            "metadata:\n  version: 3.0\n",
            encoding="utf-8",
        )
        code, out, error = leyden("benchmark", "tiny", "--tasks", str(tmp_path / "own"))
        assert code == 0, error
        found = results(Path("runs/benchmark-tiny"))
        acc = {name: found["tasks"][name]["metrics"]["acc"] for name in ("one", "two")}
        sizes = {"one": 5, "two": 9} if weighted else {"one": 1, "two": 1}
        mean = sum(acc[name]["value"] * size for name, size in sizes.items()) / sum(sizes.values())
        group = found["groups"]["all"]
        assert group["metrics"]["acc"]["value"] == pytest.approx(mean)
        assert group["metrics"]["acc"]["kind"] == ("weighted" if weighted else "unweighted")
        assert group["version"] == "3.0" and found["tasks"]["one"]["group"] == "all"
    code, out, _ = leyden("compare", "runs")
    assert "benchmark/all" in out and "benchmark/one" not in out
    (tmp_path / "own" / "inner" / "deep").mkdir(parents=True)  # which a file does not speak of
    (tmp_path / "own" / "inner" / "deep" / "stray.yaml").write_text("task: [", encoding="utf-8")
    (tmp_path / "own" / "stray.yaml").write_text("task: stray\nprocess_docs: !function no.such\n", encoding="utf-8")
    code, _, error = leyden("benchmark", "tiny", "--tasks", "own/all.yaml", "--output", "o")
    assert code == 0, error
    assert results(Path("o"))["groups"]["all"]["metrics"] == group["metrics"]
    with (tmp_path / "own" / "two.yaml").open("a", encoding="utf-8") as file:
        file.write("process_docs: !function no.such\n")
    code, _, error = leyden("benchmark", "tiny", "--tasks", "own/all.yaml", "--output", "o")
    assert code == 2 and "two.yaml: it runs Python of its own (no.such)" in error


def test_mistakes_in_tasks_are_one_line(leyden: Any, folder: Path, tmp_path: Path) -> None:
    choice_task(tmp_path / "own", "mine", 4)
    text = (tmp_path / "own" / "mine.yaml").read_text(encoding="utf-8")
    files = {
        "code.yaml": text + "process_docs: !function helper.run\n",
        "by_class.yaml": "task: x\nclass: !function helper.Task\n",
        "script.yaml": "task: y\nmetric_list:\n  - metric: ./evil\n",
        "hub.yaml": "task: z\nmetric_list:\n  - {metric: acc, hf_evaluate: true}\n",
        "including.yaml": "include: code.yaml\ntask: other\n",
        "broken.yaml": "task: [\n",
        "nameless.yaml": "dataset_path: json\n",
        "away.yaml": "task: away\ndataset_path: nobody/nothing-here\ntest_split: test\ndoc_to_text: x\n",
        "gone.yaml": text.replace("mine.jsonl", "gone.jsonl"),
        "data.jsonl": '{"question": "What?"}\n',
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    expected = {
        "code.yaml": ["runs Python of its own (helper.run)", "--allow_code"],
        "by_class.yaml": ["helper.Task"],
        "script.yaml": ["runs Python of its own (metric ./evil)", "--allow_code"],
        "hub.yaml": ["metric acc"],
        "including.yaml": ["helper.run"],
        "broken.yaml": ["broken.yaml:2", "no YAML"],
        "nameless.yaml": ["task: nameless"],
        "away.yaml": ["nobody/nothing-here", "cannot be reached", "datasets.load_dataset('nobody/nothing-here')"],
        "gone.yaml": ["gone.jsonl", "cannot be found"],
        "missing.yaml": ["no such file"],
        "data.jsonl": ["--tasks data.jsonl: no YAML file of a task", "such as data.yaml"],
        "./data.jsonl": ["no YAML file of a task"],
        "./empty": ["no YAML file in it"],
    }
    for name, parts in expected.items():
        code, _, error = leyden("benchmark", "tiny", "--tasks", name)
        assert code == 2 and error.count("\n") == 1, (name, error)
        assert all(part in error for part in parts), (name, error)
    choice_task(tmp_path / "twin", "mine", 4)
    code, _, error = leyden("benchmark", "tiny", "--tasks", "own/mine.yaml", "twin/mine.yaml")
    assert code == 2 and "a task named mine, as in" in error and error.count("\n") == 1
    (tmp_path / "helper.py").write_text("def run(rows):\n    return rows\n", encoding="utf-8")
    assert leyden("benchmark", "tiny", "--tasks", "code.yaml", "--allow_code", "--output", "o")[0] == 0


@pytest.mark.parametrize(
    "code",
    [
        "cycler.__init__.__globals__.os.system('touch PWNED')",
        "question.format.__self__.__class__.__base__.__subclasses__()",
        "cycler|attr('__init__')",
        "'{0.__class__.__base__}'.format(question)",
    ],
)
def test_a_template_runs_no_python_unless_it_may(leyden: Any, tmp_path: Path, code: str) -> None:
    later = f"{{% if question == {choices(4)[3]['question']!r} %}}{{{{ {code} }}}}{{% endif %}}"
    for name, template in {"first": f"{{{{ {code} }}}}", "later": later}.items():
        file = choice_task(tmp_path, name, 4, doc_to_text=template + " {{question}}")
        status, _, error = leyden("benchmark", "tiny", "--tasks", str(file))
        assert status == 2 and error.count("\n") == 1, error
        assert f"{name}: a template of it would run Python" in error and "--allow_code" in error
    assert not Path("PWNED").exists()
    status, _, error = leyden("benchmark", "tiny", "--tasks", str(file), "--allow_code")
    assert status == 0 and Path("PWNED").exists() == ("PWNED" in code), error


def test_the_sandbox_renders_as_lm_eval_does() -> None:
    doc = {"question": "What?", "choices": ["a", "b"], "more": {"items": 3, "name": "x"}, "n": 2}
    template = (
        "{% set seen = namespace(n=0) %}{% for one in choices %}{{'ABCD'[loop.index0]}}. {{one.upper()}} "
        "{{ loop.cycle('x', 'y') }}{% set seen.n = seen.n + 1 %}\n{% endfor %}{{ seen.n }}{{ more['items'] }}"
        "{{ more.name | regex_replace('x', 'y') }}{{ question.replace('W', 'w').split('a')[0] }}{{ '%02d' % n }}"
        "{{ choices.index('b') }}{% for key, value in more.items() %}{{ key }}{% endfor %}{{ '{} b'.format(n) }}\n"
    )
    plain, theirs = utils.apply_template(template, doc), utils.env
    with sandboxed():
        assert utils.env is not theirs and utils.apply_template(template, doc) == plain
        with pytest.raises(UndefinedError):
            utils.apply_template("{{ gone }}", doc)
        with pytest.raises(SecurityError):
            utils.apply_template("{{ picture.touch() }}", {"picture": Path("PWNED")})
    assert utils.env is theirs and not Path("PWNED").exists()


def test_an_unknown_task_has_its_nearest_names() -> None:
    with pytest.raises(UserError, match=r"lm-eval has no such task; nearest are .*kmmlu_direct_law"):
        load(["kmmlu_direct_lw"])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("kmmlu", "HAERAE-HUB/KMMLU"), ("haerae", "HAERAE-HUB/HAE_RAE_BENCH"), ("kobest", "skt/kobest_v1"),
        ("click", "EunsuKim/CLIcK"), ("hrm8k", "HAERAE-HUB/HRM8K"),
    ],
)  # fmt: skip
def test_the_korean_suites_are_known_and_say_what_to_download(name: str, data: str) -> None:
    """All members of each suite are found; without a network one line says what is missing."""
    with pytest.raises(UserError, match=f"its data {data}.*cannot be reached.*load_dataset"):
        load([name])


@pytest.mark.parametrize("offline", ["0", "1"])
def test_data_that_cannot_be_reached_are_one_line(tmp_path: Path, offline: str) -> None:
    """Nothing answers at the address of the hub; retries are not waited for, and not shown."""
    code = "import sys, time\ntime.sleep = lambda _: None\nfrom leyden.cli.launcher import main\n"
    code += "sys.exit(main(sys.argv[1:]))"
    told = {"HF_HUB_OFFLINE": offline, "HF_DATASETS_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", code, "benchmark", "tiny", "--tasks", "arc_easy"]
    env = os.environ | told | {"HF_HOME": str(tmp_path), "LEYDEN_LANG": "en"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("reading tasks")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "arc_easy: its data allenai/ai2_arc ARC-Easy cannot be reached (Couldn't reach" in lines[0]
    assert "datasets.load_dataset('allenai/ai2_arc', 'ARC-Easy')" in lines[0] and "None" not in lines[0]


def test_code_that_a_model_writes_runs_only_where_it_may() -> None:
    with pytest.raises(UserError, match="humaneval: it runs code that the model writes.*--allow_code"):
        load(["humaneval"])


def test_examples_that_a_task_forbids_are_refused(folder: Path, tmp_path: Path) -> None:
    file = choice_task(tmp_path, "none", 3, num_fewshot=0)
    (task,) = load([str(file)]).tasks.values()
    with pytest.raises(UserError, match="--num_fewshot 2: none is asked without examples"):
        prepare(task, Settings(shots=2))


def test_the_page_on_benchmarks_as_written(leyden: Any, tmp_path: Path) -> None:
    """The task of one's own; what needs a network is read."""
    import shlex

    from commands import BLOCK

    text = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    ran = 0
    for needs, language, content in (match.groups() for match in BLOCK.finditer(text)):
        if language in ("json", "yaml"):
            Path(f"capitals.{'jsonl' if language == 'json' else 'yaml'}").write_text(content, encoding="utf-8")
        for line in content.splitlines() if needs and "network" not in needs else ():
            code, out, error = leyden(*shlex.split(line)[1:])
            assert code == 0, (line, error)
            ran += 1
    assert ran == 2 and "benchmark/capitals" in out
