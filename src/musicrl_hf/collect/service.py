"""What the page asks of the server, one method a question: JSON in, JSON out.

Nothing that comes from a browser is trusted. An answer holds what only its listener may know: a private code stands for
each of them, and there is no question about anybody else's votes.
"""

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from .desk import Deal, Desk
from .leaderboard import Leaderboard
from .pool import PairPool
from .rules import Answer, clean_prompt
from .tokens import Refused, Unknown, hash_code

_LONGEST_TEXT = 5000  # characters of anything that a browser sends
_ADDRESSES = 10_000  # whose joins are counted
METHODS = ("consent", "next", "vote", "type", "progress", "withdraw", "board")  # the questions that there are


class ListeningService:
    """Answers the page.

    Args:
        desk: where votes are taken.
        pool: where pairs come from; None where nothing makes any.
        board: the ranking; None where the page shows none.
    """

    def __init__(self, desk: Desk, pool: PairPool | None = None, board: Leaderboard | None = None):
        self.desk, self.pool, self.board = desk, pool, board
        self._joins = _Joins(desk.rules.joins_per_hour)
        methods = (self._consent, self._next, self._vote, self._type, self._progress, self._withdraw, self._board)
        self._methods: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = dict(
            zip(METHODS, methods, strict=True)
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What the page has to know before anybody agrees to anything."""
        rules = self.desk.rules
        return {
            "collection": hmac.new(self.desk.store.salt.encode(), b"page", hashlib.sha256).hexdigest()[:12],
            "consent": rules.consent_text,
            "consent_id": rules.consent_id,
            "study": rules.study,
            "min_seconds": rules.min_seconds,
            "typing": self._typing,
            "prompt_length": rules.prompt_length,
            "board": self.board is not None,
        }

    def answer(self, method: str, data: Any, address: str = "") -> dict[str, Any]:
        """The answer to one question.

        Args:
            method: one of `METHODS`.
            data: what the browser sent.
            address: where it came from; it is neither kept nor logged.

        Returns:
            `ok` true and what was asked for; or `error`, a sentence for the listener, with `unknown` true where they
            have to agree first.
        """
        try:
            if method not in self._methods or not isinstance(data, Mapping):
                raise Refused("The page asked for something that is not there: reload it.")
            if method == "consent":
                self._joins.count(address)
            return {"ok": True, **self._methods[method](data)}
        except Unknown as error:
            return {"ok": False, "error": str(error), "unknown": True}
        except Refused as error:
            return {"ok": False, "error": str(error)}

    @property
    def _typing(self) -> bool:
        return self.pool is not None and not self.desk.rules.study and self.desk.rules.prompts_per_hour > 0

    # -- one method a question ---------------------------------------------------------------------------------------

    def _consent(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return {"code": self.desk.consent(_text(data, "consent_id"))}

    def _next(self, data: Mapping[str, Any]) -> dict[str, Any]:
        listener = self._listener(data)
        deal = self.desk.deal(listener, _text(data, "pair") if data.get("pair") is not None else None)
        told: dict[str, Any] = {"given": self.desk.votes_of(listener)}
        if self.desk.rules.study:  # whose pairs are fixed: "pair 12 of 40"
            growing = self.pool is not None and self.pool.makes_more
            told |= {"total": self.desk.pairs_for(listener), "growing": growing}
        if deal is not None:
            return {"deal": self._shown(deal), **told}
        if self.pool is not None:
            self.pool.run_short()
        return {"deal": None, **told, "more": self.pool is not None and self.pool.makes_more}

    def _vote(self, data: Mapping[str, Any]) -> dict[str, Any]:
        listener, token = self._listener(data), _text(data, "token")
        seconds = (_number(data, "seconds_a"), _number(data, "seconds_b"))
        try:
            if self.desk.rules.study:
                scores = [int(_number(data, name)) for name in ("score_a", "score_b")]
                answer = Answer.rated(scores[0], scores[1], *seconds)
            else:
                answer = Answer(_text(data, "preference"), *seconds)
        except (ValueError, OverflowError):
            raise Refused("This answer is none of those that the page offers: reload it.") from None
        counted = self.desk.vote(listener, token, answer)
        return {"counted": counted, "given": self.desk.votes_of(listener)}

    def _type(self, data: Mapping[str, Any]) -> dict[str, Any]:
        if not self._typing or self.pool is None:
            raise Refused("This page takes no prompts of your own.")
        listener = self._listener(data)
        try:
            prompt = clean_prompt(_text(data, "prompt"), self.desk.rules.prompt_length)
        except ValueError as error:
            raise Refused(str(error)) from None
        self.desk.check_typing(listener)
        self.pool.ask(listener, prompt)
        return asdict(self.pool.progress(listener))

    def _progress(self, data: Mapping[str, Any]) -> dict[str, Any]:
        if self.pool is None:
            raise Refused("This page takes no prompts of your own.")
        return asdict(self.pool.progress(self._listener(data)))

    def _withdraw(self, data: Mapping[str, Any]) -> dict[str, Any]:
        code = _text(data, "withdrawn")
        if self.pool is not None:
            self.pool.forget(hash_code(self.desk.store.salt, code))
        return {"removed": self.desk.withdraw(code)}

    def _board(self, data: Mapping[str, Any]) -> dict[str, Any]:
        if self.board is None:
            raise Refused("This page shows no ranking.")
        return {"html": self.board.html()}

    # ----------------------------------------------------------------------------------------------------------------

    def _listener(self, data: Mapping[str, Any]) -> str:
        try:
            return self.desk.listener_of(_text(data, "code"))
        except Unknown:
            raise
        except Refused as error:
            raise Unknown(str(error)) from None  # what the browser kept is no code: ask for consent again

    def _shown(self, deal: Deal) -> dict[str, Any]:
        least = min(self.desk.rules.min_seconds, deal.duration_a, deal.duration_b)
        return {**asdict(deal), "id": deal.token.partition(".")[0], "least": least}


class _Joins:
    """Keeps one address from joining thousands of times. Addresses are hashed under a key that lives as long as this."""

    def __init__(self, most: int):
        self.most = most
        self._key = secrets.token_bytes(32)
        self._seen: OrderedDict[bytes, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def count(self, address: str) -> None:
        """Count a join.

        Raises:
            Refused: too many from there in the last hour.
        """
        hashed, now = hmac.digest(self._key, address.encode(), "sha256"), time.monotonic()
        with self._lock:
            times = self._seen.setdefault(hashed, deque())
            self._seen.move_to_end(hashed)
            while times and times[0] < now - 3600:
                times.popleft()
            if len(times) >= self.most:
                raise Refused("Too many listeners joined from here in the last hour: please try again later.")
            times.append(now)
            while len(self._seen) > _ADDRESSES:
                self._seen.popitem(last=False)


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    # Half a surrogate pair cannot be encoded, and PostgreSQL takes no zero byte.
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or re.search("[\x00\ud800-\udfff]", value):
        raise Refused(f"The page sent no {name} that can be read: reload it.")
    return value


def _number(data: Mapping[str, Any], name: str) -> float:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(f"The page sent no {name} that can be read: reload it.")
    try:
        return float(value)
    except OverflowError:  # JSON has whole numbers of any length
        raise Refused(f"The page sent a {name} that is no time and no rating: reload it.") from None
