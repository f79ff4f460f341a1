"""What is left beside weights and preferences: `result.json` by a training run, `import.json` by an import,
`collection.json` by an export of collected votes.

Cards are written from them, and so are the records of models made from other models.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .audio import atomic_path
from .bundled import name_of, read_json
from .places import base_of_adapter

RECORD_FILE = "result.json"
IMPORT_FILE = "import.json"
COLLECTION_FILE = "collection.json"


@dataclass
class Record:
    """What `result.json` says about a training run; every field may be left out.

    Attributes:
        base_model: what the training started from: a Hub id, a bundled name or a folder.
        method: "DPO", "PPO", "from scratch", ...
        datasets: Hub ids of the preferences.
        training_data: sentences about everything else that was learned from, with its licence.
        license: of the weights, as the Hub spells it.
        metrics: name -> number, text or a mapping of more of them.
        config: every setting of the run.
        limits: sentences, added to those that hold for every model of the kind.
        clips: path in the folder -> the prompt that the model made that clip for.
        command, date, hardware, seconds: how, when, on what and how long it was trained or measured.
    """

    base_model: str | None = None
    method: str | None = None
    datasets: list[str] = field(default_factory=list)
    training_data: str | None = None
    license: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)
    clips: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    date: str | None = None
    hardware: str | None = None
    seconds: float | None = None

    @property
    def metric_rows(self) -> dict[str, str]:
        """`metrics` as a card shows them: flat, in words, numbers to four digits, without what is not defined."""
        return {name.replace("_", " "): value for name, value in _flatten(self.metrics) if value != "None"}

    @property
    def config_rows(self) -> dict[str, str]:
        """`config` as a card shows it."""
        return dict(_flatten(self.config))

    @property
    def provenance(self) -> str:
        """One line that says how the numbers came about; "" where nothing was recorded."""
        parts = [f"`{_without_folders(self.command)}`" if self.command else "", self.hardware or "", self.date or ""]
        parts.append(f"{self.seconds:.0f} s" if self.seconds is not None else "")
        told = ", ".join(part for part in parts if part)
        return f"Recorded by: {told}." if told else ""


_RECORD_TYPES = {
    field.name: {"str | None": (str, type(None)), "float | None": (int, float, type(None))}.get(
        str(field.type), list if str(field.type).startswith("list") else dict
    )
    for field in dataclasses.fields(Record)
}


@dataclass
class ImportRecord:
    """What `import.json` says about preferences that came from elsewhere.

    Attributes:
        source: as in the rows' `source`.
        license: that the data set was published under, as the Hub spells it; None where its authors gave none.
        address: where it was published.
        rows_read: rows of its tables that were looked at: comparisons, or clips with ratings.
        comparisons: rows that were written.
        left_out: reason -> how many.
        options: settings of the import.
        date: ISO 8601.
    """

    source: str
    rows_read: int
    comparisons: int
    date: str
    license: str | None = None
    address: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


def read_import(folder: str | Path) -> ImportRecord | None:
    """Read `import.json`, or None where the folder has none.

    Raises:
        ValueError: the file is not what `ImportRecord.to_json` writes.
    """
    path = Path(folder) / IMPORT_FILE
    if not path.is_file():
        return None
    try:
        return ImportRecord(**read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no record of an import ({error}): import again or remove it.") from error


@dataclass
class CollectionRecord:
    """What `collection.json` says about votes that were collected on a listening page.

    Attributes:
        license: that the listeners agreed to, as the Hub spells it.
        consent: what they agreed to, word for word; several where the text was changed.
        protocol: the rules that held, name -> value.
        listeners, simulated_listeners: people, and rules in their place, whose votes are among the rows.
        checks: kind of attention check -> {"passed": how many, "failed": how many}.
        agreement: Krippendorff's alpha of the preferences, and of the ratings where clips were rated; None where it is
            not defined.
        shared_pairs: pairs that two or more listeners voted on, which agreement is measured by.
        date: ISO 8601.
        collection: id of the store, which no other one has; None where an earlier version wrote the file.
    """

    license: str
    consent: list[str]
    protocol: dict[str, Any]
    listeners: int
    simulated_listeners: int
    checks: dict[str, dict[str, int]]
    agreement: dict[str, float | None]
    shared_pairs: int
    date: str
    collection: str | None = None

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


def agreement_in_words(agreement: Mapping[str, float | None], shared_pairs: int) -> str:
    """How far listeners agree, or why that is not known; the arguments are those of a `CollectionRecord`."""
    if not shared_pairs:
        return "not known, as no two listeners voted on one pair"
    values = [f"{alpha:.3f} of the {name}" for name, alpha in agreement.items() if alpha is not None]
    told = ", ".join(values) or "not defined, as all chose the same"
    return f"Krippendorff's alpha is {told} (pairs with two votes or more: {shared_pairs})"


def read_collection(folder: str | Path) -> CollectionRecord | None:
    """Read `collection.json`, or None where the folder has none.

    Raises:
        ValueError: the file is not what `CollectionRecord.to_json` writes.
    """
    path = Path(folder) / COLLECTION_FILE
    if not path.is_file():
        return None
    try:
        return CollectionRecord(**read_json(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no record of a collection ({error}): export again or remove it.") from error


def read_record(folder: str | Path) -> Record:
    """Read `result.json`; a folder without one gives an empty record. Keys that no card shows are passed over.

    Raises:
        ValueError: the file is not a JSON object, or holds something of another type than the record.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return Record()
    known = {key: value for key, value in read_json(path).items() if key in _RECORD_TYPES}
    for key, value in known.items():
        if not isinstance(value, _RECORD_TYPES[key]):
            raise ValueError(f"{path}: `{key}` is {value!r:.100}: write it as musicrl_hf.records.Record has it.")
    return Record(**known)


def write_record(folder: str | Path, record: Record) -> Path:
    """Write `result.json` into a model's folder, aside and renamed; fields that say nothing are left out.

    A base model that is a folder is written as an absolute path, so that it is found from anywhere on this computer.

    Example:
        >>> write_record("out/dpo", Record(base_model="musicrl-tiny", method="DPO", metrics={"win rate": 0.61}))
    """
    path = Path(folder) / RECORD_FILE
    content = {key: value for key, value in dataclasses.asdict(record).items() if value not in (None, [], {})}
    if record.base_model is not None and Path(record.base_model).is_dir():
        content["base_model"] = name_of(Path(record.base_model).resolve())
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def origin_of(name_or_path: str | Path, _seen: frozenset[str] = frozenset()) -> str | None:
    """The Hub id or bundled name that a name leads to: itself, or for a folder what its model was made from.

    None where a folder on the way does not say.
    """
    name = name_of(name_or_path)
    return base_of(name, _seen) if os.path.isdir(name) else name


def base_of(folder: str | Path, _seen: frozenset[str] = frozenset()) -> str | None:
    """The Hub id or bundled name that the model in a folder was made from, over as many folders as it takes, or None."""
    folder = Path(folder)
    place = str(folder.resolve())
    if place in _seen:  # a run that wrote over the model it started from
        return None
    if (folder / "adapter_config.json").is_file():
        above: str | None = base_of_adapter(folder)
    else:
        above = read_record(folder).base_model
    return None if above is None else origin_of(above, _seen | {place})


def public_record(folder: str | Path) -> bytes:
    """`result.json` as it may be published: without the places where this computer keeps its files."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(part) for key, part in value.items()}
        if isinstance(value, list):
            return [cleaned(part) for part in value]
        return _without_folders(name_of(value)) if isinstance(value, str) else value

    content = json.loads((Path(folder) / RECORD_FILE).read_text(encoding="utf-8"))
    return (json.dumps(cleaned(content), indent=1, ensure_ascii=False) + "\n").encode()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        name = prefix + key
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}, ")
        elif isinstance(value, float):
            yield name, f"{value:.4g}"
        elif isinstance(value, list):
            yield name, ", ".join(str(part) for part in value)
        else:
            yield name, _without_folders(str(value))


def _without_folders(text: str) -> str:
    """Absolute paths cut down to their last part: a card is public, the layout of a home folder is not."""
    return re.sub(r"(?<![\w:/])/(?:[^\s/:]+/)+([^\s/]*)", r"\1", text)
