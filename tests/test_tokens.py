import hashlib
import hmac

import pytest

from musicrl_hf.collect.tokens import Refused, deal_of, hash_code, new_code, sign


def test_a_code_is_hashed_with_the_salt_however_it_is_typed():
    code = new_code()
    assert [len(group) for group in code.split("-")] == [4] * 5
    assert new_code() != code
    plain = code.replace("-", "")
    expected = hmac.new(b"salt", plain.encode(), hashlib.sha256).hexdigest()
    assert hash_code("salt", code) == hash_code("salt", f" {plain.lower()} ") == expected
    assert hash_code("pepper", code) != expected


@pytest.mark.parametrize("typed", ["", "K7QM-2F9D", "0" * 20, "K7QM-2F9D-XXPA-9H3C-TB4E-22", "é" * 20])
def test_what_cannot_be_a_code_is_refused(typed):
    with pytest.raises(Refused, match="five groups of four"):
        hash_code("salt", typed)


def test_a_token_serves_its_deal_purpose_and_time_only():
    token = sign("key", "listener-1", "deal9", 1000.0)
    assert deal_of("key", "listener-1", token, 1000.0) == "deal9"
    with pytest.raises(Refused, match="too long ago"):
        deal_of("key", "listener-1", token, 1001.0)
    later = token.replace(".1000.", ".2000.")
    other = token.replace("deal9", "deal8")
    for key, purpose, tried in (
        ("key", "listener-2", token),
        ("yek", "listener-1", token),
        ("key", "listener-1", later),
        ("key", "listener-1", other),
        ("key", "listener-1", ""),
        ("key", "listener-1", "a.b.ü"),
    ):
        with pytest.raises(Refused, match="not dealt to you"):
            deal_of(key, purpose, tried, 0.0)
