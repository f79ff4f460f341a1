"""What the stages measure about a clip: noise, notes, and whether it is a tune at all."""

import numpy as np
from common import SAMPLING_RATE

WINDOW, HOP = 4096, 1024  # samples: bins of 3.9 Hz tell semitones apart from 100 Hz up


def signal_to_noise_db(target: np.ndarray, output: np.ndarray) -> float:
    """10 log10 of the energy of the target over the energy of the difference."""
    return float(10 * np.log10((target**2).sum() / max(((target - output) ** 2).sum(), 1e-12)))


def magnitudes(wave: np.ndarray) -> np.ndarray:
    """Hann-windowed magnitude spectra [frames, bins] of [T]."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP]
    return np.abs(np.fft.rfft(frames * np.hanning(WINDOW).astype(np.float32), axis=1))


def chroma(wave: np.ndarray) -> np.ndarray:
    """Energy by pitch class [frames, 12] between 110 Hz and 2 kHz, each frame of length 1."""
    frequency = np.fft.rfftfreq(WINDOW, 1 / SAMPLING_RATE)
    keep = (frequency > 110) & (frequency < 2000)
    pitch_class = np.round(12 * np.log2(frequency[keep] / 440) + 9).astype(int) % 12
    energy = magnitudes(wave)[:, keep] ** 2
    folded = np.stack([energy[:, pitch_class == c].sum(1) for c in range(12)], 1)
    return folded / np.maximum(np.linalg.norm(folded, axis=1, keepdims=True), 1e-9)


def chroma_cosine(target: np.ndarray, output: np.ndarray) -> float:
    """Mean cosine of the two clips' chroma, frame by frame: 1 where the same notes sound."""
    return float((chroma(target) * chroma(output)).sum(1).mean())


def librosa_chroma(wave: np.ndarray) -> np.ndarray:
    """Chroma as librosa's `chroma_stft` folds it, without its tuning estimate: 2,048 samples, wide bins, all octaves.

    Figures by it are higher by about .03 than by `chroma`: its bins leak into their neighbours, in both clips alike.
    """
    size, hop = 2048, 512
    frames = np.lib.stride_tricks.sliding_window_view(wave, size)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(size).astype(np.float32), axis=1))[:, 1:] ** 2
    octaves = np.log2(np.fft.rfftfreq(size, 1 / SAMPLING_RATE)[1:] / 440)
    distance = (12 * octaves + 9 - np.arange(12)[:, None] + 6) % 12 - 6  # semitones from each pitch class
    folded = power @ (np.exp(-0.5 * distance**2) * np.exp(-0.5 * ((octaves - 1) / 2) ** 2)).T
    return folded / np.maximum(np.linalg.norm(folded, axis=1, keepdims=True), 1e-9)


def librosa_chroma_cosine(target: np.ndarray, output: np.ndarray) -> float:
    """Mean cosine of the two clips' `librosa_chroma`."""
    return float((librosa_chroma(target) * librosa_chroma(output)).sum(1).mean())


def high_energy(wave: np.ndarray) -> float:
    """Energy above 4 kHz, summed over frames."""
    return float((magnitudes(wave)[:, WINDOW // 4 :] ** 2).sum())


def tune_measures(wave: np.ndarray) -> dict[str, float]:
    """Whether a clip [T] is a tune and not noise.

    spectral_flatness: geometric over arithmetic mean of the power spectrum (white noise .56, a tone near 0).
    pitch_salience: highest normalised autocorrelation between 80 Hz and 1.5 kHz, mean over frames (noise near .2).
    scale_share: share of the chroma energy inside the best fitting major scale (chance for seven of twelve: .58).
    chroma_peak: mean share of a frame's energy in its strongest pitch class (even: .083).
    notes_per_s: changes of the strongest pitch class a second.
    """
    power = magnitudes(wave) ** 2 + 1e-10
    frames = np.lib.stride_tricks.sliding_window_view(wave, 1024)[::1024]
    loud = frames[(frames**2).mean(1) > 1e-5]
    spectrum = np.fft.rfft(loud * np.hanning(1024), 2048, axis=1)
    correlation = np.fft.irfft(np.abs(spectrum) ** 2, axis=1)
    lags = correlation[:, SAMPLING_RATE // 1500 : SAMPLING_RATE // 80] / np.maximum(correlation[:, :1], 1e-9)
    folded = chroma(wave) ** 2
    total = folded.sum(0) / max(folded.sum(), 1e-9)
    scale = np.isin(np.arange(12), (0, 2, 4, 5, 7, 9, 11))
    strongest = folded.argmax(1)
    return {
        "rms": float(np.sqrt((wave**2).mean())),
        "peak": float(np.abs(wave).max()),
        "spectral_flatness": float((np.exp(np.log(power).mean(1)) / power.mean(1)).mean()),
        "pitch_salience": float(lags.max(1).mean()) if len(loud) else 0.0,
        "scale_share": float(max(total[np.roll(scale, k)].sum() for k in range(12))),
        "chroma_peak": float(folded.max(1).mean()),
        "notes_per_s": float((strongest[1:] != strongest[:-1]).sum() / (len(wave) / SAMPLING_RATE)),
    }
