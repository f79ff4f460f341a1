"""What the page may ask, and what it is refused, on every kind of store."""

import json
import re

import pytest
from stores import add_pair, join, open_desk, votes_in

from musicrl_hf.collect.service import METHODS, ListeningService


def service_of(store, clock, **rules):
    return ListeningService(open_desk(store, clock, **rules))


def joined(service):
    answer = service.answer("consent", {"consent_id": service.settings["consent_id"]})
    return answer["code"]


def test_from_consent_to_a_vote(store, clock):
    service = service_of(store, clock)
    pair = add_pair(store, "jazz")
    code = joined(service)
    asked = service.answer("next", {"code": code})
    assert asked["ok"]
    assert (asked["deal"]["prompt"], asked["deal"]["least"], asked["given"]) == ("jazz", 1.0, 0)
    assert not re.search(r'"[xy]"', json.dumps(asked))  # blind
    clock.now += 10
    vote = {"code": code, "token": asked["deal"]["token"], "preference": "a", "seconds_a": 2, "seconds_b": 1.5}
    assert service.answer("vote", vote) == {"ok": True, "counted": True, "given": 1}
    assert service.answer("vote", vote) == {"ok": True, "counted": False, "given": 1}
    assert service.answer("next", {"code": code}) == {"ok": True, "deal": None, "given": 1, "more": False}
    (row,) = votes_in(store)
    assert (row.pair, row.preference, row.seconds_a, row.seconds_b) == (pair, "a", 2.0, 1.5)
    assert service.answer("withdraw", {"withdrawn": code}) == {"ok": True, "removed": 1}
    assert votes_in(store) == []


@pytest.mark.parametrize("method", sorted({*METHODS} - {"consent", "board", "withdraw", "type", "progress"}))
def test_nothing_is_answered_before_consent(store, clock, method):
    service = service_of(store, clock)
    add_pair(store, "jazz")
    for code in (None, "", "AAAA-AAAA-AAAA-AAAA-AAAA", "x" * 6000, 3, ["a"]):
        answer = service.answer(method, {"code": code})
        assert not answer["ok"]
        assert answer.get("unknown") or "no code" in answer["error"]


@pytest.mark.parametrize(
    "data", [None, [], "text", {}, {"code": None}, {"code": {}}, {"consent_id": 1}, {"withdrawn": None}, {"pair": []}]
)
def test_what_no_page_would_send_is_a_sentence_and_no_crash(store, clock, data):
    service = service_of(store, clock)
    for method in (*METHODS, "_text", "__init__", "settings", "answer"):
        answer = service.answer(method, data)
        assert answer["ok"] is False
        assert answer["error"].endswith((".", ":", "it."))


@pytest.mark.parametrize(
    "wrong",
    [
        {"preference": "c"},
        {"preference": None},
        {"seconds_a": -1},
        {"seconds_a": float("nan")},
        {"seconds_a": float("inf")},
        {"seconds_a": 10**400},
        {"seconds_b": "5"},
        {"seconds_b": True},
        {"token": "x"},
        {"token": 5},
        {"token": "\ud800"},
        {"code": "\x00"},
    ],
)
def test_forged_votes_are_refused(store, clock, wrong):
    service = service_of(store, clock)
    add_pair(store, "jazz")
    code = joined(service)
    token = service.answer("next", {"code": code})["deal"]["token"]
    clock.now += 10
    good = {"code": code, "token": token, "preference": "a", "seconds_a": 2.0, "seconds_b": 2.0}
    assert not service.answer("vote", good | wrong)["ok"]
    assert votes_in(store) == []


@pytest.mark.parametrize("scores", [{"score_a": 6}, {"score_a": None}, {"score_b": "4"}, {"score_b": float("inf")}])
def test_forged_ratings_are_refused(store, clock, scores):
    service = service_of(store, clock, study=True)
    add_pair(store, "jazz")
    code = joined(service)
    token = service.answer("next", {"code": code})["deal"]["token"]
    clock.now += 10
    good = {"code": code, "token": token, "score_a": 4, "score_b": 2, "seconds_a": 2.0, "seconds_b": 2.0}
    assert not service.answer("vote", good | scores)["ok"]
    assert service.answer("vote", good)["counted"]


def test_one_listener_learns_nothing_of_another(store, clock):
    service = service_of(store, clock)
    add_pair(store, "jazz")
    one, other = joined(service), joined(service)
    mine = add_pair(store, "my own prompt", owner=service.desk.listener_of(one))
    deal = service.answer("next", {"code": one})["deal"]
    clock.now += 10
    vote = {"code": other, "token": deal["token"], "preference": "a", "seconds_a": 2, "seconds_b": 2}
    assert "not dealt to you" in service.answer("vote", vote)["error"]
    assert "not yours" in service.answer("next", {"code": other, "pair": mine})["error"]
    for pair in ("\x00", "\ud800", "x' or 1=1 --"):
        assert not service.answer("next", {"code": other, "pair": pair})["ok"]
    assert service.answer("next", {"code": other})["deal"]["prompt"] == "jazz"
    assert service.answer("next", {"code": other})["given"] == 0


def test_a_study_says_how_far_a_listener_has_come(store, clock):
    plain = service_of(store, clock)
    assert "total" not in plain.answer("next", {"code": joined(plain)})
    service = service_of(store, clock, study=True, raters=1, check_every=2)
    for number in range(5):
        add_pair(store, f"prompt {number}")
    add_pair(store, "check", kind="identical")
    one, other = joined(service), joined(service)

    def step(code):
        """Rate the next pair; which one of how many it was."""
        asked = service.answer("next", {"code": code})
        assert not asked["growing"]
        if asked["deal"] is None:
            return None
        clock.now += 10
        scores = {"score_a": 4, "score_b": 2, "seconds_a": 2.0, "seconds_b": 2.0}
        assert service.answer("vote", {"code": code, "token": asked["deal"]["token"], **scores})["counted"]
        return asked["given"] + 1, asked["total"]

    # 5 pairs and, after 2 of them, the only check; each pair is for one listener, so 2 that the other rates are gone.
    assert [step(one) for _ in range(2)] == [(1, 6), (2, 6)]
    assert [step(other) for _ in range(2)] == [(1, 4), (2, 4)]
    assert [step(one) for _ in range(3)] == [(3, 4), (4, 4), None]
    assert [step(other) for _ in range(2)] == [(3, 3), None]


def test_joins_from_one_address_are_limited_and_addresses_not_kept(store, clock):
    service = service_of(store, clock, joins_per_hour=2)
    agree = {"consent_id": service.settings["consent_id"]}
    answers = [service.answer("consent", agree, "203.0.113.7") for _ in range(3)]
    assert [answer["ok"] for answer in answers] == [True, True, False]
    assert "Too many listeners joined" in answers[2]["error"]
    assert service.answer("consent", agree, "203.0.113.8")["ok"]
    assert "203.0.113" not in str(vars(service._joins))


def test_without_a_model_nothing_can_be_typed(store, clock):
    service = service_of(store, clock)
    code = join(service.desk)[0]
    assert not service.settings["typing"]
    assert "takes no prompts" in service.answer("type", {"code": code, "prompt": "jazz"})["error"]
    assert "shows no ranking" in service.answer("board", {})["error"]
