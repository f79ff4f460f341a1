"""Drawing codes from logits."""

import torch
from torch import Tensor


def check_sampling(temperature: float, top_k: int | None, guidance_scale: float, frames: int) -> None:
    """ValueError that names the sampling argument that is out of range."""
    if temperature <= 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature!r}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be at least 1, or None for no limit, got {top_k!r}.")
    if guidance_scale < 1:
        raise ValueError(f"`guidance_scale` must be at least 1 (no guidance), got {guidance_scale!r}.")
    if frames < 1:
        raise ValueError(f"`frames` must be at least 1, got {frames!r}.")


def draw_codes(logits: Tensor, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One code a codebook from logits [B, K, V]: ids [B, K].

    By the inverse of the cumulated probabilities, which takes one random number a code; `torch.multinomial` takes V.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -torch.inf)
    return draw_from(logits, precision_on(logits.device), generator)


def precision_on(device: torch.device) -> torch.dtype:
    """Of cumulated probabilities: float64, since what float32 loses over thousands of entries the likely ones lose.

    Apple's MPS has no float64.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def draw_from(logits: Tensor, precision: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """`draw_codes` without a limit, its cumulated probabilities in `precision`."""
    cumulated = logits.softmax(-1).to(precision).cumsum(-1)
    draw = torch.rand(*logits.shape[:-1], 1, generator=generator, device=logits.device, dtype=precision)
    index = torch.searchsorted(cumulated, draw * cumulated[..., -1:], right=True)
    return index[..., 0].clamp(max=logits.shape[-1] - 1)
