"""What the codec's training minimises: reconstruction in time, spectrum and log-mel, and an adversary's opinion."""

import numpy as np
import torch
from common import SAMPLING_RATE
from torch import Tensor, nn

STFT_SIZES = (512, 2048)
MEL_SCALES = ((512, 40), (1024, 64), (2048, 80))  # window (samples) and number of filters
MEL_FLOOR, TRAINED_FLOOR = 0.05, 0.005  # magnitudes that are measured; the treble that is trained lies far below it


def mel_filters(size: int, n_mels: int) -> Tensor:
    """Triangular filters [mels, bins] between 40 Hz and 8 kHz on the HTK mel scale, for a window of `size` samples."""
    mel = np.linspace(2595 * np.log10(1 + 40 / 700), 2595 * np.log10(1 + 8000 / 700), n_mels + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bins = np.fft.rfftfreq(size, 1 / SAMPLING_RATE)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.tensor(np.maximum(0, np.minimum(rising, falling)), dtype=torch.float32)


class ReconstructionLoss:
    """Relative L1 of wave, complex spectra and magnitudes, and the distance of log-mel spectra at three resolutions."""

    def __init__(self) -> None:
        sizes = {*STFT_SIZES, *(size for size, _ in MEL_SCALES)}
        self.windows = {size: torch.hann_window(size) for size in sizes}
        self.filters = {size: mel_filters(size, n_mels) for size, n_mels in MEL_SCALES}

    def spectrum(self, wave: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Complex spectrum and magnitude [B, bins, frames] of [B, T]."""
        z = torch.stft(wave, size, size // 4, window=self.windows[size], return_complex=True)
        return z, (z.real**2 + z.imag**2 + 1e-8).sqrt()

    def mel_distances(self, target: Tensor, output: Tensor, floor: float = MEL_FLOOR) -> Tensor:
        """Mean distance [B] of log-mel spectra (nats) over the resolutions; waves [B, T], magnitudes above `floor`."""
        distances = []
        for size, filters in self.filters.items():
            log_mels = [torch.log(filters @ self.spectrum(wave, size)[1] + floor) for wave in (target, output)]
            distances.append((log_mels[0] - log_mels[1]).abs().mean((1, 2)))
        return torch.stack(distances).mean(0)

    def mel_distance(self, target: Tensor, output: Tensor, floor: float = MEL_FLOOR) -> Tensor:
        """Their mean."""
        return self.mel_distances(target, output, floor).mean()

    def __call__(self, target: Tensor, output: Tensor, log_mel_weight: float) -> Tensor:
        loss = (target - output).abs().sum() / target.abs().sum()
        for size in STFT_SIZES:
            (z, magnitude), (z_out, magnitude_out) = self.spectrum(target, size), self.spectrum(output, size)
            difference = z - z_out
            scale = 2 * len(STFT_SIZES)
            loss = loss + (difference.real.abs() + difference.imag.abs()).sum() / (
                (z.real.abs() + z.imag.abs()).sum() * scale
            )
            loss = loss + (magnitude - magnitude_out).abs().sum() / (magnitude.sum() * scale)
        return loss + log_mel_weight * self.mel_distance(target, output, TRAINED_FLOOR)


def discriminator_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Hinge loss over the scales: logits of real clips above 1, of decoded ones below -1."""
    scales = [(1 - r).relu().mean() + (1 + f).relu().mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(scales).mean()


def adversarial_loss(
    fake: list[Tensor], real_features: list[list[Tensor]], fake_features: list[list[Tensor]]
) -> Tensor:
    """What the decoder minimises: the discriminator's doubt, and the relative distance of its features.

    Equations 2 and 3 of Defossez et al. 2022 (EnCodec).
    """
    doubt = torch.stack([(1 - logits).relu().mean() for logits in fake]).mean()
    distances = [
        (r.detach() - f).abs().mean() / r.detach().abs().mean()
        for real_scale, fake_scale in zip(real_features, fake_features, strict=True)
        for r, f in zip(real_scale, fake_scale, strict=True)
    ]
    return doubt + torch.stack(distances).mean()


def balanced_backward(output: Tensor, reconstruction: Tensor, others: list[tuple[Tensor, float]]) -> None:
    """Backpropagate losses through `output`, each of `others` at its share of the first one's gradient's length.

    Fixed weights would not do: the adversary's gradient grows and shrinks as it learns. This is the idea of EnCodec's
    balancer, without its running averages.
    """
    first = torch.autograd.grad(reconstruction, output, retain_graph=True)[0]
    total = first
    for loss, share in others:
        gradient = torch.autograd.grad(loss, output, retain_graph=True)[0]
        total = total + share * gradient * first.norm() / gradient.norm().clamp(min=1e-12)
    output.backward(total)


def freeze(module: nn.Module, frozen: bool) -> None:
    """Let no gradient reach the module's weights, or let it again."""
    for parameter in module.parameters():
        parameter.requires_grad_(not frozen)
