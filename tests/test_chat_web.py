"""`leyden chat --web`: answers that stream, wait, stop and fail, what a page may ask, and who may."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from leyden.errors import UserError
from leyden.models.chat import web
from leyden.models.chat.answers import Answers, Written
from leyden.models.chat.main import main
from leyden.models.chat.web import MOST_WAITING, PAGE, WHOLE, Chat, application
from leyden.paths import short_names
from leyden.policy.policy import Sampling
from leyden.web.guard import Rules
from leyden.web.guests import Invited
from leyden.web.serve import Address, listen
from leyden.web.site import SHARED

ROOT = Path(__file__).parent.parent
JSON = {"x-leyden": "1"}
BASE = "http://localhost:8800"
SETTINGS = {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7, "seed": 3}


def asked(text: str = "hello", **how: Any) -> dict[str, Any]:
    return {"model": 0, "number": 0, "messages": [{"role": "user", "content": text}], **SETTINGS} | how


class Fake:
    """Says the words of a question again; `wait` before each holds it up until it is let go."""

    parameters = 1000

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.go = threading.Event()
        self.stopped = threading.Event()

    def write(
        self, messages: Any, show: Any, sampling: Any = None, number: Any = None, is_stopped: Any = None
    ) -> Written:
        self.seen.append((list(messages), sampling, number))
        words = messages[-1]["content"].split()
        for count, word in enumerate(words, start=1):
            if word == "fail":
                raise RuntimeError("CUDA out of memory\nmore of it")
            if word == "long":
                raise UserError("the chat template refuses the conversation (no); /new starts over")
            while word == "wait" and not self.go.wait(0.01):
                if is_stopped():
                    self.stopped.set()
                    return Written("stopped", count, 1.0, 0)
            show(word + " ", count)
        return Written("end", len(words), 2.0, 0)


class Page:
    """The page of two models, and a server for what a test client cannot do."""

    def __init__(self, **rules: Any) -> None:
        self.models = {"runs/sft": Fake(), "runs/dpo": Fake()}
        self.people = Invited()
        self.chat = Chat(self.models, Sampling(256, 0.7, 0, 1.0, 5), "Be kind.")
        self.app = application(self.chat, Rules(Address().hosts(), "leyden_chat", self.people, **rules))

    def stranger(self, base: str = BASE) -> TestClient:
        return TestClient(self.app, base_url=base, headers=JSON)

    def guest(self) -> TestClient:
        browser = self.stranger()
        assert browser.post("/api/enter", json={"token": self.people.invite("guest")}).json() == {"person": "guest"}
        return browser


@pytest.fixture
def page() -> Page:
    return Page()


@pytest.fixture
def served(page: Page) -> Iterator[httpx.Client]:
    opened, address = listen(Address(port=0))
    server = uvicorn.Server(uvicorn.Config(page.app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{address.port}", headers=JSON, timeout=60) as browser:
        browser.post("/api/enter", json={"token": page.people.invite("guest")})
        yield browser
    page.chat.ended.set()
    server.should_exit = True
    thread.join(30)


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.text.splitlines()]


def until(holds: Any) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- answers ---------------------------------------------------------------------------------------------------------


def test_a_page_begins_with_the_commands_flags(page: Page) -> None:
    assert page.guest().get("/api/chat").json() == {
        "models": [{"name": "runs/sft", "parameters": 1000}, {"name": "runs/dpo", "parameters": 1000}],
        "settings": {"max_new_tokens": 256, "temperature": 0.7, "top_p": 1.0, "seed": 5, "system": "Be kind."},
    }


def test_an_answer_comes_in_pieces_with_its_tokens_and_its_end(page: Page) -> None:
    found = lines(page.guest().post("/api/answer", json=asked("안녕 there")))
    assert found == [
        {"waiting": 0},
        {"text": "안녕 ", "tokens": 1},
        {"text": "there ", "tokens": 2},
        {"reason": "end", "tokens": 2, "seconds": 2.0, "dropped": 0},
    ]


def test_a_model_gets_the_turns_settings_and_number_that_the_page_says(page: Page) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    page.guest().post("/api/answer", json=asked(model=1, number=4, messages=turns))
    assert (
        page.models["runs/dpo"].seen == [(turns, Sampling(7, 0.5, 0, 0.9, 3), 4)] and not page.models["runs/sft"].seen
    )


def test_half_a_character_is_no_error(page: Page) -> None:
    body = json.dumps(asked("X")).replace('"X"', '"a \\ud800 b"')
    answer = page.guest().post("/api/answer", content=body, headers={"content-type": "application/json"})
    assert "".join(line.get("text", "") for line in lines(answer)) == "a ? b "


def test_a_model_that_fails_is_told_and_the_other_goes_on(page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    browser = page.guest()
    assert lines(browser.post("/api/answer", json=asked("well fail"))) == [
        {"waiting": 0},
        {"text": "well ", "tokens": 1},
        {"failed": ""},
    ]
    assert capsys.readouterr().err == "runs/sft: no answer (CUDA out of memory)\n"
    assert lines(browser.post("/api/answer", json=asked("well", model=1)))[-1]["reason"] == "end"
    assert lines(browser.post("/api/answer", json=asked("well")))[-1]["reason"] == "end"


def test_what_a_person_can_mend_is_told_on_the_page_in_its_language(page: Page) -> None:
    browser = page.guest()
    english = lines(browser.post("/api/answer", json=asked("long")))[-1]["failed"]
    korean = lines(browser.post("/api/answer", json=asked("long", language="ko")))[-1]["failed"]
    assert english == "the chat template refuses the conversation (no)"  # /new is the terminal's
    assert korean == "채팅 템플릿이 이 대화를 거부합니다(no)"


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ({"model": 2}, "model is a whole number from 0 to 1"),
        ({"model": True}, "model is a whole number"),
        ({"model": -1}, "model is a whole number"),
        ({"number": "0"}, "number is a whole number"),
        ({"messages": []}, "send 1 to 2,000 messages"),
        ({"messages": "hello"}, "send 1 to 2,000 messages"),
        ({"messages": [{"role": "user", "content": "a"}] * 2001}, "send 1 to 2,000 messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "every message has a role and a text"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "every message has a role and a text"),
        ({"messages": ["a"]}, "every message has a role and a text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "of user and assistant in turn"),
        ({"messages": [{"role": "system", "content": "a"}]}, "of user and assistant in turn"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]},
            "the last of the user",
        ),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "a"}] * 2}, "in turn"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "has a role"),
        ({"temperature": -0.1}, "temperature is a number from 0 to 100"),
        ({"temperature": 101}, "temperature is a number from 0 to 100"),
        ({"temperature": 10**400}, "temperature is a number from 0 to 100"),
        ({"temperature": None}, "temperature is a number from 0 to 100"),
        ({"temperature": float("nan")}, "temperature is a number from 0 to 100"),
        ({"temperature": True}, "temperature is a number from 0 to 100"),
        ({"top_p": 0}, "top_p is a number above 0, at most 1"),
        ({"top_p": 1.01}, "top_p is a number above 0, at most 1"),
        ({"max_new_tokens": 0}, "max_new_tokens is a whole number from 1 to 131,072"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is a whole number"),
        ({"seed": 2 * WHOLE}, "seed is a whole number"),
    ],
)
def test_what_a_page_may_not_ask_is_refused(page: Page, how: dict[str, Any], problem: str) -> None:
    body = json.dumps(asked(**how))
    answer = page.guest().post("/api/answer", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and problem in answer.json()["text"]
    assert not any(model.seen for model in page.models.values())


# -- waiting and stopping --------------------------------------------------------------------------------------------


def test_a_model_answers_one_at_a_time_and_tells_the_others_that_they_wait(page: Page, served: httpx.Client) -> None:
    sft = page.models["runs/sft"]
    found: dict[str, list[dict[str, Any]]] = {}

    def ask(name: str, **how: Any) -> threading.Thread:
        thread = threading.Thread(
            target=lambda: found.update({name: lines(served.post("/api/answer", json=asked(**how)))})
        )
        thread.start()
        return thread

    first = ask("first", text="wait one")
    until(lambda: sft.seen)
    second = ask("second", text="two")
    until(lambda: len(page.chat.queues[0]) == 2)
    third = ask("third", text="three")
    until(lambda: len(page.chat.queues[0]) == 3)
    other = ask("other", text="four", model=1)  # the other model is free
    other.join(30)
    assert found["other"][-1]["reason"] == "end" and len(sft.seen) == 1
    sft.go.set()
    for thread in (first, second, third):
        thread.join(30)
    waited = {name: [line["waiting"] for line in found[name] if "waiting" in line] for name in found}
    assert waited == {"first": [0], "second": [1, 0], "third": [2, 1, 0], "other": [0]}
    assert [call[0][-1]["content"] for call in sft.seen] == ["wait one", "two", "three"]
    assert page.chat.queues == [[], []]


def test_an_answer_stops_where_its_reader_leaves_and_the_next_one_begins(page: Page, served: httpx.Client) -> None:
    sft = page.models["runs/sft"]
    with served.stream("POST", "/api/answer", json=asked("one wait two")) as answer:
        pieces = answer.iter_lines()
        assert [json.loads(next(pieces)) for _ in range(2)][-1] == {"text": "one ", "tokens": 1}
    assert sft.stopped.wait(30)
    assert lines(served.post("/api/answer", json=asked("three")))[-1]["reason"] == "end"


def test_who_leaves_while_waiting_is_never_answered(page: Page, served: httpx.Client) -> None:
    sft = page.models["runs/sft"]
    with served.stream("POST", "/api/answer", json=asked("wait")) as first:
        pieces = first.iter_lines()  # letting go of it would close the answer
        next(pieces)
        with served.stream("POST", "/api/answer", json=asked("two")) as second:
            others = second.iter_lines()
            assert json.loads(next(others)) == {"waiting": 1}
        until(lambda: len(page.chat.queues[0]) == 1)
        sft.go.set()
    until(lambda: not page.chat.queues[0])
    assert [call[0][-1]["content"] for call in sft.seen] == ["wait"]


def test_a_crowd_is_told_to_come_back(page: Page) -> None:
    import asyncio

    page.chat.queues[0] += [asyncio.Event() for _ in range(MOST_WAITING + 1)]
    answer = page.guest().post("/api/answer", json=asked())
    assert answer.status_code == 503 and answer.json()["error"] == "crowded"


# -- who may come in -------------------------------------------------------------------------------------------------


def test_only_those_with_the_link_chat(page: Page) -> None:
    browser = page.stranger()
    assert browser.get("/api/chat").status_code == browser.post("/api/answer", json=asked()).status_code == 401
    assert browser.post("/api/enter", json={"token": "x" * 32}).status_code == 401
    assert browser.get("/").status_code == 200  # the page itself says nothing


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"x-leyden": "0"}, 403),
        ({"content-type": "text/plain"}, 403),
        ({"host": "evil.example"}, 403),
        ({"origin": BASE, "sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_other_pages_cannot_ask(page: Page, headers: dict[str, str], status: int) -> None:
    body = json.dumps(asked()).encode()
    answer = page.guest().post("/api/answer", content=body, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status and bool(page.models["runs/sft"].seen) == (status == 200)


def test_a_conversation_without_end_is_refused(page: Page) -> None:
    assert page.guest().post("/api/answer", json=asked("a" * (1 << 20))).json()["error"] == "big"


def test_every_file_that_the_page_names_is_there_and_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    browser, seen = page.stranger(), {"/"}
    todo = ["/"]
    while todo:
        at = todo.pop()
        answer = browser.get(at)
        assert answer.status_code == 200, at
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        names = re.findall(r'(?:href|src)="(/[^"]+)"|from "(\.[^"]+)"', answer.text)
        for name in (str(httpx.URL(BASE + at).join(a or b).path) for a, b in names):
            if name not in seen:
                seen.add(name)
                todo.append(name)
    own = {f"/page/{file.name}" for file in PAGE.iterdir()} - {"/page/index.html"}
    assert own <= seen and {"/shared/text.js", "/shared/api.js", "/shared/base.css"} <= seen
    files = [*PAGE.iterdir(), *SHARED.iterdir()]
    assert [
        file.name for file in files if re.search(r"""(?:src|href|url|import|fetch)\W{1,3}https?:""", file.read_text())
    ] == []


def test_the_page_is_installed_with_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    data = tomllib.loads(text)["tool"]["setuptools"]["package-data"]
    assert data["leyden.models.chat"] == data["leyden.web"] == ["page/*"]


def test_both_languages_say_the_same_things() -> None:
    _, english, korean = re.split(
        r"^  (?:en|ko): \{$", (PAGE / "words.js").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    names = [re.findall(r"(?:^ {4}|[,{] )(\w+): (?=[\"\[{])", text, re.MULTILINE) for text in (english, korean)]
    fields = [re.findall(r"\{\d\}", text) for text in (english, korean)]
    assert names[0] == names[1] and len(names[0]) > 50 and sorted(fields[0]) == sorted(fields[1])


# -- the models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Answers:
    return Answers("tiny", Sampling(12, 1.0, 0, 1.0, 0))


def told(answers: Answers, turns: list[Mapping[str, Any]] | str, **how: Any) -> tuple[str, Written]:
    messages = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    pieces: list[str] = []
    written = answers.write(messages, lambda piece, tokens: pieces.append(piece), **how)
    return "".join(pieces), written


def test_the_same_seed_and_lines_answer_as_in_the_terminal(tiny: Answers) -> None:
    from leyden.models.chat.conversation import Conversation
    from leyden.models.chat.loop import Talk

    talk = Talk(tiny.policy, Conversation(tiny.template, tiny.positions, 12), tiny.sampling)
    for line in ("하나?", "/again", "둘?"):
        talk.take(line)
    assert len(talk.conversation.turns) == 4
    turns = [dict(turn) for turn in talk.conversation.turns]
    first, again = told(tiny, "하나?", number=0)[0], told(tiny, "하나?", number=1)[0]
    assert first != again == turns[1]["content"]
    assert told(tiny, turns[:3], number=2)[0] == turns[3]["content"]


def test_how_an_answer_ended_is_told(tiny: Answers) -> None:
    greedy = Sampling(100, 0.0)
    text, written = told(tiny, "안녕하세요", sampling=Sampling(5, 0.0))
    assert written.reason == "length" and written.tokens == 5 and written.seconds > 0 and text
    calls = iter(range(1000))
    text, written = told(tiny, "안녕하세요", sampling=greedy, is_stopped=lambda: next(calls) >= 3)
    assert (written.reason, written.tokens) == ("stopped", 3) and text
    assert told(tiny, "안녕하세요", sampling=greedy, is_stopped=lambda: True)[0] == ""
    many = [{"role": ("user", "assistant")[n % 2], "content": f"{n} " + "가 나 다 라 " * 12} for n in range(81)]
    _, written = told(tiny, many, sampling=Sampling(2, 0.0))
    assert written.dropped > 40 and written.dropped % 2 == 0
    with pytest.raises(UserError, match="shorten it"):
        told(tiny, "가 " * 3000)


def test_two_models_that_write_at_once_write_what_each_would_alone(tiny: Answers) -> None:
    other = Answers("tiny", Sampling(12, 1.0, 0, 1.0, 1))
    alone = [told(tiny, "서울은?", number=0)[0], told(other, "서울은?", number=0)[0]]
    assert alone[0] != alone[1]
    together: dict[int, str] = {}

    def write(at: int, model: Answers) -> None:
        together[at] = told(model, "서울은?", number=0)[0]

    threads = [threading.Thread(target=write, args=pair) for pair in enumerate((tiny, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[0], together[1]] == alone


def test_a_long_conversation_is_cut_by_halving(tiny: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page sends all turns each time: trying every cut would read a long conversation hundreds of times."""
    from leyden.models.chat.conversation import Conversation

    plain = [f"word {n}" for n in range(601)]
    talk = Conversation(tiny.template, 200, 20)
    talk.turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(plain[:-1])]
    tried: list[int] = []
    ids = Conversation._ids
    monkeypatch.setattr(Conversation, "_ids", lambda self, first: tried.append(first) or ids(self, first))
    prompt, dropped = talk.ask(plain[-1])
    assert len(tried) < 15 and len(prompt) <= 180 < len(ids(talk, dropped - 2))


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["tiny", "a/b", "c/d", "--web"], "leyden chat: 3 models; give one or two"),
        (["tiny", "a/b"], "2 models; give one, or add --web, which shows two side by side"),
        (["tiny", "tiny", "--web"], "tiny: stands there twice; name it once"),
        (["tiny", "--port", "8800"], "--port: only with --web; leave it out"),
        (["tiny", "--host", "127.0.0.1"], "--host: only with --web; leave it out"),
        (["tiny", "./missing", "--web"], "./missing: no such model folder"),
        (["tiny", "--web", "--port", "99999"], "--port 99999: give a number from 0 to 65535"),
        (["tiny", "--web", "--url", "chat.example.org"], "--url chat.example.org: give an address that people open"),
        (["tiny", "--web", "--seed", str(10**20)], "--web: seed is a whole number from"),
        (["tiny", "--web", "--max-new-tokens", "999999"], "--web: max_new_tokens is a whole number"),
        (["tiny", "--web", "--port", "0", "--base", "tiny"], "tiny: no adapter, so it has no base"),
    ],
)
def test_mistakes_are_told_in_one_line(workplace: Path, argv: list[str], problem: str) -> None:
    with pytest.raises(UserError) as told:
        main(argv)
    assert problem in str(told.value) and "\n" not in str(told.value)


def test_models_that_cannot_chat_are_told(workplace: Path) -> None:
    tiny = Path(web.__file__).parent.parent / "tiny"
    for name in ("base", "reward"):
        shutil.copytree(tiny, name)
    Path("base/chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads(Path("base/tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    Path("base/tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads(Path("reward/config.json").read_text())
    Path("reward/config.json").write_text(json.dumps(config | {"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(UserError, match="base model, without a chat template; add --chat-template plain"):
        main(["./base", "--web", "--port", "0"])
    with pytest.raises(UserError, match="a reward model scores answers and gives none"):
        main(["tiny", "./reward", "--web", "--port", "0"])


def test_without_its_packages_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leyden.web.serve.find_spec", lambda name: None)
    problem = r"^leyden chat --web: starlette is not installed; type pip install 'leyden\[annotate\]'$"
    with pytest.raises(UserError, match=problem):
        main(["tiny", "--web"])


def test_models_are_named_by_what_tells_them_apart() -> None:
    assert list(short_names(["tiny"])) == ["tiny"]
    assert list(short_names(["runs/sft/export", "runs/dpo/"])) == ["sft", "dpo"]
    assert list(short_names(["a/sft", "b/sft"])) == ["a/sft", "b/sft"]
    with pytest.raises(UserError, match="runs/sft/export: stands there twice|runs/sft: stands there twice"):
        short_names(["runs/sft", "runs/sft/export"])


def test_a_page_is_shown_until_ctrl_c_and_ends_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
    words = [sys.executable, "-m", "leyden", "chat", "tiny", "--web", "--port", "0", "--system", "짧게."]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    page = subprocess.Popen(words, env=environment, text=True, cwd=tmp_path, **pipes)  # type: ignore[call-overload]
    try:
        assert page.stdout.readline() == "tiny: loading\n"
        link = page.stdout.readline().removeprefix("chat: ").strip()
        base, token = link.split("/#")
        assert page.stdout.readline() == "Ctrl-C ends the page\n"
        with httpx.Client(base_url=base, headers=JSON, timeout=120) as browser:
            assert browser.post("/api/enter", json={"token": token}).json() == {"person": "guest"}
            assert browser.get("/api/chat").json()["settings"]["system"] == "짧게."
            body = asked("서울은 어디예요?", max_new_tokens=1000, temperature=3, top_p=1)
            with browser.stream("POST", "/api/answer", json=body) as answer:
                pieces = answer.iter_lines()
                while "text" not in json.loads(next(pieces)):
                    pass
                page.send_signal(signal.SIGINT)
                assert json.loads(list(pieces)[-1])["reason"] == "stopped"
        assert page.wait(60) == 0 and page.stderr.read() == "" and page.stdout.read() == ""
    finally:
        page.kill()
        page.communicate()
