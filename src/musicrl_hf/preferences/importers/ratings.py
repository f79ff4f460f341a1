"""Clips with scores become pairs: SongEval and MusicEval, whose experts rated each clip from 1 to 5, and one's own."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

from ..data_files import read_text
from ..schema import normalise_prompt
from .sources import Source, open_source
from .tables import StoredAudio, TableRow, clip_of, read_rows, to_number
from .writing import Clip, ClipOptions, Comparison, ImportResult, Tally, write_comparisons

SONGEVAL_AXES = ("Coherence", "Musicality", "Memorability", "Clarity", "Naturalness")
SONGEVAL_CRITERIA = ("mean", *(axis.lower() for axis in SONGEVAL_AXES))
MUSICEVAL_COLUMNS = {"quality": "overall quality", "alignment": "textual alignment"}
SONGS_PER_GROUP = 4
MIN_GAP = 0.5  # of 1 to 5; closer means are hardly told apart
_MUSICEVAL_NAME = re.compile(r"(S\d+)_(P\d+)$")


@dataclass(frozen=True)
class RatedClip:
    """A clip with the mean of its ratings; `clip.read()` gives its sound. `split` is the data set's own."""

    prompt: str
    clip: Clip
    score: float
    split: str = "train"


def import_songeval(
    src: str | Path,
    out: str | Path,
    *,
    criterion: str = "mean",
    min_gap: float = MIN_GAP,
    pairs_per_prompt: int | None = None,
    options: ClipOptions | None = None,
) -> ImportResult:
    """Pairs of SongEval's songs (Yao et al. 2025) whose mean ratings differ clearly.

    The set has no prompts. Its songs are dealt into groups of `SONGS_PER_GROUP`, and a group stands for a prompt, so
    that a split by prompt is one by song; a reward on such pairs should not read the text. Songs last minutes:
    `ClipOptions.crop_s` keeps their beginning.

    Args:
        src: folder with a copy of the data set (`metadata.jsonl` beside its songs), or its Hub id.
        out: folder to write.
        criterion: one of `SONGEVAL_CRITERIA`; "mean" is that of all five axes.
        min_gap: pairs whose mean ratings differ by less are left out and counted.
        pairs_per_prompt: at most so many pairs of a group; None takes all.
        options: what is done to the clips.

    Raises:
        FileNotFoundError, ValueError: naming the row, the value and the remedy; see `read_rows` and `write_comparisons`.
    """
    check_pairing(min_gap, pairs_per_prompt)
    tally = Tally()
    clips = read_songeval(open_source(src), criterion, tally, skip_missing=bool(options and options.skip_bad_clips))
    return _import(f"songeval:{criterion}", clips, tally, out, min_gap, pairs_per_prompt, options)


def import_musiceval(
    src: str | Path,
    out: str | Path,
    *,
    criterion: str = "quality",
    prompts: str | Path | None = None,
    min_gap: float = MIN_GAP,
    pairs_per_prompt: int | None = None,
    options: ClipOptions | None = None,
) -> ImportResult:
    """Pairs of MusicEval's clips (Liu et al. 2025) of one prompt and split whose mean ratings differ clearly.

    Args:
        src: folder with a copy of the data set, its Hub id, or the folder of its archive (`sets/*_mos_list.txt`, `wav/`).
        out: folder to write.
        criterion: "quality" (overall impression) or "alignment" with the prompt.
        prompts: table of the prompts, `prompt_info.txt` of the archive, where `src` does not hold it.
        min_gap: pairs whose mean ratings differ by less are left out and counted.
        pairs_per_prompt: at most so many pairs of a prompt; None takes all.
        options: what is done to the clips.

    Raises:
        FileNotFoundError, ValueError: naming the row, the value and the remedy; see `read_rows` and `write_comparisons`.
    """
    check_pairing(min_gap, pairs_per_prompt)
    tally = Tally()
    skip = bool(options and options.skip_bad_clips)
    clips = read_musiceval(open_source(src), criterion, tally, prompts=prompts, skip_missing=skip)
    return _import(f"musiceval:{criterion}", clips, tally, out, min_gap, pairs_per_prompt, options)


def read_songeval(source: Source, criterion: str, tally: Tally, *, skip_missing: bool = False) -> list[RatedClip]:
    """The songs of SongEval with their mean rating over annotators, and over the axes where `criterion` is "mean"."""
    if criterion not in SONGEVAL_CRITERIA:
        raise ValueError(f"criterion is {criterion!r}: use one of {', '.join(SONGEVAL_CRITERIA)}")
    axes = [axis for axis in SONGEVAL_AXES if criterion in ("mean", axis.lower())]
    found: list[tuple[Clip, float]] = []
    for row in read_rows(source, ("annotation",)):
        tally.read += 1
        ratings = row.values["annotation"]
        if not isinstance(ratings, list) or not all(isinstance(one, dict) for one in ratings) or not ratings:
            raise row.error("annotation", f"it has to be a list of ratings with {', '.join(SONGEVAL_AXES)}")
        scores = [_score(row, axis, one.get(axis)) for one in ratings for axis in axes]
        clip = _rated_clip(source, row, "file_name" if "file_name" in row.values else "audio", tally, skip_missing)
        if clip is not None:
            found.append((clip, sum(scores) / len(scores)))
    found.sort(key=lambda song: _digest(song[0].name))
    return [RatedClip(f"a song, group {i // SONGS_PER_GROUP}", *song) for i, song in enumerate(found)]


def read_musiceval(
    source: Source,
    criterion: str,
    tally: Tally,
    *,
    prompts: str | Path | None = None,
    skip_missing: bool = False,
) -> list[RatedClip]:
    """The clips of MusicEval with their prompts, systems and mean ratings over experts."""
    if criterion not in MUSICEVAL_COLUMNS:
        raise ValueError(f"criterion is {criterion!r}: use one of {', '.join(MUSICEVAL_COLUMNS)}")
    texts = _musiceval_prompts(source, prompts)
    lists = [name for name in source.names if name.endswith("_mos_list.txt")]
    rows = _mos_lists(source, lists) if lists else read_rows(source, ("overall quality", "textual alignment", "audio"))
    clips = []
    for row in rows:
        tally.read += 1
        column = MUSICEVAL_COLUMNS[criterion]
        score = _score(row, column, row.values[column])
        cell = row.values["audio"]
        name = PurePosixPath(cell.path if isinstance(cell, StoredAudio) else str(cell)).stem
        ids = _MUSICEVAL_NAME.search(name)
        if ids is None:
            raise ValueError(f"{row.where}: audio is {name!r}: its name has to end in system and prompt, as S002_P044")
        prompt = texts.get(f"{name}.wav") or texts.get(ids[2])  # demos of a system have prompts of their own
        if not prompt:
            tally.left_out["prompt unknown"] += 1
            continue
        clip = _rated_clip(source, row, "audio", tally, skip_missing, system=ids[1])
        if clip is not None:
            clips.append(RatedClip(prompt, clip, score, _split(row.where)))
    return clips


def check_pairing(min_gap: float, pairs_per_prompt: int | None = None) -> None:
    """Refuse what no pairs can be made by, before anything is read."""
    if not min_gap >= 0:
        raise ValueError(f"min_gap is {min_gap}: a gap between scores is 0 or more")
    if pairs_per_prompt is not None and pairs_per_prompt < 1:
        raise ValueError(f"pairs_per_prompt is {pairs_per_prompt}: take 1 or more, or None for all")


def pairs_by_score(clips: Iterable[RatedClip], min_gap: float, listener: str) -> Iterator[Comparison]:
    """All pairs of a prompt and split, of which the higher score wins; a gap below `min_gap`, or of 0, is a tie.

    Which clip is a is a coin toss that the two clips decide, so a rerun repeats it.
    """
    groups: dict[tuple[str, str], list[RatedClip]] = {}
    for clip in clips:
        groups.setdefault((clip.split, normalise_prompt(clip.prompt)), []).append(clip)
    for group in groups.values():
        for pair in combinations(group, 2):
            coin = _digest("\x1f".join(one.clip.name for one in pair))[0] % 2
            a, b = pair[::-1] if coin else pair
            gap = a.score - b.score
            label = "tie" if gap == 0 or abs(gap) < min_gap else "a" if gap > 0 else "b"
            where = f"{a.clip.where} and {b.clip.where}"
            yield Comparison(where, a.prompt, a.clip, b.clip, label, listener, split=a.split)


def _import(
    source: str,
    clips: Sequence[RatedClip],
    tally: Tally,
    out: str | Path,
    min_gap: float,
    pairs_per_prompt: int | None,
    options: ClipOptions | None,
) -> ImportResult:
    kept: dict[tuple[str, str], list[Comparison]] = {}
    for pair in pairs_by_score(clips, min_gap, f"score:{source.partition(':')[2]}"):
        if pair.preference == "tie":
            tally.left_out[f"pair closer than {min_gap:g}"] += 1
        else:
            kept.setdefault((pair.split, normalise_prompt(pair.prompt)), []).append(pair)
    for key, pairs in kept.items():
        if pairs_per_prompt is not None and len(pairs) > pairs_per_prompt:
            tally.left_out["pair over pairs_per_prompt"] += len(pairs) - pairs_per_prompt
            kept[key] = sorted(pairs, key=lambda pair: _digest(f"{pair.a.name}\x1f{pair.b.name}"))[:pairs_per_prompt]
    comparisons = [pair for pairs in kept.values() for pair in pairs]
    settings = {"min_gap": min_gap, "pairs_per_prompt": pairs_per_prompt}
    return write_comparisons(
        comparisons, out, source=source, options=options or ClipOptions(), tally=tally, settings=settings
    )


def _rated_clip(
    source: Source, row: TableRow, column: str, tally: Tally, skip_missing: bool, system: str = "unknown"
) -> Clip | None:
    try:
        clip = clip_of(source, row, column, system=system)
    except FileNotFoundError:
        if not skip_missing:
            raise
        clip = None
        tally.left_out["clip missing"] += 1
    else:
        if clip is None:
            tally.left_out["clip withheld"] += 1
    return clip


def _score(row: TableRow, name: str, value: Any) -> float:
    number = to_number(value)
    if number is None or not 1 <= number <= 5:
        raise ValueError(f"{row.where}: {name} is {value!r}: a rating lies between 1 and 5")
    return number


def _mos_lists(source: Source, names: Sequence[str]) -> list[TableRow]:
    """Rows of the archive's lists, `clip.wav,quality,alignment` a line; the one of all clips is not needed beside others."""
    parts = [name for name in names if PurePosixPath(name).name != "total_mos_list.txt"] or names
    rows = []
    for name, path in sorted(source.fetch(parts).items()):
        above = PurePosixPath(name).parent.parent  # the lists lie in sets/, the clips in wav/ beside it
        for number, line in enumerate(read_text(path, name).split("\n"), 1):
            cells = [cell.strip() for cell in line.split(",")]
            if cells == [""]:
                continue
            if len(cells) != 3:
                raise ValueError(f"{name}, row {number}: {line!r} is not clip,quality,alignment: copy the list again")
            values = dict(zip(MUSICEVAL_COLUMNS.values(), cells[1:], strict=True))
            rows.append(TableRow(f"{name}, row {number}", values | {"audio": str(above / "wav" / cells[0])}))
    return rows


def _musiceval_prompts(source: Source, given: str | Path | None) -> dict[str, str]:
    """Prompt id, or file name of a demo, -> text, from tables `id<tab>text`."""
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"prompts: there is no file {given}: name the archive's prompt_info.txt")
        paths = {str(given): Path(given)}
    else:
        paths = source.fetch([name for name in source.names if name.endswith("prompt_info.txt")])
    if not paths:
        raise ValueError(
            f"prompts is not given and {source.label} has no prompt_info.txt: name that of MusicEval's archive"
        )
    texts = {}
    for name, path in paths.items():
        for number, line in enumerate(read_text(path, name).splitlines(), 1):
            key, tab, text = line.partition("\t")
            if not tab and line.strip():
                raise ValueError(f"{name}, row {number}: {line[:60]!r} has no tab between id and text: copy it again")
            texts[key.strip()] = text.strip()
    return texts


def _split(where: str) -> str:
    """train, validation or test, by the name of the table: `data/train-00000.parquet`, `sets/dev_mos_list.txt`."""
    start = re.match(r"[a-z]*", PurePosixPath(where.partition(",")[0]).name)
    name = start[0] if start else ""
    return {"dev": "validation", "valid": "validation", "validation": "validation", "test": "test"}.get(name, "train")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
