"""The voters' own taste as a reward: what no method has, and so how far the tuning itself gets.

    cd recipes/paper && musicrl ppo --reward "0.65*voters:taste" "0.35*adherence" ...

They are the simulated listeners who vote in `musicrl align --seed 0`; others compare.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from musicrl_hf.audio import match_loudness
from musicrl_hf.preferences.listeners import clip_features, simulated_listeners

VOTERS = simulated_listeners(12, seed=0)


def taste(prompts: Sequence[str], audio: Tensor, sampling_rate: int) -> Tensor:
    """Mean liking [B] of the voters, without noise, at equal loudness."""
    matched = torch.stack([match_loudness(clip, sampling_rate) for clip in audio.detach().float().cpu()])
    features = clip_features(prompts, matched, sampling_rate)
    return torch.stack([voter.utility(features) for voter in VOTERS]).mean(0)
