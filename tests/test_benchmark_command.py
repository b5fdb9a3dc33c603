"""`leyden benchmark` without lm-eval: scores of continuations, the file of results, mistakes, and `leyden compare`."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from small import small

from leyden.compare.comparison import Comparison, compare
from leyden.compare.influence import error_of, influences
from leyden.compare.paired import differences
from leyden.compare.run import RunFiles, read_run
from leyden.errors import UserError
from leyden.models.benchmark import scores
from leyden.models.benchmark.logged import log_results
from leyden.models.benchmark.opening import opened
from leyden.models.benchmark.results import FILE, Results, results_folder
from leyden.models.benchmark.scores import Request, grouped, score
from leyden.policy import Sampling
from leyden.run import folder as folder_module
from leyden.run.folder import claim_folder
from leyden.run.metrics_csv import Tracker

# -- scores ------------------------------------------------------------------------------------------------------------


def requests() -> list[Request]:
    """Contexts of several lengths, with choices that begin alike, are contained in others, or have one token."""
    draw = random.Random(0)
    found = []
    for _ in range(6):
        context = [draw.randrange(97) for _ in range(draw.randint(1, 9))]
        start = [draw.randrange(97) for _ in range(3)]
        found += [Request(context, [token]) for token in (3, 4, 5, 3)]
        found += [Request(context, start[:n]) for n in (1, 2, 3)] + [
            Request(context, [*start, 7, 8]),
            Request(context, [9, 9]),
        ]
    draw.shuffle(found)
    return found


def by_itself(policy: Any, request: Request) -> tuple[float, bool]:
    """The score of a request from the model's own logits over the whole text."""
    ids = torch.tensor([[*request.context, *request.continuation]])
    policy.model.eval()
    with torch.no_grad(), policy.backbone.native_attention():
        logits = policy.model(ids, use_cache=False).logits[0].float()
    policy.train()
    rows = logits[len(request.context) - 1 : -1]
    target = ids[0, len(request.context) :]
    return float(rows.log_softmax(-1).gather(-1, target[:, None]).sum()), bool((rows.argmax(-1) == target).all())


@pytest.mark.parametrize("attention", ["auto", "rows"])
@pytest.mark.parametrize("budget", [4, 24, 4096])
def test_scores_are_those_of_each_text_alone(attention: str, budget: int) -> None:
    policy, asked, done = small(attention=attention), requests(), list[int]()
    found = score(policy, asked, budget, done.append)
    for request, one in zip(asked, found, strict=True):
        logp, greedy = by_itself(policy, request)
        assert one.logp == pytest.approx(logp, abs=1e-4)
        assert one.greedy == greedy
    assert sum(done) == len(asked)
    assert policy.training


def test_the_most_probable_continuation_is_greedy() -> None:
    policy = small()
    (responses,) = policy.generate([[5, 6, 7]], sampling=Sampling(4, 0.0))
    tokens = responses[0].tokens
    first, second = score(
        policy, [Request([5, 6, 7], tokens), Request([5, 6, 7], [*tokens[:-1], (tokens[-1] + 1) % 97])]
    )
    assert first.greedy and not second.greedy
    assert first.logp == pytest.approx(sum(responses[0].logp), abs=1e-4)


def test_a_context_is_run_once_and_no_last_token_at_all() -> None:
    asked = [
        Request([1, 2, 3], [4]),
        Request([1, 2, 3], [5]),
        Request([1, 2, 3], [6, 7, 8]),
        Request([1, 2, 3], [6, 9]),
    ]
    (group,) = grouped(asked, 100)
    assert (group.context, group.inputs) == ([1, 2, 3], [[6, 7]])
    letters, other = grouped([Request([1, 2], [n]) for n in range(4)] + [Request([1], [2])], 100)
    assert (letters.inputs, len(letters), len(other)) == ([], 2, 1)


def test_a_context_with_many_continuations_is_cut_at_the_budget() -> None:
    asked = [Request([1, 2], [n, n, n]) for n in range(10)]
    groups = grouped(asked, 8)
    assert all(len(group) <= 8 for group in groups)
    assert sorted(number for group in groups for number, _, _ in group.asked) == list(range(10))


def test_a_model_of_a_few_positions_reads_all_of_them() -> None:
    """The last token of a continuation needs no position, since it is not run."""
    policy = small("gpt2", "GPT2Config", dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=12))
    request = Request(list(range(10)), [5, 6, 7])  # 13 tokens
    assert score(policy, [request])[0].logp < 0
    with pytest.raises(IndexError):
        by_itself(policy, request)


def test_a_head_is_applied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, asked = small(), requests()
    whole = score(policy, asked)
    monkeypatch.setattr(
        scores, "chunks", lambda rows, vocabulary: [slice(i, min(i + 7, rows)) for i in range(0, rows, 7)]
    )
    monkeypatch.setattr(scores, "blocks", lambda x: [slice(i, min(i + 2, len(x))) for i in range(0, len(x), 2)])
    for one, two in zip(whole, score(policy, asked), strict=True):
        assert one.logp == pytest.approx(two.logp, abs=1e-5)
        assert one.greedy == two.greedy


def test_an_answer_ends_where_it_is_told_to() -> None:
    from leyden.models.generation.generate import generate
    from leyden.policy import Sampling

    policy, how = small(), Sampling(8, 0.0)
    (whole,) = generate(policy, policy.backbone, [[5, 6]], 1, how)[0]
    stop = whole.tokens[2]
    (cut,) = generate(policy, policy.backbone, [[5, 6]], 1, how, ended=lambda tokens: tokens[-1] == stop)[0]
    assert cut.tokens == whole.tokens[: whole.tokens.index(stop) + 1] and cut.finished


# -- influence ---------------------------------------------------------------------------------------------------------


def test_the_error_of_a_mean_is_the_usual_one() -> None:
    outcomes = [1, 0, 0, 1, 1, 0.5]
    assert error_of("mean", outcomes) == pytest.approx(stdev(outcomes) / math.sqrt(6))
    assert error_of("mean", [1]) == 0


@pytest.mark.parametrize("kind", ["bits", "perplexity"])
def test_influence_is_the_derivative_in_a_question_s_weight(kind: Any) -> None:
    """Weigh question i by 1 + h: what the measure changes by is u_i h / n, up to h²."""
    draw, h = random.Random(1), 1e-6
    pairs = [(-draw.uniform(5, 60), draw.randint(3, 40)) for _ in range(7)]

    def measure(weights: list[float]) -> float:
        quotient = sum(k * x for k, (x, _) in zip(weights, pairs, strict=True)) / sum(
            k * w for k, (_, w) in zip(weights, pairs, strict=True)
        )
        return -quotient / math.log(2) if kind == "bits" else math.exp(-quotient)

    found = influences(kind, pairs)
    assert fmean(found) == pytest.approx(0, abs=1e-9)
    for i, influence in enumerate(found):
        moved = measure([1.0 + h * (i == j) for j in range(7)])
        assert (moved - measure([1.0] * 7)) / h * 7 == pytest.approx(influence, rel=1e-3)


# -- the file of results -----------------------------------------------------------------------------------------------


def record(outcomes: list[float], **changes: Any) -> dict[str, Any]:
    usual = {
        "version": "1.0", "task": "aaaa1111aaaa1111", "template": "", "shots": 0, "seed": 1234, "limit": None,
        "questions": len(outcomes), "documents": "dddd", "prompts": "pppp", "lm_eval": "0.4.13", "metric": "acc",
        "metrics": {
            "acc": {"value": fmean(outcomes), "error": error_of("mean", outcomes), "best": "most", "kind": "mean"},
            "f1": {"value": 0.5, "error": 0.1, "best": "most", "kind": "other"},
        },
        "outcomes": {"acc": outcomes},
        "model": "mmmm", "settings": {"dtype": "float32"},
    }  # fmt: skip
    return usual | changes


def test_results_are_merged_and_kept(tmp_path: Path) -> None:
    results = Results(tmp_path / "run")
    assert results.read() == {"tasks": {}, "groups": {}}
    results.add("tasks", "one", record([1, 0]))
    results.add("tasks", "two", record([1, 1]))
    results.add("groups", "both", {"tasks": ["one", "two"]})
    results.add("groups", "other", {"tasks": ["two"]})
    found = Results(tmp_path / "run").read()
    assert list(found["tasks"]) == ["one", "two"] and list(found["groups"]) == ["both", "other"]
    results.add("tasks", "one", record([0, 0]))
    found = results.read()
    assert found["tasks"]["one"]["outcomes"]["acc"] == [0, 0] and found["tasks"]["two"]["outcomes"]["acc"] == [1, 1]
    assert list(found["groups"]) == ["other"]  # of which the other is made of what is there


def test_a_task_is_done_where_it_was_asked_in_this_way_of_this_model(tmp_path: Path) -> None:
    results, known = Results(tmp_path), record([1, 0])
    results.add("tasks", "one", known)
    assert results.done("one", known) == known
    assert results.done("two", known) is None
    for key in ("version", "task", "template", "shots", "seed", "limit", "lm_eval", "model", "settings"):
        assert results.done("one", known | {key: "other"}) is None, key


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom leyden.models.benchmark.results import Results\n"
        "for i in range(15): Results(Path(sys.argv[1])).add('tasks', f'{sys.argv[2]}{i}', {'metric': 'acc'})\n"
    )
    each = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "ab"]
    assert [one.wait() for one in each] == [0, 0]
    assert len(Results(tmp_path).read()["tasks"]) == 30


def test_a_damaged_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"tasks": {"one"', encoding="utf-8")
    with pytest.raises(UserError, match="damaged.*move it away"):
        Results(tmp_path).add("tasks", "two", {})
    assert (tmp_path / FILE).read_text(encoding="utf-8") == '{"tasks": {"one"'


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")  # which not even root writes below
    with pytest.raises(UserError, match="cannot be written"):
        Results(tmp_path / "file").add("tasks", "two", {})


def test_results_go_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "dpo"
    (run / "export").mkdir(parents=True)
    (run / "config.yaml").write_text("{}", encoding="utf-8")
    assert results_folder("runs/dpo", None, False) == Path("runs/dpo")
    assert results_folder(str(run / "export"), None, True) == run
    assert results_folder("tiny", None, False) == Path("runs/benchmark-tiny")
    assert results_folder("org/Some-Model", None, False) == Path("runs/benchmark-Some-Model")
    assert results_folder("tiny", "out", False) == Path("out")
    assert results_folder("runs/dpo", "out", True) == Path("out/dpo")


class Remembered(Tracker):
    """A tracker that writes down what it is given."""

    name, version = "remembered", ""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file, self.given = Path(file), list[Any]()

    def begin(self, folder: Path, config: Any, facts: Any) -> None:
        self.given.append([folder.name, facts["algorithm"]])

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.given.append([metrics, step])

    def finalize(self, status: str) -> None:
        self.file.write_text(json.dumps([*self.given, status]), encoding="utf-8")


def test_results_are_logged_where_the_run_logs(tmp_path: Path) -> None:
    run = make(tmp_path / "run", {})
    logger = {"class_path": "test_benchmark_command.Remembered", "init_args": {"file": str(tmp_path / "said")}}
    (run / "config.yaml").write_text(json.dumps({"trainer": {"logger": [logger, True]}}), encoding="utf-8")
    (run / "run.json").write_text('{"algorithm": "DPO"}', encoding="utf-8")
    log_results(run, {"world": 0.5})
    assert json.loads((tmp_path / "said").read_text("utf-8")) == [
        ["run", "DPO"], [{"benchmark/world": 0.5}, 4], "success",
    ]  # fmt: skip
    log_results(run, {"world": 0.25, "other": 1.0})
    lines = (run / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert lines == ["step,train/tokens,benchmark/world,benchmark/other", "5,100,0.25,1.0"]
    (found,) = read(run)  # which says nothing of how it was asked
    assert not [name for name in found.series if name.startswith("benchmark/")]
    before = sorted(tmp_path.rglob("*"))
    log_results(tmp_path, {"world": 0.5})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_trains_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path / "run", {})
    text = (run / "metrics.csv").read_text(encoding="utf-8")
    monkeypatch.setattr(folder_module, "_lock", functools.partial(folder_module._lock, seconds=0.1))
    training = claim_folder(str(run), "", resume=True, alone=True)
    log_results(run, {"world": 0.5})
    assert (run / "metrics.csv").read_text(encoding="utf-8") == text
    training.release()
    log_results(run, {"world": 0.5})
    assert "benchmark/world" in (run / "metrics.csv").read_text(encoding="utf-8")


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        (["tiny"], ["--tasks"]),
        (["tiny", "--tasks", "x", "--limit", "0"], ["--limit 0", "1 or more"]),
        (["tiny", "--tasks", "x", "--num_fewshot", "two"], ["--num_fewshot two"]),
        (["tiny", "--tasks", "x", "--fewshot_as_multiturn", "true"], ["--apply_chat_template"]),
        (["tiny", "--tasks", "x", "--add_bos_token", "maybe"], ["true or false"]),
        (["tiny", "--tasks", "x", "--dtype", "int8"], ["float32"]),
        (["tiny", "--tasks", "x", "--limt", "3"], ["did you mean '--limit'"]),
        (["./nowhere", "--tasks", "x"], ["no such model folder"]),
        (["tiny", "--tasks", "x", "--checkpoint", "last"], ["--output"]),
        (["tiny", "--tasks", "x", "--checkpoint", "last", "--dtype", "float32", "--output", "o"], ["leave it out"]),
    ],
)
def test_a_mistake_is_one_line(typed: list[str], parts: list[str], leyden) -> None:
    code, _, error = leyden("benchmark", *typed)
    assert code == 2 and error.count("\n") == 1
    assert all(part in error for part in parts), error


def test_lm_eval_that_is_missing_is_named(leyden, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else real(name, *rest)
    )
    code, _, error = leyden("benchmark", "tiny", "--tasks", "x")
    assert code == 2 and "pip install 'leyden[benchmark]'" in error and error.count("\n") == 1


def test_help_needs_neither_torch_nor_lm_eval() -> None:
    code = (
        "import sys\nfrom leyden.cli.launcher import main\nmain(['benchmark', '--help'])\n"
        "print(sorted({'torch', 'transformers', 'lm_eval'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--num_fewshot" in shown and shown.splitlines()[-1] == "[]"


def test_two_models_of_one_name_have_no_folder_in_common(leyden, tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent / "model").mkdir(parents=True)
        (tmp_path / parent / "model" / "config.json").write_text("{}", encoding="utf-8")
    typed = [str(tmp_path / parent / "model") for parent in ("one", "two")]
    code, _, error = leyden("benchmark", *typed, "--tasks", "x", "--output", "o")
    assert code == 2 and "the results of both would go to o/model" in error and error.count("\n") == 1


def test_a_checkpoint_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run's folder"):
        opened("tiny", checkpoint="last")


# -- leyden compare ----------------------------------------------------------------------------------------------------

DRAW = random.Random(3)
FIRST = [float(DRAW.random() < 0.5) for _ in range(200)]
BETTER = [max(x, float(DRAW.random() < 0.15)) for x in FIRST]


def make(folder: Path, tasks: dict[str, Any], groups: dict[str, Any] | None = None, run: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"tasks": tasks, "groups": groups or {}}
    (folder / FILE).write_text(json.dumps(content), encoding="utf-8")
    if run:
        (folder / "metrics.csv").write_text("step,train/tokens\n5,100\n", encoding="utf-8")
        config = {"model": {"class_path": "leyden.algos.DPO", "init_args": {"beta": len(folder.name)}}}
        (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    return folder


def read(*folders: Path) -> list[RunFiles]:
    return [read_run(folder, folder.name) for folder in folders]


def shown(comparison: Comparison) -> list[str]:
    return [column.column for column in comparison.columns if column.column.startswith("benchmark/")]


def test_a_task_is_a_column_with_its_interval(tmp_path: Path) -> None:
    found = compare(
        read(make(tmp_path / "a", {"world": record(FIRST)}), make(tmp_path / "bb", {"world": record(BETTER)}))
    )
    assert shown(found) == ["benchmark/world"]
    value = found.value(found.groups[0], "benchmark/world")
    assert value is not None and value.mean == fmean(BETTER) and value.source == "prompts"
    assert value.half == pytest.approx(1.959964 * error_of("mean", BETTER))
    assert found.notes() and not any("benchmark" in note for note in found.notes())


def test_runs_are_compared_on_the_same_questions(tmp_path: Path) -> None:
    """The interval of the difference is that of its values question by question."""
    found = compare(
        read(make(tmp_path / "a", {"world": record(FIRST)}), make(tmp_path / "bb", {"world": record(BETTER)}))
    )
    (one,) = differences(found)
    apart = [b - a for a, b in zip(FIRST, BETTER, strict=True)]
    assert (one.best, one.other, one.questions) == (found.groups[0].name, found.groups[1].name, 200)
    assert one.by == pytest.approx(fmean(apart))
    assert one.half == pytest.approx(1.959964 * stdev(apart) / math.sqrt(200))
    assert "open" not in str(one) and one.by > one.half
    separate = [found.value(group, "benchmark/world") for group in found.groups]
    assert separate[0].low < separate[1].high  # type: ignore[union-attr]  # which alone would leave it open
    (same,) = differences(compare(read(tmp_path / "a", make(tmp_path / "ccc", {"world": record(FIRST)}))))
    assert "do not differ" in str(same)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "2.0"}, "another version of the task: version 2.0"),
        ({"task": "bbbb"}, "another version of the task"),
        ({"template": "cccccccccc"}, "another chat template: cccccccc; the rest: none"),
        ({"shots": 5}, "another number of examples: 5, seed 1234; the rest: 0"),
        ({"documents": "eeee", "limit": 200}, "other questions: the first 200"),
    ],
)
def test_a_task_that_was_asked_otherwise_is_refused_column_by_column(tmp_path: Path, change: Any, reason: str) -> None:
    both = {"world": record(FIRST), "other": record(FIRST)}
    runs = [make(tmp_path / name, both) for name in ("a", "bb")]
    runs.append(make(tmp_path / "ccc", both | {"world": record(BETTER, **change)}))
    found = compare(read(*runs))
    assert [len(found.compared[f"benchmark/{name}"]) for name in both] == [2, 3]
    (note,) = [str(one) for one in found.refusals]
    assert note.startswith("benchmark/world: without ccc") and reason in note
    assert {one.column for one in differences(found) if "3" in one.other or "ccc" in one.other} <= {"benchmark/other"}


def test_another_seed_of_examples_matters_only_where_there_are_any(tmp_path: Path) -> None:
    for shots, compared in ((0, 2), (3, 0)):
        runs = [make(tmp_path / f"{shots}{name}", {"world": record(FIRST, shots=shots, seed=seed)})
                for name, seed in (("a", 1), ("bb", 2))]  # fmt: skip
        assert len(compare(read(*runs)).compared["benchmark/world"]) == compared


def test_a_group_is_a_column_and_its_tasks_have_to_be_asked_for(tmp_path: Path) -> None:
    def tasks(outcomes: list[float]) -> dict[str, Any]:
        parts = {"one": outcomes[:150], "two": outcomes[150:]}
        return {name: record(part, group="all", documents=name) for name, part in parts.items()}

    def group(outcomes: list[float], kind: str) -> dict[str, Any]:
        acc = {"value": fmean(outcomes), "error": 0.03, "best": "most", "kind": kind}
        return {
            "all": {"version": "1", "tasks": ["one", "two"], "questions": 200, "metric": "acc", "metrics": {"acc": acc}}
        }

    weighted = [make(tmp_path / name, tasks(x), group(x, "weighted")) for name, x in (("a", FIRST), ("bb", BETTER))]
    found = compare(read(*weighted))
    assert shown(found) == ["benchmark/all"]
    (one,) = differences(found)
    apart = [b - a for a, b in zip(FIRST, BETTER, strict=True)]
    variance = (150 * stdev(apart[:150]) ** 2 + 50 * stdev(apart[150:]) ** 2) / 200**2
    assert one.half == pytest.approx(1.959964 * math.sqrt(variance))
    plain = [make(tmp_path / name, tasks(x), group(x, "unweighted")) for name, x in (("a", FIRST), ("bb", BETTER))]
    (one,) = differences(compare(read(*plain)))
    variance = (stdev(apart[:150]) ** 2 / 150 + stdev(apart[150:]) ** 2 / 50) / 4
    assert one.half == pytest.approx(1.959964 * math.sqrt(variance))
    assert shown(compare(read(*plain), ["one", "benchmark/all"])) == ["benchmark/one", "benchmark/all"]
    assert shown(compare(read(*plain), ["benchmark/two/f1"])) == ["benchmark/two/f1"]
    changed = tasks(BETTER)
    changed["two"]["shots"] = 4
    other = compare(read(tmp_path / "a", make(tmp_path / "ccc", changed, group(BETTER, "weighted"))))
    assert "another" in str(other.refusals[0]) or "number of examples" in str(other.refusals[0])


def test_seeds_are_one_group_whose_questions_are_averaged(tmp_path: Path) -> None:
    seeds = [make(tmp_path / name, {"world": record(x)}) for name, x in (("a", FIRST), ("b", BETTER))]
    other = make(tmp_path / "other", {"world": record([1.0 - x for x in FIRST])})
    found = compare(read(*seeds, other))
    (one,) = differences(found)
    mean = [(a + b) / 2 for a, b in zip(FIRST, BETTER, strict=True)]
    apart = [m - (1 - x) for m, x in zip(mean, FIRST, strict=True)]
    assert one.seeds and one.half == pytest.approx(1.959964 * stdev(apart) / math.sqrt(200))
    assert "for these seeds" in str(one)


def test_a_model_that_was_not_trained_here_is_compared(leyden, tmp_path: Path) -> None:
    make(tmp_path / "runs" / "benchmark-base", {"world": record(FIRST)}, run=False)
    make(tmp_path / "runs" / "dpo", {"world": record(BETTER)})
    code, out, error = leyden("compare", str(tmp_path / "runs"))
    assert code == 0, error
    assert "benchmark/world" in out and "benchmark-base" in out and "missing" not in out
    assert "on the same 200 questions" in out
    page = Path("report.html").read_text(encoding="utf-8")
    assert "benchmark/world" in page and "on the same 200 questions" in page


def test_damaged_results_are_named_and_left_out(tmp_path: Path) -> None:
    broken = record(FIRST)
    del broken["metrics"]["acc"]["value"]
    run = make(tmp_path / "a", {"world": record(FIRST), "broken": broken, "odd": 3})
    (found,) = read(run)
    assert set(found.benchmarks) == {"benchmark/world", "benchmark/world/f1"}
    assert sum("damaged" in note for note in found.notes) == 2
    (run / FILE).write_text("{", encoding="utf-8")
    (found,) = read(run)
    assert not found.benchmarks and any(FILE in note for note in found.notes)
