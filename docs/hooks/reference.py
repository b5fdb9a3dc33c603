"""mkdocs hook: the reference. A page for every public name, made from its docstring, and one for every room.

The reference is English and built once; Korean pages lead to it.
"""

from __future__ import annotations

import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority, get_plugin_logger
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from pages import ENGLISH, add, language
from public import Public, inherited, package, public_names, read, rooms, short, undocumented

log = get_plugin_logger("reference")
FLAGS = {
    "leyden.algos": "--model",
    "leyden.datamodules": "--data",
    "leyden.models.engines": "--model.engine",
    "leyden.rewards": "--model.reward",
    "leyden.objectives": "--model.objective",
    "leyden.divergences": "--model.divergence",
    "leyden.surrogates": "--model.surrogate",
    "leyden.advantages": "--model.estimator",
    "leyden.corrections": "--model.correction",
}
"""Room -> the flag that takes its classes by name."""


@event_priority(100)  # before mkdocstrings reads its options
def on_config(config: MkDocsConfig) -> None:
    """Let mkdocstrings read the package, and say what has no documentation."""
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(package())]
    if language(config) == ENGLISH:
        for line in undocumented():
            log.warning("undocumented: %s", line)


@event_priority(-200)  # the languages' plugin knows only files of docs/
def on_files(files: Files, config: MkDocsConfig) -> None:
    """Make the pages."""
    if language(config) != ENGLISH:
        return
    texts = {public.page: _page(public) for public in public_names()}
    texts |= {pages[0]: _room(room) for room, pages in rooms().items()} | {"reference/index.md": _index()}
    for page, text in texts.items():
        add(files, config, page, text)


def _page(public: Public) -> str:
    """The page of one name."""
    thing = read(public.path)
    lines = [f"# {public.name}", "", "```python", f"from {public.room} import {public.name}", "```", ""]
    flag = FLAGS.get(public.room)
    if flag and thing.is_class:
        lines += [f"On the command line and in YAML: `{flag} {public.name}`.", ""]
    lines += [f"::: {public.path}", ""]
    if bases := inherited(public):
        links = ", ".join(f"[`{base.name}`](../../{base.page})" for base in bases)
        lines += [f"Takes the arguments of {links} too.", ""]
    return "\n".join(lines)


def _first_sentence(path: str) -> str:
    """What a docstring begins with, for a table."""
    thing = read(path)
    text = " ".join((thing.docstring.value if thing.docstring else "").partition("\n\n")[0].split())
    match = re.match(r".*?[^.][.](?=\s|$)", text)
    return (match[0] if match else text).replace("|", "\\|")


def _room(room: str) -> str:
    """The page of a room: its docstring and what it hands on."""
    docstring = read(room).docstring
    rows = [
        f"| [`{public.name}`]({public.name}.md) | {_first_sentence(public.path)} |"
        for public in public_names()
        if public.room == room
    ]
    text = docstring.value if docstring else ""
    return "\n".join([f"# {room}", "", text, "", "| | |", "|---|---|", *rows, ""])


def _index() -> str:
    rows = [f"| [`{room}`]({short(room)}/index.md) | {_first_sentence(room)} |" for room in rooms()]
    head = (
        "# Reference\n\nEverything that is imported from `leyden` or named in YAML, from its docstrings. A class of "
        "your own goes wherever one of these does: by its path, `my_file.MyClass`. "
        "[One guide](../your-own-algorithm.md) writes algorithms, [another](../your-own-parts.md) the other parts.\n"
    )
    return "\n".join([head, "| | |", "|---|---|", *rows, ""])


_NAME = re.compile(
    r"<code>(?:leyden\.[\w.]+\.)?(\w+)</code>|<autoref[^>]*\bidentifier=\"leyden\.[\w.]*?(\w+)\"[^>]*>(.*?)</autoref>"
)
"""A name in backticks, and the type of an argument as mkdocstrings leaves it."""


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links of public names in the text of the reference, and of types."""
    if not page.file.src_uri.startswith("reference/"):
        return content
    homes: dict[str, Public] = {}
    for public in public_names():
        homes.setdefault(public.name, public)
    root = "../" * page.file.src_uri.count("/")

    def link(match: re.Match[str]) -> str:
        name, at = match[1] or match[2], match.start()
        linked = content.rfind("<a ", 0, at) > content.rfind("</a>", 0, at)
        heading = content.rfind("<h", 0, at) > content.rfind("</h", 0, at)
        if name not in homes or name == page.title or linked or heading:
            return match[0]
        return f'<a href="{root}{homes[name].page.removesuffix(".md")}.html">{match[3] or match[0]}</a>'

    return _NAME.sub(link, content)
