"""Checkpoints that are there whole or not at all, and the one to resume from.

transformers' Trainer writes a checkpoint file by file into `checkpoint-N`, takes the highest N for the last one whatever it
holds, and goes on without an optimiser or random state that it does not find. Here a checkpoint is written aside, synced and
renamed, and one that lacks anything is not resumed from.

What a checkpoint holds beside safetensors and JSON is torch's own: `optimizer.pt`, `scheduler.pt`, `rng_state.pth`. The
Trainer reads them with `torch.load(weights_only=True)`, an unpickler that builds tensors, numbers and NumPy arrays and calls
nothing else. They are looked into before that, without being unpickled, and refused where they name anything else.
"""

import errno
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch.serialization import get_unsafe_globals_in_checkpoint
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import safe_globals

from ..bundled import check_weights

ASIDE = ".saving-"  # what the names of folders begin with that are not finished; swept by the next save
MADE_BY = "trainer.json"  # of a checkpoint: the trainer that saved it
EARLIER = "earlier-"  # what the names of an earlier run's checkpoints begin with, once another begins in their folder


class WholeCheckpoints:
    """Mixin for transformers' Trainers, before them: checkpoints appear and vanish in one move each."""

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    accelerator: Any
    _aside: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)  # type: ignore[misc]

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As the Trainer's, aside.

        Raises:
            OSError: it could not be written; the checkpoints before it are as they were.
        """
        folder = Path(self._get_output_dir(trial))
        made = folder / f"checkpoint-{self.state.global_step}"
        aside = folder / f"{ASIDE}{made.name}"
        if self.args.should_save:
            sweep(folder)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            with writing(str(made)):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                self.accelerator.wait_for_everyone()  # each process has put its random state there
                self._name_best(aside / made.name, made)
                if self.args.should_save:
                    (aside / made.name / MADE_BY).write_text(json.dumps({"trainer": kind_of(self)}) + "\n")
                    _sync(aside / made.name)
                    if made.exists():  # of an earlier run
                        made.rename(aside / "replaced")
                    (aside / made.name).rename(made)
                    _sync_folder(folder)
        finally:
            self._aside = None
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
        if self.args.should_save:
            keep_newest(folder, self.args.save_total_limit, self.state.best_model_checkpoint, made)
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, which asks whether it has made all steps behind a step alone: resumed from the last, it makes one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _evaluate(self, trial: Any, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the Trainer's, which leaves the evaluation before the first step out when it looks for the best."""
        metrics = super()._evaluate(trial, *args, **kwargs)  # type: ignore[misc]
        if self.args.load_best_model_at_end and self.state.global_step == 0:
            self._determine_best_metric(metrics, trial)  # type: ignore[attr-defined]
            self._save_checkpoint(self.model, trial)  # type: ignore[attr-defined]
        return metrics

    def _name_best(self, written: Path, made: Path) -> None:
        """Note where the best checkpoint lies: not aside, where the Trainer found it and where it is about to leave."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(made)
            if self.args.should_save:
                self.state.save_to_json(str(written / "trainer_state.json"))


@contextmanager
def writing(what: str) -> Iterator[None]:
    """A full disk, or another reason why nothing can be written, said alike by whichever library met it.

    Raises:
        OSError: the body could not write.
    """
    try:
        yield
    except Exception as error:
        of_torch = isinstance(error, RuntimeError) and "inline_container" in str(error)  # the writer of torch.save
        of_tokenizers = type(error) is Exception and "(os error " in str(error)  # theirs has no class of its own
        if not (isinstance(error, OSError | SafetensorError) or of_torch or of_tokenizers):
            raise
        remedy = "see to that"
        if not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT):  # others do not tell why
            free = shutil.disk_usage(_existing(Path(what))).free
            remedy = f"{free / 2**20:.1f} MiB are free there: make room"
        raise OSError(
            f"{what} could not be written ({str(error).strip()}); {remedy}, then go on with --resume_from_checkpoint last from "
            "the last whole checkpoint, if one was saved."
        ) from error


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def kind_of(trainer: Any) -> str:
    """The name of this package's class that it is, whatever was derived from that."""
    return next(cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.startswith(__package__))


def sweep(folder: Path) -> None:
    """Remove what a run that was killed while saving left aside."""
    for left in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)


def checkpoints_in(folder: str | Path) -> list[Path]:
    """The folders `checkpoint-N`, by N."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def oldest_first(folder: str | Path) -> list[Path]:
    """The folders `checkpoint-N` by when they were saved: in a folder that an earlier run used, its N may be the higher.

    That is when `trainer_state.json` was written. The folder itself changes whenever a file is put beside it, a card say.
    """

    def saved_at(path: Path) -> int:
        state = path / "trainer_state.json"
        return (state if state.is_file() else path).stat().st_mtime_ns

    return sorted(checkpoints_in(folder), key=saved_at)


def keep_newest(folder: Path, limit: int | None, best: str | None = None, made: Path | None = None) -> None:
    """Remove all checkpoints of a folder but the best and the `limit` that were saved last; None or 0 keeps all.

    `best` is compared as a place: a run that is resumed may spell the same folder in another way. The one that was `made` just now is
    the last, whatever the times of others say: a clock that was ahead, say, or a copy.
    """
    ordered = sorted(oldest_first(folder), key=lambda path: path == made)
    for old in ordered[: -limit if limit else 0]:
        if best is None or old.resolve() != Path(best).resolve():
            remove_checkpoint(old)


def remove_checkpoint(folder: Path) -> None:
    """Rename it aside first: the Trainer's own way, in place, leaves where it is cut short a folder that was changed last of all,
    and is then kept as the newest in the place of a whole one."""
    gone = folder.with_name(f"{ASIDE}old-{folder.name}")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Have everything in a folder on the disk, so that a power cut after the rename finds it whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    for path in (folder, *folder.rglob("*/")):
        _sync_folder(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_earlier_aside(folder: str | Path) -> list[Path]:
    """Rename the checkpoints that an earlier run left, so that none is taken for one of the run that begins: `checkpoint-3` becomes
    `earlier-checkpoint-3`. Those that an even earlier run left are removed."""
    found = checkpoints_in(folder)
    if found:
        for older in Path(folder).glob(f"{EARLIER}checkpoint-*"):
            shutil.rmtree(older)
    return [path.rename(path.with_name(f"{EARLIER}{path.name}")) for path in found]


# -- resuming --------------------------------------------------------------------------------------------------------------


def find_checkpoint(wanted: str | None, output_dir: str) -> str | None:
    """The checkpoint folder that `resume_from_checkpoint` names: None, a folder, or "last" for the whole one that was saved last.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the folder that was named lacks something, or one holds pickled code.
    """
    if wanted is None:
        return None
    if wanted != "last":
        if not Path(wanted).is_dir():
            raise FileNotFoundError(_no_checkpoint(wanted, output_dir, []))
        check_checkpoint(wanted)
        return wanted
    broken: list[str] = []
    older = oldest_first(output_dir)
    while older:
        folder = older.pop()
        check_unpickled(folder)
        try:
            check_checkpoint(folder)
        except ValueError as error:
            broken.append(str(error))
            continue
        if broken:
            print(f"Passed over: {' '.join(broken)} Resuming from {folder}.", file=sys.stderr)
        further = [path.name for path in older if int(path.name[11:]) > int(folder.name[11:])]
        if further:
            print(f"Resuming from {folder}, which was saved last, after {', '.join(further)}.", file=sys.stderr)
        return str(folder)
    raise FileNotFoundError(_no_checkpoint(wanted, output_dir, broken))


def _no_checkpoint(wanted: str, output_dir: str, broken: list[str]) -> str:
    return (
        f"`resume_from_checkpoint` = {wanted!r}: no checkpoint there (a folder with trainer_state.json; `last` looks in "
        f"{output_dir}){'; ' * bool(broken)}{' '.join(broken)}; set save_steps in the run that is to be resumed."
    )


def check_checkpoint(folder: str | Path) -> None:
    """Refuse a checkpoint that a run could not go on from exactly.

    Raises:
        ValueError: naming the file that is missing, cut short or holds more than numbers.
    """
    folder = Path(folder)
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no whole checkpoint: trainer_state.json is missing or cut short.") from error
    check_weights(folder)
    needed = {
        "weights": ("*model*.safetensors", "*/*model*.safetensors"),
        "the optimiser's state": ("optimizer*", "global_step*"),  # the latter are DeepSpeed's
        "the schedule": ("scheduler.pt", "global_step*"),
        "the random state": ("rng_state*.pth",),
    }
    for what, patterns in needed.items():
        if not any(path for pattern in patterns for path in folder.glob(pattern)):
            raise ValueError(f"{folder} is no whole checkpoint: it lacks {what} ({patterns[0]}).")
    for path in _pickled(folder):
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{folder} is no whole checkpoint: {path.name} is cut short.")
    check_unpickled(folder)


def check_unpickled(folder: str | Path) -> None:
    """Refuse a checkpoint whose pickled files name anything but tensors, numbers and arrays, without unpickling them.

    Raises:
        ValueError: naming the file and what it would call, or that it would unpack to more than it is.
    """
    for path in _pickled(Path(folder)):
        if not zipfile.is_zipfile(path):
            continue  # cut short, or older than torch 1.6: `check_checkpoint` says so
        try:
            with zipfile.ZipFile(path) as archive:
                packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            with safe_globals():
                named = [] if packed else sorted(get_unsafe_globals_in_checkpoint(path))
        except _UNREADABLE as error:
            raise ValueError(f"{path} is not what torch.save writes ({error}): give another checkpoint.") from error
        if packed:
            raise ValueError(f"{path} holds {packed[0]} compressed, which torch.save never does: it is not opened.")
        if named:
            raise ValueError(
                f"{path} names {', '.join(named[:3])}, which it would call as it is read: it is not opened. Resume only from "
                "checkpoints of this package's own training."
            )


# what zipfile and torch raise for bytes that they did not write
_UNREADABLE = (
    *(AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError),
    *(UnpicklingError, zipfile.BadZipFile),
)


def _pickled(folder: Path) -> list[Path]:
    """DeepSpeed's lie in a folder of their own."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".pt", ".pth", ".bin") and path.is_file())
