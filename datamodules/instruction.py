"""Instruction data: questions and answers, conversations, or plain text."""

from __future__ import annotations

from typing import Any, Literal

from leyden.batch.forest import Tree
from leyden.datamodules.file_data import StoredRows
from leyden.datamodules.storage.truncation import cut_text
from leyden.example import Example


class InstructionData(StoredRows):
    """Rows of any instruction format: one response to each prompt, or plain text.

    Args:
        train_on: assistant turns only, or all tokens of a conversation. Plain text is always trained on whole, and
            cut into pieces of `max_length` tokens.
    """

    kind = "instruction"

    def __init__(self, *args: Any, train_on: Literal["response", "all"] = "response", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.train_on = train_on

    def encode(self, example: Example) -> list[Tree]:
        tree = self.template.encode(example, self.train_on)
        return cut_text(tree, self.max_length) if example.text is not None else [tree]
