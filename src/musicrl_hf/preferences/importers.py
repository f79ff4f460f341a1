"""Preferences from elsewhere: a folder of one's own clips with scores or choices, and vote tables without audio."""

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..audio import atomic_path, audio_bytes, match_loudness, read_audio
from .schema import LABELS, Vote, clip_path, normalise_prompt, preferences_from_rows, save_preferences

CLIP_COLUMNS = ("prompt", "audio", "system")
PAIR_COLUMNS = ("prompt", "audio_a", "audio_b", "preference")
VOTE_COLUMNS = ("prompt", "model_a", "model_b", "preference", "listener")
LOUDNESS_LUFS = -23.0  # EBU R 128


@dataclass(frozen=True)
class ImportResult:
    """Where an import went and what it holds."""

    path: Path
    rows: int
    decided: int
    ties: int  # tie and both_bad
    prompts: int
    systems: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.rows} comparisons ({self.decided} decided, {self.ties} ties) of {self.prompts} "
            f"prompts, systems {', '.join(self.systems)}"
        )


def import_folder(
    src: str | Path,
    out: str | Path,
    *,
    score_column: str | None = None,
    min_gap: float = 0.0,
    crop_s: float | None = None,
    loudness_lufs: float | None = LOUDNESS_LUFS,
) -> ImportResult:
    """Turn a folder of clips into a preference data set.

    `src` holds the clips and one table of them:

    * `clips.jsonl` or `clips.csv` with `prompt`, `audio` (path inside `src`), `system` and a column of scores: all
      pairs of one prompt, of which the higher score wins;
    * or `pairs.csv` with `prompt`, `audio_a`, `audio_b`, `preference` (a, b, tie, both_bad) and, where known,
      `system_a`, `system_b`, `listener`, `confidence`, `seconds_a`, `seconds_b`.

    Args:
        src: the folder.
        out: folder to write.
        score_column: needed where `clips` has several columns of numbers.
        min_gap: scores that differ by less are a tie; equal scores always are.
        crop_s: keep the first seconds of each clip only; None keeps all.
        loudness_lufs: loudness that every clip is brought to, so that the louder one is not told by its level; None
            leaves levels as they are.

    Raises:
        ValueError: naming the row (counted from 0) for a missing column or value, a score that is no number, a path that
            leaves `src`, or audio that cannot be used (see `read_audio`); without pairs; with several tables.
        FileNotFoundError: without a table, or where a clip is not there.
    """
    src = Path(src)
    if min_gap < 0:
        raise ValueError(f"min_gap is {min_gap}: a gap between scores is 0 or more")
    if crop_s is not None and crop_s <= 0:
        raise ValueError(f"crop_s is {crop_s}: keep more than 0 seconds, or None for all")
    table = _find_table(src)
    if table.stem == "pairs":
        if score_column is not None:
            raise ValueError(f"score_column is {score_column!r}, but {table} holds choices: leave it out")
        rows = _rows_from_choices(_read_table(table, PAIR_COLUMNS))
    else:
        rows = _rows_from_scores(_read_table(table, CLIP_COLUMNS), score_column, min_gap, table)
    clips = _read_clips(src, rows, crop_s, loudness_lufs)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    full = [
        row | {name: clips[row[name]] for name in ("chosen", "rejected")} | {"source": "folder", "created_at": now}
        for row in rows
    ]
    save_preferences(preferences_from_rows(full), out)
    systems = {row[name] for row in rows for name in ("chosen_model", "rejected_model")}
    return _result(out, [row["prompt"] for row in rows], [row["preference"] for row in rows], systems)


def import_battles(src: str | Path, out: str | Path) -> ImportResult:
    """Turn a table of votes between named systems, such as Music Arena's, into `votes.csv` in the folder `out`.

    The table has no audio: it serves win rates and rankings. See `read_votes` for its columns.
    """
    votes = read_votes(src)
    with atomic_path(Path(out) / "votes.csv") as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(VOTE_COLUMNS)
        writer.writerows([vote.prompt, vote.model_a, vote.model_b, vote.preference, vote.listener] for vote in votes)
    systems = {name for vote in votes for name in (vote.model_a, vote.model_b)}
    return _result(out, [vote.prompt for vote in votes], [vote.preference for vote in votes], systems)


def read_votes(path: str | Path) -> list[Vote]:
    """Read a CSV of votes between systems.

    Columns: `preference` (A, B, TIE, BOTH_BAD in any case); `system_a` and `system_b` (or `model_a`, `model_b`); and,
    where they exist, `listener` and `prompt`. Where there is no prompt, `battle_id` or `battle_uuid` stands for it,
    else the row's number: every vote then counts as a prompt of its own in the intervals.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a missing column, an unknown preference or a system against itself, naming the row.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no vote table {path}: give a CSV file")
    rows = _read_table(path, ("preference",))
    prefix = "system" if "system_a" in rows[0] else "model"
    _check_columns(rows[0], (f"{prefix}_a", f"{prefix}_b"), path)
    prompt_column = next((name for name in ("prompt", "battle_id", "battle_uuid") if name in rows[0]), None)
    votes = []
    for number, row in enumerate(rows):
        prompt = str(number) if prompt_column is None else row[prompt_column]
        try:
            label = (row["preference"] or "").strip().lower()
            votes.append(Vote(prompt, row[f"{prefix}_a"], row[f"{prefix}_b"], label, row.get("listener") or ""))
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
    return votes


def _find_table(src: Path) -> Path:
    if not src.is_dir():
        raise FileNotFoundError(f"there is no folder {src}")
    names = ("clips.jsonl", "clips.csv", "pairs.csv")
    found = [src / name for name in names if (src / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{src} has no table of its clips: add {', '.join(names[:-1])} or {names[-1]}")
    if len(found) > 1:
        raise ValueError(f"{src} holds {' and '.join(path.name for path in found)}: keep one of them")
    return found[0]


def _read_table(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(file))
        else:
            for number, line in enumerate(line for line in file if line.strip()):
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, row {number}: not a line of JSON ({error})") from error
    if not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or None in row:
            raise ValueError(f"{path}, row {number}: has other columns than the first row: {str(row)[:100]}")
        _check_columns(row, columns, path, number)
    return rows


def _check_columns(row: Mapping[str, Any], columns: Sequence[str], path: Path, number: int = 0) -> None:
    missing = [name for name in columns if row.get(name) in (None, "")]
    if missing:
        raise ValueError(f"{path}, row {number}: no {', '.join(missing)}: it has {', '.join(map(str, row))}")


def _rows_from_scores(
    table: list[dict[str, Any]], score_column: str | None, min_gap: float, path: Path
) -> list[dict[str, Any]]:
    """All pairs of each prompt; which clip is a is a coin toss that the two clips decide, so a rerun repeats it."""
    score_column = score_column or _only_score_column(table, path)
    groups: dict[str, list[dict[str, Any]]] = {}
    for number, clip in enumerate(table):
        score = _number(clip.get(score_column))
        if score is None:
            raise ValueError(
                f"{path}, row {number}: {score_column} is {clip.get(score_column)!r}: it has to be a number"
            )
        groups.setdefault(normalise_prompt(clip["prompt"]), []).append(clip | {score_column: score})
    rows = []
    for group in groups.values():
        for pair in combinations(group, 2):
            coin = hashlib.sha256("\x1f".join(clip["audio"] for clip in pair).encode()).digest()[0] % 2
            a, b = pair[::-1] if coin else pair
            gap = a[score_column] - b[score_column]
            label = "tie" if gap == 0 or abs(gap) < min_gap else "a" if gap > 0 else "b"
            chosen, rejected = (b, a) if label == "b" else (a, b)
            rows.append(_row(a["prompt"], label, chosen, rejected) | {"listener": f"score:{score_column}"})
    if not rows:
        raise ValueError(f"{path}: no prompt has two clips, so there is nothing to compare")
    return rows


def _rows_from_choices(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for number, row in enumerate(table):
        label = row["preference"].strip().lower()
        if label not in LABELS:
            raise ValueError(f"row {number}: preference is {row['preference']!r}: use one of {', '.join(LABELS)}")
        a, b = ({"audio": row[f"audio_{side}"], "system": row.get(f"system_{side}") or "unknown"} for side in "ab")
        chosen, rejected = ("b", "a") if label == "b" else ("a", "b")
        numbers = {"confidence": "confidence", "seconds_chosen": f"seconds_{chosen}"}
        numbers["seconds_rejected"] = f"seconds_{rejected}"
        extra: dict[str, Any] = {"listener": row.get("listener") or "unknown"}
        for target, column in numbers.items():
            if row.get(column):
                extra[target] = _number(row[column])
                if extra[target] is None:
                    raise ValueError(f"row {number}: {column} is {row[column]!r}: it has to be a number")
        rows.append(_row(row["prompt"], label, *((b, a) if label == "b" else (a, b))) | extra)
    return rows


def _row(prompt: str, label: str, chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": chosen["audio"],
        "rejected": rejected["audio"],
        "chosen_model": str(chosen["system"]),
        "rejected_model": str(rejected["system"]),
        "preference": label,
    }


def _only_score_column(table: list[dict[str, Any]], path: Path) -> str:
    names = [name for name in table[0] if name not in CLIP_COLUMNS]
    numeric = [name for name in names if all(_number(row.get(name)) is not None for row in table)]
    if len(numeric) != 1:
        found = f"{len(numeric)} columns of numbers ({', '.join(numeric)})" if numeric else "no column of numbers"
        raise ValueError(f"score_column is not given and {path} has {found}: name the column to compare the clips by")
    return numeric[0]


def _number(value: Any) -> float | None:
    """A finite float, or None where `value` is no number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None


def _read_clips(
    src: Path, rows: Sequence[Mapping[str, Any]], crop_s: float | None, loudness_lufs: float | None
) -> dict[str, dict[str, Any]]:
    """Each distinct clip of the rows, cropped, brought to one loudness and encoded as FLAC."""
    clips: dict[str, dict[str, Any]] = {}
    for number, name in tqdm(list(_distinct_clips(rows)), desc="reading clips"):
        try:
            audio, rate = read_audio(clip_path(src, name))
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"comparison {number}: {error}") from error
        if crop_s is not None:
            audio = audio[:, : round(crop_s * rate)]
            if not audio.any():
                raise ValueError(
                    f"comparison {number}: the first {crop_s:g} s of {name} are silent: crop less or leave it out"
                )
        if loudness_lufs is not None:
            audio = match_loudness(audio, rate, loudness_lufs)
        clips[name] = {"bytes": audio_bytes(audio, rate), "path": Path(name).with_suffix(".flac").name}
    return clips


def _distinct_clips(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    seen = set()
    for number, row in enumerate(rows):
        for name in (row["chosen"], row["rejected"]):
            if name not in seen:
                seen.add(name)
                yield number, name


def _result(out: str | Path, prompts: Sequence[str], labels: Sequence[str], systems: set[str]) -> ImportResult:
    decided = sum(label in ("a", "b") for label in labels)
    distinct = len({normalise_prompt(prompt) for prompt in prompts})
    return ImportResult(Path(out), len(labels), decided, len(labels) - decided, distinct, tuple(sorted(systems)))
