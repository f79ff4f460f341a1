"""Where a published data set lies: a folder with a copy of it, or its id on the Hub."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ...bundled import is_repo_id
from ..data_files import read_text
from ..schema import clip_path


@dataclass(frozen=True)
class FolderSource:
    """A data set in a folder."""

    root: Path

    @property
    def label(self) -> str:
        """What messages call it."""
        return str(self.root)

    @cached_property
    def names(self) -> list[str]:
        """All files, as paths in the data set; hidden ones are passed over."""
        found = (path.relative_to(self.root) for path in self.root.rglob("*") if path.is_file())
        return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))

    @cached_property
    def known(self) -> frozenset[str]:
        """The names as a set."""
        return frozenset(self.names)

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """The files of some names.

        Raises:
            ValueError: one is a link that leads out of the data set.
        """
        return {name: clip_path(self.root, name) for name in names}

    def locate(self, name: str) -> Callable[[], Path]:
        """What gives the file of a clip.

        Raises:
            ValueError: the path leads out of the data set.
            FileNotFoundError: it holds no such file.
        """
        path = clip_path(self.root, name)
        return lambda: path


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hub; a file is downloaded when it is needed, into the Hub's cache."""

    repo_id: str

    @property
    def label(self) -> str:
        return self.repo_id

    @cached_property
    def names(self) -> list[str]:
        """All files, as paths in the data set."""
        return sorted(self._asked(partial(HfApi().list_repo_files, self.repo_id, repo_type="dataset")))

    @cached_property
    def known(self) -> frozenset[str]:
        """The names as a set."""
        return frozenset(self.names)

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """The files of some names, downloaded together."""
        wanted = set(names)
        patterns = sorted({str(PurePosixPath(name).with_name("*" + PurePosixPath(name).suffix)) for name in wanted})
        download = partial(snapshot_download, self.repo_id, repo_type="dataset", allow_patterns=patterns)
        root = Path(self._asked(download)) if wanted else Path()
        return {name: root / name for name in wanted}

    def locate(self, name: str) -> Callable[[], Path]:
        """What downloads the file of a clip.

        Raises:
            FileNotFoundError: the data set holds no such file.
            ConnectionError, PermissionError: when the file is asked for, and the Hub does not answer or wants consent.
        """
        if name not in self.known:
            raise FileNotFoundError(f"there is no file {name!r} in {self.repo_id}")
        return lambda: Path(self._asked(partial(hf_hub_download, self.repo_id, name, repo_type="dataset")))

    def _asked(self, request: Callable[[], Any]) -> Any:
        """The answer. Only what the Hub says is not there is a FileNotFoundError: a clip that is missing may be counted,
        a connection that broke off may not.
        """
        try:
            return request()
        except GatedRepoError as error:
            raise PermissionError(
                f"data set {self.repo_id!r} asks for consent: give it on https://huggingface.co/datasets/{self.repo_id}, "
                "sign in with `hf auth login`, and import again"
            ) from error
        except RemoteEntryNotFoundError as error:
            raise FileNotFoundError(f"data set {self.repo_id!r} lists a file that the Hub does not give") from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise FileNotFoundError(
                f"data set {self.repo_id!r} is neither a folder here nor one that the Hub gives "
                f"({type(error).__name__}): check the name and, for a private one, `hf auth login`"
            ) from error
        except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
            raise ConnectionError(
                f"data set {self.repo_id!r} is no folder here, and the Hub could not be reached or broke off "
                f"({type(error).__name__}): check the network and HF_HUB_OFFLINE, and import again; what was downloaded "
                "is kept"
            ) from error


Source = FolderSource | HubSource


def open_source(src: str | Path) -> Source:
    """A folder, or an id on the Hub.

    Raises:
        FileNotFoundError: it is neither.
    """
    if Path(src).is_dir():
        return FolderSource(Path(src))
    if Path(src).exists() or not is_repo_id(str(src)):
        raise FileNotFoundError(
            f"there is no folder {src}: give a folder with a copy of the data set, or its id on the Hub"
        )
    return HubSource(str(src))


def files_of_config(source: Source, names: Sequence[str], config: str) -> list[str]:
    """Those of a configuration that the data set's card describes, or of a folder of that name."""
    patterns = _card_configs(source)
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns.get(config, ()))]
    chosen = chosen or [name for name in names if config in PurePosixPath(name).parts[:-1]]
    if not chosen:
        folders = {part for name in names for part in PurePosixPath(name).parts[:-1]}
        raise ValueError(
            f"config is {config!r}: {source.label} has {', '.join(sorted(patterns) or sorted(folders)) or 'no such parts'}"
        )
    return chosen


def _card_configs(source: Source) -> dict[str, list[str]]:
    """Configuration -> patterns of its files, from the card's metadata."""
    if "README.md" not in source.names:
        return {}
    text = read_text(source.fetch(["README.md"])["README.md"], f"{source.label}/README.md")
    block = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else {}
        configs = metadata.get("configs", [])
        return {str(entry["config_name"]): _patterns(entry.get("data_files", [])) for entry in configs}
    except (yaml.YAMLError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{source.label}/README.md: its metadata is not what the Hub's cards have ({error})"
        ) from error


def _patterns(files: Any) -> list[str]:
    """The paths of a card's `data_files`: one, a list of them, or of mappings that hold them for a split each."""
    if isinstance(files, str):
        return [files]
    if isinstance(files, dict):
        return _patterns(files["path"])
    return [path for part in files for path in _patterns(part)]
