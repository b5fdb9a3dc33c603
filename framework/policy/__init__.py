"""A policy turns tokens into log-probabilities and prompts into responses; a reference stands still; an engine samples
for a policy.

Called by algorithms, rewards and evaluation; implemented by `leyden.models.CausalLM`, or by a class of yours. May
import `batch` and the single files of `framework`. Begin reading at `policy`, then
`engine`; `engine_session` keeps one in step with the policy, and `sync_proof` proves it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.policy.engine import Engine, Native
    from leyden.policy.policy import (
        Labels,
        Outputs,
        Policy,
        Reference,
        ReferenceKind,
        Response,
        Sampling,
        eval_mode,
        predictions_of,
    )
    from leyden.policy.predictions import KnownPredictions, Predictions
    from leyden.policy.reference import OtherPolicy

__all__ = [
    "Engine",
    "eval_mode",
    "KnownPredictions",
    "Labels",
    "Native",
    "OtherPolicy",
    "Outputs",
    "Policy",
    "Predictions",
    "predictions_of",
    "Reference",
    "ReferenceKind",
    "Response",
    "Sampling",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "engine": "Engine Native",
        "policy": "Labels Outputs Policy Reference ReferenceKind Response Sampling eval_mode predictions_of",
        "predictions": "KnownPredictions Predictions",
        "reference": "OtherPolicy",
    },
)
