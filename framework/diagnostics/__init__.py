"""Warnings of what goes wrong in a run: sentences with a flag to try, each given once.

Called by the Trainer, as a callback. May import `run` and the single files of `framework`. Begin reading at `rules`: a
rule is a function of the run's history.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.diagnostics.callback import Diagnostics
    from leyden.diagnostics.history import History
    from leyden.diagnostics.rules import Finding, Rule

__all__ = ["Diagnostics", "Finding", "History", "Rule"]

__getattr__ = lazy_exports(
    __name__,
    {
        "callback": "Diagnostics",
        "rules": "Finding Rule",
        "history": "History",
    },
)
