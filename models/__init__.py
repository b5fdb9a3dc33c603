"""Policies on top of transformers models, and reward models and classifiers as rewards.

Called by algorithms through `leyden.policy.Policy`, by class path, and by the commands plan, chat, export and
benchmark. May import the framework, but neither `datamodules` nor `algos`. Begin reading at `causal_lm`, the policy,
and `backbone`, the parts of a transformers model that the other files use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.models.causal_lm import CausalLM
    from leyden.models.classifier import Classifier
    from leyden.models.encoder import Encoder
    from leyden.models.reward import ModelReward

__all__ = ["CausalLM", "Classifier", "Encoder", "ModelReward"]

__getattr__ = lazy_exports(
    __name__, {"causal_lm": "CausalLM", "classifier": "Classifier", "encoder": "Encoder", "reward": "ModelReward"}
)
