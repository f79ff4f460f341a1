"""Where a model name leads: a checkpoint that ships inside this package, a folder, or a repository on the Hub.

Every place that takes a model takes the same three kinds of name, through :func:`resolve`. Folders are checked before
anything is loaded from them: weights are read from safetensors only, and a file that was cut short is named as such. What
ships inside the package is compared with its SHA-256, once a process.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from traceback import walk_tb
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

CHECKPOINTS = Path(__file__).parent / "checkpoints"
MANIFEST = "SHA256SUMS"  # in CHECKPOINTS, as `sha256sum` writes and checks it

# name -> what it is, in the words that error messages and `--help` show
BUNDLED: dict[str, str] = {
    "musicrl-tiny": "text-to-music generator of the MusicGen architecture",
    "musicrl-tiny-adherence": "CLAP-architecture model of text and sound, for the adherence reward",
    "musicrl-tiny-quality": "reference-free predictor of the mean opinion score, for the quality reward",
    "musicrl-tiny-r": "adapter on musicrl-tiny, tuned on adherence and quality",
    "musicrl-tiny-u": "adapter on musicrl-tiny, tuned on what simulated listeners prefer",
    "musicrl-tiny-ru": "adapter on musicrl-tiny-r, tuned on what simulated listeners prefer",
}

PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


def is_repo_id(name: str) -> bool:
    """Whether a name can be a Hub id, "namespace/name"; the few old ids without a namespace do not count."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def resolve(name_or_path: str | Path, argument: str = "name_or_path", offered: Sequence[str] = tuple(BUNDLED)) -> str:
    """Turn what a user typed into something that `from_pretrained` accepts.

    Args:
        name_or_path: a bundled name (a key of `BUNDLED`), an existing folder, or a Hub id `organisation/name`.
        argument: what messages call it.
        offered: bundled names that would do there, for the message.

    Returns:
        The folder as a string, or the Hub id unchanged. A folder wins over a Hub id that is spelled alike.

    Raises:
        ValueError: the name is none of the three; the folder's weights are pickled, incomplete or cut short; a bundled
            file is not the one that was released.
        FileNotFoundError: a bundled name whose folder, or a file of it, is missing from this installation.

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
        _check_released(folder)
        return str(folder)

    path = os.path.expanduser(name)  # os.path, which takes a name that can be no path for one that leads nowhere
    if name and os.path.isdir(path):
        check_weights(path)
        return str(Path(path))
    if name and os.path.isfile(path):
        raise ValueError(f"`{argument}` = {name!r} is a file: give the folder that holds it, with its config.json.")
    if not is_repo_id(name):
        bundled = f" nor one of the bundled names ({', '.join(offered)})" if offered else ""
        raise ValueError(
            f"`{argument}` = {name!r} is neither an existing folder nor a Hub id (organisation/name){bundled}: check the "
            f"spelling, or give {'one of these' if offered else 'a folder or an id'}."
        )
    return name


def check_weights(folder: str | Path) -> None:
    """Refuse a folder whose weights cannot be read safely and whole; a folder without weights passes.

    Raises:
        ValueError: as :func:`refuse_pickle` and :func:`check_safetensors`, or a shard of a split checkpoint is missing or
            lies elsewhere.
    """
    folder = Path(folder)
    refuse_pickle(folder)
    for path in sorted(folder.glob("*.safetensors")):
        check_safetensors(path)
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(_is_file_name(shard) for shard in shards.values()):
            raise ValueError(f"{index} has no `weight_map` from tensors to files beside it: save the model again.")
        missing = sorted(shard for shard in set(shards.values()) if not (folder / shard).is_file())
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


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it cannot be read as one, naming the file.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): write it again or remove it.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}: it has to be a JSON object.")
    return content


@contextmanager
def loading(source: str | Path) -> Iterator[None]:
    """Say where a model comes from whose config, weights and tokenizer make none.

    Raises:
        ValueError: naming the source.
    """
    try:
        yield
    except Exception as error:  # which tokenizers raises itself, and transformers whatever a wrong value runs into
        raised_in = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)][-1]
        own = type(error) is ValueError and raised_in.startswith(f"{__package__}.")
        if own or isinstance(error, OSError) and not Path(source).is_dir():
            raise
        raise ValueError(
            f"{source} cannot be loaded: its configuration, its weights and what else it holds make no model of this kind "
            f"({type(error).__name__}: {error}). Save or download the model again."
        ) from error


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


# -- what ships inside the package -----------------------------------------------------------------------------------------


def manifest_of(checkpoints: Path) -> dict[str, str]:
    """Path in the folder -> SHA-256 of each file of the bundled checkpoints, as they are now."""
    return {
        path.relative_to(checkpoints).as_posix(): sha256_of(path)
        for name in sorted(BUNDLED)
        for path in sorted((checkpoints / name).rglob("*"))
        if path.is_file()
    }


def write_manifest(checkpoints: Path | None = None) -> Path:
    """Write SHA256SUMS beside the checkpoints, for the files that are there now: `python recipes/publish.py --manifest`."""
    folder = CHECKPOINTS if checkpoints is None else checkpoints
    lines = [f"{digest}  {name}\n" for name, digest in manifest_of(folder).items()]
    aside = folder / f".{MANIFEST}.part"
    aside.write_text("".join(lines), encoding="utf-8")
    return aside.replace(folder / MANIFEST)


def read_manifest(checkpoints: Path) -> dict[str, str]:
    """Path in the folder -> SHA-256, as SHA256SUMS says.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = checkpoints / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing, which the bundled models are checked by: install the package again."
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


@cache
def _check_released(folder: Path) -> None:
    """Refuse a bundled checkpoint whose files are not those of the release.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    released = read_manifest(folder.parent)
    remedy = "install the package again, or give a folder of your own by its path"
    there = {path.relative_to(folder.parent).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for name in sorted(name for name in released if name.startswith(f"{folder.name}/")):
        if name not in there:
            raise FileNotFoundError(f"{folder.parent / name} ships with {folder.name!r} and is missing: {remedy}.")
    for name, path in there.items():
        found = sha256_of(path)
        if name not in released:
            raise ValueError(f"{path} does not belong to {folder.name!r} as it was released: remove it, or {remedy}.")
        if found != released[name]:
            raise ValueError(
                f"{path} is not the file that was released (SHA-256 {found[:16]}..., {MANIFEST} says "
                f"{released[name][:16]}...): it was changed or damaged; {remedy}."
            )


def sha256_of(path: Path) -> str:
    """Digest of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name_of(name_or_path: str | Path) -> str:
    """The bundled name of a folder inside this package; anything else as it is.

    What is written into a file for others must not hold the place where this computer keeps its packages.
    """
    path = Path(name_or_path)
    return path.name if path.parent == CHECKPOINTS and path.name in BUNDLED else str(name_or_path)
