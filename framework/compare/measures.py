"""The columns that are compared: those of evaluations, and those of training."""

from __future__ import annotations

from leyden.evaluation.metrics import ANSWERS, MEASURES, Column, Fact

PEOPLE = (
    Column("people/score", "people", "score by people's votes, in nats: 1 more wins e times as often as it loses"),
    Column("people/win_rate", "people's wins", "share of comparisons by people, a tie is half a win"),
    Column(
        "people/agreement", "reward as people", "share of pairs with its answers that the reward orders as people do"
    ),
)
"""Columns of `--votes`, the first ones where it is given."""
COLUMNS = (
    *PEOPLE,
    *(column for measure in MEASURES for column in measure.columns),
    Column("val/loss", "val loss", "the algorithm's own, on validation rows", ("algorithm", "rows"), "least", True),
    Column("val/accuracy", "val accuracy", "share of validation pairs", ("algorithm", "rows"), asked=True),
    Column("train/tokens", "tokens", "trained on", ("tokenizer",), "least"),
    Column("train/seconds", "seconds", "of training, without evaluations", (), "least"),
    Column("perf/tokens_per_second", "tokens/s", "over the last steps", ("tokenizer",)),
    Column("perf/peak_memory_gb", "GB", "most memory held", (), "least"),
)
"""All columns, in the order of tables."""

TRAINING = (
    Column("train/loss", "loss", "the algorithm's own", ("algorithm",), "least"),
    Column("rollout/reward", "reward of rollouts", "by the run's own reward", ()),
    Column("rollout/kl", "KL of rollouts", "nats per answer", (), "least"),
)
"""Columns of training that are drawn as curves, and are in no table."""


def column_named(name: str, known: tuple[Column, ...] = COLUMNS) -> Column:
    """The column of a name; one without an entry in `known` gets its properties from the name."""
    for column in known:
        if column.column == name:
            return column
    less_is_better = name.endswith(("loss", "perplexity", "seconds", "bits_per_character", "ece"))
    of_training = name.startswith(("val/", "train/"))
    needs: tuple[Fact, ...] = ("algorithm", "rows") if of_training else ANSWERS if name.startswith("eval/") else ()
    return Column(name, name, "", needs, "least" if less_is_better else "most")
