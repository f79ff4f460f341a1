"""What can be measured on a waveform without a model: pitch, noise, rhythm, silence, clipping, brightness.

The simulated listeners and the objective metrics are both built on these. Windows are set in seconds, so every function
takes any sampling rate; frequencies above half of it are left out.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .audio import check_audio

WINDOW_S = 0.128  # long enough to part neighbouring semitones from 130 Hz upwards
HOP_S = 0.020
PITCH_RANGE_HZ = (130.0, 2100.0)  # C3 to C7
MAJOR_SCALE = (0, 2, 4, 5, 7, 9, 11)
SILENCE_DBFS = -60.0
CLIPPING_LEVEL = 0.999  # a 16-bit file's full scale is 0.99997
AUDIBLE_ONSET = 0.02  # nats; below it a held sound's own ripple would count as notes
BEAT_PERIOD_S = (0.24, 1.5)  # 250 to 40 beats a minute


@dataclass(frozen=True)
class Spectrum:
    """Power spectrogram of a batch of clips, averaged over channels.

    power: [B, bins, frames]; frequencies: [bins] in Hz; hop_s: seconds between frames.
    """

    power: Tensor
    frequencies: Tensor
    hop_s: float

    @cached_property
    def chroma(self) -> Tensor:
        """See `chroma`; [B, 12, frames]."""
        return chroma(self)

    @cached_property
    def onsets(self) -> Tensor:
        """See `onset_strength`; [B, frames - 1]."""
        return onset_strength(self)


def spectrum(audio: Tensor, sampling_rate: int) -> Spectrum:
    """Power spectrogram with a Hann window of `WINDOW_S` seconds.

    Args:
        audio: [B, C, T], float, at least one window long.
        sampling_rate: in Hz.

    Raises:
        ValueError: if the audio is not [B, C, T], not finite, or shorter than a window.
    """
    check_audio(audio)
    if audio.dim() != 3:
        raise ValueError(f"audio has shape {list(audio.shape)}: give a batch [B, C, T]")
    size = 2 ** round(np.log2(WINDOW_S * sampling_rate))
    hop = max(1, round(HOP_S * sampling_rate))
    if audio.shape[-1] < size:
        raise ValueError(
            f"audio lasts {audio.shape[-1] / sampling_rate:.3f} s: it has to last {size / sampling_rate:.3f} s or more"
        )
    mono = audio.float().mean(dim=1)
    window = torch.hann_window(size, device=mono.device)
    power = torch.stft(mono, size, hop, window=window, center=False, return_complex=True).abs() ** 2
    frequencies = torch.fft.rfftfreq(size, 1 / sampling_rate, device=mono.device)
    return Spectrum(power / size, frequencies, hop / sampling_rate)


def chroma(spec: Spectrum) -> Tensor:
    """Energy of the spectral peaks in each pitch class (C first), [B, 12, frames], not normalised.

    Only local maxima count, each at its interpolated frequency and weighted down as it leaves the tempered pitch, so
    that the flanks of a strong partial are not taken for its neighbours.
    """
    low, high = PITCH_RANGE_HZ
    step = float(spec.frequencies[1])
    first = max(1, int(np.ceil(low / step)))
    last = min(len(spec.frequencies) - 1, int(high / step))
    if last <= first:
        return spec.power.new_zeros(spec.power.shape[0], 12, spec.power.shape[2])
    left, centre, right = (spec.power[:, first + k : last + k] for k in (-1, 0, 1))
    peak = (centre > left) & (centre >= right)
    # A parabola through the logarithms of three bins places a Hann window's peak to about a hundredth of a bin.
    log_left, log_centre, log_right = (torch.log(part + 1e-12) for part in (left, centre, right))
    curvature = (log_left - 2 * log_centre + log_right).clamp(max=-1e-6)
    offset = (0.5 * (log_left - log_right) / curvature).clamp(-0.5, 0.5)
    frequency = (torch.arange(first, last, device=offset.device).view(1, -1, 1) + offset) * step
    semitone = 69 + 12 * torch.log2(frequency / 440.0)
    nearest = semitone.round()
    in_tune = torch.cos(torch.pi * (semitone - nearest)).clamp(min=0)  # 1 on the pitch, 0 a quarter tone off
    energy = torch.where(peak, centre * in_tune, torch.zeros_like(centre))
    out = spec.power.new_zeros(spec.power.shape[0], 12, spec.power.shape[2])
    return out.scatter_add_(1, nearest.long() % 12, energy)


def harmony_distances(spec: Spectrum) -> Tensor:
    """One minus the cosine of two clips' pitch classes, [B, B] in [0, 1]; 0 where either clip has no pitch that can be heard.

    Else silence would be further from every clip, and from other silence, than any music is.
    """
    pitch = spec.chroma.sum(dim=2)
    size = 2 * (len(spec.frequencies) - 1)
    loudest = spec.power.amax(dim=(1, 2)) / size  # a sine of full scale has about 1/16
    heard = (pitch.sum(dim=1) > 1e-9) & (loudest > 10 ** (SILENCE_DBFS / 10) / 16)
    unit = torch.nn.functional.normalize(pitch, dim=1)
    return (1 - unit @ unit.T).clamp(min=0) * (heard[:, None] & heard[None])


def diatonic_share(spec: Spectrum) -> Tensor:
    """Share of the pitch energy that lies in the clip's best diatonic scale, [B] in [0, 1].

    All twelve transpositions of the seven-note scale are tried; major and natural minor are the same seven notes. Noise
    has about 7 / 12, and a silent clip has 0.
    """
    energy = spec.chroma.sum(dim=2)
    scales = energy.new_zeros(12, 12)
    for root in range(12):
        scales[root, [(root + degree) % 12 for degree in MAJOR_SCALE]] = 1
    total = energy.sum(dim=1)
    return (energy @ scales.T).max(dim=1).values / total.clamp(min=1e-9)


def spectral_flatness(spec: Spectrum) -> Tensor:
    """Geometric over arithmetic mean of the power spectrum, energy-weighted over frames, [B] in [0, 1].

    White noise comes near 0.56 (the expectation for one periodogram), a sine near 0; a silent clip has 1.
    """
    power = spec.power[:, 1:] + 1e-12
    flatness = torch.exp(torch.log(power).mean(dim=1)) / power.mean(dim=1)
    weight = power.mean(dim=1)
    return (flatness * weight).sum(dim=1) / weight.sum(dim=1)


def silence_share(audio: Tensor, sampling_rate: int) -> Tensor:
    """Share of the 20 ms blocks whose level is below -60 dBFS, [B] in [0, 1]. `audio` is [B, C, T]."""
    check_audio(audio)
    block = max(1, round(HOP_S * sampling_rate))
    blocks = audio.float()[..., : audio.shape[-1] // block * block].unflatten(-1, (-1, block))
    level = blocks.pow(2).mean(dim=(1, 3))
    return (level < 10 ** (SILENCE_DBFS / 10)).float().mean(dim=1)


def clipping_share(audio: Tensor) -> Tensor:
    """Share of the samples at or above full scale, [B] in [0, 1]. `audio` is [B, C, T]."""
    check_audio(audio)
    return (audio.abs() >= CLIPPING_LEVEL).float().mean(dim=(1, 2))


def band_energy(spec: Spectrum) -> Tensor:
    """Energy in third-octave bands upwards from 50 Hz, [B, bands, frames]."""
    band = (3 * torch.log2(spec.frequencies[1:].clamp(min=50.0) / 50.0)).long()
    energy = spec.power.new_zeros(len(spec.power), int(band.max()) + 1, spec.power.shape[2])
    return energy.index_add_(1, band, spec.power[:, 1:])


def onset_strength(spec: Spectrum) -> Tensor:
    """Half-wave rectified rise of the log energy, averaged over third-octave bands, [B, frames - 1] in nats.

    Energy more than 40 dB below the loudest band of the clip is not heard.
    """
    energy = band_energy(spec)
    reference = energy.amax(dim=(1, 2), keepdim=True).clamp(min=1e-9)
    level = torch.log(energy / reference + 1e-4)
    return (level[:, :, 1:] - level[:, :, :-1]).clamp(min=0).mean(dim=1)


def rhythmic_steadiness(spec: Spectrum) -> Tensor:
    """Highest autocorrelation of the onset strength between 40 and 250 beats a minute, [B] in [0, 1].

    1 is a metronome; noise and held chords come near 0.
    """
    onsets = spec.onsets
    onsets = onsets - onsets.mean(dim=1, keepdim=True)
    frames = onsets.shape[1]
    first, last = (round(period / spec.hop_s) for period in BEAT_PERIOD_S)
    last = min(last, frames // 2)
    if last <= first:
        return onsets.new_zeros(len(onsets))
    correlation = torch.fft.irfft(torch.fft.rfft(onsets, 2 * frames).abs() ** 2)[:, : last + 1]
    # The sum at lag k has frames - k terms; without this a long beat would look less steady than a short one.
    unbiased = correlation * (frames / (frames - torch.arange(last + 1, device=onsets.device)))
    steadiness = (unbiased[:, first:] / correlation[:, :1].clamp(min=1e-9)).max(dim=1).values.clamp(0, 1)
    return torch.where(onsets.amax(dim=1) > AUDIBLE_ONSET, steadiness, torch.zeros_like(steadiness))


def onset_rate(spec: Spectrum) -> Tensor:
    """Onsets a second: the local maxima of the onset strength above a quarter of its largest, [B]."""
    onsets = spec.onsets
    if onsets.shape[1] < 3:
        return onsets.new_zeros(len(onsets))
    smooth = torch.nn.functional.avg_pool1d(onsets[:, None], 3, 1, 1)[:, 0]
    centre = smooth[:, 1:-1]
    high = centre > (0.25 * smooth.amax(dim=1, keepdim=True)).clamp(min=AUDIBLE_ONSET)
    peaks = (centre > smooth[:, :-2]) & (centre >= smooth[:, 2:]) & high
    return peaks.float().sum(dim=1) / (onsets.shape[1] * spec.hop_s)


def brightness(spec: Spectrum) -> Tensor:
    """Spectral centroid in octaves above 100 Hz, energy-weighted over the clip, [B]; 0 for silence."""
    power = spec.power.sum(dim=2)
    total = power.sum(dim=1)
    centroid = (power * spec.frequencies).sum(dim=1) / total.clamp(min=1e-12)
    return torch.where(total > 1e-9, torch.log2(centroid.clamp(min=100.0) / 100.0), torch.zeros_like(total))


def variety(spec: Spectrum) -> Tensor:
    """How much the harmony moves: mean distance between the chroma of half-second segments, [B] in [0, 1].

    0 for one held note or for fewer than two segments.
    """
    energy = spec.chroma
    size = max(1, round(0.5 / spec.hop_s))
    count = energy.shape[2] // size
    if count < 2:
        return energy.new_zeros(len(energy))
    segments = energy[..., : count * size].unflatten(2, (count, size)).sum(dim=3).transpose(1, 2)
    unit = segments / segments.norm(dim=2, keepdim=True).clamp(min=1e-9)
    similarity = unit @ unit.transpose(1, 2)
    heard = segments.sum(dim=2) > 1e-9
    pairs = (heard[:, :, None] & heard[:, None, :]) & ~torch.eye(count, dtype=torch.bool, device=heard.device)
    distance = ((1 - similarity) * pairs).sum(dim=(1, 2))
    return distance / pairs.sum(dim=(1, 2)).clamp(min=1)
