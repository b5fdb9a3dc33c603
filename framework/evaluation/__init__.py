"""The same held-out questions before, during and after training, whatever a model is trained by.

Called by the Trainer, as a callback; `compare` reads the columns. May import `on_policy` and below. Begin reading at
`evaluator` (when, and against what), then `evaluation_pass` (one pass over the questions) and `metrics` (what is
measured on answers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.evaluation.evaluator import Evaluator
    from leyden.evaluation.metrics import Column, Measure

__all__ = ["Column", "Evaluator", "Measure"]

__getattr__ = lazy_exports(
    __name__,
    {
        "evaluator": "Evaluator",
        "metrics": "Column Measure",
    },
)
