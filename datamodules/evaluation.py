"""Evaluation on a file of prompts."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from leyden.batch.tree import Tree
from leyden.data.chat_template import ChatTemplate
from leyden.data.prompts import Prompt
from leyden.datamodules.formats.row_error import LeftOut
from leyden.datamodules.predict_loader import origin, prompts
from leyden.datamodules.source import Source
from leyden.datamodules.storage.split import shuffled
from leyden.datamodules.storage.truncation import cut_text
from leyden.errors import UserError
from leyden.evaluation.evaluator import Evaluator

log = logging.getLogger("leyden")


class Evaluation(Evaluator):
    """Evaluation on held-out prompts: files of prompts, and of instructions or preferences without their answers.

    Args:
        path: a file, folder, glob or `hf:NAME`. Duplicate prompts count once. Where more than `size` are left, a sample
            is drawn by seed, the same one in every run.
        text_path: general text (rows of `{"text": …}`, or any instruction data) for `eval/retained_loss`, which shows
            what the model forgets while it learns.
        size: most prompts that are answered.
        max_length: most tokens of a prompt with its answer; prompts without room for an answer are left out. Text is
            cut into pieces of at most this many tokens.
        seed: seed of the draw of prompts.
    """

    def __init__(
        self,
        path: str,
        *,
        text_path: str | None = None,
        size: int = 200,
        max_length: int = 1024,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if size < 1:
            raise UserError(f"--eval.size {size}: give 1 or more")
        if self.sampling.max_new_tokens >= max_length:
            raise UserError(
                f"--eval.sampling.max_new_tokens {self.sampling.max_new_tokens} leaves nothing of --eval.max_length "
                f"{max_length} for a prompt; raise max_length, which is prompt and answer together"
            )
        self.path, self.text_path, self.size, self.max_length, self.seed = path, text_path, size, max_length, seed

    def prompts(self, template: ChatTemplate) -> list[Prompt]:
        room, by_tokens = self.max_length - self.sampling.max_new_tokens, dict[tuple[int, ...], Prompt]()
        rows = prompts(Source(self.path, "prompts").files(log.debug), template, "raise")
        for number, (example, tokens) in enumerate(rows):
            if len(tokens) <= room:
                by_tokens.setdefault(tuple(tokens), Prompt(number, replace(example, row=origin(example.row)), tokens))
        unique = list(by_tokens.values())
        if long := len(rows) - sum(len(tokens) <= room for _, tokens in rows):
            log.info("%s: %s prompts leave no room to answer (--eval.max_length) and are not asked", self.path, long)
        return [unique[index] for index in sorted(shuffled(len(unique), self.seed)[: self.size])]

    def text(self, template: ChatTemplate) -> list[Tree]:
        trees: list[Tree] = []
        for source in Source(self.text_path, "instruction").files(log.debug) if self.text_path else []:
            for place, example in source.examples(log.debug)[1]:
                if isinstance(example, Exception):
                    if isinstance(example, LeftOut):
                        continue
                    raise UserError(f"{place}: {example}; mend the row, or take it out of --eval.text_path")
                tree = template.encode(example)
                trees += cut_text(tree, self.max_length) if example.text is not None else [tree]
        return trees

    def facts(self) -> dict[str, Any]:
        return {"prompts": self.path, "text": self.text_path}
