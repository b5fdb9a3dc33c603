"""Prompt data: prompts without answers, for algorithms that sample answers and learn from their rewards."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

from leyden.algorithm.algorithm import Algorithm
from leyden.data.prompts import Prompt, PromptLoader
from leyden.datamodules.file_data import FileData
from leyden.datamodules.formats.row_error import LeftOut, RowError
from leyden.datamodules.predict_loader import Chunks, origin, rank_chunks
from leyden.datamodules.source import Source
from leyden.datamodules.storage.arrow import Report
from leyden.datamodules.storage.split import epoch, hold_out, shuffled
from leyden.errors import UserError
from leyden.example import Example
from leyden.fingerprint import fingerprint_text
from leyden.rng import EVALUATION_SEED

log = logging.getLogger("leyden")


class PromptData(FileData):
    """Prompts of any format: files of prompts, and of instructions or preferences without their answers.

    Of prompts with the same tokens only the first is kept, with its row; held-out prompts are never trained on. A
    prompt needs room for an answer: of `max_length` tokens, `--model.sampling.max_new_tokens` belong to the answer.
    Rewards see the row of a prompt; in files written by `leyden predict` or `leyden data label`, the original row from
    the column `row`. An algorithm that trains on answers, too, gets those of the rows: the last turn of each.

    Args:
        path: a file, folder, glob or `hf:NAME`; several as a list, or as a mapping from each to how often its prompts
            come (`{a.jsonl: 1, b.jsonl: 0.5}`).
        batch_size: prompts in one rollout. It may be more than there are: then a prompt comes several times, each time
            with other samples.
        overlength: what happens to a prompt without room for an answer: drop it, cut its start, or stop with an error.
        val_size: most held-out prompts that one validation answers, always the same ones.
    """

    kind = "prompts"

    def __init__(
        self,
        path: str | list[str] | dict[str, float],
        *,
        batch_size: int = 32,
        overlength: Literal["drop", "truncate_prompt", "error"] = "drop",
        val_size: int = 200,
        **kwargs: Any,
    ) -> None:
        super().__init__(path, batch_size=batch_size, overlength=overlength, **kwargs)
        if overlength not in ("drop", "truncate_prompt", "error"):
            raise UserError(f"--data.overlength {overlength}: prompts take drop, truncate_prompt or error")
        if val_size < 1:
            raise UserError(f"--data.val_size {val_size}: give 1 or more, or --data.val_fraction 0 to hold nothing out")
        self.val_size = val_size
        self._parts: list[list[Prompt]] = []
        self._reports: list[Report] = []
        self._train: list[Prompt] = []
        self._held: list[Prompt] = []

    # -- from rows to prompts ----------------------------------------------------------------------------------------

    @cached_property
    def _room(self) -> int:
        """Most tokens of a prompt that leave room for an answer."""
        new = self._trainer().lightning_module.sampling.max_new_tokens
        if new >= self.max_length:
            raise UserError(
                f"--model.sampling.max_new_tokens {new} leaves nothing of --data.max_length {self.max_length} for a "
                "prompt; raise max_length, which is prompt and answer together, or lower max_new_tokens"
            )
        return self.max_length - int(new)

    @property
    def _with_answers(self) -> bool:
        return bool(getattr(getattr(self.trainer, "lightning_module", None), "needs_answers", False))

    def _sources(self, path: str, kind: str, say: Callable[[str], None] | None = None) -> list[Source]:
        trained = kind == self.kind and path in self.paths
        return super()._sources(path, "instruction" if trained and self._with_answers else kind, say)

    def _answer(self, example: Example, report: Report) -> tuple[Example, list[int] | None]:
        """The example as a prompt and the tokens of its answer, where it was read with one: everything before its last
        turn, and that turn, which is cut where a sampled answer would be."""
        if example.text is not None:
            raise RowError("plain text has no prompt to answer; give rows with a prompt and an answer", "no prompt")
        if not example.responses:
            return example, None
        *turns, last = [*example.messages, *example.responses[0]]
        example = replace(example, messages=turns, responses=[[last]])
        answer, new = self.template.encode(example).responses[0], self.max_length - self._room
        report.truncated += len(answer) > new
        return example, answer[:new]

    def _fitting(self, place: str, example: Example, report: Report) -> Iterator[Prompt]:
        """Yields a prompt, cut where `overlength` is `truncate_prompt`; without its number."""
        example, answer = self._answer(example, report)
        tokens = self.template.prompt(example.messages, example.tools)
        excess = len(tokens) - self._room
        if excess > 0:
            if self.overlength == "drop":
                raise LeftOut("no room to answer")
            if self.overlength == "error" or self._room < 2:
                raise RowError(
                    f"a prompt of {len(tokens)} tokens leaves no room to answer, {self._room} would (--data.max_length "
                    "less --model.sampling.max_new_tokens); raise max_length, or set --data.overlength drop",
                    "no room to answer",
                )
            tokens = [tokens[0], *tokens[1 + excess :]]  # the first is BOS or the opening of a turn
            report.truncated += 1
        yield Prompt(-1, replace(example, row=origin(example.row)), tokens, answer)

    def row_lengths(self) -> tuple[list[int], int]:
        """Tokens of every prompt, however long, and of the longest. Needs no Trainer."""

        def length(place: str, example: Example, report: Report) -> Iterator[int]:
            yield len(self.template.prompt(example.messages, example.tools))

        lengths = [n for path in self.paths for n in self._made(path, Report(), length)]
        return lengths, max(lengths, default=0)

    def _read(self) -> None:
        """Fill `_parts` (the prompts of each path) and `_reports`, unless they are filled."""
        if self._parts:
            return
        paths, files, row, last_log = self._paths(), len(self.paths), 0, time.monotonic()
        reports, parts = [Report() for _ in paths], [list[Prompt]() for _ in paths]
        for path, report, part in zip(paths, reports, parts, strict=True):
            for prompt in self._made(path, report, self._fitting):
                part.append(prompt._replace(row=row))
                row += 1
                if time.monotonic() - last_log > 5:
                    log.info("tokenised %s prompts so far", f"{row:,}")
                    last_log = time.monotonic()
        held = {tuple(prompt.tokens) for part in parts[files:] for prompt in part}
        seen = set[tuple[int, ...]]()
        for number, report in enumerate(reports):
            first = number < files
            parts[number] = _without_duplicates(parts[number], report, seen if first else set(), held if first else ())
        self._parts, self._reports = parts, reports

    # -- Lightning's hooks -------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Read on one process first, so that errors and counts are reported once."""
        if self._trainer().predicting:
            return
        for path in self._paths():
            self._sources(path, self.kind, log.info)  # logs which files of a folder are left out
        self._read()
        for path, report in zip(self._paths(), self._reports, strict=True):
            self._tell(path, report)

    def setup(self, stage: str) -> None:
        if stage == "predict" or self._train:
            return
        trainer = self._trainer()
        if getattr(type(trainer.lightning_module), "experience", None) is Algorithm.experience:
            name = type(trainer.lightning_module).__name__
            raise UserError(
                f"{name} learns from answers that rows have, and PromptData gives prompts alone; take an algorithm "
                "that samples answers, or --data InstructionData or PreferenceData"
            )
        self._read()
        rows = [(s, i) for s, part in enumerate(self._parts[: len(self.paths)]) for i in range(len(part))]
        held: list[tuple[int, int]] = []
        if self.val_path is None and self.val_fraction:
            rows, held = hold_out(rows, self.val_fraction, rows)
        repeats = [rows[index] for index in epoch(rows, list(self.paths.values()), self.seed)]
        self._train = [self._parts[s][i] for s, i in repeats]
        self._held = self._parts[len(self.paths)] if self.val_path else [self._parts[s][i] for s, i in held]
        if stage == "fit":
            self._check()

    def _check(self) -> None:
        """Raise `UserError`, before a model is built, for no training prompts or fewer in a rollout than processes."""
        if not self._train:
            raise UserError("no training prompts are left; look at the counts above and at --data.path")
        world = self._trainer().world_size
        if world > self.batch_size:
            raise UserError(
                f"{world} processes share a rollout of {self.batch_size} prompts, so some would never have one; set "
                f"--data.batch_size {world} or more"
            )

    @property
    def longest_row(self) -> int:  # type: ignore[override]
        """Most tokens of a prompt with an answer: the positions that a model needs."""
        if self.trainer is not None and self.trainer.predicting:
            return self._longest_asked()
        longest = max((len(prompt.tokens) for part in self._parts for prompt in part), default=0)
        return longest + self.max_length - self._room if longest else 0

    @property
    def held_sizes(self) -> tuple[int, int] | None:
        return super().held_sizes if self._held else None

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        rows = ((prompt.tokens, prompt.example.row) for prompt in self._train)
        return fingerprint_text("".join(map(repr, rows)))

    def find_token(self, least: int) -> tuple[int, int] | None:
        prompts = (prompt for part in self._parts for prompt in part)
        return next(((prompt.row, max(prompt.tokens)) for prompt in prompts if max(prompt.tokens) >= least), None)

    def source(self, row: int) -> str:
        return self._places[row]

    @cached_property
    def _places(self) -> dict[int, str]:
        return {prompt.row: prompt.example.source for part in self._parts for prompt in part}

    def train_dataloader(self) -> Any:
        return self._trainer().lightning_module.experience(PromptLoader(self._train, self.batch_size, self.seed))

    def val_dataloader(self) -> Any:
        return self._chunks(self._held, "val", self.val_size)

    def test_dataloader(self) -> Any:
        return self._chunks(self._parts[-1], "test") if self.test_path else super().test_dataloader()

    def _chunks(self, prompts: Sequence[Prompt], stage: str, size: int | None = None) -> Chunks[Prompt] | list[Any]:
        """Lists of prompts for this rank. All ranks together have at most `size`, and fewer under `limit_*_batches`.

        A whole number there counts batches of `batch_size` prompts, as in other data; a fraction is a share of prompts.
        """
        drawn = shuffled(len(prompts), EVALUATION_SEED)[:size]
        trainer = self._trainer()
        limit = getattr(trainer, f"limit_{stage}_batches")
        if not drawn or limit == 0:
            return []
        setattr(trainer, f"limit_{stage}_batches", 1.0)  # Lightning must not cut once more
        most = limit * self.batch_size if isinstance(limit, int) else int(limit * len(drawn))
        chosen = [prompts[index] for index in sorted(drawn[: max(most, 1)])]
        lengths = [len(prompt.tokens) + self.max_length - self._room for prompt in chosen]
        return rank_chunks(chosen, lengths, trainer, self.predict_size, self.max_tokens)


def _without_duplicates(
    prompts: list[Prompt], report: Report, seen: set[tuple[int, ...]], held: Collection[Any]
) -> list[Prompt]:
    """The prompts whose tokens are not in `held` or `seen`, each once. Adds to `seen`, and counts in the report."""
    unique = []
    for prompt in prompts:
        key = tuple(prompt.tokens)
        if key in held or key in seen:
            report.drop("held out elsewhere" if key in held else "the same as an earlier prompt")
        else:
            unique.append(prompt)
        seen.add(key)
    report.kept = len(unique)
    return unique
