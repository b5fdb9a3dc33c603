"""The columns that are compared: what they are called, and what two runs must share for them to mean the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fact = Literal["prompts", "reward", "reference", "text", "sampling", "tokenizer", "algorithm", "rows"]


@dataclass(frozen=True)
class Measure:
    """A column of metrics.csv.

    Args:
        column: its name there.
        name: what it is called in tables.
        unit: of its numbers, in a few words.
        needs: what runs must share to be compared by it.
        best: whether more or less of it is better, for sorting.
        asked: whether it is only shown where all runs that have it can be compared by it.
    """

    column: str
    name: str
    unit: str = ""
    needs: tuple[Fact, ...] = ()
    best: Literal["most", "least"] = "most"
    asked: bool = False


ANSWERS: tuple[Fact, ...] = ("prompts", "sampling")
LANGUAGE = (
    Measure("eval/korean_rate", "Korean", "share of Korean prompts answered in Korean", ANSWERS),
    Measure("eval/formality", "formality", "share of Korean answers that keep to one speech level", ANSWERS),
    Measure("eval/polite_rate", "polite", "share of Korean sentences that are polite", ANSWERS),
)
MEASURES = (
    Measure("eval/reward", "reward", "mean per answer", ("prompts", "sampling", "reward")),
    Measure("eval/kl", "KL", "nats per answer, from the reference", (*ANSWERS, "reference"), "least"),
    Measure("eval/win_rate", "win rate", "share of answers that beat the reference's; a tie is half a win",
            ("prompts", "sampling", "reward", "reference")),
    Measure("eval/length", "length", "tokens per answer", (*ANSWERS, "tokenizer"), "least"),
    Measure("eval/forgetting", "forgetting", "nats per token of general text, more than before training",
            ("text", "tokenizer"), "least"),
    Measure("eval/retained_loss", "retained loss", "nats per token of general text", ("text", "tokenizer"), "least"),
    Measure("eval/eos_rate", "ended", "share of answers that end by themselves", ANSWERS),
    Measure("eval/entropy", "entropy", "nats per token", (*ANSWERS, "tokenizer")),
    Measure("eval/distinct_2", "distinct-2", "share of different word pairs in all answers", ANSWERS),
    *LANGUAGE,
    Measure("val/loss", "val loss", "the algorithm's own, on validation rows", ("algorithm", "rows"), "least", True),
    Measure("val/accuracy", "val accuracy", "share of validation pairs", ("algorithm", "rows"), asked=True),
    Measure("train/tokens", "tokens", "trained on", ("tokenizer",), "least"),
    Measure("train/seconds", "seconds", "of training, without evaluations", (), "least"),
    Measure("perf/tokens_per_second", "tokens/s", "over the last steps", ("tokenizer",)),
    Measure("perf/peak_memory_gb", "GB", "most memory held", (), "least"),
)  # fmt: skip
"""In the order of tables."""


def measure(column: str) -> Measure:
    """The measure of any column; of those without an entry, the names decide."""
    for known in MEASURES:
        if known.column == column:
            return known
    least = column.endswith(("loss", "perplexity", "seconds", "bits_per_character", "ece"))
    own = column.startswith(("val/", "train/"))
    needs: tuple[Fact, ...] = ("algorithm", "rows") if own else ANSWERS if column.startswith("eval/") else ()
    return Measure(column, column, "", needs, "least" if least else "most")
