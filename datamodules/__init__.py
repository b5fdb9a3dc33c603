"""Files to batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leyden.datamodules.instruction import InstructionData

__all__ = ["InstructionData"]


def __getattr__(name: str) -> Any:
    """Import on first use: `leyden data` must answer without waiting for Lightning."""
    if name == "InstructionData":
        from leyden.datamodules.instruction import InstructionData

        return InstructionData
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
