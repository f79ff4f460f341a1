"""Publish a model, an adapter, a reward or preferences to the Hub, each with a whole card.

A push is one commit: either everything of it is on the Hub or nothing. It reads the folder and writes nothing into it, so
an upload that breaks off leaves nothing behind here either. Only files on a list of safe kinds are sent; a training
folder's optimiser state, pickles and intermediate checkpoints stay at home.
"""

import fnmatch
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCardData, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from .bundled import BUNDLED, check_weights, is_repo_id, name_of, resolve
from .cards import check_card, is_stub, is_unchanged, kind_of, model_card, preference_card
from .places import unlock_weights
from .records import COLLECTION_FILE, IMPORT_FILE, RECORD_FILE, origin_of, public_record

MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "adapter_config.json",
    RECORD_FILE,
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("samples/*.wav", "samples/*.flac"),
)
PREFERENCE_FILES = ("data/*.parquet", IMPORT_FILE, COLLECTION_FILE)
# what an earlier push has left there and is not sent again is deleted: it would be read together with the new files
REPLACED = {"model": MODEL_FILES, "dataset": PREFERENCE_FILES}
ALSO_SENT = ("LICENSE", "LICENSE.txt")


@dataclass
class Upload:
    """What a push would send: look at it before you send it.

    Attributes:
        repo_id, repo_type: where to; "model" or "dataset".
        files: path in the repository -> a file here, or content that was made for the repository (the card).
        left_out: paths of the folder that are not sent.
    """

    repo_id: str
    repo_type: str
    files: dict[str, Path | bytes]
    left_out: list[str]

    @property
    def card(self) -> str:
        """The README.md that goes with it."""
        card = self.files["README.md"]
        return card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")


def prepare_model(
    path: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Iterable[str] = (),
) -> Upload:
    """Collect what a push of a generator, adapter or reward would send, without sending it.

    The folder's own README.md is taken where it is fit to be published. One that a trainer wrote by itself, or none, is
    replaced by the card that `musicrl_hf.cards.model_card` writes.

    Args:
        path: folder of a saved model or adapter, or a bundled name.
        repo_id: "namespace/name".
        base_model, license, datasets: see `musicrl_hf.cards.model_card`.

    Raises:
        ValueError: a wrong `repo_id`; weights that are missing, pickled or cut short; a card that lacks something; an
            adapter on a base that nobody else has.
        FileNotFoundError: no such folder.
    """
    _check_repo_id(repo_id)
    folder = _existing_folder(path)
    check_weights(folder)
    kind = kind_of(folder)
    if kind == "preferences":
        raise ValueError(f"path={str(path)!r} holds preferences: use push_preferences.")
    files, left_out = _collect(folder, (*MODEL_FILES, *ALSO_SENT))
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(
            f"path={str(path)!r} has no .safetensors file: save the model there with save_pretrained first."
        )
    if RECORD_FILE in files:
        files[RECORD_FILE] = public_record(folder)
    if kind == "adapter":
        files["adapter_config.json"] = _public_adapter_config(folder, base_model)
    written = model_card(folder, repo_id, base_model=base_model, license=license, datasets=datasets)
    files["README.md"] = _card(folder, written, "model")
    return Upload(repo_id, "model", files, left_out)


def prepare_preferences(folder: str | Path, repo_id: str, *, license: str | None = None) -> Upload:
    """Collect what a push of preferences would send, without sending it.

    Args:
        folder: as `musicrl_hf.preferences.save_preferences` leaves it.
        repo_id: "namespace/name".
        license: see `musicrl_hf.cards.preference_card`.

    Raises:
        ValueError: a wrong `repo_id`, no preferences in the folder, no licence, or a card that lacks something.
        FileNotFoundError: no such folder.
    """
    _check_repo_id(repo_id)
    folder = _existing_folder(folder)
    files, left_out = _collect(folder, (*PREFERENCE_FILES, *ALSO_SENT))
    written = preference_card(folder, repo_id, license=license)
    files["README.md"] = _card(folder, written, "dataset", partial(is_unchanged, folder=folder, license=license))
    return Upload(repo_id, "dataset", files, left_out)


def send(upload: Upload, *, private: bool | None = None, revision: str | None = None, token: str | None = None) -> str:
    """Create the repository and the branch where they are missing, and commit the upload.

    Args:
        upload: from `prepare_model` or `prepare_preferences`.
        private: of a repository that is created now; None takes the account's default.
        revision: branch; None is the main one.
        token: with write access; None takes the one of `hf auth login` or HF_TOKEN.

    Returns:
        the commit's address.

    Raises:
        PermissionError: the Hub does not accept the token, or the account may not write there.
        FileNotFoundError: the Hub has no such account or organisation.
        ConnectionError: the Hub was not reached, or failed.
    """
    api = HfApi(token=token, library_name="musicrl_hf")
    where: dict[str, Any] = {"repo_id": upload.repo_id, "repo_type": upload.repo_type}
    with hub_errors(api, upload.repo_id):
        api.create_repo(**where, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(**where, branch=revision, exist_ok=True)
        there = api.list_repo_files(**where, revision=revision)
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in upload.files.items()]
        gone = (name for name in there if _matches(name, REPLACED[upload.repo_type]) and name not in upload.files)
        operations += [CommitOperationDelete(name) for name in gone]
        commit = api.create_commit(
            **where, operations=operations, commit_message="Upload with musicrl_hf", revision=revision
        )
    return commit.commit_url


def push(
    path: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """Publish whatever is in the folder, a model or preferences: what `musicrl push` does.

    Arguments and errors are those of `push_model` and `push_preferences`.

    Returns:
        the commit's address.
    """
    if kind_of(_existing_folder(path)) != "preferences":
        return push_model(
            path, repo_id, private=private, revision=revision, token=token, base_model=base_model, license=license
        )
    if base_model is not None:
        raise ValueError(f"base_model={base_model!r} is for models, and {str(path)!r} holds preferences: leave it out.")
    return push_preferences(path, repo_id, private=private, revision=revision, token=token, license=license)


def push_model(
    path: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Iterable[str] = (),
) -> str:
    """Publish the generator, adapter or reward in a folder; `from_pretrained(repo_id)` loads it afterwards.

    Arguments and errors are those of `prepare_model` and `send`.

    Returns:
        the commit's address.
    """
    upload = prepare_model(path, repo_id, base_model=base_model, license=license, datasets=datasets)
    return send(upload, private=private, revision=revision, token=token)


def push_preferences(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    license: str | None = None,
) -> str:
    """Publish a folder of preferences; `datasets.load_dataset(repo_id)` loads it afterwards.

    Arguments and errors are those of `prepare_preferences` and `send`.

    Returns:
        the commit's address.
    """
    upload = prepare_preferences(folder, repo_id, license=license)
    return send(upload, private=private, revision=revision, token=token)


def retract_preferences(repo_id: str, *, token: str | None = None) -> str | None:
    """Delete the rows of a data set on the Hub, for where every listener withdrew; the card then says so.

    Earlier commits stay in the repository's history: whoever owns it can squash them there.

    Returns:
        the commit's address, or None where the Hub has no such data set, or one without the `collection.json` of an export:
        what was not collected on a listening page is not deleted.

    Raises:
        as `send`.
    """
    _check_repo_id(repo_id)
    api = HfApi(token=token, library_name="musicrl_hf")
    with hub_errors(api, repo_id):
        there = api.file_exists(repo_id, COLLECTION_FILE, repo_type="dataset")
    if not there:
        return None
    title = repo_id.split("/")[-1]
    metadata = DatasetCardData(pretty_name=title, tags=["musicrl", "music", "preference"])
    card = f"---\n{metadata}\n---\n\n# {title}\n\nThis data set holds no rows: every listener has withdrawn.\n"
    return send(Upload(repo_id, "dataset", {"README.md": card.encode()}, []), token=token)


def check_sign_in(repo_id: str, *, token: str | None = None) -> None:
    """Before hours of work whose result is to be pushed: is the Hub there, and does it accept the token?

    Raises:
        as `send`.
    """
    _check_repo_id(repo_id)
    api = HfApi(token=token, library_name="musicrl_hf")
    with hub_errors(api, repo_id):
        api.whoami()


class PushesWithCard:
    """Mixin for models: `push_to_hub` publishes with a card of ours where transformers would write an empty one, and what
    `save_pretrained` writes has one mode.
    """

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        unlock_weights(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
        base_model: str | None = None,
        license: str | None = None,
        datasets: Iterable[str] = (),
    ) -> str:
        """Save the model into a temporary folder and publish it from there.

        Args:
            repo_id: "namespace/name".
            base_model: what it was made from; where it is left out, what the model was loaded from.
            private, revision, token, license, datasets: as in `push_model`.

        Returns:
            the commit's address.
        """
        loaded_from: str = self.name_or_path  # type: ignore[attr-defined]
        if base_model is None and loaded_from:
            base_model = origin_of(loaded_from)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_model(
                folder,
                repo_id,
                private=private,
                revision=revision,
                token=token,
                base_model=base_model,
                license=license,
                datasets=datasets,
            )


def _check_repo_id(repo_id: str) -> None:
    if not is_repo_id(repo_id):
        raise ValueError(
            f'repo_id={repo_id!r} is no name on the Hub: give "namespace/name", with your account\'s name.'
        )


def _existing_folder(path: str | Path) -> Path:
    folder = Path(resolve(path)) if str(path) in BUNDLED else Path(path).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"path={str(path)!r} is no folder: give a saved model, adapter or preference data set.")
    return folder


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _collect(folder: Path, patterns: Iterable[str]) -> tuple[dict[str, Path | bytes], list[str]]:
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if _matches(name, patterns):
            files[name] = path
        elif name != "README.md":
            left_out.append(name)
    return files, left_out


def _card(folder: Path, written: str, repo_type: str, replaced: Callable[[str], bool] = is_stub) -> bytes:
    """The folder's own card where a person wrote it, else the one written now; checked either way."""
    own = folder / "README.md"
    text = own.read_text(encoding="utf-8") if own.is_file() else written
    if is_stub(text) or replaced(text):
        text = written
    check_card(text, repo_type)
    return text.encode()


def _public_adapter_config(folder: Path, base_model: str | None) -> bytes:
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = base_model or name_of(config["base_model_name_or_path"])
    if base not in BUNDLED and (Path(base).is_absolute() or base.count("/") != 1 or Path(base).is_dir()):
        raise ValueError(
            f"the adapter in {folder} works on {base!r}, a folder that nobody else has: publish that model first and give "
            "its Hub id as base_model, or merge the adapter into it and publish the whole."
        )
    config["base_model_name_or_path"] = base
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


@contextmanager
def hub_errors(api: HfApi, repo_id: str) -> Iterator[None]:
    """What the Hub's client raises, as errors that say what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        raise _explained(error, repo_id) from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"there is no token to push to {repo_id} with: sign in with `hf auth login`.") from error
    except OfflineModeIsEnabled as error:
        raise ConnectionError("HF_HUB_OFFLINE is set, so nothing was sent: unset it to push.") from error
    except HTTPError as error:
        raise ConnectionError(f"{api.endpoint} was not reached ({error}): check the network and push again.") from error


def _explained(error: HfHubHTTPError, repo_id: str) -> OSError:
    status = error.response.status_code
    if status == 401:
        return PermissionError(
            f"the Hub did not accept your token for {repo_id}: sign in with `hf auth login`, or set HF_TOKEN to a token "
            "with write access."
        )
    if status == 403:
        return PermissionError(
            f"your token may not write to {repo_id}: use a token with write access to that namespace."
        )
    if status == 404:
        return FileNotFoundError(f"the Hub has no {repo_id}: check the namespace and the name.")
    return ConnectionError(f"the Hub failed on {repo_id} (HTTP {status}: {error.server_message}): push again later.")
