"""Ears for the codec's decoder: what classifiers of instruments hear in their layers, compared before and after the codec.

They are of the judges' kind (classifier.py) but trained on training clips, from other random weights: the judges take no
part. (Losses on a trained network's features are called perceptual: Johnson et al. 2016, arXiv:1603.08155.) There are
several, because a decoder learns to please one: what the only ear still called a tin whistle, the judges took for a music
box.
"""

from pathlib import Path

import numpy as np
import torch
from classifier import Classifier
from codec_losses import freeze
from judges import train_classifier
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

N_EARS = 4
MINUTES, N_CLIPS = 4, 4_032  # of training, each; of the training clips, every third, from another one for each ear
SEED_SHIFT = 1  # of the run's seed, for the first ear: other weights than the judges'


class Ear(nn.Module):
    """Features of a frozen classifier.

    Args:
        classifier: trained; its weights get no gradient.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier.eval()
        freeze(self.classifier, True)

    def features(self, audio: Tensor) -> tuple[list[Tensor], Tensor]:
        """What each of the convolutions gives for audio [B, T], and the log probabilities of the instruments [B, 16]."""
        seen = self.classifier.levels(self.classifier.spectra(audio))[:, None]
        found = []
        for layer in self.classifier.body:
            seen = layer(seen)
            if isinstance(layer, nn.ReLU):
                found.append(seen)
        return found, self.classifier.instrument(self.classifier.pool(seen)).log_softmax(1)

    def distance(self, target: Tensor, output: Tensor) -> Tensor:
        """How differently two waves [B, T] are heard.

        The mean over the convolutions of the features' L1 distance, relative to the target's, and the divergence (nats)
        of what the ear takes the instruments for.
        """
        with torch.no_grad():
            wanted, named = self.features(target)
        found, heard = self.features(output)
        distances = [(a - b).abs().sum() / a.abs().sum() for a, b in zip(wanted, found, strict=True)]
        return torch.stack(distances).mean() + nn.functional.kl_div(
            heard, named, reduction="batchmean", log_target=True
        )


class Ears(nn.Module):
    """Several ears, whose distances are averaged."""

    def __init__(self, ears: list[Ear]) -> None:
        super().__init__()
        self.ears = nn.ModuleList(ears)

    def distance(self, target: Tensor, output: Tensor) -> Tensor:
        """The mean of what `Ear.distance` says of two waves [B, T]."""
        return torch.stack([ear.distance(target, output) for ear in self.ears]).mean()


def load_or_train_ears(
    work: Path, clips: np.ndarray, rows: list[dict], seed: int, minutes: float = MINUTES, n_ears: int = N_EARS
) -> Ears:
    """The ears of a work folder, those that it lacks trained on int16 clips [N, T] with these facts."""
    ears = []
    for number in range(n_ears):
        path, classifier = work / f"ear_{number}_weights.safetensors", Classifier()
        if path.exists():
            classifier.load_state_dict(load_file(path))
        else:
            some = np.linspace(0, len(clips) - 1, min(N_CLIPS, len(clips))).astype(int)
            some = (some + number) % len(clips)
            facts = [rows[i] for i in some]
            training, ear_seed = work / f"ear_{number}_training", seed + SEED_SHIFT + number
            train_classifier(training, classifier, clips[some], facts, minutes, ear_seed)
            save_file(classifier.state_dict(), path)
        ears.append(Ear(classifier))
    return Ears(ears)
