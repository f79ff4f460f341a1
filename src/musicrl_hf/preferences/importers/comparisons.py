"""Published comparisons, in the columns that their authors gave them: Music Arena, AIME, MusicPrefs and CMI-Pref."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from .sources import HubSource, Source, open_source
from .tables import StoredAudio, TableRow, catalogue, clip_of, read_rows
from .writing import Clip, ClipOptions, Comparison, ImportResult, Tally, hashed_listener, write_comparisons

MUSIC_ARENA_COLUMNS = ("battle_uuid", "prompt", "audio_a", "system_a", "audio_b", "system_b", "preference")
AIME_COLUMNS = (
    *("question-type", "description", "answer"),
    *("model-1", "track-1-id", "track-1-begin", "track-1-end"),
    *("model-2", "track-2-id", "track-2-begin", "track-2-end"),
)
AIME_QUESTIONS = {"quality": "Music Quality", "alignment": "Text-Audio Alignment"}
AIME_AUDIO = "disco-eth/AIME"
MUSICPREFS_COLUMNS = ("audio_a", "audio_b")
MUSICPREFS_CRITERIA = ("musicality", "fidelity")
PROMPT_COLUMNS = ("prompt", "caption", "description", "text")
CMI_COLUMNS = ("audio-path", "audio2", "prompt", "model_a", "model_b")
CMI_CRITERIA = ("musicality", "alignment")

_LAST_SECOND = datetime.max.replace(tzinfo=UTC).timestamp()  # of the year 9999

Builder = Callable[[TableRow], Comparison | str]
"""Turns a row into a comparison, or says why the row is left out."""


def import_music_arena(
    src: str | Path, out: str | Path, *, config: str | None = None, options: ClipOptions | None = None
) -> ImportResult:
    """Battles of Music Arena (Kim et al. 2025): two systems, one visitor's choice, and how long each clip was listened to.

    Battles are left out, and counted, where the clip of a system is withheld (its path is empty), where nobody voted, and
    where the prompt is empty.

    Args:
        src: folder with a copy of the data set, or its Hub id.
        out: folder to write.
        config: a month, such as "2025_12"; None takes all.
        options: what is done to the clips.

    Raises:
        FileNotFoundError, ValueError: naming the row, the value and the remedy; see `read_rows` and `write_comparisons`.
    """
    source = open_source(src)
    rows = read_rows(source, MUSIC_ARENA_COLUMNS, config=config)
    return _import("music-arena", rows, partial(_battle, source), out, options, {"config": config})


def import_aime(
    src: str | Path,
    out: str | Path,
    *,
    criterion: str = "quality",
    audio: str | Path | None = None,
    options: ClipOptions | None = None,
) -> ImportResult:
    """The survey of AIME (Grötschla et al. 2025): which of two 10 s excerpts is better music, or fits the tags better.

    Args:
        src: folder with a copy of the survey, or its Hub id.
        out: folder to write.
        criterion: the question, a key of `AIME_QUESTIONS`; answers to the other one are left out and counted.
        audio: folder or Hub id of the tracks, as files `00042.mp3` or as tables with `id` and `audio`; None looks for them
            in `src`, and for a survey on the Hub in `AIME_AUDIO`.
        options: what is done to the clips.

    Raises:
        FileNotFoundError, ValueError: naming the row, the value and the remedy; see `read_rows` and `write_comparisons`.
    """
    _check_criterion(criterion, tuple(AIME_QUESTIONS))
    source = open_source(src)
    rows = read_rows(source, AIME_COLUMNS)
    tracks = open_source(audio or (AIME_AUDIO if isinstance(source, HubSource) else src))
    index = catalogue(tracks, _track_key, id_column="id")
    build = partial(_survey_answer, tracks, index, AIME_QUESTIONS[criterion])
    return _import(f"aime:{criterion}", rows, build, out, options)


def import_musicprefs(
    src: str | Path,
    out: str | Path,
    *,
    criterion: str = "musicality",
    prompt_column: str | None = None,
    options: ClipOptions | None = None,
) -> ImportResult:
    """MusicPrefs (Huang et al. 2025): which of two clips is more musical, or sounds better; all but a win is a tie.

    Its authors gave no licence: what is made of it cannot be pushed before they were asked.

    Args:
        src: folder with a copy of the data set (clips as files, or in Parquet tables), or its Hub id.
        out: folder to write.
        criterion: "musicality" or "fidelity".
        prompt_column: column of the prompts; None takes the first of `PROMPT_COLUMNS` that is there.
        options: what is done to the clips.

    Raises:
        FileNotFoundError, ValueError: naming the row, the value and the remedy; see `read_rows` and `write_comparisons`.
    """
    _check_criterion(criterion, MUSICPREFS_CRITERIA)
    source = open_source(src)
    rows = read_rows(source, (*MUSICPREFS_COLUMNS, criterion))
    columns = list(rows[0].values)
    named = PROMPT_COLUMNS if prompt_column is None else (prompt_column,)
    prompts = next((name for name in named if name in columns), None)
    if prompts is None:
        raise ValueError(f"prompt_column is {prompt_column!r}: name the one with the prompts, of {', '.join(columns)}")
    index = catalogue(source, lambda path: PurePosixPath(path).name)
    build = partial(_listening_test, source, index, criterion, prompts)
    return _import(f"musicprefs:{criterion}", rows, build, out, options, {"prompt_column": prompts})


def import_cmi_pref(
    src: str | Path, out: str | Path, *, criterion: str = "musicality", options: ClipOptions | None = None
) -> ImportResult:
    """CMI-Pref (Ma et al. 2026): votes on musicality and on alignment, each with a confidence; its splits are kept.

    Votes are left out, and counted, where the listener gave no preference and where the prompt has no words; for
    "alignment" also where lyrics or a reference clip were part of the prompt, which a row cannot hold.

    Args:
        src: folder with a copy of the data set, or its Hub id.
        out: folder to write.
        criterion: "musicality" or "alignment".
        options: what is done to the clips.

    Raises:
        FileNotFoundError, ValueError: naming the row, the value and the remedy; see `read_rows` and `write_comparisons`.
    """
    _check_criterion(criterion, CMI_CRITERIA)
    source = open_source(src)
    rows = read_rows(source, (*CMI_COLUMNS, f"preference-{criterion}"), alone="cmi_data.jsonl")
    return _import(f"cmi-pref:{criterion}", rows, partial(_cmi_vote, source, criterion), out, options)


def _import(
    source: str,
    rows: Sequence[TableRow],
    build: Builder,
    out: str | Path,
    options: ClipOptions | None,
    settings: Mapping[str, Any] | None = None,
) -> ImportResult:
    """Build all rows first, so that a wrong one is told before any clip is read."""
    options, tally = options or ClipOptions(), Tally()
    comparisons = []
    for row in rows:
        tally.read += 1
        try:
            built = build(row)
        except FileNotFoundError:
            if not options.skip_bad_clips:
                raise
            built = "clip missing"
        if isinstance(built, str):
            tally.left_out[built] += 1
        else:
            comparisons.append(built)
    return write_comparisons(comparisons, out, source=source, options=options, tally=tally, settings=settings)


def _battle(source: Source, row: TableRow) -> Comparison | str:
    if not row.text("preference"):
        return "nobody voted"
    preference = row.label("preference", {"a": "a", "b": "b", "tie": "tie", "both_bad": "both_bad"})
    a, b = (clip_of(source, row, f"audio_{side}", system=_system(row, f"system_{side}")) for side in "ab")
    if a is None or b is None:
        return "clip withheld"
    if not row.text("prompt"):
        return "prompt empty"
    return Comparison(
        row.where,
        row.text("prompt"),
        a,
        b,
        preference,
        listener=hashed_listener("music-arena", row.text("user_pseudonym")),
        seconds_a=row.number("total_listening_time_a", low=0),
        seconds_b=row.number("total_listening_time_b", low=0),
        created_at=_date(row),
    )


def _survey_answer(
    tracks: Source, index: Mapping[str, list[StoredAudio | str]], question: str, row: TableRow
) -> Comparison | str:
    if row.text("question-type") != question:
        return "another question"
    preference = row.label("answer", {"1": "a", "2": "b"})
    a, b = (_excerpt(tracks, index, row, side) for side in "12")
    if not row.text("description"):
        return "prompt empty"
    return Comparison(row.where, row.text("description"), a, b, preference)


def _excerpt(tracks: Source, index: Mapping[str, list[StoredAudio | str]], row: TableRow, side: str) -> Clip:
    column = f"track-{side}-id"
    key = _track_key(row.text(column))
    if key is None:
        raise row.error(column, "it has to be a number of up to 5 digits")
    begin, end = (_seconds(row, f"track-{side}-{name}") for name in ("begin", "end"))
    if not begin < end:
        raise row.error(f"track-{side}-end", f"it has to lie behind {begin:g} s, where the excerpt begins")
    return _indexed(tracks, index, key, row, column, system=_system(row, f"model-{side}"), begin_s=begin, end_s=end)


def _listening_test(
    source: Source, index: Mapping[str, list[StoredAudio | str]], criterion: str, prompts: str, row: TableRow
) -> Comparison | str:
    preference = {"a_wins": "a", "b_wins": "b"}.get(row.text(criterion).lower(), "tie")
    a, b = (_heard_clip(source, index, row, side) for side in "ab")
    if a is None or b is None:
        return "clip withheld"
    if not row.text(prompts):
        return "prompt empty"
    return Comparison(row.where, row.text(prompts), a, b, preference)


def _heard_clip(source: Source, index: Mapping[str, list[StoredAudio | str]], row: TableRow, side: str) -> Clip | None:
    """By its path, or by its file's name alone, which is what the tables of clips have."""
    column = f"audio_{side}"
    system = next((row.text(name) for name in (f"model_{side}", f"system_{side}") if row.text(name)), "unknown")
    cell, name = row.values[column], PurePosixPath(row.text(column))
    if isinstance(cell, StoredAudio) or not name.name or str(name) in source.known or ".." in name.parts:
        return clip_of(source, row, column, system=system)
    return _indexed(source, index, name.name, row, column, system=system)


def _cmi_vote(source: Source, criterion: str, row: TableRow) -> Comparison | str:
    column = f"preference-{criterion}"
    if not row.text(column):
        return "no preference"
    preference = row.label(column, {"model_a": "a", "model_b": "b"})
    confidence = row.number(f"confidence_{column}", low=1, high=5)
    if not row.text("prompt"):
        return "prompt without words"
    if criterion == "alignment" and (row.text("lyrics") or row.text("ref-audio-path")):
        return "prompt with lyrics or a reference clip"
    a, b = (_cmi_clip(source, row, *columns) for columns in (("audio-path", "model_a"), ("audio2", "model_b")))
    if a is None or b is None:
        return "clip withheld"
    return Comparison(
        row.where,
        row.text("prompt"),
        a,
        b,
        preference,
        listener=hashed_listener("cmi-pref", row.text("user id") or row.text("user_id")),
        confidence=confidence,
        seconds_a=row.number("total_listening_time_a", low=0),
        seconds_b=row.number("total_listening_time_b", low=0),
        split=row.label("split", {"": "train", "train": "train", "validation": "validation", "test": "test"}),
    )


def _cmi_clip(source: Source, row: TableRow, column: str, model: str) -> Clip | None:
    cell, path = row.values[column], row.text(column)
    if not isinstance(cell, StoredAudio) and path not in source.known:
        cell = path.removeprefix("cmi-pref/")  # the benchmark around the set writes its paths from one folder above
    return clip_of(source, row, column, system=_system(row, model), cell=cell)


def _indexed(
    source: Source, index: Mapping[str, list[StoredAudio | str]], key: str, row: TableRow, column: str, **part: Any
) -> Clip:
    """The one clip of a key."""
    found = index.get(key, [])
    if not found:
        raise FileNotFoundError(f"{row.where}: {column}: there is no clip {key!r} in {source.label}")
    if len(found) > 1:
        raise row.error(column, f"{source.label} has {len(found)} clips {key!r}: keep one of them")
    clip = clip_of(source, row, column, cell=found[0], **part)
    if clip is None:
        raise FileNotFoundError(f"{row.where}: {column}: the clip {key!r} of {source.label} is empty")
    return clip


def _check_criterion(criterion: str, known: Sequence[str]) -> None:
    if criterion not in known:
        raise ValueError(f"criterion is {criterion!r}: use one of {', '.join(known)}")


def _system(row: TableRow, column: str) -> str:
    name = row.text(column)
    if not name:
        raise row.error(column, "it has to name what made the clip")
    return name


def _date(row: TableRow) -> str | None:
    """ISO 8601 from the column `date`, or from the seconds since 1970 in `timestamp`."""
    if row.text("date"):
        try:
            return datetime.fromisoformat(row.text("date")).isoformat()
        except ValueError as error:
            raise row.error("date", "use ISO 8601, such as 2026-01-31T12:00:00+00:00") from error
    seconds = row.number("timestamp", low=0, high=_LAST_SECOND)
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _track_key(name: str) -> str | None:
    """The five digits of a track's id, of `5331`, `"05331"` or `audio/05331.mp3`; None for other names."""
    stem = PurePosixPath(name).stem
    return stem.zfill(5) if re.fullmatch(r"\d{1,5}", stem) else None


def _seconds(row: TableRow, column: str) -> float:
    """Seconds of "00:01:03", "01:03" or a number."""
    seconds, parts = 0.0, row.text(column).split(":")
    for part in parts:
        if len(parts) > 3 or not re.fullmatch(r"\d{1,6}(\.\d+)?", part):
            raise row.error(column, "it has to be a time, such as 00:01:03")
        seconds = 60 * seconds + float(part)
    return seconds
