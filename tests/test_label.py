"""`leyden data label`: what a reward prefers, what is left out, and work that stops in the middle."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prepared import prepared, write

from leyden.datamodules import PreferenceData, PromptData
from leyden.datamodules.commands.label_scores import LabelScores
from leyden.datamodules.commands.main import main
from leyden.example import Sample
from leyden.rewards.function import Gold

REWARDS = """
import torch

ASKED = []
FAIL = False

def length(samples):
    ASKED.extend(sample.response for sample in samples)
    if FAIL and len(ASKED) > 8:
        raise RuntimeError("the server is gone")
    return [len(sample.response) / 10 for sample in samples]

class Ended:
    def __init__(self, bonus: float = 1.0, name: str = "x") -> None:
        self.bonus = bonus
    def __call__(self, samples):
        return torch.tensor([self.bonus * sample.finished for sample in samples])
"""
Leyden = Callable[..., tuple[int, str, str]]


@pytest.fixture
def mine(workplace: Path) -> Any:
    """The user's module of rewards, in the current folder."""
    (workplace / "mine.py").write_text(REWARDS, encoding="utf-8")
    sys.modules.pop("mine", None)
    import importlib

    yield importlib.import_module("mine")
    sys.modules.pop("mine", None)


def rows(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def questions(tmp_path: Path, count: int = 12) -> str:
    """Generated questions with four answers each, shuffled out of their order."""
    source = tmp_path / "made.jsonl"
    flags = ["--rows", str(count), "--responses", "4", "--language", "both", "--output", str(source)]
    assert main(["sample", "--kind", "preference", *flags]) == 0
    mixed = []
    for number, row in enumerate(rows(source)):
        answers = row.pop("responses")
        row.pop("scores")
        turn = number % len(answers)
        mixed.append(row | {"responses": answers[turn:] + answers[:turn]})
    source.unlink()
    return write(tmp_path / "in.jsonl", mixed)


def gold(row: dict[str, Any], response: str) -> float:
    turns = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
    return float(Gold()([Sample(turns, response, row.get("row", row))])[0])


# what is written


def test_gold_orders_generated_answers(tmp_path: Path, leyden: Leyden) -> None:
    source, out = questions(tmp_path), tmp_path / "out.jsonl"
    code, said, err = leyden("data", "label", source, str(out), "--reward", "Gold")
    assert (code, err) == (0, "") and "prompts with" in said and "best first, by Gold\n" in said
    written, asked = rows(out), {row["prompt"]: row for row in rows(source)}
    assert len(written) >= 10 and not list(tmp_path.glob("*.part"))
    for row in written:
        original = asked[row["prompt"][-1]["content"]]
        assert sorted(row["responses"]) == sorted(original["responses"]) and row["finished"] == [True] * 4
        assert row["scores"] == sorted(row["scores"], reverse=True) and row["scores"][0] > row["scores"][-1]
        assert row["scores"] == pytest.approx([gold(original, response) for response in row["responses"]])
        assert row["row"] == {name: original[name] for name in ("language", "topic", "answer", "rivals", "gold")}
    code, said, err = leyden("data", "check", str(out), "--kind", "preference")
    assert code == 0 and "warning" not in said + err and ": row" not in said + err  # the row behind is not lost text


def test_what_is_written_can_be_trained_on_and_labelled_again(tmp_path: Path, leyden: Leyden) -> None:
    source, out, again = questions(tmp_path), tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    assert leyden("data", "label", source, str(out), "--reward", "Gold", "--reward.polite", "0.25")[0] == 0
    data = prepared(PreferenceData(str(out), val_fraction=0.0), tmp_path)
    assert data.train_trees is not None and len(data.train_trees) == len(rows(out))
    scores = data.train_trees[0].scores
    assert scores == pytest.approx(list(dict.fromkeys(rows(out)[0]["scores"])))
    assert leyden("data", "label", str(out), str(again), "--reward", "Gold", "--reward.polite", "0.25")[0] == 0
    assert rows(again) == rows(out)  # the rows that Gold needs are still there
    asker = type(
        "Asker", (), {"sampling": type("S", (), {"max_new_tokens": 8})(), "experience": lambda _, loader: loader}
    )
    prompts = prepared(PromptData(str(out), val_fraction=0.0), tmp_path, lightning_module=asker())
    assert {"answer", "language"} <= set(prompts.train_dataloader().prompts[0].example.row)


def test_pairs_are_the_best_and_the_worst(tmp_path: Path, leyden: Leyden, mine: Any) -> None:
    lines = [{"prompt": "?", "responses": ["aa", "a", "aaaaaaa"]}, {"prompt": "!", "responses": ["bb", "b"]}]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    flags = ["label", source, str(out), "--reward", "Function", "--reward.path", "mine.length", "--pairs"]
    assert leyden("data", *flags)[0] == 0
    user = {"role": "user"}
    assert rows(out) == [
        {"prompt": [user | {"content": "?"}], "chosen": "aaaaaaa", "rejected": "a", "margin": 0.6},
        {"prompt": [user | {"content": "!"}], "chosen": "bb", "rejected": "b", "margin": 0.1},
    ]
    assert leyden("data", "check", str(out), "--kind", "preference")[0] == 0
    code, said, _ = leyden("data", *flags, "--min-gap", "0.3", "--overwrite")
    assert code == 0 and len(rows(out)) == 1 and "left out: 1 closer than --min-gap" in said


def test_gaps_and_numbers_of_responses(tmp_path: Path, leyden: Leyden, mine: Any) -> None:
    lines = [{"prompt": "?", "responses": ["a" * n for n in (5, 1, 2, 9)]}]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    found = {}
    for flags in ((), ("--min-gap", "0.2"), ("--max-responses", "3"), ("--scored", "--max-responses", "2")):
        label = ["data", "label", source, str(out), "--reward=Function", "--reward.path=mine.length", "--overwrite"]
        assert leyden(*label, *flags)[0] == 0
        found[" ".join(flags)] = rows(out)[0]["scores"]
    assert list(found.values()) == [[0.9, 0.5, 0.2, 0.1], [0.9, 0.5, 0.2], [0.9, 0.2, 0.1], [0.9, 0.1]]


def test_rows_of_one_prompt_belong_together(tmp_path: Path, leyden: Leyden, mine: Any) -> None:
    """Answers of two runs of `leyden predict`, in one folder; a class of the user's looks at how they ended."""
    folder = tmp_path / "answers"
    folder.mkdir()
    turns = [[{"role": "user", "content": f"{i}?"}] for i in range(3)]
    for run in range(2):
        answers = [
            {
                "prompt": turn,
                "response": f"{i} {run}",
                "finished": (i + run) % 2 == 0,
                "row": {"prompt": f"{i}?", "id": i},
            }
            for i, turn in enumerate(turns)
        ]
        write(folder / f"answers-{run}.jsonl", answers)
    out = tmp_path / "out.jsonl"
    code, said, err = leyden("data", "label", str(folder), str(out), "--reward", "mine.Ended", "--reward.bonus", "2.5")
    assert (code, err) == (0, "") and "by mine.Ended (bonus 2.5)\n" in said
    assert [row["responses"] for row in rows(out)] == [["0 0", "0 1"], ["1 1", "1 0"], ["2 0", "2 1"]]
    assert all(row["scores"] == [2.5, 0.0] and row["finished"] == [True, False] for row in rows(out))
    assert [row["row"] for row in rows(out)] == [{"prompt": f"{i}?", "id": i} for i in range(3)]


def test_ties_copies_and_single_answers_are_counted(tmp_path: Path, leyden: Leyden, mine: Any) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "tied", "responses": ["ab", "cd"]},
        {"prompt": "copies", "responses": ["ab", "ab ", "abc", "xyz"]},
        {"prompt": "alone", "response": "ab", "responses": ["ab", "ab"]},
        {"prompt": "bad", "responses": ["ab", ""]},
        {"prompt": "transcript", "responses": [[{"role": "assistant", "content": "Human: a\n\nAssistant: b"}], "c"]},
        {"prompt": "js", "responses": [[{"role": "assistant", "content": '[{"role": "user", "content": "a"}]'}], "c"]},
    ]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    flags = ["--reward", "Function", "--reward.path", "mine.length"]
    code, said, _ = leyden("data", "label", source, str(out), *flags)
    assert code == 1  # as for convert: some rows are bad
    assert "left out: 1 only one response, 1 tied" in said and "1 prompts have responses that tie" in said
    assert f"1 rows rejected -> {tmp_path / 'out.rejected.jsonl'} (first: {source}:4: 'responses[1]' is empty" in said
    assert [row["scores"] for row in rows(out)] == [[0.3, 0.3, 0.2], [2.2, 0.1], [3.4, 0.1]]
    assert rows(tmp_path / "out.rejected.jsonl")[0]["place"] == f"{source}:4"
    assert leyden("data", "check", str(out), "--kind", "preference")[0] == 0
    data = prepared(PreferenceData(str(out), val_fraction=0.0), tmp_path)
    assert data.train_trees is not None and [len(data.train_trees[i].responses) for i in range(3)] == [2] * 3


class Grader(BaseHTTPRequestHandler):
    """A chat endpoint that grades an answer by the number in it."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        grade = re.findall(r"grade me (\d)", body["messages"][-1]["content"])[-1]
        said = json.dumps(
            {"choices": [{"message": {"role": "assistant", "content": f'{{"score": {grade}}}'}}]}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *args: Any) -> None:
        pass


def test_a_judge_gives_feedback(tmp_path: Path, leyden: Leyden, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-mine")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Grader)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    lines = [{"prompt": f"{i}?", "responses": [f"{i}: grade me {n}" for n in (3, 9, 5)]} for i in range(3)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        flags = ["--reward", "HTTPJudge", "--reward.url", url, "--reward.model", "m"]
        code, said, err = leyden("data", "label", source, str(out), *flags)
    finally:
        server.shutdown()
        server.server_close()
    assert (code, err) == (0, "") and "by HTTPJudge (model m, url http://127" in said
    assert [row["scores"] for row in rows(out)] == [[9.0, 5.0, 3.0]] * 3
    assert "secret" not in said + "".join(file.read_text() for file in tmp_path.glob("*.jsonl"))


# work that stops


def test_work_goes_on_where_a_reward_failed(tmp_path: Path, leyden: Leyden, mine: Any) -> None:
    lines = [{"prompt": f"{i}?", "responses": [f"{i}a", f"{i}bb"]} for i in range(8)]
    source, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    flags = [
        "data",
        "label",
        source,
        str(out),
        "--reward",
        "Function",
        "--reward.path",
        "mine.length",
        "--batch-size",
        "4",
    ]
    mine.FAIL = True
    code, _, err = leyden(*flags)
    assert code == 2 and "failed with RuntimeError: the server is gone" in err and err.count("\n") == 1
    assert "8 of 16 responses are scored and kept: then type the same again" in err
    part = tmp_path / "out.jsonl.part"
    assert not out.exists() and len(part.read_text(encoding="utf-8").splitlines()) == 5
    part.write_bytes(part.read_bytes()[:-3])  # as if the power had failed
    mine.FAIL = False
    mine.ASKED.clear()
    code, said, _ = leyden(*flags)
    assert code == 0 and "6 of 16 responses are scored already" in said and not part.exists()
    assert mine.ASKED == [response for line in lines[3:] for response in line["responses"]]
    assert [row["scores"] for row in rows(out)] == [[0.3, 0.2]] * 8


def test_other_work_is_not_mixed_in(tmp_path: Path, leyden: Leyden, mine: Any) -> None:
    lines = [{"prompt": f"{i}?", "responses": [f"{i}a", f"{i}bb"]} for i in range(8)]
    source, other = write(tmp_path / "in.jsonl", lines), write(tmp_path / "other.jsonl", lines)
    out = tmp_path / "out.jsonl"
    flags = ["--reward", "Function", "--reward.path", "mine.length", "--batch-size", "4"]
    mine.FAIL = True
    assert leyden("data", "label", source, str(out), *flags)[0] == 2
    mine.FAIL = False
    code, _, err = leyden("data", "label", other, str(out), *flags)
    assert code == 2 and f"out.jsonl.part: scores of other work that was not finished (input {source})" in err
    code, _, err = leyden("data", "label", source, str(out), "--reward", "mine.Ended")
    assert code == 2 and "(reward Function (path mine.length))" in err
    lines[7] = {"prompt": "new?", "responses": ["a", "bb"]}
    write(tmp_path / "in.jsonl", lines)  # mended meanwhile: what did not change keeps its scores
    mine.ASKED.clear()
    assert leyden("data", "label", source, str(out), *flags)[0] == 0
    assert mine.ASKED == ["4a", "4bb", "5a", "5bb", "6a", "6bb", "a", "bb"]
    code, _, err = leyden("data", "label", source, str(out), *flags)
    assert code == 2 and "out.jsonl: exists already; add --overwrite" in err


def test_a_ledger_trusts_only_whole_lines(tmp_path: Path) -> None:
    file, about = tmp_path / "x.part", {"input": "a", "reward": "b"}
    ledger = LabelScores(file, about)
    ledger.add({"k1": [1.0, 0.1]})
    ledger.add({"k2": [2.0]})
    whole = file.read_bytes()
    for cut, known in ((0, {"k1", "k2"}), (1, {"k1"}), (len(whole), set())):
        file.write_bytes(whole[: len(whole) - cut])
        again = LabelScores(file, about)
        assert set(again.scores) == known
        again.add({"k3": [3.0]})
        assert LabelScores(file, about).scores == {key: ledger.scores[key] for key in known} | {"k3": [3.0]}
    file.write_bytes(whole.replace(b"[1.0, 0.1]", b"[1.0, NaN]"))
    assert LabelScores(file, about).scores == {}
    assert LabelScores(file, {"input": "other"}, anew=True).scores == {} and not file.exists()


# mistakes


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: IN, OUT"),
        (["in.jsonl", "out.jsonl"], "--reward: missing; add --reward CLASS"),
        (["in.jsonl", "out.jsonl", "--reward", "Godl"], "--reward: no Reward is called 'Godl'; did you mean 'Gold'?"),
        (["in.jsonl", "out.jsonl", "--reward"], "--reward needs a value"),
        (["in.jsonl", "out.jsonl", "--reward", "Gold", "--paris"], "'--paris' is not known; did you mean '--pairs'?"),
        (["in.jsonl", "out.jsonl", "--reward", "Gold", "--pairs", "--scored"], "not allowed with argument"),
        (["in.jsonl", "out.jsonl", "--reward", "Gold", "--min-gap", "-1"], "--min-gap -1"),
        (
            ["in.jsonl", "out.jsonl", "--reward", "Gold", "--max-responses", "1"],
            "--max-responses 1: a comparison takes",
        ),
        (["in.jsonl", "out.csv", "--reward", "Gold"], "out.csv: the output is JSONL; name it out.jsonl"),
        (["nowhere.jsonl", "out.jsonl", "--reward", "Gold"], "nowhere.jsonl: no such file"),
        (["in.jsonl", "out.jsonl", "--reward", "Gold", "--reward.corect", "2"], "did you mean 'correct'"),
        (["in.jsonl", "out.jsonl", "--reward", "Gold", "--reward.correct", "x"], "--reward.correct: expected float"),
        (["in.jsonl", "out.jsonl", "--reward", "Function", "--reward.path", "mine.lenght"], "did you mean 'length'?"),
        (["in.jsonl", "out.jsonl", "--reward", "Gold"], "Gold: a row has no language, answer, rivals"),
        (["one.jsonl", "out.jsonl", "--reward", "Gold"], "one.jsonl: no prompt has two different responses"),
        (["none.jsonl", "out.jsonl", "--reward", "Gold"], "none.jsonl: no candidates format fits the columns prompt"),
        (["in.jsonl", "out.jsonl", "--reward", "mine.Ended"], "under mine.Ended no response is better than"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, leyden: Leyden, mine: Any, workplace: Path) -> None:
    write(workplace / "in.jsonl", [{"prompt": "?", "responses": ["a", "bb"]}])
    write(workplace / "one.jsonl", [{"prompt": "?", "response": "a"}, {"prompt": "!", "response": "a"}])
    write(workplace / "none.jsonl", [{"prompt": "?"}])
    code, _, err = leyden("data", "label", *argv)
    assert code == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (workplace / "out.jsonl").exists()


@pytest.mark.parametrize("argv", [["--help"], ["in.jsonl", "out.jsonl", "--reward", "Godl"], ["x", "--pears"]])
def test_help_and_mistakes_need_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys; from leyden.cli.launcher import main; main(['data', 'label', *sys.argv[1:]]);"
        "print([m for m in ('torch', 'lightning', 'transformers', 'jsonargparse', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
