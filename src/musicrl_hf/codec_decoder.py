"""Layers of EnCodec's decoder as a CPU has them sooner: waves 1e-6 off, names and weights as they were.

What is slow in the stock ones is mostly memory: a reflection by nothing that copies, convolutions whose output lies channel by channel
the wrong way around and is turned, an ELU number after number.
"""

import math

import torch
from torch import Tensor, nn
from transformers import EncodecModel
from transformers.models.encodec.modeling_encodec import EncodecConv1d, EncodecConvTranspose1d

_LEAST_STRIDE, _LEAST_FRAMES = 8, 512  # of a transposed convolution from which on it is worth while as products


def speed_up_decoder(model: EncodecModel) -> None:
    """Put these layers in the places of the stock ones, in the decoder alone: the encoder's codes must be the stock encoder's."""
    for layers in [module for module in model.decoder.modules() if isinstance(module, nn.ModuleList)]:
        for index, layer in enumerate(layers):
            if type(layer) is nn.ELU:
                layers[index] = _FastELU()
            elif type(layer) is EncodecConv1d and layer.norm_type == "weight_norm" and _is_pointwise(layer.conv):
                layers[index] = _Pointwise(layer)
            elif type(layer) is EncodecConvTranspose1d and layer.norm_type == "weight_norm":
                layers[index] = _Transposed(layer)


def _is_pointwise(layer: Tensor | nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d) and layer.kernel_size == layer.stride == (1,)


class _FastELU(nn.ELU):
    """ELU as exp(x) - 1, 6e-8 off. On a CPU torch's own is expm1, number after number: half of the time of decoding."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or input.requires_grad:
            return super().forward(input)
        return torch.maximum(input, input.clamp(max=0).exp_().sub_(1))


class _Pointwise(nn.Module):
    """A convolution over single frames, which is a matrix product."""

    def __init__(self, layer: EncodecConv1d):
        super().__init__()
        self.conv = layer.conv

    def forward(self, states: Tensor) -> Tensor:
        """[B, C, T] to [B, the convolution's channels, T]."""
        if states.device.type != "cpu":
            return self.conv(states)
        weight = self.conv.weight[..., 0].expand(len(states), -1, -1)
        return torch.baddbmm(self.conv.bias[:, None], weight, states)


class _Transposed(nn.Module):
    """A transposed convolution whose kernel is two strides long: each stride of its output hears two frames, so it is a product of them."""

    def __init__(self, layer: EncodecConvTranspose1d):
        super().__init__()
        self.conv = layer.conv
        self.stride = layer.conv.stride[0]
        trimmed = layer.conv.kernel_size[0] - self.stride
        self.right = math.ceil(trimmed * layer.trim_right_ratio) if layer.causal else trimmed // 2
        self.left = trimmed - self.right
        self.two_strides = trimmed == self.stride >= _LEAST_STRIDE

    def forward(self, states: Tensor) -> Tensor:
        """[B, C, T] to [B, the convolution's channels, T * stride] where both ends are trimmed by a stride together."""
        if states.device.type == "cpu" and self.two_strides and states.shape[-1] >= _LEAST_FRAMES:
            whole = torch.stack([self._products(clip) for clip in states])
        else:
            whole = self.conv(states)
        return whole[..., self.left : whole.shape[-1] - self.right]

    def _products(self, clip: Tensor) -> Tensor:
        """[C, T] to [channels, (T + 1) * stride]: stride t from frame t and, by the kernel's second half, frame t - 1."""
        now, before = (nn.functional.pad(clip.T, (0, 0, *sides)) for sides in ((0, 1), (1, 0)))
        frames = torch.cat([now, before], 1)  # [T + 1, 2 C]
        halves = torch.cat(self.conv.weight.split(self.stride, -1))  # [2 C, channels, stride]
        halves = halves.transpose(0, 1)
        bias = self.conv.bias[:, None, None]
        return torch.baddbmm(bias, frames.expand(len(halves), -1, -1), halves).flatten(1)
