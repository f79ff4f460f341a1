"""The 20 s windows that section 3.3 of the paper scores longer clips by."""

from torch import Tensor

WINDOW_S = 20.0  # seconds; the paper's quality and preference models were trained on 20 s


def first_and_last(audio: Tensor, sampling_rate: int, window_s: float = WINDOW_S) -> list[Tensor]:
    """The parts of clips [B, C, T] to score and average: the whole, or the first and the last `window_s` seconds."""
    samples = int(window_s * sampling_rate)
    if audio.shape[-1] <= samples:
        return [audio]
    return [audio[..., :samples], audio[..., -samples:]]
