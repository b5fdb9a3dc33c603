"""Algorithms: one class, one file, one idea."""

from leyden.algos.dpo import DPO
from leyden.algos.reward_model import RewardModel
from leyden.algos.sft import SFT

__all__ = ["DPO", "RewardModel", "SFT"]
