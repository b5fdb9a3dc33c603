"""Formats of single answers, each with a label that says whether it is good, as KTO takes them: unpaired data. As
instructions only good ones are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from leyden.datamodules.formats.format import Format, Parts
from leyden.datamodules.formats.not_read import is_empty
from leyden.datamodules.formats.readers import Messages, PromptResponse, ShareGPT
from leyden.datamodules.formats.row_error import LeftOut, RowError

_WORDS = {True: "true good yes desirable chosen thumbs_up", False: "false bad no undesirable rejected thumbs_down"}
_VERDICTS = {word: verdict for verdict, words in _WORDS.items() for word in words.split()}
_NUMBERS = {number: number.strip("+") in ("1", "1.0") for number in "1 +1 0 -1 1.0 +1.0 0.0 -1.0".split()}


def verdict(label: Any) -> bool | None:
    """Whether a label says that an answer is good: true, good, 1, +1 or false, bad, 0, -1; None for any other label."""
    word = str(label).strip().lower()
    return _VERDICTS.get(word, _NUMBERS.get(word))


class Unpaired(Format):
    """What formats of labelled answers share. A subclass names the format that it is, but for the label."""

    reader: ClassVar[Format]
    kinds = ("instruction", "unpaired", "prompts", "candidates")

    def told(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the label is about the answer. Numbers may name a class: 0 alone, or others than 0, 1 and -1."""
        labels = [row["label"] for row in rows if not is_empty(row.get("label"))]
        words = {str(label).strip().lower() for label in labels}
        return bool(words) and None not in map(verdict, words) and not words <= {"0", "0.0"}

    def votes(self, rows: Sequence[Mapping[str, Any]], fitting: int, kind: str, answers: bool) -> int:
        """Where most rows have a label, those that lack it speak for this format too: as others they would be trained
        whatever their answer is worth, and with them all the bad ones."""
        whole = sum(self.reader.fits(row, kind, answers) for row in rows)
        return whole if 2 * fitting > whole else fitting

    def read(self, row: dict[str, Any], kind: str) -> Parts:
        if kind not in ("instruction", "unpaired"):
            return self.reader.read(row, kind)
        good = verdict(row["label"])
        if good is None:
            problem = f"'label' is {row['label']!r:.40}, which is neither good (true, 1) nor bad (false, 0)"
            way = "drop the row" if kind == "unpaired" else f"read the file with --format {self.reader.name}"
            raise RowError(f"{problem}; mend it, or {way}", "no verdict")
        if not good and kind == "instruction":
            raise LeftOut("labelled as bad answers")
        parts = self.reader.read(row, "instruction")
        parts.label = good
        return parts


class UnpairedPrompts(Unpaired):
    """prompt, response and a label that says whether the response is good."""

    name = "unpaired"
    reader = PromptResponse()
    needs = ("prompt", "response", "label")
    answers = ("response", "label")
    unranked = ("prompt", "response")
    optional = PromptResponse.optional


class UnpairedMessages(Unpaired):
    """messages and a label that says whether the last answer is good."""

    name = "unpaired-messages"
    reader = Messages()
    needs = ("messages", "label")
    answers = ("label",)
    unranked = ("messages",)
    optional = Messages.optional


class UnpairedShareGPT(Unpaired):
    """conversations and a label that says whether the last answer is good."""

    name = "unpaired-sharegpt"
    reader = ShareGPT()
    needs = ("conversations", "label")
    answers = ("label",)
    unranked = ("conversations",)
    optional = ShareGPT.optional
