"""Where the seconds of a training go."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback


class Seconds(TrainerCallback):
    """Adds up the seconds of the parts of training steps: what is neither sampling, decoding nor scoring is "update".

    A part inside of another counts for itself alone, and one outside of a training step, as in an evaluation, not at all. On a
    GPU a part waits for what it started.
    """

    def __init__(self) -> None:
        self._spent: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what the body takes for `part`; the outermost is "update"."""
        if not self._open and part != "update":
            yield
            return
        self._turn(opens=part)
        try:
            yield
        finally:
            self._turn()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._turn(opens="update")

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._turn()

    def _turn(self, opens: str | None = None) -> None:
        """Until now the innermost part ran; from now on one more does, or one less."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self._spent[self._open[-1]] += now - self._since
        self._since = now
        if opens is None:
            self._open.pop()
        else:
            self._open.append(opens)

    def taken(self) -> dict[str, float]:
        """`<part>_s` -> seconds since this was asked last."""
        spent = {f"{part}_s": seconds for part, seconds in self._spent.items()}
        self._spent.clear()
        return spent
