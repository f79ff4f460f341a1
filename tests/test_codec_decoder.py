"""The decoder's layers as products against transformers' own layers with the same weights."""

import pytest
import torch
from tiny import tiny_codec_config
from torch import nn
from transformers import EncodecModel
from transformers.models.encodec.modeling_encodec import EncodecConv1d, EncodecConvTranspose1d

from musicrl_hf import codec_decoder
from musicrl_hf.codec_decoder import speed_up_decoder


def kinds(layers) -> list[str]:
    return [type(layer).__name__ for layer in layers]


def sped_up(*layers) -> nn.ModuleList:
    """These layers as those of a decoder of the smallest kind."""
    model = EncodecModel(tiny_codec_config())
    model.decoder.layers = nn.ModuleList(layers)
    speed_up_decoder(model)
    return model.decoder.layers


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("frames", [40, 600])
@pytest.mark.parametrize(("causal", "trim"), [(False, 1.0), (True, 1.0), (True, 0.4)])
@pytest.mark.parametrize("stride", [2, 9])
def test_a_transposed_convolution_is_a_product_of_two_frames(stride, causal, trim, frames, batch):
    config = tiny_codec_config(use_causal_conv=causal, trim_right_ratio=trim)
    stock = EncodecConvTranspose1d(config, 6, 5, 2 * stride, stride)
    states = torch.randn(batch, 6, frames)
    (layer,) = sped_up(stock)
    assert kinds([layer]) == ["_Transposed"]
    with torch.no_grad(), torch.profiler.profile() as profile:
        found = layer(states)
    is_product = "aten::baddbmm" in {event.name for event in profile.events()}
    assert is_product == (stride >= codec_decoder._LEAST_STRIDE and frames >= codec_decoder._LEAST_FRAMES)
    assert found.shape == (batch, 5, frames * stride)
    with torch.no_grad():
        torch.testing.assert_close(found, stock(states), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_convolution_over_single_frames_is_a_product(batch):
    stock, wider = (EncodecConv1d(tiny_codec_config(), 6, 5, size) for size in (1, 3))
    states = torch.randn(batch, 6, 70)
    layer, left = sped_up(stock, wider)
    assert kinds([layer, left]) == ["_Pointwise", "EncodecConv1d"]
    with torch.no_grad():
        torch.testing.assert_close(layer(states), stock(states), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("frames", [2, 3, 70])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("channels", "taps", "dilation"), [((6, 5), 3, 1), ((6, 5), 4, 2), ((14, 2), 7, 1), ((14, 2), 7, 2)]
)
def test_an_elu_and_the_convolution_behind_it_are_one_layer(channels, taps, dilation, causal, frames, batch):
    """Clips too short to be reflected among them; where few channels come out, by a product of all taps."""
    stock = EncodecConv1d(tiny_codec_config(use_causal_conv=causal), *channels, taps, dilation=dilation)
    elu, layer = sped_up(nn.ELU(), stock)
    assert kinds([elu, layer]) == ["Identity", "_Activated"]
    assert layer.is_narrow == (channels == (14, 2) and dilation == 1)
    states = torch.randn(batch, channels[0], frames)
    before = states.clone()
    with torch.no_grad():
        found, expected = layer(elu(states)), stock(nn.functional.elu(states))
    assert torch.equal(states, before)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    states.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(f(states).square().sum(), states)[0] for f in (layer, lambda x: stock(nn.functional.elu(x)))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_layers_with_a_norm_behind_them_stay_as_they_are():
    config = tiny_codec_config(norm_type="time_group_norm")
    layers = [EncodecConv1d(config, 6, 5, 1), EncodecConvTranspose1d(config, 5, 6, 18, 9)]
    assert kinds(sped_up(*layers)) == ["EncodecConv1d", "EncodecConvTranspose1d"]


def test_names_weights_and_gradients_are_the_stock_decoders():
    model = EncodecModel(tiny_codec_config())
    before = {name: value.clone() for name, value in model.decoder.state_dict().items()}
    states = torch.randn(1, 16, 9, requires_grad=True)
    (expected,) = torch.autograd.grad(model.decoder(states).square().sum(), states)
    speed_up_decoder(model)
    assert {"_FastELU", "_Activated", "_Pointwise", "_Transposed"} <= {
        type(module).__name__ for module in model.decoder.modules()
    }
    after = model.decoder.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    (found,) = torch.autograd.grad(model.decoder(states).square().sum(), states)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not {"_FastELU", "_Activated", "_Pointwise", "_Transposed"} & {
        type(module).__name__ for module in model.encoder.modules()
    }
