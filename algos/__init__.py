"""Algorithms: one class, one file, one idea."""

from leyden.algos.dpo import DPO
from leyden.algos.grpo import GRPO
from leyden.algos.ppo import PPO
from leyden.algos.rejection_sampling import RejectionSampling
from leyden.algos.reward_model import RewardModel
from leyden.algos.sft import SFT

__all__ = ["DPO", "GRPO", "PPO", "SFT", "RejectionSampling", "RewardModel"]
