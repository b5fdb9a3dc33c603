"""mkdocs hook: the navigation of mkdocs.yml, with the reference and with files from outside docs/ behind it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import Files
from mkdocs.structure.nav import Link, Navigation, Section
from pages import ENGLISH, KOREAN, language
from public import ROOT, rooms, short

PROJECT = {
    "examples/README.md": "Examples",
    "benchmarks/README.md": "Measured",
    "CONTRIBUTING.md": "Contributing",
}
"""Files outside docs/ that the navigation leads to."""
_written: list[Any] = []


@event_priority(100)
def on_config(config: MkDocsConfig) -> None:
    _written.extend(config.nav or [] if not _written else [])
    config.nav = deepcopy(_written)
    if language(config) == ENGLISH:
        pages = [{short(room): found} for room, found in rooms().items()]
        config.nav.append({"Reference": ["reference/index.md", *pages]})
    shown = [{title: _page(path)} for path, title in PROJECT.items() if _is_shown(path, config)]
    config.nav += [{"Project": shown}] if shown else []


def _page(path: str) -> str:
    return "project/" + path.replace("README", "index")


def _is_shown(path: str, config: MkDocsConfig) -> bool:
    file = ROOT / (path if language(config) == ENGLISH else path.replace(".md", f".{KOREAN}.md"))
    return file.is_file()


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """Lead from Korean pages to what is English."""
    if language(config) == ENGLISH:
        return
    names = config.plugins["i18n"].current_language_config.nav_translations or {}  # type: ignore[attr-defined]
    english = {"Reference": "reference/index.html"}
    english |= {
        title: _page(path).replace(".md", ".html") for path, title in PROJECT.items() if not _is_shown(path, config)
    }
    links = [Link(f"{names[title]} (영어)", url) for title, url in english.items()]
    nav.items.append(Section("영어 문서", links))
