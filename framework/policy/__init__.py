"""A policy turns tokens into log-probabilities and prompts into responses; a reference stands still.

Called by algorithms, rewards and evaluation; implemented by `leyden.models.CausalLM`, or by a class of yours. May
import `batch` and the single files of `framework`. Begin reading at `policy`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.policy.policy import Outputs, Policy, Reference, ReferenceKind, Response, Sampling, eval_mode

__all__ = ["eval_mode", "Outputs", "Policy", "Reference", "ReferenceKind", "Response", "Sampling"]

__getattr__ = lazy_exports(
    __name__,
    {
        "policy": "Outputs Policy Reference ReferenceKind Response Sampling eval_mode",
    },
)
