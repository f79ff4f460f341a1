"""Where a model name leads: a checkpoint that ships inside this package, a folder, or a repository on the Hub.

Every place that takes a model takes the same three kinds of name, through :func:`resolve`. Folders are checked before
anything is loaded from them: weights are read from safetensors only, and a file that was cut short is named as such.
"""

import json
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

CHECKPOINTS = Path(__file__).parent / "checkpoints"

# name -> what it is, in the words that error messages and `--help` show
BUNDLED: dict[str, str] = {
    "musicrl-tiny": "text-to-music generator of the MusicGen architecture",
    "musicrl-tiny-adherence": "CLAP-architecture model of text and sound, for the adherence reward",
    "musicrl-tiny-quality": "reference-free predictor of the mean opinion score, for the quality reward",
}

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


def is_repo_id(name: str) -> bool:
    """Whether a name can be a Hub id, "namespace/name"; the few old ids without a namespace do not count."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def resolve(name_or_path: str | Path, argument: str = "name_or_path") -> str:
    """Turn what a user typed into something that `from_pretrained` accepts.

    Args:
        name_or_path: a bundled name (a key of `BUNDLED`), an existing folder, or a Hub id `organisation/name`.
        argument: what messages call it.

    Returns:
        The folder as a string, or the Hub id unchanged. A folder wins over a Hub id that is spelled alike.

    Raises:
        ValueError: the name is none of the three, or the folder's weights are pickled, incomplete or cut short.
        FileNotFoundError: a bundled name whose folder is missing from this installation.

    Example:
        >>> resolve("facebook/musicgen-small")
        'facebook/musicgen-small'
    """
    name = str(name_or_path)
    if name in BUNDLED:
        folder = CHECKPOINTS / name
        if not folder.is_dir():
            raise FileNotFoundError(
                f"`{argument}` = {name!r} ships inside the package, but {folder} is missing: install the package again."
            )
        check_weights(folder)
        return str(folder)

    path = Path(name).expanduser()
    if name and path.is_dir():
        check_weights(path)
        return str(path)
    if name and path.is_file():
        raise ValueError(f"`{argument}` = {name!r} is a file: give the folder that holds it, with its config.json.")
    if not is_repo_id(name):
        raise ValueError(
            f"`{argument}` = {name!r} is neither an existing folder nor a Hub id (organisation/name) nor one of the "
            f"bundled names: {', '.join(BUNDLED)}. Check the spelling, or give one of these."
        )
    return name


def check_weights(folder: str | Path) -> None:
    """Refuse a folder whose weights cannot be read safely and whole; a folder without weights passes.

    Raises:
        ValueError: as :func:`refuse_pickle` and :func:`check_safetensors`, or a shard of a split checkpoint is missing.
    """
    folder = Path(folder)
    refuse_pickle(folder)
    for path in sorted(folder.glob("*.safetensors")):
        check_safetensors(path)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise ValueError(f"{index} names {missing[0]}, which is not in {folder}: download or save the model again.")


def refuse_pickle(folder: str | Path) -> None:
    """Refuse a folder whose only weights are pickled: unpickling runs whatever code the file brings.

    Raises:
        ValueError: names the file and the way to convert it.
    """
    folder = Path(folder)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLED_SUFFIXES)
    if pickled and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder / pickled[0]} is a pickle, which can run code as it loads, and {folder} has no safetensors beside "
            "it: convert it where you trust its origin, with `model.save_pretrained(folder)` in transformers (which "
            "writes model.safetensors), and give that folder."
        )


def check_safetensors(path: str | Path) -> None:
    """Check a safetensors file's header against its length, without reading the tensors.

    Raises:
        ValueError: the file was cut short, or is no safetensors file at all (a Git LFS pointer, an error page).
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} ({Path(path).stat().st_size} bytes) is not a whole safetensors file ({error}): it was cut short or "
            "is a placeholder. Download or save it again (`git lfs pull` in a git clone)."
        ) from error


def name_of(name_or_path: str | Path) -> str:
    """The bundled name of a folder inside this package; anything else as it is.

    What is written into a file for others must not hold the place where this computer keeps its packages.
    """
    path = Path(name_or_path)
    return path.name if path.parent == CHECKPOINTS and path.name in BUNDLED else str(name_or_path)
