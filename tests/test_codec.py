import pytest
import torch
from tiny import randomise_codebooks, tiny_codec_config
from transformers import EncodecModel

from musicrl_hf.codec import AudioCodec, EncodedAudio

CONFIGS = {
    "mono 16 kHz, long strides": {"sampling_rate": 16000, "upsampling_ratios": [20, 16], "use_causal_conv": False},
    "mono 24 kHz, causal": {"sampling_rate": 24000, "upsampling_ratios": [8, 5, 4, 3]},
    "mono 32 kHz": {"sampling_rate": 32000, "upsampling_ratios": [8, 5, 4, 4], "use_conv_shortcut": False},
    "stereo 48 kHz, chunks and scales": {
        "sampling_rate": 48000,
        "upsampling_ratios": [8, 5, 4, 2],
        "audio_channels": 2,
        "normalize": True,
        "chunk_length_s": 0.1,
        "overlap": 0.01,
        "use_causal_conv": False,
        "norm_type": "time_group_norm",
    },
}


def make_codec(**overrides) -> AudioCodec:
    torch.manual_seed(0)
    config = tiny_codec_config(**overrides)
    config.target_bandwidths = [4 * 4 * config.sampling_rate / config.hop_length / 1000]
    model = EncodecModel(config)
    randomise_codebooks(model)
    return AudioCodec(model)


@pytest.fixture(params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def codec(request):
    return make_codec(**CONFIGS[request.param])


def test_shapes_and_parity_with_stock(codec):
    audio = 0.1 * torch.randn(2, codec.channels, int(0.25 * codec.sampling_rate) + 7)
    encoded = codec.encode(audio)
    assert encoded.codes.shape[:2] == (2, 4)
    assert len(encoded.codes.unique()) > 4, "all-zero codebooks would make every comparison below empty"
    assert codec.decode(encoded).shape == audio.shape
    stock = codec.model.encode(audio, bandwidth=codec.bandwidth)
    flat = stock.audio_codes.permute(1, 2, 0, 3).flatten(2)
    assert torch.equal(encoded.codes, flat[..., : encoded.codes.shape[-1]])
    whole = codec.model.decode(
        stock.audio_codes, stock.audio_scales, last_frame_pad_length=stock.last_frame_pad_length
    ).audio_values
    torch.testing.assert_close(codec.decode(encoded), whole[..., : audio.shape[-1]], rtol=0, atol=1e-6)


def test_unequal_lengths_equal_each_clip_alone(codec):
    lengths = torch.tensor([2 * codec.hop_length + 3, 12 * codec.hop_length, 2 * codec.hop_length + 3])
    audio = 0.1 * torch.randn(3, codec.channels, int(lengths.max()))
    encoded = codec.encode(audio, lengths)
    decoded = codec.decode(encoded)
    assert decoded.shape == audio.shape
    for row, length in enumerate(lengths.tolist()):
        alone = codec.encode(audio[row : row + 1, :, :length])
        frames = alone.codes.shape[-1]
        assert torch.equal(encoded.codes[row, :, :frames], alone.codes[0])
        torch.testing.assert_close(decoded[row, :, :length], codec.decode(alone)[0], rtol=0, atol=1e-6)
        assert not decoded[row, :, length:].any()


@pytest.mark.parametrize("length", [1, 8, 9, 4001])
def test_exact_length(length):
    codec = make_codec()
    encoded = codec.encode(torch.randn(1, 1, length))
    assert encoded.codes.shape[-1] == -(-length // codec.hop_length)
    assert codec.decode(encoded).shape[-1] == length
    assert codec.decode(encoded.codes, length).shape[-1] == length


def test_a_fast_decoder_sounds_alike_and_leaves_the_codes_alone(codec):
    audio = 0.1 * torch.randn(1, codec.channels, int(0.25 * codec.sampling_rate))
    encoded = codec.encode(audio)
    exact = codec.decode(encoded)
    names = list(codec.model.state_dict())
    fast = AudioCodec(codec.model, fast_decoder=True)
    assert not torch.equal(fast.decode(encoded), exact), "torch's own ELU is as fast, or was not replaced"
    torch.testing.assert_close(fast.decode(encoded), exact, rtol=0, atol=1e-6)
    assert torch.equal(fast.encode(audio).codes, encoded.codes)
    assert list(codec.model.state_dict()) == names
    # With gradient it is torch's own: there is nothing to gain, and in-place steps cannot be undone.
    states = torch.randn(1, 16, 9, requires_grad=True)
    codec.model.decoder(states)[..., 0].sum().backward()
    assert states.grad.abs().max() > 0


# -- bad input -----------------------------------------------------------------------------------------------------


def test_stereo_into_a_mono_codec_is_refused():
    with pytest.raises(ValueError, match=r"`audio` must be \[B, 1, T\].*mix down"):
        make_codec().encode(torch.zeros(1, 2, 100))


def test_nan_and_empty_audio_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        make_codec().encode(torch.full((1, 1, 100), torch.nan))
    with pytest.raises(ValueError, match="is empty"):
        make_codec().encode(torch.zeros(1, 1, 0))


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match=r"`lengths` must be \[B\] in \[1, 100\], got \[101\]"):
        make_codec().encode(torch.zeros(1, 1, 100), torch.tensor([101]))


def test_codes_that_do_not_match_are_refused():
    codec = make_codec()
    with pytest.raises(ValueError, match=r"`codes` must be integers \[B, 4, F\].*same codec"):
        codec.decode(torch.zeros(1, 8, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"`codes` must lie in \[0, 16\), got 0 to 16"):
        codec.decode(torch.full((1, 4, 5), 16).index_fill(2, torch.tensor([0]), 0))
    with pytest.raises(ValueError, match="`length` = 1000 samples, but 5 frames cover only 40"):
        codec.decode(torch.zeros(1, 4, 5, dtype=torch.long), 1000)
    with pytest.raises(ValueError, match="`num_codebooks` = 3: this codec offers \\[4\\]"):
        AudioCodec(codec.model, 3)


def test_chunked_codes_alone_are_refused():
    codec = make_codec(**CONFIGS["stereo 48 kHz, chunks and scales"])
    with pytest.raises(ValueError, match="`encoded` must be an EncodedAudio"):
        codec.decode(torch.zeros(1, 4, 5, dtype=torch.long))
    assert isinstance(codec.encode(torch.zeros(1, 2, 6000)), EncodedAudio)
