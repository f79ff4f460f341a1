"""What the judges hear without a network: tempo, key, scale, and whether a clip is silent, clipped or stuck on a note.

All take waves [T] at 16 kHz in [-1, 1]. Nothing is trained on them: no reward measures tempo or key.
"""

import numpy as np
from arrange import NOTE_NAMES
from codec_losses import mel_filters
from common import SAMPLING_RATE
from measures import HOP, WINDOW, chroma, magnitudes
from scipy.signal import medfilt

ONSET_WINDOW, ONSET_HOP, ONSET_BANDS = 1024, 160, 40  # samples, samples (10 ms), mel bands
ONSET_FILTERS = mel_filters(ONSET_WINDOW, ONSET_BANDS).numpy().T
ONSET_FLOOR = 1e-4  # of the loudest band's power: quieter rises are not heard
TREND_FRAMES = 50  # half a second
PULSE_S, N_PULSES = (0.2, 1.3), 200  # beats, or parts of beats, that are looked for
METRICAL_LEVELS = (1 / 3, 1 / 2, 2 / 3, 1, 3 / 2, 2, 3)  # of the true tempo: each of them may be counted as the beat
TEMPO_TOLERANCES = (0.08, 0.03)

FIFTH, MINOR_THIRD = 7, 3  # semitones
CHROMA_FLOOR = 1e-2  # of a frame's energy
THIRD_OF_MODE = {"major": 0, "minor": 1, "dorian": 1, "mixolydian": 0}  # 0 major, 1 minor
SIGNATURE_OF_MODE = {
    "major": 0,
    "minor": 3,
    "dorian": 10,
    "mixolydian": 5,
}  # semitones up to the major key of its notes

SILENT_POWER = 1e-5  # mean square: -50 dBFS
FULL_SCALE, CLIPPED_SHARE = 0.999, 1e-3
STUCK_SHARE = 0.5  # of the clip's length
MEDIAN_FRAMES = 5  # a wrong pitch of 2 frames (0.13 s) does not end a note
LOWEST_PITCH, HIGHEST_PITCH = 45, 96  # MIDI


# -- tempo ---------------------------------------------------------------------------------------------------------------


def onset_strength(wave: np.ndarray) -> np.ndarray:
    """Rise of the log energy over 20 ms [frames], a mean over mel bands, every 10 ms, less its mean around."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, ONSET_WINDOW)[::ONSET_HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(ONSET_WINDOW).astype(np.float32), axis=1)) ** 2
    bands = power @ ONSET_FILTERS
    level = np.log(bands / max(bands.max(), 1e-9) + ONSET_FLOOR)
    rise = np.maximum(level[2:] - level[:-2], 0).mean(1)
    return rise - np.convolve(rise, np.ones(TREND_FRAMES) / TREND_FRAMES, "same")


def tempo(wave: np.ndarray) -> float:
    """Beats a minute at some metrical level: the pulse P with the largest sum of the onsets' autocorrelation at P and 2 P.

    The autocorrelation is divided by the number of its terms, so that long pulses are not at a disadvantage.
    """
    onsets = onset_strength(wave)
    n = len(onsets)
    correlation = np.fft.irfft(np.abs(np.fft.rfft(onsets, 2 * n)) ** 2)[:n] / (n - np.arange(n))
    pulses_s = np.geomspace(*PULSE_S, N_PULSES)
    lags = pulses_s * SAMPLING_RATE / ONSET_HOP
    strength = sum(np.interp(multiple * lags, np.arange(n), correlation) for multiple in (1, 2))
    return float(60 / pulses_s[strength.argmax()])


def same_tempo(estimate: np.ndarray, bpm: np.ndarray, tolerance: float) -> np.ndarray:
    """Whether estimates lie within `tolerance` of the true tempo at one of `METRICAL_LEVELS`; shapes broadcast."""
    ratio = np.asarray(estimate)[..., None] / (np.asarray(bpm)[..., None] * np.array(METRICAL_LEVELS))
    return (np.abs(ratio - 1) <= tolerance).any(-1)


# -- key -----------------------------------------------------------------------------------------------------------------


def pitch_classes(wave: np.ndarray) -> np.ndarray:
    """Mean log energy of each pitch class [12], C first, of mean 0 and length 1."""
    energy = np.log((chroma(wave) ** 2).mean(0) + CHROMA_FLOOR)
    energy -= energy.mean()
    return energy / max(np.linalg.norm(energy), 1e-9)


def key_profiles(heard: np.ndarray, tonics: np.ndarray, thirds: np.ndarray) -> np.ndarray:
    """Mean of `pitch_classes` from the tonic up [2, 12], major and minor, of clips [N, 12] with known keys."""
    from_tonic = np.stack([np.roll(row, -tonic) for row, tonic in zip(heard, tonics, strict=True)])
    profiles = np.stack([from_tonic[thirds == third].mean(0) for third in (0, 1)])
    return profiles / np.linalg.norm(profiles, axis=1, keepdims=True)


def key(wave: np.ndarray, profiles: np.ndarray) -> tuple[int, int]:
    """(tonic, third): the pitch class and 0 for major or 1 for minor whose profile correlates best with the clip.

    Krumhansl and Kessler's (1982) way, with `profiles` [2, 12] from `key_profiles` for their listeners' ratings.
    """
    heard = pitch_classes(wave)
    fit = [[np.roll(profile, tonic) @ heard for tonic in range(12)] for profile in profiles]
    third, tonic = np.unravel_index(np.argmax(fit), (2, 12))
    return int(tonic), int(third)


def key_of_row(row: dict) -> tuple[int, int, int]:
    """A clip's (tonic, third, tonic of the major key with its notes).

    Dorian counts as the minor key and mixolydian as the major key of the same tonic: each differs in one note.
    """
    tonic = NOTE_NAMES.index(row["key"])
    return tonic, THIRD_OF_MODE[row["mode"]], (tonic + SIGNATURE_OF_MODE[row["mode"]]) % 12


def key_relation(estimate: tuple[int, int], truth: tuple[int, int, int]) -> dict[str, bool]:
    """How near an estimated key is to `key_of_row`.

    same: of 24 keys, this one. neighbour: this one, its relative, dominant or subdominant (4 of 24; the parallel key is
    not one). signature: its notes differ from the true mode's in one at most (6 of 24).
    """
    (tonic, third), (true_tonic, true_third, true_signature) = estimate, truth
    steps = (tonic - true_tonic) % 12
    is_relative = third != true_third and steps == (MINOR_THIRD if true_third else 12 - MINOR_THIRD)
    is_fifth = third == true_third and steps in (FIFTH, 12 - FIFTH)
    is_same = third == true_third and steps == 0
    between = (tonic + MINOR_THIRD * third - true_signature) % 12
    return {
        "same": is_same,
        "neighbour": is_same or is_relative or is_fifth,
        "signature": between in (0, FIFTH, 12 - FIFTH),
    }


# -- faults --------------------------------------------------------------------------------------------------------------


def faults(wave: np.ndarray) -> dict[str, bool]:
    """Whether a clip is silent, clipped, or stuck: one note is the strongest without a break for half of its length."""
    frequency = np.fft.rfftfreq(WINDOW, 1 / SAMPLING_RATE)[1:]
    pitch = np.round(12 * np.log2(frequency / 440) + 69).astype(int)
    keep = (pitch >= LOWEST_PITCH) & (pitch <= HIGHEST_PITCH)
    power = magnitudes(wave)[:, 1:][:, keep] ** 2
    loud = (np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP] ** 2).mean(1)
    strongest = medfilt(pitch[keep][power.argmax(1)].astype(float), MEDIAN_FRAMES)
    strongest = np.where(loud > SILENT_POWER, strongest, np.nan)
    changes = np.flatnonzero(np.r_[True, strongest[1:] != strongest[:-1], True])  # nan is no note, not even its own
    return {
        "silent": bool((wave**2).mean() < SILENT_POWER),
        "clipped": bool((np.abs(wave) > FULL_SCALE).mean() > CLIPPED_SHARE),
        "stuck": bool(np.diff(changes).max() >= STUCK_SHARE * len(strongest)),
    }
