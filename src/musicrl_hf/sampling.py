"""Drawing codes from logits."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import threshold

_BLOCK = 32  # codes: about the square root of a codebook
_BELOW_ZERO = -torch.finfo(torch.float32).smallest_normal  # nearer to 0 than the difference of any two logits of size


def check_temperature(temperature: float) -> None:
    """ValueError where logits cannot be divided by it."""
    if temperature <= 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature!r}.")


def check_sampling(temperature: float, top_k: int | None, guidance_scale: float | None, frames: int) -> None:
    """ValueError that names the sampling argument that is out of range; a guidance scale of None is the model's own."""
    check_temperature(temperature)
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, or None for no limit, got {top_k!r}.")
    if guidance_scale is not None and not guidance_scale >= 1:
        raise ValueError(f"`guidance_scale` must be at least 1 (no guidance), got {guidance_scale!r}.")
    if frames < 1:
        raise ValueError(f"`frames` must be at least 1, got {frames!r}.")


def draw_codes(logits: Tensor, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One code a codebook from float32 logits [B, K, V]: ids [B, K].

    By the inverse of the cumulated probabilities, which takes two random numbers a code; `torch.multinomial` takes V.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        # Moved so that the k-th largest is 0, which a softmax does not hear: a mask takes five times as long on a CPU.
        logits = threshold(logits - kth_largest(logits, top_k), _BELOW_ZERO, -torch.inf)
    return draw_from(logits, precision_on(logits.device), generator)


def kth_largest(logits: Tensor, k: int) -> Tensor:
    """The k-th largest of each row of float32 logits [..., V], as [..., 1]."""
    if logits.device.type != "cpu":
        return logits.topk(k, -1).values[..., -1:]
    place = logits.shape[-1] - k  # NumPy's partition has vector instructions: four times as fast as torch's topk
    return torch.from_numpy(np.partition(logits.numpy(), place, axis=-1)[..., place, None])


def likeliest_codes(logits: Tensor) -> Tensor:
    """The likeliest code of each codebook, from logits [B, K, V]: ids [B, K]."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))  # by vector instructions: 5 to 30 times as fast as torch's


def precision_on(device: torch.device) -> torch.dtype:
    """Of cumulated probabilities: float64, since what float32 loses over thousands of entries the likely ones lose.

    Apple's MPS has no float64.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def draw_from(logits: Tensor, precision: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """`draw_codes` without a limit, its cumulated probabilities in `precision`.

    First a block of codes by what its codes weigh together, then a code of that block: the same distribution, and only a block of
    V is cumulated.
    """
    size = math.gcd(logits.shape[-1], _BLOCK)
    weights = logits.softmax(-1).unflatten(-1, (-1, size))
    block = _draw_index(weights.sum(-1), precision, generator)
    inside = weights.take_along_dim(block[..., None, None], -2).squeeze(-2)
    return block * size + _draw_index(inside, precision, generator)


def _draw_index(weights: Tensor, precision: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Indices [...] into weights [..., N], each as often as it weighs."""
    cumulated = weights.to(precision).cumsum(-1)
    draw = torch.rand(*weights.shape[:-1], 1, generator=generator, device=weights.device, dtype=precision)
    index = torch.searchsorted(cumulated, draw * cumulated[..., -1:], right=True)
    return index[..., 0].clamp(max=weights.shape[-1] - 1)
