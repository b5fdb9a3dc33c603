"""Base classes of DataModules over files: `FileData` reads rows, `StoredRows` tokenises, caches and plans them."""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from leyden.batch.forest import Tree
from leyden.data.chat_template import ChatTemplate
from leyden.data.datamodule import DataModule, PlannedData
from leyden.data.step_plan import Trees
from leyden.data.tokenizer import load_tokenizer
from leyden.datamodules.files.files import find_files, stem
from leyden.datamodules.formats import not_read
from leyden.datamodules.formats.formats import format_named
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.predict_loader import Candidates, PromptTokens, candidates, prompts, rank_chunks
from leyden.datamodules.source import Source
from leyden.datamodules.storage.arrow import Report, Store, Subset, build
from leyden.datamodules.storage.cache_key import cache_key
from leyden.datamodules.storage.split import apart, epoch, hold_out, joined
from leyden.datamodules.storage.truncation import Overlength, fit, longest
from leyden.errors import UserError
from leyden.example import Example
from leyden.fingerprint import fingerprint_vocabulary
from leyden.paths import cache_folder

log = logging.getLogger("leyden")
_T = TypeVar("_T")

REMARKS = 12
"""Notes on the files of a path that are logged before training."""
WITHOUT_EFFECT = frozenset(
    "paths val_path val_fraction test_path tokenizer template template_choice batch_size max_tokens seed predict_size "
    "trainer prepare_data_per_node allow_zero_length_dataloader_with_multiple_devices train_trees val_trees test_trees "
    "fingerprint _stores _repeats _planned _predict_rows _options _log_hyperparams _hparams _hparams_initial "
    "_hparams_name _mismatched".split()
)
"""Attributes of a data module that change no tree. All others, a subclass's own included, are part of the cache key."""


class FileData(DataModule):
    """A DataModule that reads rows of one kind from files. A subclass sets `kind` and turns examples into data.

    Args:
        path: a file, folder, glob or `hf:NAME`; several as a list, or as a mapping from each to how often its rows
            come in an epoch (`{a.jsonl: 1, b.jsonl: 0.5}`).
        tokenizer: model folder or hub name of the tokenizer; None is that of the policy in training, else the embedded
            one. Token ids that are not the policy's are refused.
        val_path: validation rows; without it, `val_fraction` of the training rows is held out.
        val_fraction: share of rows held out for validation; 0 for none.
        test_path: rows for `leyden test`.
        format: name of the format of a row, or the path of a `Format` class of yours; `auto` detects it and logs it.
        columns: canonical name -> column, for columns that cannot be guessed, such as `{prompt: 질문, response: 답변}`.
        rank_order: how to read a ranking, `lower_is_better` where rank 1 is the best; never guessed.
        batch_size: rows in one optimizer step, over all ranks and accumulated micro-batches.
        max_tokens: most tokens in one micro-batch.
        max_length: most tokens of a prompt with any one response; a longer plain text is cut into pieces.
        overlength: what happens to a longer row: drop it, cut the start of its prompt or the end of its response, or
            stop with an error.
        on_error: `raise` stops the run at bad rows, `skip` lists them in NAME.rejected.jsonl in the run folder.
        chat_template: `plain`, the name of another one of the tokenizer's, or a Jinja file, instead of its own.
        chat_template_args: what the chat template is given beside the conversation, such as `{enable_thinking: false}`.
            Prompts are made with it too, and the exported template has it.
        system_prompt: put before conversations that have none.
        seed: seed of the order of rows, not of the held-out rows; None takes that of `--seed_everything`.
        predict_size: most rows that `leyden predict` takes at a time.
    """

    kind: str
    """instruction, preference, unpaired, prompts or candidates"""

    def __init__(
        self,
        path: str | list[str] | dict[str, float],
        tokenizer: str | None = None,
        val_path: str | None = None,
        val_fraction: float = 0.05,
        test_path: str | None = None,
        format: str = "auto",
        columns: dict[str, str] | None = None,
        rank_order: Literal["lower_is_better", "higher_is_better"] | None = None,
        batch_size: int = 32,
        max_tokens: int = 16384,
        max_length: int = 1024,
        overlength: Overlength = "drop",
        on_error: Literal["raise", "skip"] = "raise",
        chat_template: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        system_prompt: str | None = None,
        seed: int | None = None,
        predict_size: int = 64,
    ) -> None:
        super().__init__(batch_size, max_tokens, seed)
        if max_length < 2 or max_tokens < 2:
            raise UserError(f"--data.max_length {max_length}, --data.max_tokens {max_tokens}: give 2 or more of each")
        if not 0 <= val_fraction < 1:
            raise UserError(f"--data.val_fraction {val_fraction}: give a share of the rows from 0 to below 1")
        self.paths = path if isinstance(path, dict) else dict.fromkeys([path] if isinstance(path, str) else path, 1.0)
        self.tokenizer, self.template_choice, self.system_prompt = tokenizer, chat_template, system_prompt
        self.chat_template_args = chat_template_args
        self.val_path, self.val_fraction, self.test_path = val_path, val_fraction, test_path
        self.format, self.columns, self.rank_order, self.predict_size = format, columns, rank_order, predict_size
        self.max_length, self.overlength, self.on_error = max_length, overlength, on_error

    @cached_property
    def template(self) -> ChatTemplate:
        """The tokenizer with its chat template.

        Raises:
            UserError: the tokenizer that is named gives other token ids than the policy in training takes.
        """
        policy: Any = getattr(getattr(self.trainer, "lightning_module", None), "policy", None)
        tokenizer = getattr(policy, "tokenizer", None)
        if tokenizer is None or self.tokenizer not in (None, policy.path):  # the policy's knows its revision too
            named = load_tokenizer(self.tokenizer or "tiny")
            if tokenizer is not None and fingerprint_vocabulary(named) != fingerprint_vocabulary(tokenizer):
                raise UserError(
                    f"--data.tokenizer {self.tokenizer}: its token ids are not those of the policy, {policy.path}; "
                    "leave it out, and the policy's own is taken"
                )
            tokenizer = named
        return ChatTemplate(tokenizer, self.template_choice, self.system_prompt, args=self.chat_template_args)

    @property
    def chat_template(self) -> str | None:  # type: ignore[override]
        return self.template.source if self.template_choice is not None or self.chat_template_args else None

    @property
    def columns_read(self) -> frozenset[str]:
        """Columns of a row that `encode` reads by itself."""
        return frozenset()

    # -- from files to examples --------------------------------------------------------------------------------------

    def _made(self, path: str, report: Report, make: Callable[[str, Example, Report], Iterator[_T]]) -> Iterator[_T]:
        """Yields what `make` makes of every usable row of a path, and notes the other rows in the report.

        Raises:
            UserError: after the last row, where rows are bad and `on_error` is `raise`.
        """
        bad: list[tuple[str, RowError]] = []
        for source in self._sources(path, self.kind):
            settled, examples = source.examples(report.remarks.append)
            report.format = report.format or str(settled.format)
            for place, example in examples:
                try:
                    if isinstance(example, Exception):
                        raise example
                    unread = {name: text for name, text in example.not_read.items() if name not in self.columns_read}
                    not_read.count(unread, report.not_read)
                    yield from make(place, example, report)
                    report.note(self.template.take_notes())
                except RowError as error:
                    bad.append((place, error))
                except LeftOut as reason:
                    report.drop(str(reason))
        if bad and self.on_error == "raise":
            place, problem = bad[0]
            more = f" ({len(bad) - 1:,} more rows are bad)" if len(bad) > 1 else ""
            raise UserError(f"{place}: {problem}{more}; or leave such rows out with --data.on_error skip")
        for place, problem in bad:
            report.drop(problem.reason)
            report.rejected.append((place, str(problem)))

    def _sources(self, path: str, kind: str, say: Callable[[str], None] | None = None) -> list[Source]:
        encode = getattr(type(self), "encode", None)
        own = encode is not None and encode.__module__.partition(".")[0] != "leyden"  # it may read labels itself
        source = Source(path, kind, self.format, self.columns or {}, self.rank_order, every_label=own)
        return source.files(say)

    def _paths(self) -> list[str]:
        return [*self.paths, *(p for p in (self.val_path, self.test_path) if p)]

    def _tell(self, path: str, report: Report) -> None:
        """Log the report of a path, and list its rejected rows in a file of the run folder."""
        trainer = self._trainer()
        for remark in report.remarks[:REMARKS]:
            log.info("%s", remark)
        if len(report.remarks) > REMARKS:
            log.info("%s: %s more remarks; leyden data check has them", path, len(report.remarks) - REMARKS)
        log.info("%s: %s", path, report.line("compared" if self.kind == "preference" else "trained"))
        for line in not_read.lines(report.not_read, self.kind):
            log.info("%s: %s", path, line)
        for note, rows in report.notes.items():
            log.info("%s: %s %s: %s", path, f"{rows:,}", "row" if rows == 1 else "rows", note)
        if not report.rejected:
            return
        if trainer.validating or trainer.testing:  # there is no run folder
            log.info("%s: %s rows left out, the first: %s: %s", path, len(report.rejected), *report.rejected[0])
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        names = [re.sub(r"[^\w.-]+", "_", stem(Path(other))) for other in self._paths()]
        number = self._paths().index(path)
        twins = names[:number].count(names[number])
        file = folder / f"{names[number]}{f'-{twins + 1}' if twins else ''}.rejected.jsonl"
        report.write_rejected(file)
        log.info("%s: %s rows left out, listed in %s", path, f"{len(report.rejected):,}", file)

    # -- rows for `leyden predict` -------------------------------------------------------------------------------------

    def predict_dataloader(self) -> Any:
        """This rank's lists of (example, prompt ids), or of (example, tree) where responses are scored."""
        lengths = [len(tokens) for _, tokens in self._predict_rows]
        return rank_chunks(self._predict_rows, lengths, self._trainer(), self.predict_size, self.max_tokens)

    def _longest_asked(self) -> int:
        """Most tokens of a prompt with a response to score; 0 for prompts to answer, as answers have no length yet."""
        return max((longest(tokens) for _, tokens in self._predict_rows if isinstance(tokens, Tree)), default=0)

    @cached_property
    def _predict_rows(self) -> list[PromptTokens] | list[Candidates]:
        scores = getattr(self._trainer().lightning_module, "predicts", "answers") == "scores"
        kind = "candidates" if scores else "prompts"
        sources = [source for path in self.paths for source in self._sources(path, kind, log.info)]
        if scores:
            return candidates(sources, self.template, self.max_length, self.on_error)
        return prompts(sources, self.template, self.on_error)


class StoredRows(FileData, PlannedData):
    """A DataModule of rows with answers. They are tokenised once and cached on disk, split into training and held-out
    rows, mixed, and planned into batches. A subclass turns an example into trees."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stores: list[Store] = []
        self._repeats: list[int] = []

    # -- from rows to trees ------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, example: Example) -> list[Tree]:
        """The trees of one example, however long. Raises `RowError`."""

    def _fitting_trees(self, place: str, example: Example, report: Report) -> Iterator[tuple[str, Tree]]:
        trees, fitting = self.encode(example), list[Tree]()
        problem: LeftOut | None = None
        for tree in trees:  # before any is handed on: a row with an error is no part of the data
            if not tree.totals().tokens:
                raise RowError("nothing to train; give the row an answer or drop it", "nothing to train")
            try:
                fitting.append(fit(tree, self.max_length, self.overlength))
            except LeftOut as error:  # each answer by itself, or the order of answers would matter
                problem = error
        if problem is not None and not fitting:
            raise problem
        report.truncated += sum(all(one is not tree for tree in trees) for one in fitting)
        kept, answers = (sum(len(one.responses) for one in some) for some in (fitting, trees))
        report.left_out += example.left_out + max(0, max(len(example.responses), answers) - kept)
        yield from ((place, one) for one in fitting)

    def _stored(self, path: str, anew: bool = False) -> Path:
        """The Arrow file with the tokenised rows of a path, built if it is missing or if `anew` is set."""
        files: Sequence[Path | str] = [path] if path.startswith("hf:") else find_files(path)
        stored = cache_folder() / f"{cache_key(files, self._options, self.template.tokenizer, self._code)}.arrow"
        if anew or not stored.is_file() or not stored.with_suffix(".json").is_file():
            build(stored, lambda report: self._made(path, report, self._fitting_trees))
        return stored

    @cached_property
    def _options(self) -> dict[str, Any]:
        """What `encode` may depend on, as it is before the first row."""
        own = {name: value for name, value in vars(self).items() if name not in WITHOUT_EFFECT}
        return {**own, "kind": self.kind, "chat template": self.template.source}

    @property
    def _code(self) -> list[type]:
        """The classes that make trees of rows, those of Leyden included."""
        return [type(self), *([type(format_named(self.format, self.kind))] if "." in self.format else [])]

    # -- Lightning's hooks -------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Tokenise on one process, so that the others find the cache."""
        if self._trainer().predicting:
            return
        for path in self._paths():
            self._sources(path, self.kind, log.info)  # logs which files of a folder are left out
            # a hub dataset may change under its name, and its content is not hashed
            self._tell(path, Store(self._stored(path, anew=path.startswith("hf:"))).report)

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
            contents = [self._stores[store].contents[row] for store, row in train]
            train, held = hold_out(train, self.val_fraction, joined(self.places(train), contents))
        other_stores = iter(range(len(self.paths), len(self._stores)))
        if self.val_path:
            held = self._store_rows(next(other_stores))
        if self.test_path:
            self.test_trees = self.trees(self._store_rows(next(other_stores)))
        train = self._apart(train)
        self.train_trees, self.val_trees = self.trees(train), self.trees(held)
        self._repeats = epoch(train, list(self.paths.values()), self.seed)
        if stage == "fit":
            self.train_plan()  # errors of the plan come before a model is built

    def _apart(self, train: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The training rows that do not stand in a file of held-out rows too. Raises `UserError` where none is left."""
        files = len(self.paths)
        held = [row for store in range(files, len(self._stores)) for row in self._store_rows(store)]
        if not held or not train:
            return train
        kept = apart(train, held, [store.contents for store in self._stores])
        for number, path in enumerate(self.paths):
            before = sum(store == number for store, _ in train)
            after = sum(store == number for store, _ in kept)
            if before and not after:
                raise UserError(
                    f"{path}: all of its {before:,} rows are held out too, by --data.val_path or --data.test_path; "
                    "train on other rows, or leave val_path out to hold some out"
                )
            if after < before and self._trainer().global_rank == 0:
                log.info("%s: %s rows are held out too, and not trained on", path, f"{before - after:,}")
        return kept

    def trees(self, rows: list[tuple[int, int]]) -> Trees:
        """The trees of some rows, given as (store, index in it)."""
        return Subset(self._stores, rows)

    def row_lengths(self) -> tuple[list[int], int]:
        """Tokens of every row to train on with all its responses, and most of a prompt with one of them. Needs no
        Trainer; what is tokenised for it is cached for the run."""
        stores = [Store(self._stored(path)) for path in self.paths]
        return [n for s in stores for n in s.lengths], max((n for s in stores for n in s.longest), default=0)

    def _store_rows(self, store: int) -> list[tuple[int, int]]:
        return [(store, i) for i in range(len(self._stores[store]))]

    def places(self, rows: list[tuple[int, int]]) -> Sequence[Hashable]:
        """The place of each row, given as (store, index in it): rows of one place are held out together."""
        return [self._stores[store].source(row) for store, row in rows]

    @property
    def longest_row(self) -> int:  # type: ignore[override]
        """Most tokens from a root to the end of a response: the positions that a model needs."""
        if self.trainer is not None and self.trainer.predicting:
            return self._longest_asked()
        return max((length for store in self._stores for length in store.longest), default=0)

    def train_rows(self) -> Sequence[int]:
        return self._repeats

    def source(self, row: int) -> str:
        store = self._store_of(row)
        return store.source(row - store.offset)

    def tree(self, row: int) -> Tree:
        """The tree of a row, by its stable id."""
        store = self._store_of(row)
        return store[row - store.offset]

    def _store_of(self, row: int) -> Store:
        return next(s for s in reversed(self._stores) if s.offset <= row)
