"""A chat with several models: blind, ranked turn by turn, and going on when one of them fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from leyden.datamodules.annotate.app import application, key_of
from leyden.datamodules.annotate.live import LiveAnnotation
from leyden.datamodules.annotate.main import main
from leyden.datamodules.annotate.queue import Queue
from leyden.datamodules.annotate.serving import MODEL, names_of_models
from leyden.datamodules.annotate.store import Store
from leyden.errors import UserError
from leyden.models.chat.answers import Answers
from leyden.policy.policy import Sampling
from leyden.web.guard import Rules
from leyden.web.serve import Address


class Fake:
    """A model that says its line, in pieces, and remembers what it was asked."""

    def __init__(self, *says: str, fails_after: int | None = None) -> None:
        self.says, self.fails_after, self.asked = says, fails_after, list[list[Mapping[str, Any]]]()
        self.closed = threading.Event()

    def stream(self, messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        self.asked.append([dict(turn) for turn in messages])
        try:
            for number, piece in enumerate(self.says):
                if number == self.fails_after:
                    raise RuntimeError("CUDA out of memory in secret-run")
                yield piece
        finally:
            self.closed.set()


class Chat:
    def __init__(self, folder: Path, samples: int = 1, system: str = "", **models: Fake) -> None:
        self.store, self.models = Store(folder / "votes.db"), models
        live = LiveAnnotation(self.store, Queue(self.store), models, samples, system)
        rules = Rules(Address().hosts(), f"leyden_{self.store.name}", self.store.guests)
        self.kim = TestClient(application(live, rules), base_url="http://localhost:8800", headers={"x-leyden": "1"})
        self.kim.post("/api/enter", json={"token": self.store.invite("Kim")})

    def ask(self, text: str) -> list[dict[str, Any]]:
        answer = self.kim.post("/api/ask", json={"text": text})
        return [json.loads(line) for line in answer.text.splitlines()]

    def vote(self, shown: dict[str, Any], id: str, **ranks: int) -> dict[str, Any]:
        given = {key_of(text): rank for text, rank in ranks.items()}
        sent = {"id": id, "item": shown["id"], "ranks": given, "all_bad": False, "reason": ""}
        return dict(self.kim.post("/api/vote", json=sent).json())


def test_every_turn_is_an_item_and_the_best_answer_goes_on(tmp_path: Path) -> None:
    one, two = Fake("He", "llo"), Fake("Go", " away")
    chat = Chat(tmp_path, system="be kind", run_a=one, run_b=two)
    assert chat.kim.get("/api/next").json()["live"] is True
    lines = chat.ask("Hi")
    assert lines[0] == {"slots": 2} and "run_" not in json.dumps(lines)
    streamed = {slot: "".join(line["text"] for line in lines if line.get("slot") == slot) for slot in (0, 1)}
    shown = lines[-1]["item"]
    assert [answer["text"] for answer in shown["answers"]] == [streamed[0], streamed[1]]
    assert set(streamed.values()) == {"Hello", "Go away"}
    assert shown["messages"] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Hi"}]
    told = chat.vote(shown, "vote number 1", **{"Hello": 1, "Go away": 2})
    assert told["messages"][-1] == {"role": "assistant", "content": "Hello"} and told["item"] is None
    chat.ask("And then?")
    assert [turn["content"] for turn in two.asked[-1]] == ["be kind", "Hi", "Hello", "And then?"]
    (vote,) = chat.store.votes()
    best = chat.store.items()[0].answers[vote.ranks.index(1)]
    assert (best.text, best.model, len(chat.store.items())) == ("Hello", "run_a", 2)
    chat.store.close()


def test_a_conversation_outlives_the_server(tmp_path: Path) -> None:
    chat = Chat(tmp_path, one=Fake("a"), two=Fake("b"))
    shown = chat.ask("Hi")[-1]["item"]
    chat.store.close()
    again = Chat(tmp_path, one=Fake("c"), two=Fake("d"))
    waiting = again.kim.get("/api/next").json()["item"]
    assert waiting["id"] == shown["id"]
    assert again.vote(waiting, "vote number 1", a=2, b=1)["messages"][-1]["content"] == "b"
    assert again.vote(waiting, "vote number 1", a=2, b=1) | {"stored": None} == again.kim.get("/api/next").json() | {
        "stored": None
    }
    assert again.kim.post("/api/new", json={}).json()["messages"] == []
    again.store.close()


def test_a_question_without_a_good_answer_is_taken_back(tmp_path: Path) -> None:
    chat = Chat(tmp_path, one=Fake("a"), two=Fake("b"))
    shown = chat.ask("Hi")[-1]["item"]
    assert chat.vote(shown, "a skip of Kim")["messages"] == []
    assert len(chat.store.votes()) == 1 and chat.store.votes()[0].ranks == ()
    chat.store.close()


def test_a_model_that_fails_is_told_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(tmp_path, one=Fake("a", "b", fails_after=1), two=Fake("c"), three=Fake("d"))
    lines = chat.ask("Hi")
    assert sum(line.get("failed", False) for line in lines) == 1 and "secret" not in json.dumps(lines)
    assert {answer["text"] for answer in lines[-1]["item"]["answers"]} == {"c", "d"}
    assert "one: no answer (CUDA out of memory in secret-run)" in capsys.readouterr().err
    chat.store.close()


@pytest.mark.parametrize(
    ("models", "ended", "turns"),
    [
        ({"one": Fake("a", fails_after=0), "two": Fake("c")}, "same", 2),
        ({"one": Fake("a"), "two": Fake("a")}, "same", 2),
        ({"one": Fake("a", fails_after=0), "two": Fake(" ")}, "failed", 0),
    ],
)
def test_where_nothing_can_be_ranked_the_talk_goes_on_or_back(
    tmp_path: Path, models: dict[str, Fake], ended: str, turns: int
) -> None:
    chat = Chat(tmp_path, **models)
    last = chat.ask("Hi")[-1]
    assert last["ended"] == ended and len(last["messages"]) == turns and chat.store.items() == []
    chat.store.close()


def test_questions_that_are_none_are_refused(tmp_path: Path) -> None:
    chat = Chat(tmp_path, one=Fake("a"), two=Fake("b"))
    for text in ("", "  ", 7, "x" * 20_001):
        assert chat.kim.post("/api/ask", json={"text": text}).status_code == 400
    stranger = TestClient(chat.kim.app, base_url="http://localhost:8800", headers={"x-leyden": "1"})
    assert stranger.post("/api/ask", json={"text": "Hi"}).status_code == 401
    chat.store.close()


def test_a_model_streams_what_it_samples_and_stops_when_nobody_reads() -> None:
    assert MODEL == f"{Answers.__module__}.{Answers.__qualname__}"
    model = Answers("tiny", Sampling(24, 0.0))
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 plus 3?"}]
    pieces = list(model.stream(asked))
    whole = model.policy.generate([model._prompt(asked, model.sampling)[0]], 1, model.sampling, [0])[0][0]
    assert len(pieces) > 1 and "".join(pieces) == whole.text
    reading = model.stream(asked, Sampling(100_000, 1.0, seed=1))
    next(reading)
    reading.close()  # ends the thread that samples
    assert not model._lock.locked()
    with pytest.raises(UserError, match="ends with a turn of the user"):
        next(model.stream([{"role": "assistant", "content": "Hi"}]))


def test_models_are_named_by_as_much_of_their_path_as_it_takes() -> None:
    assert names_of_models(["runs/dpo-1", "runs/ppo-1/export", "tiny"]) == {
        "dpo-1": "runs/dpo-1", "ppo-1": "runs/ppo-1/export", "tiny": "tiny"
    }  # fmt: skip
    assert list(names_of_models(["a/dpo", "b/dpo"])) == ["a/dpo", "b/dpo"]
    with pytest.raises(UserError, match="stands there twice"):
        names_of_models(["a/dpo", "a/dpo"])


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--models", "a", "--order", "least"], "--order: not with --models"),
        (["--models", "a", "--skip-bad"], "--skip-bad: not with --models"),
        (["rows.jsonl", "--models", "a"], "--models: people chat with these, or rank what is in rows.jsonl"),
        (["rows.jsonl", "--system", "be kind"], "--system: only with --models"),
        (["rows.jsonl", "--temperature", "0.5"], "--temperature: only with --models"),
        (["--models", *"abcde"], "--models: give one to four"),
        (["--models", *"abc", "--samples", "3"], "at most 8 answers"),
        (["--models", "a", "--samples", "1"], "one answer of one model cannot be ranked"),
        (["--models", "./missing"], "./missing: no such model folder"),
        (["--people", "Kim", "rows.jsonl"], "--people rows.jsonl: a file; name files before the flags"),
    ],
)
def test_flags_that_would_be_ignored_are_told(workplace: Path, argv: list[str], problem: str) -> None:
    with pytest.raises(UserError) as told:
        main(["serve", "--port", "0", *argv])
    assert problem in str(told.value) and "\n" not in str(told.value)
