import json

import encodec
import pytest
import torch
from encodec.modules import SEANetDecoder, SEANetEncoder
from encodec.quantization import ResidualVectorQuantizer
from safetensors.torch import save_file
from tiny import randomise_codebooks, tiny_codec_config
from transformers import EncodecConfig, EncodecModel

from musicrl_hf.codec import AudioCodec, EncodedAudio, convert_encodec_checkpoint, convert_encodec_state_dict

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


# -- weights of the `encodec` package ------------------------------------------------------------------------------


def package_model(
    causal: bool, norm: str, normalize: bool, channels: int, ratios: list[int], rate: int, shortcut: bool
):
    torch.manual_seed(1)
    shape = {
        "channels": channels,
        "dimension": 16,
        "n_filters": 4,
        "ratios": ratios,
        "norm": norm,
        "causal": causal,
        "lstm": 1,
        "n_residual_layers": 1,
        "true_skip": not shortcut,
    }
    hop = torch.tensor(ratios).prod().item()
    model = encodec.EncodecModel(
        SEANetEncoder(**shape),
        SEANetDecoder(**shape),
        ResidualVectorQuantizer(dimension=16, n_q=4, bins=16),
        [4 * 4 * rate / hop / 1000],
        rate,
        channels,
        normalize=normalize,
        segment=None,
    )
    with torch.no_grad():
        spread = model.encoder(torch.randn(1, channels, 64 * hop))[0].T
    for i, layer in enumerate(model.quantizer.vq.layers):
        entries = torch.randn(16, 16) * spread.std(0) / 2**i
        layer._codebook.embed.copy_(entries + spread.mean(0) * (i == 0))
        layer._codebook.inited.fill_(1)
    config = EncodecConfig(
        target_bandwidths=model.target_bandwidths,
        sampling_rate=rate,
        audio_channels=channels,
        normalize=normalize,
        hidden_size=16,
        num_filters=4,
        num_residual_layers=1,
        upsampling_ratios=ratios,
        norm_type=norm,
        use_causal_conv=causal,
        num_lstm_layers=1,
        codebook_size=16,
        codebook_dim=16,
        use_conv_shortcut=shortcut,
    )
    return model.eval(), config


@pytest.mark.parametrize(
    ("causal", "norm", "normalize", "channels", "ratios", "rate", "shortcut"),
    [
        (True, "weight_norm", False, 1, [8, 5, 4, 2], 24000, True),
        (False, "time_group_norm", True, 2, [8, 5, 4, 2], 48000, True),
        (False, "weight_norm", False, 1, [20, 16], 16000, False),
    ],
)
def test_package_weights_convert_exactly(tmp_path, causal, norm, normalize, channels, ratios, rate, shortcut):
    package, config = package_model(causal, norm, normalize, channels, ratios, rate, shortcut)
    save_file(package.state_dict(), tmp_path / "encodec.safetensors")
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    folder = convert_encodec_checkpoint(tmp_path / "encodec.safetensors", tmp_path / "config.json", tmp_path / "out")
    codec = AudioCodec.from_pretrained(str(folder))
    audio = torch.randn(2, channels, 20 * codec.hop_length)
    with torch.no_grad():
        frames = [package.encode(clip[None]) for clip in audio]  # one by one, as a batch sums in another order
        codes = torch.cat([clip[0][0] for clip in frames])
        wave = torch.cat([package.decode(clip) for clip in frames])
    encoded = codec.encode(audio)
    assert torch.equal(encoded.codes, codes)
    assert len(codes.unique()) > 4
    assert (codec.decode(encoded) - wave).abs().max() == 0


def test_the_published_shapes_convert_name_for_name():
    package = encodec.EncodecModel.encodec_model_24khz(pretrained=False)
    stock = EncodecModel(EncodecConfig())
    renamed = convert_encodec_state_dict(package.state_dict())
    assert renamed.keys() == stock.state_dict().keys()
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in stock.state_dict().items()}


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


def test_weights_that_are_pickled_or_do_not_fit_are_refused(tmp_path):
    package, config = package_model(True, "weight_norm", False, 1, [4, 2], 400, True)
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    torch.save(package.state_dict(), tmp_path / "weights.th")
    with pytest.raises(ValueError, match="no whole safetensors file.*save_file"):
        convert_encodec_checkpoint(tmp_path / "weights.th", tmp_path / "config.json", tmp_path / "out")
    save_file(package.state_dict(), tmp_path / "weights.safetensors")
    other = json.loads((tmp_path / "config.json").read_text()) | {"num_lstm_layers": 2}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="`weights` does not fit `config`"):
        convert_encodec_checkpoint(tmp_path / "weights.safetensors", tmp_path / "other.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()
