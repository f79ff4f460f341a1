"""The files of a data set, here or on the Hub: Parquet as `datasets` reads it, and nothing else that it would read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.packaged_modules.parquet.parquet import Parquet

# what `datasets` and pyarrow raise for a damaged file
_DAMAGE = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, DatasetsError, pa.ArrowException)


def load_split(where: str, split: str) -> Dataset:
    """The rows of one split of a folder or Hub id.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: there is no such split, or it cannot be read, or consists of anything but Parquet files of its own.
    """
    with _read_errors(where, split):
        builder = datasets.load_dataset_builder(where)
    _check_data_files(builder, where)
    with _read_errors(where, split):
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


def split_names(where: str) -> list[str]:
    """The splits of a folder or Hub id; raises as `load_split`."""
    with _read_errors(where, "train"):
        builder = datasets.load_dataset_builder(where)
    return [str(name) for name in builder.config.data_files or {}]


@contextmanager
def _read_errors(where: str, split: str) -> Iterator[None]:
    """What `datasets` raises, as this package's errors."""
    try:
        yield
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"preferences {where!r} are neither a folder here nor a data set that the Hub gives "
            f"({type(error).__name__}): check the name, the network and, for a private set, `hf auth login`"
        ) from error
    except _DAMAGE as error:
        if isinstance(error, ValueError) and "split" in str(error):
            raise ValueError(f"preferences {where!r} have no split {split!r}: {error}") from error
        raise ValueError(f"preferences {where!r} cannot be read ({_cause(error)})") from error


def read_text(path: Path, label: str | Path) -> str:
    """A text file.

    Raises:
        ValueError: it is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{label} is no text in UTF-8 ({error}): save it as that, or copy it again") from error


@contextmanager
def reading_parquet(label: str | Path) -> Iterator[None]:
    """What is raised while a Parquet file is read, as one error.

    Raises:
        ValueError: it is damaged.
    """
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"{label} cannot be read as Parquet ({_cause(error)}): copy it again") from error


def _cause(error: Exception) -> str:
    cause = error.__cause__ or error  # `datasets` itself says no more than that generating failed
    return f"{type(cause).__name__}: {cause}"


def _check_data_files(builder: datasets.DatasetBuilder, where: str) -> None:
    """Refuse what `datasets` would read beside the Parquet files of a folder or repository: archives, which it unpacks,
    other formats, and places elsewhere that a card names.

    Raises:
        ValueError: naming the first such file.
    """
    files = [str(file) for files in (builder.config.data_files or {}).values() for file in files]
    root = Path(where).resolve() if Path(where).is_dir() else None
    for file in files:
        if root is None:
            inside = file.startswith(f"hf://datasets/{where}@") and ".." not in file.split("/")
        else:
            inside = Path(file).resolve().is_relative_to(root)
        if not inside or not file.endswith(".parquet"):
            raise ValueError(
                f"preferences {where!r} name {file}: only Parquet files of their own are read; remove the rest"
            )
    if not files or not isinstance(builder, Parquet):
        raise ValueError(f"preferences {where!r} are read by {type(builder).__name__}: they have to be Parquet files")


def was_downloaded(repo_id: str) -> bool:
    """Whether `datasets` keeps a data set of the Hub, which it then loads without asking."""
    return (Path(datasets.config.HF_DATASETS_CACHE) / repo_id.replace("/", "___")).is_dir()
