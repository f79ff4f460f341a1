"""What a listener can and cannot do, on every kind of store."""

import threading
import time
from collections import Counter
from dataclasses import asdict

import pytest
import torch
from sqlalchemy import func, select
from stores import add_pair, hear_and_vote, join, open_desk, votes_in

from musicrl_hf.audio import read_audio
from musicrl_hf.collect import tables
from musicrl_hf.collect.desk import Desk
from musicrl_hf.collect.rules import Answer, Rules
from musicrl_hf.collect.store import DATABASE_FILE, VoteStore
from musicrl_hf.collect.tokens import Refused

GOOD = Answer("a", 5.0, 5.0)


def count(store, table) -> int:
    with store.read() as connection:
        return connection.scalar(select(func.count()).select_from(table))


def test_no_vote_without_consent(store, clock):
    desk = open_desk(store, clock)
    add_pair(store, "jazz")
    with pytest.raises(Refused, match="agree to the text"):
        desk.deal("a" * 64)
    with pytest.raises(Refused, match="has changed"):
        desk.consent("an older text")
    code, listener = join(desk)
    assert desk.deal(listener) is not None
    assert code.replace("-", "") not in listener  # the code itself is kept nowhere
    with store.read() as connection:
        assert code not in str(connection.execute(select(tables.listeners)).all())


def test_new_words_ask_for_consent_again(store, clock):
    code, _ = join(open_desk(store, clock))
    changed = open_desk(store, clock, licence="cc0-1.0")
    with pytest.raises(Refused, match="has changed: please read it again"):
        changed.listener_of(code)
    assert "Creative Commons Zero" in changed.rules.consent_text


def test_a_vote_is_kept_as_it_was_heard(store, clock):
    desk = open_desk(store, clock)
    pair = add_pair(store, "jazz")
    _, listener = join(desk)
    deal = desk.deal(listener)
    assert deal.prompt == "jazz"
    assert not {"x", "y"} & {str(value) for value in asdict(deal).values()}  # blind
    clock.now += 10
    assert desk.vote(listener, deal.token, Answer("both_bad", 3.5, 4.5))
    (row,) = votes_in(store)
    assert (row.pair, row.listener, row.preference) == (pair, listener, "both_bad")
    assert (row.seconds_a, row.seconds_b, row.voted_at) == (3.5, 4.5, clock.now)
    assert desk.votes_of(listener) == 1


def test_the_clips_of_a_deal_come_in_its_order(store, clock):
    desk = open_desk(store, clock, raters=20)
    add_pair(store, "jazz")
    orders = Counter()
    for _ in range(10):
        _, listener = join(desk)
        deal = desk.deal(listener)
        waves = [read_audio(desk.clip(deal.clip_token, side))[0] for side in "ab"]
        pitches = [int(torch.fft.rfft(wave[0]).abs().argmax()) for wave in waves]  # in Hz, of one second
        with store.read() as connection:
            swapped = connection.scalar(select(tables.deals.c.swapped).where(tables.deals.c.listener == listener))
        assert pitches == ([400, 300] if swapped else [300, 400])
        orders[swapped] += 1
    assert orders == {True: 5, False: 5}
    with pytest.raises(Refused, match="not dealt to you"):
        desk.clip(deal.token, "a")  # what lets one vote does not open files
    with pytest.raises(ValueError, match="side is"):
        desk.clip(deal.clip_token, "../a")


def test_a_deal_lasts_until_it_is_answered_and_no_pair_comes_twice(store, clock):
    desk = open_desk(store, clock)
    made = {add_pair(store, f"prompt {number}") for number in range(5)}
    _, listener = join(desk)
    seen = []
    for _ in range(5):
        first, reloaded = desk.deal(listener), desk.deal(listener)
        assert first.prompt == reloaded.prompt
        seen.append(hear_and_vote(desk, clock, listener).partition(".")[0])
    assert desk.deal(listener) is None
    assert len(set(seen)) == 5
    assert {row.pair for row in votes_in(store)} == made


def test_a_vote_sent_twice_counts_once_and_as_it_was_first(store, clock):
    desk = open_desk(store, clock)
    add_pair(store, "jazz")
    _, listener = join(desk)
    token = hear_and_vote(desk, clock, listener, "a")
    assert not desk.vote(listener, token, Answer("b", 5, 5))
    assert [row.preference for row in votes_in(store)] == ["a"]


def test_many_threads_that_send_one_vote_make_one(store, clock):
    desk = open_desk(store, clock)
    add_pair(store, "jazz")
    _, listener = join(desk)
    deal = desk.deal(listener)
    clock.now += 10
    counted = []
    threads = [
        threading.Thread(target=lambda: counted.append(desk.vote(listener, deal.token, GOOD))) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counted) == [False] * 11 + [True]
    assert len(votes_in(store)) == 1


def test_only_who_was_dealt_a_pair_votes_on_it(store, clock):
    desk = open_desk(store, clock)
    add_pair(store, "jazz")
    (_, one), (_, other) = join(desk), join(desk)
    deal = desk.deal(one)
    clock.now += 10
    for listener, token in ((other, deal.token), (one, deal.token[:-1] + "0"), (one, "x"), (one, deal.clip_token)):
        if token != deal.token or listener == other:
            with pytest.raises(Refused, match="not dealt to you"):
                desk.vote(listener, token, GOOD)
    assert votes_in(store) == []


@pytest.mark.parametrize(("heard", "waited"), [((0.5, 5.0), 10), ((5.0, 0.0), 10), ((5.0, 5.0), 1.5)])
def test_a_vote_counts_after_both_were_heard(store, clock, heard, waited):
    desk = open_desk(store, clock)
    add_pair(store, "jazz")
    _, listener = join(desk)
    deal = desk.deal(listener)
    clock.now += waited
    with pytest.raises(Refused, match="listen to each clip for at least 1 seconds"):
        desk.vote(listener, deal.token, Answer("a", *heard))
    clock.now += 10
    assert desk.vote(listener, deal.token, GOOD)


def test_votes_are_limited_by_the_minute_and_the_day(store, clock):
    desk = open_desk(store, clock, votes_per_minute=2, votes_per_day=3)
    for number in range(5):
        add_pair(store, f"prompt {number}")
    _, listener = join(desk)
    hear_and_vote(desk, clock, listener)
    hear_and_vote(desk, clock, listener)
    deal = desk.deal(listener)
    clock.now += 5
    with pytest.raises(Refused, match="more than 2 votes in a minute"):
        desk.vote(listener, deal.token, GOOD)
    clock.now += 60
    assert desk.vote(listener, deal.token, GOOD)
    deal = desk.deal(listener)
    clock.now += 3600
    with pytest.raises(Refused, match="more than 3 votes in a day"):
        desk.vote(listener, deal.token, GOOD)
    _, other = join(desk)
    hear_and_vote(desk, clock, other)  # one's limit is not another's


def test_each_pair_is_asked_about_by_as_many_as_wanted(store, clock):
    desk = open_desk(store, clock, raters=2)
    pairs = [add_pair(store, f"prompt {number}") for number in range(4)]
    people = [join(desk)[1] for _ in range(8)]
    dealt, lock = [], threading.Lock()

    def listen(listener: str) -> None:
        deal = desk.deal(listener)
        with lock:
            dealt.append((listener, deal))

    threads = [threading.Thread(target=listen, args=(listener,)) for listener in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.read() as connection:
        counted = Counter(connection.scalars(select(tables.deals.c.pair)))
        assert counted == dict.fromkeys(pairs, 2)
        assert connection.scalars(select(tables.pairs.c.live)).all() == [2] * 4
    assert desk.open_pairs() == 0
    assert desk.deal(join(desk)[1]) is None


def test_what_nobody_answers_is_dealt_to_others_and_still_counts_when_late(store, clock):
    desk = open_desk(store, clock, raters=1, deal_hours=2)
    add_pair(store, "jazz")
    (_, slow), (_, other) = join(desk), join(desk)
    late = desk.deal(slow)
    assert desk.deal(other) is None
    clock.now += 2 * 3600 + 1
    assert desk.open_pairs() == 0
    assert desk.deal(other) is not None
    assert desk.vote(slow, late.token, GOOD)
    hear_and_vote(desk, clock, other)
    assert {row.listener for row in votes_in(store)} == {slow, other}
    clock.now += 4 * 3600
    with pytest.raises(Refused, match="too long ago"):
        desk.vote(slow, late.token, GOOD)


@pytest.mark.parametrize("asks_first", ["another", "the voter"])
def test_a_late_vote_stays_while_somebody_asks_for_a_pair(store, clock, asks_first):
    """The vote is being committed when another listener, or another tab of the voter, is dealt something."""
    desk = open_desk(store, clock, raters=2, deal_hours=2)
    add_pair(store, "jazz")
    (_, late), (_, other) = join(desk), join(desk)
    token = desk.deal(late).token
    clock.now += 2 * 3600 + 1
    if asks_first == "the voter":  # their deal has run out by then
        assert desk.deal(other) is not None
    inside, check = threading.Event(), desk._check_rate

    def check_slowly(*values):
        check(*values)
        inside.set()
        time.sleep(0.5)

    desk._check_rate = check_slowly
    voting = threading.Thread(target=lambda: desk.vote(late, token, GOOD))
    voting.start()
    assert inside.wait(10)
    dealt = desk.deal(late if asks_first == "the voter" else other)
    voting.join()
    assert (dealt is None) == (asks_first == "the voter")
    assert desk.votes_of(late) == 1
    assert desk.deal(late) is None
    with store.read() as connection:
        states = dict(tuple(row) for row in connection.execute(select(tables.deals.c.listener, tables.deals.c.state)))
        assert states == {late: "voted", other: "open"}
        assert connection.scalar(select(tables.pairs.c.live)) == 2


def test_a_typed_prompt_is_dealt_to_who_typed_it_and_counted(store, clock):
    desk = open_desk(store, clock, prompts_per_hour=2)
    add_pair(store, "from the file")
    (_, typist), (_, other) = join(desk), join(desk)
    assert desk.deal(typist).prompt == "from the file"
    desk.check_typing(typist)
    typed = add_pair(store, "typed", owner=typist)
    assert desk.deal(typist, typed).prompt == "typed"
    with pytest.raises(Refused, match="not yours"):
        desk.deal(other, typed)
    assert desk.deal(other).prompt == "from the file"
    hear_and_vote(desk, clock, other)
    assert desk.deal(other) is None
    clock.now = 100.0  # add_pair makes pairs soon after 0
    add_pair(store, "typed too", owner=typist)
    with pytest.raises(Refused, match="You typed 2 prompts in the last hour"):
        desk.check_typing(typist)
    desk.check_typing(other)


def test_withdrawal_removes_everything_of_the_listener_and_nothing_else(store, clock):
    desk = open_desk(store, clock, raters=2)
    shared = add_pair(store, "jazz")
    (code, leaver), (_, stays) = join(desk), join(desk)
    typed = add_pair(store, "my secret wish", owner=leaver)
    for listener in (leaver, stays):
        while desk.deal(listener) is not None:
            hear_and_vote(desk, clock, listener)
    assert len(votes_in(store)) == 3
    files = set(store.clip_folder.iterdir())
    assert desk.withdraw(code.lower()) == 2
    assert [(row.listener, row.pair) for row in votes_in(store)] == [(stays, shared)]
    assert count(store, tables.listeners) == count(store, tables.pairs) == count(store, tables.deals) == 1
    assert count(store, tables.clips) == 2
    assert len(files - set(store.clip_folder.iterdir())) == 2
    assert typed not in str(votes_in(store))
    for again in (lambda: desk.withdraw(code), lambda: desk.listener_of(code), lambda: desk.deal(leaver)):
        with pytest.raises(Refused):
            again()
    assert desk.open_pairs() == 1  # the pair is asked about once more
    with store.write() as connection:  # nothing of them is left in any table
        for table in tables.metadata.sorted_tables:
            assert leaver not in str(connection.execute(select(table)).all())
    if store.is_sqlite:  # nor on the disk
        with store.read() as connection:
            assert connection.exec_driver_sql("pragma secure_delete").scalar() == 1
        files = list(store.clip_folder.parent.glob(f"{DATABASE_FILE}*"))
        assert len(files) == 3  # its log is beside it, for the store is still open
        content = b"".join(path.read_bytes() for path in files)
        assert stays.encode() in content
        assert leaver.encode() not in content
        assert b"my secret wish" not in content


def test_checks_of_attention_come_between_pairs(store, clock):
    desk = open_desk(store, clock, check_every=2)
    for number in range(4):
        add_pair(store, f"prompt {number}")
    identical = add_pair(store, "x", kind="identical")
    broken = add_pair(store, "y", models=("x", "broken"), kind="broken")
    _, listener = join(desk)
    for _ in range(6):
        hear_and_vote(desk, clock, listener)
    kinds = [{identical: "check", broken: "check"}.get(row.pair, "pair") for row in votes_in(store)]
    assert kinds == ["pair", "pair", "check", "pair", "pair", "check"]


def test_a_study_and_a_collection_keep_their_votes_apart(store, clock):
    """A study would deal the pairs of a collection, a model against itself among them, or take them for heard."""
    open_desk(store, clock)
    open_desk(store, clock, study=True)  # nothing is there yet
    add_pair(store, "jazz")
    with pytest.raises(ValueError, match="`study` is False, but the store .* holds pairs of a study: give a --store"):
        open_desk(store, clock)
    with store.write() as connection:
        connection.execute(tables.pairs.delete())
    desk = open_desk(store, clock)
    add_pair(store, "jazz", models=("x", "x"))
    with pytest.raises(ValueError, match="`study` is True, but the store .* holds pairs that were made for no study"):
        open_desk(store, clock, study=True)
    _, listener = join(desk)
    hear_and_vote(desk, clock, listener)
    with pytest.raises(ValueError, match="`study` is True, but the store .* holds votes that were no ratings"):
        open_desk(store, clock, study=True)
    assert open_desk(store, clock).votes_of(listener) == 1


def test_a_study_takes_ratings_and_nothing_else(store, clock):
    votes = open_desk(store, clock)
    desk = open_desk(store, clock, study=True)
    add_pair(store, "jazz")
    _, other = join(votes)
    token = votes.deal(other).token
    with pytest.raises(Refused, match="one of the four answers"):
        votes.vote(other, token, Answer.rated(2, 5, 3.0, 3.0))
    _, listener = join(desk)
    deal = desk.deal(listener)
    clock.now += 10
    with pytest.raises(Refused, match="rate both clips"):
        desk.vote(listener, deal.token, GOOD)
    assert desk.vote(listener, deal.token, Answer.rated(2, 5, 3.0, 3.0))
    (row,) = votes_in(store)
    assert (row.preference, row.score_a, row.score_b) == ("b", 2, 5)
    with pytest.raises(ValueError, match="holds votes that were ratings of a study"):
        open_desk(store, clock)


def test_the_embedded_store_serves_two_processes_of_one_machine(tmp_path, clock):
    one, other = VoteStore(tmp_path), VoteStore(tmp_path)
    add_pair(one, "jazz")
    code, listener = join(open_desk(one, clock))
    desk = Desk(other, Rules(min_seconds=1.0, check_every=0), clock)
    assert desk.listener_of(code) == listener
    hear_and_vote(desk, clock, listener)
    assert len(votes_in(one)) == 1
