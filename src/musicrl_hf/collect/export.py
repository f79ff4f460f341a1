"""From the store to a data set: preference rows, their record, and the commit on the Hub."""

import json
import shutil
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, Features, Value
from sqlalchemy import Row, Select, select
from tqdm.auto import tqdm

from ..audio import audio_bytes, read_audio
from ..cards import preference_card
from ..hub import push_preferences, retract_preferences
from ..preferences.listeners import SIMULATED, is_simulated
from ..preferences.schema import (
    FEATURES,
    SCORE_COLUMNS,
    normalise_prompt,
    preferences_from_rows,
    save_preferences,
)
from ..preferences.splits import side_of_prompt
from ..records import COLLECTION_FILE, CollectionRecord, agreement_in_words
from .desk import CHECKS, rules_held
from .ownership import check_out, check_push
from .reliability import Attention, krippendorff_alpha, passes
from .rules import Answer
from .store import VoteStore
from .tables import clips, consents, deals, listeners, pairs, settings, votes

# Beside the columns of every preference: the ratings of a study, and the share of attention checks passed; or null.
EXPORT_FEATURES = Features(
    {**FEATURES, **dict.fromkeys(SCORE_COLUMNS, Value("int32")), "reliability": Value("float32")}
)
_CHUNK = 64  # rows that are in memory at once


@dataclass(frozen=True)
class ExportResult:
    """Where an export went and what it holds; `path` and `record` are None where no vote is left."""

    out: Path
    path: Path | None
    rows: int
    splits: tuple[str, ...] = ()
    prompts: int = 0
    test_share: float = 0.0
    record: CollectionRecord | None = None
    address: str | None = None
    removed: bool = False  # an earlier export of votes that are no more

    def __str__(self) -> str:
        pushed = f"; pushed to {self.address}" if self.address else ""
        if self.record is None:
            gone = (
                f"; what an earlier export left in {self.out} is deleted, for its votes were withdrawn"
                if self.removed
                else ""
            )
            return f"nothing: the store has no vote{gone}{pushed}"
        first = f"{self.path}: {self.rows} rows ({', '.join(self.splits)}){pushed}"
        split = [] if len(self.splits) > 1 else [f"No test split: {self._why_no_split()}."]
        return "\n".join(
            [first, f"Agreement: {agreement_in_words(self.record.agreement, self.record.shared_pairs)}.", *split]
        )

    def _why_no_split(self) -> str:
        if not self.test_share:
            return "`test_share` is 0"
        return (
            f"`test_share` is {self.test_share:g}, by a hash of each prompt, and all of the {self.prompts} fell on one side; "
            "more prompts, a larger share or another `seed` make one"
        )


def export_votes(
    store: VoteStore,
    out: str | Path,
    *,
    licence: str | None = None,
    test_share: float = 0.1,
    seed: int = 0,
    repo_id: str | None = None,
) -> ExportResult:
    """Write the votes as a preference data set, with its card (`README.md`) and `collection.json` beside its rows.

    Rows are those of people and of simulated listeners (`source` and `listener` tell them apart); checks of attention give
    no row but each listener's `reliability`. Splits are by prompt. Where no vote is left, because all were withdrawn, an
    earlier export is removed.

    Args:
        store: of the collection.
        out: folder to write, new or an earlier export.
        licence: take the votes whose listeners agreed to this one; may be left out where there is only one.
        test_share: share of the prompts that is held out; 0 for no split.
        seed: of the split.
        repo_id: what the card's code loads the data set by; None takes the folder's name. The rest of a card is the same.

    Raises:
        ValueError: `out` holds something else, or the export of another collection; votes under several licences and none named; a wrong `test_share`.
    """
    out = Path(out)
    if not 0 <= test_share < 1:
        raise ValueError(f"test_share is {test_share}: it has to be 0 or lie between 0 and 1")
    is_there = check_out(out, store.collection)
    with store.read() as connection:
        rows = connection.execute(_joined()).all()
        protocols = rules_held(connection)
        if not protocols and (rules := connection.scalar(select(settings.c.value).where(settings.c.name == "rules"))):
            protocols = [{"since": 0.0, **json.loads(rules)}]  # of a store that an earlier version wrote
        offered = set(connection.scalars(select(consents.c.licence)))
    licence = _one_licence(rows, licence, offered)
    rows = [row for row in rows if row.licence == licence]
    compared = [row for row in rows if row.kind == "pair"]
    if not compared:
        if is_there:
            shutil.rmtree(out.resolve())  # what a link leads to, too
        return ExportResult(out, None, 0, removed=is_there)
    attention = _attention(rows)
    record = _record(store.collection, str(licence), _protocol(protocols, rows), rows, compared)
    sides: dict[str, list[Row]] = {"train": [], "test": []}
    for row in compared:
        sides[side_of_prompt(row.prompt, test_share, seed) if test_share else "train"].append(row)
    if not sides["train"]:  # few prompts, all held out by chance
        sides = {"train": sides["test"], "test": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        parts = {
            side: _write_rows(store, own, attention, Path(scratch) / f"{side}.arrow")
            for side, own in sides.items()
            if own
        }
        card = partial(preference_card, repo_id=repo_id or out.resolve().name)
        save_preferences(DatasetDict(parts), out, beside={COLLECTION_FILE: record.to_json()}, card=card)
    prompts = {normalise_prompt(row.prompt) for row in compared}
    return ExportResult(out, out, len(compared), tuple(parts), len(prompts), test_share, record)


def licences_of(store: VoteStore) -> list[str]:
    """The licences that those whose votes are in the store agreed to, in the order of the alphabet."""
    tables = votes.join(listeners, votes.c.listener == listeners.c.id).join(
        consents, listeners.c.consent == consents.c.id
    )
    with store.read() as connection:
        return sorted(connection.scalars(select(consents.c.licence).select_from(tables).distinct()))


def publish(
    store: VoteStore,
    out: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    licence: str | None = None,
    test_share: float = 0.1,
    seed: int = 0,
) -> ExportResult:
    """Export and push in one step: one commit, which replaces all rows of the one before.

    Where no vote is left, the rows on the Hub are deleted and the card says so.

    Arguments and errors are those of `export_votes` and `musicrl_hf.hub.push_preferences`.

    Raises:
        ValueError: `repo_id` holds the export of another collection; nothing is written then.
    """
    check_push(repo_id, store.collection)
    result = export_votes(store, out, licence=licence, test_share=test_share, seed=seed, repo_id=repo_id)
    if result.path is None:
        address = retract_preferences(repo_id)
    else:
        address = push_preferences(result.path, repo_id, private=private)
    return replace(result, address=address)


def _joined() -> Select:
    first, second = clips.alias(), clips.alias()
    tables = (
        votes.join(deals, votes.c.deal == deals.c.id)
        .join(pairs, votes.c.pair == pairs.c.id)
        .join(first, pairs.c.first == first.c.id)
        .join(second, pairs.c.second == second.c.id)
        .join(listeners, votes.c.listener == listeners.c.id)
        .join(consents, listeners.c.consent == consents.c.id)
    )
    columns: list[Any] = [votes, deals.c.swapped, pairs.c.kind, pairs.c.prompt, consents.c.text, consents.c.licence]
    for name, clip in (("first", first), ("second", second)):
        columns += [column.label(f"{name}_{column.name}") for column in clip.c]
    return select(*columns).select_from(tables).order_by(votes.c.voted_at, votes.c.deal)


def _one_licence(rows: Sequence[Row], licence: str | None, offered: Collection[str]) -> str | None:
    """The licence of an export; one that the page has offered may have no vote left, or none yet."""
    known = sorted({row.licence for row in rows})
    if licence is not None and licence not in offered and known:
        raise ValueError(f"licence is {licence!r}: the listeners agreed to {', '.join(known)}")
    if licence is None and len(known) > 1:
        raise ValueError(f"the listeners agreed to {', '.join(known)}: name one with --licence, and export each")
    return licence or next(iter(known), None)


def _answer(row: Row) -> Answer:
    return Answer(row.preference, row.seconds_a, row.seconds_b, row.score_a, row.score_b).believed


def _attention(rows: Iterable[Row]) -> dict[str, Attention]:
    counted: Counter[tuple[str, bool]] = Counter()
    for row in rows:
        if row.kind in CHECKS:
            counted[row.listener, passes(row.kind, row.swapped, _answer(row))] += 1
    return {who: Attention(counted[who, True], counted[who, False]) for who, _ in counted}


def _protocol(held: Sequence[dict[str, Any]], rows: Sequence[Row]) -> dict[str, Any]:
    """The rules under which the votes were given: name -> value, or the list of those that it has had one after the other."""
    times = [rules["since"] for rules in held]
    used = sorted({max(bisect_right(times, row.voted_at) - 1, 0) for row in rows}) if held else []
    found: dict[str, list[Any]] = {}
    for rules in (held[number] for number in used):
        for name, value in rules.items():
            if name not in ("since", "licence") and value not in found.setdefault(name, []):
                found[name].append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _record(
    collection: str, licence: str, protocol: dict[str, Any], rows: Sequence[Row], compared: Sequence[Row]
) -> CollectionRecord:
    checks = {kind: {"passed": 0, "failed": 0} for kind in CHECKS}
    for row in rows:
        if row.kind in CHECKS:
            checks[row.kind]["passed" if passes(row.kind, row.swapped, _answer(row)) else "failed"] += 1
    chosen: dict[str, list[str]] = {}
    rated: dict[str, list[int]] = {}
    for row in compared:
        chosen.setdefault(row.pair, []).append(_of_pair(row.preference, row.swapped))
        if row.score_a is not None:
            scores = (row.score_b, row.score_a) if row.swapped else (row.score_a, row.score_b)
            for clip, score in zip((row.first_id, row.second_id), scores, strict=True):
                rated.setdefault(clip, []).append(score)
    agreement = {"preferences": krippendorff_alpha(chosen.values())}
    if rated:
        agreement["ratings"] = krippendorff_alpha(rated.values(), "interval")
    people = {row.listener for row in compared}
    simulated = {who for who in people if is_simulated(who)}
    return CollectionRecord(
        license=licence,
        consent=sorted({row.text for row in rows}),
        protocol=protocol,
        listeners=len(people - simulated),
        simulated_listeners=len(simulated),
        checks=checks,
        agreement=agreement,
        shared_pairs=sum(len(values) > 1 for values in chosen.values()),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        collection=collection,
    )


def _of_pair(preference: str, swapped: bool) -> str:
    """A choice in terms of the pair, the same for all listeners: a is its first clip."""
    return {"a": "b", "b": "a"}.get(preference, preference) if swapped else preference


def _write_rows(store: VoteStore, rows: Sequence[Row], attention: dict[str, Attention], path: Path) -> Dataset:
    """The rows as a data set on disk, read clip by clip: it need not fit into memory."""
    schema = EXPORT_FEATURES.arrow_schema
    starts = tqdm(range(0, len(rows), _CHUNK), desc="exporting votes", disable=len(rows) < 500 or None)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for start in starts:
            chunk = rows[start : start + _CHUNK]
            table = preferences_from_rows(_preference_row(store, row) for row in chunk).data.table
            scores = zip(*(_scores(row) for row in chunk), strict=True)
            for name, values in zip(SCORE_COLUMNS, scores, strict=True):
                table = table.append_column(name, pa.array(values, pa.int32()))
            shares = [attention.get(row.listener, Attention()).share for row in chunk]
            stream.write_table(table.append_column("reliability", pa.array(shares, pa.float32())).cast(schema))
    return Dataset.from_file(str(path))


def _scores(row: Row) -> tuple[int | None, int | None]:
    """Ratings of the chosen and of the rejected clip; chosen is what was heard as a, unless b won."""
    return (row.score_b, row.score_a) if row.preference == "b" else (row.score_a, row.score_b)


def _preference_row(store: VoteStore, row: Row) -> dict[str, Any]:
    """One vote as a preference row. a is what the listener heard as a, and `preference` says on which side it won."""
    a, b = ("second", "first") if row.swapped else ("first", "second")
    heard = _answer(row)
    sides = {"chosen": (b, heard.seconds_b), "rejected": (a, heard.seconds_a)}
    if row.preference != "b":
        sides = {"chosen": (a, heard.seconds_a), "rejected": (b, heard.seconds_b)}
    built: dict[str, Any] = {
        "prompt": row.prompt,
        "preference": row.preference,
        "listener": row.listener,
        "source": SIMULATED if is_simulated(row.listener) else "collected",
        "created_at": datetime.fromtimestamp(row.voted_at, UTC).isoformat(timespec="seconds"),
    }
    for column, (clip, seconds) in sides.items():
        found = row._mapping
        audio, rate = read_audio(store.clip_file(found[f"{clip}_id"]))
        built[column] = {"bytes": audio_bytes(audio, rate), "path": f"{found[f'{clip}_id']}.flac"}
        built[f"{column}_model"] = found[f"{clip}_model"]
        built[f"{column}_seed"] = found[f"{clip}_seed"]
        built[f"seconds_{column}"] = seconds
    return built
