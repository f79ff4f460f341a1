"""Exports of a page that runs: again and again, where something changed."""

import threading
import time

import pytest
from stores import add_pair, hear_and_vote, join, open_desk

from musicrl_hf.collect.export import export_votes
from musicrl_hf.collect.job import CollectJob, seconds_of
from musicrl_hf.collect.publishing import Publisher
from musicrl_hf.preferences import load_preferences


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def test_it_exports_what_is_new_and_what_was_withdrawn(store, clock, tmp_path):
    desk = open_desk(store, clock)
    add_pair(store, "jazz")
    (code, leaver), (_, stays) = join(desk), join(desk)
    done = []
    publisher = Publisher(store, 3600, lambda: done.append(export_votes(store, tmp_path / "out").rows))
    publisher.export_changes()
    publisher.export_changes()
    assert done == [0]  # once, for what an earlier run may have published
    hear_and_vote(desk, clock, leaver)
    hear_and_vote(desk, clock, stays)
    publisher.export_changes()
    publisher.export_changes()
    assert done == [0, 2]  # nothing came since
    desk.withdraw(code)
    publisher.export_changes()
    assert done == [0, 2, 1]
    assert {row["listener"] for row in load_preferences(tmp_path / "out").to_list()} == {stays}


def test_what_fails_is_tried_again_and_the_last_votes_are_exported_at_the_end(store, clock, caplog):
    desk = open_desk(store, clock)
    add_pair(store, "jazz")
    tried, works = [], threading.Event()

    def export():
        tried.append(works.is_set())
        if not works.is_set():
            raise ConnectionError("the Hub was not reached")

    publisher = Publisher(store, 0.05, export)
    publisher.start()
    try:
        hear_and_vote(desk, clock, join(desk)[1])
        until(lambda: len(tried) > 1)
        works.set()
        until(lambda: tried[-1])
        assert "the Hub was not reached" in caplog.text
    finally:
        publisher.stop()

    late = Publisher(store, 3600, lambda: tried.append("late"))
    late.start()
    late.stop()
    assert tried[-1] == "late"


def test_spans_of_time():
    assert [seconds_of(text) for text in ("10s", "10m", "2 h", "1d")] == [10, 600, 7200, 86400]
    for text in ("10", "m", "1.5h", "-1m", "9s", "0h"):
        with pytest.raises(ValueError, match="`every` is"):
            seconds_of(text)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"every": "10m"}, "give both"),
        ({"out": "votes"}, "give both"),
        ({"push": "me/votes"}, "give both"),
        ({"every": "soon", "out": "votes"}, "`every` is 'soon'"),
        ({"every": "10m", "out": "votes", "simulate": 3}, "`simulate` opens no page"),
        ({"study": True}, "give --against"),
        ({"simulate": -1}, "`simulate` is -1: it has to be 0 or more"),
        ({"ahead": 0}, "`ahead` is 0: it has to be 1 or more"),
        ({"port": 70000}, "`port` is 70000"),
        ({"hostnames": ["https://example.org"]}, "`hostnames` has 'https://example.org': give names alone"),
        ({"hostnames": ["*"]}, "`hostnames` has '\\*'"),
    ],
)
def test_jobs_that_make_no_sense_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        CollectJob(**options)
