"""Files to batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leyden.datamodules.instruction import InstructionData
    from leyden.datamodules.preference import PreferenceData
    from leyden.datamodules.prompts import PromptData

__all__ = ["InstructionData", "PreferenceData", "PromptData"]

_MODULES = {"InstructionData": "instruction", "PreferenceData": "preference", "PromptData": "prompts"}


def __getattr__(name: str) -> Any:
    """Import on first use: `leyden data` must answer without waiting for Lightning."""
    if name in _MODULES:
        return getattr(import_module(f"leyden.datamodules.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
