"""Clips of preference rows as the sequences of ids that TRL's reward trainer sees, each clip encoded once.

A generator backbone's sequence is the prompt's flat ids and then the clip's. A CLAP backbone is frozen: its sequence is one
id, the number of a row in a table of the features that its head reads.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..audio import atomic_path, read_audio
from ..flat import FlatTokenizer, flatten_codes
from ..preferences.codes import clip_hash, clip_reader, read_index
from ..preferences.schema import AUDIO_COLUMNS
from ..rewards.preference import PreferenceModel

_AT_ONCE, _WAITING = 16, 64  # clips in one pass of the encoder; in memory, where few are equally long
_SHARD_CLIPS = 256  # clips a cache file, and at most so many are lost when a run is cut short


class ClipSequences:
    """Turns rows into pairs of sequences for one model.

    Clips are read from the cache where an earlier run with the same frozen encoder left them. Codes stay there; of a CLAP
    backbone the features are held in memory.

    Args:
        model: whose codes or features they are.
        crop_s: seconds from the start of each clip.
        cache_dir: folder of the cache; may be shared by data sets, models and processes.

    Attributes:
        table: features [N, D] of a CLAP backbone, of all rows asked for so far.
    """

    def __init__(self, model: PreferenceModel, crop_s: float, cache_dir: str | Path):
        self.model = model
        self.crop_s = crop_s
        self.folder = Path(cache_dir) / _identity(model, crop_s)
        self._features: list[Tensor] = []
        self._rows: dict[tuple[str, str], list[int]] = {}

    @property
    def table(self) -> Tensor:
        return torch.cat(self._features)

    def of_rows(self, ds: Dataset) -> Iterator[tuple[list[int], list[int]]]:
        """Sequences of the chosen and the rejected clip of each row, one row after the other."""
        read = clip_reader(self.encode(ds, range(len(ds))))
        for row in tqdm(ds, desc="making sequences", unit="pair", leave=False, disable=len(ds) < 500 or None):
            chosen, rejected = (
                self._sequence(row["prompt"], clip_hash(row[side]["bytes"]), read) for side in AUDIO_COLUMNS
            )
            yield chosen, rejected

    def _sequence(self, prompt: str, key: str, read: Callable[[str], Tensor]) -> list[int]:
        if self.model.config.backbone != "clap":
            return self._with_prompt(prompt, read(key))
        if (prompt, key) not in self._rows:
            self._rows[prompt, key] = self._with_prompt(prompt, read(key))
        return self._rows[prompt, key]

    def _with_prompt(self, prompt: str, clip: Tensor) -> list[int]:
        if self.model.config.backbone == "clap":
            self._features.append(self.model.with_text([prompt], clip[None].to(self.model.device)).cpu())
            return [len(self._features) - 1]
        config = self.model.config.generator
        text = FlatTokenizer.for_generator(self.model.generator)(prompt)["input_ids"]
        return text + flatten_codes(clip.long()[None], config.codebook_size, config.audio_channels)[0].tolist()

    def encode(self, ds: Dataset, rows: range) -> dict[str, Path]:
        """Where the codes [K, F] or the sound vector [D] of every clip of these rows lie, by the hash of its bytes.

        Raises:
            ValueError: a clip that cannot be read, naming the row.
        """
        known = read_index(self.folder)
        fresh: dict[str, Tensor] = {}
        waiting: dict[tuple, dict[str, tuple[Tensor, str]]] = defaultdict(dict)  # by what a batch has to share
        asked = tqdm(ds.select(rows), desc="encoding clips", unit="pair", leave=False, disable=None)
        for number, row in zip(rows, asked, strict=True):
            for side in AUDIO_COLUMNS:
                key = clip_hash(row[side]["bytes"])
                if key in known or key in fresh or any(key in clips for clips in waiting.values()):
                    continue
                with _named(f"row {number}: {side}"):
                    audio, rate = read_audio(row[side]["bytes"])
                audio = audio[:, : math.ceil(self.crop_s * rate)]
                alike = (rate, *audio.shape)
                waiting[alike][key] = audio, f"row {number}: {side}"
                if len(waiting[alike]) == _AT_ONCE or sum(map(len, waiting.values())) == _WAITING:
                    fullest = max(waiting, key=lambda shape: len(waiting[shape]))
                    fresh |= self._encode(waiting.pop(fullest), fullest[0])
            if len(fresh) >= _SHARD_CLIPS:
                known |= dict.fromkeys(fresh, self._write_cache(fresh))
                fresh = {}
        for (rate, *_), clips in waiting.items():
            fresh |= self._encode(clips, rate)
        if fresh:
            known |= dict.fromkeys(fresh, self._write_cache(fresh))
        return known

    def _encode(self, clips: dict[str, tuple[Tensor, str]], rate: int) -> dict[str, Tensor]:
        """Codes or sound vectors of clips [C, T] of one shape and rate, by their keys; an error names the first one's row."""
        audio = torch.stack([clip for clip, _ in clips.values()])
        with _named(next(place for _, place in clips.values())):
            if self.model.config.backbone == "clap":
                encoded = self.model.sound(audio, rate).cpu()
            else:
                encoded = self.model.encode_audio(audio, rate).to("cpu", torch.int16)
        return dict(zip(clips, encoded.unbind(), strict=True))

    def _write_cache(self, clips: dict[str, Tensor]) -> Path:
        # Named by its content, so that two processes that encode the same clips write the same file.
        path = self.folder / f"{hashlib.sha256(''.join(sorted(clips)).encode()).hexdigest()[:32]}.safetensors"
        with atomic_path(path) as temporary:
            save_file({key: clip.contiguous() for key, clip in clips.items()}, temporary)
        return path


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Put the place before what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _identity(model: PreferenceModel, crop_s: float) -> str:
    """A hash of everything that a clip's codes or vector depend on beside the clip."""
    config = model.config
    if config.backbone == "clap":
        frozen = model.sound.encoder.audio_model.state_dict() | model.sound.encoder.audio_projection.state_dict()
        settings: list = [config.pooling, config.feature_extractor]
    else:
        frozen = model.generator.audio_encoder.state_dict()
        settings = [config.generator.num_codebooks, config.generator.audio_channels, model.generator.sampling_rate]
    digest = hashlib.sha256(json.dumps([settings, config.loudness_lufs, crop_s], sort_keys=True).encode())
    for name, tensor in sorted(frozen.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
