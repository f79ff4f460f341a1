"""The ranking on the page: win rates, Bradley-Terry strengths and ratings of the votes so far."""

import math
import threading
import time
from collections.abc import Sequence
from html import escape

from sqlalchemy import func, select

from ..evaluation.counting import count_votes
from ..evaluation.page import render_standings
from ..evaluation.win_rates import Rating
from ..preferences.listeners import is_simulated
from ..preferences.schema import Vote
from .store import LAST_WITHDRAWAL, VoteStore
from .tables import clips, deals, pairs, settings, votes

Rated = tuple[Vote, list[Rating]]  # a vote and, in a study, what its two clips were rated

LEAST_VOTES = 20  # of two generators: below them a ranking says nothing, and would tell what single listeners chose
LEAST_LISTENERS = 3
LEAST_NEW = 10  # votes, of so many listeners: two counts around a single one would tell what was chosen
_FRESH_S = 60.0


class Leaderboard:
    """Counts the votes of a store, at most once a minute, and only once there are `LEAST_NEW` more of several listeners: who asks
    in between gets the last count, less the votes of those who have withdrawn since, on whichever machine.

    Args:
        store: of the collection.
        fresh_s: seconds for which a count is shown.
    """

    def __init__(self, store: VoteStore, fresh_s: float = _FRESH_S):
        self.store, self.fresh_s = store, fresh_s
        self._lock = threading.Lock()
        self._shown, self._until = "", 0.0
        self._withdrawal: str | None = None  # the last one before the count
        self._counted_to = 0.0  # when the newest of its votes was given

    def html(self) -> str:
        """The ranking as a fragment of a page; names are escaped."""
        with self._lock:
            with self.store.read() as connection:
                withdrawal = connection.scalar(select(settings.c.value).where(settings.c.name == LAST_WITHDRAWAL))
                since = select(func.count(), func.count(votes.c.listener.distinct()), func.max(votes.c.voted_at))
                new, people, newest = connection.execute(since.where(votes.c.voted_at > self._counted_to)).one()
            is_due = time.monotonic() >= self._until
            if is_due and new >= LEAST_NEW and people >= LEAST_LISTENERS:
                self._counted_to = newest
            if is_due or withdrawal != self._withdrawal:
                self._shown = self._count()
                self._until, self._withdrawal = time.monotonic() + self.fresh_s, withdrawal
            return self._shown

    def _count(self) -> str:
        there = votes_in_store(self.store, self._counted_to)
        shown = _often_compared(there)
        if not shown:
            return (
                f"<p>The ranking appears from {LEAST_VOTES} votes of {LEAST_LISTENERS} listeners on two generators on: before, "
                "it would say little of the generators and too much of those who voted.</p>"
            )
        counted = [vote for vote, _ in shown]
        ratings = [rating for _, own in shown for rating in own]
        listeners = {vote.listener for vote in counted}
        simulated = sum(is_simulated(listener) for listener in listeners)
        told = f"{len(counted):,} votes of {len(listeners):,} listeners"
        if simulated:
            told += f", {simulated:,} of whom are simulated: rules on the waveform, not people"
        if left_out := len(there) - len(shown):
            fewer = f"fewer than {LEAST_VOTES} votes or {LEAST_LISTENERS} listeners"
            told += f"; left out: {left_out:,} on pairs of generators with {fewer} so far"
        return f"<p>{escape(told)}.</p>{render_standings(count_votes(counted, ratings))}"


def _often_compared(votes: Sequence[Rated]) -> list[Rated]:
    """The votes between two generators that were compared often enough, by enough listeners, to be shown.

    The others are left out of every number: one listener's votes would show in a cell of the table, or in a strength.
    """
    compared: dict[frozenset[str], list[Rated]] = {}
    for vote, ratings in votes:
        compared.setdefault(frozenset((vote.model_a, vote.model_b)), []).append((vote, ratings))
    kept = {
        pair
        for pair, own in compared.items()
        if len(own) >= LEAST_VOTES and len({vote.listener for vote, _ in own}) >= LEAST_LISTENERS
    }
    return [(vote, ratings) for vote, ratings in votes if frozenset((vote.model_a, vote.model_b)) in kept]


def votes_in_store(store: VoteStore, until: float = math.inf) -> list[Rated]:
    """The votes between two generators, given up to `until`, each with its ratings in a study, without the checks of attention."""
    first, second = clips.alias(), clips.alias()
    tables = (
        votes.join(deals, votes.c.deal == deals.c.id)
        .join(pairs, votes.c.pair == pairs.c.id)
        .join(first, pairs.c.first == first.c.id)
        .join(second, pairs.c.second == second.c.id)
    )
    columns = (votes, deals.c.swapped, pairs.c.prompt, first.c.model.label("one"), second.c.model.label("other"))
    wanted = select(*columns).select_from(tables).where(pairs.c.kind == "pair", first.c.model != second.c.model)
    if until < math.inf:
        wanted = wanted.where(votes.c.voted_at <= until)
    found: list[Rated] = []
    with store.read() as connection:
        for row in connection.execute(wanted.order_by(votes.c.voted_at, votes.c.deal)):
            a, b = (row.other, row.one) if row.swapped else (row.one, row.other)
            scores = [(model, score) for model, score in ((a, row.score_a), (b, row.score_b)) if score is not None]
            ratings = [Rating(row.prompt, model, score, row.listener) for model, score in scores]
            found.append((Vote(row.prompt, a, b, row.preference, row.listener), ratings))
    return found
