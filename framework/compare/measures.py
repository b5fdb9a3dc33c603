"""The columns that are compared: those of evaluations, and those of training."""

from __future__ import annotations

from leyden.evaluation.metrics import ANSWERS, MEASURES, Column, Fact

COLUMNS = (
    *(column for measure in MEASURES for column in measure.columns),
    Column("val/loss", "val loss", "the algorithm's own, on validation rows", ("algorithm", "rows"), "least", True),
    Column("val/accuracy", "val accuracy", "share of validation pairs", ("algorithm", "rows"), asked=True),
    Column("train/tokens", "tokens", "trained on", ("tokenizer",), "least"),
    Column("train/seconds", "seconds", "of training, without evaluations", (), "least"),
    Column("perf/tokens_per_second", "tokens/s", "over the last steps", ("tokenizer",)),
    Column("perf/peak_memory_gb", "GB", "most memory held", (), "least"),
)
"""In the order of tables."""


def column_named(name: str, known: tuple[Column, ...] = COLUMNS) -> Column:
    """The column of any name; of those without an entry, the name decides."""
    for column in known:
        if column.column == name:
            return column
    least = name.endswith(("loss", "perplexity", "seconds", "bits_per_character", "ece"))
    own = name.startswith(("val/", "train/"))
    needs: tuple[Fact, ...] = ("algorithm", "rows") if own else ANSWERS if name.startswith("eval/") else ()
    return Column(name, name, "", needs, "least" if least else "most")
