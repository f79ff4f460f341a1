"""What a training step need not keep: activations that are made again without another matrix product.

The backward pass of a linear layer needs what the layer read. In a transformer much of that is the output of a layer norm or of a GELU,
whose own backward passes keep their inputs anyway. So those outputs are dropped, and made again from these inputs when they are
asked for: element by element, and to the same bits. (Activation checkpointing drops everything inside a layer and runs it twice; it
goes on top of this where memory is still short.)

Left out: other activation functions, which do not keep their inputs, and dropout between GELU and the layer behind it.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import GELUActivation

_RECOMPUTED = (nn.LayerNorm, nn.GELU, GELUActivation)


@dataclass(frozen=True)
class _Kept:
    """A tensor that is kept, as it was: autograd makes no such check on what hooks hand it."""

    tensor: Tensor
    version: int

    def read(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"A tensor {list(self.tensor.shape)} that the backward pass needs was changed in place after the forward pass (version "
                f"{self.tensor._version}, expected {self.version}); change weights only once the backward pass is over."
            )
        return self.tensor


@dataclass(frozen=True)
class _Again:
    """How an activation is made again: `module` of `given`, as it ran in the forward pass."""

    module: nn.Module
    given: _Kept
    weights: tuple[_Kept, ...]
    autocast: bool
    narrow: torch.dtype  # of autocast
    dtype: torch.dtype  # of what came out
    version: int  # of what came out, as it came out

    def read(self) -> Tensor:
        given = self.given.read()
        for weight in self.weights:
            weight.read()
        with torch.no_grad(), torch.autocast(given.device.type, dtype=self.narrow, enabled=self.autocast):
            return self.module(given).to(self.dtype)


@contextmanager
def recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, what the layers' norms and GELUs put out is not kept for the backward pass, but made again.

    Under autocast a norm's output is narrowed once, and not by each linear layer that reads it: so the gradients of these are
    added up in the narrow type.

    Args:
        layers: modules with layer norms and GELUs inside.

    Raises:
        RuntimeError: in the backward pass, where weights or activations were changed in place since.

    Example:
        >>> mlp = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))
        >>> with recomputed([mlp]):
        ...     loss = mlp(torch.ones(1, 4)).sum()
        >>> loss.backward()
    """
    if not torch.is_grad_enabled():
        yield
        return
    known: dict[tuple, _Again] = {}  # of outputs that are still alive, by place and size

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        device = output.device.type
        autocast, narrow = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        if autocast and isinstance(module, nn.LayerNorm):
            output = output.to(narrow)
        if given and output.is_contiguous() and output.data_ptr():
            place, weights = _place(output), tuple(_kept(weight) for weight in module.parameters())
            known[place] = _Again(module, _kept(given[0]), weights, autocast, narrow, output.dtype, output._version)
            weakref.finalize(output, known.pop, place, None)
        return output

    def pack(saved: Tensor) -> tuple[_Again | _Kept, torch.Size]:
        again = known.get(_place(saved)) if saved.is_contiguous() else None
        return again if again is not None and again.version == saved._version else _kept(saved), saved.shape

    def unpack(packed: tuple[_Again | _Kept, torch.Size]) -> Tensor:
        return packed[0].read().view(packed[1])

    parts = [part for layer in layers for part in layer.modules()]
    handles = [part.register_forward_hook(note) for part in parts if isinstance(part, _RECOMPUTED)]
    # Adapters would widen a norm's narrow output, and autocast narrow it again: to the same bits, in a tensor of its own.
    widening: list[Any] = [part for part in parts if getattr(part, "cast_input_dtype_enabled", False)]
    for part in widening if any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps"))) else ():
        part.cast_input_dtype_enabled = False
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for part in widening:
            part.cast_input_dtype_enabled = True


def _kept(tensor: Tensor) -> _Kept:
    return _Kept(tensor.detach(), tensor._version)


def _place(tensor: Tensor) -> tuple:
    """A contiguous tensor and its views of another shape have it in common, as long as one of them lives."""
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.device
