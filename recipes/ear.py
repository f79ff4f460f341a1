"""An ear for the codec's decoder: what a classifier of instruments hears in its layers, compared before and after the codec.

It is of the judges' kind (classifier.py) but trained on training clips, from other random weights: the judges take no part.
(Losses on a trained network's features are called perceptual: Johnson et al. 2016, arXiv:1603.08155.)
"""

from pathlib import Path

import numpy as np
import torch
from classifier import Classifier
from codec_losses import freeze
from judges import train_classifier
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MINUTES, N_CLIPS = 4, 4_032  # of training; of the training clips, every third
SEED_SHIFT = 1  # of the run's seed: other weights than the judges'


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


def load_or_train_ear(work: Path, clips: np.ndarray, rows: list[dict], seed: int, minutes: float = MINUTES) -> Ear:
    """The ear of a work folder, trained on int16 clips [N, T] where there is none yet."""
    path = work / "ear_weights.safetensors"
    classifier = Classifier()
    if path.exists():
        classifier.load_state_dict(load_file(path))
    else:
        some = np.linspace(0, len(clips) - 1, min(N_CLIPS, len(clips))).astype(int)
        train_classifier(
            work / "ear_training", classifier, clips[some], [rows[i] for i in some], minutes, seed + SEED_SHIFT
        )
        save_file(classifier.state_dict(), path)
    return Ear(classifier)
