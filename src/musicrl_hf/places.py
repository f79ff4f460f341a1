"""What lies at a place, told before anything is loaded from it or written to it: in a folder, or behind a Hub id."""

import hashlib
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from .bundled import BUNDLED, CHECKPOINTS, is_repo_id, read_json, resolve, sha256_of

MODEL_TYPES = {  # model_type in config.json -> what it is
    "musicgen": "a generator",
    "clap": "a CLAP model",
    "musicrl_quality": "a quality reward",
    "musicrl_preference": "a preference reward",
    "encodec": "a codec",
}
_SPECS = {  # how `--reward` takes what is no generator
    "clap": "adherence:FOLDER",
    "musicrl_quality": "quality:FOLDER",
    "musicrl_preference": "preference:FOLDER",
}
_HUB_TIMEOUT_S = 10.0
SAMPLING_FILE = "generation_config.json"


def model_type_of(folder: str | Path) -> str | None:
    """`model_type` in the folder's config.json; None where there is no such file.

    Raises:
        ValueError: the file is no JSON object, or its `model_type` no text.
    """
    path = Path(folder) / "config.json"
    found = read_json(path).get("model_type") if path.is_file() else None
    if not isinstance(found, str | None):
        raise ValueError(f"{path}: `model_type` is {found!r}: it has to be text; save the model again.")
    return found


def whole_path(name: str | None) -> str | None:
    """A folder by its whole path, so that it is found from any working directory; bundled names and others as they are."""
    if not name or name in BUNDLED or not os.path.isdir(folder := os.path.expanduser(name)):
        return name
    return str(Path(folder).resolve())


def contents_of(folder: str | Path) -> str | None:
    """What a folder holds, in words; None where it is empty, missing, or holds nothing that this package writes or reads."""
    folder = Path(folder)
    model_type = model_type_of(folder)
    checkpoints = {model_type_of(path) for path in folder.glob("checkpoint-*")} - {None}
    found = {
        "an adapter": (folder / "adapter_config.json").is_file(),
        MODEL_TYPES.get(str(model_type), f"a model with model_type {model_type!r}"): model_type is not None,
        "preferences": any((folder / "data").glob("*.parquet")),
        "clips with their table": any((folder / name).is_file() for name in ("clips.jsonl", "clips.csv", "pairs.csv")),
        "a whole loop of `musicrl align`": (folder / "stages").is_dir(),
        "an evaluation": (folder / "results.json").is_file(),
        **{f"checkpoints of {MODEL_TYPES.get(str(name), name)}": True for name in checkpoints},
    }
    return next((what for what, there in found.items() if there), None)


@contextmanager
def alone_in(folder: str | Path, argument: str = "output_dir") -> Iterator[None]:
    """Make a folder, and keep other processes that ask the same from it while the body runs; only Windows cannot keep them.

    Where the body fails before anything is in it, a folder that was made for it is gone again.

    Raises:
        ValueError: another process is there.
    """
    is_new = not Path(folder).exists()
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        with _locked(folder, argument):
            yield
    except BaseException:
        if is_new and not any(Path(folder).iterdir()):
            Path(folder).rmdir()
        raise


@contextmanager
def _locked(folder: str | Path, argument: str) -> Iterator[None]:
    if os.name != "posix":
        yield
        return
    import fcntl

    held = os.open(folder, os.O_RDONLY)  # the folder itself: nothing is left in it
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise ValueError(
            f"`{argument}` = {str(folder)!r}: another command is at work there; wait for its end, or give another folder."
        ) from None
    except OSError:  # some file systems lock no folders
        pass
    try:
        yield
    finally:
        os.close(held)


def check_output(folder: str | Path, makes: str, argument: str = "output_dir") -> None:
    """Refuse to write into a folder that already holds something of another kind; one's own kind may be there.

    Args:
        folder: where the command will write.
        makes: what it will write, as `contents_of` calls it.
        argument: what the message calls the folder.

    Raises:
        ValueError: naming the folder and what it holds.
    """
    if Path(folder).is_file():
        raise ValueError(f"`{argument}` = {str(folder)!r} is a file: give a folder for {makes}.")
    found = contents_of(folder)
    if found not in (None, makes, f"checkpoints of {makes}"):
        raise ValueError(
            f"`{argument}` = {str(folder)!r} holds {found}, and this command writes {makes}: give another folder, or move "
            "away what is there."
        )


def check_model_type(folder: str | Path, wanted: str, argument: str = "name_or_path") -> None:
    """Refuse a folder that holds another kind of model than `wanted`, a `model_type`.

    Raises:
        ValueError: naming the folder and the `model_type` found, with the way to use what it is.
        FileNotFoundError: there is no config.json.
    """
    found = model_type_of(folder)
    what = MODEL_TYPES[wanted]
    if found is None:
        raise FileNotFoundError(
            f"`{argument}` = {str(folder)!r} holds {contents_of(folder) or 'no config.json'}, not {what}: give the folder "
            "of a saved model."
        )
    if found != wanted:
        use = f"; as a reward it goes by {_SPECS[found]}" if found in _SPECS and wanted == "musicgen" else ""
        raise ValueError(
            f"`{argument}` = {str(folder)!r} holds {MODEL_TYPES.get(found, 'another model')} (model_type {found!r}), not "
            f"{what} (model_type {wanted!r}): give a folder with {what}{use}."
        )


def find_model(
    name_or_path: str | Path, wanted: str, argument: str = "name_or_path", _seen: frozenset[str] = frozenset()
) -> str:
    """As `resolve`, and sure that something of the right kind is there: folders are looked into, the Hub is asked once.

    Args:
        name_or_path: bundled name, folder or Hub id.
        wanted: `model_type`; for a generator ("musicgen") an adapter will do too.
        argument: what messages call the name.

    Raises:
        ValueError: as `resolve` and `check_model_type`; an adapter that does not say what it was trained on.
        FileNotFoundError: no such folder here, and the Hub does not give it.
    """
    name = str(name_or_path)
    offered = [bundled for bundled in BUNDLED if _would_do(CHECKPOINTS / bundled, wanted)]
    source = resolve(name, argument, offered)
    if not os.path.isdir(source):
        bundled = f" or a bundled name ({', '.join(offered)})" if offered else ""
        cached = any(
            isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "adapter_config.json")
        )
        check_hub(name, "model", argument, f"give the folder of a saved model{bundled}", cached=cached)
    elif wanted == "musicgen" and (Path(source) / "adapter_config.json").is_file():
        if source in _seen:
            raise ValueError(f"`{argument}` = {name!r} is an adapter on itself: name the model under it in its config.")
        find_model(base_of_adapter(source), wanted, argument, _seen | {source})
    else:
        check_model_type(source, wanted, argument)
    return source


def _would_do(folder: Path, wanted: str) -> bool:
    is_adapter = (folder / "adapter_config.json").is_file()
    return model_type_of(folder) == wanted or wanted == "musicgen" and is_adapter


def sampling_of_adapter(adapter: str) -> dict[str, float]:
    """`guidance_scale` of the adapter's own generation_config.json, a folder's or the Hub's; empty where there is none.

    Warns where the Hub cannot be asked.

    Raises:
        ValueError: it is no number of 1 or more.
    """
    path: Any = os.path.join(adapter, SAMPLING_FILE)
    if not os.path.isdir(adapter):
        try:
            path = hf_hub_download(adapter, SAMPLING_FILE)
        except RemoteEntryNotFoundError:
            return {}
        except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError):
            path = try_to_load_from_cache(adapter, SAMPLING_FILE)
            if path is None:  # else what it was when it was asked, or that there was none
                warnings.warn(
                    f"{adapter}: the Hub could not be asked for its {SAMPLING_FILE}, which may name another guidance scale than the "
                    "3.0, or its base's, that it is sampled at now.",
                    stacklevel=3,
                )
            if not isinstance(path, str):
                return {}
    scale = read_json(path).get("guidance_scale") if os.path.isfile(path) else None
    if scale is None:
        return {}
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 1 <= scale < math.inf:
        raise ValueError(f"{path}: `guidance_scale` is {scale!r}: it has to be a number of 1 (no guidance) or more.")
    return {"guidance_scale": scale}


def base_of_adapter(folder: str | Path) -> str:
    """The name of the model that the adapter in a folder was trained on.

    Raises:
        ValueError: its adapter_config.json does not say.
    """
    path = Path(folder) / "adapter_config.json"
    base = read_json(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path}: `base_model_name_or_path` is {base!r}: it has to name the model under the adapter.")
    return base


def weights_of(name_or_path: str | Path) -> str:
    """What tells a model's weights from others: a digest of its safetensors files, and of those below an adapter.

    Args:
        name_or_path: bundled name, folder, or Hub id of what was downloaded.

    Raises:
        ValueError: as `resolve` and `base_of_adapter`.
        FileNotFoundError: a Hub id of which nothing was downloaded.
    """
    folder = resolve(name_or_path)
    if not os.path.isdir(folder):
        cached = (try_to_load_from_cache(folder, name) for name in ("adapter_config.json", "config.json"))
        path = next((path for path in cached if isinstance(path, str)), None)
        if path is None:
            raise FileNotFoundError(f"`name_or_path` = {folder!r} was not downloaded: load it first.")
        folder = os.path.dirname(path)
    parts = [sha256_of(weights) for weights in sorted(Path(folder).glob("*.safetensors"))]
    if os.path.isfile(os.path.join(folder, "adapter_config.json")):
        parts.append(weights_of(base_of_adapter(folder)))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def check_hub(name: str, repo_type: str, argument: str, remedy: str, *, cached: bool) -> None:
    """Ask the Hub once whether it has what is no folder here; whoever loads it would ask many times before giving up.

    Args:
        name: "organisation/name".
        repo_type: "model" or "dataset".
        argument, remedy: for the message.
        cached: it was downloaded before, and the Hub need not answer.

    Raises:
        FileNotFoundError: no Hub id, no such repository, or no answer.
    """
    if not is_repo_id(name):
        raise FileNotFoundError(f"`{argument}` = {name!r}: there is no folder {name}; {remedy}.")
    what = {"model": "model", "dataset": "data set"}[repo_type]
    try:
        _ask_hub(name, repo_type)
        return
    except RepositoryNotFoundError:
        problem, check = (
            f"the Hub has no {what} of this name",
            "check the spelling and, for a private one, `hf auth login`",
        )
    except HfHubHTTPError as error:
        problem, check = f"the Hub answered {error.response.status_code}", "try again later"
    except OfflineModeIsEnabled:
        problem, check = "HF_HUB_OFFLINE keeps the Hub from being asked", "unset HF_HUB_OFFLINE"
    except HTTPError as error:
        problem, check = f"the Hub could not be reached ({type(error).__name__})", "check the network"
    if not cached:
        raise FileNotFoundError(
            f"`{argument}` = {name!r}: there is no folder {name} here, and {problem}; {remedy}, or {check}."
        )


@cache
def _ask_hub(name: str, repo_type: str) -> None:
    HfApi().repo_info(name, repo_type=repo_type, timeout=_HUB_TIMEOUT_S)


def unlock_weights(folder: str | os.PathLike) -> None:
    """Give weights the mode of the configuration beside them, which the umask made: safetensors locks out all but the owner."""
    configs = list(Path(folder).rglob("*config.json"))
    for weights in Path(folder).rglob("*.safetensors"):
        shutil.copymode(configs[0], weights)
