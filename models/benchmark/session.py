"""Tasks over one model after the other: what is asked, what is kept, and what is printed."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lm_eval
from datasets import disable_progress_bars
from rich.console import Console
from rich.table import Table

from leyden import __version__
from leyden.errors import UserError
from leyden.language import localised, say
from leyden.models.benchmark.evaluate import Settings, aggregated, facts, prepare, run, seeded
from leyden.models.benchmark.lm import PolicyLM
from leyden.models.benchmark.logged import log_results
from leyden.models.benchmark.opening import Opened, opened
from leyden.models.benchmark.results import Record, Results
from leyden.models.benchmark.tasks import load
from leyden.policy.engine import Engine
from leyden.policy.engine_session import EngineSession

EVERY = 30.0
"""Seconds between two lines of progress in a log file."""


@dataclass(frozen=True)
class Model:
    """How models are loaded and read. See the command's help."""

    dtype: str | None = None
    base: str | None = None
    checkpoint: str | None = None
    batch_tokens: int | None = None
    max_length: int | None = None
    add_bos_token: bool | None = None
    engine: Callable[[], Engine] | None = None
    """Makes what samples answers."""
    engine_as_text: str | None = None


class Session:
    """Tasks, loaded once, that several models are asked.

    Args:
        tasks: as they were typed.
        settings: how tasks are asked.
        model: how models are loaded.
        again: ask tasks again that were asked already.
    """

    def __init__(self, tasks: Sequence[str], settings: Settings, model: Model, again: bool = False) -> None:
        self.settings, self.model, self.again = settings, model, again
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # which defaults a task's file leaves to it
        # Each retry of a request; what it comes to is said in one line.
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
        disable_progress_bars()
        seeded(settings.seed)
        self.loaded = load(tasks, settings.allow_code)
        for task in self.loaded.tasks.values():
            prepare(task, settings)

    def measure(self, typed: str, folder: Path) -> None:
        """Ask a model all tasks. The file of results in the folder has each task as soon as it has ended."""
        results = Results(folder)
        results.read()  # a damaged file is said before hours of work
        one = opened(typed, self.model.dtype, self.model.base, self.model.checkpoint)
        with self._engine(one, results.file.parent) as engine:
            self._ask(typed, one, results, engine)

    @contextmanager
    def _engine(self, one: Opened, folder: Path) -> Iterator[Callable[[int], Engine] | None]:
        """What gives the engine with the model's weights, which is started when it is first asked for, and ended."""
        if self.model.engine is None:
            yield None
            return
        session = EngineSession(self.model.engine())
        folder.mkdir(parents=True, exist_ok=True)
        try:
            yield lambda longest: session.sync(one.policy, 0, folder, longest)
        except UserError as error:  # it names the flags of `fit`
            raise UserError(str(error).replace("--model.engine", "--engine")) from None
        finally:
            session.stop()

    def _ask(self, typed: str, one: Opened, results: Results, engine: Callable[[int], Engine] | None) -> None:
        progress = Progress(typed)
        lm = PolicyLM(
            one.policy, self.model.batch_tokens, self.model.max_length, self.model.add_bos_token, self.settings.seed,
            one.forward, progress.add, engine,
        )  # fmt: skip
        if self.settings.chat and not lm.tokenizer.chat_template:
            raise UserError(f"{typed}: it has no chat template; leave out --apply_chat_template")
        records, of_model = dict[str, Record](), self._of_model(one, lm)
        for number, (name, task) in enumerate(self.loaded.tasks.items(), start=1):
            asked = facts(task, lm, self.settings) | {"lm_eval": lm_eval.__version__} | of_model
            known = None if self.again else results.done(name, asked)
            if known is not None:
                say(f"{typed}: {name} is in {results.file} already, {_shown(known)}; --again asks anew")
                records[name] = known
                continue
            lm.cut = 0
            progress.begin(name, number, len(self.loaded.tasks))
            records[name] = run(task, lm, self.settings) | of_model | self._place(name)
            task._instances = None  # a later model is asked anew
            if lm.cut:
                say(f"{name}: {lm.cut:,} requests are longer than {lm.max_length:,} tokens, and lost their beginning")
            results.add("tasks", name, records[name])
            progress.end()
        for name, group in self.loaded.groups.items():
            if (record := aggregated(group, records)) is not None:
                results.add("groups", name, record | of_model | self._place(name))
                records[name] = record
        shown = {name: one for name, one in records.items() if "group" not in self._place(name)}
        log_results(results.file.parent, {name: one["metrics"][one["metric"]]["value"] for name, one in shown.items()})
        self._print(typed, records)
        say(f"results: {results.file}")

    def _of_model(self, one: Opened, lm: PolicyLM) -> Record:
        """What is known of the model, the same in all its records."""
        dtype = "4 bits" if one.four_bits else str(one.policy.dtype).removeprefix("torch.")
        read = {"dtype": dtype, "max_length": lm.max_length, "add_bos_token": lm.add_bos_token}
        if self.model.engine_as_text is not None:
            read["engine"] = self.model.engine_as_text
        return {"model": one.fingerprint(), "path": one.name, "settings": read, "leyden": __version__}

    def _place(self, name: str) -> Record:
        """The group that a task or group belongs to and that has a measure of its own."""
        parents = (
            group.name for group in self.loaded.groups.values() if name in group.child_names and group.has_aggregation
        )
        parent = next(parents, None)
        return {} if parent is None else {"group": parent}

    def _print(self, typed: str, records: dict[str, Record]) -> None:
        table = Table(title=typed, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for head in ("task", "measure", "value", "± error", "questions", "examples"):
            table.add_column(head, justify="left" if head in ("task", "measure") else "right")
        for name, record in records.items():
            shots = "–" if "shots" not in record else str(record["shots"])
            for named, one in record["metrics"].items():
                error = "–" if one["error"] is None else f"{one['error']:.4f}"
                table.add_row(name, named, f"{one['value']:.4f}", error, f"{record['questions']:,}", shots)
        Console(highlight=False).print(table)


def _shown(record: Record) -> str:
    """The main measure of a record in a few letters."""
    return f"{record['metric']} {record['metrics'][record['metric']]['value']:.4f}"


class Progress:
    """How far a task is: one line that is written anew in a terminal, and a line every half minute in a log file."""

    def __init__(self, typed: str) -> None:
        self.typed, self.live = typed, sys.stderr.isatty()
        self._name, self._done, self._began, self._last = "", 0, 0.0, 0.0
        self._kind = ""

    def begin(self, name: str, number: int, total: int) -> None:
        self._name = f"{name} ({number} of {total})" if total > 1 else name
        self._kind, self._done, self._began, self._last = "", 0, time.monotonic(), time.monotonic()

    def add(self, kind: str, done: int, total: int) -> None:
        """Count requests of a kind that were done."""
        if kind != self._kind:
            self._kind, self._done = kind, 0
        self._done += done
        now = time.monotonic()
        if now - self._last < (0.2 if self.live else EVERY):
            return
        self._last = now
        left = (now - self._began) / self._done * (total - self._done)
        text = localised(f"{self.typed}: {self._name}: {self._done:,} of {total:,}, about {left:.0f} s left")
        print(f"\r{text}\033[K" if self.live else text, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
