"""The tables and clips of a data set that others published.

Tables are Parquet, CSV, JSON lines, or JSON files of one row each. Clips are files, or encoded bytes in a Parquet table,
which stay there until they are needed: they are never decoded by `datasets`, which would need torchcodec.

Messages count rows as a spreadsheet or an editor does: the first one of a file is row 1, which in CSV is the header.
"""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from ...audio import atomic_path
from ..data_files import reading_parquet
from .sources import Source, files_of_config
from .writing import Clip

TABLE_SUFFIXES = (".parquet", ".csv", ".jsonl", ".json")
CLIP_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg")
# So begins what a spreadsheet would work out, or what is marked as a text already.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


class _NotALine(ValueError):
    """A line of a table that is not JSON."""


@dataclass(frozen=True)
class StoredAudio:
    """An audio cell of a Parquet table. `load` gives its bytes; it is None where the cell holds a path only, or nothing."""

    place: str  # table, row and column
    path: str
    load: Callable[[], bytes] | None = field(compare=False, repr=False)


@dataclass(frozen=True)
class TableRow:
    """A row of a table; `where` is what messages call it, `folder` where the table lies in the data set."""

    where: str
    values: Mapping[str, Any]
    folder: str = ""

    def text(self, column: str) -> str:
        """The cell without blanks around it; "" where it is null or the table has no such column."""
        value = self.values.get(column)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # a column of whole numbers with a gap comes as floats
        return "" if value is None else str(value).strip()

    def number(self, column: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """The cell as a finite number; None where it is empty or the table has no such column.

        Raises:
            ValueError: it is no number, or lies outside of `low` to `high`.
        """
        value = self.values.get(column)
        if value is None or value == "":
            return None
        number = to_number(value)
        if number is None:
            raise self.error(column, "it has to be a number")
        if not low <= number <= high:
            raise self.error(column, f"it has to lie between {low:g} and {high:g}")
        return number

    def label(self, column: str, meanings: Mapping[str, str]) -> str:
        """What the cell means, by its text in lower case.

        Raises:
            ValueError: `meanings` does not know it.
        """
        meaning = meanings.get(self.text(column).lower())
        if meaning is None:
            raise self.error(column, f"it has to be one of {', '.join(repr(name) for name in meanings)}")
        return meaning

    def error(self, column: str, remedy: str) -> ValueError:
        """What is wrong with a cell, to be raised."""
        return ValueError(f"{self.where}: {column} is {self.values.get(column)!r}: {remedy}")


def read_rows(
    source: Source, columns: Sequence[str], *, config: str | None = None, alone: str | None = None
) -> list[TableRow]:
    """The rows of every table that has the columns.

    Args:
        source: the data set.
        columns: that a row has to have, the one first that no other table has.
        config: a configuration of the data set's card, or a folder; only tables of it are read.
        alone: name of a table that holds all rows of the others; where it is there, the others are not read.

    Raises:
        FileNotFoundError: there is no table.
        ValueError: none has the columns, one has the first but lacks another, a file cannot be read, or no such `config`.
    """
    names = [name for name in source.names if name.endswith(TABLE_SUFFIXES)]
    if config is not None:
        names = files_of_config(source, names, config)
    names = [name for name in names if PurePosixPath(name).name == alone] or names
    if not names:
        raise FileNotFoundError(
            f"{source.label} has no table: it needs a {', '.join(TABLE_SUFFIXES[:-1])} or .json file"
        )
    rows: list[TableRow] = []
    others: list[str] = []
    for name, path in sorted(source.fetch(names).items()):
        found = _table_columns(path)
        if columns[0] not in found:
            others.append(f"{name} ({', '.join(found) or 'no columns'})")
            continue
        folder = PurePosixPath(name).parent.as_posix().removeprefix(".")
        for where, values in _table_rows(path, name):
            missing = [column for column in columns if column not in values]
            if missing:
                raise ValueError(f"{where}: no column {', '.join(missing)}: it has {', '.join(map(str, values))}")
            rows.append(TableRow(where, values, folder))
    if not rows:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"no table of {source.label} has rows with the columns {', '.join(columns)}: found {'; '.join(others[:3])}{more}"
        )
    return rows


def clip_of(
    source: Source,
    row: TableRow,
    column: str,
    *,
    system: str = "unknown",
    begin_s: float = 0.0,
    end_s: float | None = None,
    cell: Any = None,
) -> Clip | None:
    """The clip that a cell of the row names or holds, or None where the cell is empty, as that of a withheld clip is.

    Args:
        source: the data set that the clip lies in.
        row, column: the cell; a path is looked for in the data set and beside the table.
        system, begin_s, end_s: of the clip.
        cell: what to take instead of the cell's own content.

    Raises:
        ValueError: the path leads out of the data set.
        FileNotFoundError: it holds no such file.
    """
    value = row.values.get(column) if cell is None else cell
    if isinstance(value, StoredAudio) and value.load is not None:
        return Clip(f"{value.place}/{value.path or column}", value.load, system, begin_s, end_s, row.where)
    path = value.path if isinstance(value, StoredAudio) else str(value or "").strip()
    if not path:
        return None
    beside = f"{row.folder}/{path}" if row.folder else path
    try:
        load = source.locate(path if path in source.known or beside not in source.known else beside)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{row.where}: {column}: {error}") from error
    return Clip(path, load, system, begin_s, end_s, row.where)


def catalogue(
    source: Source, key: Callable[[str], str | None], id_column: str | None = None
) -> dict[str, list[StoredAudio | str]]:
    """Every clip of a data set by a key: files by `key(path)`, cells of Parquet tables by that of their path or id.

    Args:
        source: the data set.
        key: what a clip is looked up by; None passes it over.
        id_column: column of a table that names its clips; None takes the path in the audio cell.
    """
    found: dict[str, list[StoredAudio | str]] = {}

    def add(name: str, clip: StoredAudio | str) -> None:
        own = key(name)
        if own is not None:
            found.setdefault(own, []).append(clip)

    for name in source.names:
        if name.lower().endswith(CLIP_SUFFIXES):
            add(name, name)
    tables = [name for name in source.names if name.endswith(".parquet")]
    for name, path in sorted(source.fetch(tables).items()):
        for _, values in _table_rows(path, name):
            for cell in values.values():
                if isinstance(cell, StoredAudio):
                    add(str(values.get(id_column)) if id_column in values else cell.path, cell)
    return found


def to_number(value: Any) -> float | None:
    """A finite float, or None where `value` is no number."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def read_text_table(path: Path, label: str) -> list[TableRow]:
    """The rows of a .csv, .jsonl or .json file; CSV cells are text.

    Args:
        path: the file.
        label: what messages call it.

    Raises:
        ValueError: not UTF-8, a line that is no JSON object, or a row with more columns than the first one of a CSV file.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            read = {".csv": _csv_rows, ".json": _json_rows}.get(path.suffix, partial(_lines_of_json, label))
            rows = list(read(file))
    except _NotALine:
        raise
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{label} cannot be read as {path.suffix[1:].upper()} ({error}): copy it again") from error
    for number, values in rows:
        if not isinstance(values, dict) or None in values:
            raise ValueError(f"{label}, row {number}: has other columns than the first row: {str(values)[:100]}")
    return [TableRow(f"{label}, row {number}", values) for number, values in rows]


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table as CSV, there whole or not at all.

    Prompts are what anybody typed: a text that a spreadsheet would take for a formula has an apostrophe before it, which
    `read_text_table` takes away again.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in row])


def _csv_rows(file: TextIO) -> Iterator[tuple[int, Any]]:
    """As `csv.DictReader`, with each row's number: blank rows are passed over and counted, as spreadsheets show them, and marks of `write_csv` taken away."""
    numbered = ((number, cells) for number, cells in enumerate(csv.reader(file), 1) if cells)
    _, header = next(numbered, (0, []))
    for number, marked in numbered:
        cells = [cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell for cell in marked]
        beyond: dict[Any, Any] = {None: cells[len(header) :]} if len(cells) > len(header) else {}
        yield number, dict(zip_longest(header, cells[: len(header)])) | beyond


def _json_rows(file: TextIO) -> Iterator[tuple[int, Any]]:
    content = json.load(file)
    rows = content if isinstance(content, list) else [content]
    if all(isinstance(row, dict) for row in rows):  # else it is JSON, but no table
        yield from enumerate(rows, 1)


def _lines_of_json(label: str, file: TextIO) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            if "\\u" in line:
                json.dumps(values, ensure_ascii=False).encode()  # half a character can be escaped only
        except (ValueError, RecursionError) as error:
            raise _NotALine(f"{label}, row {number}: not a line of JSON ({error})") from error
        yield number, values


def _table_columns(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        with reading_parquet(path):
            return pq.read_schema(path).names
    rows = read_text_table(path, str(path))
    return list(rows[0].values) if rows else []


def _table_rows(path: Path, name: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """What messages call a row, and its cells."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, name)
        return
    rows = read_text_table(path, name)
    for row in rows:
        yield (name if path.suffix == ".json" and len(rows) == 1 else row.where), dict(row.values)


def _parquet_rows(path: Path, name: str) -> Iterable[tuple[str, dict[str, Any]]]:
    with reading_parquet(name):
        table = Dataset.from_parquet(str(path)).data  # mapped into memory, so that clips may stay where they are
        table.validate(full=True)
    columns: dict[str, Sequence[Any]] = {}
    for column in table.column_names:
        values = table.column(column)
        kind = values.type
        if pa.types.is_struct(kind) and {"bytes", "path"} <= {kind[i].name for i in range(kind.num_fields)}:
            columns[column] = _stored_audio(values, f"{name}, {column}")
        else:
            columns[column] = values.to_pylist()
    for number in range(table.num_rows):
        yield f"{name}, row {number + 1}", {column: values[number] for column, values in columns.items()}


def _stored_audio(cells: pa.ChunkedArray, place: str) -> list[StoredAudio]:
    paths = pc.struct_field(cells, "path").to_pylist()
    sizes = pc.binary_length(pc.struct_field(cells, "bytes")).to_pylist()

    def load(number: int) -> bytes:
        return cells[number]["bytes"].as_py()

    return [
        StoredAudio(f"{place} {number + 1}", path or "", partial(load, number) if size else None)
        for number, (path, size) in enumerate(zip(paths, sizes, strict=True))
    ]
