"""Best of N: of N clips of a prompt, the one that a reward scores highest."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..generator import Clips, MusicRLForConditionalGeneration
from .contract import Reward, ask_reward

SEED_STEP = 1_000_003  # wider than the seeds of one evaluation, so that no two batches draw the same numbers


def best_of(
    generator: MusicRLForConditionalGeneration,
    prompts: Sequence[str],
    n: int,
    reward: Reward,
    *,
    seed: int | None = None,
    name: str = "reward",
    **sampling: Any,
) -> tuple[Clips, Tensor]:
    """Sample `n` clips for each prompt, and keep that which the reward scores highest (of equal ones the first).

    What a reward prefers, without training. The more clips there are to choose from, the higher the score and the further the
    kept clip from what the generator plays: at most ln n - (n - 1) / n nats of KL (Beirami et al. 2024, arXiv 2401.01879).
    The best of a smaller `n` is among the clips of a larger one with the same seed, and `n` = 1 is plain sampling.

    Args:
        generator: samples all B prompts at once, `n` times, so that it takes no more memory than plain sampling.
        prompts: B texts; repeat a prompt for several clips of it.
        n: candidates for each clip that is kept.
        reward: scores each candidate as it was sampled; it must score a clip the same whatever stands beside it.
        seed: of the first candidates; the others' follow from it. None draws other clips each time.
        name: the reward's, for messages.
        sampling: `duration_s`, `temperature`, `top_k` and `guidance_scale` of the generator's `sample`.

    Returns:
        the kept clips, codes [B, K, F] and audio [B, C, T], and their scores [B] float32 on the CPU.

    Raises:
        ValueError: `n` below 1, what `sample` refuses, or a reward that raises or gives no finite scores.
    """
    if n < 1:
        raise ValueError(f"`best_of` must be at least 1 clip, got {n}.")
    prompts = list(prompts)

    def draw(candidate: int) -> tuple[Clips, Tensor]:
        clips = generator.sample(prompts, seed=None if seed is None else seed + candidate * SEED_STEP, **sampling)
        return clips, ask_reward(reward, prompts, clips.audio, clips.sampling_rate, name).cpu()

    bar = tqdm(range(n), desc=f"best of {n}", unit="candidate", leave=False, disable=n == 1 or None)
    drawn = map(draw, bar)
    kept, scores = next(drawn)
    for clips, found in drawn:
        better = (found > scores).to(clips.codes.device)[:, None, None]
        kept = Clips(
            torch.where(better, clips.codes, kept.codes),
            torch.where(better, clips.audio, kept.audio),
            clips.sampling_rate,
        )
        scores = torch.maximum(found, scores)
    return kept, scores
