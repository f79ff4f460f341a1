"""What a training step need not keep: activations that are made again without another matrix product.

The backward pass of a linear layer needs what the layer read. In a transformer much of that is the output of a layer norm or of a GELU,
whose own backward passes keep their inputs anyway. So those outputs are dropped, and made again from these inputs when they are
asked for: element by element, and to the same bits. (Activation checkpointing drops everything inside a layer and runs it twice; it
goes on top of this where memory is still short.)

Left out: other activation functions, which do not keep their inputs, and dropout between GELU and the layer behind it.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import GELUActivation

_RECOMPUTED = (nn.LayerNorm, nn.GELU, GELUActivation)


# A tensor that is kept, and its version then: autograd makes no such check on what hooks hand it. A plain pair: a step makes thousands.
_Kept = tuple[Tensor, int]


class _Again:
    """How an activation is made again: `module` of `given`, as it ran in the forward pass."""

    __slots__ = ("autocast", "given", "made", "module", "narrow", "version", "weights")

    def __init__(
        self,
        module: nn.Module,
        given: Tensor,
        made: Tensor,
        autocast: bool,
        narrow: torch.dtype,
        gone: Callable[[Any], None],  # called once `made` is
    ):
        self.module, self.given = module, _kept(given)
        self.weights = [_kept(weight) for weight in module._parameters.values() if weight is not None]
        self.autocast, self.narrow = autocast, narrow
        self.made, self.version = weakref.ref(made, gone), made._version  # what came out, as it came out

    def is_of(self, saved: Tensor) -> bool:
        """Is `saved`, which lies where it lay, what came out, or a view of that in another shape, unchanged?"""
        made = self.made()
        return (
            made is not None
            and saved._version == self.version
            and saved.is_contiguous()
            and (saved.numel(), saved.dtype, saved.device) == (made.numel(), made.dtype, made.device)
        )

    def read(self, dtype: torch.dtype) -> Tensor:
        given = _read(self.given)
        for weight in self.weights:
            _read(weight)
        device = given.device.type
        with torch.no_grad():
            if not (self.autocast or torch.is_autocast_enabled(device)):
                return self.module(given)
            with torch.autocast(device, dtype=self.narrow, enabled=self.autocast):
                return self.module(given).to(dtype)


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
    known: dict[int, _Again] = {}  # of outputs that are still alive, by place: what they were made of may go with them

    def note(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        device = output.device.type
        autocast, narrow = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        if autocast and isinstance(module, nn.LayerNorm):
            output = output.to(narrow)
        if given and output.is_contiguous() and (place := output.data_ptr()):

            def forget(made: Any) -> None:
                if place in known and known[place].made is made:
                    del known[place]

            known[place] = _Again(module, given[0], output, autocast, narrow, forget)
        return output

    def pack(saved: Tensor) -> "_Kept | tuple[_Again, torch.Size, torch.dtype]":
        again = known.get(saved.data_ptr())
        if again is not None and again.is_of(saved):
            return again, saved.shape, saved.dtype
        return _kept(saved)

    def unpack(packed: "_Kept | tuple[_Again, torch.Size, torch.dtype]") -> Tensor:
        if len(packed) == 2:
            return _read(packed)
        again, shape, dtype = packed
        return again.read(dtype).view(shape)

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
    return tensor.detach(), tensor._version


def _read(kept: _Kept) -> Tensor:
    tensor, version = kept
    if tensor._version != version:
        raise RuntimeError(
            f"A tensor {list(tensor.shape)} that the backward pass needs was changed in place after the forward pass (version "
            f"{tensor._version}, expected {version}); change weights only once the backward pass is over."
        )
    return tensor
