"""Pairs made in the background: some ahead of the listeners, and those whose prompts they type, in turn."""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError

from .desk import Desk
from .maker import PairMaker
from .tokens import Refused

logger = logging.getLogger(__name__)

FAILURES = (ValueError, RuntimeError, OSError, SQLAlchemyError)  # of a model, of the disk, of the database
_IDLE_S = 1.0  # between two looks at how many pairs are left
_LONGEST_PAUSE_S = 60.0  # after many failures in a row
_KEPT = 1000  # listeners whose last prompt is remembered


@dataclass(frozen=True)
class Progress:
    """How far a typed prompt has come.

    Attributes:
        state: waiting, making, made, failed, or none where nothing was typed.
        before: how many prompts are made first.
        seconds: until the pair should be there, from what pairs took so far; None before the first one.
        pair: its id, once it is made.
    """

    state: str
    before: int = 0
    seconds: float | None = None
    pair: str | None = None


@dataclass
class _Typed:
    listener: str
    prompt: str
    state: str = "waiting"
    pair: str | None = None


class PairPool:
    """One thread that makes pairs, so that nobody who listens waits for a model.

    Typed prompts come first, in the order in which they were typed; else pairs are made ahead until `ahead` of them wait
    for listeners. In a study the fixed pairs are made once. A prompt that a model fails for costs that pair only.

    Args:
        desk: tells how many pairs are left, and the rules.
        maker: samples them.
        ahead: pairs to have ready.
        longest_queue: typed prompts that may wait.
    """

    def __init__(self, desk: Desk, maker: PairMaker, *, ahead: int = 8, longest_queue: int = 20):
        self.desk, self.maker, self.ahead, self.longest_queue = desk, maker, ahead, longest_queue
        self._queue: deque[_Typed] = deque()
        self._last: dict[str, _Typed] = {}
        self._change = threading.Condition()
        self._stopping = self._short = False
        self._took: deque[float] = deque(maxlen=10)  # seconds of the last pairs
        self._begun = 0.0
        self._study_made = False
        self._thread = threading.Thread(target=self._run, name="pairs", daemon=True)

    def start(self) -> None:
        """Begin to make pairs."""
        self._thread.start()

    def stop(self) -> None:
        """End after the pair that is being made."""
        with self._change:
            self._stopping = True
            self._change.notify_all()
        self._thread.join()

    def ask(self, listener: str, prompt: str) -> None:
        """Put a typed prompt into the queue.

        Raises:
            Refused: this listener's last one is not made yet, or too many wait.
        """
        with self._change:
            last = self._last.get(listener)
            if last is not None and last.state in ("waiting", "making"):
                raise Refused("Your last prompt is still being made: one at a time, please.")
            if len(self._queue) >= self.longest_queue:
                raise Refused(f"{len(self._queue)} prompts wait already: please try again in a few minutes.")
            typed = _Typed(listener, prompt)
            self._queue.append(typed)
            self._last[listener] = typed
            for old in list(self._last)[:-_KEPT]:
                if self._last[old].state in ("made", "failed"):
                    del self._last[old]
            self._change.notify_all()

    def progress(self, listener: str) -> Progress:
        """How far the last prompt of a listener has come."""
        with self._change:
            typed = self._last.get(listener)
            if typed is None:
                return Progress("none")
            before = self._queue.index(typed) + bool(self._begun) if typed.state == "waiting" else 0
            seconds = None
            if self._took:
                gone = time.monotonic() - self._begun if self._begun else 0.0
                each = sum(self._took) / len(self._took)
                seconds = max(0.0, each * (before + 1) - min(gone, each))
            return Progress(typed.state, before, seconds, typed.pair)

    def forget(self, listener: str) -> None:
        """Drop the prompt of a listener who withdrew."""
        with self._change:
            typed = self._last.pop(listener, None)
            if typed is not None and typed in self._queue:
                self._queue.remove(typed)

    @property
    def makes_more(self) -> bool:
        """Whether somebody who has heard all there is will get more."""
        return not (self.desk.rules.study and self._study_made)

    def run_short(self) -> None:
        """Tell that somebody has heard all there is: one more pair is made, though enough wait for others."""
        with self._change:
            self._short = True
            self._change.notify_all()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while True:
            with self._change:
                if self._stopping:
                    return
                typed = self._queue.popleft() if self._queue else None
                if typed is not None:
                    typed.state = "making"
            try:
                made = self._make(typed)
                failures = 0
            except FAILURES as error:
                failures += 1
                made = False
                told = type(error).__name__
                if typed is None:  # what a listener typed, and a message may quote, belongs into no log
                    told += f": {error}".partition("\n")[0]
                logger.warning("a pair could not be made (%s)", told)
            with self._change:
                if typed is not None and typed.state == "making":
                    typed.state = "failed"
                if not (made or self._queue or self._stopping):
                    self._change.wait(min(_LONGEST_PAUSE_S, _IDLE_S * 2 ** min(failures, 8)))

    def _make(self, typed: _Typed | None) -> bool:
        """Make what is due; False where nothing is."""
        if typed is not None:
            with self._timed():
                pair = self.maker.make(typed.prompt, typed.listener)
            with self._change:
                typed.pair, typed.state = pair, "made"
            return True
        if self.desk.rules.study:
            return self._make_study()
        if not self._short and self.desk.open_pairs() >= self.ahead:
            return False
        with self._timed():
            made = self.maker.make_next()
        if made:
            self._short = False
        return True

    def _make_study(self) -> bool:
        if self._study_made:
            return False
        for _ in self.maker.make_study():
            if self._stopping:
                return False
        self._study_made = True
        return False

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Remember how long a pair takes, if it comes to be."""
        self._begun = time.monotonic()
        try:
            yield
            self._took.append(time.monotonic() - self._begun)
        finally:
            self._begun = 0.0
