"""Instruction data: files of questions and answers, conversations or plain text, as planned batches."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from leyden.batch import Tree
from leyden.data import DataModule
from leyden.datamodules.files import find_files, read_rows
from leyden.datamodules.formats import RowError, describe, detect, parse
from leyden.datamodules.overlength import Overlength, fit, longest, pieces
from leyden.datamodules.store import Report, Store, Subset, build, cache_folder, fingerprint, key
from leyden.datamodules.template import Template, load_tokenizer
from leyden.errors import UserError
from leyden.example import Example

log = logging.getLogger("leyden")

Prompt = tuple[Example, list[int]]
"""An example without its answer, and the token ids to answer from."""


@dataclass
class Prompts:
    """Chunks of prompts as a loader. (Lightning takes a plain list for several loaders.)"""

    chunks: list[list[Prompt]]

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[list[Prompt]]:
        return iter(self.chunks)


class InstructionData(DataModule):
    """Rows of any instruction format, tokenised once and packed into planned batches.

    Args:
        path: a file, folder, glob or `hf:NAME`; several as a list, or as a mapping from each to how often its rows
            come in an epoch (`{a.jsonl: 1, b.jsonl: 0.5}`).
        tokenizer: where the tokenizer comes from; follows `--model.policy.path`.
        val_path: validation rows; without it, `val_fraction` of the training rows is held out.
        val_fraction: share of rows held out for validation; 0 for none.
        test_path: rows for `leyden test`.
        format: name of the format of a row; `auto` finds it out and says so.
        columns: names of columns that cannot be guessed, such as `{prompt: 질문, response: 답변}`.
        batch_size: rows in one optimizer step, over all ranks and accumulated micro-batches.
        max_tokens: most tokens in one micro-batch.
        max_length: most tokens in one row; a longer plain text is cut into pieces.
        overlength: what happens to a longer row: drop it, cut the start of its prompt or the end of its response, or
            stop with an error.
        on_error: whether a row that cannot be used stops the run, or goes to NAME.rejected.jsonl in the run folder.
        train_on: assistant turns only, or all tokens.
        chat_template: `plain`, or a Jinja file, instead of the tokenizer's own.
        system_prompt: put before conversations that have none.
        seed: of the order of rows and of what is held out.
        predict_size: prompts answered side by side by `leyden predict`.
    """

    kind = "instruction"

    def __init__(
        self,
        path: str | list[str] | dict[str, float],
        tokenizer: str = "tiny",
        val_path: str | None = None,
        val_fraction: float = 0.05,
        test_path: str | None = None,
        format: str = "auto",
        columns: dict[str, str] | None = None,
        batch_size: int = 32,
        max_tokens: int = 16384,
        max_length: int = 1024,
        overlength: Overlength = "drop",
        on_error: Literal["raise", "skip"] = "raise",
        train_on: Literal["response", "all"] = "response",
        chat_template: str | None = None,
        system_prompt: str | None = None,
        seed: int = 0,
        predict_size: int = 64,
    ) -> None:
        super().__init__(batch_size, max_tokens, seed)
        if not 0 <= val_fraction < 1:
            raise UserError(f"--data.val_fraction {val_fraction}: give a share of the rows from 0 to below 1")
        self.paths = path if isinstance(path, dict) else dict.fromkeys([path] if isinstance(path, str) else path, 1.0)
        self.tokenizer, self.template_choice, self.system_prompt = tokenizer, chat_template, system_prompt
        self.val_path, self.val_fraction, self.test_path = val_path, val_fraction, test_path
        self.format, self.columns, self.train_on = format, columns, train_on
        self.max_length, self.overlength, self.on_error = max_length, overlength, on_error
        self.predict_size = predict_size
        self._stores: list[Store] = []
        self._repeats: list[int] = []

    @cached_property
    def template(self) -> Template:
        """The tokenizer with its chat template."""
        return Template(load_tokenizer(self.tokenizer), self.template_choice, self.system_prompt)

    @property
    def chat_template(self) -> str | None:  # type: ignore[override]
        return self.template.source if self.template_choice is not None else None

    # -- from rows to trees ------------------------------------------------------------------------------------------

    def encode(self, example: Example) -> list[Tree | None]:
        """The trees of one example, None for one that is dropped because it is too long. Raises `RowError`."""
        tree = self.template.encode(example, self.train_on)
        return list(pieces(tree, self.max_length)) if example.text is not None else [self._fit(tree)]

    def _fit(self, tree: Tree) -> Tree | None:
        if not tree.totals().tokens:
            raise RowError("nothing to train; give the row an answer or drop it")
        return fit(tree, self.max_length, self.overlength)

    def _trees(self, path: str, report: Report) -> Iterator[tuple[str, Tree]]:
        """Every usable row of a file as trees; what became of the others goes to the report."""
        bad: list[tuple[str, str]] = []
        rows = read_rows(path, on_bad=lambda place, problem: bad.append((place, problem)))
        first = list(islice(rows, 100))
        if not first and bad:
            raise UserError(f"{bad[0][0]}: {bad[0][1]}")
        name = detect([row for _, row in first], self.kind, self.columns) if self.format == "auto" else self.format
        report.format = describe([row for _, row in first], name, self.kind, self.columns)
        for place, row in (*first, *rows):
            try:
                for tree in self.encode(parse(row, name, self.kind, self.columns)):
                    if tree is None:
                        report.dropped["too long"] = report.dropped.get("too long", 0) + 1
                    else:
                        report.truncated += self._was_cut(tree)
                        yield place, tree
            except RowError as problem:
                bad.append((place, str(problem)))
        if bad and self.on_error == "raise":
            place, problem = bad[0]
            more = f" ({len(bad) - 1:,} more rows are bad)" if len(bad) > 1 else ""
            raise UserError(f"{place}: {problem}{more}; or leave such rows out with --data.on_error skip")
        if bad:
            report.dropped["bad"], report.rejected = len(bad), bad

    def _was_cut(self, tree: Tree) -> bool:
        return self.overlength.startswith("truncate") and longest(tree) == self.max_length

    def _stored(self, path: str) -> Path:
        """The cache of a file's trees, made if it is not there."""
        options = {
            "tokenizer": fingerprint(self.template.tokenizer),
            "template": self.template.source,
            **{name: getattr(self, name) for name in ("kind", "format", "columns", "train_on", "system_prompt")},
            **{name: getattr(self, name) for name in ("max_length", "overlength", "on_error")},
        }
        files: Sequence[Path | str] = [path] if path.startswith("hf:") else find_files(path)
        stored = cache_folder() / f"{key(files, options)}.arrow"
        if not stored.is_file() or not stored.with_suffix(".json").is_file():
            build(stored, lambda report: self._trees(path, report))
        return stored

    # -- Lightning's hooks -------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenise on one process, so that the others find the cache."""
        if self._trainer().predicting:
            return
        for path in self._paths():
            stored = self._stored(path)
            report = Store(stored).report
            log.info("%s: %s", path, report.line())
            if report.rejected:
                self._write_rejected(path, report)

    def _paths(self) -> list[str]:
        return [*self.paths, *(p for p in (self.val_path, self.test_path) if p)]

    def setup(self, stage: str) -> None:
        if stage == "predict" or self._stores:
            return
        offset = 0
        for path in self._paths():
            self._stores.append(Store(self._stored(path), offset))
            offset += len(self._stores[-1])
        train = [(s, i) for s, store in enumerate(self._stores[: len(self.paths)]) for i in range(len(store))]
        held: list[tuple[int, int]] = []
        if self.val_path is None and self.val_fraction:
            train, held = self._hold_out(train)
        beside = iter(range(len(self.paths), len(self._stores)))
        if self.val_path:
            held = self._all(next(beside))
        if self.test_path:
            self.test_trees = Subset(self._stores, self._all(next(beside)))
        self.train_trees, self.val_trees = Subset(self._stores, train), Subset(self._stores, held)
        self._repeats = self._epoch(train)

    def _all(self, store: int) -> list[tuple[int, int]]:
        return [(store, i) for i in range(len(self._stores[store]))]

    def _hold_out(self, rows: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Training rows and held-out rows, at least one of each where there are two."""
        count = min(max(1, round(self.val_fraction * len(rows))), len(rows) - 1)
        shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held = set(shuffled[:count])
        return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]

    def _epoch(self, rows: list[tuple[int, int]]) -> list[int]:
        """Indices of the rows of one epoch: each file's as often as it weighs, a fraction of it drawn by seed."""
        weights = list(self.paths.values())
        indices: list[int] = []
        for s, weight in enumerate(weights):
            mine = [i for i, (store, _) in enumerate(rows) if store == s]
            whole, part = int(weight), weight - int(weight)
            drawn = torch.randperm(len(mine), generator=torch.Generator().manual_seed(self.seed + s)).tolist()
            indices += mine * whole + [mine[i] for i in drawn[: round(part * len(mine))]]
        return indices

    def train_rows(self) -> Sequence[int]:
        return self._repeats

    def source(self, row: int) -> str:
        store = next(s for s in reversed(self._stores) if s.offset <= row)
        return store.source(row - store.offset)

    def _write_rejected(self, path: str, report: Report) -> None:
        folder = Path(self._trainer().default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{Path(path).stem}.rejected.jsonl"
        lines = [json.dumps({"source": s, "problem": p}, ensure_ascii=False) for s, p in report.rejected]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        log.info("%s: %s rows left out, listed in %s", path, f"{len(lines):,}", file)

    # -- prompts for `leyden predict` --------------------------------------------------------------------------------

    def predict_dataloader(self) -> Any:
        """Lists of (example, prompt ids), `predict_size` at a time; each rank answers its share."""
        trainer = self._trainer()
        prompts = [
            (example, self.template.prompt(example.messages)) for path in self.paths for example in self._prompts(path)
        ]
        size = self.predict_size
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        return Prompts(chunks[trainer.global_rank :: trainer.world_size])

    def _prompts(self, path: str) -> Iterator[Example]:
        rows = list(read_rows(path))
        plain: list[Mapping[str, Any]] = [row for _, row in rows]
        name = detect(plain[:100], "prompts", self.columns) if self.format == "auto" else self.format
        for place, row in rows:
            try:
                yield parse(row, name, "prompts", self.columns)
            except RowError as problem:
                raise UserError(f"{place}: {problem}") from None
