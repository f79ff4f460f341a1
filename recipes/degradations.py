"""A documented ladder of degradations: what each does to a clip, and what it is taken to cost in opinion.

Nobody rated anything. A clip's simulated mean opinion score is 1 + 4 * (1 - loss_1) * (1 - loss_2) * ..., one loss for each
degradation that it went through, from 0 (not heard) to 1 (ruined). Where ViSQOL applies, a ladder's losses are measured with
it: on some clips, against the clean clip, as a share of what the clean clip itself scores above 1. It does not apply to
`warp`, which leaves each short patch of sound intact, nor to wrong codes, which make other music: their losses are this
file's choice.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from common import SAMPLING_RATE
from scipy.signal import butter, sosfiltfilt
from torch import Tensor
from transformers import EncodecModel


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


def crackle(wave: np.ndarray, severity: float, rng: np.random.Generator) -> np.ndarray:
    """Clicks of up to twice the clip's peak, 2 to 200 a second."""
    clicks = (rng.random(len(wave)) < 2 * 100**severity / SAMPLING_RATE) * rng.uniform(-2, 2, len(wave))
    return wave + clicks * np.abs(wave).max()


LADDERS = {
    "noise": add_noise,
    "clipping": clip_peaks,
    "band_limit": limit_band,
    "bit_depth": reduce_bits,
    "drop_outs": drop_out,
    "warp": warp,
}
UNSEEN = {"crackle": crackle}  # for the test alone
BY_RULE = {"warp": 0.85}  # the loss at severity 1, where ViSQOL does not apply; it grows as severity ** 0.8
SEVERITIES = np.linspace(0, 1, 7)


def measure_losses(
    clips: np.ndarray, codes: Tensor, codec: EncodecModel, visqol: Callable, rng: np.random.Generator
) -> dict[str, list[float]]:
    """What each degradation costs: for each ladder its losses at `SEVERITIES`, and for "codec" those of 1 to 4 codebooks.

    Args:
        clips: clean clips [N, T].
        codes: the same clips' codes [N, K, F].
        codec: decodes them.
        visqol: (clean [T], degraded [T]) to an opinion from 1 to 5.
    """
    best = [visqol(clip, clip) for clip in clips]

    def loss(degraded: Sequence[np.ndarray]) -> float:
        scores = [(visqol(clip, other) - 1) / (top - 1) for clip, other, top in zip(clips, degraded, best, strict=True)]
        return max(0.0, 1 - float(np.mean(scores)))

    found = {}
    for name, change in (LADDERS | UNSEEN).items():
        if name in BY_RULE:
            found[name] = [BY_RULE[name] * severity**0.8 for severity in SEVERITIES]
            continue
        losses = [loss([change(clip, s, rng).astype(np.float32) for clip in clips]) for s in SEVERITIES[1:]]
        found[name] = np.maximum.accumulate([0.0, *losses]).tolist()  # more of it is never better
    kept = range(1, codes.shape[1] + 1)
    decoded = [[decode(codec, some[:k])[: clips.shape[1]] for some in codes] for k in kept]
    found["codec"] = np.minimum.accumulate([loss(waves) for waves in decoded]).tolist()
    return {name: [round(float(x), 4) for x in values] for name, values in found.items()}


def degrade(
    wave: np.ndarray, name: str, severity: float, losses: dict[str, list[float]], rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """A clip [T] some way down a ladder, `severity` in [0, 1], and the loss that this counts for in `measure_losses`."""
    change = (LADDERS | UNSEEN)[name]
    return change(wave, severity, rng).astype(np.float32), float(np.interp(severity, SEVERITIES, losses[name]))


@torch.no_grad()
def decode(codec: EncodecModel, codes: Tensor) -> np.ndarray:
    """Codes [K, F] of the first codebooks to a clip [T]."""
    return codec.decode(codes[None, None].long(), [None]).audio_values[0, 0].numpy()


def decode_degraded(
    codec: EncodecModel,
    codes: Tensor,
    kept: int,
    scrambled: float,
    losses: dict[str, list[float]],
    rng: np.random.Generator,
) -> tuple[np.ndarray, float]:
    """A clip [T] from codes [K, F], with the first `kept` codebooks and a share of random codes, and its loss."""
    wrong = torch.from_numpy(rng.random(codes.shape) < scrambled)
    random_codes = torch.from_numpy(rng.integers(codec.config.codebook_size, size=codes.shape))
    wave = decode(codec, torch.where(wrong, random_codes, codes.long())[:kept])
    return wave, 1 - (1 - losses["codec"][kept - 1]) * (1 - 0.95 * scrambled**0.5)
