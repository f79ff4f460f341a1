"""Metrics on sounds whose values are known."""

import math

import numpy as np
import pytest
import torch

from musicrl_hf import descriptors
from musicrl_hf.evaluation.metrics import CLIP_METRICS, clip_metrics, distinct_ngrams, diversity, frechet_distance

RATE = 16000


def melody(pitches, note_s=0.25, seconds=3.0, rate=RATE):
    """Plucked notes of four harmonics, MIDI pitches in turn, [1, T]."""
    time = torch.arange(int(note_s * rate)) / rate
    notes = []
    for i in range(round(seconds / note_s)):
        hz = 440 * 2 ** ((pitches[i % len(pitches)] - 69) / 12)
        tone = sum(0.2 / h * torch.sin(2 * math.pi * hz * h * time) for h in (1, 2, 3, 4))
        notes.append(tone * torch.exp(-6 * time))
    return torch.cat(notes)[None]


MAJOR = melody([60, 62, 64, 65, 67, 69, 71, 72])
CHROMATIC = melody(list(range(60, 72)))
NOISE = torch.randn(1, 3 * RATE, generator=torch.Generator().manual_seed(0)) * 0.1


def test_harmony_noise_and_rhythm_are_told_apart():
    table = clip_metrics(torch.stack([MAJOR, CHROMATIC, NOISE]), RATE)
    assert set(table) == set(CLIP_METRICS)
    share, flatness, steady = (
        table[k].tolist() for k in ("diatonic_share", "spectral_flatness", "rhythmic_steadiness")
    )
    assert share[0] > 0.97
    # All twelve notes equally often: seven of twelve lie in any scale.
    assert share[1] == pytest.approx(7 / 12, abs=0.06)
    assert share[2] == pytest.approx(7 / 12, abs=0.06)
    assert flatness[0] < 0.01
    # A periodogram bin of white noise is exponential: exp(E[log x]) / E[x] = exp(-Euler's constant) = 0.5615.
    assert flatness[2] == pytest.approx(math.exp(-np.euler_gamma), abs=0.02)
    assert steady[0] > 0.9 > 0.4 > steady[2]


def test_transposition_and_volume_do_not_change_the_scale_share():
    moved = melody([p + 5 for p in (60, 62, 64, 65, 67, 69, 71, 72)]) * 0.1
    assert float(clip_metrics(moved[None], RATE)["diatonic_share"][0]) > 0.97


def test_silence_and_clipping_are_counted():
    half = MAJOR.clone()
    half[:, half.shape[1] // 2 :] = 0
    assert float(clip_metrics(half[None], RATE)["silence_share"][0]) == pytest.approx(0.5, abs=0.02)
    square = torch.ones(1, 1, RATE)
    square[..., ::4] = 0.5
    assert float(clip_metrics(square, RATE)["clipping_share"][0]) == pytest.approx(0.75)


def test_silence_gives_finite_numbers():
    table = clip_metrics(torch.zeros(1, 1, RATE), RATE)
    assert {k: float(v) for k, v in table.items()} == pytest.approx(
        {
            "diatonic_share": 0.0,
            "spectral_flatness": 1.0,
            "rhythmic_steadiness": 0.0,
            "silence_share": 1.0,
            "clipping_share": 0.0,
        },
        abs=1e-4,
    )


def test_brightness_is_the_centroid_in_octaves():
    tone = 0.3 * torch.sin(2 * math.pi * 1600 * torch.arange(RATE) / RATE)[None, None]
    spec = descriptors.spectrum(tone, RATE)
    assert float(descriptors.brightness(spec)[0]) == pytest.approx(math.log2(1600 / 100), abs=0.01)
    assert float(descriptors.onset_rate(spec)[0]) == 0, "a held tone has no onsets"


def test_notes_are_counted():
    spec = descriptors.spectrum(MAJOR[None], RATE)
    assert float(descriptors.onset_rate(spec)[0]) == pytest.approx(4, abs=0.4)  # four notes a second


def test_too_short_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="audio lasts 0.050 s"):
        clip_metrics(torch.zeros(1, 1, 800), RATE)
    with pytest.raises(ValueError, match=r"give a batch \[B, C, T\]"):
        clip_metrics(torch.zeros(1, RATE), RATE)


def test_diversity_is_zero_for_copies_and_for_a_change_of_volume():
    same = diversity(torch.stack([MAJOR, 0.25 * MAJOR]), RATE)
    assert same["timbre_distance_db"] == pytest.approx(0, abs=0.05)
    assert same["harmony_distance"] == pytest.approx(0, abs=1e-4)
    apart = diversity(torch.stack([MAJOR, NOISE]), RATE)
    assert apart["timbre_distance_db"] > 5
    # C major and F sharp major share two pitch classes, B and F.
    moved = melody([66, 68, 70, 71, 73, 75, 77, 78])
    assert diversity(torch.stack([MAJOR, moved]), RATE)["harmony_distance"] > 0.5
    with pytest.raises(ValueError, match="two or more clips"):
        diversity(MAJOR[None], RATE)


def test_distinct_ngrams_counts_by_hand():
    first = torch.tensor([[1, 2, 1, 2, 1], [9, 9, 9, 9, 9]])
    # 2-grams of the first codebook: 12, 21, 12, 21: two of four are distinct.
    assert distinct_ngrams([first], n=2) == 0.5
    second = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 0, 0]])
    # With 12, 23, 34, 45 there are eight, of which 12, 21, 23, 34, 45 are distinct.
    assert distinct_ngrams(torch.stack([first, second]), n=2) == 5 / 8
    with pytest.raises(ValueError, match="no clip has so many frames"):
        distinct_ngrams([first], n=6)


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(500, 3))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    # A shift leaves the covariance alone: the distance is its squared length.
    assert frechet_distance(x, x + np.array([1.0, 2.0, 0.0])) == pytest.approx(5, abs=1e-6)
    # Scaling one axis by 3: (s - 3 s)^2 in that axis, plus the moved mean.
    scaled = x * np.array([3.0, 1.0, 1.0])
    variance, mean = x[:, 0].var(ddof=1), x[:, 0].mean()
    cov = np.cov(x, rowvar=False)
    general = frechet_distance(torch.tensor(x), torch.tensor(scaled))
    only_axis = (2 * math.sqrt(variance)) ** 2 + (2 * mean) ** 2
    assert general == pytest.approx(only_axis, rel=0.02)  # the axes of a sample are nearly uncorrelated
    assert np.abs(cov - np.diag(np.diag(cov))).max() < 0.1
    one = frechet_distance(x[:, :1], scaled[:, :1])
    assert one == pytest.approx(only_axis, rel=1e-6)  # in one dimension exactly
    for wrong, message in ((x[:1], "two clips or more"), (x[:, :2], "use one embedding"), (x * np.nan, "finite")):
        with pytest.raises(ValueError, match=message):
            frechet_distance(x, wrong)
