"""A folder of one's own clips, with scores or with choices."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..schema import LABELS, clip_path
from .ratings import RatedClip, check_pairing, pairs_by_score
from .tables import TableRow, read_text_table, to_number
from .writing import LOUDNESS_LUFS, Clip, ClipOptions, Comparison, ImportResult, Tally, write_comparisons

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
        score_column: needed where `clips` has several columns of numbers.
        min_gap: scores that differ by less are a tie; equal scores always are.
        crop_s: keep the first seconds of each clip only; None keeps all, and refuses clips that last over 30 s.
        loudness_lufs: loudness that every clip is brought to, so that the louder one is not told by its level; None
            leaves levels as they are.

    Raises:
        ValueError: naming the row (counted from 0) for a missing column or value, a score that is no number, a path that
            leaves `src`, or audio that cannot be used (see `read_audio`); without pairs; with several tables.
        FileNotFoundError: without a table, or where a clip is not there.
    """
    src = Path(src)
    check_pairing(min_gap)
    options, tally = ClipOptions(crop_s, loudness_lufs), Tally()
    table = _find_table(src)
    if table.stem == "pairs":
        if score_column is not None:
            raise ValueError(f"score_column is {score_column!r}, but {table} holds choices: leave it out")
        rows = read_table(table, PAIR_COLUMNS)
        comparisons = _choices(rows, table, src)
    else:
        rows = read_table(table, CLIP_COLUMNS)
        column = score_column or _only_score_column(rows, table)
        comparisons = list(pairs_by_score(_rated_clips(rows, column, table, src), min_gap, f"score:{column}"))
        if not comparisons:
            raise ValueError(f"{table}: no prompt has two clips, so there is nothing to compare")
    tally.read = len(rows)
    return write_comparisons(
        comparisons, out, source="folder", options=options, tally=tally, settings={"min_gap": min_gap}
    )


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


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a table; each has to have something in the columns."""
    rows = read_text_table(path, str(path))
    if not rows:
        raise ValueError(f"{path} has no rows")
    for number, row in enumerate(rows):
        check_columns(row, columns, path, number)
    return rows


def check_columns(row: Mapping[str, Any], columns: Sequence[str], path: Path, number: int = 0) -> None:
    """Refuse a row that has nothing, or no text, in one of the columns."""
    missing = [name for name in columns if row.get(name) in (None, "")]
    if missing:
        raise ValueError(f"{path}, row {number}: no {', '.join(missing)}: it has {', '.join(map(str, row))}")
    for name in columns:
        if not isinstance(row[name], str):
            raise ValueError(f"{path}, row {number}: {name} is {row[name]!r:.100}: it has to be text")


def _rated_clips(table: list[dict[str, Any]], score_column: str, path: Path, src: Path) -> list[RatedClip]:
    if not any(score_column in row for row in table):
        raise ValueError(f"score_column is {score_column!r}: {path} has no such column, it has {', '.join(table[0])}")
    clips = []
    for number, row in enumerate(table):
        score = to_number(row.get(score_column))
        if score is None:
            raise ValueError(
                f"{path}, row {number}: {score_column} is {row.get(score_column)!r}: it has to be a number"
            )
        where = f"{path}, row {number}"
        clips.append(RatedClip(row["prompt"], _clip(src, row["audio"], row["system"], where), score))
    return clips


def _choices(table: list[dict[str, Any]], path: Path, src: Path) -> list[Comparison]:
    comparisons = []
    for number, values in enumerate(table):
        row = TableRow(f"{path}, row {number}", values)
        a, b = (
            _clip(src, values[f"audio_{side}"], row.text(f"system_{side}") or "unknown", row.where) for side in "ab"
        )
        comparisons.append(
            Comparison(
                row.where,
                values["prompt"],
                a,
                b,
                row.label("preference", {label: label for label in LABELS}),
                listener=row.text("listener") or "unknown",
                confidence=row.number("confidence"),
                seconds_a=row.number("seconds_a"),
                seconds_b=row.number("seconds_b"),
            )
        )
    return comparisons


def _clip(src: Path, name: str, system: Any, where: str) -> Clip:
    return Clip(name, partial(clip_path, src, name), str(system), where=where)


def _only_score_column(table: list[dict[str, Any]], path: Path) -> str:
    names = [name for name in table[0] if name not in CLIP_COLUMNS]
    numeric = [name for name in names if all(to_number(row.get(name)) is not None for row in table)]
    if len(numeric) != 1:
        found = f"{len(numeric)} columns of numbers ({', '.join(numeric)})" if numeric else "no column of numbers"
        raise ValueError(f"score_column is not given and {path} has {found}: name the column to compare the clips by")
    return numeric[0]
