"""The page of `leyden chat --web` in a real browser: streaming, stopping, settings, Hangul, phones, dark and light."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

pytest.importorskip("playwright.sync_api")
from browsers import chromium, least_contrast, needs_chromium  # noqa: E402
from prepared import prepared  # noqa: E402
from test_chat_web import Fake, Page  # noqa: E402

from leyden.models.chat.answers import Written  # noqa: E402
from leyden.web.serve import Address, listen  # noqa: E402

pytestmark = needs_chromium
MARKDOWN = """# A title

Some **bold** text and `code`.
<script>document.title = 'hacked'</script><img src=x onerror="document.title = 'hacked'">

```python
def f(x):
    return x + 1  # a line of code that is far longer than a phone is wide, so that it scrolls in its box alone
```

| a | b |
|---|---|
| 1 | 2 |

- [no link](javascript:alert(1))
- [a link](https://example.org)

안녕하세요, 반갑습니다."""
TEXT = "p, button:not(:disabled), span, code, th, td, label, kbd, li, small, h2"
ONE = "() => [...document.querySelectorAll('.text')].filter((box) => box.textContent === 'one ').length === 2"


class Scripted(Fake):
    """Echoes a question; `markdown` as the whole of it is answered by a text of many kinds."""

    def write(self, messages: Any, show: Any, *how: Any) -> Written:
        if messages[-1]["content"] != "markdown":
            return super().write(messages, show, *how)
        self.seen.append((list(messages), *how[:2]))
        words = re.findall(r"\s*\S+", MARKDOWN)
        for count, word in enumerate(words, start=1):
            show(word, count)
        return Written("length", len(words), 2.0, 2)


class Site:
    """The page, served, with two models or one."""

    def __init__(self, count: int = 2) -> None:
        self.page = Page()
        names = ["runs/sft", "runs/dpo"][:count]
        self.models = [Scripted() for _ in names]
        self.page.chat.names, self.page.chat.models = names, list(self.models)
        opened, self.address = listen(Address(port=0))
        self.server = uvicorn.Server(uvicorn.Config(self.page.app, log_level="critical", lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [opened]}, daemon=True)
        self.thread.start()

    def link(self) -> str:
        return self.address.link(self.page.people.invite("guest"))

    def end(self) -> None:
        self.page.chat.ended.set()
        self.server.should_exit = True
        self.thread.join(30)


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    yield made
    made.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def opened(browser: Any, site: Site, **how: Any) -> Any:
    """A page of a browser of its own, with nothing wrong on it so far."""
    context = browser.new_context(**({"viewport": {"width": 1360, "height": 850}, "locale": "en-US"} | how))
    tab = context.new_page()
    tab.set_default_timeout(30_000)
    tab.problems = []
    tab.on("pageerror", lambda error: tab.problems.append(str(error)))
    tab.on("console", lambda said: said.type == "error" and tab.problems.append(said.text))
    tab.goto(site.link())
    tab.wait_for_selector("#ask")
    assert "#" not in tab.url
    return tab


def ask(tab: Any, text: str, done: bool = True) -> None:
    tab.fill("#ask", text)
    tab.press("#ask", "Enter")
    if done:
        ended(tab)


def ended(tab: Any) -> None:
    tab.wait_for_selector("#send:visible")
    tab.wait_for_function("() => !document.querySelector('.card[aria-busy=true]')")


def texts(tab: Any) -> list[str]:
    """What the answers of the last turn say."""
    return [" ".join(text.split()) for text in tab.locator(".turn-box").last.locator(".text").all_inner_texts()]


def said(model: Fake) -> list[str]:
    """What a model was last sent."""
    return [turn["content"].strip() for turn in model.seen[-1][0]]


# -- chatting --------------------------------------------------------------------------------------------------------


def test_two_models_answer_at_once_and_the_conversation_survives_a_reload(browser: Any, site: Site) -> None:
    tab = opened(browser, site)
    assert tab.title() == "runs/sft, runs/dpo · Leyden" and tab.locator("#models").inner_text() == (
        "runs/sft (0.0M) · runs/dpo (0.0M)"
    )
    ask(tab, "one wait two", done=False)
    tab.wait_for_function(ONE)
    assert tab.locator(".card[aria-busy=true]").count() == 2 and tab.locator("#send").is_hidden()
    for model in site.models:
        model.go.set()
    ended(tab)
    assert texts(tab) == ["one wait two", "one wait two"]
    assert tab.locator(".count").first.inner_text() == "3 tokens · 1.5 tokens/s"
    assert tab.locator("#said").inner_text().endswith("answered, 3 tokens.")
    tab.reload()
    tab.wait_for_selector(".card")
    assert texts(tab) == ["one wait two", "one wait two"] and tab.locator(".plain").inner_text() == "one wait two"
    ask(tab, "more")
    (turns, sampling, number) = site.models[0].seen[-1]
    assert [turn["content"].strip() for turn in turns] == ["Be kind.", "one wait two", "one wait two", "more"]
    assert turns[0]["role"] == "system" and number == 1 and sampling.temperature == 0.7
    assert tab.problems == []


def test_whatever_a_model_says_is_shown_and_never_run(browser: Any, site: Site) -> None:
    tab = opened(browser, site)
    ask(tab, "markdown")
    card = tab.locator(".card").first
    assert card.locator("strong").inner_text() == "bold" and card.locator("td").count() == 2
    assert card.locator(".code").get_attribute("data-language") == "python"
    assert "<script>" in card.inner_text() and card.locator("script, img").count() == 0
    assert card.locator("a").count() == 1 and "hacked" not in tab.title()
    assert card.locator(".note").inner_text() == (
        "the 2 oldest turns no longer fit and were left out · cut at 64 new tokens; the settings allow more"
    )
    ask(tab, "<b>mine</b>")
    assert tab.locator(".asked").last.inner_text() == "<b>mine</b>"
    assert tab.problems == []


def test_answers_stop_by_the_key_by_the_button_and_one_by_one(browser: Any, site: Site) -> None:
    tab = opened(browser, site)
    ask(tab, "one wait two", done=False)
    tab.wait_for_function("() => document.querySelectorAll('.text')[1]?.textContent === 'one '")
    tab.get_by_role("button", name="Stop runs/dpo").click()
    assert site.models[1].stopped.wait(30) and not site.models[0].stopped.is_set()
    tab.wait_for_function("() => document.querySelectorAll('.card[aria-busy=true]').length === 1")
    tab.press("#ask", "Escape")
    ended(tab)
    assert site.models[0].stopped.wait(30) and texts(tab) == ["one", "one"]
    assert tab.locator(".note").all_inner_texts() == ["stopped", "stopped"]
    for model in site.models:
        model.stopped.clear()
    ask(tab, "wait", done=False)
    tab.click("#stop")
    ended(tab)
    assert all(model.stopped.wait(30) for model in site.models) and texts(tab) == ["(no text)"] * 2
    ask(tab, "three")  # what was not answered at all is no part of the conversation
    assert said(site.models[0]) == ["Be kind.", "one wait two", "one", "three"]
    ask(tab, "five wait", done=False)
    tab.wait_for_function("() => [...document.querySelectorAll('.text')].at(-1).textContent === 'five '")
    tab.reload()  # a page that is closed stops its answers, and keeps what came of them
    tab.wait_for_selector(".card")
    assert texts(tab) == ["five", "five"] and all(model.stopped.wait(30) for model in site.models)
    assert tab.problems == []


def test_the_last_turn_can_be_answered_again_and_asked_otherwise(browser: Any, site: Site) -> None:
    tab = opened(browser, site)
    ask(tab, "one")
    ask(tab, "two")
    assert tab.locator(".again:visible").count() == 2  # of the last turn alone
    tab.get_by_role("button", name="Another answer of runs/dpo").click()
    ended(tab)
    assert [len(model.seen) for model in site.models] == [2, 3]
    assert site.models[1].seen[-1][2] == 2 and site.models[1].seen[-1][0] == site.models[1].seen[-2][0]
    tab.focus("#ask")
    tab.press("#ask", "ArrowUp")
    assert tab.evaluate("document.activeElement.id") == "edited" and tab.input_value("#edited") == "two"
    tab.press("#edited", "Escape")
    assert tab.locator("#edited").count() == 0 and texts(tab) == ["two", "two"]
    tab.click("#edit")
    tab.fill("#edited", "another")
    tab.press("#edited", "Enter")
    ended(tab)
    assert texts(tab) == ["another", "another"] and tab.locator(".turn-box").count() == 2
    assert said(site.models[0]) == ["Be kind.", "one", "one", "another"]
    tab.click("#anew")
    assert tab.locator(".card").count() == 0 and tab.locator("#anew").is_disabled()
    tab.click("#back")
    assert tab.locator(".turn-box").count() == 2 and texts(tab) == ["another", "another"]
    tab.click("#anew")
    tab.reload()
    tab.wait_for_selector(".hello")
    ask(tab, "first")
    assert site.models[0].seen[-1][2] == 0  # as at the start: the same seed and messages, the same answers
    assert tab.problems == []


def test_settings_reach_the_models_and_stay(browser: Any, site: Site) -> None:
    tab = opened(browser, site)
    assert tab.locator("#set-open").inner_text() == (
        "Settings Temperature 0.7 · top-p 1 · 256 new tokens · seed 5 · system prompt"
    )
    tab.click("#set-open")
    for name, value in [("temperature", "-1"), ("top_p", "0"), ("max_new_tokens", "2.5"), ("seed", "")]:
        tab.fill(f"#set-{name}", value)
    tab.press("#set-seed", "Enter")
    assert tab.locator("#settings .failed:visible").count() == 4
    assert tab.evaluate("document.activeElement.id") == "set-temperature"
    for name, value in [("temperature", "0"), ("top_p", "0.5"), ("max_new_tokens", "9"), ("seed", "-4")]:
        tab.fill(f"#set-{name}", value)
    tab.fill("#set-system", "")
    tab.press("#set-seed", "Enter")
    assert tab.evaluate("document.activeElement.id") == "set-open"
    tab.reload()
    tab.wait_for_selector("#ask")
    ask(tab, "one")
    turns, sampling, _ = site.models[1].seen[-1]
    assert [turn["role"] for turn in turns] == ["user"]
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens, sampling.seed) == (0, 0.5, 9, -4)
    tab.click("#set-open")
    tab.click("#defaults")
    tab.click("#set")
    ask(tab, "two")
    assert site.models[1].seen[-1][1].seed == 5 and site.models[1].seen[-1][0][0]["content"] == "Be kind."
    assert tab.problems == []


def test_enter_belongs_to_the_syllable_while_hangul_is_composed(browser: Any, site: Site) -> None:
    tab = opened(browser, site, locale="ko-KR")
    keyboard = tab.context.new_cdp_session(tab)
    enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
    tab.focus("#ask")
    tab.evaluate("addEventListener('keydown', (event) => (window.composed = [event.isComposing, event.keyCode]), true)")
    keyboard.send("Input.imeSetComposition", {"text": "서울", "selectionStart": 2, "selectionEnd": 2})
    keyboard.send("Input.dispatchKeyEvent", {"type": "rawKeyDown", **enter})
    keyboard.send("Input.dispatchKeyEvent", {"type": "keyUp", **enter})
    is_composing, code = tab.evaluate("window.composed")
    assert is_composing or code == 229  # browsers tell it in one way or the other
    assert tab.locator(".card").count() == 0 and tab.input_value("#ask") == "서울"
    keyboard.send("Input.insertText", {"text": "서울"})  # the method is done with it
    tab.press("#ask", "Shift+Enter")
    tab.keyboard.insert_text("은?")
    tab.press("#ask", "Enter")
    ended(tab)
    assert site.models[0].seen[-1][0][-1]["content"] == "서울\n은?" and tab.problems == []
    assert tab.locator("#send").inner_text() == "보내기" and tab.locator("html").get_attribute("lang") == "ko"


def test_a_model_that_fails_is_told_in_its_column_and_the_other_goes_on(browser: Any, site: Site) -> None:
    tab = opened(browser, site)
    site.models[0].write = lambda *given, **how: 1 / 0  # type: ignore[assignment]
    ask(tab, "one")
    cards = tab.locator(".card")
    assert cards.nth(0).locator(".note").inner_text() == "This model failed. The terminal says why."
    assert cards.nth(1).locator(".text").inner_text() == "one"
    del site.models[0].write
    ask(tab, "two")
    assert texts(tab) == ["two", "two"]
    assert [len(model.seen[-1][0]) for model in site.models] == [2, 4]  # what failed is no part of its conversation
    ask(tab, "long")
    assert cards.nth(4).locator(".note").inner_text() == "the chat template refuses the conversation (no)"
    site.end()
    ask(tab, "three")
    assert tab.locator(".turn-box").last.locator(".note").all_inner_texts() == (
        ["No connection. Your message is kept; try again."] * 2
    )


def test_a_conversation_is_saved_as_instruction_data_and_an_answer_copied(
    browser: Any, site: Site, tmp_path: Path
) -> None:
    from leyden.datamodules import InstructionData

    tab = opened(browser, site)
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    assert tab.locator("#save").is_disabled()
    ask(tab, "안녕")
    ask(tab, "markdown")
    tab.locator(".copy").last.click()
    tab.wait_for_function("() => document.getElementById('notice').textContent === 'Copied.'")
    assert tab.evaluate("navigator.clipboard.readText()") == MARKDOWN
    tab.click("#save")
    with tab.expect_download() as download:
        tab.get_by_role("button", name="runs/dpo", exact=True).click()
    assert download.value.suggested_filename == "chat-runs-dpo.jsonl"
    file = tmp_path / "chat.jsonl"
    download.value.save_as(file)
    (row,) = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [turn["role"] for turn in row["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert row["messages"][-1]["content"] == MARKDOWN
    data = prepared(InstructionData(str(file), val_fraction=0.0), tmp_path)
    assert data.train_trees is not None and len(data.train_trees) == 1 and tab.problems == []


def test_another_link_is_told(browser: Any, site: Site) -> None:
    tab = browser.new_context(locale="ko-KR").new_page()
    tab.goto(site.link()[:-3] + "xyz")
    tab.wait_for_selector(".end-page h1")
    assert "이 링크는 여기서 유효하지 않습니다" in tab.locator(".end-page").inner_text()


# -- how it looks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1360])
@pytest.mark.parametrize("count", [1, 2])
def test_pages_fit_phones_and_desktops_in_both_schemes(browser: Any, width: int, scheme: str, count: int) -> None:
    site = Site(count)
    try:
        size = {"width": width, "height": 780}
        tab = opened(browser, site, viewport=size, color_scheme=scheme, locale="ko-KR" if scheme == "dark" else "en-US")
        shot(tab, f"{width}-{scheme}-{count}-begin")
        ask(tab, "markdown")
        ask(tab, "a question and its answer")
        shot(tab, f"{width}-{scheme}-{count}-talk")
        boxes = [box.bounding_box() for box in tab.locator(".turn-box").last.locator(".card").all()]
        assert (boxes[0]["y"] == boxes[-1]["y"]) == (count == 1 or width == 1360)
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes)
        tab.evaluate("window.scrollTo(500, 0)")
        assert tab.evaluate("window.scrollX") == 0
        assert least_contrast(tab, TEXT) >= 4.5
        small = "[...document.querySelectorAll('button')].filter((b) => b.offsetParent && b.offsetHeight < 36).length"
        assert tab.evaluate(small) == 0
        tab.click("#set-open")
        tab.fill("#set-top_p", "7")
        tab.press("#set-top_p", "Enter")
        shot(tab, f"{width}-{scheme}-{count}-settings")
        assert least_contrast(tab, TEXT) >= 4.5
        assert tab.locator("#settings").bounding_box()["height"] <= 780
        tab.keyboard.press("Escape")
        tab.click("#edit")
        shot(tab, f"{width}-{scheme}-{count}-edit")
        assert tab.problems == []
    finally:
        site.end()


def test_everything_is_reached_by_keys_and_has_a_name(browser: Any, site: Site) -> None:
    tab = opened(browser, site)
    ask(tab, "one")
    tab.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(20):
        tab.keyboard.press("Tab")
        at = tab.evaluate(
            """() => { const at = document.activeElement, style = getComputedStyle(at);
            return [at.id || at.className, at.getAttribute("aria-label") || at.textContent, style.outlineStyle]; }"""
        )
        if seen and at[0] == seen[0][0]:
            break
        seen.append(at)
    names = [name for name, _, _ in seen]
    for needed in ("anew", "save", "language", "help", "edit", "quiet copy", "quiet again", "ask", "send", "set-open"):
        assert needed in names, (needed, names)
    assert all(label and outline == "solid" for name, label, outline in seen if name)
    tab.evaluate("document.activeElement.blur()")
    tab.keyboard.press("?")
    assert tab.locator("#keys").is_visible()
    tab.keyboard.press("Escape")
    tab.click("#language")
    assert tab.locator("#anew").inner_text() == "새 대화" and tab.locator(".question .role").inner_text() == "나"
    assert tab.problems == []


def test_the_language_may_change_while_answers_are_written(browser: Any, site: Site) -> None:
    tab = opened(browser, site)
    ask(tab, "one wait two", done=False)
    tab.wait_for_function("() => document.querySelectorAll('.text')[1]?.textContent === 'one '")
    tab.fill("#ask", "my next words")
    tab.click("#language")
    for model in site.models:
        model.go.set()
    ended(tab)
    assert texts(tab) == ["one wait two"] * 2 and tab.input_value("#ask") == "my next words"
    assert tab.locator(".count").first.inner_text() == "3 토큰 · 초당 1.5 토큰" and tab.problems == []


def shot(tab: Any, name: str) -> None:
    """A picture to look at, where `$LEYDEN_SHOTS` names a folder."""
    if folder := os.environ.get("LEYDEN_SHOTS"):
        tab.screenshot(path=str(Path(folder) / f"{name}.png"))
