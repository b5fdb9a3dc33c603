"""Algorithms: one class, one file, one idea.

Called by Lightning's Trainer, chosen in YAML. May import the framework, and no other algorithm. Begin reading at `sft`,
then `dpo`, then `ppo`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from leyden.lazy import lazy_exports

if TYPE_CHECKING:
    from leyden.algos.attribute_model import AttributeModel
    from leyden.algos.bco import BCO
    from leyden.algos.distillation import Distillation
    from leyden.algos.dpo import DPO
    from leyden.algos.grpo import GRPO
    from leyden.algos.kto import KTO
    from leyden.algos.online_dpo import OnlineDPO
    from leyden.algos.ppo import PPO
    from leyden.algos.rejection_sampling import RejectionSampling
    from leyden.algos.reward_model import RewardModel
    from leyden.algos.sft import SFT


__all__ = [
    "AttributeModel",
    "BCO",
    "DPO",
    "GRPO",
    "KTO",
    "PPO",
    "SFT",
    "Distillation",
    "OnlineDPO",
    "RejectionSampling",
    "RewardModel",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "attribute_model": "AttributeModel",
        "bco": "BCO",
        "distillation": "Distillation",
        "dpo": "DPO",
        "grpo": "GRPO",
        "kto": "KTO",
        "online_dpo": "OnlineDPO",
        "ppo": "PPO",
        "rejection_sampling": "RejectionSampling",
        "reward_model": "RewardModel",
        "sft": "SFT",
    },
)
