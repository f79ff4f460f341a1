"""Votes between named systems, without audio: what win rates and rankings are counted from."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..data_files import reading_parquet
from ..schema import Vote, votes_from_preferences
from .folder import check_columns, read_table
from .tables import read_text_table, write_csv
from .writing import ImportResult, import_result

VOTE_COLUMNS = ("prompt", "model_a", "model_b", "preference", "listener")
_IN_PLACE_OF_PROMPTS = ("battle_id", "battle_uuid")


def vote_columns(with_prompts: bool) -> tuple[str, ...]:
    """The header of a votes.csv; without prompts what stands in their place is called so, as `has_prompts` reads it."""
    return VOTE_COLUMNS if with_prompts else (_IN_PLACE_OF_PROMPTS[0], *VOTE_COLUMNS[1:])


def import_battles(src: str | Path, out: str | Path) -> ImportResult:
    """Turn a table of votes between named systems, such as Music Arena's, into `votes.csv` in the folder `out`.

    The table has no audio: it serves win rates and rankings. See `read_votes` for its columns. Where the source names no
    prompts, `votes.csv` has `battle_id` in their place, so that what is counted from it knows that too.
    """
    votes = read_votes(src)
    target = Path(out) / "votes.csv"
    written = [",".join(vote_columns(with_prompts)) for with_prompts in (True, False)]
    if target.exists() and target.read_text(encoding="utf-8").partition("\n")[0].strip() not in written:
        raise ValueError(f"out is {out}, which holds a votes.csv that no import wrote: give another folder")
    rows = ([vote.prompt, vote.model_a, vote.model_b, vote.preference, vote.listener] for vote in votes)
    write_csv(target, vote_columns(has_prompts(src)), rows)
    systems = {name for vote in votes for name in (vote.model_a, vote.model_b)}
    return import_result(out, [vote.prompt for vote in votes], [vote.preference for vote in votes], systems)


def read_votes(path: str | Path) -> list[Vote]:
    """Read a CSV of votes between systems, or the votes of a folder of preferences that compare two systems.

    Columns of the CSV: `preference` (A, B, TIE, BOTH_BAD in any case); `system_a` and `system_b` (or `model_a`, `model_b`); and,
    where they exist, `listener` and `prompt`. Where there is no prompt, `battle_id` or `battle_uuid` stands for it,
    else the row: every vote then counts as a prompt of its own in the intervals (see `has_prompts`).

    Raises:
        FileNotFoundError: if there is no such file, or the folder holds no preferences.
        ValueError: for a missing column, an unknown preference or a system against itself, naming the row.
    """
    path = table_of(path)
    if path.is_dir():
        return _votes_of_preferences(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no vote table {path}: give a CSV file or a folder of preferences")
    rows = read_table(path, ("preference",))
    prefix = "system" if "system_a" in rows[0].values else "model"
    prompt_column = next((name for name in ("prompt", *_IN_PLACE_OF_PROMPTS) if name in rows[0].values), None)
    votes = []
    for number, row in enumerate(rows):
        check_columns(row, (f"{prefix}_a", f"{prefix}_b", *([prompt_column] if prompt_column else [])))
        values = row.values
        prompt = str(number) if prompt_column is None else values[prompt_column]
        try:
            label, listener = values["preference"].strip().lower(), str(values.get("listener") or "")
            votes.append(Vote(prompt, values[f"{prefix}_a"], values[f"{prefix}_b"], label, listener))
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
    return votes


def table_of(path: str | Path) -> Path:
    """The table in a folder that holds `votes.csv` and no preferences, as `musicrl import battles` leaves it; else the path itself."""
    path = Path(path)
    alone = path.is_dir() and (path / "votes.csv").is_file() and not any(path.glob("data/*.parquet"))
    return path / "votes.csv" if alone else path


def has_prompts(path: str | Path) -> bool:
    """Whether the votes that `read_votes` reads there name prompts, so that those on one prompt are counted together."""
    path = table_of(path)
    return path.is_dir() or "prompt" in read_text_table(path, str(path))[0].values


def _votes_of_preferences(folder: Path) -> list[Vote]:
    files = sorted(folder.glob("data/*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"folder {folder} holds no data/*.parquet: give a folder of preferences or a CSV of votes"
        )
    columns = ["prompt", "chosen_model", "rejected_model", "preference", "listener"]
    with reading_parquet(folder):
        tables = [pq.read_table(path, columns=columns).replace_schema_metadata(None) for path in files]
        table = pa.concat_tables(tables)
        table.validate(full=True)
    return votes_from_preferences(Dataset(table))
