"""Rewards: text adherence, acoustic quality, learned preference, and their combination."""

from .adherence import AdherenceReward
from .contract import Reward, check_reward_inputs, check_scores
from .quality import QualityConfig, QualityModel

__all__ = [
    "AdherenceReward",
    "QualityConfig",
    "QualityModel",
    "Reward",
    "check_reward_inputs",
    "check_scores",
]
