"""The site: built once, strictly; every public name has a page, both languages are there, and nothing is loaded from
elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsers import chromium, needs_chromium

for name in ("mkdocs", "material", "mkdocstrings", "mkdocs_static_i18n"):
    pytest.importorskip(name)

ROOT = Path(__file__).parent.parent
HOOKS = ROOT / "docs" / "hooks"


@pytest.fixture(scope="module", autouse=True)
def _hooks() -> Iterator[None]:
    sys.path.insert(0, str(HOOKS))
    yield
    sys.path.remove(str(HOOKS))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert built.returncode == 0, built.stderr[-4000:]
    return folder


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_every_public_name_has_its_page(site: Path) -> None:
    import public

    names = public.public_names()
    assert len(names) > 150 and {"PPO", "CausalLM", "Gold", "SimPO", "FSDP2", "Trainer"} <= {n.name for n in names}
    for one in names:
        page = site / one.page.replace(".md", ".html")
        assert page.is_file(), one.page
        shown = " ".join(re.sub(r"<[^>]+>", " ", text(page)).split())
        assert f"from {one.room} import {one.name}" in shown, one.page


def test_arguments_stand_on_the_page_of_their_class(site: Path) -> None:
    page = text(site / "reference/algos/PPO.html")
    assert "value_clip" in page and "how far values may move within a rollout" in page
    assert 'href="../../reference/on_policy/PolicyGradient.html"' in page


def test_both_languages_are_there(site: Path) -> None:
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if not page.name.endswith(".ko.md")]
    assert len(pages) > 19
    for page in pages:
        english, korean = (text(site / folder / page.replace(".md", ".html")) for folder in ("", "ko"))
        assert '<html lang="en"' in english and '<html lang="ko"' in korean
        article = korean[korean.index("<article") : korean.index("</article>")]
        assert re.search("[가-힣]{2}", article) and "[English]" not in article, page


def test_pages_lead_to_each_other_in_their_language(site: Path) -> None:
    korean = text(site / "ko" / "index.html")
    assert 'href="walkthrough.html"' in korean and 'href="project/examples/index.html"' in korean
    assert re.search(r'href="\.\./concepts\.html" hreflang="en"', text(site / "ko" / "concepts.html"))
    assert re.search(r'href="ko/concepts\.html" hreflang="ko"', text(site / "concepts.html"))


def test_no_link_is_broken_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    import links

    assert list(links.broken(site)) == []
    for page in site.rglob("*.html"):
        assert not [url for url in links.read_page(page).loads if re.match(r"(?:https?:)?//", url)], page
    assert not re.search(r"url\(['\"]?(?:https?:)?//", text(site / "assets" / "site.css"))


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    import links

    (tmp_path / "a.html").write_text('<a id="here"></a><a href="b.html#there"></a><a href="c.html"></a>')
    (tmp_path / "b.html").write_text('<script src="https://cdn.example/x.js"></script><a href="a.html#here"></a>')
    said = list(links.broken(tmp_path))
    assert [line.split(" ")[0] for line in said] == ["a.html", "a.html", "b.html"]
    assert "no such heading" in said[0] and "c.html" in said[1] and "cdn.example" in said[2]


def test_what_is_not_documented_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    import public

    ppo = next(one for one in public.public_names() if one.name == "PPO")
    assert list(public.missing(ppo)) == []
    thing = public.read(ppo.path)
    with monkeypatch.context() as patch:
        patch.setattr(thing, "docstring", None)
        said = list(public.missing(ppo))
    assert said[0] == "leyden.algos.ppo.PPO: no docstring" and any("argument value_clip" in line for line in said)
    import leyden.algos

    with monkeypatch.context() as patch:
        patch.setattr(leyden.algos.PPO, "surprise", lambda self: None, raising=False)
        assert list(public.missing(ppo)) == ["leyden.algos.ppo.PPO.surprise: no docstring, and none that it inherits"]


def index(site: Path) -> tuple[Any, str]:
    found = json.loads(text(site / "search" / "search_index.json"))
    return found["docs"], found["config"]["separator"]


def test_korean_words_can_be_found(site: Path) -> None:
    """As lunr looks: words begin as the query does, and nothing was stripped from them."""
    entries, separator = index(site)
    korean = [entry for entry in entries if entry["location"].startswith("ko/")]
    assert len(korean) > 100
    for query in ("보상", "선호", "체크포인트", "메모리", "정렬"):
        hits = {
            entry["location"]
            for entry in korean
            for word in re.split(separator, re.sub(r"<[^>]+>", " ", entry["title"] + " " + entry["text"]))
            if word.startswith(query)
        }
        assert len(hits) > 2, query
    assert json.loads(text(site / "search" / "search_index.json"))["config"]["lang"] == ["en"]


@needs_chromium
def test_the_search_finds_words_of_both_languages_from_a_disk(site: Path) -> None:
    pytest.importorskip("playwright.sync_api")
    with chromium() as browser:
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for start, query, found in (("ko/index.html", "보상", "보상"), ("index.html", "max_new_tokens", "Sampling")):
            page.goto((site / start).as_uri())
            page.locator(".md-search__input").fill(query)
            page.keyboard.press("End")  # the page looks again when a key is let go, which filling does not do
            result = page.locator(".md-search-result__item").filter(has_text=found).first
            result.wait_for(timeout=60_000)
        assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:", "about:"))]


@needs_chromium
@pytest.mark.parametrize("width", [380, 1360])
def test_no_page_is_wider_than_the_screen(site: Path, width: int) -> None:
    pytest.importorskip("playwright.sync_api")
    pages = ("index", "algorithms", "preferences", "ko/algorithms", "reference/algos/GRPO", "reference/index")
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 800})
        for name in pages:
            page.goto((site / f"{name}.html").as_uri())
            over = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert over <= 0, name
