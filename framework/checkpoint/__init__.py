"""Checkpoints: saved at whole optimizer steps, found again, and refused where they do not belong.

Called by algorithms (for provenance), by the command line, by `leyden export` and, as callbacks, by the Trainer. May
import `policy` and the single files of `framework`. Begin reading at `callback` (when a step is saved), then `find`
(which file is gone on from) and `provenance` (what it was made from). docs/checkpoints.md has the table of who saves
what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.checkpoint.callback import Checkpoint, RNGState
    from leyden.checkpoint.signals import GracefulStop

__all__ = ["Checkpoint", "GracefulStop", "RNGState"]

__getattr__ = lazy_exports(
    __name__,
    {
        "callback": "Checkpoint RNGState",
        "signals": "GracefulStop",
    },
)
