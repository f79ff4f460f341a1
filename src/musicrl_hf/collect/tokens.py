"""Private codes, salted hashes and signed tokens: who may vote on what, without anybody's name or address."""

import hashlib
import hmac
import re
import secrets

_ALPHABET = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"  # nothing that is read for something else
_CODE_LENGTH = 20  # 99 bits: nobody guesses another one's


class Refused(ValueError):
    """What a listener sent is not accepted; the message is for the listener."""


class Unknown(Refused):
    """Who sent it has not agreed to the text that holds now, or has withdrawn."""


def new_code() -> str:
    """A listener's private code, such as "K7QM-2F9D-XXPA-9H3C-TB4E"."""
    drawn = "".join(secrets.choice(_ALPHABET) for _ in range(_CODE_LENGTH))
    return "-".join(drawn[start : start + 4] for start in range(0, _CODE_LENGTH, 4))


def hash_code(salt: str, code: str) -> str:
    """The listener that a private code stands for: HMAC-SHA256 under the store's salt, 64 hexadecimal digits.

    Raises:
        Refused: what was typed cannot be a code.
    """
    typed = re.sub(r"[\s-]", "", code).upper()
    if len(typed) != _CODE_LENGTH or not set(typed) <= set(_ALPHABET):
        raise Refused("This is not a private code: it has five groups of four letters and digits.")
    return hmac.new(salt.encode(), typed.encode(), hashlib.sha256).hexdigest()


def sign(key: str, purpose: str, deal: str, expires: float) -> str:
    """A token for one deal: "DEAL.EXPIRES.SIGNATURE". `purpose` binds it to a listener, or to playing the clips."""
    payload = f"{deal}.{int(expires)}"
    return f"{payload}.{_signature(key, purpose, payload)}"


def deal_of(key: str, purpose: str, token: str, now: float) -> str:
    """The deal that a token was signed for.

    Raises:
        Refused: it was not signed here, not for this purpose, or has run out.
    """
    payload, _, signature = token.rpartition(".")
    if not hmac.compare_digest(signature.encode(), _signature(key, purpose, payload).encode()):
        raise Refused("This pair was not dealt to you: reload the page.")
    deal, _, expires = payload.partition(".")
    if now > int(expires):
        raise Refused("This pair was dealt too long ago: reload the page.")
    return deal


def _signature(key: str, purpose: str, payload: str) -> str:
    return hmac.new(key.encode(), f"{purpose}.{payload}".encode(), hashlib.sha256).hexdigest()
