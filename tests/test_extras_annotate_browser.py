"""The page of `leyden annotate` in a real browser: two people at once, kills, keys alone, phones, dark and light."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

playwright = pytest.importorskip("playwright.sync_api")
from browsers import chromium, least_contrast, needs_chromium  # noqa: E402

from leyden.datamodules.annotate.store import Store  # noqa: E402
from leyden.votes.vote import Answer, Item, current  # noqa: E402

pytestmark = needs_chromium
ALL = "[...document.querySelectorAll"
TANGLE = "".join(mark * 4000 for mark in ("**a", "[b](", "`", "_c", "~~", "|", "> ", "- ", "\n#", "\n1. "))
SCRIPT = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title = 'hacked'\">"


class Server:
    """`leyden annotate serve` in a process of its own, which can be killed and started again at the same port."""

    running: ClassVar[list[Server]] = []

    def __init__(self, folder: Path, *people: str) -> None:
        self.running.append(self)
        self.folder, self.port, self.links = folder, 0, dict[str, str]()
        self.start("--people", *people)

    def start(self, *more: str) -> None:
        command = [sys.executable, "-m", "leyden", "annotate", "serve", "--store", "votes.db", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, *more], cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.match(r"(.+): (http://\S+:(\d+)/#\S+)", line):
                self.links[found[1]], self.port = found[2], int(found[3])
            if "Ctrl-C" in line:
                return
        raise AssertionError(f"the server ended with {self.process.wait()}")

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        code = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture(autouse=True)
def _no_server_is_left() -> Iterator[None]:
    yield
    while Server.running:
        Server.running.pop().end(signal.SIGKILL)


@pytest.fixture
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def items(folder: Path, count: int, answers: int = 2, texts: dict[int, str] | None = None) -> list[Item]:
    """Items in the store of a folder."""
    told = [
        Item(
            ({"role": "user", "content": f"question {number}"},),
            tuple(Answer((texts or {}).get(k, f"answer {k} of {number}"), f"m{k}") for k in range(answers)),
        )
        for number in range(count)
    ]
    store = Store(folder / "votes.db")
    store.add_items(told)
    store.close()
    return told


def votes(folder: Path) -> list[Any]:
    store = Store(folder / "votes.db", make=False)
    told = store.votes()
    store.close()
    return told


def opened(browser: Any, link: str, **how: Any) -> Any:
    page = browser.new_context(**({"locale": "en-US", "viewport": {"width": 1360, "height": 900}} | how)).new_page()
    page.goto(link)
    page.wait_for_selector(".card")
    return page


def question(page: Any) -> str:
    return str(page.inner_text(".turn.user .text"))


def ranked(page: Any, *keys: str) -> None:
    """Rank by keys, and wait for the next item."""
    moved(page, *keys, "Enter")


def moved(page: Any, *keys: str) -> None:
    """Press keys, and wait until another item is there."""
    before = page.evaluate("document.querySelector('.card').dataset.key")
    for key in keys:
        page.keyboard.press(key)
    page.wait_for_function("before => document.querySelector('.card')?.dataset.key !== before", arg=before)


class Person(threading.Thread):
    """Somebody who ranks whatever comes, by keys, in a browser of their own."""

    def __init__(self, link: str) -> None:
        super().__init__()
        self.link, self.told, self.browser = link, 0, 0
        self.is_killed = False

    def run(self) -> None:
        try:
            with chromium() as started:
                processes = started.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
                self.browser = next(int(process["id"]) for process in processes if process["type"] == "browser")
                page = opened(started, self.link)
                page.set_default_timeout(90_000)
                while page.query_selector(".card"):
                    ranked(page, "1", "2")
                    self.told += 1
        except playwright.Error:
            if not self.is_killed:
                raise

    def kill(self) -> None:
        self.is_killed = True
        os.kill(self.browser, signal.SIGKILL)


def test_two_people_at_once_a_killed_browser_and_a_killed_server(tmp_path: Path) -> None:
    told = items(tmp_path, 50)
    server = Server(tmp_path, "Kim", "Lee")
    links = dict(server.links)
    kim, lee = Person(links["Kim"]), Person(links["Lee"])
    for person in (kim, lee):
        person.start()
    wait_for(lambda: kim.told > 8 and lee.told > 8)
    server.end(signal.SIGKILL)
    assert len(votes(tmp_path)) >= kim.told + lee.told  # what a browser was told is stored is stored
    server.start()
    wait_for(lambda: lee.told > 16)
    lee.kill()
    lee.join(60)
    again = Person(links["Lee"])
    again.start()
    for person in (kim, again):
        person.join(180)
    assert server.end() == 0
    counted = Counter((vote.item, vote.person) for vote in votes(tmp_path))
    assert counted == {(one.id, person): 1 for one in told for person in ("Kim", "Lee")}
    assert all(sorted(vote.ranks) == [1, 2] for vote in votes(tmp_path))


def wait_for(done: Any, seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.05)


def waiting(page: Any) -> int:
    """Votes that a browser keeps until they are sent."""
    return int(page.evaluate("Object.keys(localStorage).filter(key => key.startsWith('leyden vote ')).length"))


def test_a_vote_that_cannot_be_sent_waits_on_the_page_and_is_stored_once(browser: Any, tmp_path: Path) -> None:
    items(tmp_path, 3)
    server = Server(tmp_path, "Kim")
    page = opened(browser, server.links["Kim"])
    server.end(signal.SIGKILL)
    for key in ("1", "2", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#notice.waiting")
    assert waiting(page) == 1
    server.start()
    page.wait_for_function("() => document.querySelector('#count').textContent === '1 of 3'")
    page.wait_for_function("() => document.querySelector('#notice').hidden")
    # the same once more, and the page is closed before the server is back
    server.end(signal.SIGKILL)
    for key in ("2", "1", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#notice.waiting")
    context = page.context
    page.close()
    server.start()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")  # the cookie is still there
    page.wait_for_function("() => document.querySelector('#count').textContent === '2 of 3'")
    server.end()
    assert [sorted(vote.ranks) for vote in votes(tmp_path)] == [[1, 2], [1, 2]]


def test_two_tabs_keep_a_vote_each_and_send_them_in_their_order(browser: Any, tmp_path: Path) -> None:
    items(tmp_path, 3)
    server = Server(tmp_path, "Kim")
    first = opened(browser, server.links["Kim"])
    context = first.context
    second = context.new_page()
    second.goto(f"http://127.0.0.1:{server.port}/")
    second.wait_for_selector(".card")
    server.end(signal.SIGKILL)
    for page, reason in ((first, "the first"), (second, "the second")):
        page.keyboard.press("r")
        page.keyboard.type(reason)
        page.keyboard.press("Escape")
        for key in ("1", "2", "Enter"):
            page.keyboard.press(key)
        page.wait_for_selector("#notice.waiting")
    assert waiting(second) == 2
    first.close(), second.close()
    server.start()
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_selector(".card")
    wait_for(lambda: waiting(page) == 0)
    server.end()
    assert [vote.reason for vote in votes(tmp_path)] == ["the first", "the second"]


def test_a_vote_with_an_id_of_another_one_is_told_and_holds_up_nothing(browser: Any, tmp_path: Path) -> None:
    items(tmp_path, 3)
    server = Server(tmp_path, "Kim")
    page = opened(browser, server.links["Kim"])
    page.evaluate("() => { crypto.getRandomValues = (bytes) => bytes.fill(7); }")
    ranked(page, "1", "2")
    for key in ("1", "2", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#notice.kept")
    assert page.inner_text("#notice").startswith("A vote was not taken") and waiting(page) == 0
    server.end()
    assert len(votes(tmp_path)) == 1


def test_a_tab_of_someone_else_keeps_its_vote_until_its_link_is_opened_again(browser: Any, tmp_path: Path) -> None:
    items(tmp_path, 3)
    server = Server(tmp_path, "Kim", "Lee")
    kim = opened(browser, server.links["Kim"])
    lee = kim.context.new_page()
    lee.goto(server.links["Lee"])
    lee.wait_for_selector(".card")
    for key in ("1", "2", "Enter"):
        kim.keyboard.press(key)
    kim.wait_for_selector("#notice.waiting")
    assert kim.inner_text("#notice").startswith("This browser is now Lee.") and kim.inner_text("#person") == "Kim"
    ranked(lee, "2", "1")
    assert [vote.person for vote in votes(tmp_path)] == ["Lee"]
    lee.goto("about:blank")
    lee.goto(server.links["Kim"])
    lee.wait_for_function("() => document.querySelector('#count').textContent === '1 of 3'")
    kim.wait_for_function("() => document.querySelector('#count').textContent === '1 of 3'")
    kim.wait_for_function("() => document.querySelector('#notice').hidden")
    server.end()
    assert [vote.person for vote in votes(tmp_path)] == ["Lee", "Kim"]


def test_keys_alone(browser: Any, tmp_path: Path) -> None:
    items(tmp_path, 4, answers=4)
    server = Server(tmp_path, "Kim")
    page = opened(browser, server.links["Kim"])

    def pressed() -> list[str]:
        return [card.query_selector("[aria-pressed=true]") and card.query_selector("[aria-pressed=true]").inner_text()
                for card in page.query_selector_all(".card")]  # fmt: skip

    for key in ("3", "1", "1", "2"):
        page.keyboard.press(key)
    assert pressed() == ["3", "1", "1", "2"]
    page.keyboard.press("c")
    page.keyboard.press("0")
    assert pressed() == ["3", "1", None, "2"]
    page.keyboard.press("z")
    page.keyboard.press("z")
    assert pressed() == ["3", "1", "1", None]
    page.keyboard.press("Enter")  # not yet: D has no rank
    assert page.inner_text("#notice") == "Give each answer a rank first."
    assert page.evaluate("document.activeElement.dataset.key") == page.query_selector_all(".card")[3].get_attribute(
        "data-key"
    )
    page.keyboard.press("2")
    page.keyboard.press("r")
    page.keyboard.type("a reason with 3 numbers")
    page.keyboard.press("Escape")
    ranked(page)
    page.keyboard.press("ArrowRight")
    ranked(page, "x")  # all bad
    moved(page, "s")
    moved(page, "z")  # back to the one that was skipped
    assert page.inner_text(".banner").startswith("You are changing an earlier vote.")
    ranked(page, "1", "1", "1", "1")
    server.end()
    last = current(votes(tmp_path))
    texts = [(vote.ranks, vote.all_bad, vote.reason) for vote in last]
    assert sorted(texts[0][0]) == [1, 1, 2, 3] and texts[0][2] == "a reason with 3 numbers"
    assert texts[1] == ((), True, "") and texts[2] == ((1, 1, 1, 1), False, "")
    assert len(votes(tmp_path)) == 4


@pytest.mark.parametrize("touch", [False, True])
def test_dragging_makes_a_ranking(browser: Any, tmp_path: Path, touch: bool) -> None:
    items(tmp_path, 1, answers=3)
    server = Server(tmp_path, "Kim")
    page = opened(
        browser, server.links["Kim"], has_touch=touch, viewport={"width": 380 if touch else 1360, "height": 800}
    )

    def drag(letter: str, zone: str) -> None:
        start = page.query_selector(f".card .chip:text-is('{letter}')").bounding_box()
        end = page.query_selector(zone).bounding_box()
        points = [(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2) for box in (start, end)]
        if touch:
            finger = page.context.new_cdp_session(page)
            for kind, at in (("touchStart", 0), ("touchMove", 0.5), ("touchMove", 1), ("touchEnd", None)):
                (x0, y0), (x1, y1) = points
                spots = [] if at is None else [{"x": x0 + at * (x1 - x0), "y": y0 + at * (y1 - y0)}]
                finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": spots})
        else:
            page.mouse.move(*points[0])
            page.mouse.down()
            page.mouse.move(*points[1], steps=5)
            page.mouse.up()

    drag("A", ".gap.first")
    drag("B", ".gap >> nth=0")
    drag("C", ".tier >> nth=1")
    tiers = [re.sub(r"\s", "", tier.inner_text()) for tier in page.query_selector_all(".tier")]
    assert tiers == ["1B", "2AC"]
    page.click("#submit")
    page.wait_for_selector(".end-page")
    server.end()
    assert sorted(votes(tmp_path)[0].ranks) == [1, 2, 2]


@pytest.mark.parametrize("width", [380, 1360])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    long = "\n\n".join(f"paragraph {number} of a long answer, with `code` and **more**" for number in range(60))
    wide = "```python\nx = '" + "long line " * 60 + "'\n```\n\n|a|b|\n|-|-|\n|" + "word" * 90 + "|2|"
    texts = {0: long, 1: SCRIPT, 2: wide, 3: "한글 답변입니다. " * 40, 4: "x" * 600, 5: TANGLE}
    items(tmp_path, 1, answers=8, texts=texts)
    server = Server(tmp_path, "Kim")
    page = opened(browser, server.links["Kim"], viewport={"width": width, "height": 800}, color_scheme=scheme)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(f"{ALL}('.card, .dock')].every(box => box.getBoundingClientRect().right <= innerWidth + 1)")
    assert page.title() == "Leyden" and "<script>" in page.inner_text(".answers")
    assert page.evaluate("document.querySelectorAll('main script, main img').length") == 0
    fold = page.query_selector(".fold:visible")
    height = f"Math.max(...{ALL}('.card')].map(card => card.offsetHeight))"
    tall = page.evaluate(height)
    fold.click()
    assert page.evaluate(height) > 2 * tall
    assert contrast(page) >= 4.5
    page.click("#language")
    assert page.evaluate("document.documentElement.lang") == "ko" and page.inner_text("#skip") == "건너뛰기"
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid" or page.evaluate(
        "document.activeElement.matches('.card')"
    )
    has_name = "box.textContent.trim() || box.ariaLabel || box.labels?.length"
    unnamed = f"{ALL}('button, textarea')].filter(box => box.offsetParent && !({has_name})).length"
    assert page.evaluate(unnamed) == 0 and errors == []
    server.end()


def contrast(page: Any) -> float:
    boxes = ":is(p, button, span, code, th, td, label, kbd, li):not([aria-disabled=true])"
    return least_contrast(page, boxes)


def test_a_link_that_is_wrong_is_told_and_leaves_the_address(browser: Any, tmp_path: Path) -> None:
    items(tmp_path, 1)
    server = Server(tmp_path, "Kim")
    page = browser.new_context(locale="ko-KR").new_page()
    page.goto(f"http://127.0.0.1:{server.port}/#wrong")
    page.wait_for_function("() => document.body.innerText.includes('유효하지 않습니다')")
    page.goto("about:blank")
    page.goto(server.links["Kim"])
    page.wait_for_selector(".card")
    assert "#" not in page.url
    page.reload()
    page.wait_for_selector(".card")
    server.end()


def test_a_chat_is_ranked_and_goes_on_with_the_best_answer(browser: Any, tmp_path: Path) -> None:
    server = Server(tmp_path, "Kim", "--models", "tiny", "--max-new-tokens", "12")
    page = browser.new_context(locale="en-US").new_page()
    page.set_default_timeout(90_000)
    page.goto(server.links["Kim"])
    page.wait_for_selector("#ask")
    page.keyboard.type("What is 2 plus 3?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#submit")
    best = page.inner_text(".card >> nth=1")
    for key in ("2", "1", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector("#ask")
    told = page.inner_text(".turn.assistant .text")
    assert told and told in best
    page.reload()
    page.wait_for_selector("#ask")
    assert page.inner_text(".turn.assistant .text") == told
    page.click("#anew")
    page.wait_for_selector(".hello")
    server.end()
    store = Store(tmp_path / "votes.db")
    (item,), (vote,) = store.items(), store.votes()
    store.close()
    assert item.answers[vote.ranks.index(1)].text.split() == told.split() and item.answers[0].model == "tiny"
