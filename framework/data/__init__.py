"""Examples to planned batches: the base classes of DataModules, whatever files their rows come from.

Called by the DataModules in `leyden.datamodules`, by on-policy algorithms and evaluations (prompts), and by models
(chat templates and tokenizers). May import `batch` and `policy` and below. Begin reading at `step_plan`, which decides
what a step holds; `datamodule` hands it to Lightning, `chat_template` turns messages into token trees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.data.chat_template import ChatTemplate
    from leyden.data.datamodule import DataModule, PlannedData
    from leyden.data.prompts import Prompt, PromptLoader
    from leyden.data.step_plan import PlannedLoader, StepPlan, Trees

__all__ = ["ChatTemplate", "DataModule", "PlannedData", "PlannedLoader", "Prompt", "PromptLoader", "StepPlan", "Trees"]

__getattr__ = lazy_exports(
    __name__,
    {
        "datamodule": "DataModule PlannedData",
        "prompts": "Prompt PromptLoader",
        "step_plan": "PlannedLoader StepPlan Trees",
        "chat_template": "ChatTemplate",
    },
)
