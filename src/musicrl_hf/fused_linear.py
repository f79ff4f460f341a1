"""Linear layers that read the same input, as one product: fewer calls, and the faster of a CPU's matrix multiplications.

On an x86 CPU torch's `linear` asks MKL, which on other CPUs than Intel's does without AVX-512, and reads a weight slower for
two rows than for one. oneDNN, which torch has too, reads a weight that was laid out for it at the speed of memory: 1.7 to 4
times as fast from 2 to 64 rows. But a call of it takes longer than a small product itself: on Intel's, MKL is the faster for weights
that fit in a core's cache, 1.1 to 6 times up to 16 rows, and the faster the weight is laid out as [in, out]. And where there is no
AVX-512 to do without, oneDNN has nothing to win for one row: MKL reads the longer side of a weight of any size in order, 1.1 to 1.4
times as fast. All add up in float32; their sums differ in the last bits.

A LoRA adapter on a layer, with its scale s, adds s B A x to what comes out. In float32 s B A is added to the weight, once, and
costs nothing more. In bfloat16 most of it would be lost there: the A of all layers are one product, and their B another.
"""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_PACKED_FOR = 8  # rows: this layout is as fast as those for 1, 2 and 64
_SMALL = 2**20  # entries of a weight


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Is it torch's own Linear with its own weight, that nobody listens to? Not an adapter, quantised, offloaded, sharded."""
    return (
        type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.bias is None and not _is_heard(layer)
    )


def _is_heard(layer: nn.Module) -> bool:
    return "forward" in vars(layer) or bool(layer._forward_hooks or layer._forward_pre_hooks)


class _Parts(NamedTuple):
    """A layer's weights: its own [out, in], and of its R adapters' ranks together A [R, in] and s B [out, R]."""

    weight: Tensor
    down: Tensor
    up: Tensor


def _parts_of(layer: nn.Module) -> _Parts | None:
    """Of torch's own Linear, with or without PEFT's LoRA adapters, if that is all that it is."""
    if is_plain(layer):
        weight = layer.weight.detach()
        return _Parts(weight, weight.new_empty(0, weight.shape[1]), weight.new_empty(len(weight), 0))
    from peft.tuners import lora

    adapted: Any = layer  # its parts are Tensor | Module to torch
    if type(layer) is not lora.Linear or _is_heard(layer) or not is_plain(adapted.base_layer):
        return None
    alone = _parts_of(adapted.base_layer)
    if adapted.disable_adapters and adapted.merged:
        return None  # called, it takes them out of its weight again
    if alone is None or adapted.disable_adapters or adapted.merged:
        return alone
    downs, ups = [alone.down], [alone.up]
    for name in [name for name in adapted.active_adapters if name in adapted.lora_A]:
        down, up, dropout = adapted.lora_A[name], adapted.lora_B[name], adapted.lora_dropout[name]
        drops = dropout.training and getattr(dropout, "p", 0) > 0
        if name in adapted.lora_variant or drops or not (is_plain(down) and is_plain(up)):
            return None
        downs.append(down.weight.detach())
        ups.append(up.weight.detach() * adapted.scaling[name])
    return _Parts(alone.weight, torch.cat(downs), torch.cat(ups, 1))


class FusedLinear:
    """`torch.cat([layer(states) for layer in layers], -1)`, without gradient, for as long as the weights and autocast stay as they are.

    Args:
        layers: bias-free linear layers from H features, with LoRA adapters or without; where one is more than that, each is called as it is.
        rows: N that most calls will have, for which the weight is laid out; any other N is as right.

    Example:
        >>> from torch import nn
        >>> query, key = nn.Linear(4, 8, bias=False), nn.Linear(4, 8, bias=False)
        >>> with torch.no_grad():
        ...     both = FusedLinear([query, key], rows=2)(torch.zeros(2, 4))
        >>> both.shape
        torch.Size([2, 16])
    """

    def __init__(self, layers: Sequence[nn.Module], rows: int):
        self.layers = layers
        self.weight: Tensor | None = None
        self.low_rank: tuple[Tensor, Tensor] | None = None  # A [R, in] of all layers' adapters, and their s B [R, out]
        self.packed = self.turned = False
        parts = [part for layer in layers if (part := _parts_of(layer)) is not None]
        if len(parts) < len(layers):
            return
        dtype = parts[0].weight.dtype
        if dtype == torch.float32 and torch.is_autocast_enabled(device := parts[0].weight.device.type):
            dtype = torch.get_autocast_dtype(device)  # once; autocast would do it in each call
        weights = [part.weight for part in parts]
        if any(len(part.down) for part in parts):
            if dtype.itemsize < torch.float32.itemsize:
                up = torch.block_diag(*(part.up for part in parts)).T.contiguous()
                self.low_rank = torch.cat([part.down for part in parts]).to(dtype), up.to(dtype)
            else:
                weights = [torch.addmm(part.weight, part.up.to(dtype), part.down.to(dtype)) for part in parts]
        weight = (torch.cat(weights) if len(weights) > 1 else weights[0]).to(dtype)
        layout = _layout_of(weight, rows)
        self.turned, self.packed = layout == "turned", layout == "packed"
        self.dtype = weight.dtype
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR)
        self.weight = weight.T.contiguous() if self.turned else weight

    def __call__(self, states: Tensor) -> Tensor:
        """States [N, H] to [N, the layers' features together]."""
        if self.weight is None:
            return torch.cat([layer(states) for layer in self.layers], -1)
        states = states.to(self.dtype)
        if self.turned:
            return states @ self.weight
        if self.packed:
            found = torch.ops.mkldnn._linear_pointwise(states, self.weight, None, "none", [], "")
        else:
            found = linear(states, self.weight)
        if self.low_rank is None:
            return found
        down, up = self.low_rank
        return torch.addmm(found, linear(states, down), up)


def _layout_of(weight: Tensor, rows: int) -> str:
    """The fastest for `rows` rows and a weight [out, in]: as it is ("own"), [in, out] ("turned"), or oneDNN's ("packed")."""
    if weight.dtype == torch.float32 and _has_mkl(weight):
        if rows == 1 and not _has_avx512():
            return "turned" if weight.shape[0] >= weight.shape[1] else "own"
        if weight.numel() <= _SMALL and _is_intel():
            return "turned"
    return "packed" if _has_onednn(weight) else "own"


@cache
def _has_avx512() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


@cache
def _is_intel() -> bool:
    """Whether Intel made this computer's CPU; False where that is not told in Linux's way."""
    path = Path("/proc/cpuinfo")
    return sys.platform == "linux" and path.is_file() and "GenuineIntel" in path.read_text(errors="replace")


def _has_mkl(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and torch.backends.mkl.is_available()


@cache
def _packs_bfloat16() -> bool:
    """oneDNN refuses to on x86 CPUs without AVX512 or AVX-NE-CONVERT, where torch's own `linear` still takes bfloat16."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def _has_onednn(weight: Tensor) -> bool:
    """Only where `linear` would be MKL's, and for the dtypes that were measured."""
    return (
        _has_mkl(weight)
        and (weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _packs_bfloat16()))
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")  # torch's inductor calls them; they are no promise
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
