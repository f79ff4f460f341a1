"""What a listener can do: agree, be dealt a pair, vote, and withdraw. Every step is one transaction of the store."""

import json
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, delete, exists, func, insert, or_, select, update

from ..preferences.listeners import is_simulated
from .rules import Answer, Rules
from .store import LAST_WITHDRAWAL, VoteStore
from .tables import clips, consents, deals, listeners, pairs, settings, votes
from .tokens import Refused, Unknown, deal_of, hash_code, new_code, sign

CHECKS = ("identical", "broken")
_TICK_S = 0.3  # browsers tell a player's time in steps of this
_NEAR = 8  # pairs asked about equally often, of which one is dealt at random
RULES_HELD = "rules_held"  # name of the setting
_CLIPS = "clips"  # purpose of the tokens that play clips


@dataclass(frozen=True)
class Deal:
    """A pair as one listener gets it: blind, in an order drawn for them.

    Attributes:
        token: lets this listener vote on it.
        clip_token: lets whoever holds it play the two clips.
        prompt: what both clips were made for.
        duration_a, duration_b: in seconds.
    """

    token: str
    clip_token: str
    prompt: str
    duration_a: float
    duration_b: float


class Desk:
    """Deals pairs to listeners and takes their votes.

    Args:
        store: where everything is kept.
        rules: what holds for every listener.
        clock: gives the time in seconds since 1970.
        seed: makes what is dealt, and in which order, reproducible; None draws one.

    Raises:
        ValueError: the store holds pairs or votes of a study and the rules are none, or the other way round: its pairs
            would be taken for pairs of this collection.
    """

    def __init__(self, store: VoteStore, rules: Rules, clock: Callable[[], float] = time.time, seed: int | None = None):
        self.store, self.rules, self.clock = store, rules, clock
        self._random = random.Random(seed)
        with store.write(exclusive=True) as connection:
            before = connection.scalar(select(settings.c.value).where(settings.c.name == "rules"))
            if before is not None and json.loads(before)["study"] != rules.study:
                _check_empty(connection, rules.study, store.name)
            if connection.scalar(select(consents.c.id).where(consents.c.id == rules.consent_id)) is None:
                connection.execute(
                    insert(consents).values(id=rules.consent_id, text=rules.consent_text, licence=rules.licence)
                )
            _set(connection, "rules", json.dumps(asdict(rules)))
            held = rules_held(connection) or ([{"since": 0.0, **json.loads(before)}] if before else [])
            if not held or {**held[-1], "since": 0} != {"since": 0, **json.loads(json.dumps(asdict(rules)))}:
                _set(connection, RULES_HELD, json.dumps([*held, {"since": clock(), **asdict(rules)}]))

    # -- who ---------------------------------------------------------------------------------------------------------

    def consent(self, consent_id: str) -> str:
        """Take a listener in who agreed to the text with this id, and give them a private code.

        Raises:
            Refused: it is not the text that the page shows now.
        """
        if consent_id != self.rules.consent_id:
            raise Refused("The text on this page has changed: reload it and read it again.")
        code = new_code()
        self.enrol(hash_code(self.store.salt, code))
        return code

    def enrol(self, listener: str) -> None:
        """Take a listener in by name: what `consent` does with a hash, and a simulation with its listeners' names."""
        with self.store.write() as connection:
            values = {"id": listener, "consent": self.rules.consent_id, "consented_at": self.clock()}
            connection.execute(insert(listeners).values(values))

    def listener_of(self, code: str) -> str:
        """The listener that a private code stands for.

        Raises:
            Refused: no code, or nobody agreed with it to the text that holds now.
        """
        listener = hash_code(self.store.salt, code)
        with self.store.read() as connection:
            self._known(connection, listener)
        return listener

    def withdraw(self, code: str) -> int:
        """Delete a listener and everything that is theirs: votes, deals, prompts that they typed and those clips.

        Returns:
            how many votes were deleted.

        Raises:
            Refused: nothing is kept under this code.
        """
        listener = hash_code(self.store.salt, code)
        with self.store.write(exclusive=True) as connection:
            found = select(listeners.c.id).where(listeners.c.id == listener).with_for_update()
            if connection.scalar(found) is None:
                raise Refused("Nothing is kept under this code: it was withdrawn before, or mistyped.")
            removed = connection.execute(delete(votes).where(votes.c.listener == listener)).rowcount
            live = select(deals.c.pair).where(deals.c.listener == listener, deals.c.state != "expired")
            connection.execute(update(pairs).where(pairs.c.id.in_(live)).values(live=pairs.c.live - 1))
            connection.execute(delete(deals).where(deals.c.listener == listener))
            own = connection.execute(select(pairs.c.first, pairs.c.second).where(pairs.c.owner == listener)).all()
            connection.execute(delete(pairs).where(pairs.c.owner == listener))
            gone = [clip for row in own for clip in row]
            connection.execute(delete(clips).where(clips.c.id.in_(gone)))
            connection.execute(delete(listeners).where(listeners.c.id == listener))
            _set(connection, LAST_WITHDRAWAL, uuid.uuid4().hex)
        self.store.remove_clips(gone)
        self.store.forget()
        return removed

    # -- deals -------------------------------------------------------------------------------------------------------

    def deal(self, listener: str, pair: str | None = None) -> Deal | None:
        """The pair that a listener is to hear next: the one they have not answered yet, else a new one.

        Pairs that the fewest were asked about come first, and each side is as often the first clip's as the second's.

        Args:
            listener: from `listener_of`.
            pair: this one, whose prompt they typed.

        Returns:
            None where every pair there is was dealt to them, or to enough others.

        Raises:
            Refused: the listener is not known (any more), or the pair is another's.
        """
        now = self.clock()
        with self.store.write(exclusive=True) as connection:
            self._known(connection, listener)
            self._expire(connection, now)
            found = self._open_deal(connection, listener, pair)
            while found is not None and found.state == "expired" and not self._reopen(connection, found, now):
                found = self._open_deal(connection, listener, pair)
            if found is None:
                chosen = self._choose(connection, listener, pair)
                if chosen is None:
                    return None
                swapped = self._side(connection, chosen)
                values = {"pair": chosen, "listener": listener, "swapped": swapped, "dealt_at": now, "state": "open"}
                connection.execute(insert(deals).values(id=uuid.uuid4().hex, **values))
                connection.execute(update(pairs).where(pairs.c.id == chosen).values(live=pairs.c.live + 1))
                found = self._open_deal(connection, listener, chosen)
            assert found is not None
            lengths = {
                clip: connection.execute(select(clips.c.duration_s).where(clips.c.id == clip)).scalar_one()
                for clip in (found.first, found.second)
            }
        a, b = (found.second, found.first) if found.swapped else (found.first, found.second)
        expires = now + 2 * self.rules.deal_hours * 3600  # a vote that comes late still counts, if it comes at all
        return Deal(
            sign(self.store.key, listener, found.id, expires),
            sign(self.store.key, _CLIPS, found.id, expires),
            found.prompt,
            lengths[a],
            lengths[b],
        )

    def clip(self, clip_token: str, side: str) -> Path:
        """The file of clip "a" or "b" of a deal.

        Raises:
            Refused: the token is not one, or has run out.
            ValueError: another side.
        """
        if side not in ("a", "b"):
            raise ValueError(f"side is {side!r}: it is a or b")
        deal = deal_of(self.store.key, _CLIPS, clip_token, self.clock())
        with self.store.read() as connection:
            found = connection.execute(_whole_deal().where(deals.c.id == deal)).one_or_none()
        if found is None:
            raise Refused("This pair is no longer there: reload the page.")
        return self.store.clip_file(found.second if (side == "a") == found.swapped else found.first)

    def open_pairs(self) -> int:
        """Pairs that not enough listeners were asked about yet."""
        with self.store.read() as connection:
            return connection.scalar(select(func.count()).select_from(pairs).where(self._wanted())) or 0

    # -- votes -------------------------------------------------------------------------------------------------------

    def vote(self, listener: str, token: str, answer: Answer) -> bool:
        """Keep an answer. It is durable when this returns.

        Args:
            listener: from `listener_of`.
            token: of the deal.
            answer: a preference, or ratings where the rules say study.

        Returns:
            False where this deal was answered before: sent twice, it counts once, as it was sent first.

        Raises:
            Refused: not dealt to this listener, not listened to for long enough, or too many votes.
        """
        now = self.clock()
        deal = deal_of(self.store.key, listener, token, now)
        if (answer.score_a is not None) != self.rules.study:
            raise Refused("Please rate both clips." if self.rules.study else "Please choose one of the four answers.")
        with self.store.write() as connection:
            self._known(connection, listener, lock=True)
            found = connection.execute(_whole_deal().where(deals.c.id == deal).with_for_update(of=deals)).one_or_none()
            if found is None or found.listener != listener:
                raise Refused("This pair was not dealt to you: reload the page.")
            if found.state == "voted":
                return False
            if not is_simulated(listener):  # rules on a waveform neither wait nor flood
                self._check_patience(connection, found, answer, now)
                self._check_rate(connection, listener, now)
            row = {"deal": deal, "pair": found.pair, "listener": listener, "voted_at": now, **asdict(answer.believed)}
            connection.execute(insert(votes).values(row))
            connection.execute(update(deals).where(deals.c.id == deal).values(state="voted"))
            if found.state == "expired":
                connection.execute(update(pairs).where(pairs.c.id == found.pair).values(live=pairs.c.live + 1))
        return True

    def votes_of(self, listener: str) -> int:
        """How many votes of a listener are kept."""
        with self.store.read() as connection:
            return connection.scalar(select(func.count()).select_from(votes).where(votes.c.listener == listener)) or 0

    def pairs_for(self, listener: str) -> int:
        """How many pairs, checks of attention among them, a listener was dealt or will be, as things stand."""
        is_check = pairs.c.kind.in_(CHECKS)
        own = deals.join(pairs, deals.c.pair == pairs.c.id)
        count = select(func.count(), func.count().filter(is_check))
        with self.store.read() as connection:
            dealt, checked = connection.execute(count.select_from(own).where(deals.c.listener == listener)).one()
            waiting = (
                connection.scalar(select(func.count()).select_from(pairs).where(self._wanted(), ~_dealt_to(listener)))
                or 0
            )
            checks = connection.scalar(select(func.count()).select_from(pairs).where(is_check)) or 0
        compared = dealt - checked + waiting
        due = min(checks, compared // self.rules.check_every) if self.rules.check_every else 0
        return compared + max(checked, due)

    def check_typing(self, listener: str) -> None:
        """Refuse a listener who typed too many prompts in the last hour."""
        recent = and_(pairs.c.owner == listener, pairs.c.made_at > self.clock() - 3600)
        with self.store.read() as connection:
            self._known(connection, listener)
            typed = connection.scalar(select(func.count()).select_from(pairs).where(recent)) or 0
        if typed >= self.rules.prompts_per_hour:
            raise Refused(
                f"You typed {typed} prompts in the last hour, and that is the most: vote on others meanwhile."
            )

    # -- inside a transaction ----------------------------------------------------------------------------------------

    def _known(self, connection: Connection, listener: str, lock: bool = False) -> None:
        found = select(listeners.c.consent).where(listeners.c.id == listener)
        consent = connection.scalar(found.with_for_update(read=True) if lock else found)
        if consent is None:
            raise Unknown("Please agree to the text on this page first.")
        if consent != self.rules.consent_id:
            raise Unknown("The text that you agreed to has changed: please read it again.")

    def _expire(self, connection: Connection, now: float) -> None:
        """Pairs that were dealt and never voted on are for others again."""
        before = now - self.rules.deal_hours * 3600
        late = select(deals.c.id, deals.c.pair).where(deals.c.state == "open", deals.c.dealt_at < before).limit(100)
        for deal, pair in connection.execute(late).all():
            # A late vote on it may have been committed since it was read: then it is voted on, and stays so.
            own = update(deals).where(deals.c.id == deal, deals.c.state == "open")
            if connection.execute(own.values(state="expired")).rowcount == 1:
                connection.execute(update(pairs).where(pairs.c.id == pair).values(live=pairs.c.live - 1))

    def _reopen(self, connection: Connection, deal: Row, now: float) -> bool:
        """Have an expired deal count on its listener again; False where they voted on it since it was read."""
        own = update(deals).where(deals.c.id == deal.id, deals.c.state == "expired")
        if connection.execute(own.values(state="open", dealt_at=now)).rowcount != 1:
            return False
        connection.execute(update(pairs).where(pairs.c.id == deal.pair).values(live=pairs.c.live + 1))
        return True

    def _open_deal(self, connection: Connection, listener: str, pair: str | None) -> Row | None:
        own = _whole_deal().where(deals.c.listener == listener, deals.c.state != "voted")
        if pair is not None:
            own = own.where(deals.c.pair == pair)
        return connection.execute(own.order_by(deals.c.dealt_at.desc()).limit(1)).one_or_none()

    def _choose(self, connection: Connection, listener: str, pair: str | None) -> str | None:
        dealt = _dealt_to(listener)
        if pair is not None:
            own = select(pairs.c.id).where(pairs.c.id == pair, pairs.c.owner == listener, ~dealt)
            if connection.scalar(own) is None:
                raise Refused("This pair is not yours: reload the page.")
            return pair
        typed = select(pairs.c.id).where(pairs.c.owner == listener, ~dealt).order_by(pairs.c.made_at).limit(1)
        if (waiting := connection.scalar(typed)) is not None:
            return waiting
        if self._check_is_due(connection, listener):
            check = select(pairs.c.id).where(pairs.c.kind.in_(CHECKS), ~dealt).order_by(pairs.c.live, pairs.c.made_at)
            if (due := connection.scalar(check.limit(1))) is not None:
                return due
        near = select(pairs.c.id, pairs.c.live).where(self._wanted(), ~dealt)
        rows = connection.execute(near.order_by(pairs.c.live, pairs.c.made_at).limit(_NEAR)).all()
        return self._random.choice([row.id for row in rows if row.live == rows[0].live]) if rows else None

    def _wanted(self) -> ColumnElement[bool]:
        """Pairs for everybody that not enough listeners were asked about yet."""
        return and_(pairs.c.kind == "pair", pairs.c.owner.is_(None), pairs.c.live < self.rules.raters)

    def _check_is_due(self, connection: Connection, listener: str) -> bool:
        if not self.rules.check_every:
            return False
        own = select(func.count(), func.count().filter(pairs.c.kind.in_(CHECKS)))
        own = own.select_from(deals.join(pairs, deals.c.pair == pairs.c.id)).where(deals.c.listener == listener)
        dealt, checks = connection.execute(own).one()
        return dealt - checks >= (checks + 1) * self.rules.check_every

    def _side(self, connection: Connection, pair: str) -> bool:
        """Whether clip a is the second one: what fewer listeners of this pair had, or a coin."""
        counted = select(func.count().filter(deals.c.swapped), func.count().filter(~deals.c.swapped))
        swapped, straight = connection.execute(counted.where(deals.c.pair == pair)).one()
        return self._random.random() < 0.5 if swapped == straight else swapped < straight

    def _check_patience(self, connection: Connection, deal: Row, answer: Answer, now: float) -> None:
        lengths = connection.scalars(
            select(clips.c.duration_s).where(or_(clips.c.id == deal.first, clips.c.id == deal.second))
        )
        least = min(self.rules.min_seconds, *lengths)
        # What the page reports can be forged; the time since the deal cannot.
        if min(answer.seconds_a, answer.seconds_b) < least - _TICK_S or now - deal.dealt_at < 2 * least:
            raise Refused(f"Please listen to each clip for at least {least:g} seconds first.")

    def _check_rate(self, connection: Connection, listener: str, now: float) -> None:
        limits = ((60, self.rules.votes_per_minute, "minute"), (86400, self.rules.votes_per_day, "day"))
        for seconds, most, name in limits:
            recent = and_(votes.c.listener == listener, votes.c.voted_at > now - seconds)
            if (connection.scalar(select(func.count()).select_from(votes).where(recent)) or 0) >= most:
                raise Refused(f"That is more than {most} votes in a {name}: please take a break.")


def _check_empty(connection: Connection, study: bool, name: str) -> None:
    """Refuse what a collection of the other kind has left in a store."""
    kinds = {
        votes.c.deal: "votes that were no ratings" if study else "votes that were ratings of a study",
        pairs.c.id: "pairs that were made for no study" if study else "pairs of a study",
    }
    for column, found in kinds.items():
        if connection.scalar(select(column).limit(1)) is not None:
            raise ValueError(f"`study` is {study}, but the store {name} holds {found}: give a --store of its own.")


def rules_held(connection: Connection) -> list[dict[str, Any]]:
    """The rules that have held, each with the time `since` which it did, the newest last; empty for a store of an earlier version."""
    return json.loads(connection.scalar(select(settings.c.value).where(settings.c.name == RULES_HELD)) or "[]")


def _dealt_to(listener: str) -> ColumnElement[bool]:
    return exists().where(deals.c.pair == pairs.c.id, deals.c.listener == listener)


def _set(connection: Connection, name: str, value: str) -> None:
    connection.execute(delete(settings).where(settings.c.name == name))
    connection.execute(insert(settings).values(name=name, value=value))


def _whole_deal():
    columns = (deals, pairs.c.kind, pairs.c.prompt, pairs.c.first, pairs.c.second)
    return select(*columns).select_from(deals.join(pairs, deals.c.pair == pairs.c.id))
