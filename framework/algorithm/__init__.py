"""The base classes of algorithms: a subclass writes `loss`, as exact means over its batch, and little else.

Called by Lightning's Trainer; subclassed in `leyden.algos` and by you. May import `data`, `checkpoint` and below.
Begin reading at `algorithm`, then `optimizer_step`: how a loss becomes one exact step. `with_reference` adds a
reference, `with_labels` labelled single responses, `scalar_head` a reward head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.algorithm.algorithm import Algorithm
    from leyden.algorithm.scalar_head import WithScalarHead
    from leyden.algorithm.schedules import WarmupCosine
    from leyden.algorithm.with_labels import WithLabels
    from leyden.algorithm.with_reference import WithReference

__all__ = ["Algorithm", "WarmupCosine", "WithLabels", "WithReference", "WithScalarHead"]

__getattr__ = lazy_exports(
    __name__,
    {
        "algorithm": "Algorithm",
        "with_reference": "WithReference",
        "with_labels": "WithLabels",
        "scalar_head": "WithScalarHead",
        "schedules": "WarmupCosine",
    },
)
