"""Policies over transformers models, and reward models as rewards."""

from leyden.models.causal_lm import CausalLM
from leyden.models.reward import ModelReward

__all__ = ["CausalLM", "ModelReward"]
