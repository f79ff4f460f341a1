"""Layers of EnCodec's decoder as a CPU has them sooner: waves 1e-6 off, names and weights as they were.

What is slow in the stock ones is mostly memory: a reflection by nothing that copies, convolutions whose output lies channel by channel
the wrong way around and is turned, an ELU number after number, and room that is taken anew for each of its steps.
"""

import math
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import EncodecModel
from transformers.models.encodec.modeling_encodec import EncodecConv1d, EncodecConvTranspose1d

_LEAST_STRIDE, _LEAST_FRAMES = 8, 512  # of a transposed convolution from which on it is worth while as products


def speed_up_decoder(model: EncodecModel) -> None:
    """Put these layers in the places of the stock ones, in the decoder alone: the encoder's codes must be the stock encoder's."""
    for layers in [module for module in model.decoder.modules() if isinstance(module, nn.ModuleList)]:
        for index, layer in enumerate(layers):
            behind = layers[index + 1] if index + 1 < len(layers) else None
            if type(layer) is nn.ELU and _is_convolution(behind) and not _is_pointwise(behind.conv):
                layers[index], layers[index + 1] = nn.Identity(), _Activated(behind)
            elif type(layer) is nn.ELU:
                layers[index] = _FastELU()
            elif _is_convolution(layer) and _is_pointwise(layer.conv):
                layers[index] = _Pointwise(layer)
            elif type(layer) is EncodecConvTranspose1d and layer.norm_type == "weight_norm":
                layers[index] = _Transposed(layer)


def _is_convolution(layer: nn.Module | None) -> TypeGuard[EncodecConv1d]:
    """Along the clip frame by frame, with nothing behind it."""
    return (
        isinstance(layer, EncodecConv1d)
        and type(layer) is EncodecConv1d
        and layer.norm_type == "weight_norm"
        and layer.conv.stride == (1,)
    )


def _is_pointwise(layer: Tensor | nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d) and layer.kernel_size == (1,)


def _elu_into(room: Tensor, states: Tensor) -> Tensor:
    """ELU as exp(x) - 1, 6e-8 off. On a CPU torch's own is expm1, number after number: half of the time of decoding."""
    torch.clamp(states, max=0, out=room).exp_().sub_(1)
    return torch.maximum(states, room, out=room)


def _is_fast(states: Tensor) -> bool:
    return states.device.type == "cpu" and not states.requires_grad


class _FastELU(nn.ELU):
    def forward(self, input: Tensor) -> Tensor:
        return _elu_into(torch.empty_like(input), input) if _is_fast(input) else super().forward(input)


class _Activated(nn.Module):
    """An ELU and the convolution behind it: what that hears is written where it is reflected, and products are of what is little."""

    def __init__(self, layer: EncodecConv1d):
        super().__init__()
        self.conv, self.pad_mode = layer.conv, layer.pad_mode
        (taps,), (dilation,) = layer.conv.kernel_size, layer.conv.dilation
        reach = (taps - 1) * dilation
        self.left = reach if layer.causal else reach - reach // 2
        self.right = reach - self.left
        # To few channels, as to the wave itself: all taps' products with every frame, and then their sum along the clip.
        self.is_narrow = dilation == layer.conv.groups == 1 and layer.conv.out_channels * taps <= layer.conv.in_channels

    def forward(self, states: Tensor) -> Tensor:
        """[B, C, T] to [B, the convolution's channels, T]."""
        length, reflects = states.shape[-1], self.pad_mode == "reflect"
        if not _is_fast(states) or not reflects or length <= max(self.left, self.right):
            states = EncodecConv1d._pad1d(nn.functional.elu(states), (self.left, self.right), mode=self.pad_mode)
        else:
            room = states.new_empty(*states.shape[:-1], self.left + length + self.right)
            middle = _elu_into(room[..., self.left : self.left + length], states)
            room[..., : self.left] = middle[..., 1 : self.left + 1].flip(-1)
            room[..., self.left + length :] = middle[..., length - 1 - self.right : length - 1].flip(-1)
            states = room
        return self._sums(states, length) if self.is_narrow and states.device.type == "cpu" else self.conv(states)

    def _sums(self, states: Tensor, length: int) -> Tensor:
        weight = self.conv.weight  # [O, C, taps]
        channels, _, taps = weight.shape
        products = (weight.permute(2, 0, 1).flatten(0, 1) @ states).unflatten(1, (taps, channels))
        found = products[:, 0, :, :length] + self.conv.bias[:, None]
        for tap in range(1, taps):
            found += products[:, tap, :, tap : tap + length]
        return found


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
            clips = [self._products(clip) for clip in states]
            whole = torch.stack(clips) if len(clips) > 1 else clips[0][None]
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
