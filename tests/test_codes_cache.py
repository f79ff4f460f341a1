"""Codes are those of a direct encode, each clip is encoded once, and what is on disk is never stale."""

import math

import pytest
import torch
from tiny import tiny_generator

from musicrl_hf.audio import audio_bytes, read_audio
from musicrl_hf.codec import AudioCodec
from musicrl_hf.preferences.codes import CODEC_COLUMN, ClipEncoder, cache_codes, encode_clips
from musicrl_hf.preferences.schema import load_preferences, preferences_from_rows, save_preferences

RATE = 400


def clip(hz, seconds=1.0, rate=RATE, channels=1):
    time = torch.arange(int(seconds * rate)) / rate
    return audio_bytes((0.3 * torch.sin(2 * math.pi * hz * time)).repeat(channels, 1), rate)


def preferences(*pairs):
    fixed = {"chosen_model": "x", "rejected_model": "y", "listener": "l", "source": "test", "created_at": "2026-01-31"}
    return preferences_from_rows(
        fixed | {"prompt": f"p{i}", "preference": "a", "chosen": chosen, "rejected": rejected}
        for i, (chosen, rejected) in enumerate(pairs)
    )


def count_encoded(model):
    """A counter of the clips that really go through the codec's encoder."""
    counted = []
    model.encoder.register_forward_hook(lambda module, inputs, output: counted.append(len(inputs[0])))
    return counted


def test_each_distinct_clip_is_encoded_once_and_only_once(tmp_path):
    generator = tiny_generator()
    a, b, c = clip(40), clip(60), clip(80, seconds=0.5)
    ds = preferences((a, b), (b, c), (c, a), (a, b))
    counted = count_encoded(generator.audio_encoder)

    first = cache_codes(ds, generator, tmp_path, batch_size=2)
    assert sum(counted) == 3
    second = cache_codes(ds, generator, tmp_path)
    assert sum(counted) == 3, "the second call reads them"
    assert second.to_dict() == first.to_dict()
    cache_codes(preferences((a, clip(90))), generator, tmp_path)
    assert sum(counted) == 4, "a new clip is added to the cache"

    for row, (chosen, rejected) in zip(first, [(a, b), (b, c), (c, a), (a, b)], strict=True):
        for column, data in (("chosen_codes", chosen), ("rejected_codes", rejected)):
            direct = generator.encode_audio(read_audio(data)[0][None])[0]
            assert torch.equal(torch.tensor(row[column]), direct)


def test_shares_of_the_rows_make_the_cache_of_all(tmp_path):
    generator = tiny_generator()
    a, b, c = clip(40), clip(60), clip(80, seconds=0.5)
    ds = preferences((a, b), (b, c), (c, clip(100)))
    counted = count_encoded(generator.audio_encoder)
    encode_clips(ds, range(1), generator, tmp_path)
    assert sum(counted) == 2
    encode_clips(ds, range(1, 3), generator, tmp_path)
    assert sum(counted) == 4, "b is there already"
    shared = cache_codes(ds, generator, tmp_path)
    assert sum(counted) == 4
    assert shared.to_dict() == cache_codes(ds, generator, tmp_path / "alone").to_dict()
    cut = audio_bytes(0.3 * torch.randn(1, 4000), RATE, "flac")[:2000]  # its header is whole
    with pytest.raises(ValueError, match="row 1: chosen: "):
        encode_clips(preferences((a, b), (cut, c)), range(1, 2), generator, tmp_path)


def test_the_columns_are_int16_lists_and_survive_saving(tmp_path):
    generator = tiny_generator()
    cached = cache_codes(preferences((clip(40), clip(60))), generator, tmp_path / "cache")
    assert str(cached.features["chosen_codes"]) == "List(List(Value('int16')))"
    loaded = load_preferences(save_preferences(cached, tmp_path / "votes"))
    counted = count_encoded(generator.audio_encoder)
    again = cache_codes(loaded, generator, tmp_path / "elsewhere")
    assert not counted, "codes of the same codec are kept"
    assert again["chosen_codes"] == cached["chosen_codes"]


def test_another_codec_is_encoded_anew(tmp_path):
    ds = preferences((clip(40), clip(60)))
    one = cache_codes(ds, tiny_generator(seed=0), tmp_path)
    other_generator = tiny_generator(seed=1)
    counted = count_encoded(other_generator.audio_encoder)
    other = cache_codes(one, other_generator, tmp_path)
    assert sum(counted) == 2
    assert other[CODEC_COLUMN] != one[CODEC_COLUMN]
    assert torch.equal(
        torch.tensor(other[0]["chosen_codes"]), other_generator.encode_audio(read_audio(clip(40))[0][None])[0]
    )


def test_one_changed_weight_changes_the_identity():
    generator = tiny_generator()
    before = ClipEncoder(generator).identity
    assert ClipEncoder(tiny_generator()).identity == before
    assert ClipEncoder(generator.codec).identity == before, "a mono generator's codes are its codec's"
    with torch.no_grad():
        generator.audio_encoder.quantizer.layers[0].codebook.embed[0, 0] += 1e-3
    assert ClipEncoder(generator).identity != before


def test_rows_with_codes_keep_them_beside_rows_without(tmp_path):
    """Sampled clips come with the codes that were sampled, which need not be those of an encode of their sound."""
    from datasets import concatenate_datasets

    generator = tiny_generator()
    own = cache_codes(preferences((clip(40), clip(60))), generator, tmp_path)
    sampled = own.map(lambda row: {"chosen_codes": [[7] * 5] * 4}, features=own.features)
    plain = preferences((clip(80), clip(90)))
    mixed = cache_codes(concatenate_datasets([sampled, plain]), generator, tmp_path)
    assert mixed[0]["chosen_codes"] == [[7] * 5] * 4
    assert torch.equal(torch.tensor(mixed[1]["chosen_codes"]), generator.encode_audio(read_audio(clip(80))[0][None])[0])


def test_other_sampling_rates_are_resampled(tmp_path):
    generator = tiny_generator()
    cached = cache_codes(preferences((clip(40, rate=800), clip(60))), generator, tmp_path)
    resampled, _ = read_audio(clip(40, rate=800), sampling_rate=RATE)
    assert torch.equal(torch.tensor(cached[0]["chosen_codes"]), generator.encode_audio(resampled[None])[0])


def test_stereo_is_refused_by_a_mono_codec_and_mono_copied_for_a_stereo_one(tmp_path):
    with pytest.raises(ValueError, match="row 0: rejected: .*2 channels where 1"):
        cache_codes(preferences((clip(40), clip(60, channels=2))), tiny_generator(), tmp_path)
    stereo = tiny_generator(audio_channels=2)
    codes = torch.tensor(cache_codes(preferences((clip(40), clip(60))), stereo, tmp_path)[0]["chosen_codes"])
    assert codes.shape[0] == stereo.config.num_codebooks
    assert torch.equal(codes[0::2], codes[1::2]), "both sides of a mono clip are the same"


def test_a_bare_codec_may_use_fewer_codebooks(tmp_path):
    generator = tiny_generator()
    with pytest.raises(ValueError, match="this codec offers"):
        AudioCodec(generator.audio_encoder, num_codebooks=3)
    cached = cache_codes(preferences((clip(40), clip(60))), generator.codec, tmp_path)
    assert len(cached[0]["chosen_codes"]) == generator.config.num_codebooks


def test_unusable_clips_and_caches_are_named(tmp_path):
    generator = tiny_generator()
    silent = audio_bytes(torch.zeros(1, 400), RATE)
    with pytest.raises(ValueError, match="row 1: chosen: .* is silent"):
        cache_codes(preferences((clip(40), clip(60)), (silent, clip(60))), generator, tmp_path)
    with pytest.raises(ValueError, match="batch_size is 0"):
        cache_codes(preferences((clip(40), clip(60))), generator, tmp_path, batch_size=0)
    cache_codes(preferences((clip(40), clip(60))), generator, tmp_path)
    (shard,) = tmp_path.rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:20])
    with pytest.raises(ValueError, match="is damaged .*: delete it"):
        cache_codes(preferences((clip(40), clip(60))), generator, tmp_path)
