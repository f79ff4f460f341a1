"""Loudness of a batch of clips, where they lie: measured clip after clip on the CPU, it takes as long as sampling on a GPU.

The same as `audio.match_loudness` on each clip, up to rounding: pyloudnorm's filters, its blocks and its gates. What people or
simulated listeners hear goes through that one, so that a clip's bytes never depend on the device.
"""

import math
from functools import lru_cache

import pyloudnorm
import torch
from torch import Tensor

from .audio import LOWEST_WEIGHTED_RATE, check_audio

_BLOCK_S, _STEP = 0.4, 0.25  # BS.1770: blocks of 0.4 s, each a quarter of its length behind the last
_ABSOLUTE_GATE, _RELATIVE_GATE = -70.0, -10.0  # LUFS; LU below the mean of what passed the first
_CHANNEL_WEIGHTS = (1.0, 1.0, 1.0, 1.41, 1.41)
_OFFSET = -0.691  # makes a 1 kHz sine of 0 dBFS in one channel -3.01 LUFS
_CLIPS_ON_A_CPU = 4  # at once: what is worked on stays in the cache, and takes less than half of the time
_SAMPLES_ELSEWHERE = 2**23  # at once: about half a gigabyte in float64
_SETTLED_S = 1.0  # behind it the weighting filter's response is below 1e-50


def match_loudness_of_batch(audio: Tensor, sampling_rate: int, target_lufs: float = -23.0) -> Tensor:
    """Scale each clip of [B, C, T] to `target_lufs` integrated loudness (ITU-R BS.1770-4), on the clips' device.

    As `match_loudness` does: nothing clips, silent clips come back unchanged, short clips are one block, and below 4 kHz the
    level is taken unweighted.

    Args:
        audio: [B, C, T], at most 5 channels.
        sampling_rate: in Hz.

    Raises:
        ValueError: audio that is not valid, or more channels than the standard weighs.

    Example:
        >>> tone = torch.sin(torch.arange(16000) * 2 * torch.pi * 997 / 16000)[None, None]
        >>> matched = match_loudness_of_batch(torch.cat([tone, tone / 10]), 16000)
        >>> bool((matched[0] - matched[1]).abs().max() < 1e-6)
        True
    """
    check_audio(audio)
    if audio.dim() != 3 or audio.shape[1] > len(_CHANNEL_WEIGHTS):
        raise ValueError(
            f"`audio` must be [B, C, T] with at most {len(_CHANNEL_WEIGHTS)} channels, got shape {tuple(audio.shape)}; mix it down "
            "first, as with audio.mean(1, keepdim=True)."
        )
    at_once = _CLIPS_ON_A_CPU if audio.device.type == "cpu" else max(1, _SAMPLES_ELSEWHERE // audio[0].numel())
    parts = audio.split(at_once)
    loudness = torch.cat([integrated_loudness(part, sampling_rate) for part in parts])
    gain = torch.where(loudness.isfinite(), 10 ** ((target_lufs - loudness) / 20), torch.ones_like(loudness))
    scaled = audio * gain.to(audio.dtype)[:, None, None]
    peak = scaled.abs().amax((1, 2), keepdim=True).clamp(min=1.0)
    return torch.where(loudness.isfinite()[:, None, None], scaled / peak, audio)


def integrated_loudness(audio: Tensor, sampling_rate: int) -> Tensor:
    """Integrated loudness of clips [B, C, T], [B] in LUFS; minus infinity for a clip that never passes the gates."""
    samples = audio.shape[-1]
    precise = audio.to(torch.float32 if audio.device.type == "mps" else torch.float64)
    if sampling_rate < LOWEST_WEIGHTED_RATE:
        loudness = _OFFSET + 10 * torch.log10(precise.square().mean(2).sum(1) + 1e-20)
        return torch.where(loudness > _ABSOLUTE_GATE, loudness, -torch.inf)
    block = min(_BLOCK_S, (samples - 0.5) / sampling_rate)
    size = 2 ** math.ceil(math.log2(samples + _SETTLED_S * sampling_rate))
    spectrum = torch.fft.rfft(precise, size)
    response = _weighting(sampling_rate, size).to(spectrum)
    weighted = torch.fft.irfft(spectrum * response, size)[..., :samples]
    squares = weighted.square()
    count = round((samples / sampling_rate - block) / (block * _STEP)) + 1
    blocks = [slice(*(int(block * (i * _STEP + part) * sampling_rate) for part in (0, 1))) for i in range(count)]
    means = torch.stack([squares[..., part].sum(-1) for part in blocks], -1) / (block * sampling_rate)  # [B, C, blocks]
    weights = means.new_tensor(_CHANNEL_WEIGHTS[: audio.shape[1]])[:, None]
    power = (means * weights).sum(1)  # [B, blocks]
    level = _OFFSET + 10 * torch.log10(power)

    def mean_where(heard: Tensor) -> Tensor:
        return _OFFSET + 10 * torch.log10((power * heard).sum(1) / heard.sum(1))

    audible = level >= _ABSOLUTE_GATE
    relative = mean_where(audible) + _RELATIVE_GATE
    loudness = mean_where((level > relative[:, None]) & (level > _ABSOLUTE_GATE))
    return torch.where(loudness.isnan(), -torch.inf, loudness)


@lru_cache(maxsize=8)
def _weighting(sampling_rate: int, size: int) -> Tensor:
    """Frequency response of BS.1770's two filters, [size / 2 + 1], complex128."""
    stages = (
        pyloudnorm.IIRfilter(4.0, 1 / math.sqrt(2), 1500.0, sampling_rate, "high_shelf"),
        pyloudnorm.IIRfilter(0.0, 0.5, 38.0, sampling_rate, "high_pass"),
    )
    delay = torch.exp(-2j * torch.pi * torch.arange(size // 2 + 1, dtype=torch.float64) / size)
    response = torch.ones_like(delay)
    for stage in stages:
        above, below = (
            sum(float(factor) * delay**power for power, factor in enumerate(factors)) for factors in (stage.b, stage.a)
        )
        response = response * stage.passband_gain * above / below
    return response
