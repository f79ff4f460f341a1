"""What a training step need not keep: activations that are worked out again faster than they are read from far away.

The backward pass of a linear layer needs what the layer read. In a transformer much of that is the output of a layer norm or of a GELU,
whose own backward passes keep their inputs anyway. So those outputs are dropped, and made again from these inputs when they are
asked for: element by element, without another matrix product, and to the same bits. (Activation checkpointing drops everything
inside a layer and runs it twice; it goes on top of this where memory is still short.)

Left out: other activation functions, which do not keep their inputs, and dropout between GELU and the layer behind it.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import GELUActivation


@dataclass(frozen=True)
class _Again:
    """How an activation is made again: `module` of `given`, as it ran in the forward pass."""

    module: nn.Module
    given: Tensor
    autocast: bool
    narrow: torch.dtype  # of autocast
    dtype: torch.dtype  # of what came out

    def make(self) -> Tensor:
        with torch.no_grad(), torch.autocast(self.given.device.type, dtype=self.narrow, enabled=self.autocast):
            return self.module(self.given).to(self.dtype)


@contextmanager
def recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within it, what the layers' norms and GELUs put out is not kept for the backward pass, but made again.

    Under autocast a norm's output is narrowed once, and not by each linear layer that reads it: so the gradients of these are
    added up in the narrow type.

    Args:
        layers: modules with layer norms and GELUs inside, whose weights are as they were until the backward pass is over.

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

    def note(module: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
        device = output.device.type
        autocast, narrow = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        if autocast and isinstance(module, nn.LayerNorm):
            output = output.to(narrow)
        place = _place(output)
        known[place] = _Again(module, given[0].detach(), autocast, narrow, output.dtype)
        weakref.finalize(output, known.pop, place, None)
        return output

    def pack(kept: Tensor) -> Tensor | tuple[_Again, torch.Size]:
        again = known.get(_place(kept)) if kept.is_contiguous() else None
        return kept if again is None else (again, kept.shape)

    def unpack(packed: Tensor | tuple[_Again, torch.Size]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].make().view(packed[1])

    parts = [
        part
        for layer in layers
        for part in layer.modules()
        if isinstance(part, nn.LayerNorm | nn.GELU | GELUActivation)
    ]
    handles = [part.register_forward_hook(note) for part in parts]
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _place(tensor: Tensor) -> tuple:
    """A contiguous tensor and its views of another shape have it in common, as long as one of them lives."""
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor.device
