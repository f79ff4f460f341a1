"""Whose export a folder or a data set on the Hub is: no collection writes over another's, or deletes it."""

from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi

from ..hub import hub_errors
from ..preferences.schema import check_target
from ..records import COLLECTION_FILE, CollectionRecord, read_collection


def check_out(out: str | Path, collection: str | None = None) -> bool:
    """Refuse a folder that an export must not write over.

    Args:
        out: the folder.
        collection: id of the collection that is exported (`VoteStore.collection`); None where its store is not open yet.

    Returns:
        whether an earlier export lies there.

    Raises:
        ValueError: it holds anything but an earlier export, or that of another collection.
    """
    out = Path(out)
    check_target(out)
    if not out.is_dir() or not any(out.iterdir()):
        return False
    record = read_collection(out)
    if record is None:
        raise ValueError(f"out is {out}, which holds preferences that no export wrote: give another folder")
    if collection is not None:
        _check_same(f"out is {out}", record, collection, "folder")
    return True


def check_push(repo_id: str, collection: str) -> None:
    """Refuse a data set on the Hub that holds the rows of another collection, or rows of which no export is known.

    Args:
        repo_id: "namespace/name"; it need not be there yet.
        collection: id of the collection that is pushed.

    Raises:
        ValueError: it holds the export of another collection, or preferences that no export wrote.
        PermissionError, ConnectionError: the Hub does not accept the token or was not reached.
    """
    api = HfApi(library_name="musicrl_hf")
    with TemporaryDirectory(prefix="musicrl-push-") as scratch:
        with hub_errors(api, repo_id):
            is_there = api.repo_exists(repo_id, repo_type="dataset")
            there = api.list_repo_files(repo_id, repo_type="dataset") if is_there else []
            if COLLECTION_FILE not in there:
                if any(name.startswith("data/") and name.endswith(".parquet") for name in there):
                    raise ValueError(
                        f"push is {repo_id}, which holds preferences that no export wrote: give another name"
                    )
                return
            api.hf_hub_download(repo_id, COLLECTION_FILE, repo_type="dataset", local_dir=scratch)
        record = read_collection(scratch)
    if record is not None:
        _check_same(f"push is {repo_id}", record, collection, "name")


def _check_same(place: str, record: CollectionRecord, collection: str, remedy: str) -> None:
    if record.collection != collection:
        whose = (
            "another collection" if record.collection else "a collection without an id, as earlier versions wrote it"
        )
        raise ValueError(
            f"{place}, which holds the export of {whose}: give another {remedy}, or delete what is there if nobody needs it"
        )
