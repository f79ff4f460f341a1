"""Stores to test on, SQLite always and PostgreSQL where MUSICRL_TEST_POSTGRESQL names a server, and pairs in them."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch
from sqlalchemy import create_engine, insert, select, text
from sqlalchemy.engine import make_url

from musicrl_hf.collect.desk import Desk
from musicrl_hf.collect.rules import Answer, Rules
from musicrl_hf.collect.store import VoteStore
from musicrl_hf.collect.tables import clips, pairs, votes

SERVER = os.environ.get("MUSICRL_TEST_POSTGRESQL")
KINDS = ["sqlite", *(["postgresql"] if SERVER else [])]
RATE = 8000  # Hz
_MOMENTS = count()  # pairs are made one after the other


@contextmanager
def place_for_store(kind: str, folder: Path) -> Iterator[tuple[str, Path | None]]:
    """What `VoteStore` takes: a folder, or a fresh database on the server and a folder for clips."""
    if kind == "sqlite":
        yield str(folder / "store"), None
        return
    server = make_url(SERVER).set(drivername="postgresql+psycopg")
    name = f"test_{uuid.uuid4().hex}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"create database {name}"))
    try:
        yield make_url(SERVER).set(database=name).render_as_string(hide_password=False), folder / "clips"
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"drop database {name} with (force)"))
        engine.dispose()


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def tone(hertz: float, seconds: float = 1.0, level: float = 0.3) -> torch.Tensor:
    return level * torch.sin(torch.arange(int(seconds * RATE)) * 2 * torch.pi * hertz / RATE)[None]


def add_pair(store: VoteStore, prompt: str, models=("x", "y"), kind: str = "pair", owner: str | None = None) -> str:
    """A pair of two tones, 300 and 400 Hz; of an identical one both are the first."""
    rows = []
    for number, model in enumerate(models):
        clip, duration = store.save_clip(tone(300 + (100 * number if kind != "identical" else 0)), RATE)
        rows.append({"id": clip, "model": model, "seed": number + 7, "duration_s": duration})
    pair = uuid.uuid4().hex
    with store.write() as connection:
        connection.execute(insert(clips), rows)
        row = {"id": pair, "kind": kind, "prompt": prompt, "first": rows[0]["id"], "second": rows[1]["id"]}
        connection.execute(insert(pairs).values(row | {"owner": owner, "made_at": next(_MOMENTS) / 1000, "live": 0}))
    return pair


def open_desk(store: VoteStore, clock: Clock, **rules) -> Desk:
    return Desk(store, Rules(**{"min_seconds": 1.0, "check_every": 0, **rules}), clock)


def join(desk: Desk) -> tuple[str, str]:
    """Somebody new: their private code and who they are in the store."""
    code = desk.consent(desk.rules.consent_id)
    return code, desk.listener_of(code)


def hear_and_vote(desk: Desk, clock: Clock, listener: str, preference: str = "a") -> str:
    """Vote on what is dealt, after a while; gives back the token."""
    deal = desk.deal(listener)
    clock.now += 10
    assert desk.vote(listener, deal.token, Answer(preference, 1.0, 1.0))
    return deal.token


def votes_in(store: VoteStore) -> list:
    with store.read() as connection:
        return list(connection.execute(select(votes).order_by(votes.c.voted_at)))
