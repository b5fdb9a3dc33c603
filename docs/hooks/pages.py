"""Pages that are made while the site is built, and the language that is built: for the hooks beside this file."""

from __future__ import annotations

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ENGLISH, KOREAN = "en", "ko"


def language(config: MkDocsConfig) -> str:
    """The language that is built now: every language is a build of its own."""
    return str(config.plugins["i18n"].current_language or ENGLISH)  # type: ignore[attr-defined]


def add(files: Files, config: MkDocsConfig, page: str, text: str) -> None:
    """Add a page in the language that is built.

    Args:
        page: its place below docs/, where there is no such file.
        text: Markdown.
    """
    file, now = File.generated(config, page, content=text), language(config)
    if now != ENGLISH:
        file.dest_uri = f"{now}/{file.dest_uri}"
    file.locale, file.locale_alternate_of, file.alternates = now, now, {now: file}  # type: ignore[attr-defined]
    files.append(file)
