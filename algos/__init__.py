"""Algorithms: one class, one file, one idea."""

from leyden.algos.sft import SFT

__all__ = ["SFT"]
