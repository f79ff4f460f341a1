"""The delay pattern: codebook k lags k decoder steps, so that K codes can be drawn in one step.

S = F + K - 1 decoder steps for mono. Stereo models interleave left and right codebooks, and each pair shares a delay:
S = F + K/2 - 1. The same pattern as transformers' `MusicgenForCausalLM.build_delay_pattern_mask`.
"""

import torch
from torch import Tensor


def codebook_delays(num_codebooks: int, audio_channels: int = 1) -> list[int]:
    """Decoder steps by which each codebook lags; [0, 1, 2, 3] for four mono codebooks, [0, 0, 1, 1] for stereo."""
    if audio_channels not in (1, 2) or (audio_channels == 2 and num_codebooks % 2):
        raise ValueError(
            f"`audio_channels` = {audio_channels} with {num_codebooks} codebooks: mono (1) takes any number of codebooks, "
            "stereo (2) an even one."
        )
    return [k // audio_channels for k in range(num_codebooks)]


def num_steps(frames: int, num_codebooks: int, audio_channels: int = 1) -> int:
    """Decoder steps S that `frames` frames take."""
    return frames + codebook_delays(num_codebooks, audio_channels)[-1]


def delay_codes(codes: Tensor, pad: int, audio_channels: int = 1) -> Tensor:
    """Codes [B, K, F] to delayed ids [B, K, S]; the corners that hold no code are `pad`."""
    batch, num_codebooks, frames = codes.shape
    delays = codebook_delays(num_codebooks, audio_channels)
    delayed = codes.new_full((batch, num_codebooks, frames + delays[-1]), pad)
    for k, delay in enumerate(delays):
        delayed[:, k, delay : delay + frames] = codes[:, k]
    return delayed


def undelay_codes(delayed: Tensor, audio_channels: int = 1) -> Tensor:
    """Delayed ids (or any value per code) [B, K, S] back to frames [B, K, F]."""
    num_codebooks, steps = delayed.shape[1:3]
    delays = codebook_delays(num_codebooks, audio_channels)
    frames = steps - delays[-1]
    if frames < 1:
        raise ValueError(f"`delayed` has {steps} steps; {num_codebooks} codebooks need at least {delays[-1] + 1}.")
    return torch.stack([delayed[:, k, delay : delay + frames] for k, delay in enumerate(delays)], 1)


def delay_mask(frames: int, num_codebooks: int, audio_channels: int = 1, device: torch.device | None = None) -> Tensor:
    """Bool [K, S], True where the pattern holds a code and False where it pads."""
    ones = torch.zeros(1, num_codebooks, frames, dtype=torch.long, device=device)
    return delay_codes(ones, -1, audio_channels)[0] == 0
