"""Where every importer ends: comparisons become rows, clips are read and brought to one loudness, losses are counted."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict
from torch import Tensor
from tqdm.auto import tqdm

from ...audio import ClipTooLongError, audio_bytes, match_loudness, read_audio
from ...licences import SOURCE_ADDRESSES, SOURCE_LICENCES, published_source
from ...records import ImportRecord, read_import
from ..schema import DECIDED, FEATURES, check_target, normalise_prompt, preferences_from_rows, save_preferences

LOUDNESS_LUFS = -23.0  # EBU R 128
_CHUNK = 32  # rows that are in memory at once
_CLIPS_KEPT = 64  # encoded clips that are in memory at once, for those that stand in several comparisons


@dataclass(frozen=True)
class ClipOptions:
    """What is done to the clips of an import.

    Attributes:
        crop_s: keep the first seconds of each clip only; None keeps all, and refuses clips that last over 30 s.
        loudness_lufs: loudness that every clip is brought to, so that the louder one is not told by its level; None
            leaves levels as they are.
        skip_bad_clips: leave out, and count, comparisons with a clip that is missing, unreadable, silent or too long,
            where an import would otherwise stop.
    """

    crop_s: float | None = None
    loudness_lufs: float | None = LOUDNESS_LUFS
    skip_bad_clips: bool = False

    def __post_init__(self) -> None:
        if self.crop_s is not None and not 0 < self.crop_s < math.inf:
            raise ValueError(f"crop_s is {self.crop_s}: keep more than 0 seconds, or None for all")


@dataclass(frozen=True)
class Clip:
    """One clip of a comparison: where its sound lies, and which part of it was judged.

    Attributes:
        name: path in the data set, for messages and for the row.
        load: gives the file, or its bytes.
        system: what made it.
        begin_s, end_s: the part that was judged, in seconds from the start of the file; None is its end.
        where: the row of the table that names it, for messages; "" where that is the comparison's own.
    """

    name: str
    load: Callable[[], Path | bytes] = field(compare=False, repr=False)
    system: str = "unknown"
    begin_s: float = 0.0
    end_s: float | None = None
    where: str = field(default="", compare=False)

    def read(self, crop_s: float | None = None) -> tuple[Tensor, int]:
        """The part as audio [C, T] and its sampling rate in Hz; with `crop_s` no more of it than these first seconds.

        Raises:
            FileNotFoundError, ClipTooLongError, ValueError: see `musicrl_hf.audio.read_audio`.
        """
        ends = [] if crop_s is None else [self.begin_s + crop_s]
        ends += [] if self.end_s is None else [self.end_s]
        source = self.load()
        try:
            return read_audio(source, start_s=self.begin_s, end_s=min(ends, default=None))
        except ValueError as error:
            if isinstance(source, Path):
                raise
            raise type(error)(f"{self.name}: {error}") from error  # bytes have no name of their own


@dataclass(frozen=True)
class Comparison:
    """What one listener chose between the clips a and b for one prompt; `where` is what messages call it."""

    where: str
    prompt: str
    a: Clip
    b: Clip
    preference: str  # a, b, tie or both_bad
    listener: str = "unknown"
    confidence: float | None = None  # 1 to 5
    seconds_a: float | None = None  # heard
    seconds_b: float | None = None
    created_at: str | None = None  # ISO 8601; None is now
    split: str = "train"

    def row(self, audio: Mapping[str, dict[str, Any]], source: str, now: str) -> dict[str, Any]:
        """The preference row, with the encoded clips of `audio` ("a" and "b")."""
        chosen, rejected = ("b", "a") if self.preference == "b" else ("a", "b")
        clips = {"a": self.a, "b": self.b}
        seconds = {"a": self.seconds_a, "b": self.seconds_b}
        return {
            "prompt": self.prompt,
            "chosen": audio[chosen],
            "rejected": audio[rejected],
            "chosen_model": clips[chosen].system,
            "rejected_model": clips[rejected].system,
            "preference": self.preference,
            "confidence": self.confidence,
            "seconds_chosen": seconds[chosen],
            "seconds_rejected": seconds[rejected],
            "listener": self.listener,
            "source": source,
            "created_at": self.created_at or now,
        }


@dataclass
class Tally:
    """Rows that were looked at, and what was left out, by reason."""

    read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class ImportResult:
    """Where an import went, what it holds and what was left out of it."""

    path: Path
    rows: int
    decided: int
    ties: int  # tie and both_bad
    prompts: int
    systems: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    note: str = ""  # what the importer decided by itself

    def __str__(self) -> str:
        text = (
            f"{self.path}: {self.rows} comparisons ({self.decided} decided, {self.ties} ties) of {self.prompts} "
            f"prompts, systems {', '.join(self.systems)}"
        )
        text += f"; {self.note}" if self.note else ""
        return text + (f"; left out: {list_counts(self.left_out)}" if self.left_out else "")


def hashed_listener(source: str, name: str) -> str:
    """A hash in place of the name that a data set gives a listener: the same one for the same listener."""
    return hashlib.sha256(f"{source}:{name}".encode()).hexdigest()[:16] if name else "unknown"


def list_counts(counts: Mapping[str, int]) -> str:
    """ "3 no preference, 2 clip withheld", most first."""
    return ", ".join(f"{number} {reason}" for reason, number in Counter(counts).most_common())


def import_result(
    out: str | Path,
    prompts: Sequence[str],
    labels: Sequence[str],
    systems: Iterable[str],
    left_out: Mapping[str, int] | None = None,
) -> ImportResult:
    """Count what was imported: one prompt and one label a row."""
    decided = sum(label in DECIDED for label in labels)
    distinct = len({normalise_prompt(prompt) for prompt in prompts})
    names = tuple(sorted(set(systems)))
    return ImportResult(Path(out), len(labels), decided, len(labels) - decided, distinct, names, left_out or {})


def write_comparisons(
    comparisons: Sequence[Comparison],
    out: str | Path,
    *,
    source: str,
    options: ClipOptions,
    tally: Tally,
    settings: Mapping[str, Any] | None = None,
) -> ImportResult:
    """Read the clips and write the preference data set, with `import.json` beside its rows.

    Rows are written as they are read, so a data set need not fit into memory. Nothing stands at `out` before all of it does.

    Args:
        comparisons: in the order of the rows; each `split` becomes one of the data set.
        out: folder to write.
        source: of the rows, such as "aime:quality".
        options: of the clips.
        tally: what was read and left out before; what is left out here is added.
        settings: further options of the import, for the record.

    Raises:
        FileNotFoundError, ValueError: naming the row of the table whose clip cannot be used, unless `options.skip_bad_clips`;
            without any comparison left; where `out` holds anything but an earlier import of this source.
    """
    out = Path(out)
    _check_out(out, source)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    by_split: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        by_split.setdefault(comparison.split, []).append(comparison)
    if not comparisons:
        raise ValueError(_nothing_left(source, tally))
    out.parent.mkdir(parents=True, exist_ok=True)
    encode = lru_cache(_CLIPS_KEPT)(_encoder(options))
    kept: list[Comparison] = []
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        parts: dict[str, Dataset] = {}
        with tqdm(total=len(comparisons), desc="reading clips") as bar:
            for split, group in by_split.items():
                path = Path(scratch) / f"{split}.arrow"
                with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, FEATURES.arrow_schema) as stream:
                    for start in range(0, len(group), _CHUNK):
                        pairs = [
                            (one, _encode_both(one, encode, options, tally)) for one in group[start : start + _CHUNK]
                        ]
                        whole = [(one, audio) for one, audio in pairs if audio is not None]
                        if whole:
                            rows = [one.row(audio, source, now) for one, audio in whole]
                            names = [one.where for one, _ in whole]
                            stream.write_table(preferences_from_rows(rows, names=names).data.table)
                        kept += [one for one, _ in whole]
                        bar.update(len(pairs))
                parts[split] = Dataset.from_file(str(path))
        splits = DatasetDict({split: part for split, part in parts.items() if len(part)})
        if not splits:
            raise ValueError(_nothing_left(source, tally))
        name = published_source(source)
        record = ImportRecord(
            source=source,
            rows_read=tally.read,
            comparisons=len(kept),
            date=now,
            license=None if name is None else SOURCE_LICENCES[name],
            address=None if name is None else SOURCE_ADDRESSES[name],
            left_out=dict(tally.left_out.most_common()),
            options={**asdict(options), **(settings or {})},
        )
        save_preferences(splits, out, record)
    systems = {clip.system for one in kept for clip in (one.a, one.b)}
    labels = [one.preference for one in kept]
    return import_result(out, [one.prompt for one in kept], labels, systems, record.left_out)


def _check_out(out: Path, source: str) -> None:
    """Refuse to write over anything but an earlier import of the same source."""
    check_target(out)
    if out.is_dir() and any(out.iterdir()):
        before = read_import(out)
        if before is None or before.source != source:
            found = "that no import wrote" if before is None else f"imported from {before.source}"
            raise ValueError(f"out is {out}, which holds preferences {found}: give another folder, or move them away")


def _encoder(options: ClipOptions) -> Callable[[Clip], dict[str, Any]]:
    def encode(clip: Clip) -> dict[str, Any]:
        """Cropped, brought to the loudness, as FLAC."""
        audio, rate = clip.read(options.crop_s)
        if options.loudness_lufs is not None:
            audio = match_loudness(audio, rate, options.loudness_lufs)
        return {"bytes": audio_bytes(audio, rate), "path": Path(clip.name).with_suffix(".flac").name}

    return encode


def _encode_both(
    comparison: Comparison, encode: Callable[[Clip], dict[str, Any]], options: ClipOptions, tally: Tally
) -> dict[str, dict[str, Any]] | None:
    """Both clips, those of a winner first; None where one of them is left out."""
    order = ("b", "a") if comparison.preference == "b" else ("a", "b")
    clips = {"a": comparison.a, "b": comparison.b}
    encoded = {}
    for side in order:
        try:
            encoded[side] = encode(clips[side])
        except (ValueError, FileNotFoundError) as error:
            if not options.skip_bad_clips:
                where = clips[side].where or comparison.where
                remedy = (
                    "; crop_s keeps the first seconds of longer clips" if isinstance(error, ClipTooLongError) else ""
                )
                raise type(error)(f"{where}: {error}{remedy}") from error
            tally.left_out[_reason(error)] += 1
            return None
    return encoded


def _reason(error: ValueError | FileNotFoundError) -> str:
    if isinstance(error, FileNotFoundError):
        return "clip missing"
    return "clip over 30 s" if isinstance(error, ClipTooLongError) else "clip unreadable or silent"


def _nothing_left(source: str, tally: Tally) -> str:
    found = f": {list_counts(tally.left_out)} left out" if tally.left_out else ""
    remedy = "; crop_s keeps the first seconds of longer clips" if "clip over 30 s" in tally.left_out else ""
    return f"none of the {tally.read} rows of {source} gives a comparison{found}{remedy}"
