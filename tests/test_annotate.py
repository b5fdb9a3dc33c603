"""`leyden annotate`: what is asked, what is kept of the answers, and who may give them."""

from __future__ import annotations

import json
import re
import socket
import sqlite3
import threading
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from leyden.datamodules.annotate.app import Annotation, application, key_of
from leyden.datamodules.annotate.items import Reading, named_files, read_items, signature
from leyden.datamodules.annotate.main import main
from leyden.datamodules.annotate.queue import HELD, Queue
from leyden.datamodules.annotate.serving import add_files, links
from leyden.datamodules.annotate.store import Full, Gone, Store
from leyden.errors import UserError
from leyden.votes.vote import Answer, Item, Vote, current
from leyden.votes.vote_file import read_votes
from leyden.web.guard import Rules
from leyden.web.limits import Limit
from leyden.web.serve import Address, listen

JSON = {"x-leyden": "1"}
BASE = "http://localhost:8800"


def item(number: int = 0, answers: int = 3, spread: float | None = None) -> Item:
    told = tuple(Answer(f"answer {k} of {number}", f"model-{k}", spread=spread) for k in range(answers))
    return Item(({"role": "user", "content": f"question {number}"},), told)


def vote(of: Item, person: str = "Kim", when: float = 1.0, **how: Any) -> Vote:
    return Vote(of.id, person, when, **({"ranks": (1, 2, 2)} | how))


@pytest.fixture
def store(tmp_path: Path) -> Any:
    made = Store(tmp_path / "votes.db")
    made.add_items(map(item, range(5)))
    yield made
    made.close()


class Page:
    """The page of a store, with a browser of each person."""

    def __init__(self, store: Store, **rules: Any) -> None:
        self.store = store
        self.rules = Rules(Address().hosts(), f"leyden_{store.name}", store.guests, **rules)
        self.app = application(Annotation(store, Queue(store)), self.rules)

    def stranger(self, base: str = BASE) -> TestClient:
        return TestClient(self.app, base_url=base, headers=JSON)

    def of(self, person: str) -> TestClient:
        browser = self.stranger()
        assert browser.post("/api/enter", json={"token": self.store.invite(person)}).json() == {"person": person}
        return browser


@pytest.fixture
def page(store: Store) -> Page:
    return Page(store)


def ballot(shown: dict[str, Any], id: str = "a vote of mine", **how: Any) -> dict[str, Any]:
    """A vote for the answers in the order in which they are shown."""
    ranks = {answer["key"]: rank for rank, answer in enumerate(shown["answers"], start=1)}
    return {"id": id, "item": shown["id"], "ranks": ranks, "all_bad": False, "reason": ""} | how


# -- the store -------------------------------------------------------------------------------------------------------


def test_a_store_gives_back_what_it_was_given(store: Store, tmp_path: Path) -> None:
    kim, lee = store.invite("Kim"), store.invite("이수진")
    told = [
        vote(item(1), "Kim", 5.0, reason="because\nof “that”"),
        vote(item(1), "이수진", 6.0, ranks=(), all_bad=True),
    ]
    assert [store.add_vote(one, f"vote {number}") for number, one in enumerate(told)] == [True, True]
    store.close()
    again = Store(tmp_path / "votes.db", make=False)
    assert again.items() == [item(number) for number in range(5)]
    assert again.votes() == told and again.people() == ["Kim", "이수진"]
    assert kim not in (tmp_path / "votes.db").read_bytes().decode("latin-1") and kim != lee
    again.close()


def test_a_vote_is_added_once_and_never_overwritten(store: Store) -> None:
    store.invite("Kim"), store.invite("Lee")
    first, second = vote(item(0), when=10.0), vote(item(0), when=9.0, ranks=(3, 2, 1))  # a clock that was set back
    assert store.add_vote(first, "id number 1") and not store.add_vote(first, "id number 1")
    assert store.add_vote(second, "id number 2")
    assert [one.ranks for one in store.votes()] == [(1, 2, 2), (3, 2, 1)]
    assert [one.ranks for one in current(store.votes())] == [(3, 2, 1)]
    with pytest.raises(UserError, match="another vote has this id"):
        store.add_vote(vote(item(0), "Lee"), "id number 1")
    with pytest.raises(UserError, match="a rank to each answer"):
        store.add_vote(vote(item(0), ranks=(1, 2)), "id number 3")
    with pytest.raises(Gone):
        store.add_vote(vote(item(99)), "id number 4")
    assert len(store.votes()) == 2


def test_items_are_added_once_and_keep_the_order_of_their_answers(store: Store) -> None:
    turned = Item(item(0).messages, item(0).answers[::-1])
    assert turned.id == item(0).id
    assert store.add_items([turned, item(7)]) == 1
    assert store.items()[0] == item(0) and store.items()[-1] == item(7)


def test_counts_follow_from_votes_also_where_one_becomes_a_skip(store: Store) -> None:
    store.invite("Kim"), store.invite("Lee")

    def counts() -> list[int]:
        return [row[0] for row in store.rows("SELECT votes FROM items ORDER BY place")]

    for number, (who, ranks) in enumerate([("Kim", (1, 2, 3)), ("Lee", ()), ("Kim", (1, 1, 1)), ("Lee", (2, 1, 1))]):
        store.add_vote(vote(item(0), who, ranks=ranks), f"vote number {number}")
    assert counts() == [2, 0, 0, 0, 0]
    store.add_vote(vote(item(0), "Kim", ranks=()), "the last vote")
    assert counts() == [1, 0, 0, 0, 0]
    assert store.progress("Kim") == {"done": 0, "skipped": 1, "total": 5}


def test_two_processes_write_at_once(tmp_path: Path, store: Store) -> None:
    other = Store(tmp_path / "votes.db")
    for one in (store, other):
        one.invite(f"person of {id(one)}")

    def write(one: Store) -> None:
        for number in range(25):
            one.add_vote(vote(item(number % 5), f"person of {id(one)}"), f"{id(one)} {number}")

    threads = [threading.Thread(target=write, args=(one,)) for one in (store, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.votes()) == len(other.votes()) == 50
    other.close()


def test_a_full_disk_is_told_and_nothing_is_half_written(store: Store, page: Page) -> None:
    kim = page.of("Kim")
    shown = kim.get("/api/next").json()["item"]
    pages = store.rows("PRAGMA page_count")[0][0]
    store.rows(f"PRAGMA max_page_count = {pages}")
    long = ballot(shown, reason="x" * 4000)
    with pytest.raises(Full):
        for number in range(9):
            store.add_vote(vote(item(0), reason="y" * 4000), f"filler {number}")
    before = store.votes()
    answer = kim.post("/api/vote", json=long)
    assert (answer.status_code, answer.json()["error"]) == (507, "full") and store.votes() == before
    store.rows("PRAGMA max_page_count = 100000")
    assert kim.post("/api/vote", json=long).json()["stored"] is True
    assert len(store.votes()) == len(before) + 1


@pytest.mark.parametrize("what", ["text", "foreign", "pages", "newer"])
def test_a_database_that_is_none_is_told_and_a_copy_kept(tmp_path: Path, what: str) -> None:
    file = tmp_path / "votes.db"
    if what == "text":
        file.write_text('{"prompt": "no database"}\n' * 20, encoding="utf-8")
    elif what == "foreign":
        sqlite3.connect(file, isolation_level=None).execute("CREATE TABLE cakes (name)")
    else:
        made = Store(file)
        made.add_items(map(item, range(50)))
        made.invite("Kim")
        for number in range(50):
            made.add_vote(vote(item(number), reason="z" * 400), f"vote number {number}")
        if what == "newer":
            made.rows("PRAGMA user_version = 99")
        made.close()
    if what == "pages":
        content = bytearray(file.read_bytes())
        content[4096 * 3 :] = b"\xff" * (len(content) - 4096 * 3)
        file.write_bytes(content)
    content, copy = file.read_bytes(), tmp_path / "votes.db.broken-1"
    ours = what in ("pages", "newer")
    kept = r"no usable database of votes .*a copy is kept as votes\.db\.broken-1" if ours else "no database of votes"
    for _ in range(2):  # a copy is made once
        with pytest.raises(UserError, match=kept):
            Store(file)
    assert file.read_bytes() == content and list(tmp_path.glob("*broken-[0-9]")) == ([copy] if ours else [])
    assert not ours or copy.read_bytes() == content


def test_a_store_that_breaks_while_it_is_open_is_told(tmp_path: Path, store: Store, page: Page) -> None:
    kim = page.of("Kim")
    store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    store._database.execute("PRAGMA cache_size = 0")
    file = tmp_path / "votes.db"
    file.write_bytes(file.read_bytes()[:4096] + b"\xff" * (len(file.read_bytes()) - 4096))
    answers = [kim.get("/api/next") for _ in range(3)]
    assert all(answer.status_code == 503 and answer.json()["error"] == "store" for answer in answers)
    assert [path.name for path in tmp_path.glob("*.broken-[0-9]")] == ["votes.db.broken-1"]


def test_an_item_that_is_damaged_is_told(tmp_path: Path, store: Store) -> None:
    store.rows("UPDATE items SET messages = substr(messages, 1, 20) WHERE place = 3")
    with pytest.raises(UserError, match=r"an item is damaged: .*a copy is kept"):
        store.items()


def test_names_are_one_however_they_were_typed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    composed, decomposed = "이순신", unicodedata.normalize("NFD", "이순신")
    store.invite(composed)
    store.invite(f" {decomposed} ")
    assert store.people() == [composed]
    with pytest.raises(UserError, match="--add 이순신: there already"):
        main(["people", str(store.file), "--add", f"{decomposed} "])
    assert len(store.guests()) == 2, "neither link ended"
    for argv, problem in [(("--add", " "), "--add ' ': give a name"), (("--url", "ftp://x"), "--url ftp://x: give an")]:
        with pytest.raises(UserError, match=problem):
            main(["people", str(store.file), *argv])


def test_halves_of_characters_are_no_traceback(page: Page) -> None:
    kim = page.of("Kim")
    shown = kim.get("/api/next").json()["item"]
    ranks = {answer["key"]: 1 for answer in shown["answers"]}
    sent = {"id": "vote \ud800 1", "item": shown["id"], "ranks": ranks, "reason": "why \ud83d", "all_bad": False}
    headers = {"content-type": "application/json"}
    assert kim.post("/api/vote", content=json.dumps(sent), headers=headers).status_code == 200
    gone = kim.post("/api/vote", content=json.dumps(sent | {"item": "\ud800", "id": "vote 2 of Kim"}), headers=headers)
    assert gone.status_code == 410


def test_a_run_without_answers_is_left_out(tmp_path: Path) -> None:
    said: list[str] = []
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "benchmark.json").write_text("{}", encoding="utf-8")
        (tmp_path / "runs" / name / "config.yaml").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="no answers in it; give a run"):
        named_files([str(tmp_path / "runs")], said.append)
    (tmp_path / "runs/a/rollouts.jsonl").write_text("{}", encoding="utf-8")
    assert list(named_files([str(tmp_path / "runs")], said.append)) == [tmp_path / "runs/a/rollouts.jsonl"]
    assert said == [f"{tmp_path / 'runs/b'}: no answers in it; left out"]


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_no_vote_is_confirmed_into_a_file_that_is_no_longer_there(
    tmp_path: Path, store: Store, page: Page, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kim = page.of("Kim")
    sent = ballot(kim.get("/api/next").json()["item"])
    store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
    file, away = tmp_path / "votes.db", tmp_path / "away.db"
    file.rename(away)
    if how == "replaced":
        file.write_bytes(away.read_bytes())
    answers = [kim.post("/api/vote", json=sent) for _ in range(3)]
    assert [(answer.status_code, answer.json()["error"]) for answer in answers] == [(503, "store")] * 3
    assert capsys.readouterr().err.count("deleted, moved or replaced") == 1  # not with each try of a page
    away.replace(file)
    assert kim.post("/api/vote", json=sent).status_code == 200 and len(store.votes()) == 1


def test_stores_that_cannot_be_are_told(tmp_path: Path) -> None:
    for file, problem in [
        (tmp_path / "no" / "votes.db", "there is no folder"),
        (tmp_path, "a folder; name a file"),
    ]:
        with pytest.raises(UserError, match=problem):
            Store(file)
    with pytest.raises(UserError, match="no such file"):
        Store(tmp_path / "missing.db", make=False)


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_the_least_voted_come_first_and_nobody_sees_an_item_twice(store: Store) -> None:
    queue = Queue(store)
    store.invite("Kim"), store.invite("Lee")
    asked: dict[str, list[int]] = {"Kim": [], "Lee": []}
    for number in range(5):
        for who in ("Kim", "Lee"):
            place = queue.next(who)
            assert place is not None and queue.next(who) == place  # asked again, it is the same
            asked[who].append(place)
            store.add_vote(vote(item(place - 1), who), f"{who} voted {number}")
            queue.release(who)
    assert sorted(asked["Kim"]) == sorted(asked["Lee"]) == [1, 2, 3, 4, 5]
    assert queue.next("Kim") is None
    assert asked["Kim"][:2] + asked["Lee"][:2] == [1, 3, 2, 4]  # the first four are all different


def test_an_item_is_one_persons_while_others_are_open(store: Store) -> None:
    now = [0.0]
    queue = Queue(store, clock=lambda: now[0])
    people = [f"person {number}" for number in range(6)]
    places = [queue.next(person) for person in people]
    assert places[:5] == [1, 2, 3, 4, 5] and places[5] == 1  # none is left: the sixth gets one that somebody has
    now[0] += HELD + 1
    assert queue.next("person 7") == 1  # who says nothing for long has it no more


def test_skipped_items_come_back_last_and_enough_is_enough(store: Store) -> None:
    queue = Queue(store, enough=1)
    store.invite("Kim"), store.invite("Lee")
    assert queue.next("Kim") == 1
    store.add_vote(vote(item(0), ranks=()), "a skip of Kim")
    queue.release("Kim")
    for number in range(1, 5):
        assert queue.next("Kim") == number + 1
        store.add_vote(vote(item(number)), f"vote number {number}")
        queue.release("Kim")
    assert queue.next("Kim") == 1 and queue.next("Lee") == 1  # the others have the vote that they need


def test_disagreement_comes_first_where_it_is_asked_for(tmp_path: Path, store: Store) -> None:
    with pytest.raises(UserError, match="no answer has a spread"):
        Queue(store, "disagreement")
    other = Store(tmp_path / "other.db")
    other.add_items([item(0, spread=0.1), item(1, spread=0.9), item(2, spread=0.5)])
    queue = Queue(other, "disagreement")
    assert [queue.next(person) for person in ("Kim", "Lee", "Park")] == [2, 3, 1]
    other.close()


# -- files -----------------------------------------------------------------------------------------------------------


def lines(file: Path, *rows: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def read(*typed: Path, **how: Any) -> list[Item]:
    said: list[str] = []
    files = named_files([str(path) for path in typed], said.append)
    return list(read_items(files, Reading(**how), said.append))


def answers(of: Item) -> list[tuple[str, str, float | None, float | None]]:
    return [(one.text, one.model, one.score, one.spread) for one in of.answers]


def test_rollouts_have_scores_and_the_spread_of_their_ensemble(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "2+2?"}],
        "responses": ["4", "5", "4", "four"],
        "scores": [1.0, 0.0, 1.0, None],
        "terms": {"Gold": [1, 0, 1, 1], "spread": [0.1, 0.5, 0.1, 0.2]},
        "finished": [True] * 4, "tokens": [[1]] * 4, "logp": [[0.0]] * 4,
        "rollout": 0, "draw": 3, "fingerprint": "x", "row": {"prompt": "2+2?"},
    }  # fmt: skip
    lines(tmp_path / "ppo-1" / "rollouts.jsonl", row)
    lines(tmp_path / "ppo-1" / "rollouts-1.jsonl", row | {"responses": ["a", "b", "c", "d"]})
    (tmp_path / "ppo-1" / "config.yaml").write_text("model: {}\n", encoding="utf-8")
    first, second = read(tmp_path / "ppo-1")
    assert answers(first) == [("4", "ppo-1", 1.0, 0.1), ("5", "ppo-1", 0.0, 0.5), ("four", "ppo-1", None, 0.2)]
    assert [one.text for one in second.answers] == ["a", "b", "c", "d"]
    assert [one.text for one in read(tmp_path / "ppo-1" / "rollouts.jsonl", most=2)[0].answers] == ["4", "5"]


def test_predictions_of_several_models_are_joined_by_their_prompts(tmp_path: Path) -> None:
    def predicted(name: str, *texts: str) -> Path:
        asked = ["q1", "q2", "q1"]
        turns = [[{"role": "user", "content": question}] for question in asked]
        rows = [{"prompt": p, "response": t, "finished": True} for p, t in zip(turns, texts, strict=False)]
        return lines(tmp_path / name / "answers.jsonl", *rows)

    files = [predicted("a/dpo", "a1", "a2", "a3"), predicted("b/dpo", "b1", "a2", "b3"), predicted("sft", "c1", "a2")]
    found = read(*files)
    assert [[one[:2] for one in answers(each)] for each in found] == [
        [("a1", "a/dpo"), ("b1", "b/dpo"), ("c1", "tmp/sft".replace("tmp", tmp_path.name))],
        [("a3", "a/dpo"), ("b3", "b/dpo")],
    ]  # the second prompt has one answer alone, thrice


def test_runs_of_an_evaluation_give_their_last_answers_and_the_reference(tmp_path: Path) -> None:
    def run(name: str, *texts: str) -> Path:
        turn = [{"role": "user", "content": "q"}]
        told = {"row": 0, "prompt": turn, "tokens": [1], "finished": True, "reward": 0.5}
        rows = [
            told | {"step": step, "response": t, "reference": "r", "reference_reward": 2}
            for step, t in enumerate(texts)
        ]
        lines(tmp_path / name / "metrics.csv")
        lines(tmp_path / name / "samples.jsonl", *rows)
        return tmp_path / name

    run("ppo", "old", "new"), run("dpo", "other")
    (found,) = read(tmp_path)
    assert answers(found) == [("other", "dpo", 0.5, None), ("r", "reference", 2.0, None), ("new", "ppo", 0.5, None)]


def test_equal_answers_of_two_models_are_one_on_the_page_and_tie(tmp_path: Path, page: Page) -> None:
    same = Item(({"role": "user", "content": "q"},), (Answer("x", "a"), Answer("y", "b"), Answer("x", "c")))
    page.store.add_items([same])
    page.store.invite("Kim")
    shown = Annotation(page.store, Queue(page.store)).shown("Kim", page.store.place(same.id))
    assert len(shown["answers"]) == 2
    kim = page.of("Kim")
    kim.post("/api/vote", json=ballot(shown) | {"ranks": {key_of("x"): 7, key_of("y"): 3}})
    assert page.store.votes()[-1].ranks == (2, 1, 2)


def test_preferences_are_read_and_bad_rows_told_with_their_place(tmp_path: Path) -> None:
    good = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 2, "score_rejected": 1}
    file = lines(tmp_path / "pairs.jsonl", good, {"prompt": "", "chosen": "a", "rejected": "b"}, good | {"prompt": "p"})
    with pytest.raises(UserError, match=r"pairs\.jsonl:2: .*--skip-bad"):
        read(file)
    assert [answers(one) for one in read(file, skip_bad=True)] == 2 * [[("a", "", 2.0, None), ("b", "", 1.0, None)]]
    with pytest.raises(UserError, match="no prompt has two different answers"):
        read(lines(tmp_path / "single.jsonl", {"prompt": "q", "response": "a"}))
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "missing.jsonl")
    lines(tmp_path / "empty" / "metrics.csv")
    with pytest.raises(UserError, match="no answers in it; give a run"):
        read(tmp_path / "empty")
    with pytest.raises(UserError, match="--answers 9: give a number from 2 to 8"):
        Reading(9)


def test_unchanged_files_are_not_read_again(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    file = lines(tmp_path / "pairs.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"})
    add_files(store, {file: "pairs"}, Reading())
    assert len(store.items()) == 6
    monkeypatch.setattr("leyden.datamodules.annotate.serving.read_items", lambda *_: pytest.fail("read again"))
    add_files(store, {file: "pairs"}, Reading())
    assert signature({file: "pairs"}, Reading()) != signature({file: "other"}, Reading())


# -- the page --------------------------------------------------------------------------------------------------------


def test_nothing_on_the_page_says_who_wrote_an_answer(page: Page) -> None:
    told = (Answer("a", "secret-1", 9.5, 0.25), Answer("b", "secret-2", 1.5))
    page.store.add_items([Item(({"role": "user", "content": "q"},), told)])
    kim = page.of("Kim")
    for number in range(6):
        text = kim.get("/api/next").text
        shown = json.loads(text)["item"]
        assert not any(word in text for word in ("secret", "model-", "score", "9.5", "spread"))
        kim.post("/api/vote", json=ballot(shown, f"vote number {number}"))
    assert kim.get("/api/next").json()["item"] is None


def test_the_order_is_a_persons_own_and_stays(store: Store) -> None:
    annotation = Annotation(store, Queue(store))
    orders = {
        person: [[one["text"] for one in annotation.shown(person, place)["answers"]] for place in range(1, 6)]
        for person in ("Kim", "Lee", "Kim ")
    }
    assert orders["Kim"] != orders["Lee"] != orders["Kim "]
    again = Annotation(store, Queue(store)).shown("Kim", 1)
    assert [one["text"] for one in again["answers"]] == orders["Kim"][0]


def test_ranks_are_of_the_answers_in_the_items_order(page: Page) -> None:
    kim = page.of("Kim")
    shown = kim.get("/api/next").json()["item"]
    texts = [answer["text"] for answer in shown["answers"]]
    ranks = {answer["key"]: rank for answer, rank in zip(shown["answers"], (2, 9, 2), strict=True)}
    told = kim.post("/api/vote", json=ballot(shown, ranks=ranks, reason="it is right")).json()
    assert told["stored"] and told["progress"] == {"done": 1, "skipped": 0, "total": 5}
    (stored,) = page.store.votes()
    by_text = dict(zip([answer.text for answer in page.store.item(1).answers], stored.ranks, strict=True))
    assert [by_text[text] for text in texts] == [1, 2, 1] and stored.reason == "it is right"
    assert stored.person == "Kim"


def test_a_vote_that_is_sent_twice_is_stored_once(page: Page) -> None:
    kim = page.of("Kim")
    sent = ballot(kim.get("/api/next").json()["item"])
    assert [kim.post("/api/vote", json=sent).json()["stored"] for _ in range(3)] == [True, False, False]
    assert len(page.store.votes()) == 1
    others = kim.get("/api/next").json()["item"]
    for answer in (page.of("Lee").post("/api/vote", json=sent), kim.post("/api/vote", json=ballot(others))):
        assert (answer.status_code, answer.json()["error"]) == (400, "used")  # which the page does not send again
    assert len(page.store.votes()) == 1


def test_what_a_page_shows_to_someone_else_is_refused(page: Page) -> None:
    lee = page.of("Lee")  # whose link was opened last in this browser
    sent = ballot(lee.get("/api/next").json()["item"])
    for answer in (
        lee.post("/api/vote", json=sent | {"person": "Kim"}),
        lee.get("/api/next", params={"person": "Kim"}),
        lee.get("/api/before", params={"person": "Kim"}),
    ):
        assert (answer.status_code, answer.json()["error"], answer.json()["person"]) == (409, "person", "Lee")
    assert page.store.votes() == []
    assert lee.post("/api/vote", json=sent | {"person": "Lee"}).json()["stored"] is True


def test_the_last_vote_can_be_changed_and_those_before_it(page: Page) -> None:
    kim = page.of("Kim")
    sent = []
    for number in range(3):
        sent.append(ballot(kim.get("/api/next").json()["item"], f"vote number {number}", reason=f"reason {number}"))
        kim.post("/api/vote", json=sent[-1])
    last = kim.get("/api/before").json()
    assert last["item"]["id"] == sent[2]["item"]
    assert last["item"]["vote"] == {"ranks": sent[2]["ranks"], "all_bad": False, "reason": "reason 2"}
    for odd in ("x", "-1", "9" * 30, "²"):
        assert kim.get("/api/before", params={"before": odd}).json()["item"]["id"] == sent[2]["item"]
    one_before = kim.get("/api/before", params={"before": last["number"]}).json()
    assert one_before["item"]["id"] == sent[1]["item"]
    kim.post("/api/vote", json=sent[1] | {"id": "another vote", "ranks": {}, "all_bad": True})
    assert len(page.store.votes()) == 4 and [one.all_bad for one in current(page.store.votes())] == [False, False, True]
    assert kim.get("/api/before").json()["item"]["id"] == sent[1]["item"]  # which is now the last one
    assert page.of("Lee").get("/api/before").json() == {"item": None}


def test_votes_that_say_something_else_are_refused(page: Page) -> None:
    kim = page.of("Kim")
    good = ballot(kim.get("/api/next").json()["item"])
    key = next(iter(good["ranks"]))
    for bad in (
        {"ranks": {key: 1}}, {"ranks": good["ranks"] | {"other": 1}}, {"ranks": [1, 2, 3]}, {"ranks": None},
        {"ranks": dict.fromkeys(good["ranks"], 0)}, {"ranks": dict.fromkeys(good["ranks"], True)},
        {"ranks": dict.fromkeys(good["ranks"], 1.5)}, {"id": "short"}, {"id": 7},
        {"reason": "x" * 4001}, {"reason": None}, {"all_bad": 1}, {"item": 3},
    ):  # fmt: skip
        answer = kim.post("/api/vote", json=good | bad)
        assert (answer.status_code, answer.json()["error"]) == (400, "vote"), bad
    gone = kim.post("/api/vote", json=good | {"item": "0" * 16})
    assert (gone.status_code, gone.json()["error"]) == (410, "gone")
    assert kim.post("/api/vote", content=b"[1]", headers={"content-type": "application/json"}).status_code == 400
    assert page.store.votes() == []


# -- the door --------------------------------------------------------------------------------------------------------


def test_only_people_with_a_link_come_in(page: Page, tmp_path: Path) -> None:
    stranger = page.stranger()
    assert stranger.get("/").status_code == 200 and "<main" in stranger.get("/").text  # the page alone says nothing
    assert stranger.get("/api/next").json()["error"] == "token"
    assert stranger.post("/api/enter", json={"token": "guessed"}).status_code == 401
    other = Store(tmp_path / "other.db")
    foreign = other.invite("Kim")
    assert stranger.post("/api/enter", json={"token": foreign}).status_code == 401
    stranger.cookies.set(f"leyden_{page.store.name}", foreign)
    assert stranger.get("/api/next").status_code == 401
    other.close()


def test_a_cookie_is_for_this_page_alone(page: Page) -> None:
    answer = page.stranger().post("/api/enter", json={"token": page.store.invite("Kim")})
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie and "secure" not in cookie
    secure = (
        Page(page.store, url="https://votes.example.org")
        .stranger()
        .post("/api/enter", json={"token": page.store.invite("Kim")})
    )
    assert "secure" in secure.headers["set-cookie"].lower()


def test_a_new_link_ends_the_old_ones(page: Page) -> None:
    kim = page.of("Kim")
    assert kim.get("/api/next").status_code == 200
    page.store.invite("Kim")
    assert kim.get("/api/next").status_code == 200
    page.store.invite("Kim", anew=True)
    assert kim.get("/api/next").status_code == 401
    lee = page.of("Lee")
    page.store.dismiss("Lee")
    assert lee.get("/api/next").status_code == 401 and page.store.people() == ["Kim", "Lee"]


@pytest.mark.parametrize(
    "headers",
    [
        {"x-leyden": ""},
        {"origin": "http://evil.example"},
        {"origin": "http://localhost:9999"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
    ],
)
def test_posts_of_other_pages_are_refused(page: Page, headers: dict[str, str]) -> None:
    kim = page.of("Kim")
    sent = json.dumps(ballot(kim.get("/api/next").json()["item"])).encode()
    own = {"content-type": "application/json", "origin": BASE, "sec-fetch-site": "same-origin"}
    answer = kim.post("/api/vote", content=sent, headers=own | headers)
    assert (answer.status_code, answer.json()["error"]) == (403, "foreign") and page.store.votes() == []
    assert kim.post("/api/vote", content=sent, headers=own).json()["stored"]


def test_names_of_others_do_not_lead_here(page: Page) -> None:
    for host in ("evil.example", "localhost.evil.example:8800", "", "[", "127.0.0.1.evil.example"):
        assert page.stranger().get("/", headers={"host": host}).status_code == 403, host
    for host in ("localhost:1", "LOCALHOST", "127.0.0.1", "[::1]:8800", "192.0.2.7"):
        assert page.stranger().get("/", headers={"host": host}).status_code == 200, host
    named = Address("0.0.0.0", 80, "https://votes.example.org/")
    assert "votes.example.org" in named.hosts() and named.link("t") == "https://votes.example.org/#t"


def test_too_much_is_refused(page: Page) -> None:
    kim = page.of("Kim")
    headers = {"content-type": "application/json"}
    assert kim.post("/api/vote", content=b"x" * (1 << 20) + b"x", headers=headers).status_code == 413
    parts = (b"x" * (1 << 18) for _ in range(6))  # sent in pieces, without a length
    assert kim.post("/api/vote", content=parts, headers=headers).status_code == 413
    assert kim.post("/api/vote", content=b"[" * 100_000, headers=headers).status_code == 400


def test_too_often_is_refused_for_each_alone(store: Store) -> None:
    now = [0.0]
    page = Page(store, person=Limit(1, 3, lambda: now[0]), stranger=Limit(1, 50, lambda: now[0]))
    kim, lee = page.of("Kim"), page.of("Lee")
    assert [kim.get("/api/next").status_code for _ in range(4)] == [200, 200, 200, 429]
    assert lee.get("/api/next").status_code == 200
    now[0] += 1
    assert [kim.get("/api/next").status_code for _ in range(2)] == [200, 429]
    guesses = [page.stranger().post("/api/enter", json={"token": "x"}).status_code for _ in range(60)]
    assert guesses[0] == 401 and guesses[-1] == 429


def test_posts_through_a_proxy_are_the_pages_own(store: Store) -> None:
    page = Page(store, url="https://votes.example.org")
    headers = {"origin": "https://votes.example.org", "host": "127.0.0.1:8800"}
    token = store.invite("Kim")
    assert page.stranger().post("/api/enter", json={"token": token}, headers=headers).status_code == 200
    headers["origin"] = "https://evil.example.org"
    assert page.stranger().post("/api/enter", json={"token": token}, headers=headers).status_code == 403


def test_limits_forget_those_who_are_quiet() -> None:
    now = [0.0]
    limit = Limit(1, 2, lambda: now[0])
    for number in range(10_000):
        limit.allows(f"stranger {number}")
    now[0] += 10
    assert limit.allows("another") and len(limit._left) == 1


def test_answers_tell_browsers_to_load_nothing_from_elsewhere(page: Page) -> None:
    policy = page.stranger().get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for path in ("/", "/page/main.js", "/api/next", "/nothing", "/page/../app.py"):
        headers = page.stranger().get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer", path
    assert page.stranger().get("/page/%2e%2e/app.py").status_code == 404
    assert page.stranger().get("/page/main.js").headers["content-type"].startswith("text/javascript")
    folder = Path(__file__).parent.parent / "datamodules" / "annotate" / "page"
    for file in folder.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "eval(" not in text, file
        assert [link for link in re.findall(r"""["'(](?:https?:)?//[^"')]+""", text) if "w3.org" not in link] == [], (
            file
        )


# -- the command -----------------------------------------------------------------------------------------------------


def test_a_link_is_shown_once_and_only_its_hash_is_kept(store: Store) -> None:
    first = links(store, Address(), ["Kim", "Lee", "Kim "])
    assert len(first) == 2
    again = links(store, Address(), ["Kim", "Park"])
    assert all("/#" in line for line in first) and "/#" not in again[0] and "/#" in again[1]
    assert "--new-link Kim" in again[0]
    assert links(store, Address(), []) == ["the page is open for those who have a link: Kim, Lee, Park"]


def test_whoever_names_nobody_gets_a_link_each_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leyden.datamodules.annotate.serving.getpass.getuser", lambda: "ada")
    first, again = links(store, Address(), []), links(store, Address(), [])
    assert first[0].startswith("ada: http://127.0.0.1:8800/#") and again[0].startswith("ada: ") and first != again
    assert len(store.guests()) == 2 and store.people() == ["ada"]  # the page that is open goes on


def test_a_taken_port_is_told_in_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: another program listens there; name another"):
            listen(Address(port=port))
    opened, address = listen(Address(port=0))
    assert address.port == opened.getsockname()[1] > 0
    opened.close()
    with pytest.raises(UserError, match=r"--host 203\.0\.113\.9.* cannot be listened at"):
        listen(Address("203.0.113.9", 0))


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["serv"], "no verb 'serv'; did you mean 'serve'"),
        (["serve", "--host", "0.0.0.0"], "name who votes, such as --people Kim Lee"),
        (["serve", "--port", "99999"], "--port 99999: give a number from 0 to 65535"),
        (["serve", "--url", "votes.example.org"], "--url votes.example.org: give an address that people open"),
        (["serve", "--order", "best"], "--order best: use least, disagreement"),
        (["serve", "--enough", "0"], "--enough 0: give 1 or more"),
        (["serve", "missing.jsonl"], "missing.jsonl: no such file"),
        (["serve", "--port", "0"], "no items in it yet; name files"),
        (["export", "missing.db", "out.jsonl"], "missing.db: no such file"),
        (["export", "missing.db", "out.csv"], "name the output out.jsonl"),
        (["people", "missing.db"], "missing.db: no such file"),
    ],
)
def test_mistakes_are_told_in_one_line(workplace: Path, argv: list[str], problem: str) -> None:
    with pytest.raises(UserError) as told:
        main(argv)
    assert problem in str(told.value) and "\n" not in str(told.value)


def test_people_are_listed_and_given_links(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store("votes.db")
    store.add_items([item(0), item(1)])
    store.invite("Kim")
    store.add_vote(vote(item(0)), "vote number 1")
    store.close()
    assert main(["people", "votes.db", "--add", "Lee", "--url", "https://v.example.org"]) == 0
    out = capsys.readouterr().out
    assert "Lee: https://v.example.org/#" in out and "Kim: 1 of 2 items ranked, 0 skipped" in out
    for argv, problem in [
        (("--add", "Kim"), "there already"),
        (("--new-link", "Kin"), "nobody is called that; did you mean"),
        (("--remove", "Park"), "nobody is called 'Park'"),
    ]:
        with pytest.raises(UserError, match=problem):
            main(["people", "votes.db", *argv])


def test_votes_reach_export_and_report(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store("votes.db")
    asked = [item(0), item(1)]
    store.add_items(asked)
    for person in ("Kim", "Lee"):
        store.invite(person)
        for number, one in enumerate(asked):
            store.add_vote(vote(one, person=person), f"vote {number} of {person}")
    with pytest.raises(UserError, match="--votes all: --kind votes writes each of them; leave it out"):
        main(["export", "votes.db", "votes.jsonl", "--kind", "votes", "--votes", "all"])
    assert main(["export", "votes.db", "votes.jsonl", "--kind", "votes"]) == 0
    assert read_votes(Path("votes.jsonl")) == (asked, store.votes())
    assert main(["export", "votes.db", "pairs.jsonl", "--kind", "pairs"]) == 0
    rows = [json.loads(line) for line in Path("pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    better, worse, tie = next(vote(asked[0]).pairs())
    texts = [answer.text for answer in asked[0].answers]
    said = {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows}
    assert not tie and (texts[better], texts[worse]) in said and (texts[worse], texts[better]) not in said
    assert main(["report", "votes.db"]) == 0
    assert "<!doctype html>" in Path("votes.html").read_text(encoding="utf-8")
    assert "votes.db -> votes.jsonl: 4 votes" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already; add --overwrite"):
        main(["export", "votes.db", "pairs.jsonl"])
    store.close()


def test_without_its_packages_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leyden.web.serve.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'leyden\[annotate\]'"):
        main(["serve"])


def test_the_page_is_installed_with_the_package() -> None:
    import tomllib

    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert "page/*" in tomllib.loads(text)["tool"]["setuptools"]["package-data"]["leyden.datamodules.annotate"]
