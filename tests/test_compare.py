"""`leyden compare`: runs that are written here as `leyden fit` leaves them, Korean and hostile text included."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from leyden.compare import samples
from leyden.compare.axis import Axis, fitted
from leyden.compare.chart import Chart, Line, Mark, drawn
from leyden.compare.comparison import Comparison, compare
from leyden.compare.conclusion import conclusion
from leyden.compare.figures import frontier
from leyden.compare.finding import find_runs
from leyden.compare.groups import grouped
from leyden.compare.intervals import Interval, over_prompts, over_seeds, t_quantile
from leyden.compare.numbers import cell, cells, number
from leyden.compare.page import page
from leyden.compare.run import RunFiles, read_run
from leyden.compare.table import show

FACTS: dict[str, Any] = {
    "prompts": {"path": "heldout.jsonl", "rows": 200, "fingerprint": "7f3a91cc"},
    "reward": {"name": "Gold", "fingerprint": "aa11"},
    "reference": {"path": "runs/sft/export", "fingerprint": "bb22"},
    "text": {"path": "text.jsonl", "fingerprint": "cc33"},
    "sampling": {"max_new_tokens": 64, "temperature": 1.0, "seed": 0},
}
ALGORITHMS = {
    "PPO": (1.62, 9.0),
    "GRPO": (1.55, 6.5),
    "RejectionSampling": (1.31, 3.2),
    "DPO": (1.4, 14.0),
    "SFT": (0.9, 4.1),
}
"""Where each ends: reward, and KL in nats."""
ASKED = [
    "서울에서 부산까지 몇 시간이 걸리나요?",
    "Which is heavier, a kilo of iron or of cotton?",
    "한국의 수도는 어디예요?",
]
HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> & "quotes" \''


def make_run(
    folder: Path, algorithm: str = "PPO", seed: int = 0, facts: Any = FACTS, prompts: int = 30, **flags: Any
) -> Path:
    """A run of 300 steps with 11 evaluations. `facts` None: it was not evaluated. `flags`: the algorithm's settings."""
    folder.mkdir(parents=True)
    noise = random.Random(f"{algorithm}{seed}")
    arguments = {"policy": {"class_path": "CausalLM", "init_args": {"path": "runs/sft/export"}}, **flags}
    config = {
        "seed_everything": seed,
        "model": {"class_path": f"leyden.algos.{algorithm}", "init_args": {**arguments, "sampling": {"seed": seed}}},
        "data": {"class_path": "PromptData", "init_args": {"path": "prompts.jsonl", "seed": seed}},
        "trainer": {"max_steps": 300, "default_root_dir": str(folder)},
        "checkpoint": {"dirpath": str(folder / "checkpoints")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    top, far = ALGORITHMS[algorithm]
    rows: list[dict[str, Any]] = []
    for step in range(0, 301, 10):
        done = 1 - math.exp(-step / 80)
        row: dict[str, Any] = {"step": step}
        if step:
            row |= {
                "train/loss": 1 - done / 2,
                "train/tokens": step * 4100.0 + seed,
                "train/seconds": step * 2.9 + seed,
            }
            row |= {"perf/tokens_per_second": 1400.0, "perf/peak_memory_gb": 2.1}
        if step % 30 == 0 and facts is not None:
            reward, wide = 0.6 + (top - 0.6) * done + noise.gauss(0, 0.03), 0.04
            win = 0.5 + 0.4 * (reward - 0.6)
            row |= {
                "eval/reward": reward,
                "eval/reward_se": wide,
                "eval/kl": far * done**2 * (1 + noise.gauss(0, 0.04)),
                "eval/kl_se": 0.3,
            }
            row |= {"eval/win_rate": win, "eval/win_rate_low": win - 0.06, "eval/win_rate_high": win + 0.05}
            row |= {
                "eval/length": 30 + 9 * done * top + noise.gauss(0, 1),
                "eval/eos_rate": 0.97,
                "eval/entropy": 1 - done / 2,
            }
            row |= {
                "eval/distinct_2": 0.7,
                "eval/retained_loss": 2.9 + done * far / 60 + (step > 0) * noise.gauss(0, 0.004),
                "eval/korean_rate": 0.98,
            }
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (folder / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    if facts is not None:
        (folder / "evaluation.json").write_text(json.dumps(facts), encoding="utf-8")
        lines = [sample(step, row, f"{algorithm} {seed}") for step in (0, 300) for row in range(prompts)]
        (folder / "samples.jsonl").write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
    (folder / "run.json").write_text(json.dumps({"algorithm": algorithm, "version": "0.1.0", "git": "abc123"}))
    return folder


def sample(step: int, row: int, who: str) -> dict[str, Any]:
    said = f"네, {row}번 질문에 답해 드릴게요. 두 시간 사십 분 정도 걸립니다. ({who}, {step})"
    return {
        "step": step,
        "row": row,
        "prompt": [{"role": "user", "content": f"{ASKED[row % 3]} {row}"}],
        "response": HOSTILE if row == 1 else said,
        "finished": row % 5 > 0,
        "reward": 1 + row / 100,
        "reference": f"그건 {row}입니다.",
        "reference_reward": 0.5,
    }


@pytest.fixture
def runs(workplace: Path) -> Path:
    """Two seeds of PPO and two of DPO."""
    for algorithm in ("PPO", "DPO"):
        for seed in (0, 1):
            make_run(workplace / "runs" / f"{algorithm.lower()}-{seed + 1}", algorithm, seed)
    return workplace / "runs"


def read(*folders: Path) -> list[RunFiles]:
    return [read_run(folder, name) for folder, name in find_runs([str(folder) for folder in folders]).items()]


class Texts(HTMLParser):
    """Elements and texts of a page, as a browser's parser sees them."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.texts = list[str](), list[tuple[str, str | None]](), list[str]()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_student_and_normal_intervals() -> None:
    """Quantiles are those of any printed table. Of 1, 2 and 4 the mean is 7/3 and s² = (16 + 1 + 25) / 9 / 2 = 7/3."""
    assert [round(t_quantile(n), 3) for n in (1, 2, 3, 4, 10, 30)] == [12.706, 4.303, 3.182, 2.776, 2.228, 2.042]
    found = over_seeds([1, 2, 4])
    assert found.mean == pytest.approx(7 / 3) and found.half == pytest.approx(4.302653 * math.sqrt(7 / 9), rel=1e-6)
    assert (found.source, found.count) == ("seeds", 3)
    assert over_prompts(1.0, 0.5).half == pytest.approx(0.9799820)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Interval(1.23456, 1.22226, 1.24686, "seeds"), "1.235 ±0.012"),
        (Interval(43.4, 18.1, 68.7, "seeds"), "43 ±25"),
        (Interval(0.6, 0.55, 0.67, "prompts"), "0.600 0.550…0.670†"),
        (Interval(-0.5, -0.6, -0.4, "prompts"), "−0.50 ±0.10†"),
        (Interval(1230000, 1130000, 1330000, "seeds"), "1.23M ±100k"),
        (Interval(0.97, 0.97, 0.97), "0.970"),
        (None, "–"),
    ],
)
def test_numbers_have_the_digits_that_their_interval_allows(value: Interval | None, text: str) -> None:
    assert cell(value) == text


def test_numbers_are_short() -> None:
    texts = ["0", "0.0123", "1.23", "123", "9999", "12.3k", "1.00M", "−4.56M"]
    assert [number(n) for n in (0, 0.0123, 1.23, 123.4, 9999, 12345, 1e6, -4.56e6)] == texts


def test_seeds_are_taken_together_and_named_by_what_differs(workplace: Path) -> None:
    for name, algorithm, seed, coef in (("a", "PPO", 0, 0.05), ("b", "PPO", 7, 0.05), ("c", "PPO", 0, 0.2)):
        make_run(workplace / name, algorithm, seed, kl_coef=coef)
    make_run(workplace / "d", "DPO")
    folders = [workplace / name for name in "abcd"]
    groups = grouped(read(*folders))
    names = [(group.name, [run.name for run in group.runs]) for group in groups]
    assert names == [("PPO kl_coef=0.05", ["a", "b"]), ("PPO kl_coef=0.2", ["c"]), ("DPO", ["d"])]
    assert [len(group.runs) for group in grouped(read(*folders), ["model.kl_coef"])] == [3, 1]
    (workplace / "d" / "config.yaml").write_text("model: PPO: 1", encoding="utf-8")
    run = read(workplace / "d")[0]
    assert grouped([run])[0].name == "d" and re.search(r"config.yaml:1: cannot be read", run.notes[0])


def test_a_name_says_what_matters_before_how_long_a_run_was(workplace: Path) -> None:
    """Full weights against an adapter at another rate, one by steps and one by epochs."""
    adapter = {"class_path": "peft.LoraConfig", "init_args": {"r": 16, "lora_alpha": 32}}
    for name, lr, steps, policy in (("a", 1e-3, -1, None), ("b", 5e-3, 200, adapter)):
        file = make_run(workplace / name, "SFT", optimizer={"init_args": {"lr": lr}}) / "config.yaml"
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        config["model"]["init_args"]["policy"]["init_args"]["adapter"] = policy
        config = {"trainer": config.pop("trainer") | {"max_steps": steps}, **config}
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    names = [group.name for group in grouped(read(workplace / "a", workplace / "b"))]
    assert {frozenset(name.split()) for name in names} == {
        frozenset(["SFT", "adapter=none", "lr=0.001"]),
        frozenset(["SFT", "adapter=LoraConfig", "lr=0.005"]),
    }


def test_a_group_has_the_interval_of_its_seeds_and_a_run_alone_that_of_its_prompts(runs: Path) -> None:
    found = compare(read(runs))
    ppo = next(group for group in found.groups if group.name == "PPO")
    values = [run.final("eval/reward") for run in ppo.runs]
    assert found.value(ppo, "eval/reward") == over_seeds([value for value in values if value is not None])
    alone = compare(read(runs / "ppo-1"))
    (group,) = alone.groups
    reward, wins = (alone.value(group, f"eval/{name}") for name in ("reward", "win_rate"))
    assert reward is not None and reward.source == "prompts" and reward.half == pytest.approx(1.959964 * 0.04)
    assert (
        wins is not None
        and wins.high - wins.mean == pytest.approx(0.05)
        and wins.mean - wins.low == pytest.approx(0.06)
    )


def test_the_terminal_and_the_files(leyden, runs: Path, workplace: Path) -> None:
    code, out, err = leyden("compare", "runs", "--csv", "out/runs.csv")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80, "a pipe has 80 columns"
    assert re.search(r"^PPO +2 +1\.\d+ ±0\.\d+", out, re.M) and "Student's t" in out
    assert out.index("\nPPO") < out.index("\nDPO"), "the best reward comes first"
    with (workplace / "out" / "runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["ppo-1", "ppo-2", "dpo-1", "dpo-2"]
    reward = read_run(runs / "dpo-2", "").final("eval/reward")
    assert rows[3]["seed"] == "1" and rows[3]["of_prompts"] == "7f3a91cc" and float(rows[3]["eval/reward"]) == reward
    assert leyden("compare", "runs/ppo-*", "runs/ppo-1", "--csv", "out/runs.csv")[0] == 0, "its own files are replaced"
    assert "DPO" not in (workplace / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", range(60, 121, 4))
def test_no_name_is_broken_in_the_terminal(workplace: Path, width: int) -> None:
    folders = [make_run(workplace / name, name) for name in ALGORITHMS]
    console = Console(width=width, file=io.StringIO())
    show(compare(read(*folders)), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    tables = sum(bool(re.match(r" +runs ", line)) for line in lines)
    for name in ALGORITHMS:
        assert sum(bool(re.match(rf"{name} +1 ", line)) for line in lines) == tables > 0
    assert max(map(len, lines)) <= width


def test_only_the_columns_that_are_asked_for(leyden, runs: Path) -> None:
    code, out, _ = leyden("compare", "runs", "--metric", "kl", "--metric", "train/seconds")
    assert code == 0 and re.search(r"^ +runs +KL +seconds$", out, re.M) and "length" not in out
    assert out.index("\nPPO") < out.index("\nDPO"), "less KL comes first"


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ([], ["name the runs"]),
        (["runs/pppo-1"], ["runs/pppo-1: no such folder; did you mean", "runs/ppo-1'"]),
        (["runs/sft-*"], ["runs/sft-*: matches nothing; "]),
        (["empty"], ["empty: no run in it"]),
        (["runs/ppo-1/metrics.csv"], ["a file; give the run's folder"]),
        (["runs", "--metric", "eval/rewards"], ["--metric eval/rewards: no run has it; did you mean 'eval/reward'?"]),
        (["runs", "--outputs", "x.html"], ["'--outputs' is not known; did you mean '--output'?"]),
        (["runs", "--output", "toy.py"], ["toy.py: exists and is not of leyden compare"]),
        (["runs", "--output", "empty"], ["empty: a folder"]),
        (["runs", "--csv", "toy.py/x.csv"], ["--csv toy.py/x.csv: cannot be written"]),
    ],
)
def test_a_mistake_is_one_line(typed: list[str], parts: list[str], leyden, runs: Path, workplace: Path) -> None:
    (workplace / "empty").mkdir()
    code, _, err = leyden("compare", *typed)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert [part for part in parts if part not in err] == [], err


DIFFERENT: dict[str, tuple[dict[str, Any], set[str]]] = {
    "other prompts": (
        {"prompts": {"path": "b.jsonl", "rows": 9, "fingerprint": "f"}},
        {"reward", "KL", "win rate", "length", "ended", "entropy", "distinct-2", "Korean"},
    ),
    "another reward": ({"reward": {"name": "Judge", "fingerprint": "f"}}, {"reward", "win rate"}),
    "another reference model": ({"reference": {"path": "b", "fingerprint": "f"}}, {"KL", "win rate"}),
    "another retained text": ({"text": None}, {"forgetting", "retained loss"}),
    "another sampling of answers": (
        {"sampling": {"max_new_tokens": 64, "temperature": 0.5}},
        {"reward", "KL", "win rate", "length", "ended", "entropy", "distinct-2", "Korean"},
    ),
}


@pytest.mark.parametrize("reason", DIFFERENT)
def test_what_cannot_be_compared_is_refused_by_column(reason: str, runs: Path) -> None:
    change, columns = DIFFERENT[reason]
    make_run(runs / "sft-1", "SFT", facts=FACTS | change)
    found = compare(read(runs))
    (refusal,) = found.refusals
    assert (set(refusal.columns), refusal.runs) == (columns, ("sft-1",)) and reason in refusal.reason
    sft = next(group for group in found.groups if group.name == "SFT")
    shown = {one.name for one in found.columns if found.value(sft, one.column) is not None}
    assert shown == {one.name for one in found.columns} - columns
    source = page(found)
    assert reason in source and "not comparable" in source if "reward" in columns else reason in source


def test_another_seed_of_the_evaluation_is_no_reason(runs: Path) -> None:
    make_run(runs / "sft-1", "SFT", facts=FACTS | {"sampling": {**FACTS["sampling"], "seed": 5}})
    assert compare(read(runs)).refusals == []


def test_a_column_in_which_no_two_runs_agree_is_refused_for_all(workplace: Path) -> None:
    make_run(workplace / "a")
    make_run(workplace / "b", seed=1, facts=FACTS | {"prompts": {"path": "b.jsonl", "rows": 9, "fingerprint": "f"}})
    found = compare(read(workplace / "a", workplace / "b"))
    text = " ".join(found.notes())
    assert "no two runs share prompts (a: heldout.jsonl, 200 rows, 7f3a91cc; b: b.jsonl, 9 rows, f)" in text
    assert found.value(found.groups[0], "eval/reward") is None
    assert found.value(found.groups[0], "eval/retained_loss") is not None
    assert "frontier" not in page(found)


def test_a_run_without_evaluation_shows_what_it_has(leyden, runs: Path) -> None:
    make_run(runs / "sft-1", "SFT", facts=None)
    code, out, _ = leyden("compare", "runs")
    assert code == 0 and "Without evaluation: sft-1. To have one, add --config eval --eval.path PROMPTS" in out
    assert re.search(r"^SFT +1 +–", out, re.M) and re.search(r"^SFT +1 .*870", out, re.M)


def test_broken_lines_are_named_and_skipped(leyden, runs: Path) -> None:
    before = read_run(runs / "ppo-1", "")
    empty = "," * (len((runs / "ppo-1" / "metrics.csv").read_text(encoding="utf-8").splitlines()[0].split(",")) - 1)
    with (runs / "ppo-1" / "metrics.csv").open("a", encoding="utf-8") as file:
        file.write(f"310,cut\nmany{empty}\n320,nan{empty[1:]}\n330,0.1")
    with (runs / "ppo-1" / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 300, "row": 3, "resp\n{"step": 300, "prompt": "text"}\n[]\n7\n')
    (runs / "ppo-2" / "evaluation.json").write_text("{", encoding="utf-8")
    code, out, _ = leyden("compare", "runs")
    assert code == 0
    for part in ("ppo-1/metrics.csv:33: 2 cells", "metrics.csv:34: not all numbers", "metrics.csv:35: ", "is nan",
                 "ppo-1/metrics.csv: 1 more lines", "ppo-1/samples.jsonl:61: not whole JSON", "samples.jsonl:62: keys",
                 "ppo-1/samples.jsonl: 1 more", "ppo-2/evaluation.json: cannot be read"):  # fmt: skip
        assert part in out, part
    after = read_run(runs / "ppo-1", "")
    assert after.final("eval/reward") == before.final("eval/reward") and after.samples == before.samples


def test_folders_that_hold_little_do_not_stop_the_rest(leyden, runs: Path) -> None:
    for name in ("begun", "half"):
        (runs / name).mkdir()
    (runs / "begun" / "config.yaml").write_text("model: {class_path: leyden.algos.PPO}\n")
    (runs / "half" / "metrics.csv").write_text("")
    code, out, _ = leyden("compare", "runs")
    assert code == 0 and "begun/metrics.csv: missing" in out and "half/metrics.csv:1: no column 'step'" in out


def test_the_page_escapes_what_files_hold_and_loads_nothing(leyden, runs: Path, workplace: Path) -> None:
    row = {"step": 120, "name": "kl", "value": 1, "sentence": f"KL {HOSTILE}", "key": "--model.kl_coef 0.1"}
    (runs / "ppo-1" / "diagnostics.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (runs / "dpo-1").rename(runs / "<b>&dpo")
    make_run(runs / "named", "SFT", note=HOSTILE)
    assert leyden("compare", "runs")[0] == 0
    source = (workplace / "report.html").read_text(encoding="utf-8")
    found = Texts(source)
    assert {"script", "img", "b", "link", "iframe", "object"}.isdisjoint(found.tags)
    assert [pair for pair in found.attributes if pair[0].startswith("on") or pair[0] in ("src", "href")] == []
    assert "http://" not in source and "https://" not in source and "default-src 'none'" in source
    assert HOSTILE in found.texts and f"Step 120: KL {HOSTILE} " in found.texts and "<b>&dpo" in found.texts
    assert ("lang", "ko") in found.attributes and any("서울에서 부산까지" in text for text in found.texts)


def test_the_page_shows_figures_settings_and_answers_side_by_side(runs: Path) -> None:
    make_run(runs / "sft-1", "SFT", facts=FACTS | {"text": None}, epochs=2)
    source = page(compare(read(runs)))
    assert source.count("<figure") == 8 and source.count('role="img"') == 9, "the first is there wide and narrow"
    assert "<h3>Loss</h3>" in source.partition('id="training"')[2], "the curves of training come from metrics.csv"
    assert "Not shown: sft-1." in source.partition("<h3>Forgetting")[2].partition("</figure>")[0]
    settings = source.partition('id="settings"')[2].partition("</section>")[0]
    assert re.findall(r"<code>([\w.]+)</code>", settings) == ["model", "model.epochs"]
    cards = source.partition('id="answers"')[2].split("<article>")[1:]
    assert len(cards) == 30 and "10 more prompts" in source
    heads = re.findall(r'<div class="head"><span>(?:<svg.*?</svg>)?([^<]+)</span>', cards[0])
    assert heads == ["reference", "ppo-1", "ppo-2", "dpo-1", "dpo-2", "sft-1"]
    assert all(f"({who}, 300)" in cards[0] for who in ("PPO 0", "DPO 1")) and ", 0)" not in cards[0]


def test_answers_meet_by_prompt_and_references_that_differ_are_all_there(workplace: Path) -> None:
    make_run(workplace / "a")
    make_run(workplace / "b", "DPO")
    lines = [json.loads(line) for line in (workplace / "b" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    moved = [line | {"row": line["row"] + 7, "reference": "몰라요."} for line in lines if line["row"] < 5]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in moved)
    (workplace / "b" / "samples.jsonl").write_text(text, encoding="utf-8")
    source = page(compare(read(workplace / "a", workplace / "b")))
    cards = source.partition('id="answers"')[2].split("<article>")[1:]
    assert len(cards) == 30 and "reference of a<" in cards[0] and "reference of b<" in cards[0]
    assert "(PPO 0, 300)" in cards[0] and "(DPO 0, 300)" in cards[0] and "(DPO" not in cards[5]


def test_runs_of_a_group_that_may_differ_in_more_are_named(runs: Path) -> None:
    (runs / "ppo-2" / "run.json").write_text(json.dumps({"git": "fff", "version": "0.1.0"}))
    lines = (runs / "ppo-2" / "metrics.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (runs / "ppo-2" / "metrics.csv").write_text("".join(lines[:-6]), encoding="utf-8")
    notes = compare(read(runs)).notes()
    assert "PPO: its runs ended at different steps (240, 300)." in notes
    assert "PPO: its runs come from different commits (abc123, fff)." in notes


def compared(**ends: tuple[float, ...]) -> Comparison:
    """A comparison of single runs by one number each, with its interval over prompts."""
    runs = [
        RunFiles(
            Path(name),
            name,
            {f"eval/reward{end}": [(1, x)] for end, x in zip(("", "_low", "_high"), value, strict=False)},
            facts=FACTS,
        )
        for name, value in ends.items()
    ]
    return compare(runs, ["reward"])


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({"a": (2, 1.8, 2.2), "b": (1, 0.9, 1.1)}, "By reward and for these seeds, a is better than b."),
        (
            {"a": (2, 1.8, 2.2), "b": (1.9, 1.7, 2.1)},
            "By reward and for these seeds, whether a or b is better, the intervals leave open.",
        ),
        (
            {"a": (2, 1.8, 2.2), "b": (1.9, 1.7, 2.1), "c": (1, 0.9, 1.1), "d": (0, -0.1, 0.1)},
            "By reward and for these seeds, a is better than c and d; whether a or b is better, the intervals",
        ),
        ({"a": (2,), "b": (1, 0.9, 1.1)}, "By reward alone nothing can be concluded: not all of these numbers"),
        ({"a": (2, 1.8, 2.2)}, ""),
    ],
)
def test_the_conclusion_says_what_the_intervals_allow(ends: Any, said: str) -> None:
    found = conclusion(compared(**ends))
    assert found.startswith(said) and bool(found) == bool(said)


def test_a_column_is_written_in_one_style() -> None:
    assert cells([Interval(0.5, 0.4, 0.6, "prompts"), None]) == ["0.50 ±0.10†", "–"]
    both = cells([Interval(0.5, 0.4, 0.6, "prompts"), Interval(0.6, 0.55, 0.67, "prompts")])
    assert both == ["0.50 0.40…0.60†", "0.600 0.550…0.670†"]


def test_a_tall_answer_is_folded_and_whole() -> None:
    text = "".join(f"줄 {n}\n" for n in range(90))
    folded = samples._text(text)
    assert "<details>" in folded and "".join(re.split(r"<details>.*?</summary>|<[^>]+>", folded)) == text
    assert "<details>" not in samples._text("짧은 답")


def test_names_in_a_figure_are_crossed_by_no_curve() -> None:
    lines = [
        Line(0, [(0, 1.0), (10, 1.0)], ()),
        Line(1, [(0, 1.0), (5, 1.0)], (), True),
        Line(0, [(0, 0), (10, 2)], (), True),
    ]
    marks = [Mark(1, "a name", "", (5, 5, 5), (1, 1, 1))]
    source = drawn(Chart("c", "", "", "", lines, marks, plane=True), 400, 310)
    ((at, down),) = re.findall(r'class="name k1" x="([\d.]+)" y="([\d.]+)"', source)
    curves = [re.findall(r"([\d.]+) ([\d.]+)", path) for path in re.findall(r'class="mean"[^>]* d="([^"]+)"', source)]
    for (a, b), (c, d) in (map(lambda p: tuple(map(float, p)), curve) for curve in curves):
        for k in range(101):
            x, y = a + (c - a) * k / 100, b + (d - b) * k / 100
            assert not (float(at) < x < float(at) + 40 and float(down) - 9 < y < float(down))


def test_the_frontier_climbs() -> None:
    points = [(3.0, 1.0), (0.0, 0.5), (2.0, 0.4), (1.0, 0.9), (4.0, 0.8)]
    assert frontier(points) == [(0, 0.5), (1, 0.5), (1, 0.9), (3, 0.9), (3, 1.0), (4, 1.0)]


def test_axes_have_round_numbers_in_order() -> None:
    assert Axis(0, 1.23e6, 50, 400).ticks() == pytest.approx([0, 2e5, 4e5, 6e5, 8e5, 1e6, 1.2e6])
    for values, root in (([0.0, 14.0], True), ([0.0, 0.002], True), ([-3.0, 9.0], False), ([2.0, 2.0], False)):
        axis = fitted(values, 50, 390, root=root)
        places = [axis.place(tick) for tick in axis.ticks()]
        assert len(places) > 1 and places == sorted(places)
        assert 50 <= min(places) and max(places) <= 390.001 and all(50 <= axis.place(value) <= 390 for value in values)
    assert fitted([0.0, 9.0], 0, 100, root=True).place(9 * 1.06 / 4) == pytest.approx(50)


def test_nothing_heavy_is_imported() -> None:
    script = "import sys, leyden.compare.main; print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_page_on_comparing_runs_as_written(leyden, runs: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "comparing.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    assert len(lines) == 2
    for line in lines:
        code, _, err = leyden(*shlex.split(line)[1:])
        assert code == 0, (line, err)
    for flag in re.findall(r"^\| `(--[a-z]+)", text, re.M):
        assert flag in leyden("compare", "--help")[1]
