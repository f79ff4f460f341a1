"""Pairs made while others listen, by real generators."""

import logging
import time

import pytest
import torch
from sqlalchemy import select
from stores import join, open_desk
from tiny import tiny_generator

from musicrl_hf.collect import tables
from musicrl_hf.collect.maker import PairMaker
from musicrl_hf.collect.pool import PairPool
from musicrl_hf.collect.service import ListeningService
from musicrl_hf.collect.tokens import Refused

OPTIONS = {"duration_s": 0.5, "guidance_scale": 1.0, "check_every": 0, "seed": 3}
PROMPTS = ["slow piano", "fast drums"]


@pytest.fixture(scope="module")
def models():
    return {"x": tiny_generator(seed=0), "y": tiny_generator(seed=1)}


@pytest.fixture
def pools():
    """Pools that end with the test."""
    started = []
    yield started
    for pool in started:
        pool.stop()


def silenced():
    """A generator whose clips are silent, so that none can be kept."""
    model = tiny_generator(seed=0)
    with torch.no_grad():
        for name, parameter in model.audio_encoder.decoder.named_parameters():
            if not name.endswith("original1"):
                parameter.zero_()
    return model


def prompts_in(store):
    with store.read() as connection:
        return connection.scalars(select(tables.pairs.c.prompt).order_by(tables.pairs.c.made_at)).all()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def test_pairs_are_made_ahead_and_no_further(store, clock, models, pools):
    desk = open_desk(store, clock)
    pools.append(PairPool(desk, PairMaker(store, models, PROMPTS, **OPTIONS), ahead=3))
    pools[0].start()
    until(lambda: desk.open_pairs() == 3)
    time.sleep(1.2)
    assert desk.open_pairs() == 3


def test_who_has_heard_all_gets_one_more(store, clock, models, pools):
    desk = open_desk(store, clock, raters=50)
    pools.append(PairPool(desk, PairMaker(store, models, PROMPTS, **OPTIONS), ahead=1))
    service = ListeningService(desk, pools[0])
    pools[0].start()
    code, listener = join(desk)
    until(lambda: desk.open_pairs() == 1)
    heard = set()
    for _ in range(3):
        until(lambda: (answer := service.answer("next", {"code": code}))["deal"] or not answer["more"])
        deal = service.answer("next", {"code": code})["deal"]
        heard.add(deal["id"])
        clock.now += 10
        vote = {"code": code, "token": deal["token"], "preference": "tie", "seconds_a": 1, "seconds_b": 1}
        assert service.answer("vote", vote)["counted"]
    assert len(heard) == 3


def test_typed_prompts_come_first_in_turn_and_tell_how_far_they_are(store, clock, models, pools):
    desk = open_desk(store, clock)
    pool = PairPool(desk, PairMaker(store, models, PROMPTS, **OPTIONS), ahead=1, longest_queue=2)
    people = [join(desk)[1] for _ in range(3)]
    pool.ask(people[0], "first")
    pool.ask(people[1], "second")
    with pytest.raises(Refused, match="2 prompts wait already"):
        pool.ask(people[2], "third")
    with pytest.raises(Refused, match="one at a time"):
        pool.ask(people[0], "again")
    assert [pool.progress(who).before for who in people[:2]] == [0, 1]
    assert pool.progress(people[2]).state == "none"
    pools.append(pool)
    pool.start()
    until(lambda: desk.open_pairs() == 1)
    assert prompts_in(store)[:2] == ["first", "second"]
    for who, prompt in zip(people, ("first", "second")):
        done = pool.progress(who)
        assert done.state == "made"
        assert done.seconds > 0
        assert desk.deal(who, done.pair).prompt == prompt


def test_through_the_service_a_typed_prompt_is_cleaned_and_limited(store, clock, models, pools):
    desk = open_desk(store, clock, prompts_per_hour=1, prompt_length=20)
    pools.append(PairPool(desk, PairMaker(store, models, PROMPTS, **OPTIONS), ahead=1))
    service = ListeningService(desk, pools[0])
    pools[0].start()
    clock.now = time.time()
    code, _ = join(desk)
    for prompt, complaint in (("!", "in words"), ("x" * 21, "at most 20")):
        assert complaint in service.answer("type", {"code": code, "prompt": prompt})["error"]
    assert service.answer("type", {"code": code, "prompt": " slow \n\x07 <b>air</b>"})["state"] == "waiting"
    until(lambda: service.answer("progress", {"code": code})["state"] == "made")
    assert "slow <b>air</b>" in prompts_in(store)
    assert "You typed 1 prompts" in service.answer("type", {"code": code, "prompt": "more"})["error"]


def test_a_model_that_fails_costs_its_pairs_only(store, clock, models, pools, caplog):
    desk = open_desk(store, clock)
    maker = PairMaker(store, {"x": models["x"], "silent": silenced()}, PROMPTS, **OPTIONS)
    pool = PairPool(desk, maker, ahead=1)
    code, listener = join(desk)
    pool.ask(listener, "my secret prompt")
    pools.append(pool)
    with caplog.at_level(logging.WARNING):
        pool.start()
        until(lambda: pool.progress(listener).state == "failed")
        maker.models["silent"] = models["y"]  # it recovers
        until(lambda: desk.open_pairs() == 1)
    assert "a pair could not be made (ValueError" in caplog.text
    assert "secret" not in caplog.text
    pool.ask(listener, "again")
    until(lambda: pool.progress(listener).state == "made")


def test_who_withdraws_meanwhile_leaves_nothing(store, clock, models, pools):
    desk = open_desk(store, clock)
    pool = PairPool(desk, PairMaker(store, models, PROMPTS, **OPTIONS), ahead=1)
    service = ListeningService(desk, pool)
    waiting, (code, listener) = join(desk)[1], join(desk)
    pool.ask(waiting, "first")
    pool.ask(listener, "my secret")
    assert service.answer("withdraw", {"withdrawn": code})["ok"]
    pools.append(pool)
    pool.start()
    until(lambda: desk.open_pairs() == 1)
    assert "my secret" not in prompts_in(store)
    gone = "f" * 64  # withdrew while the pair was being made: the store refuses the pair of somebody who is not there
    pool.ask(gone, "another secret")
    until(lambda: pool.progress(gone).state == "failed")
    assert "another secret" not in prompts_in(store)
    with store.read() as connection:
        kept = set(connection.scalars(select(tables.clips.c.id)))
    assert {path.stem for path in store.clip_folder.glob("*.wav")} == kept


def test_a_study_has_its_pairs_made_once_and_then_ends(store, clock, models, pools):
    desk = open_desk(store, clock, study=True)
    trio = {**models, "silent": silenced()}
    pool = PairPool(desk, PairMaker(store, trio, PROMPTS, **OPTIONS), ahead=1)
    service = ListeningService(desk, pool)
    assert pool.makes_more
    assert not service.settings["typing"]
    pools.append(pool)
    pool.start()
    until(lambda: not pool.makes_more)
    assert prompts_in(store) == PROMPTS  # x against y; the pairs of the silent one are left out
    code, _ = join(desk)
    deal = service.answer("next", {"code": code})["deal"]
    clock.now += 10
    vote = {"code": code, "token": deal["token"], "score_a": 4, "score_b": 2, "seconds_a": 1, "seconds_b": 1}
    assert service.answer("vote", vote)["counted"]
