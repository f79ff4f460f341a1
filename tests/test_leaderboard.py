"""The ranking on the page, from the votes in a store."""

import random
import re
from html.parser import HTMLParser

from sqlalchemy import select
from stores import add_pair, hear_and_vote, join, open_desk

from musicrl_hf.collect import tables
from musicrl_hf.collect.leaderboard import LEAST_LISTENERS, LEAST_VOTES, Leaderboard, votes_in_store
from musicrl_hf.collect.rules import Answer
from musicrl_hf.collect.simulate import simulate
from musicrl_hf.evaluation import mean_opinion_scores, win_rate
from musicrl_hf.preferences.listeners import simulated_listeners

GOOD, POOR = "good <b>", "poor"


def prefer(desk, clock, listener, seed):
    """Vote on everything for the better model, and now and then for the other."""
    noise = random.Random(seed)
    while (deal := desk.deal(listener)) is not None:
        with desk.store.read() as connection:
            wanted = select(tables.deals.c.swapped).where(tables.deals.c.id == deal.token.partition(".")[0])
            swapped = connection.scalar(wanted)
        a_is_good = not swapped
        if noise.random() < 0.25:
            a_is_good = not a_is_good
        clock.now += 10
        scores = (5, 2) if a_is_good else (2, 5)
        answer = Answer.rated(*scores, 2.0, 2.0) if desk.rules.study else Answer("ab"[not a_is_good], 2.0, 2.0)
        desk.vote(listener, deal.token, answer)


def test_votes_are_counted_as_the_models_that_were_heard(store, clock):
    desk = open_desk(store, clock, raters=9, study=True, votes_per_minute=1000)
    for number in range(12):
        add_pair(store, f"prompt {number}", models=(GOOD, POOR))
    add_pair(store, "check", models=(GOOD, GOOD), kind="identical")
    add_pair(store, "itself", models=(GOOD, GOOD))
    for seed in range(4):
        prefer(desk, clock, join(desk)[1], seed)
    found = votes_in_store(store)
    counted, ratings = [vote for vote, _ in found], [rating for _, own in found for rating in own]
    assert len(counted) == 48  # neither the check nor a model against itself
    assert len(ratings) == 96
    with store.read() as connection:
        rows = connection.execute(
            select(tables.votes.c.score_a, tables.votes.c.score_b, tables.deals.c.swapped, tables.pairs.c.prompt)
            .join(tables.deals, tables.votes.c.deal == tables.deals.c.id)
            .join(tables.pairs, tables.votes.c.pair == tables.pairs.c.id)
        ).all()
    good = [row.score_b if row.swapped else row.score_a for row in rows if row.prompt.startswith("prompt")]
    assert win_rate(counted, GOOD).wins == sum(score == 5 for score in good)
    assert mean_opinion_scores(ratings)[0].mean == sum(good) / len(good)
    page = Leaderboard(store).html()
    assert "48 votes of 4 listeners." in page
    for title in ("Strength", "Who is preferred", "Mean opinion score"):
        assert f">{title}</h2>" in page
    assert f"{sum(good) / len(good):.2f}" in page
    assert "good &lt;b&gt;" in page
    assert "<b>" not in page
    assert not re.search(r"https?:|<script", page)
    HTMLParser().feed(page)


def test_few_votes_are_not_shown(store, clock):
    desk = open_desk(store, clock, raters=99, votes_per_minute=1000)
    board = Leaderboard(store, fresh_s=0)
    assert f"from {LEAST_VOTES} votes of {LEAST_LISTENERS} listeners on" in board.html()
    for number in range(LEAST_VOTES):
        add_pair(store, f"prompt {number}", models=(GOOD, POOR))
    for seed in range(LEAST_LISTENERS):
        assert "poor" not in board.html()
        prefer(desk, clock, join(desk)[1], seed)
    assert "poor" in board.html()


def test_two_generators_that_few_compared_are_left_out(store, clock):
    """Their cell would say how its only listener voted: "1 of 1"."""
    desk = open_desk(store, clock, raters=9, study=True, votes_per_minute=1000)
    for number in range(LEAST_VOTES):
        add_pair(store, f"prompt {number}", models=(GOOD, POOR))
    for seed in range(LEAST_LISTENERS):
        prefer(desk, clock, join(desk)[1], seed)
    board = Leaderboard(store, fresh_s=0)
    before = board.html()
    assert "60 votes of 3 listeners." in before
    add_pair(store, "one more", models=("newcomer", POOR))
    curious = [join(desk)[1] for _ in range(LEAST_LISTENERS)]
    for seed, listener in enumerate(curious):
        assert board.html() == before  # what one or two listeners say alone moves nothing, however much it is
        prefer(desk, clock, listener, seed)
    shown = board.html()
    assert "newcomer" not in shown
    assert "120 votes of 6 listeners; left out: 3 on pairs of generators with fewer than 20 votes" in shown
    for number in range(LEAST_VOTES):  # twenty votes, but of one listener
        add_pair(store, f"another {number}", models=("newcomer", POOR))
    prefer(desk, clock, curious[0], 8)
    assert "newcomer" not in board.html()
    for seed, listener in enumerate(curious[1:]):
        prefer(desk, clock, listener, seed)
    assert "newcomer" in board.html()
    assert "left out" not in board.html()


def test_two_looks_around_a_vote_show_the_same(store, clock):
    """Whoever sees the table change by one vote knows what it was, also where a withdrawal has it counted again."""
    desk = open_desk(store, clock, raters=99, votes_per_minute=1000)
    for number in range(LEAST_VOTES):
        add_pair(store, f"prompt {number}", models=(GOOD, POOR))
    people = [join(desk) for _ in range(LEAST_LISTENERS + 1)]
    for seed, (_, listener) in enumerate(people):
        prefer(desk, clock, listener, seed)
    board = Leaderboard(store, fresh_s=0)
    assert "80 votes of 4 listeners." in board.html()
    add_pair(store, "one more", models=(GOOD, POOR))
    hear_and_vote(desk, clock, people[0][1])
    assert "80 votes of 4 listeners." in board.html()
    desk.withdraw(people[1][0])
    assert "60 votes of 3 listeners." in board.html()


def test_who_withdraws_is_out_of_the_ranking_at_once(store, clock):
    desk = open_desk(store, clock, raters=9, votes_per_minute=1000)
    for number in range(LEAST_VOTES):
        add_pair(store, f"prompt {number}", models=(GOOD, POOR))
    people = [join(desk) for _ in range(LEAST_LISTENERS + 1)]
    for seed, (_, listener) in enumerate(people):
        prefer(desk, clock, listener, seed)
    board = Leaderboard(store, fresh_s=3600)
    assert "80 votes of 4 listeners." in board.html()
    elsewhere = open_desk(store, clock, raters=9, votes_per_minute=1000)  # another process on the same store
    elsewhere.withdraw(people[0][0])
    assert "60 votes of 3 listeners." in board.html()
    elsewhere.withdraw(people[1][0])
    assert "The ranking appears from" in board.html()


def test_a_count_is_kept_for_a_while_and_simulated_listeners_are_called_so(store, clock):
    desk = open_desk(store, clock, raters=5)
    for number in range(5):
        add_pair(store, f"prompt {number}")
    board = Leaderboard(store, fresh_s=3600)
    fresh = Leaderboard(store, fresh_s=0)
    first = board.html()
    simulate(desk, simulated_listeners(5))
    assert board.html() == first
    assert "25 votes of 5 listeners, 5 of whom are simulated: rules on the waveform, not people." in fresh.html()
