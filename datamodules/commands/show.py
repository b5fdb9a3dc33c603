"""`leyden data show`: rows as the model sees them, every token marked by whether it is trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from leyden.datamodules.formats import not_read
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.source import Source
from leyden.errors import UserError
from leyden.example import Example
from leyden.language import localised, say

if TYPE_CHECKING:
    from leyden.batch.forest import Tree
    from leyden.data.chat_template import ChatTemplate

STYLES = {"prompt": "cyan", "trained": "bold green", "untrained": "yellow"}
BRACKETS = {"prompt": ("", ""), "trained": ("⟦", "⟧"), "untrained": ("⟨", "⟩")}
"""Brackets that replace the colours on a console without them."""


def show(source: Source, rows: int = 3, console: Console | None = None) -> int:
    """Print the first `rows` rows and return 0, or 1 where one of them is bad."""
    console = console or Console(highlight=False, soft_wrap=True)
    files = source.files(say)
    template = source.template(lambda note: None)
    if template is None:
        raise UserError("data show: rows can only be shown as tokens; add --tokenizer PATH")
    console.print(_legend(console))
    return max([_show_file(file, rows, template, console) for file in files])


def _show_file(source: Source, rows: int, template: ChatTemplate, console: Console) -> int:
    settled, examples = source.examples(lambda note: console.print(localised(note), markup=False))
    bad, counts = False, dict[str, list[int]]()
    for place, example in islice(examples, rows):
        try:
            if isinstance(example, Exception):
                raise example
            not_read.count(example.not_read, counts)
            _show_example(place, example, template, console, str(settled.kind))
            for note in template.take_notes():
                console.print(localised(f"note: {note}"), markup=False)
        except RowError as error:
            bad = True
            console.print(localised(f"\n{place}: {error}"), markup=False)
        except LeftOut as reason:
            console.print(localised(f"\n{place}: left out ({reason})"), markup=False)
    for line in not_read.lines(counts, str(settled.kind)):
        console.print(localised(f"\n{line}"), markup=False)
    return int(bad)


def _show_example(place: str, example: Example, template: ChatTemplate, console: Console, kind: str) -> None:
    from leyden.batch.forest import Tree

    if example.responses or example.text is not None:
        tree = template.encode(example)
    else:
        tree = Tree(template.prompt(example.messages, example.tools), [])
    lengths = " + ".join(str(len(part)) for part in (tree.prompt, *tree.responses))
    console.print(localised(f"\n{place} · {lengths} tokens"), style="bold", markup=False)
    console.print(_marked(tree.prompt, ["prompt"] * len(tree.prompt), template, console))
    for number, (ids, marks) in enumerate(_responses(tree), start=1):
        if len(tree.responses) > 1 or kind == "unpaired":
            about = {"preference": _rank, "unpaired": _label}.get(kind, _nothing)(number, example)
            console.print(localised(f"-- response {number} of {len(tree.responses)}{about}"))
        console.print(_marked(ids, marks, template, console))


def _rank(number: int, example: Example) -> str:
    """The rank and the score of a response in its row: ` (best, score 2.5)`."""
    place = {1: "best", len(example.responses): "worst"}.get(number)
    score = None if example.scores is None else f"score {example.scores[number - 1]:g}"
    notes = ", ".join(part for part in (place, score) if part)
    return f" ({notes})" if notes else ""


def _label(number: int, example: Example) -> str:
    """The label of a response: ` (good)`."""
    return " (good)" if example.scores and example.scores[number - 1] else " (bad)"


def _nothing(number: int, example: Example) -> str:
    return ""


def _responses(tree: Tree) -> Iterator[tuple[list[int], list[str]]]:
    weights = tree.weights or [[1.0] * len(response) for response in tree.responses]
    for response, row in zip(tree.responses, weights, strict=True):
        yield response, ["trained" if weight else "untrained" for weight in row]


def _marked(ids: Sequence[int], marks: Sequence[str], template: ChatTemplate, console: Console) -> Text:
    """The decoded tokens, each run of one mark in its colour or brackets, with visible special tokens and line ends."""
    text = Text()
    for mark, run in groupby(zip(ids, marks, strict=True), key=lambda pair: pair[1]):
        words = str(template.tokenizer.decode([token for token, _ in run])).replace("\n", "↵\n")
        text.append(_in_marks(words, mark, console))
    return text


def _in_marks(words: str, mark: str, console: Console) -> Text:
    if _coloured(console):
        return Text(words, style=STYLES[mark])
    before, after = BRACKETS[mark]
    return Text(f"{before}{words}{after}")


def _legend(console: Console) -> Text:
    names = {"prompt": "prompt", "trained": "trained", "untrained": "in the response but not trained"}
    shown = (_in_marks(localised(name), mark, console) for mark, name in names.items())
    return Text(localised("marks: ")) + Text(" · ").join(shown)


def _coloured(console: Console) -> bool:
    return console.is_terminal and not console.no_color and console.color_system is not None
