"""Tokenised examples in a memory-mapped Arrow file, made once for each file, tokenizer, template and options."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from leyden.atomic import replacing
from leyden.batch.forest import Totals, Tree
from leyden.datamodules.formats.row_error import by_count
from leyden.errors import UserError

log = logging.getLogger("leyden")

SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.int32()),
        "responses": pa.list_(pa.list_(pa.int32())),
        "weights": pa.list_(pa.list_(pa.float32())),
        "scores": pa.list_(pa.float32()),
        "length": pa.int32(),
        "tokens": pa.float32(),
        "source": pa.string(),
    }
)
Place = tuple[str, Tree]


@dataclass
class Report:
    """Counts of the rows of a file that were kept, dropped or truncated, and the rejected rows."""

    format: str = ""
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> rows"""
    truncated: int = 0
    left_out: int = 0
    """Responses that are not compared, of rows that are kept: ties, repeats, and what options leave out; of
    instructions, the answers that are not the best"""
    not_read: dict[str, list[int]] = field(default_factory=dict)
    """Columns and keys of messages that are not read: as `formats.not_read.count` has them"""
    notes: dict[str, int] = field(default_factory=dict)
    """What the chat template did to kept rows that a user should know -> rows"""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """(`file:line`, what is wrong), for rows that were skipped"""
    remarks: list[str] = field(default_factory=list)
    """What readers of files detected or left out"""

    def drop(self, reason: str) -> None:
        """Count a row that is not kept."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def note(self, notes: Iterable[str]) -> None:
        """Count a row that there is something to say about."""
        for note in notes:
            self.notes[note] = self.notes.get(note, 0) + 1

    def line(self, use: str = "compared") -> str:
        """One line for the terminal; `use` is what does not happen to the responses that are left out."""
        parts = [f"{self.format}", f"{self.kept:,} rows kept", f"dropped: {by_count(self.dropped) or 'none'}"]
        parts += [f"{self.truncated:,} truncated"] if self.truncated else []
        return ", ".join(parts + ([f"{self.left_out:,} responses not {use}"] if self.left_out else []))

    def write_rejected(self, file: Path) -> None:
        """One JSON object for each row that was skipped."""
        lines = [json.dumps({"source": s, "problem": p}, ensure_ascii=False) for s, p in self.rejected]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


class Store:
    """Trees on disk. Lengths and totals are in memory; tokens are read on access.

    Args:
        path: the Arrow file.
        offset: added to the index of a row to make its stable id, where several files are one data set.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        with pa.memory_map(str(path)) as source:
            self.table = pa.ipc.open_file(source).read_all()
        with path.with_suffix(".json").open(encoding="utf-8") as file:
            self.report = Report(**json.load(file))
        self.offset = offset
        self.lengths: Sequence[int] = self.table["length"].to_pylist()
        responses = pc.list_value_length(self.table["responses"]).to_pylist()
        tokens = self.table["tokens"].to_pylist()
        self.totals: Sequence[Totals] = [Totals(t, n, 1) for t, n in zip(tokens, responses, strict=True)]

    @cached_property
    def labels(self) -> list[float]:
        """The score of each row's first response, of rows that have scores."""
        return [scores[0] for scores in self.table["scores"].to_pylist() if scores]

    @cached_property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each row's prompt."""
        lengths: list[int] = pc.list_value_length(self.table["prompt"]).to_pylist()
        return lengths

    @cached_property
    def longest(self) -> list[int]:
        """Tokens of each row's prompt and longest response."""
        longest: list[int] = []
        for prompts, responses in zip(self.table["prompt"].chunks, self.table["responses"].chunks, strict=True):
            lengths = pc.list_value_length(responses.values).to_numpy()
            longest_responses = np.maximum.reduceat(lengths, responses.offsets.to_numpy()[:-1])
            longest += (pc.list_value_length(prompts).to_numpy() + longest_responses).tolist()
        return longest

    @cached_property
    def largest_token(self) -> int:
        """The largest token id of all rows."""
        columns = self.table["prompt"].chunks, self.table["responses"].chunks
        flat = [*(chunk.flatten() for chunk in columns[0]), *(chunk.flatten().flatten() for chunk in columns[1])]
        return max((pc.max(ids).as_py() or 0 for ids in flat), default=0)

    def prompts(self) -> list[bytes]:
        """The prompt of each row, its token ids as bytes."""
        prompts: list[bytes] = []
        for chunk in self.table["prompt"].chunks:
            values, offsets = chunk.values.to_numpy(), chunk.offsets.to_numpy()
            prompts += [values[start:stop].tobytes() for start, stop in pairwise(offsets)]
        return prompts

    @cached_property
    def contents(self) -> list[int]:
        """A number for each row that is the same where prompt and responses are."""
        contents: list[int] = []
        prompts = iter(self.prompts())
        for chunk in self.table["responses"].chunks:
            ids, ends = chunk.values.values.to_numpy(), chunk.values.offsets.to_numpy()
            for first, last in pairwise(chunk.offsets.to_numpy()):
                digest = hashlib.blake2b(next(prompts), digest_size=8)
                for start, stop in pairwise(ends[first : last + 1]):
                    digest.update(b"|" + ids[start:stop].tobytes())
                contents.append(int.from_bytes(digest.digest(), "big"))
        return contents

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all rows, wherever they came from."""
        digest = hashlib.sha256()
        for name in ("prompt", "responses", "weights", "scores"):
            for chunk in self.table[name].chunks:
                while pa.types.is_list(chunk.type):
                    digest.update(pc.fill_null(pc.list_value_length(chunk), -1).to_numpy())
                    chunk = chunk.flatten()
                digest.update(chunk.to_numpy(zero_copy_only=False))
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tree:
        row = {name: self.table[name][index].as_py() for name in ("prompt", "responses", "weights", "scores")}
        return Tree(**row, row=index + self.offset)

    def source(self, index: int) -> str:
        """`file:line` of a row."""
        place: str = self.table["source"][index].as_py()
        return place


class Subset:
    """Some rows of several stores, as one. `chosen` are (store, index) in order."""

    def __init__(self, stores: Sequence[Store], chosen: Sequence[tuple[int, int]]) -> None:
        self.stores, self.chosen = stores, chosen
        self.lengths: Sequence[int] = [stores[s].lengths[i] for s, i in chosen]
        self.totals: Sequence[Totals] = [stores[s].totals[i] for s, i in chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    @cached_property
    def prompt_lengths(self) -> list[int]:
        """Tokens of each row's prompt."""
        return [self.stores[store].prompt_lengths[row] for store, row in self.chosen]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of these rows in their order."""
        chosen = np.array(self.chosen, dtype=np.int64).tobytes()
        stores = "".join(self.stores[used].fingerprint for used in sorted({s for s, _ in self.chosen}))
        return hashlib.sha256(chosen + stores.encode()).hexdigest()[:16]

    @property
    def largest_token(self) -> int:
        """At least the largest token id of these rows: that of all rows of their stores."""
        return max((self.stores[used].largest_token for used in {s for s, _ in self.chosen}), default=0)

    def __getitem__(self, index: int) -> Tree:
        store, row = self.chosen[index]
        return self.stores[store][row]


def build(path: Path, rows: Callable[[Report], Iterator[Place]]) -> None:
    """Write the Arrow file at `path` from `rows(report)`, and the report as `.json` next to it; whole or not at all."""
    report, started = Report(), time.monotonic()
    with (
        _whole_file(path) as unfinished,
        pa.OSFile(str(unfinished), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
    ):
        waiting: list[dict[str, Any]] = []
        for source, tree in rows(report):
            waiting.append(_record(source, tree))
            report.kept += 1
            if len(waiting) == 2000:
                writer.write_batch(pa.RecordBatch.from_pylist(waiting, SCHEMA))
                waiting = []
                if time.monotonic() - started > 5:
                    log.info("tokenised %s rows so far", f"{report.kept:,}")
                    started = time.monotonic()
        if waiting:
            writer.write_batch(pa.RecordBatch.from_pylist(waiting, SCHEMA))
        with _whole_file(path.with_suffix(".json")) as report_file:
            report_file.write_text(json.dumps(asdict(report), ensure_ascii=False), encoding="utf-8")


def _record(source: str, tree: Tree) -> dict[str, Any]:
    weights = tree.weights or [[1.0] * len(response) for response in tree.responses]
    return {
        "prompt": tree.prompt,
        "responses": tree.responses,
        "weights": weights,
        "scores": tree.scores,
        "length": len(tree),
        "tokens": tree.totals().tokens,
        "source": source,
    }


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A temporary path, which is renamed to `path` at the end and removed after an error."""
    try:
        with replacing(path) as unfinished:
            yield unfinished
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); set LEYDEN_CACHE to a folder with room") from None
