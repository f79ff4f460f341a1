"""Waveforms: reading, writing, resampling and loudness, through soundfile.

Audio is float32 in [-1, 1], shaped [B, C, T] (or [C, T] for one clip); `sampling_rate` is in Hz. Files are read and
written by soundfile and never by torchcodec, which does not load on CPU-only installations.
"""

import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyloudnorm
import soundfile
import torch
import torchaudio
from safetensors import SafetensorError
from torch import Tensor

MAX_DURATION_S = 30.0
"""Longest clip, in seconds, that MusicGen's positions cover; longer ones are refused, never cut silently."""

MAX_SAMPLING_RATE = 384_000
"""Highest rate, in Hz, of a file that is read: without one, a header could ask for any amount of memory for 30 s."""

MAX_CHANNELS = 8
"""Most channels of a file that is read."""

WRITABLE = (".wav", ".flac", ".ogg")
"""Suffixes of the files that are written."""

_WRITTEN_AT_ONCE = (
    65_536  # samples a channel; libsndfile's Vorbis encoder keeps them on the stack, which some millions overflow
)
_LARGEST_FILTER = 20_000_000  # taps of a resampling filter in all; rates without a common divisor need gigabytes
LOWEST_WEIGHTED_RATE = 4000  # Hz; BS.1770's shelf lies at 1.7 kHz, and its filter diverges where Nyquist is below
_SILENCE_PEAK = 1e-4  # below -80 dBFS nothing can be heard, and loudness matching would only amplify the noise


def _ogg_table_entry(byte: int) -> int:
    value = byte << 24
    for _ in range(8):
        value = value << 1 & 0xFFFFFFFF ^ (0x04C11DB7 if value >> 31 else 0)
    return value


_OGG_TABLE = [_ogg_table_entry(byte) for byte in range(256)]


class ClipTooLongError(ValueError):
    """A clip lasts longer than may be read."""


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary sibling of `path` (a file or a folder to be made); it replaces `path` on success only.

    On an error nothing is left behind and what stood at `path` stays as it was.

    Raises:
        OSError: the body could not write, a full disk say; it names `path` where what was raised names no file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    temporary = scratch / target.name
    try:
        yield temporary
        if target.is_dir() and not target.is_symlink():
            # A folder cannot be renamed over a full one: the old one steps aside until the new one stands.
            target.rename(scratch / "replaced")
        temporary.replace(target)
    except SafetensorError as error:
        raise OSError(f"{target} could not be written: {error}") from error
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        replaced = scratch / "replaced"
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)


def check_audio(audio: Tensor, name: str = "audio") -> None:
    """Refuse what no codec or reward can take.

    Args:
        audio: [B, C, T] or [C, T], floating point.
        name: what to call it in the message.

    Raises:
        ValueError: not a float tensor of two or three dimensions, empty, NaN or infinite.
    """
    if not isinstance(audio, Tensor) or not audio.is_floating_point():
        kind = audio.dtype if isinstance(audio, Tensor) else type(audio).__name__
        raise ValueError(f"`{name}` must be a float tensor [B, C, T], got {kind}; convert it with .float() in [-1, 1].")
    if audio.dim() not in (2, 3):
        raise ValueError(f"`{name}` must be [B, C, T] or [C, T], got shape {tuple(audio.shape)}.")
    if audio.numel() == 0:
        raise ValueError(f"`{name}` is empty (shape {tuple(audio.shape)}); give at least one sample.")
    if not torch.isfinite(audio).all():
        raise ValueError(f"`{name}` holds NaN or infinite samples; check how it was made or read.")


def resample(audio: Tensor, orig: int, new: int) -> Tensor:
    """Resample [..., T] from `orig` to `new` Hz; the length becomes ceil(T * new / orig).

    Raises:
        ValueError: a rate that is no whole number above 0, or two that have too little in common.
    """
    for name, rate in (("orig", orig), ("new", new)):
        if isinstance(rate, bool) or not isinstance(rate, int | np.integer) or rate <= 0:
            raise ValueError(f"`{name}` must be a sampling rate in Hz, a whole number above 0, got {rate!r}.")
    if orig == new:
        return audio
    common = math.gcd(int(orig), int(new))
    if (orig // common) * (new // common) > _LARGEST_FILTER:
        raise ValueError(
            f"`orig` = {orig} Hz and `new` = {new} Hz have only {common} Hz in common, so that the filter between them would "
            "not fit into memory; bring the sound to a usual rate first."
        )
    return torchaudio.functional.resample(audio, int(orig), int(new))


def match_loudness(audio: Tensor, sampling_rate: int, target_lufs: float = -23.0) -> Tensor:
    """Scale one clip [C, T] to `target_lufs` integrated loudness (ITU-R BS.1770 through pyloudnorm).

    Where the scaled clip would pass full scale it is turned down to a peak of 1 instead, so nothing clips. A silent
    clip comes back unchanged. Clips shorter than BS.1770's 0.4 s block are measured as one block. Below 4 kHz, where the
    standard's weighting filter does not exist, the level is taken unweighted.
    """
    check_audio(audio)
    if audio.dim() != 2:
        raise ValueError(f"`audio` must be one clip [C, T], got shape {tuple(audio.shape)}.")
    if sampling_rate < LOWEST_WEIGHTED_RATE:
        loudness = 10 * math.log10(float(audio.cpu().double().square().mean(1).sum()) + 1e-20) - 0.691
        loudness = loudness if loudness > -70 else -math.inf  # BS.1770's absolute gate
    else:
        # Half a sample less than all: pyloudnorm refuses a clip whose length, to seconds and back, is rounded up.
        block_s = min(0.4, (audio.shape[-1] - 0.5) / sampling_rate)
        meter = pyloudnorm.Meter(sampling_rate, block_size=block_s)
        loudness = meter.integrated_loudness(audio.T.cpu().double().numpy())
    if not math.isfinite(loudness):
        return audio
    scaled = audio * 10 ** ((target_lufs - loudness) / 20)
    return scaled / scaled.abs().max().clamp(min=1.0)


def read_audio(
    source: str | os.PathLike | bytes,
    *,
    sampling_rate: int | None = None,
    channels: int | None = None,
    max_duration_s: float = MAX_DURATION_S,
    start_s: float = 0.0,
    end_s: float | None = None,
) -> tuple[Tensor, int]:
    """Read one clip, or a part of it, from a file or from the bytes of one.

    Args:
        source: path, or the whole file as bytes (WAV, FLAC, OGG, MP3: whatever libsndfile reads).
        sampling_rate: resample to this rate in Hz; None keeps the file's own.
        channels: refuse the file unless it has as many channels; mono is copied to both sides where 2 are asked for.
        max_duration_s: refuse longer clips, in seconds.
        start_s, end_s: read this part only, in seconds from the start of the file; None is the file's end, and so is an
            `end_s` behind it. What is checked is the part.

    Returns:
        audio [C, T] float32 and its sampling rate in Hz.

    Raises:
        FileNotFoundError: there is no such file.
        ClipTooLongError: it lasts longer than `max_duration_s`; a ValueError, as all others here.
        ValueError: not audio, truncated, empty, silent, NaN, or stereo where mono is needed; a part that is none.
    """
    if not 0 <= start_s < (math.inf if end_s is None else end_s):
        raise ValueError(
            f"`start_s` is {start_s} and `end_s` {end_s}: a part starts at 0 s or later and ends after that."
        )
    label = "the given bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"`source`: there is no audio file {label}; check the path.")
    try:
        with soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            rate, first = file.samplerate, round(start_s * file.samplerate)
            if rate > MAX_SAMPLING_RATE or file.channels > MAX_CHANNELS:
                raise ValueError(
                    f"{label} has {file.channels} channels at {rate} Hz: at most {MAX_CHANNELS} at {MAX_SAMPLING_RATE} Hz are "
                    "read; convert it first."
                )
            last = file.frames if end_s is None else min(file.frames, round(end_s * rate))
            if 0 < file.frames <= first:
                raise ValueError(
                    f"{label} lasts {file.frames / rate:.1f} s: it has nothing from `start_s` = {start_s:g} on."
                )
            announced = last - first
            if announced / rate > max_duration_s:
                raise ClipTooLongError(
                    f"{label} lasts {announced / rate:.1f} s, more than `max_duration_s` = {max_duration_s:g}; "
                    "cut it into shorter clips first."
                )
            if first:
                file.seek(first)
            samples = file.read(announced, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(
            f"{label} cannot be read as audio ({error.error_string.strip()}): it is no audio file, or it was cut short. "
            "Give a whole WAV, FLAC, OGG or MP3 file."
        ) from None
    if len(samples) == 0:
        raise ValueError(f"{label} is empty: it holds no samples; record or export it again.")
    if len(samples) < announced or _wav_is_cut_short(source):
        raise ValueError(
            f"{label} is truncated: {len(samples)} samples of those that its header announces; copy the whole file again."
        )
    audio = torch.from_numpy(np.ascontiguousarray(samples.T))
    check_audio(audio, label)
    if audio.abs().max() < _SILENCE_PEAK:
        raise ValueError(f"{label} is silent (peak {audio.abs().max():.1e}); leave it out or render it again.")
    if channels is not None and audio.shape[0] != channels:
        if audio.shape[0] != 1:
            raise ValueError(
                f"{label} has {audio.shape[0]} channels where {channels} are needed; mix it down yourself first "
                "(for example with `audio.mean(0, keepdim=True)`)."
            )
        audio = audio.expand(channels, -1).contiguous()
    if sampling_rate is not None:
        audio, rate = resample(audio, rate, sampling_rate), sampling_rate
    return audio, rate


def _wav_is_cut_short(source: str | os.PathLike | bytes) -> bool:
    """libsndfile quietly shortens a WAV file that ends before its header says; the header still knows."""
    if isinstance(source, bytes):
        head, size = source[:12], len(source)
    else:
        with open(source, "rb") as file:
            head = file.read(12)
        size = Path(source).stat().st_size
    announced = int.from_bytes(head[4:8], "little") + 8
    is_wav = head[:4] == b"RIFF" and head[8:12] == b"WAVE"
    return is_wav and announced < 0xFFFFFFFF and announced > size + 1  # streamed files announce the largest number


def write_audio(path: str | os.PathLike, audio: Tensor, sampling_rate: int) -> None:
    """Write one clip [C, T] as 16-bit WAV or FLAC, or as OGG (Vorbis), by the suffix of `path`; samples beyond full scale are clipped.

    Raises:
        ValueError: another suffix, or `audio` that is not a finite [C, T] tensor.
    """
    check_suffix(path, "path")
    data = audio_bytes(audio, sampling_rate, Path(path).suffix.lower()[1:])
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def check_suffix(path: str | os.PathLike, name: str) -> None:
    """Refuse a file that :func:`write_audio` cannot write, under the name of the argument that asked for it."""
    if Path(path).suffix.lower() not in WRITABLE:
        raise ValueError(f"`{name}` must end in .wav, .flac or .ogg, got {str(path)!r}; give it one of these endings.")


def audio_bytes(audio: Tensor, sampling_rate: int, format: str = "flac") -> bytes:
    """One clip [C, T] as the bytes of a 16-bit "flac" or "wav" file, or of an "ogg" file (Vorbis).

    The same clip gives the same bytes. Vorbis is lossy.
    """
    check_audio(audio)
    if audio.dim() != 2:
        raise ValueError(f"`audio` must be one clip [C, T], got shape {tuple(audio.shape)}; write clips one by one.")
    buffer = io.BytesIO()
    samples = audio.detach().float().clamp(-1, 1).T.cpu().numpy()
    subtype = "VORBIS" if format == "ogg" else "PCM_16"
    with soundfile.SoundFile(buffer, "w", int(sampling_rate), samples.shape[1], subtype, format=format.upper()) as file:
        for start in range(0, len(samples), _WRITTEN_AT_ONCE):
            file.write(samples[start : start + _WRITTEN_AT_ONCE])
    return _without_serial(buffer.getvalue()) if format == "ogg" else buffer.getvalue()


def _without_serial(ogg: bytes) -> bytes:
    """An Ogg file of one stream whose serial number, which libsndfile draws anew each time, is 0 (RFC 3533, section 6)."""
    data, start = bytearray(ogg), 0
    while start < len(data):
        body = start + 27 + data[start + 26]  # behind the header: 27 bytes, and one for each of the page's segments
        end = body + sum(data[start + 27 : body])
        data[start + 14 : start + 18] = bytes(4)  # the serial number
        data[start + 22 : start + 26] = bytes(4)  # the checksum counts as 0 in itself
        data[start + 22 : start + 26] = _ogg_checksum(data[start:end]).to_bytes(4, "little")
        start = end
    return bytes(data)


def _ogg_checksum(page: bytes | bytearray) -> int:
    """CRC-32 of polynomial 0x04C11DB7 that begins at 0, the highest bit first, unlike zlib's."""
    checksum = 0
    for byte in page:
        checksum = (checksum << 8 & 0xFFFFFFFF) ^ _OGG_TABLE[checksum >> 24 ^ byte]
    return checksum
