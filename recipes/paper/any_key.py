"""Variety for which another key is no news: what `variety` pays for, and what a prompt that names its key has not asked for.

`variety` compares pitch classes, so that the same harmony a fourth higher is as good as another one, and a generator that is paid
for it leaves the key of its prompt. Here two clips are as far apart as in the transposition in which they are nearest.

    musicrl ppo ... --reward "0.85*preference:reward" "0.15*any_key:variety"     # with this folder on PYTHONPATH
"""

import torch
from torch import Tensor

from musicrl_hf import descriptors
from musicrl_hf.rewards.contract import check_reward_inputs
from musicrl_hf.rewards.variety import mean_to_others

SEMITONES = 12


@torch.no_grad()
def variety(prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor:
    """One minus the greatest cosine of two clips' pitch classes over the twelve transpositions, the mean over the prompt's others.

    Args:
        prompts: B texts; clips of one text are compared with each other.
        audio: [B, C, T] in [-1, 1], at least 0.18 s.
        sampling_rate: Hz.

    Returns:
        distances [B] float32 in [0, 1]; 0 for a clip that is alone with its prompt, or silent.

    Raises:
        ValueError: see :func:`check_reward_inputs`.
    """
    check_reward_inputs(prompts, audio, sampling_rate)
    spectrum = descriptors.spectrum(audio, sampling_rate)
    pitch = torch.nn.functional.normalize(spectrum.chroma.sum(dim=2), dim=1)
    nearest = torch.stack([pitch @ pitch.roll(step, 1).T for step in range(SEMITONES)]).amax(0)
    distances = (1 - torch.maximum(nearest, nearest.T)).clamp(min=0)  # the two differ by rounding
    distances = torch.minimum(distances, descriptors.harmony_distances(spectrum))  # 0 beside silence
    return mean_to_others(prompts, distances)


vars(variety)["compares_clips"] = True
