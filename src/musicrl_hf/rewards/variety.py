"""Variety: how far a clip's harmony is from that of the other clips of its prompt.

A reward that people's choices taught has one best clip for a prompt, and what is tuned on it for long plays that one to
everybody. This one pays a clip for being unlike the others that were sampled beside it. It is a distance of the group, so
it says nothing of a clip alone.
"""

import torch
from torch import Tensor

from .. import descriptors
from .contract import check_reward_inputs


@torch.no_grad()
def variety(prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor:
    """One minus the cosine of two clips' pitch classes, the mean over the other clips of the same prompt in this call.

    The mean over a group is its `harmony_distance` in :mod:`musicrl_hf.evaluation.metrics`. So what it keeps up is what is
    measured there: that other measures of diversity hold up too has to be looked at.

    Args:
        prompts: B texts; clips of one text are compared with each other.
        audio: [B, C, T] in [-1, 1], at least 0.18 s.
        sampling_rate: Hz.

    Returns:
        distances [B] float32 in [0, 1]; 0 for a clip that is alone with its prompt, or silent.

    Raises:
        ValueError: see :func:`check_reward_inputs`; a clip that is too short for its pitches to be told.

    Example:
        >>> tones = torch.stack([torch.sin(torch.arange(16000) * 2 * torch.pi * hz / 16000) for hz in (440, 440, 622.3)])
        >>> [round(distance, 1) for distance in variety(["a"] * 3, 0.3 * tones[:, None], 16000).tolist()]
        [0.5, 0.5, 1.0]
    """
    check_reward_inputs(prompts, audio, sampling_rate)
    return mean_to_others(prompts, descriptors.harmony_distances(descriptors.spectrum(audio, sampling_rate)))


vars(variety)["compares_clips"] = True


def mean_to_others(prompts: list[str], distances: Tensor) -> Tensor:
    """Distances [B, B] between clips to each one's mean distance from the others of its prompt [B]; 0 where it is alone."""
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    group = torch.tensor([numbers[prompt] for prompt in prompts], device=distances.device)
    others = (group[:, None] == group[None]).fill_diagonal_(False)
    return (distances * others).sum(1) / others.sum(1).clamp(min=1)
