"""Training to the end, or to a SIGTERM and the checkpoint that it asks for."""

import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from ..bundled import read_json
from .checkpoints import MADE_BY, kind_of, set_earlier_aside

STOPPED = 128 + signal.SIGTERM  # exit status, as a shell reports a process that SIGTERM ended
SAME_SIGNAL_S = 5.0  # seconds in which a SIGTERM comes to a process twice: from whoever sent it and from its launcher


class StopOnTermination(TrainerCallback):
    """After a SIGTERM, save a checkpoint at the next step that a run can go on from, and stop.

    One more than `SAME_SIGNAL_S` later ends the process at once, as without this callback. Sooner it is the same one: a
    cluster's scheduler tells all of a job's processes, and so does the launcher that it told.

    Args:
        every: a run goes on exactly from multiples of so many steps (those that are made on one set of sampled clips).
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.asked = self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the body runs, SIGTERM asks for the stop; only a main thread can hear it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before, heard_at = signal.getsignal(signal.SIGTERM), 0.0

        def ask(number: int, frame: Any) -> None:
            nonlocal heard_at
            if self.asked and time.monotonic() - heard_at > SAME_SIGNAL_S:
                signal.signal(signal.SIGTERM, before)
                signal.raise_signal(signal.SIGTERM)
            elif not self.asked:
                self.asked, heard_at = True, time.monotonic()

        signal.signal(signal.SIGTERM, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        asked = self.asked
        if args.world_size > 1:  # one process may have heard it a step before the others
            heard = torch.tensor(int(asked), device=args.device)
            torch.distributed.all_reduce(heard, torch.distributed.ReduceOp.MAX)
            asked = bool(heard)
        if asked and state.global_step % self.every == 0:
            control.should_save = control.should_training_stop = self.stopped = True


def train_or_stop(trainer: Trainer, checkpoint: str | None, every: int = 1) -> TrainOutput:
    """Train to the end; after a SIGTERM, to the next checkpoint, which is then said, and leave with status 143.

    Args:
        trainer: with `WholeCheckpoints`.
        checkpoint: to resume from, as `find_checkpoint` gives it.
        every: see `StopOnTermination`.

    Raises:
        OSError: a checkpoint could not be written.
        ValueError: the checkpoint is of a step behind the last one, or of another kind of trainer.
        SystemExit: on SIGTERM.
    """
    if checkpoint is None and trainer.accelerator.is_main_process:
        earlier = set_earlier_aside(str(trainer.args.output_dir))
        if earlier:
            print(
                f"An earlier run left checkpoints in {trainer.args.output_dir}, which are called {', '.join(path.name for path in earlier)} "
                "now: to go on from one of them instead, name its folder after --resume_from_checkpoint.",
                file=sys.stderr,
            )
    trainer.accelerator.wait_for_everyone()
    if checkpoint is not None:
        _check_goes_on(Path(checkpoint), trainer)
    if checkpoint is not None and trainer.accelerator.is_main_process:
        before, now = len([*Path(checkpoint).glob("rng_state*.pth")]), trainer.args.world_size
        if before != now:
            print(
                f"{checkpoint} was saved by {before} process{'es' * (before != 1)} and goes on with {now}: what is drawn from here on is "
                "not what it would have been.",
                file=sys.stderr,
            )
    stop = StopOnTermination(every)
    trainer.add_callback(stop)
    with stop.listening():
        output = trainer.train(resume_from_checkpoint=checkpoint)
    if stop.stopped:
        if trainer.accelerator.is_main_process:
            made = Path(str(trainer.args.output_dir)) / f"checkpoint-{trainer.state.global_step}"
            print(f"Stopped by SIGTERM: go on with --resume_from_checkpoint {shlex.quote(str(made))}.", file=sys.stderr)
        raise SystemExit(STOPPED)
    return output


def _check_goes_on(checkpoint: Path, trainer: Trainer) -> None:
    """ValueError where it is a whole checkpoint, and not one that this trainer goes on from."""
    step = read_json(checkpoint / "trainer_state.json")["global_step"]
    if step > trainer.args.max_steps > 0:
        raise ValueError(
            f"`max_steps` = {trainer.args.max_steps}, and {checkpoint} is of step {step}: give more steps, or another "
            "`resume_from_checkpoint`."
        )
    path, own = checkpoint / MADE_BY, kind_of(trainer)
    made_by = read_json(path).get("trainer") if path.is_file() else own
    if made_by != own:
        raise ValueError(
            f"`resume_from_checkpoint` = {str(checkpoint)!r} was saved by {made_by}, and this is {own}: give one of its own, or, to "
            "start from its weights, `model`."
        )
