"""What a clip's onsets say of its rhythm, as numbers for a small head: a frozen CLAP encoder's vectors hardly tell a beat.

The autocorrelation of the onset strength, in bands: the tempogram of Grosche, Mueller and Kurth (2010), taken once over the
whole clip as in the beat histogram of Tzanetakis and Cook (2002). Nothing here is learned.
"""

import torch
from torch import Tensor, nn

BANDS = 4  # of the mel scale, beside all of it
LAGS_S, LAGS = (0.2, 1.5), 65  # 300 to 40 beats a minute, in so many steps
SIZE = (BANDS + 1) * (LAGS + 3)
_HEARD_DB = 40.0  # below the clip's loudest point nothing counts as an onset


def rhythm(mel: Tensor, frames_per_s: float) -> Tensor:
    """Rhythm of clips, [N, SIZE]: of each band the autocorrelation of its onsets, its maximum, and their mean and spread.

    Args:
        mel: log-mel spectrograms [N, frames, mels] in dB.
        frames_per_s: of these.

    Returns:
        float32; all 0 for fewer than three frames. Autocorrelations are 1 at lag 0 and 0 at lags that the clip does not hold twice.

    Raises:
        ValueError: not three dimensions, or fewer mels than bands.

    Example:
        >>> click = (torch.arange(300) % 50 == 0).float() * 40
        >>> found = rhythm(click[None, :, None].expand(1, 300, 64), 100.0)
        >>> found[0, :65].topk(2).indices.sort().values  # steps of .02 s from .2 s: .5 s and 1 s
        tensor([15, 40])
    """
    if mel.dim() != 3 or mel.shape[2] < BANDS:
        raise ValueError(f"`mel` must be [N, frames, mels] with at least {BANDS} mels, got shape {tuple(mel.shape)}.")
    if mel.shape[1] < 3:  # too short for a spread
        return mel.new_zeros(len(mel), SIZE, dtype=torch.float32)
    level = torch.maximum(mel.float(), mel.float().amax((1, 2), keepdim=True) - _HEARD_DB)
    rise = level.diff(dim=1).clamp(min=0)
    onsets = torch.cat([rise.mean(2, keepdim=True), nn.functional.adaptive_avg_pool1d(rise, BANDS)], 2).mT
    mean, spread = onsets.mean(2), onsets.std(2)
    frames = onsets.shape[2]
    spectrum = torch.fft.rfft(onsets - mean[..., None], 2 * frames)
    correlation = torch.fft.irfft(spectrum.abs().square())[..., :frames]
    # The sum at lag k has frames - k terms: without this a long beat would look less steady than a short one.
    correlation = correlation * (frames / (frames - torch.arange(frames, device=mel.device)))
    correlation = correlation / correlation[..., :1].clamp(min=1e-6)
    first, behind = (round(lag * frames_per_s) for lag in LAGS_S)
    known = correlation[..., first : min(behind, frames // 2)]
    known = nn.functional.pad(known, (0, behind - first - known.shape[2]))
    steady = nn.functional.adaptive_avg_pool1d(known, LAGS)
    return torch.cat([steady, known.amax(2, keepdim=True), mean[..., None], spread[..., None]], 2).flatten(1)
