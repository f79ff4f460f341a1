"""A documented ladder of degradations: what each does to a clip, and what it is taken to cost in opinion.

Nobody rated anything. A clip's simulated mean opinion score is 1 + 4 * (1 - loss_1) * (1 - loss_2) * ..., one loss for each
degradation that it went through, from 0 (not heard) to 1 (ruined). The orders within a ladder are safe (more noise is
never better); the exchange rates between ladders are this file's choice.
"""

import numpy as np
import torch
from common import SAMPLING_RATE
from scipy.signal import butter, sosfiltfilt
from torch import Tensor
from transformers import EncodecModel

CODEC_LOSS = {4: 0.25, 3: 0.35, 2: 0.5, 1: 0.7}  # by codebooks kept


def add_noise(wave: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """White noise, 45 to 0 dB below the clip."""
    level = np.sqrt((wave**2).mean()) * 10 ** (-(45 - 45 * severity) / 20)
    return wave + level * rng.standard_normal(len(wave))


def clip_peaks(wave: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Hard clipping at .9 to .04 of the peak."""
    limit = np.abs(wave).max() * 0.9 * (0.04 / 0.9) ** severity
    return wave.clip(-limit, limit)


def limit_band(wave: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Low pass from 7 kHz down to 500 Hz."""
    cutoff = 7000 * (500 / 7000) ** severity
    return sosfiltfilt(butter(6, cutoff, fs=SAMPLING_RATE, output="sos"), wave)


def reduce_bits(wave: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Rounding to 10 down to 2 bits."""
    step = np.abs(wave).max() / 2 ** (10 - 8 * severity - 1)
    return np.round(wave / step) * step


def drop_out(wave: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Gaps of 20 to 120 ms, up to five a second."""
    out = wave.copy()
    for _ in range(1 + int(severity * 5 * len(wave) / SAMPLING_RATE)):
        length = int(rng.uniform(0.02, 0.12) * SAMPLING_RATE)
        begin = rng.integers(len(wave) - length)
        out[begin : begin + length] = 0
    return out


def warp(wave: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Out of tune and out of time: the speed wanders by 5 to 150 cents, one to four times a second."""
    t = np.arange(len(wave)) / SAMPLING_RATE
    depth = 2 ** (5 * 30**severity / 1200) - 1
    rate = rng.uniform(1, 4)
    shift = depth * np.sin(2 * np.pi * rate * t + rng.uniform(0, 2 * np.pi)) / (2 * np.pi * rate)
    return np.interp(t + shift, t, wave)


LADDERS = {  # the loss at severity 1; it grows as severity ** 0.8
    "noise": (add_noise, 0.95),
    "clipping": (clip_peaks, 0.8),
    "band_limit": (limit_band, 0.75),
    "bit_depth": (reduce_bits, 0.9),
    "drop_outs": (drop_out, 0.85),
    "warp": (warp, 0.85),
}


def degrade(wave: np.ndarray, name: str, severity: float, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A clip [T] one step down a ladder, `severity` in [0, 1], and the loss that this counts for."""
    change, worst = LADDERS[name]
    return change(wave, severity, rng).astype(np.float32), worst * severity**0.8


@torch.no_grad()
def decode_degraded(
    codec: EncodecModel, codes: Tensor, kept: int, scrambled: float, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """A clip [T] from codes [K, F], with the first `kept` codebooks and a share of random codes, and its loss."""
    wrong = torch.from_numpy(rng.random(codes.shape) < scrambled)
    random_codes = torch.from_numpy(rng.integers(codec.config.codebook_size, size=codes.shape))
    codes = torch.where(wrong, random_codes, codes.long())[:kept]
    wave = codec.decode(codes[None, None], [None]).audio_values[0, 0].numpy()
    return wave, 1 - (1 - CODEC_LOSS[kept]) * (1 - 0.95 * scrambled**0.5)
