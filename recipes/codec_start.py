"""Where the codec's training starts: a lapped transform, written into the weights of the `encodec` package's network.

From random weights that network needs an hour on a CPU to find less than what the modified discrete cosine transform
(Princen and Bradley 1987) has from the start: half of its coefficients, by k-means residual codebooks, give a clip back
at 7 dB, before anything is learned (README.md). So a part of the channels carries that transform at first (for small
signals the network is straight: ELU has slope 1 at 0); the others start at random, to learn what a linear map cannot do.
"""

import math

import torch
from encodec import EncodecModel as EncodecPackageModel
from encodec.modules.seanet import SEANetResnetBlock
from torch import Tensor, nn

INPUT_GAIN, COEFFICIENT_GAIN = 0.25, 0.3  # what the ELUs see stays small, where they are straight
CLOSED_GATE = -4.0  # of an LSTM's output at first: what it adds is small
REST = 0.02  # of torch's random weights, where they would disturb the carried transform
WEIGHTING = 0.3  # coefficients are divided by their spread to this power: the codebooks then hear more of the treble


def cosine_basis(hop: int, n_coefficients: int) -> Tensor:
    """The lowest coefficients' basis [2 * hop, n] of the modified discrete cosine transform with a sine window."""
    time = torch.arange(2 * hop, dtype=torch.float64)[:, None] + 0.5
    order = torch.arange(n_coefficients, dtype=torch.float64) + 0.5
    window = torch.sin(math.pi * time / (2 * hop))
    return (math.sqrt(2 / hop) * window * torch.cos(math.pi / hop * (time + hop / 2) * order)).float()


def coefficients(wave: Tensor, basis: Tensor) -> Tensor:
    """Lapped coefficients [B, n, frames] of [B, T], a frame every half window."""
    size = len(basis)
    return (nn.functional.pad(wave, (size // 4, size // 4)).unfold(1, size, size // 2) @ basis).transpose(1, 2)


def convolution(layer: nn.Module) -> nn.Module:
    """The weight-normalised torch convolution inside one of the package's layers."""
    return next(part for part in layer.modules() if isinstance(part, nn.Conv1d | nn.ConvTranspose1d))


@torch.no_grad()
def set_weight(layer: nn.Module, weight: Tensor) -> None:
    """Give a layer this weight, and no bias."""
    inner = convolution(layer)
    inner.weight_v.copy_(weight)
    inner.weight_g.copy_(weight.flatten(1).norm(dim=1)[:, None, None])
    inner.bias.zero_()


def rest(layer: nn.Module, share: float = REST) -> Tensor:
    """`share` of the weight that torch has drawn for a layer."""
    return share * convolution(layer).weight_v.detach().clone()


@torch.no_grad()
def quiet_branches(network: nn.Module) -> None:
    """Let residual branches and LSTMs, which are added to what they were given, begin small."""
    for module in network.modules():
        if isinstance(module, SEANetResnetBlock):
            set_weight(module.block[3], rest(module.block[3]))
        if isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                if name.startswith("bias"):
                    parameter.zero_()
                if name.startswith("bias_ih"):
                    parameter[3 * module.hidden_size :] = CLOSED_GATE


def start_from_cosines(model: EncodecPackageModel, ratios: list[int], wave: Tensor) -> None:
    """Write the transform into encoder and decoder, in place.

    Args:
        model: strides [1, r, q] with r * q samples a frame, and channels [n, 2n, 4n, 8n] with q <= 2n and D <= 4n, for
            latents of D dimensions.
        ratios: the decoder's strides, [1, r, q].
        wave: [B, T], music whose coefficients' spread decides their weights.
    """
    one, r, q = ratios
    assert one == 1, f"ratios begin with 1, these are {ratios}"
    first, _, _, to_q, _, _, to_r, _, _, to_one, _, _, last = model.encoder.model
    entry, _, _, from_one, _, _, from_r, _, _, from_q, _, _, out = model.decoder.model
    n, samples = model.encoder.dimension, torch.arange(q)
    basis = cosine_basis(r * q, n)
    spread = coefficients(wave, basis).pow(2).mean((0, 2)).sqrt()
    weights = (spread / spread.max()) ** -WEIGHTING
    taps = basis.view(2 * r, q, n).permute(2, 1, 0)  # [n, q, 2r]: coefficient, sample within a step, step

    weight = rest(first, 1.0)
    weight[0] = 0
    weight[0, 0, 3] = INPUT_GAIN
    set_weight(first, weight)
    weight = rest(to_q, 1.0)
    weight[:q] *= 0.01
    weight[samples, 0, q // 2 + samples] = 1.0
    set_weight(to_q, weight)
    weight = rest(to_r)
    weight[:n, :q] = COEFFICIENT_GAIN * taps
    set_weight(to_r, weight)
    weight = rest(to_one, 1.0)
    weight[:n] *= 0.01
    weight[range(n), range(n), 1] = 1.0
    set_weight(to_one, weight)
    weight = rest(last)
    weight[range(n), range(n), 3] = weights / (INPUT_GAIN * COEFFICIENT_GAIN)
    set_weight(last, weight)

    weight = rest(entry, 1.0)
    weight[:n] *= 0.01
    weight[range(n), range(n), 3] = INPUT_GAIN * COEFFICIENT_GAIN / weights
    set_weight(entry, weight)
    weight = rest(from_one)
    weight[range(n), range(n), 1] = 1.0
    set_weight(from_one, weight)
    weight = rest(from_r, 1.0)
    weight[:, :q] *= REST
    weight[:n, :q] = taps / COEFFICIENT_GAIN
    set_weight(from_r, weight)
    weight = rest(from_q, 1.0)
    weight[:, 0] *= 0.01
    weight[samples, 0, q // 2 + samples] = 1.0
    set_weight(from_q, weight)
    weight = rest(out)
    weight[0, 0, 3] = 1 / INPUT_GAIN
    set_weight(out, weight)
    quiet_branches(model)
