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
    """One code a codebook from logits [B, K, V]: ids [B, K]."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -torch.inf)
    flat = logits.softmax(-1).flatten(0, 1)
    return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:2])
