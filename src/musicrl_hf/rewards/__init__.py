"""Rewards: text adherence, acoustic quality, learned preference, and their combination."""

from .contract import Reward, check_reward_inputs, check_scores

__all__ = ["Reward", "check_reward_inputs", "check_scores"]
