"""The messages of the code beside their translations: `python tests/messages.py` lists those that have none.

A message is what a call prints or raises. What changes in it is `{}`: an expression of an f-string, or `%s` of a line
that is logged.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("framework", "models", "datamodules", "algos")
CALLS = ("UserError", "RowError", "LeftOut", "info", "warning", "say", "note", "print_line", "advise", "_warn")
"""Calls whose texts a reader sees. Texts that are put together before they are printed have their translations too, but
nothing here knows of them."""


def template(node: ast.AST) -> str | None:
    """The text of a string, with `{}` for its expressions; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [template(side) for side in (node.left, node.right)]
        return "".join("{}" if part is None else part for part in parts) if any(parts) else None
    return None


def lines(text: str) -> Iterator[str]:
    """The lines of a message that have words of their own, as they stand in the catalogue."""
    for line in text.split("\n"):
        line = re.sub(r"%(?:[sd]|\.\d+[efg])", "{}", line).strip()
        line = re.sub("^(?:error|warning|note): ", "", line)
        words = re.findall(r"[A-Za-z]{2,}", re.sub(r"--[\w.]+", "", line))
        if words:
            yield line


def files() -> list[Path]:
    return [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def printed(file: Path) -> Iterator[str]:
    """The messages of a file: what its calls print, raise, or give as help."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        texts = [word.value for word in node.keywords if word.arg in ("help", "description")]
        if name in CALLS:
            texts += node.args
        elif name in ("Parser", "_Parser") or (name == "__init__" and len(node.args) > 1):
            texts += node.args[1:2]
        for text in texts:
            yield from lines(template(text) or "")


def constants() -> list[str]:
    """Every piece of text in the code, printed or not."""
    nodes = (node for file in files() for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def catalogue() -> dict[str, str]:
    found = json.loads((ROOT / "framework" / "messages.ko.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def worded(text: str) -> bool:
    """Whether there is something to translate: `{}: {}` and the name of a measure have nothing."""
    return " " in text and bool(
        re.search(r"[A-Za-z]{2,}", re.sub(r"--[\w.{}]+( [\w-]+\d+[\w-]*$)?|'[^']*'|\w*_\w+|^leyden", "", text))
    )


def missing() -> dict[str, list[str]]:
    """File -> its messages without a translation."""
    known = catalogue()
    found = {
        str(file.relative_to(ROOT)): [
            text for text in dict.fromkeys(printed(file)) if text not in known and worded(text)
        ]
        for file in files()
    }
    return {file: texts for file, texts in found.items() if texts}


if __name__ == "__main__":
    json.dump(missing(), sys.stdout, ensure_ascii=False, indent=1)
    print()
