import pytest
import torch
from tiny import tiny_clap

from musicrl_hf.rewards import PreferenceModel
from musicrl_hf.rewards.rhythm import BANDS, LAGS, LAGS_S, SIZE, rhythm

RATE = 16000


def clicks(period_s, seconds=3.0, frames_per_s=100):
    """A log-mel spectrogram of 64 mels with an onset every so often, in its upper half alone."""
    frames = torch.arange(round(seconds * frames_per_s))
    onset = (frames % round(period_s * frames_per_s) < 3).float() * 30 - 40
    return torch.cat([torch.full((32, len(frames)), -40.0), onset.expand(32, -1)]).T[None]


def test_the_autocorrelation_is_that_of_the_sums_by_hand():
    mel = 20 * torch.randn(2, 180, 8, generator=torch.Generator().manual_seed(0))
    found = rhythm(mel, 100.0).unflatten(1, (BANDS + 1, LAGS + 3))
    level = torch.maximum(mel, mel.amax((1, 2), keepdim=True) - 40)
    rise = (level[:, 1:] - level[:, :-1]).clamp(min=0)
    bands = [rise.mean(2), *(part.mean(2) for part in rise.split(2, dim=2))]
    for band, onsets in enumerate(bands):
        centred = onsets - onsets.mean(1, keepdim=True)
        variance = centred.square().mean(1)
        lags = range(20, 179 // 2)
        expected = torch.stack([(centred[:, lag:] * centred[:, : 179 - lag]).mean(1) / variance for lag in lags], 1)
        torch.testing.assert_close(found[:, band, LAGS], expected.amax(1), rtol=1e-4, atol=1e-4)
        pairs = expected[:, : len(lags) // 2 * 2].unflatten(1, (-1, 2)).mean(2)  # 130 frames in 65 steps
        torch.testing.assert_close(found[:, band, : pairs.shape[1]], pairs, rtol=1e-4, atol=1e-4)
        assert not found[:, band, pairs.shape[1] + 1 : LAGS].any()  # what the clip does not hold twice
        torch.testing.assert_close(found[:, band, LAGS + 1], onsets.mean(1))
        torch.testing.assert_close(found[:, band, LAGS + 2], onsets.std(1))


@pytest.mark.parametrize("period_s", [0.3, 0.45, 0.7])
def test_the_beat_is_where_it_is_and_in_its_band(period_s):
    found = rhythm(clicks(period_s), 100.0)[0].unflatten(0, (BANDS + 1, LAGS + 3))
    step = (LAGS_S[1] - LAGS_S[0]) / LAGS
    for band in (0, 3, 4):
        best = [LAGS_S[0] + step * (lag + 0.5) for lag in found[band, :LAGS].topk(2).indices.tolist()]
        assert all(min(lag % period_s, period_s - lag % period_s) < 0.03 for lag in best)
        assert found[band, LAGS] > 0.8
    assert not found[1].any()


def test_louder_is_no_other_rhythm_and_neither_is_another_frame_rate():
    mel = clicks(0.5)
    torch.testing.assert_close(rhythm(mel + 12, 100.0), rhythm(mel, 100.0))
    slower = rhythm(clicks(0.5, frames_per_s=50), 50.0)[0, :LAGS]
    assert slower.topk(2).values.min() > 0.5
    assert abs(int(slower.argmax()) - int(rhythm(mel, 100.0)[0, :LAGS].argmax())) in (0, 1, 24, 25, 26)


def test_a_preference_model_hears_a_beat_only_with_rhythm():
    torch.manual_seed(0)
    clap = tiny_clap()
    heard, plain = (PreferenceModel.from_clap(*clap, pooling=pooling) for pooling in ("rhythm", "statistics"))
    assert heard.sound.size == plain.sound.size + SIZE
    audio = 0.1 * torch.randn(2, 1, 3 * RATE)
    vectors = heard.sound(audio, RATE)
    torch.testing.assert_close(vectors[:, SIZE:], plain.sound(audio, RATE))
    # The filled-up end of a short clip is no part of its rhythm.
    short = audio[..., :RATE]
    extractor = heard.sound.extractor
    assert short.shape[-1] < extractor.nb_max_samples
    shortest = heard.sound(short, RATE)[:, :SIZE].unflatten(1, (BANDS + 1, LAGS + 3))
    assert not shortest[..., 16:LAGS].any()
    assert shortest[..., :14].any()


def test_too_short_a_clip_has_no_rhythm_and_is_scored_all_the_same():
    assert torch.equal(rhythm(torch.randn(2, 2, 64), 100.0), torch.zeros(2, SIZE))
    model = PreferenceModel.from_clap(*tiny_clap(), pooling="rhythm")
    assert torch.isfinite(model(["pop"], 0.1 * torch.randn(1, 1, 100), RATE)).all()


def test_too_few_mels_are_refused():
    for shape in ((1, 100, 3), (100, 64)):
        with pytest.raises(ValueError, match=r"`mel` must be \[N, frames, mels\]"):
            rhythm(torch.zeros(shape), 100.0)
