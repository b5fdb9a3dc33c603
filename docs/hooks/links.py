"""mkdocs hook: links. Pages link to each other and to files of the repository as a code-hosting site shows them; here
such files become pages of their own, and at the end every link and anchor of the built site is checked.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority, get_plugin_logger
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from navigation import PROJECT
from pages import ENGLISH, KOREAN, add, language
from public import ROOT, public_names

log = get_plugin_logger("links")
_LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=\))")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_TWIN = re.compile(r"^\[[^\]]+\]\([\w-]+(?:\.ko)?\.md\) · ", re.MULTILINE)
HERE = "https://site.invalid/"
"""Stands for the root of the site in links that leave the language that is built."""


def home(path: str) -> str | None:
    """Where a file of the repository stands on the site, as a page below docs/; None where it is shown as it is."""
    if path in ("README.md", "README.ko.md"):
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in (names := _homes()):
        return names[path]
    if path.endswith(".md"):
        return "project/" + path.replace("README", "index")
    return f"source/{path}.md"


@cache
def _homes() -> dict[str, str]:
    """File of the repository -> the page of the public name that it defines; of several the room's."""
    found: dict[str, str] = {}
    for public in public_names():
        parts = public.path.split(".")[1:-1]
        folder = parts[0] if parts[0] in ("algos", "models", "datamodules") else f"framework/{parts[0]}"
        file = "/".join([folder, *parts[1:]]) + ".py"
        found[file] = public.page if file not in found else posixpath.dirname(public.page) + "/index.md"
    return found


def targets(text: str, folder: str) -> Iterator[tuple[str, str]]:
    """(link as written, file of the repository) of links to files."""
    for link in _LINK.findall(_CODE.sub("", text)):
        path = posixpath.normpath(posixpath.join(folder, unquote(urldefrag(link).url)))
        if not link.startswith(("#", "http:", "https:", "mailto:")) and (ROOT / path).is_file():
            yield link, path


@event_priority(-300)  # after the reference
def on_files(files: Files, config: MkDocsConfig) -> None:
    """Make pages of the files outside docs/ that pages lead to, and of those that these lead to."""
    korean = language(config) == KOREAN
    todo = [ROOT / "docs" / file.src_uri for file in files.documentation_pages() if not file.generated_by]
    todo += [ROOT / p for path in PROJECT for p in (path, path.replace(".md", ".ko.md")) if (ROOT / p).is_file()]
    done = set[str]()
    while todo:
        file = todo.pop()
        path = str(file.relative_to(ROOT))
        if path in done:
            continue
        done.add(path)
        text = file.read_text(encoding="utf-8")
        if not path.startswith("docs/"):
            page = str(home(path))
            if page.startswith("project/") and korean == path.endswith(".ko.md"):
                add(files, config, page.replace(".ko.md", ".md"), text)
            elif page.startswith("source/") and not korean:
                add(files, config, page, listing(path, text))
        if file.suffix == ".md":
            folder = posixpath.dirname(path)
            todo += [ROOT / p for _, p in targets(text, folder) if not p.startswith("docs/") and p not in done]


def listing(path: str, text: str) -> str:
    """The page of a file that is no page: a notebook as its cells, anything else as it is."""
    if path.endswith(".ipynb"):
        cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
        return "\n\n".join(f"```python\n{source}\n```" if kind == "code" else source for source, kind in cells)
    language = {".py": "python", ".yaml": "yaml", ".sh": "bash"}.get(posixpath.splitext(path)[1], "text")
    return f"# {path}\n\n`````{language}\n{text}\n`````\n"


@event_priority(100)
def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links to files into links to their pages, and drop the link to the page's twin, which the head has."""
    source = origin(page.file.src_uri, language(config))
    if source is None:
        return markdown
    folder, here = posixpath.dirname(source), posixpath.dirname(page.file.src_uri)
    meant = dict(targets(markdown, folder))

    def rewrite(match: re.Match[str]) -> str:
        link = match[0]
        if link not in meant:
            return link
        anchor = "#" + urldefrag(link).fragment if "#" in link else ""
        target = str(home(meant[link]))
        twin = target.replace(".ko.md", ".md")
        other = language(config) == KOREAN and target.endswith(".md") and not meant[link].endswith(".ko.md")
        if other:
            return HERE + target.removesuffix(".md") + ".html" + anchor
        if language(config) == ENGLISH and meant[link].endswith(".ko.md"):
            return f"{HERE}ko/{twin.removesuffix('.md')}.html{anchor}"
        if source.startswith("docs/") and meant[link].startswith("docs/"):
            return link
        return posixpath.relpath(twin, here or ".") + anchor

    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(match[0])
        return f"\x00{len(kept) - 1}\x00"

    text = _LINK.sub(rewrite, _CODE.sub(keep, _TWIN.sub("", markdown, count=1)))
    text = re.sub(r"\x00(\d+)\x00", lambda match: kept[int(match[1])], text)
    return _EQUATION.sub(_as_equation, text)


_EQUATION = re.compile(r"(?<=\n\n)((?: {4}\S.*\n)+)(?=\n)")


def _as_equation(match: re.Match[str]) -> str:
    """A block without a fence is an equation; named, it can be set as one."""
    lines = "\n".join(line[4:] for line in match[1].splitlines())
    return f"``` {{ .text .equation }}\n{lines}\n```\n"


def origin(page: str, now: str) -> str | None:
    """The file of the repository that a page shows; None for what is made."""
    if page.startswith(("reference/", "source/")):
        return None
    if page.startswith("project/"):
        path = page.removeprefix("project/").replace("index.md", "README.md")
        return path.replace(".md", ".ko.md") if now == KOREAN else path
    return f"docs/{page}"


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return html.replace(HERE, "../" * page.file.dest_uri.count("/"))


# -- the built site ----------------------------------------------------------------------------------------------------


class _Links(HTMLParser):
    """Anchors of a page, and what it leads to or loads."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors, self.links, self.loads = set[str](), list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") in ("next", "prev", "canonical", "alternate"):
            self.links.append(given.get("href", ""))
        elif tag in ("script", "img", "source", "iframe", "link"):
            self.loads += [given[name] for name in ("src", "href") if given.get(name)]


def read_page(file: Path) -> _Links:
    parser = _Links()
    parser.feed(file.read_text(encoding="utf-8"))
    return parser


def broken(site: Path) -> Iterator[str]:
    """Links and anchors of a built site that lead nowhere, and what it would load from elsewhere."""
    pages = {file: read_page(file) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}
    for file, page in pages.items():
        name = file.relative_to(site)
        for link in page.loads + page.links:
            url, anchor = urldefrag(link)
            if re.match(r"(https?:)?//", url):
                if link in page.loads:
                    yield f"{name} loads {link}"
                continue
            if url.startswith(("data:", "mailto:", "javascript:")):
                continue
            target = Path(posixpath.normpath(file.parent / unquote(url))) if url else file
            if not target.is_file():
                yield f"{name} leads to {link}, which is not there"
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                yield f"{name} leads to {link}, where there is no such heading"


@event_priority(-200)
def on_post_build(config: MkDocsConfig) -> None:
    """Check the whole site once every language is there."""
    if language(config) == KOREAN:
        for line in broken(Path(config.site_dir)):
            log.warning("%s", line)
