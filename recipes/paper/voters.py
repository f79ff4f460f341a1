"""The voters' own taste as a reward: what no method has, and so how far the tuning itself gets.

    cd recipes/paper && musicrl ppo --reward "0.65*voters:taste" "0.35*adherence" ...

They are the simulated listeners who vote in `musicrl align --seed 0`; others compare.
"""

from collections.abc import Sequence

from torch import Tensor

from musicrl_hf.preferences.listeners import mean_liking, simulated_listeners

VOTERS = simulated_listeners(12, seed=0)


def taste(prompts: Sequence[str], audio: Tensor, sampling_rate: int) -> Tensor:
    """Mean liking [B] of the voters, without noise, of clips [B, C, T] at equal loudness."""
    return mean_liking(VOTERS, prompts, audio, sampling_rate)
