"""Codes of every clip of a preference data set, encoded once and kept on disk.

Training on preferences then never runs the codec. The cache is a folder of safetensors files whose tensors are named
by the hash of the clip's bytes, under a folder named by the hash of the codec's weights, so that a clip or a codec
that changed is encoded again and nothing stale is read.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..audio import atomic_path, read_audio
from ..codec import AudioCodec
from ..generator import MusicRLForConditionalGeneration
from .schema import AUDIO_COLUMNS

CODE_COLUMNS = tuple(f"{column}_codes" for column in AUDIO_COLUMNS)
CODEC_COLUMN = "codec"
CODE_FEATURES = Features({name: List(List(Value("int16"))) for name in CODE_COLUMNS} | {CODEC_COLUMN: Value("string")})
_SHARD_CLIPS = 512  # clips a cache file, and at most so many are lost when a run is cut short
_CHUNK = 64  # rows whose codes are in memory at once
_OPEN_FILES = 8  # cache files that are open at once: rows that stand together were encoded together
_HASH_CHARACTERS = 32


class ClipEncoder:
    """Clips to codes through a generator (whose stereo codebooks alternate sides) or through a bare codec.

    Attributes:
        sampling_rate: Hz; channels: C; device: where the codec is.
        identity: hash of the codec's weights, of the settings that shape its codes and of the stereo layout.

    Raises:
        ValueError: a codec whose codes do not fit int16.
    """

    def __init__(self, generator_or_codec: MusicRLForConditionalGeneration | AudioCodec):
        self._source = generator_or_codec
        if isinstance(generator_or_codec, MusicRLForConditionalGeneration):
            codec = generator_or_codec.codec
            self.channels, layout = generator_or_codec.config.audio_channels, "alternating"
        else:
            codec = generator_or_codec
            self.channels, layout = codec.channels, "plain"
        self.sampling_rate = codec.sampling_rate
        self.device = codec.model.device
        if codec.codebook_size > torch.iinfo(torch.int16).max + 1:
            raise ValueError(f"codebook_size is {codec.codebook_size}: codes are kept as int16, so up to 32768")
        config = codec.model.config
        layout = layout if self.channels > 1 else "plain"  # a mono generator's codes are its codec's own
        settings = (codec.num_codebooks, self.channels, layout, codec.sampling_rate, config.upsampling_ratios)
        shape = (config.normalize, config.chunk_length, config.chunk_stride, config.use_causal_conv, config.pad_mode)
        digest = hashlib.sha256(repr((*settings, *shape)).encode())
        for name, tensor in sorted(codec.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        self.identity = digest.hexdigest()[:_HASH_CHARACTERS]

    def __call__(self, audio: Tensor) -> Tensor:
        """Audio [B, C, T] to codes [B, K, F] int16 on the CPU."""
        if isinstance(self._source, MusicRLForConditionalGeneration):
            codes = self._source.encode_audio(audio.to(self.device))
        else:
            codes = self._source.encode(audio.to(self.device)).codes
        return codes.to("cpu", torch.int16)


def cache_codes(
    ds: Dataset,
    generator_or_codec: MusicRLForConditionalGeneration | AudioCodec,
    cache_dir: str | Path,
    *,
    batch_size: int = 8,
    keep_audio: bool = True,
) -> Dataset:
    """Add the codes of both clips to each row.

    Each distinct clip is encoded once, whatever the number of rows it is in; what an earlier call encoded is read from
    `cache_dir`. Clips of another sampling rate are resampled; mono is copied to both sides of a stereo generator. The codes
    stay in a file that is mapped into memory: a set may be larger than that.

    Args:
        ds: validated preferences. Rows that already hold codes of the same codec keep them (those that `sample_pairs`
            wrote are the very codes that were sampled, which encoding the sound again would not give back).
        generator_or_codec: whose codec encodes the clips.
        cache_dir: folder of the cache; may be shared by data sets, codecs and processes.
        batch_size: clips of equal length that are encoded together.
        keep_audio: False leaves the clips themselves out of what is returned.

    Returns:
        `ds` with `chosen_codes` and `rejected_codes` (lists [K, F], int16) and `codec`, the codec's identity.

    Raises:
        ValueError: if a clip is stereo and the codec mono, lasts over 30 s or cannot be read, naming the row; if a
            cache file is damaged; if codes do not fit int16.
    """
    encoder = ClipEncoder(generator_or_codec)
    kept = list(ds.column_names) if keep_audio else [name for name in ds.column_names if name not in AUDIO_COLUMNS]
    done = _has_codes(ds, encoder)
    if done and all(done):
        return ds.select_columns(kept)
    folder = Path(cache_dir) / encoder.identity
    keys, first_row = _clip_keys(ds, range(len(ds)), done)
    known = _encode_missing(ds, first_row, encoder, folder, batch_size)
    codes = _codes_on_disk(ds, keys, clip_reader(known), encoder.identity, folder)
    bare = ds.select_columns([name for name in kept if name not in CODE_FEATURES])
    return concatenate_datasets([bare, codes], axis=1)


def encode_clips(
    ds: Dataset,
    rows: range,
    generator_or_codec: MusicRLForConditionalGeneration | AudioCodec,
    cache_dir: str | Path,
    *,
    batch_size: int = 8,
) -> None:
    """Put the codes of these rows' clips into the cache, where `cache_codes` finds them: several processes take a share each.

    Raises:
        ValueError: as `cache_codes`.
    """
    encoder = ClipEncoder(generator_or_codec)
    _, first_row = _clip_keys(ds, rows, _has_codes(ds, encoder))
    _encode_missing(ds, first_row, encoder, Path(cache_dir) / encoder.identity, batch_size)


def _has_codes(ds: Dataset, encoder: ClipEncoder) -> list[bool]:
    """Whether each row holds codes of this codec."""
    held = ds[CODEC_COLUMN] if CODEC_COLUMN in ds.column_names else [None] * len(ds)
    return [identity == encoder.identity for identity in held]


def _encode_missing(
    ds: Dataset, first_row: dict[str, tuple[int, str]], encoder: ClipEncoder, folder: Path, batch_size: int
) -> dict[str, Path]:
    """Which file of the cache holds which clip, once it holds all of these."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: encode at least one clip at a time")
    folder.mkdir(parents=True, exist_ok=True)
    known = read_index(folder)
    missing = [(key, row, column) for key, (row, column) in first_row.items() if key not in known]
    with tqdm(total=len(missing), desc="encoding clips", disable=not missing or None) as bar:
        for start in range(0, len(missing), _SHARD_CLIPS):
            encoded = dict(_encode(ds, missing[start : start + _SHARD_CLIPS], encoder, batch_size, bar))
            # Named by its content, so that two processes that encode the same clips write the same file.
            name = hashlib.sha256("".join(sorted(encoded)).encode()).hexdigest()[:_HASH_CHARACTERS]
            with atomic_path(folder / f"{name}.safetensors") as temporary:
                save_file(encoded, temporary)
            known |= dict.fromkeys(encoded, folder / f"{name}.safetensors")
    return known


def _codes_on_disk(
    ds: Dataset, keys: Sequence[Sequence[str | None]], read: Callable[[str], Tensor], identity: str, folder: Path
) -> Dataset:
    """The codes of each row, in a file of the cache that is called by its content; a row without a key has its own."""
    number, written = tempfile.mkstemp(prefix=".rows-", dir=folder)
    os.close(number)
    try:
        with pa.ipc.new_stream(written, CODE_FEATURES.arrow_schema) as stream:
            for start in range(0, len(ds), _CHUNK):
                rows = range(start, min(start + _CHUNK, len(ds)))
                columns = []
                for name, of in zip(CODE_COLUMNS, keys, strict=True):
                    codes = [_own(ds, row, name) if (key := of[row]) is None else read(key) for row in rows]
                    columns.append(codes_column(codes))
                stream.write(pa.record_batch([*columns, pa.array([identity] * len(rows))], CODE_FEATURES.arrow_schema))
        with open(written, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:_HASH_CHARACTERS]
        os.replace(written, folder / f"{digest}.arrow")
    finally:
        Path(written).unlink(missing_ok=True)
    return Dataset.from_file(str(folder / f"{digest}.arrow"))


def _own(ds: Dataset, row: int, column: str) -> Tensor:
    return torch.tensor(ds[row][column], dtype=torch.int16)


def codes_column(codes: Sequence[Tensor]) -> pa.Array:
    """Codes [K, F] of each row as one Arrow column, without a Python number for each code."""
    rows = np.cumsum([0, *(len(clip) for clip in codes)], dtype=np.int32)
    frames = np.cumsum([0, *(clip.shape[1] for clip in codes for _ in clip)], dtype=np.int32)
    values = torch.cat([clip.to(torch.int16).flatten() for clip in codes]).numpy()
    return pa.ListArray.from_arrays(pa.array(rows), pa.ListArray.from_arrays(pa.array(frames), pa.array(values)))


def clip_hash(data: bytes) -> str:
    """Identity of a clip: a hash of the bytes of its file."""
    return hashlib.sha256(data).hexdigest()[:_HASH_CHARACTERS]


def _clip_keys(
    ds: Dataset, rows: range, done: Sequence[bool]
) -> tuple[list[list[str | None]], dict[str, tuple[int, str]]]:
    """Each column's clip hashes in these rows (None in those that are done), and where each distinct clip is first met."""
    columns: list[list[str | None]] = [[] for _ in AUDIO_COLUMNS]
    first_row: dict[str, tuple[int, str]] = {}
    for row, clips in zip(rows, ds.select_columns(list(AUDIO_COLUMNS)).select(rows), strict=True):
        for keys, column in zip(columns, AUDIO_COLUMNS, strict=True):
            if done[row]:
                keys.append(None)
                continue
            key = clip_hash(clips[column]["bytes"])
            keys.append(key)
            first_row.setdefault(key, (row, column))
    return columns, first_row


def _encode(
    ds: Dataset, clips: Sequence[tuple[str, int, str]], encoder: ClipEncoder, batch_size: int, bar: tqdm
) -> Iterator[tuple[str, Tensor]]:
    """Codes [K, F] of each clip. Only clips of equal length share a batch: padding would change the last frames."""

    def encode_batch(batch: Sequence[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        codes = encoder(torch.stack([clip for _, clip in batch]))
        bar.update(len(batch))
        yield from ((key, clip.clone()) for (key, _), clip in zip(batch, codes, strict=True))

    by_length: dict[int, list[tuple[str, Tensor]]] = {}
    for key, row, column in clips:
        try:
            audio, _ = read_audio(
                ds[row][column]["bytes"], sampling_rate=encoder.sampling_rate, channels=encoder.channels
            )
        except ValueError as error:
            raise ValueError(f"row {row}: {column}: {error}") from error
        waiting = by_length.setdefault(audio.shape[-1], [])
        waiting.append((key, audio))
        if len(waiting) == batch_size:
            yield from encode_batch(by_length.pop(audio.shape[-1]))
    for batch in by_length.values():
        yield from encode_batch(batch)


def read_index(folder: Path) -> dict[str, Path]:
    """Which file of a cache folder holds which clip.

    Raises:
        ValueError: naming a file that is damaged.
    """
    index: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                index.update(dict.fromkeys(file.keys(), path))
        except SafetensorError as error:
            raise ValueError(
                f"cache file {path} is damaged ({error}): delete it, its clips are encoded again"
            ) from error
    return index


def clip_reader(index: dict[str, Path]) -> Callable[[str], Tensor]:
    """Reads clips of an index one at a time, by their hash."""
    opened = lru_cache(_OPEN_FILES)(lambda path: safe_open(path, framework="pt"))
    return lambda key: opened(index[key]).get_tensor(key)
