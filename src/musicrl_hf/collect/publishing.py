"""Export, and publish, again and again while the page runs."""

import logging
import threading
from collections.abc import Callable

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from .store import VoteStore
from .tables import votes

logger = logging.getLogger(__name__)


class Publisher:
    """A thread that exports in turn, where votes came or went since the last time.

    The first time it always does, with no vote too: an earlier run may have published rows of listeners who have withdrawn.

    Args:
        store: of the collection.
        seconds: between two exports.
        export: writes one, and publishes it where it shall.
    """

    def __init__(self, store: VoteStore, seconds: float, export: Callable[[], object]):
        self.store, self.seconds, self.export = store, seconds, export
        self._stopping = threading.Event()
        self._last: tuple[int, float | None] | None = None  # what an earlier run exported is not known
        self._thread = threading.Thread(target=self._run, name="exports", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, with an export of what came since the last one."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self.seconds):
            self.export_changes()
        self.export_changes()

    def export_changes(self) -> None:
        """Export if votes came or went since the last time; what fails is tried again the next time.

        A vote that comes while an export is being written may be in it, and is exported once more.
        """
        try:
            state = self._state()
            if state != self._last:
                self.export()
                self._last = state
        except (ValueError, OSError, SQLAlchemyError) as error:
            logger.warning("the export failed (%s: %s) and is tried again", type(error).__name__, error)

    def _state(self) -> tuple[int, float | None]:
        """Differs where a vote came or was withdrawn."""
        with self.store.read() as connection:
            number, latest = connection.execute(select(func.count(), func.max(votes.c.voted_at))).one()
            return number, latest
