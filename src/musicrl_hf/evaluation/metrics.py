"""Objective metrics that need no model: signal quality, harmony, rhythm, and diversity, which over-optimisation costs first."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import descriptors

CLIP_METRICS = {
    "diatonic_share": "pitch energy in the clip's best diatonic scale; noise has about 0.58",
    "spectral_flatness": "0 for a tone, about 0.56 for white noise",
    "rhythmic_steadiness": "autocorrelation of the onsets at the best beat; 1 is a metronome",
    "silence_share": "20 ms blocks below -60 dBFS",
    "clipping_share": "samples at full scale",
}
"""What `clip_metrics` measures on each clip; all lie in [0, 1]."""

DIVERSITY_METRICS = {
    "timbre_distance_db": "mean difference of two clips of one prompt in their third-octave levels (dB)",
    "harmony_distance": "one minus the cosine of two clips' pitch classes; 0 is the same harmony",
}
"""What `diversity` measures on the clips of one prompt. Near 0 the generator repeats itself."""

_LEVEL_FLOOR_DB = -60.0


def clip_metrics(audio: Tensor, sampling_rate: int) -> dict[str, Tensor]:
    """The `CLIP_METRICS` of each clip, name -> [B].

    Args:
        audio: [B, C, T] in [-1, 1], at least 0.13 s.
        sampling_rate: in Hz.

    Raises:
        ValueError: if the audio is not valid or too short.

    Example:
        >>> tone = 0.3 * torch.sin(torch.arange(16000) * 0.17)
        >>> round(float(clip_metrics(tone[None, None], 16000)["spectral_flatness"]), 2)
        0.0
    """
    audio = audio.detach().float().cpu()
    spec = descriptors.spectrum(audio, sampling_rate)
    return {
        "diatonic_share": descriptors.diatonic_share(spec),
        "spectral_flatness": descriptors.spectral_flatness(spec),
        "rhythmic_steadiness": descriptors.rhythmic_steadiness(spec),
        "silence_share": descriptors.silence_share(audio, sampling_rate),
        "clipping_share": descriptors.clipping_share(audio),
    }


def diversity(audio: Tensor, sampling_rate: int) -> dict[str, float]:
    """How far apart the clips of one prompt are: the `DIVERSITY_METRICS`, each a mean over all pairs of clips.

    Args:
        audio: [B, C, T] with B >= 2, all for the same prompt.
        sampling_rate: in Hz.

    Raises:
        ValueError: for fewer than two clips.
    """
    if len(audio) < 2:
        raise ValueError(f"{len(audio)} clip: diversity compares two or more clips of one prompt")
    spec = descriptors.spectrum(audio.detach().float().cpu(), sampling_rate)
    energy = descriptors.band_energy(spec).mean(dim=2)
    # Relative to the loudest band, so that a mere change of volume is no difference.
    level = 10 * torch.log10(energy / energy.amax(dim=1, keepdim=True).clamp(min=1e-12) + 10 ** (_LEVEL_FLOOR_DB / 10))
    first, second = torch.triu_indices(len(audio), len(audio), offset=1)
    return {
        "timbre_distance_db": float((level[first] - level[second]).abs().mean()),
        "harmony_distance": float(descriptors.harmony_distances(spec)[first, second].mean()),
    }


def distinct_ngrams(codes: Sequence[Tensor] | Tensor, n: int = 4) -> float:
    """Distinct over all n-grams of the first codebook's frames (Li et al. 2016, "distinct-n"), in (0, 1].

    The first codebook carries most of the sound. The share falls with the number of clips, so compare equal numbers.

    Args:
        codes: clips [K, F], or a batch [B, K, F].
        n: frames in a row.

    Raises:
        ValueError: if no clip has n frames.
    """
    seen: set[tuple[int, ...]] = set()
    total = 0
    for clip in codes:
        grams = clip[0].unfold(0, n, 1).tolist() if clip.shape[-1] >= n else []
        seen.update(map(tuple, grams))
        total += len(grams)
    if total == 0:
        raise ValueError(f"n is {n}: no clip has so many frames")
    return len(seen) / total


def frechet_distance(real: NDArray[np.floating] | Tensor, generated: NDArray[np.floating] | Tensor) -> float:
    """Frechet distance between the Gaussians of two sets of embeddings (FAD, Kilgour et al. 2019).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), 0 for the same set. It is biased upwards for few clips: with fewer clips
    than dimensions compare only sets of equal size, and never with figures from another embedding.

    Args:
        real, generated: [N, D] and [M, D] embeddings of any one model.

    Raises:
        ValueError: if the dimensions differ, or a set has fewer than two rows or values that are not finite.
    """
    sets = [np.asarray(values, dtype=np.float64) for values in (real, generated)]
    for name, values in zip(("real", "generated"), sets, strict=True):
        if values.ndim != 2 or len(values) < 2 or not np.isfinite(values).all():
            raise ValueError(f"{name} has shape {values.shape}: give finite embeddings [N, D] of two clips or more")
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"real has {sets[0].shape[1]} dimensions, generated {sets[1].shape[1]}: use one embedding")
    (mean_a, cov_a), (mean_b, cov_b) = (
        (values.mean(axis=0), np.atleast_2d(np.cov(values, rowvar=False))) for values in sets
    )
    # tr((C1 C2)^(1/2)) = tr((C1^(1/2) C2 C1^(1/2))^(1/2)), whose argument is symmetric: its eigenvalues are real.
    value, vector = np.linalg.eigh(cov_a)
    root = vector * np.sqrt(value.clip(min=0)) @ vector.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return float(max(distance, 0.0))
