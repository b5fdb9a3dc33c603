"""Policies over transformers models."""

from leyden.models.causal_lm import CausalLM

__all__ = ["CausalLM"]
