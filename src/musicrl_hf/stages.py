"""A run of several stages, which goes on where it was cut short."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .audio import atomic_path


class Stages:
    """Runs what is not there yet and says what goes on.

    A stage is done once `out`/stages/NAME.json is there, with the seconds that it took, those of goes that were cut short among them.
    """

    def __init__(self, out: Path, total: int):
        self.out, self.total, self.number = out, total, 0

    def run(self, name: str, summary: str, work: Callable[[], Any]) -> None:
        """Do `work`, unless it is done; what it raises is raised again."""
        self.number += 1
        head = f"[{self.number}/{self.total}] {name}: {summary}"
        stamp, begun = (self.out / "stages" / f"{name}.{kind}" for kind in ("json", "begun"))
        if stamp.is_file():
            print(f"{head} (done before)", flush=True)
            return
        print(head, flush=True)
        started, before = time.monotonic(), json.loads(begun.read_text())["seconds"] if begun.is_file() else 0.0
        try:
            work()
        except BaseException as error:
            with suppress(OSError):  # a full disk, say: what was raised says more
                _note(begun, before + time.monotonic() - started)
            if isinstance(error, SystemExit):  # a training that was asked to end, and saved what it has
                print("Or give the same command again, which goes on from there by itself.", file=sys.stderr)
            raise
        seconds = before + time.monotonic() - started
        _note(stamp, seconds)
        begun.unlink(missing_ok=True)
        print(f"      {seconds:.0f} s", flush=True)


def _note(path: Path, seconds: float) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"seconds": round(seconds, 1)}) + "\n")


@contextmanager
def going_on_in(folder: Path) -> Iterator[str | None]:
    """The checkpoint that a job in `folder` is to resume from: the last whole one that a SIGTERM left. Once the job is done they go."""
    from .training.checkpoints import find_checkpoint, oldest_first, remove_checkpoint

    last = None
    if folder.is_dir():
        with suppress(FileNotFoundError):
            last = find_checkpoint("last", str(folder))
    yield last
    for checkpoint in oldest_first(folder):
        remove_checkpoint(checkpoint)
