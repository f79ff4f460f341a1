"""Rewards: text adherence, acoustic quality, learned preference, and their combination.

Importing this registers the learned rewards with the Auto classes.
"""

from .adherence import AdherenceReward
from .combine import CombinedReward, load_reward, load_rewards
from .contract import Reward, check_reward_inputs, check_scores
from .preference import PreferenceConfig, PreferenceModel
from .quality import QualityConfig, QualityModel
from .scoring import ScoreTable, score_clips

__all__ = [
    "AdherenceReward",
    "CombinedReward",
    "PreferenceConfig",
    "PreferenceModel",
    "QualityConfig",
    "QualityModel",
    "Reward",
    "ScoreTable",
    "check_reward_inputs",
    "check_scores",
    "load_reward",
    "load_rewards",
    "score_clips",
]
