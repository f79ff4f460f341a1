"""A folder of one's own clips, with scores or with choices."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from ..schema import LABELS, clip_path
from .ratings import RatedClip, check_pairing, pairs_by_score
from .tables import TableRow, read_text_table, to_number
from .writing import (
    LOUDNESS_LUFS,
    Clip,
    ClipOptions,
    Comparison,
    ImportResult,
    Tally,
    hashed_listener,
    write_comparisons,
)

CLIP_COLUMNS = ("prompt", "audio", "system")
PAIR_COLUMNS = ("prompt", "audio_a", "audio_b", "preference")


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
        score_column: needed where `clips` has several columns of numbers; the result says which one was taken.
        min_gap: scores that differ by less are a tie; equal scores always are.
        crop_s: keep the first seconds of each clip only; None keeps all, and refuses clips that last over 30 s.
        loudness_lufs: loudness that every clip is brought to, so that the louder one is not told by its level; None
            leaves levels as they are.

    Raises:
        ValueError: naming the row (of the file, from 1; a CSV's header is row 1) for a missing column or value, a score that
            is no number, a path that leaves `src`, or audio that cannot be used (see `read_audio`); without pairs; with
            several tables; where `out` holds anything but an earlier import of a folder.
        FileNotFoundError: without a table, or where a clip is not there.
    """
    src = Path(src)
    check_pairing(min_gap)
    options, tally, settings = ClipOptions(crop_s, loudness_lufs), Tally(), dict[str, Any](min_gap=min_gap)
    table = _find_table(src)
    if table.stem == "pairs":
        if score_column is not None:
            raise ValueError(f"score_column is {score_column!r}, but {table} holds choices: leave it out")
        rows = read_table(table, PAIR_COLUMNS)
        comparisons = _choices(rows, src)
        note = ""
    else:
        rows = read_table(table, CLIP_COLUMNS)
        column = score_column or _only_score_column(rows, table)
        comparisons = list(pairs_by_score(_rated_clips(rows, column, table, src), min_gap, f"score:{column}"))
        if not comparisons:
            raise ValueError(f"{table}: no prompt has two clips, so there is nothing to compare")
        settings["score_column"] = column
        chosen = "" if score_column else ", the only one of numbers (--score_column names another)"
        note = f"compared by column {column!r}{chosen}"
    tally.read = len(rows)
    result = write_comparisons(comparisons, out, source="folder", options=options, tally=tally, settings=settings)
    return replace(result, note=note)


def _find_table(src: Path) -> Path:
    if not src.is_dir():
        raise FileNotFoundError(f"there is no folder {src}")
    names = ("clips.jsonl", "clips.csv", "pairs.csv")
    found = [src / name for name in names if (src / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{src} has no table of its clips: add {', '.join(names[:-1])} or {names[-1]}")
    if len(found) > 1:
        raise ValueError(f"{src} holds {' and '.join(path.name for path in found)}: keep one of them")
    return clip_path(src, found[0].name)


def read_table(path: Path, columns: Sequence[str]) -> list[TableRow]:
    """The rows of a table; each has to have something in the columns."""
    rows = read_text_table(path, str(path))
    if not rows:
        raise ValueError(f"{path} has no rows")
    for row in rows:
        check_columns(row, columns)
    return rows


def check_columns(row: TableRow, columns: Sequence[str]) -> None:
    """Refuse a row that has nothing, or no text, in one of the columns."""
    missing = [name for name in columns if row.values.get(name) in (None, "")]
    if missing:
        raise ValueError(f"{row.where}: no {', '.join(missing)}: it has {', '.join(map(str, row.values))}")
    for name in columns:
        if not isinstance(row.values[name], str):
            raise ValueError(f"{row.where}: {name} is {row.values[name]!r:.100}: it has to be text")


def _rated_clips(table: list[TableRow], score_column: str, path: Path, src: Path) -> list[RatedClip]:
    if not any(score_column in row.values for row in table):
        has = ", ".join(table[0].values)
        raise ValueError(f"score_column is {score_column!r}: {path} has no such column, it has {has}")
    rated: dict[tuple[str, str, str], tuple[Clip, list[float]]] = {}  # a clip may have a row for each of its raters
    for row in table:
        score = to_number(row.values.get(score_column))
        if score is None:
            raise row.error(score_column, "it has to be a number")
        clip = _clip(src, row.values["audio"], row.values["system"], row.where)
        rated.setdefault((row.values["prompt"], clip.name, clip.system), (clip, []))[1].append(score)
    return [RatedClip(prompt, clip, fmean(scores)) for (prompt, _, _), (clip, scores) in rated.items()]


def _choices(table: list[TableRow], src: Path) -> list[Comparison]:
    comparisons = []
    for row in table:
        a, b = (
            _clip(src, row.values[f"audio_{side}"], row.text(f"system_{side}") or "unknown", row.where) for side in "ab"
        )
        preference = row.label("preference", {label: label for label in LABELS})
        if a.name == b.name and preference in ("a", "b"):
            raise row.error("preference", f"audio_a and audio_b are both {a.name}, which cannot be better than itself")
        comparisons.append(
            Comparison(
                row.where,
                row.values["prompt"],
                a,
                b,
                preference,
                listener=hashed_listener("folder", row.text("listener")),
                confidence=row.number("confidence"),
                seconds_a=row.number("seconds_a"),
                seconds_b=row.number("seconds_b"),
            )
        )
    return comparisons


def _clip(src: Path, name: str, system: Any, where: str) -> Clip:
    return Clip(name, partial(clip_path, src, name), str(system), where=where)


def _only_score_column(table: list[TableRow], path: Path) -> str:
    names = [name for name in table[0].values if name not in CLIP_COLUMNS]
    numeric = [name for name in names if all(to_number(row.values.get(name)) is not None for row in table)]
    if len(numeric) != 1:
        found = f"{len(numeric)} columns of numbers ({', '.join(numeric)})" if numeric else "no column of numbers"
        raise ValueError(f"score_column is not given and {path} has {found}: name the column to compare the clips by")
    return numeric[0]
