"""The encodec package and transformers' EncodecModel give the same codes and the same waves, to the last bit."""

import json
import re
import socket
from pathlib import Path

import encodec
import pytest
import torch
from encodec.modules import SEANetDecoder, SEANetEncoder
from encodec.quantization import ResidualVectorQuantizer
from safetensors.torch import save_file
from transformers import EncodecConfig

from musicrl_hf.cli import main
from musicrl_hf.codec import AudioCodec
from musicrl_hf.codec_conversion import convert_encodec_checkpoint


@torch.no_grad()
def fill_codebooks(model: encodec.EncodecModel) -> None:
    """Entries spread like the latents, finer from codebook to codebook: otherwise every code is 0."""
    spread = model.encoder(torch.randn(1, model.channels, 64 * model.encoder.hop_length))[0].T
    for i, layer in enumerate(model.quantizer.vq.layers):
        entries = torch.randn_like(layer._codebook.embed) * spread.std(0) / 2**i
        layer._codebook.embed.copy_(entries + spread.mean(0) * (i == 0))
        layer._codebook.inited.fill_(1)


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
    fill_codebooks(model)
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
    folder = convert_encodec_checkpoint(tmp_path / "encodec.safetensors", tmp_path / "out", tmp_path / "config.json")
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


@pytest.mark.parametrize(
    ("name", "file_name", "seconds"),
    [("encodec_24khz", "encodec_24khz-d7cc33bc.th", 0.6), ("encodec_48khz", "encodec_48khz-7e698e3e.th", 1.3)],
)
def test_the_published_models_convert_by_name(tmp_path, monkeypatch, name, file_name, seconds):
    # The published files stand in torch's download cache here, with random weights of the published shapes.
    package = getattr(encodec.EncodecModel, f"encodec_model_{name.removeprefix('encodec_')}")(pretrained=False)
    torch.manual_seed(0)
    fill_codebooks(package)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(package.state_dict(), cache / file_name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert main(["convert-codec", name, str(tmp_path / "codec")]) == 0
    codec = AudioCodec.from_pretrained(str(tmp_path / "codec"))
    audio = 0.1 * torch.randn(1, package.channels, int(seconds * package.sample_rate))
    package.set_target_bandwidth(24.0)
    with torch.no_grad():
        frames = package.encode(audio)
        wave = package.decode(frames)[..., : audio.shape[-1]]
    encoded = codec.encode(audio)
    assert len(frames) == (1 if name == "encodec_24khz" else 2), "48 kHz works in chunks of one second"
    codes = torch.cat([frame[0] for frame in frames], -1)
    assert codes.shape[1] == {"encodec_24khz": 32, "encodec_48khz": 16}[name]
    assert len(codes[:, 0].unique()) > 8
    assert torch.equal(encoded.codes, codes)
    assert (codec.decode(encoded) - wave).abs().max() == 0


def test_an_unreachable_publisher_is_told_with_the_remedy(tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        monkeypatch.setattr("encodec.model.ROOT_URL", address)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        place = tmp_path / "hub" / "checkpoints" / "encodec_24khz-d7cc33bc.th"
        with pytest.raises(ConnectionError) as error:
            convert_encodec_checkpoint("encodec_24khz", tmp_path / "codec")
    assert f"{address}encodec_24khz-d7cc33bc.th could not be fetched" in str(error.value)
    assert f"put it at {place}." in str(error.value)


def test_the_lines_of_the_page_make_what_the_command_takes(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    (lines,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "weights.safetensors" in code]
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert main(["convert-codec", "weights.safetensors", "codec", "--config", "encodec_config.json"]) == 0
    assert AudioCodec.from_pretrained("codec").sampling_rate == 24_000


def test_a_published_file_that_holds_more_than_tensors_is_not_run(tmp_path, monkeypatch):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save({"weight": Malicious()}, cache / "encodec_24khz-d7cc33bc.th")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="encodec_24khz-d7cc33bc.th.*delete it"):
        convert_encodec_checkpoint("encodec_24khz", tmp_path / "codec")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "codec").exists()


def test_weights_that_are_pickled_or_do_not_fit_are_refused(tmp_path):
    package, config = package_model(True, "weight_norm", False, 1, [4, 2], 400, True)
    config.to_json_file(tmp_path / "config.json", use_diff=False)
    torch.save(package.state_dict(), tmp_path / "weights.th")
    with pytest.raises(ValueError, match="no whole safetensors file.*save_file"):
        convert_encodec_checkpoint(tmp_path / "weights.th", tmp_path / "out", tmp_path / "config.json")
    save_file(package.state_dict(), tmp_path / "weights.safetensors")
    other = json.loads((tmp_path / "config.json").read_text()) | {"num_lstm_layers": 2}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="`source` does not fit `config`"):
        convert_encodec_checkpoint(tmp_path / "weights.safetensors", tmp_path / "out", tmp_path / "other.json")
    assert not (tmp_path / "out").exists()


def test_a_source_or_config_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`source` = 'encodec_16khz' is neither a file nor one of encodec_24khz"):
        convert_encodec_checkpoint("encodec_16khz", tmp_path / "out")
    with pytest.raises(ValueError, match="`config` = 'x.json', but encodec_24khz has its own; leave it out"):
        convert_encodec_checkpoint("encodec_24khz", tmp_path / "out", "x.json")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="`config` is missing: name an EncodecConfig"):
        convert_encodec_checkpoint(tmp_path / "weights.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
