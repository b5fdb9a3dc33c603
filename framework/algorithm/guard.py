"""What stops a step that would spoil the weights: a loss or gradient that is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from leyden.batch.forest import Batch
from leyden.errors import UserError

if TYPE_CHECKING:
    from leyden.algorithm.algorithm import Algorithm


def stop(algorithm: Algorithm, what: str, value: float, batches: Sequence[Batch]) -> None:
    """Stop before the weights are touched, and name the rows of these batches that are to blame.

    Args:
        algorithm: whose step it is.
        what: loss or gradient.
        value: of the whole step.
        batches: this rank's micro-batches with a bad loss; all of them for a gradient.

    Raises:
        UserError: always.
    """
    rows = [row for b in batches for row in (blame(algorithm, b) if what == "loss" else b.row.tolist())]
    names = [algorithm.data.source(r) if algorithm.data is not None else f"row {r}" for r in rows[:8]]
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    places = ", ".join(names) + more if rows else "rows of another process"
    raise UserError(
        f"step {algorithm.trainer.global_step}: the {what} is {value}, from {places}; look at those rows, and try a "
        "lower --model.optimizer.lr or --trainer.gradient_clip_val 1"
    )


@torch.no_grad()
def blame(algorithm: Algorithm, batch: Batch) -> list[int]:
    """The rows whose loss alone is not finite, or all rows if none is to blame by itself."""
    if algorithm.device_mesh is not None:  # a forward that only one rank runs would wait for the others for ever
        return list(batch.row.tolist())
    parts = [batch.select([i]) for i, span in enumerate(batch.structure()) if span.responses]
    guilty = [int(part.row[0]) for part in parts if not torch.isfinite(algorithm.loss(part))]
    return guilty or list(batch.row.tolist())
