"""Training jobs: reward model, DPO, RLOO, GRPO and PPO, and the mathematics that they share."""
