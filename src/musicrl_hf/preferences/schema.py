"""The preference row: what one listener chose between two clips for one prompt.

Preferences are a `datasets.Dataset` with the columns of `FEATURES`. In a decided row (`preference` a or b) `chosen` is
the clip that won, and `preference` says on which side it was heard; in a tie / both_bad row `chosen` is clip a and
`rejected` is clip b. Audio stays encoded, `{"bytes", "path"}`, and is read by soundfile alone: decoding it inside
`datasets` would need torchcodec, which does not load on CPU-only installations.
"""

import hashlib
import io
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import soundfile
from datasets import Audio, Dataset, DatasetDict, Features, Value
from tqdm.auto import tqdm

from ..audio import MAX_DURATION_S, atomic_path
from ..places import check_hub, contents_of
from ..records import COLLECTION_FILE, IMPORT_FILE, ImportRecord
from .data_files import load_split, read_text, split_names, was_downloaded

LABELS = ("a", "b", "tie", "both_bad")
DECIDED = ("a", "b")
AUDIO_COLUMNS = ("chosen", "rejected")
SCORE_COLUMNS = ("score_chosen", "score_rejected")  # 1 to 5; only a study, where clips are rated, has them
SHARD_BYTES = 400 * 2**20  # the Hub's viewer reads Parquet files of up to about 500 MB

FEATURES = Features(
    {
        "prompt": Value("string"),
        "chosen": Audio(decode=False),
        "rejected": Audio(decode=False),
        "chosen_model": Value("string"),
        "rejected_model": Value("string"),
        "chosen_seed": Value("int64"),  # null where the clip has none
        "rejected_seed": Value("int64"),
        "preference": Value("string"),
        "confidence": Value("float32"),  # 1 (a guess) to 5 (certain); null where nobody was asked
        "seconds_chosen": Value("float32"),  # seconds that the listener heard; null where not recorded
        "seconds_rejected": Value("float32"),
        "listener": Value("string"),  # a salted hash or the name of a rule, never a person's name
        "source": Value("string"),
        "created_at": Value("string"),  # ISO 8601
    }
)
REQUIRED_COLUMNS = tuple(FEATURES)
_SHOWN_ERRORS = 8
_PYTHON_TYPES = {
    name: {"string": (str,), "int64": (int,), "float32": (int, float)}[feature.dtype]
    for name, feature in FEATURES.items()
    if isinstance(feature, Value)
}


@dataclass(frozen=True)
class Vote:
    """One choice between two systems, without the audio: what win rates and rankings are counted from."""

    prompt: str
    model_a: str
    model_b: str
    preference: str
    listener: str = ""

    def __post_init__(self) -> None:
        if self.preference not in LABELS:
            raise ValueError(f"preference is {self.preference!r}: use one of {', '.join(LABELS)}")
        if self.model_a == self.model_b:
            raise ValueError(f"model_a and model_b are both {self.model_a!r}: a vote compares two systems")


def preferences_from_rows(
    rows: Iterable[Mapping[str, Any]], root: str | Path | None = None, names: Sequence[str] | None = None
) -> Dataset:
    """Build and validate a preference data set.

    Args:
        rows: mappings with `prompt`, `chosen`, `rejected`, `chosen_model`, `rejected_model`, `preference`, `listener`,
            `source`, `created_at` and, where known, the columns that may be null. A clip is the bytes of an audio file,
            `{"bytes", "path"}`, or a path inside `root`.
        root: folder that the paths are relative to.
        names: what messages call the rows; None counts them from 0.

    Raises:
        ValueError: naming every wrong row: an unknown or missing column, an unknown label, an empty
            prompt, a path that leaves `root`, negative seconds, audio that cannot be read or lasts over 30 s.
        FileNotFoundError: a clip that is not in `root`.
    """
    built = []
    called = []
    for number, row in enumerate(rows):
        called.append(f"row {number}" if names is None else names[number])
        unknown = sorted(set(row) - set(FEATURES))
        if unknown:
            raise ValueError(f"{called[-1]}: unknown column {unknown[0]!r}: the columns are {', '.join(FEATURES)}")
        filled = {name: row.get(name) for name in FEATURES}
        for column in AUDIO_COLUMNS:
            filled[column] = _encoded_clip(filled[column], root, called[-1], column)
        built.append(filled)
    if not built:
        raise ValueError("rows is empty: a preference data set needs at least one row")
    _raise_row_errors(error for name, row in zip(called, built, strict=True) for error in _value_errors(name, row))
    # `Dataset.from_list` would encode the audio through torchcodec; a table that already has the storage type does not.
    try:
        table = pa.Table.from_pylist(built, schema=FEATURES.arrow_schema)
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        raise ValueError(f"the rows are no table: a text is no Unicode, or a number too large ({error})") from error
    return validate_preferences(Dataset(table))


def validate_preferences(ds: Dataset) -> Dataset:
    """Check every row and return the data set with its audio columns undecoded. Further columns are let through.

    Raises:
        ValueError: for a missing column or wrong values, with the numbers of the rows (counted from 0).
    """
    missing = [name for name in REQUIRED_COLUMNS if name not in ds.column_names]
    if missing:
        raise ValueError(
            f"the preference table has no column {', '.join(missing)}: it has {', '.join(ds.column_names)}; "
            "rename or add them (unknown values may be null)"
        )
    if len(ds) == 0:
        raise ValueError("the preference table has no rows")
    for column in AUDIO_COLUMNS:
        if not isinstance(ds.features[column], Audio):
            raise ValueError(f"column {column} is {ds.features[column]}: it has to be datasets.Audio")
        ds = ds.cast_column(column, Audio(decode=False))
    wrong_type = [name for name in set(FEATURES) - set(AUDIO_COLUMNS) if ds.features[name] != FEATURES[name]]
    for name in sorted(wrong_type):
        try:
            ds = ds.cast_column(name, FEATURES[name])
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"column {name} is {ds.features[name]}: it cannot become {FEATURES[name]} ({error})"
            ) from error
    rows = tqdm(ds, desc="checking preferences", disable=len(ds) < 2000 or None, leave=False)
    _raise_row_errors(
        error
        for number, row in enumerate(rows)
        for error in (*_value_errors(f"row {number}", row), *_audio_errors(f"row {number}", row))
    )
    return ds


_OWN_NAMES = {"data", "README.md", IMPORT_FILE, COLLECTION_FILE, ".gitattributes", ".cache", ".DS_Store"}
"""What a folder of preferences may hold, written here or by the Hub's tools; writing it again replaces all of it."""


def save_preferences(
    ds: Dataset | DatasetDict,
    folder: str | Path,
    imported: ImportRecord | None = None,
    beside: Mapping[str, str] | None = None,
    card: Callable[[Path], str] | None = None,
) -> Path:
    """Write a folder of Parquet files that `datasets.load_dataset(folder)` reads, on the Hub too.

    The folder appears whole or not at all. A `DatasetDict` becomes one split each. `imported`, and the texts of `beside`
    under their file names, go beside the rows; `card` writes the README.md of the folder that holds all of these.

    Raises:
        ValueError: if the rows are not valid, or the folder holds something else than preferences.
    """
    folder = Path(folder)
    check_target(folder)
    splits = ds if isinstance(ds, DatasetDict) else DatasetDict({"train": ds})
    checked = {name: validate_preferences(part) for name, part in splits.items()}
    with atomic_path(folder) as temporary:
        data = temporary / "data"
        data.mkdir(parents=True)
        for name, part in checked.items():
            for column in AUDIO_COLUMNS:
                part = part.cast_column(column, Audio())  # so that a reader elsewhere sees playable audio
            shards = max(1, math.ceil(part.data.nbytes / SHARD_BYTES))
            for index in range(min(shards, len(part))):
                shard = part.shard(min(shards, len(part)), index, contiguous=True)
                path = data / f"{name}-{index:05d}-of-{min(shards, len(part)):05d}.parquet"
                shard.to_parquet(path)
                # `datasets` keeps what it read by the names of the files: other rows need another name.
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                path.rename(path.with_stem(f"{path.stem}-{digest[:16]}"))
        if imported is not None:
            (temporary / IMPORT_FILE).write_text(imported.to_json(), encoding="utf-8")
        for file_name, content in (beside or {}).items():
            (temporary / file_name).write_text(content, encoding="utf-8")
        if card is not None:
            (temporary / "README.md").write_text(card(temporary), encoding="utf-8")
    return folder


def check_target(folder: str | Path) -> None:
    """Refuse to write over a folder that holds something else than preferences, or something beside them: it would be gone."""
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not any((folder / "data").glob("*.parquet"))):
        found = "other files" if folder.is_dir() and contents_of(folder) is None else contents_of(folder) or "no folder"
        raise ValueError(f"folder {folder} holds {found}: give a new folder or an earlier preference data set")
    beside = sorted(path.name for path in folder.glob("*") if path.name not in _OWN_NAMES)
    beside += sorted(f"data/{path.name}" for path in folder.glob("data/*") if path.suffix != ".parquet")
    if beside:
        raise ValueError(
            f"folder {folder} holds {beside[0]} beside preferences, which would be lost: give another folder or move it"
        )


def load_preferences(source: str | Path, split: str = "train") -> Dataset:
    """Load and validate preferences from a folder written by `save_preferences`, or from a Hub id.

    Raises:
        FileNotFoundError: if there is neither such a folder nor such a data set on the Hub.
        ValueError: if there is no such split, its rows are not valid, or it consists of anything but Parquet files of its
            own.
    """
    where = _found(source)
    ds = load_split(where, split)
    try:
        return validate_preferences(ds)
    except (pa.ArrowException, UnicodeError) as error:  # found only where the rows are looked at
        raise ValueError(f"preferences {where!r} are damaged ({error}): copy or make them again") from error


def preference_splits(source: str | Path) -> list[str]:
    """The names of the splits that `load_preferences` can give of a source; raises as it does."""
    return split_names(_found(source))


def _found(source: str | Path) -> str:
    where = str(source)
    if Path(source).is_dir() and not any(Path(source).rglob("*.parquet")):
        raise FileNotFoundError(
            f"`preferences` = {where!r}: the folder holds no .parquet file; give one that `musicrl import` wrote, or a Hub id"
        )
    if not Path(source).is_dir():
        remedy = f"make the folder first (`musicrl import ... --out {where}`)"
        check_hub(where, "dataset", "preferences", remedy, cached=was_downloaded(where))
    return where


def decided_pairs(
    ds: Dataset, min_seconds: float | None = None, keep_ties: bool = False, called: str = "rows"
) -> tuple[Dataset, dict[str, int]]:
    """Leave out ties, so that every row has a winner, and count what was left out.

    Args:
        ds: validated preferences.
        min_seconds: also leave out rows whose listener heard less than this of either clip, or where that was not
            recorded (the paper keeps only listeners who heard both, section 3.3); None keeps all.
        keep_ties: keep tie and both_bad too, under the same condition; called: what a message calls the rows.

    Returns:
        the rows that are kept, and counts: each label, `not_heard`, `left_out` and `kept`.

    Raises:
        ValueError: if no row with a winner is left.
    """
    counts, kept, winners = dict.fromkeys((*LABELS, "not_heard", "left_out", "kept"), 0), [], 0
    heard = zip(ds["seconds_chosen"], ds["seconds_rejected"], strict=True)
    for number, (label, seconds) in enumerate(zip(ds["preference"], heard, strict=True)):
        counts[label] += 1
        if label not in DECIDED and not keep_ties:
            continue
        if min_seconds is not None and any(value is None or value < min_seconds for value in seconds):
            counts["not_heard"] += 1
            continue
        kept.append(number)
        winners += label in DECIDED
    counts |= {"kept": len(kept), "left_out": len(ds) - len(kept)}
    if not winners:
        found = ", ".join(f"{name} {counts[name]}" for name in (*LABELS, "not_heard") if counts[name])
        raise ValueError(f"none of the {len(ds)} {called} has a winner that counts ({found}); collect more votes")
    return ds.select(kept), counts


def normalise_prompt(prompt: str) -> str:
    """A prompt without case, punctuation and doubled blanks: two spellings of one prompt are one prompt."""
    words = re.sub(r"[^\w\s]|_", " ", unicodedata.normalize("NFKC", prompt).casefold())
    return " ".join(words.split()) or prompt.strip()


def read_prompts(path: str | Path, name: str = "prompts") -> list[str]:
    """Prompts from a text file, an argument called `name`, one a line; blank lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no prompt, or no text in UTF-8.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"`{name}`: there is no file {path}; give a text file with one prompt a line.")
    text = read_text(Path(path), f"`{name}`: {path}")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"`{name}`: {path} holds no prompt; write one a line.")
    return prompts


def votes_from_preferences(ds: Dataset) -> list[Vote]:
    """The rows that compare two generators, as votes; rows of one generator against itself are left out.

    In a decided row model a is the winner's when `preference` is a and the loser's when it is b.
    """
    columns = ("prompt", "chosen_model", "rejected_model", "preference", "listener")
    votes = []
    for prompt, chosen, rejected, label, listener in zip(*(ds[name] for name in columns), strict=True):
        if chosen != rejected:
            first, second = (rejected, chosen) if label == "b" else (chosen, rejected)
            votes.append(Vote(prompt, first, second, label, listener))
    return votes


def clip_path(root: str | Path, path: str) -> Path:
    """The file `path` inside the folder `root`, links followed. (In the Hub's own cache they lead to a folder beside it.)

    Raises:
        ValueError: if it leads out of `root`, or is no path.
        FileNotFoundError: if it is not there.
    """
    base = Path(root).resolve()
    try:
        found = (base / path).resolve()
        is_there = found.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null character, links in a circle
        raise ValueError(f"path {path!r:.200} in {root} is none ({error})") from error
    blobs = [base.parent.parent / "blobs"] if base.parent.name == "snapshots" else []
    if not any(found.is_relative_to(folder) for folder in (base, *blobs)):
        raise ValueError(f"path {path!r} leads out of {root}: files have to lie inside the folder")
    if not is_there:
        raise FileNotFoundError(f"there is no file {path!r} in {root}")
    return found


def _encoded_clip(clip: Any, root: str | Path | None, where: str, column: str) -> dict[str, Any]:
    if isinstance(clip, bytes):
        return {"bytes": clip, "path": None}
    path = clip.get("path") if isinstance(clip, Mapping) else clip
    if isinstance(clip, Mapping) and clip.get("bytes"):
        return {"bytes": clip["bytes"], "path": None if path is None else Path(path).name}
    if not isinstance(path, str | Path):
        raise ValueError(f"{where}: {column} is {clip!r}: give bytes, {{'bytes', 'path'}} or a path")
    if root is None:
        raise ValueError(f"{where}: {column} is the path {str(path)!r} and root is not given: name its folder")
    try:
        found = clip_path(root, str(path))
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}: {column}: {error}") from error
    return {"bytes": found.read_bytes(), "path": found.name}


def _value_errors(where: str, row: Mapping[str, Any]) -> Iterable[str]:
    wrong = [name for name in _PYTHON_TYPES if not isinstance(row[name], (*_PYTHON_TYPES[name], type(None)))]
    for name in wrong:
        yield f"{where}: {name} is {row[name]!r}: it has to be {FEATURES[name].dtype}"
    if wrong:
        return
    if not (row["prompt"] or "").strip():
        yield f"{where}: prompt is empty"
    if row["preference"] not in LABELS:
        yield f"{where}: preference is {row['preference']!r}: use one of {', '.join(LABELS)}"
    for name in ("chosen_model", "rejected_model", "listener", "source"):
        if not row[name]:
            yield f"{where}: {name} is empty"
    for name in ("seconds_chosen", "seconds_rejected"):
        if row[name] is not None and not 0 <= row[name] < math.inf:
            yield f"{where}: {name} is {row[name]}: seconds heard cannot be negative or infinite"
    if row["confidence"] is not None and not 1 <= row["confidence"] <= 5:
        yield f"{where}: confidence is {row['confidence']}: use 1 (a guess) to 5 (certain), or null"
    try:
        datetime.fromisoformat(row["created_at"] or "")
    except ValueError:
        yield f"{where}: created_at is {row['created_at']!r}: use ISO 8601, such as 2026-01-31T12:00:00+00:00"


def _audio_errors(where: str, row: Mapping[str, Any]) -> Iterable[str]:
    for column in AUDIO_COLUMNS:
        data = (row[column] or {}).get("bytes")
        if not data:
            yield f"{where}: {column} has no audio bytes (withheld or not embedded): leave the row out"
            continue
        try:
            header = soundfile.info(io.BytesIO(data))
        except soundfile.LibsndfileError:
            yield f"{where}: {column} is not audio that soundfile reads ({len(data)} bytes)"
            continue
        if not 0 < header.duration <= MAX_DURATION_S:
            yield f"{where}: {column} lasts {header.duration:.1f} s: clips last up to {MAX_DURATION_S:g} s, not 0"


def _raise_row_errors(errors: Iterable[str]) -> None:
    found = list(errors)
    if found:
        more = f"\n... and {len(found) - _SHOWN_ERRORS} more" if len(found) > _SHOWN_ERRORS else ""
        raise ValueError("the preferences are not valid:\n" + "\n".join(found[:_SHOWN_ERRORS]) + more)
