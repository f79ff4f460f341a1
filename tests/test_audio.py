import io
import math

import numpy as np
import pytest
import soundfile
import torch

from musicrl_hf.audio import (
    ClipTooLongError,
    _ogg_checksum,
    atomic_path,
    audio_bytes,
    check_audio,
    match_loudness,
    read_audio,
    resample,
    write_audio,
)


def tone(seconds=1.0, rate=16000, hz=440.0, level=0.3, channels=1):
    time = torch.arange(int(seconds * rate)) / rate
    return (level * torch.sin(2 * math.pi * hz * time)).expand(channels, -1).contiguous()


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_write_then_read_keeps_samples_to_16_bits(tmp_path, suffix):
    audio = tone(channels=2)
    write_audio(tmp_path / f"clip{suffix}", audio, 16000)
    back, rate = read_audio(tmp_path / f"clip{suffix}")
    assert rate == 16000
    assert back.shape == audio.shape
    assert (back - audio).abs().max() <= 1 / 32768
    from_bytes, _ = read_audio((tmp_path / f"clip{suffix}").read_bytes())
    assert torch.equal(from_bytes, back)


@pytest.mark.parametrize(("rate", "channels", "seconds"), [(16_000, 1, 1.0), (44_100, 2, 0.3), (192_000, 2, 20)])
def test_ogg_keeps_length_rate_and_tone(tmp_path, rate, channels, seconds):
    """The last is longer than the stack that libsndfile's encoder would need for it in one piece."""
    audio = tone(seconds, rate, channels=channels)
    paths = [tmp_path / "clip.ogg", tmp_path / "again.OGG"]
    for path in paths:
        write_audio(path, audio, rate)
    found = soundfile.info(paths[0])
    assert (found.format, found.subtype) == ("OGG", "VORBIS")
    back, again = (read_audio(path)[0] for path in paths)
    assert read_audio(paths[0])[1] == rate
    assert back.shape == audio.shape
    assert (back - audio).square().mean() < 0.01 * audio.square().mean()
    assert torch.equal(back, again)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_an_ogg_without_its_serial_number_is_what_libsndfile_wrote():
    buffer = io.BytesIO()
    samples = tone(1.0, 16_000)[0].numpy()
    soundfile.write(buffer, samples, 16_000, format="OGG", subtype="VORBIS")
    written = buffer.getvalue()
    serial, pages = written[14:18], written.split(b"OggS")[1:]
    assert serial != bytes(4)
    assert len(pages) > 2
    ours = audio_bytes(torch.tensor(samples)[None], 16_000, "ogg").split(b"OggS")[1:]
    for theirs, page in zip(pages, ours, strict=True):  # offsets in a page, behind its first four bytes
        assert (theirs[10:14], page[10:14]) == (serial, bytes(4))
        assert all(page[part] == theirs[part] for part in (slice(10), slice(14, 18), slice(22, None)))
    assert _ogg_checksum(written[:22] + bytes(4) + written[26 : written.index(b"OggS", 4)]) == int.from_bytes(
        written[22:26], "little"
    )


def test_read_resamples_and_spreads_mono(tmp_path):
    write_audio(tmp_path / "clip.wav", tone(0.5, 8000), 8000)
    audio, rate = read_audio(tmp_path / "clip.wav", sampling_rate=16000, channels=2)
    assert (rate, tuple(audio.shape)) == (16000, (2, 8000))
    assert torch.equal(audio[0], audio[1])


def test_samples_beyond_full_scale_are_clipped_not_wrapped():
    back, _ = read_audio(audio_bytes(torch.full((1, 100), 3.0), 16000, "wav"))
    assert back.min() > 0.99


def test_resample_keeps_the_tone():
    audio = resample(tone(1.0, 48000), 48000, 16000)
    assert audio.shape[-1] == 16000
    spectrum = torch.fft.rfft(audio[0]).abs()
    assert int(spectrum.argmax()) == 440


@pytest.mark.parametrize("rate", [0, -1, 44.1, "16000", True])
def test_resample_refuses_a_wrong_rate(rate):
    with pytest.raises(ValueError, match="`new`.*sampling rate in Hz"):
        resample(tone(), 16000, rate)


def test_rates_that_no_filter_fits_between_are_refused(tmp_path):
    audio = torch.ones(1, 1000)
    assert resample(audio, 44100, 16000).shape == (1, 363)
    with pytest.raises(ValueError, match=r"`orig` = 44101 Hz and `new` = 16000 Hz have only 1 Hz in common"):
        resample(audio, 44101, 16000)
    path = tmp_path / "fast.wav"
    soundfile.write(path, np.full(1000, 0.1), 400_000)  # 30 s of it would be any number of samples
    with pytest.raises(ValueError, match="1 channels at 400000 Hz: at most 8 at 384000 Hz"):
        read_audio(path)


def test_loudness_is_matched():
    import pyloudnorm

    quiet, loud = tone(level=0.01), tone(level=0.8)
    matched = [match_loudness(audio, 16000, -20.0) for audio in (quiet, loud)]
    for audio in matched:
        assert pyloudnorm.Meter(16000).integrated_loudness(audio.T.double().numpy()) == pytest.approx(-20.0, abs=0.05)
    # A 440 Hz sine has crest factor sqrt(2): no target of -20 LUFS needs more than full scale.
    assert max(audio.abs().max() for audio in matched) < 1


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_clips_shorter_than_a_block_have_a_loudness_at_every_length(rate):
    for samples in range(rate // 20, 2 * rate // 5, 37):
        clip = tone(samples / rate, rate)[:, :samples]
        assert match_loudness(clip, rate, -30.0).shape == clip.shape
    whole, short = (match_loudness(tone(seconds), 16_000, -30.0).square().mean().item() for seconds in (2.0, 0.3))
    assert short == pytest.approx(whole, rel=0.02)


def test_loudness_never_clips_and_leaves_silence_alone():
    click = torch.zeros(1, 16000)
    click[0, 8000] = 0.5
    assert match_loudness(click, 16000, 0.0).abs().max() <= 1
    silence = torch.zeros(1, 16000)
    assert torch.equal(match_loudness(silence, 16000), silence)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.wav"):
        read_audio(tmp_path / "nothing.wav")


def test_clip_over_30_seconds_is_refused(tmp_path):
    write_audio(tmp_path / "long.wav", tone(31, 2000), 2000)
    with pytest.raises(ValueError, match=r"lasts 31.0 s.*max_duration_s.*30.*shorter clips"):
        read_audio(tmp_path / "long.wav")


def test_stereo_into_mono_is_refused(tmp_path):
    write_audio(tmp_path / "stereo.wav", tone(channels=2), 16000)
    with pytest.raises(ValueError, match="has 2 channels where 1 are needed; mix it down"):
        read_audio(tmp_path / "stereo.wav", channels=1)


def test_empty_silent_nan_and_non_audio_files_are_refused(tmp_path):
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 1), dtype="float32"), 16000)
    soundfile.write(tmp_path / "silent.wav", np.zeros((1600, 1), dtype="float32"), 16000)
    soundfile.write(tmp_path / "nan.wav", np.full((1600, 1), np.nan, dtype="float32"), 16000, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("this is no sound")
    for name, complaint in [
        ("empty", "is empty"),
        ("silent", "is silent"),
        ("nan", "NaN"),
        ("text", "cannot be read as audio"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            read_audio(tmp_path / f"{name}.wav")


def test_a_part_of_a_long_file_is_read_without_the_rest(tmp_path):
    """A ramp tells where a part begins: sample n has the value n / 2**17."""
    ramp = torch.arange(80_000)[None] / 2**17
    soundfile.write(tmp_path / "long.wav", ramp[0].numpy(), 2000, subtype="FLOAT")  # 40 s
    part, rate = read_audio(tmp_path / "long.wav", start_s=10.5, end_s=12.0)
    assert rate == 2000
    assert torch.equal(part, ramp[:, 21_000:24_000])
    assert torch.equal(read_audio((tmp_path / "long.wav").read_bytes(), start_s=39.0, end_s=50)[0], ramp[:, 78_000:])
    for options, complaint in [
        ({"start_s": 40}, "lasts 40.0 s: it has nothing from `start_s` = 40 on"),
        ({"start_s": 2, "end_s": 2}, "`start_s` is 2 and `end_s` 2"),
        ({"start_s": -1}, "`start_s` is -1"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            read_audio(tmp_path / "long.wav", **options)
    with pytest.raises(ClipTooLongError, match="lasts 39.0 s, more than `max_duration_s` = 30"):
        read_audio(tmp_path / "long.wav", start_s=1)


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_truncated_file_is_refused(tmp_path, suffix):
    whole = audio_bytes(tone(), 16000, suffix[1:])
    with pytest.raises(ValueError, match="truncated|cut short"):
        read_audio(whole[: len(whole) // 2])
    (tmp_path / f"half{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated|cut short"):
        read_audio(tmp_path / f"half{suffix}")


def test_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end in .wav, .flac or .ogg, got .*clip.xyz.; give"):
        write_audio(tmp_path / "clip.xyz", tone(), 16000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("audio", "complaint"),
    [
        (torch.zeros(1, 4, dtype=torch.long), "must be a float tensor"),
        ([0.0], "must be a float tensor"),
        (torch.zeros(4), r"must be \[B, C, T\] or \[C, T\]"),
        (torch.zeros(1, 0), "is empty"),
        (torch.full((1, 4), math.inf), "NaN or infinite"),
    ],
)
def test_check_audio_names_the_problem(audio, complaint):
    with pytest.raises(ValueError, match=f"`wave`.*{complaint}"):
        check_audio(audio, "wave")


def test_atomic_path_leaves_nothing_half_written(tmp_path):
    target = tmp_path / "result"
    with atomic_path(target) as folder:
        folder.mkdir()
        (folder / "a").write_text("first")
    with pytest.raises(RuntimeError, match="midway"):
        _fail_midway(target)
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert [path.name for path in target.iterdir()] == ["a"]
    with atomic_path(target) as folder:
        folder.mkdir()
        (folder / "c").write_text("third")
    assert [path.name for path in target.iterdir()] == ["c"]
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def _fail_midway(target):
    with atomic_path(target) as folder:
        folder.mkdir()
        (folder / "b").write_text("second")
        raise RuntimeError("midway")


def test_match_loudness_below_the_weighting_filter():
    """At 400 Hz the standard's filter diverges; a sine of amplitude 0.1 has -23.7 LUFS unweighted."""
    tone = 0.1 * torch.sin(torch.arange(400) * 0.3)[None]
    level = 10 * math.log10(tone.square().mean()) - 0.691
    matched = match_loudness(tone, 400, target_lufs=-30.0)
    assert torch.allclose(matched, tone * 10 ** ((-30.0 - level) / 20), atol=1e-6)
