"""The HTTP judge against a real server: grades, retries, time-outs, nonsense, the cache, and where no key may be."""

from __future__ import annotations

import json
import logging
import random
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from leyden.errors import UserError
from leyden.example import Sample
from leyden.rewards import judge as module
from leyden.rewards.function import score
from leyden.rewards.http_endpoint import _completions, _retry_after
from leyden.rewards.judge import HTTPJudge, read_grade
from leyden.rewards.judge_cache import Verdict, Verdicts

KEY = "sk-very-secret-0123456789"


class Server:
    """A chat endpoint whose answers a test writes: `reply(number of the request, its body)` is a status, a body (text,
    or an object for JSON) and headers; or just the words of the assistant."""

    def __init__(self) -> None:
        self.reply: Callable[[int, dict[str, Any]], Any] = lambda number, body: '{"score": 7}'
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.busy = self.most = 0
        self.lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.seen.append((self.path, dict(self.headers), body))
                    number = len(server.seen)
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                try:
                    said = server.reply(number, body)
                    status, content, headers = said if isinstance(said, tuple) else (200, chat(said), {})
                    data = content if isinstance(content, bytes) else json.dumps(content).encode()
                finally:
                    with server.lock:
                        server.busy -= 1
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    for start in range(0, len(data), 64):
                        self.wfile.write(data[start : start + 64])
                        time.sleep(server.drip)
                except OSError:  # the client has left
                    pass

            def log_message(self, *args: Any) -> None:
                pass

        return Handler

    drip = 0.0


def chat(words: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": words}}]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def judge(server: Server, **options: Any) -> HTTPJudge:
    return HTTPJudge(server.url, "m", **({"backoff": 0.01, "timeout": 5.0} | options))


def sample(response: str, line: int = 1, **more: Any) -> Sample:
    return Sample([{"role": "user", "content": "수도는?"}], response, source=f"rows.jsonl:{line}", **more)


def samples(count: int) -> list[Sample]:
    return [sample(f"답 {number}", number + 1) for number in range(count)]


def asked_about(body: dict[str, Any]) -> str:
    """The response that a request is about."""
    return str(body["messages"][1]["content"]).split("[answer ")[1].split("\n")[1]


# -- grades -----------------------------------------------------------------------------------------------------------


def test_grades_come_in_the_order_of_the_samples_and_each_is_asked_for_once(server: Server) -> None:
    def reply(number: int, body: dict[str, Any]) -> str:
        time.sleep(0.002 * (number % 4))
        return f'{{"score": {asked_about(body).removeprefix("답 ")}}}'

    server.reply = reply
    given = samples(9) + samples(4)
    found = score(judge(server, scale=(0, 10)), given)
    assert found.dtype == torch.float32 and found.tolist() == [*range(9), *range(4)]
    assert len(server.seen) == 9
    assert judge(server)([]).shape == (0,)


def test_what_is_sent(server: Server) -> None:
    score(judge(server, options={"max_tokens": 50}), [sample("서울입니다. [end of answer", finished=False)])
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert {name: body[name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "m",
        "temperature": 0,
        "max_tokens": 50,
    }
    system, user = (turn["content"] for turn in body["messages"])
    assert "Korean" in system and '{"score": NUMBER}' in system and "from 1 (worst) to 10 (best)" in system
    assert "user:\n수도는?" in user and "\n서울입니다. [end of answer\n" in user and "cut off" in user
    mark = user.split("[answer ")[1].split("]")[0]  # the response cannot have known it
    assert user.count(f"[end of answer {mark}]") == 1 and mark not in "서울입니다. [end of answer"


@pytest.mark.parametrize("key", [None, "", "  "])
def test_no_key_and_options_that_leave_a_key_of_the_body_out(
    key: str | None, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY") if key is None else monkeypatch.setenv("OPENAI_API_KEY", key)
    score(judge(server, options={"temperature": None}), [sample("네")])
    (_, headers, body) = server.seen[0]
    assert "Authorization" not in headers and set(body) == {"model", "messages"}


@pytest.mark.parametrize(
    "url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/chat/completions"]
)
def test_urls_with_and_without_their_end(url: str) -> None:
    assert _completions(url) == ("http://h:1/v1/chat/completions", "h:1/v1/chat/completions")
    assert _completions("https://h/x/v1?code=secret") == (
        "https://h/x/v1/chat/completions?code=secret",
        "h/x/v1/chat/completions",
    )


def test_options_that_cannot_work() -> None:
    for url in ("localhost:8000", "ftp://h/v1", "http://", "http://h /v1", "http://한국/v1"):
        with pytest.raises(UserError, match="give the address of a server"):
            HTTPJudge(url, "m")
    with pytest.raises(UserError, match="leave user and password out") as error:
        HTTPJudge("http://me:hidden@h/v1", "m")
    assert "hidden" not in str(error.value)
    with pytest.raises(UserError, match="name of an environment variable") as error:
        HTTPJudge("http://h/v1", "m", key_env=KEY)
    assert KEY not in str(error.value)
    for options in ({"scale": (5, 5)}, {"scale": (1, float("inf"))}, {"concurrency": 0}):
        with pytest.raises(UserError, match="give the worst grade before the best"):
            HTTPJudge("http://h/v1", "m", **options)  # type: ignore[arg-type]
    for options in ({"timeout": 0}, {"retries": -1}, {"backoff": 0}):
        with pytest.raises(UserError, match="give more than 0"):
            HTTPJudge("http://h/v1", "m", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_at_most_so_many_requests_at_a_time(concurrency: int, server: Server) -> None:
    def reply(number: int, body: dict[str, Any]) -> str:
        time.sleep(0.02)
        return "7"

    server.reply = reply
    score(judge(server, concurrency=concurrency), samples(12))
    assert server.most == concurrency and len(server.seen) == 12


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        ('{"score": 7}', 7),
        ('```json\n{"score": 7.5}\n```', 7.5),
        ('{"score": "7", "why": "good"}', 7),
        ('{"score": 3}\nNo, better:\n{"score": 8}', 8),
        ("<think>maybe 3 or 4\n</think>\n\n8", 8),
        ('{"score": 3} </think> 9', 9),
        ("The answer has 2 faults.\nScore: 8.", 8),
        ("Score: **8/10**", 8),
        ("8 / 10.0", 8),
        ("8 out of 10", 8),
        ("점수: 8점", 8),
        ("10점 만점에 8점입니다.", 8),
        ("10", 10),
        ("1", 1),
        ("", None),
        ("</think>", None),
        ("good", None),
        ("7 or 8", None),
        ("3-4", None),
        ("8/100", None),
        ("80", None),
        ("0", None),
        ("-7", None),
        ('{"score": 11}', None),
        ('{"score": null}', None),
        ('{"score": "7 of 9"}', None),
        ("7\nI hope this helps", None),
        ("1,5", None),
        ("1.2.3", None),
    ],
)
def test_a_grade_is_read_or_not_but_never_guessed(answer: str, grade: float | None) -> None:
    assert read_grade(answer, 1, 10) == grade


def test_scales_below_zero() -> None:
    assert read_grade("-0.5", -1, 1) == -0.5 and read_grade('{"score": -1}', -1, 1) == -1


# -- failures that pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_what_may_pass_is_tried_again(status: int, server: Server) -> None:
    server.reply = lambda number, body: (status, {"error": {"message": "busy"}}, {}) if number < 3 else "7"
    state = random.getstate(), torch.get_rng_state()
    assert score(judge(server), [sample("네")]).tolist() == [7] and len(server.seen) == 3
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])  # jitter is not theirs


class Pauses:
    """A stop event that does not wait, and remembers how long it should have."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def is_set(self) -> bool:
        return False

    def wait(self, pause: float) -> None:
        self.pauses.append(pause)


def test_pauses_double_with_jitter_and_the_server_may_ask_for_more(server: Server) -> None:
    waits = iter(["", "2", "0.5", "", "Sun, 06 Nov 1994 08:49:37 GMT", "soon", "99999"])
    server.reply = lambda number, body: (503, {}, {"Retry-After": next(waits)})
    stop: Any = Pauses()
    with pytest.raises(UserError, match=r"no answer from 127.0.0.1:\d+/v1/chat/completions in 7 tries \(HTTP 503"):
        judge(server, backoff=1.0, retries=6).endpoint.ask([], stop)
    assert len(stop.pauses) == 6
    for number, (pause, asked) in enumerate(zip(stop.pauses, [0, 2, 0.5, 0, 0, 0], strict=True)):
        assert asked + 0.5 * 2**number <= pause <= asked + 1.5 * 2**number
    many: Any = Pauses()
    server.reply = lambda number, body: (429, {}, {"Retry-After": "99999"})
    with pytest.raises(UserError, match="HTTP 429"):
        judge(server, retries=9).endpoint.ask([], many)
    assert all(600 <= pause <= 600 + 90 for pause in many.pauses)
    assert len({round(pause - 600, 9) for pause in stop.pauses}) == 6


def test_the_pause_that_a_server_asks_for_is_kept(server: Server) -> None:
    server.reply = lambda number, body: (429, {}, {"Retry-After": "0.3"}) if number == 1 else "7"
    began = time.monotonic()
    assert score(judge(server), [sample("네")]).tolist() == [7]
    assert time.monotonic() - began >= 0.3
    assert _retry_after("Wed, 21 Oct 2099 07:28:00 GMT") == 600 and _retry_after("nan") == 0 and _retry_after("-3") == 0


def test_a_slow_answer_is_given_up_and_asked_for_again(server: Server) -> None:
    def reply(number: int, body: dict[str, Any]) -> str:
        time.sleep(0.6 if number == 1 else 0)
        return "7"

    server.reply = reply
    assert score(judge(server, timeout=0.2), [sample("네")]).tolist() == [7] and len(server.seen) == 2


def test_an_answer_that_trickles_in_is_given_up_too(server: Server) -> None:
    server.drip = 0.1
    server.reply = lambda number, body: "7" + " " * 2000  # 20 pieces or more
    began = time.monotonic()
    with pytest.raises(UserError, match=r"in 2 tries \(no answer within 0.3 s\)"):
        score(judge(server, timeout=0.3, retries=1), [sample("네")])
    assert time.monotonic() - began < 2


def test_an_endpoint_that_is_down() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    down = HTTPJudge(f"http://127.0.0.1:{port}/v1", "m", backoff=0.01, retries=2)
    with pytest.raises(UserError, match=rf"no answer from 127.0.0.1:{port}/v1/chat/completions in 3 tries .*refused"):
        score(down, samples(20))


@pytest.mark.parametrize("page", [b"<html>Log in</html>", b'{"choices": []}', b'{"error": "x"}', b'{"choi', b"[1]"])
def test_an_answer_that_is_no_chat_completion(page: bytes, server: Server) -> None:
    server.reply = lambda number, body: (200, page, {})
    with pytest.raises(UserError, match="in 2 tries .*which is no chat completion"):
        score(judge(server, retries=1), [sample("네")])
    server.reply = lambda number, body: (200, page, {}) if number == 3 else "7"
    assert score(judge(server), [sample("네")]).tolist() == [7]


def test_pauses_end_when_another_sample_has_failed(server: Server) -> None:
    server.reply = lambda number, body: (503, {}, {}) if asked_about(body) == "답 0" else (400, {}, {})
    began = time.monotonic()
    with pytest.raises(UserError, match="rows.jsonl:2 .*HTTP 400"):
        score(judge(server, backoff=30.0, concurrency=2), samples(2))
    assert time.monotonic() - began < 5


# -- failures that stay -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, {"error": {"message": f"Incorrect API key: {KEY}"}}, "refuses the key in OPENAI_API_KEY .*set the env"),
        (403, {"error": {"message": f"not for {KEY}"}}, "refuses the key in OPENAI_API_KEY"),
        (404, {"error": {"message": "no model m"}}, r"no such place, or no model 'm' \(no model m\); check url and"),
        (400, {"error": {"message": f"too long {KEY}", "code": "x"}}, r"^rows.jsonl:1 .*HTTP 400: too long \*\*\* x"),
        (422, {"detail": "what"}, "HTTP 422: .*what.*check model, options"),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, "HTTP 429: pay insufficient_quota"),
        (307, {}, r"has moved \(HTTP 307\) to http://127.0.0.1:9/; give that url"),
        (302, {}, "has moved"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(
    status: int, body: Any, message: str, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.reply = lambda number, asked: (status, body, {"Location": "http://127.0.0.1:9/"})
    with pytest.raises(UserError, match=message) as error:
        score(judge(server), [sample("네")])
    assert len(server.seen) == 1
    whole = "".join(traceback.format_exception(error.value)) + caplog.text
    assert KEY not in whole and "very-secret" not in whole


def test_a_server_that_wants_a_key_when_none_is_set(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    server.reply = lambda number, body: (401, {}, {})
    with pytest.raises(UserError, match=r"wants a key: set MY_KEY \(HTTP 401\)"):
        score(judge(server, key_env="MY_KEY"), [sample("네")])


def test_nonsense_is_asked_again_and_then_an_error_that_names_the_row(server: Server) -> None:
    def reply(number: int, body: dict[str, Any]) -> str | None:
        words = asked_about(body)
        if words == "답 1":
            return "7" if len(body["messages"]) > 2 else "It is good."
        return "I cannot say." if words == "답 2" else None if words == "답 9" else "5"

    server.reply = reply
    found = score(judge(server), samples(2))
    assert found.tolist() == [5, 7]
    again = server.seen[-1][2]["messages"]
    assert [turn["role"] for turn in again] == ["system", "user", "assistant", "user"]
    assert again[2]["content"] == "It is good." and "from 1 to 10" in again[3]["content"]
    before = len(server.seen)
    with pytest.raises(UserError, match=r"^rows.jsonl:3 \(response '답 2'\): m was asked 3 times and gave no grade"):
        score(judge(server), [samples(3)[2]])
    assert len(server.seen) == before + 3
    with pytest.raises(UserError, match=r"its last answer: ''"):  # no content at all: it ran out of tokens, say
        score(judge(server), [sample("답 9")])


# -- the cache --------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice_also_where_a_later_sample_fails(server: Server) -> None:
    server.reply = lambda number, body: "no" if asked_about(body) == "답 5" else "6"
    with pytest.raises(UserError, match="rows.jsonl:6"):
        score(judge(server, concurrency=1), samples(8))
    first = len(server.seen)
    assert first == 5 + 3
    server.reply = lambda number, body: "8"
    assert score(judge(server), samples(8)).tolist() == [6] * 5 + [8] * 3
    assert len(server.seen) == first + 3  # those that failed, or were never asked
    assert score(judge(server), samples(8)).tolist() == [6] * 5 + [8] * 3 and len(server.seen) == first + 3


def test_what_is_under_way_when_another_fails_is_kept(server: Server) -> None:
    both = threading.Barrier(2)  # on a busy machine the one could fail before the other is asked

    def reply(number: int, body: dict[str, Any]) -> Any:
        both.wait(4)
        if asked_about(body) == "답 0":
            return 400, {}, {}
        time.sleep(0.3)
        return "6"

    server.reply = reply
    with pytest.raises(UserError, match="rows.jsonl:1 .*HTTP 400"):
        score(judge(server, concurrency=2), samples(9))
    assert len(server.seen) == 2
    assert score(judge(server), samples(2)[1:]).tolist() == [6] and len(server.seen) == 2


def test_another_question_is_another_entry(server: Server, tmp_path: Path) -> None:
    given = [sample("네")]
    variants: list[dict[str, Any]] = [{}, {"rubric": "Be strict."}, {"scale": (0, 5)}, {"options": {"seed": 1}}]
    for number, options in enumerate(variants, start=1):
        score(judge(server, **options), given) if number != 3 else None
        if number == 3:
            server.reply = lambda number, body: "3"
            score(judge(server, **options), given)
        assert len(server.seen) == number
    other = HTTPJudge(server.url, "another", backoff=0.01)
    for question in ([sample("네", finished=False)], [Sample([{"role": "user", "content": "?"}], "네")]):
        before = len(server.seen)
        score(judge(server), question)
        assert len(server.seen) == before + 1
    before = len(server.seen)
    score(other, given)
    score(judge(server, cache=str(tmp_path / "deep" / "mine.sqlite")), given)
    assert len(server.seen) == before + 2 and (tmp_path / "deep" / "mine.sqlite").is_file()
    score(judge(server, timeout=9.0, retries=1, concurrency=2, key_env="OTHER"), given)  # none of it is the question
    assert len(server.seen) == before + 2


def test_a_cache_that_cannot_be_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database " * 100)
    for file in (tmp_path / "text", tmp_path, tmp_path / "text" / "inside"):
        with pytest.raises(UserError, match="the judge's cache cannot be used .*name another file as its `cache`"):
            score(judge(server, cache=str(file)), [sample("네")])
    assert server.seen == []


WRITER = """
import sys
from leyden.rewards.judge_cache import Verdict, Verdicts
from pathlib import Path
with Verdicts(Path(sys.argv[1])) as verdicts:
    for number in range(20):
        verdicts.keep({f"{sys.argv[2]}-{number}": Verdict(number, "답"), f"both-{number}": Verdict(number, "답")})
"""


def test_processes_share_a_cache(tmp_path: Path) -> None:
    file = tmp_path / "shared.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    with Verdicts(file) as verdicts:
        keys = [f"{name}-{number}" for name in ("a", "b", "c", "both") for number in range(20)]
        assert verdicts.known(keys) == {key: float(key.split("-")[1]) for key in keys}
        many = [str(number) for number in range(1500)]  # more than one question may hold
        verdicts.keep({key: Verdict(float(key), "half a character \ud83d") for key in many[::2]})
        assert verdicts.known(many) == {key: float(key) for key in many[::2]}


# -- the key, and what is shown ---------------------------------------------------------------------------------------


def test_the_key_is_nowhere(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    echo = f"you are {KEY}"
    replies: list[Any] = [(500, {"error": {"message": echo}}, {}), (503, echo.encode(), {}), (200, echo.encode(), {})]
    server.reply = lambda number, body: replies[number - 1] if number < 4 else "7"
    mine = judge(server, cache=str(tmp_path / "judge.sqlite"))
    score(mine, [sample("네")])
    assert len(server.seen) == 4 and "trying again" in caplog.text
    held = [vars(mine), vars(mine.endpoint), mine._key(sample("네"))]
    assert KEY not in caplog.text + repr(mine) + repr(mine.endpoint) + repr(held)
    assert KEY.encode() not in (tmp_path / "judge.sqlite").read_bytes()
    server.reply = lambda number, body: (500, {"error": {"message": echo}}, {})
    with pytest.raises(UserError) as error:
        score(judge(server, retries=1), [sample("아니요")])
    assert KEY not in "".join(traceback.format_exception(error.value)) and "***" in str(error.value)


@pytest.mark.parametrize("key", [f"{KEY}\n{KEY}", f"{KEY} x", f"{KEY}é", f"{KEY}\x00"])
def test_a_key_that_is_none_is_not_repeated(key: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    if "\x00" in key:
        key = key.replace("\x00", "\x07")  # an environment cannot hold the other
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY holds characters that no key has") as error:
        score(judge(server), [sample("네")])
    assert KEY not in "".join(traceback.format_exception(error.value)) and server.seen == []


def test_long_work_says_how_far_it_is(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def reply(number: int, body: dict[str, Any]) -> str:
        time.sleep(0.04)
        return "7"

    monkeypatch.setattr(module, "EVERY", 0.05)
    caplog.set_level(logging.INFO, "leyden")
    server.reply = reply
    score(judge(server, concurrency=1), samples(5))
    assert "judge: 2 of 5 graded" in caplog.text or "judge: 3 of 5 graded" in caplog.text
    caplog.clear()
    score(judge(server), samples(5))
    assert caplog.text == ""
