"""The judges' classifier: which instrument plays the melody, and what accompanies it, from the sound alone.

A small convolutional network on log-mel spectra. It takes no part in training generator, codec or rewards, and hears no
codec in its own training: what it says about decoded sound rests on the augmentation, which takes away what a codec may
(treble, quiet detail, sharp onsets) and keeps speed and pitch.
"""

import numpy as np
import torch
from captions import BACKINGS, INSTRUMENTS
from codec_losses import mel_filters
from torch import Tensor, nn

WEIGHTS = "judges_weights.safetensors"  # of the work folder: classifier and key profiles
WINDOW, HOP, MELS = 1024, 256, 64  # samples, samples, bands
FLOOR_DB = -60  # below the clip's mean level: quieter detail is heard as silence
CHANNELS = (24, 48, 64, 96)  # of the four convolutions; each halves time and bands
EMBEDDING = 64  # small beside the number of clips that a Frechet distance is taken over
DRUM_BACKINGS = [BACKINGS.index("drums"), BACKINGS.index("band")]

EQ_POINTS, EQ_DB = 6, 8.0  # a curve through points at random levels, standard deviation
LOW_PASS_SHARE, LOW_PASS_BANDS, LOW_PASS_DB = 0.5, (36, 64), 6.0  # from 2 kHz up to none; decibels a band
NOISE_DB = (-50.0, -10.0)  # under the clip's mean level
JITTER_DB = 4.0  # largest standard deviation of each cell's level
SMEAR_SHARE, SMEAR_FRAMES = 0.3, 3  # of the batches have their onsets blurred over 48 ms


class Classifier(nn.Module):
    """Log-mel spectra to an embedding, an instrument and a backing."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filters", mel_filters(WINDOW, MELS), persistent=False)
        layers: list[nn.Module] = []
        for into, out in zip((1, *CHANNELS), CHANNELS, strict=False):
            layers += [nn.Conv2d(into, out, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        folded = CHANNELS[-1] * MELS // 2 ** len(CHANNELS)
        self.project = nn.Sequential(nn.Linear(2 * folded, EMBEDDING), nn.ReLU())
        self.instrument = nn.Linear(EMBEDDING, len(INSTRUMENTS))
        self.backing = nn.Linear(EMBEDDING, len(BACKINGS))

    def spectra(self, audio: Tensor) -> Tensor:
        """Power in mel bands [B, MELS, frames] of audio [B, T], relative to the clip's mean power."""
        window = torch.hann_window(WINDOW, device=audio.device)
        power = torch.stft(audio, WINDOW, HOP, window=window, return_complex=True).abs() ** 2
        bands = self.filters @ power
        return bands / bands.mean((1, 2), keepdim=True).clamp(min=1e-10)

    def levels(self, spectra: Tensor) -> Tensor:
        """What the convolutions are given [B, MELS, frames]: tens of decibels around the clip's mean."""
        level = 10 * torch.log10(spectra + 10 ** (FLOOR_DB / 10))
        return (level - level.mean((1, 2), keepdim=True)) / 10

    def embed(self, spectra: Tensor) -> Tensor:
        """Embedding [B, EMBEDDING] of `spectra` [B, MELS, frames]: mean and maximum over time, then one layer."""
        return self.pool(self.body(self.levels(spectra)[:, None]))

    def pool(self, seen: Tensor) -> Tensor:
        """Embedding [B, EMBEDDING] of what the last convolution gives [B, channels, bands, frames]."""
        seen = seen.flatten(1, 2)
        return self.project(torch.cat([seen.mean(2), seen.amax(2)], 1))

    def forward(self, spectra: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of instruments [B, 16] and backings [B, 6], in the order of `captions`."""
        embedding = self.embed(spectra)
        return self.instrument(embedding), self.backing(embedding)


def augment(spectra: Tensor, rng: np.random.Generator) -> Tensor:
    """Another equaliser, low-pass, noise floor and roughness for each of `spectra` [B, MELS, frames].

    All of it works on the power in bands, where it costs little; loudness is taken out by `Classifier.embed`.
    """
    size, bands, frames = spectra.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, shape)).float()

    points = torch.from_numpy(rng.normal(0, EQ_DB / 2, (size, 1, EQ_POINTS))).float()
    gain_db = nn.functional.interpolate(points, bands, mode="linear", align_corners=True)[:, 0]
    cutoff = uniform(*LOW_PASS_BANDS, size, 1)
    slope = LOW_PASS_DB * (torch.arange(bands) - cutoff).clamp(min=0)
    gain_db = gain_db - slope * (uniform(0, 1, size, 1) < LOW_PASS_SHARE)
    if rng.random() < SMEAR_SHARE:
        spectra = nn.functional.avg_pool1d(spectra, SMEAR_FRAMES, 1, SMEAR_FRAMES // 2, count_include_pad=False)
    jitter_db = uniform(0, JITTER_DB, size, 1, 1) * torch.from_numpy(rng.standard_normal((size, bands, frames))).float()
    noise = 10 ** (uniform(*NOISE_DB, size, 1, 1) / 10)
    return (spectra + noise) * 10 ** ((gain_db[:, :, None] + jitter_db) / 10)


@torch.no_grad()
def hear(model: Classifier, audio: Tensor, batch: int = 32) -> dict[str, Tensor]:
    """What the classifier makes of clips [N, T]: "embedding" [N, D], "instrument", "backing" and "drums" [N]."""
    model.eval()
    embedding = torch.cat([model.embed(model.spectra(some)) for some in audio.split(batch)])
    backing = model.backing(embedding).softmax(1)
    return {
        "embedding": embedding,
        "instrument": model.instrument(embedding).argmax(1),
        "backing": backing.argmax(1),
        "drums": backing[:, DRUM_BACKINGS].sum(1) > 0.5,
    }


def truths(rows: list[dict]) -> dict[str, Tensor]:
    """What `hear` should say of clips with these facts."""
    backing = torch.tensor([BACKINGS.index(row["backing"]) for row in rows])
    return {
        "instrument": torch.tensor([list(INSTRUMENTS).index(row["instrument"]) for row in rows]),
        "backing": backing,
        "drums": torch.isin(backing, torch.tensor(DRUM_BACKINGS)),
    }


def instruments_kept(model: Classifier, original: Tensor, decoded: Tensor, rows: list[dict]) -> dict[str, float]:
    """Instrument accuracy on clips [N, T] before and after a codec, and the share of it that is kept."""
    truth = truths(rows)["instrument"]
    before, after = (float((hear(model, audio)["instrument"] == truth).float().mean()) for audio in (original, decoded))
    return {"original": round(before, 3), "decoded": round(after, 3), "kept": round(after / max(before, 1e-9), 3)}
