"""Linear layers that read the same input, as one product: fewer calls, and the faster of a CPU's matrix multiplications.

On an x86 CPU torch's `linear` asks MKL, which on other CPUs than Intel's does without AVX-512, and reads a weight slower for
two rows than for one. oneDNN, which torch has too, reads a weight that was laid out for it at the speed of memory: 1.7 to 4
times as fast from 2 to 64 rows. But a call of it takes longer than a small product itself: on Intel's, MKL is the faster for weights
that fit in a core's cache, 1.1 to 6 times up to 16 rows, and the faster the weight is laid out as [in, out]. All add up in float32; their
sums differ in the last bits.
"""

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_PACKED_FOR = 8  # rows: this layout is as fast as those for 1, 2 and 64
_SMALL = 2**20  # entries of a weight


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Is it torch's own Linear with its own weight, that nobody listens to? Not an adapter, quantised, offloaded, sharded."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and layer.bias is None
        and "forward" not in vars(layer)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    )


class FusedLinear:
    """`torch.cat([layer(states) for layer in layers], -1)`, without gradient, for as long as the weights and autocast stay as they are.

    Args:
        layers: bias-free linear layers from H features; where one is more than that (`is_plain`), each is called as it is.

    Example:
        >>> from torch import nn
        >>> query, key = nn.Linear(4, 8, bias=False), nn.Linear(4, 8, bias=False)
        >>> with torch.no_grad():
        ...     both = FusedLinear([query, key])(torch.zeros(2, 4))
        >>> both.shape
        torch.Size([2, 16])
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = layers
        self.weight: Tensor | None = None
        self.packed = self.turned = False
        plain = [layer for layer in layers if is_plain(layer)]
        if len(plain) < len(layers):
            return
        weight = torch.cat([layer.weight for layer in plain]) if len(plain) > 1 else plain[0].weight.detach()
        if weight.dtype == torch.float32 and torch.is_autocast_enabled(device := weight.device.type):
            weight = weight.to(torch.get_autocast_dtype(device))  # once; autocast would do it in each call
        self.turned = weight.dtype == torch.float32 and weight.numel() <= _SMALL and _is_intel() and _has_mkl(weight)
        self.packed = not self.turned and _has_onednn(weight)
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
            return torch.ops.mkldnn._linear_pointwise(states, self.weight, None, "none", [], "")
        return linear(states, self.weight)


@cache
def _is_intel() -> bool:
    """Whether Intel made this computer's CPU; False where that is not told in Linux's way."""
    path = Path("/proc/cpuinfo")
    return sys.platform == "linux" and path.is_file() and "GenuineIntel" in path.read_text(errors="replace")


def _has_mkl(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and torch.backends.mkl.is_available()


def _has_onednn(weight: Tensor) -> bool:
    """Only where `linear` would be MKL's, and for the dtypes that were measured."""
    return (
        _has_mkl(weight)
        and weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")  # torch's inductor calls them; they are no promise
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
