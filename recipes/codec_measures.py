"""What a codec keeps of held-out clips: the wave, the notes, the spectrum, and what a listener's model says.

ViSQOL (Hines et al. 2015) comes from the package `audio-samples-qoe`; without it, that figure is left out.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path

import numpy as np
import torch
from codec_losses import ReconstructionLoss
from common import CODEBOOK_SIZE, N_CODEBOOKS, SAMPLING_RATE, to_float
from measures import chroma_cosine, high_energy, librosa_chroma_cosine, signal_to_noise_db
from scipy.signal import resample_poly
from transformers import EncodecModel

VISQOL_RATE = 48_000  # Hz, of its audio mode


def si_sdr_db(target: np.ndarray, output: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio of [T] (Le Roux et al. 2019, equation 3)."""
    projected = target * (output @ target) / max(target @ target, 1e-12)
    return signal_to_noise_db(projected, output)


@cache
def visqol_score() -> Callable[..., float] | None:
    """The metric inside `audio-samples-qoe`, or None where that is not installed.

    Its public call needs a second package, for reading files, which takes a compiler; the metric itself does not.
    """
    package = importlib.util.find_spec("audio_samples_qoe")
    if package is None:
        return None
    library = next(Path(str(package.origin)).parent.glob("_native*.so"))
    native = ExtensionFileLoader("_native", str(library))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_native", native))
    native.exec_module(module)
    return module._score


def visqol(target: np.ndarray, output: np.ndarray) -> float | None:
    """ViSQOL's mean opinion score, 1 to 5, in audio mode; None where it is not installed."""
    score = visqol_score()
    if score is None:
        return None
    up = [resample_poly(wave.astype(np.float64), VISQOL_RATE // SAMPLING_RATE, 1) for wave in (target, output)]
    return float(score(up[0], VISQOL_RATE, up[1], VISQOL_RATE, "audio"))


@torch.no_grad()
def entries_used(model: EncodecModel, clips: np.ndarray) -> dict:
    """How many entries of each codebook clips [N, T] take: the more clips, the more of them."""
    used: list[set] = [set() for _ in range(N_CODEBOOKS)]
    for clip in clips:
        codes = model.encode(to_float(clip)[None, None]).audio_codes[0, 0]
        for found, row in zip(used, codes.tolist(), strict=True):
            found.update(row)
    counts = [len(found) for found in used]
    return {"clips": len(clips), "entries": counts, "share": round(min(counts) / CODEBOOK_SIZE, 3)}


@torch.no_grad()
def evaluate(model: EncodecModel, clips: np.ndarray) -> dict:
    """Encode and decode held-out clips [N, T]: with all codebooks, and the first figures with the first few."""
    used: list[set] = [set() for _ in range(N_CODEBOOKS)]
    few: dict[int, list] = {k: [] for k in range(1, N_CODEBOOKS)}
    whole: list[dict[str, float]] = []
    criterion = ReconstructionLoss()
    for clip in clips:
        wave = to_float(clip)[None, None]
        codes = model.encode(wave).audio_codes
        target = wave[0, 0].numpy()
        for k in range(N_CODEBOOKS):
            used[k].update(codes[0, 0, k].tolist())
        for k, found in few.items():
            output = model.decode(codes[:, :, :k], [None]).audio_values[0, 0].numpy()
            found.append((signal_to_noise_db(target, output), chroma_cosine(target, output)))
        decoded = model.decode(codes, [None]).audio_values[:, 0]
        output = decoded[0].numpy()
        row = {
            "snr_db": signal_to_noise_db(target, output),
            "si_sdr_db": si_sdr_db(target, output),
            "chroma_cosine": chroma_cosine(target, output),
            "chroma_cosine_librosa": librosa_chroma_cosine(target, output),
            "mel_distance_nats": float(criterion.mel_distance(wave[:, 0], decoded)),
            "high_energy_kept": high_energy(output) / max(high_energy(target), 1e-9),
        }
        opinion = visqol(target, output)
        whole.append(row | ({} if opinion is None else {"visqol": opinion}))
    results: dict = {"clips": len(clips), "codebook_entries_used": [len(entries) for entries in used]}
    results["share_of_entries_used"] = round(min(map(len, used)) / CODEBOOK_SIZE, 3)
    for k, found in few.items():
        snr, chroma = np.mean(found, axis=0)
        results[f"{k}_codebooks"] = {"snr_db": round(float(snr), 2), "chroma_cosine": round(float(chroma), 4)}
    means = {name: round(float(np.mean([row[name] for row in whole])), 4) for name in whole[0]}
    means["high_energy_kept"] = round(float(np.median([row["high_energy_kept"] for row in whole])), 4)
    results[f"{N_CODEBOOKS}_codebooks"] = means
    return results
