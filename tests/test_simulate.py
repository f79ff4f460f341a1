from collections import Counter

import pytest
from sqlalchemy import select
from stores import add_pair, open_desk, votes_in

from musicrl_hf.audio import read_audio
from musicrl_hf.collect import tables
from musicrl_hf.collect.simulate import simulate
from musicrl_hf.preferences.listeners import simulated_listeners


def heard(desk, row):
    """Clips a and b of a vote, as tensors, and their rate."""
    with desk.store.read() as connection:
        deal = connection.execute(select(tables.deals).where(tables.deals.c.id == row.deal)).one()
        pair = connection.execute(select(tables.pairs).where(tables.pairs.c.id == row.pair)).one()
    clips = [read_audio(desk.store.clip_file(clip)) for clip in (pair.first, pair.second)]
    first, second = clips[::-1] if deal.swapped else clips
    return first[0], second[0], first[1]


def test_simulated_listeners_vote_as_they_judge_and_are_called_so(store, clock):
    desk = open_desk(store, clock, raters=3)
    for number in range(4):
        add_pair(store, f"prompt {number}", kind="identical" if number == 3 else "pair")
    listeners = simulated_listeners(4)
    given = simulate(desk, listeners)
    assert given.total() == 9
    rows = votes_in(store)
    assert Counter(row.pair for row in rows).most_common()[0][1] == 3
    by_name = {listener.name: listener for listener in listeners}
    with store.read() as connection:
        prompts = {row.id: row.prompt for row in connection.execute(select(tables.pairs))}
    for row in rows:
        assert row.listener.startswith("simulated-")
        assert row.preference == by_name[row.listener](prompts[row.pair], *heard(desk, row)).preference
        assert (row.seconds_a, row.seconds_b) == (1.0, 1.0)
    assert given == Counter(row.listener for row in rows)
    assert simulate(desk, listeners) == {}  # all is said
    add_pair(store, "one more")
    assert simulate(desk, listeners, votes_each=max(Counter(row.listener for row in rows).values())).total() <= 3


def test_simulated_listeners_keep_to_one_licence(store, clock):
    desk = open_desk(store, clock)
    add_pair(store, "jazz")
    simulate(desk, simulated_listeners(1))
    add_pair(store, "blues")
    other = open_desk(store, clock, licence="cc0-1.0")
    with pytest.raises(ValueError, match="`licence` is 'cc0-1.0', but simulated .* voted under cc-by-4.0 .* --store"):
        simulate(other, simulated_listeners(2))
    assert len(votes_in(store)) == 1
    assert simulate(open_desk(store, clock), simulated_listeners(1)).total() == 1


def test_simulated_listeners_rate_in_a_study(store, clock):
    desk = open_desk(store, clock, study=True, raters=2)
    add_pair(store, "jazz")
    listeners = simulated_listeners(2)
    assert simulate(desk, listeners).total() == 2
    by_name = {listener.name: listener for listener in listeners}
    for row in votes_in(store):
        first, second, rate = heard(desk, row)
        expected = [float(by_name[row.listener].rate(["jazz"], clip[None], rate)[0]) for clip in (first, second)]
        assert [row.score_a, row.score_b] == expected
