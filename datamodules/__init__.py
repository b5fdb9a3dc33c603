"""DataModules over files: from rows to batches.

Called by Lightning's Trainer, chosen in YAML, and by `leyden data`. May import the framework, and neither `models` nor
`algos`. Begin reading at `file_data`, the base classes of the DataModules, then `source`, which reads one data file.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.datamodules.attributes import AttributeData
    from leyden.datamodules.evaluation import Evaluation
    from leyden.datamodules.instruction import InstructionData
    from leyden.datamodules.preference import PreferenceData
    from leyden.datamodules.prompts import PromptData

__all__ = ["AttributeData", "Evaluation", "InstructionData", "PreferenceData", "PromptData"]

__getattr__ = lazy_exports(
    __name__,
    {
        "attributes": "AttributeData",
        "evaluation": "Evaluation",
        "instruction": "InstructionData",
        "preference": "PreferenceData",
        "prompts": "PromptData",
    },
)
