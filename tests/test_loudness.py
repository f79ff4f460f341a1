import math

import numpy as np
import pyloudnorm
import pytest
import torch

from musicrl_hf.audio import match_loudness
from musicrl_hf.loudness import integrated_loudness, match_loudness_of_batch


def uneven(channels, samples):
    """Noise of very different levels, one clip with a quiet half, one with an offset, one silent."""
    levels = torch.tensor([1e-6, 1e-4, 0.01, 0.3, 2.0, 0.0])[:, None, None]
    audio = torch.randn(6, channels, samples, generator=torch.Generator().manual_seed(0)) * levels
    audio[3, :, : samples // 2] *= 1e-3
    audio[2] += 0.2
    return audio


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [3000, 4000, 16000, 44100, 192000])
@pytest.mark.parametrize("seconds", [0.05, 0.4, 0.41, 1.7])
def test_a_batch_is_matched_as_each_clip_alone(seconds, rate, channels):
    audio = uneven(channels, int(seconds * rate))
    each = torch.stack([match_loudness(clip, rate) for clip in audio])
    assert not torch.allclose(each[3], audio[3])
    torch.testing.assert_close(match_loudness_of_batch(audio, rate), each, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_loudness_is_pyloudnorms(channels):
    audio = uneven(channels, 48000)[1:5].double()
    expected = [pyloudnorm.Meter(16000).integrated_loudness(clip.T.numpy()) for clip in audio]
    assert all(math.isfinite(value) for value in expected[1:])
    np.testing.assert_allclose(integrated_loudness(audio, 16000), expected, atol=1e-6)


def test_a_sine_of_full_scale_has_the_loudness_that_the_standard_says():
    tone = torch.sin(torch.arange(48000 * 3) * 2 * torch.pi * 997 / 48000)[None, None]
    assert integrated_loudness(tone, 48000).item() == pytest.approx(-3.01, abs=0.05)


def test_silence_stays_and_nothing_clips():
    audio = torch.zeros(2, 1, 16000)
    audio[1, :, 100] = 0.5
    matched = match_loudness_of_batch(audio, 16000, 0.0)
    assert torch.equal(matched[0], audio[0])
    assert matched.abs().max() == 1


def test_bad_audio_is_refused():
    with pytest.raises(
        ValueError, match=r"`audio` must be \[B, C, T\] with at most 5 channels, got shape \(1, 6, 800\)"
    ):
        match_loudness_of_batch(torch.zeros(1, 6, 800), 16000)
    with pytest.raises(ValueError, match="NaN"):
        match_loudness_of_batch(torch.full((1, 1, 800), float("nan")), 16000)
