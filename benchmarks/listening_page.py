"""How many votes a second does the listening page take, and how long do listeners wait?

    python benchmarks/listening_page.py                                    # SQLite
    .ci/postgresql python benchmarks/listening_page.py --postgresql        # a PostgreSQL server of its own

Listeners ask over HTTP on loopback what a browser would: page, consent, pair, two clips, vote. First all of them vote as fast as
they get answers (`flood`), then at the pace of people who listen (`paced`). The server is a process of its own; the listeners
share its processor, so that what is measured is a lower bound. Prints JSON: votes a second, and for each question the median and
the 95th percentile of the seconds until the answer was there.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import torch
from sqlalchemy import create_engine, insert, text
from sqlalchemy.engine import make_url

from musicrl_hf.collect.desk import Desk
from musicrl_hf.collect.leaderboard import Leaderboard
from musicrl_hf.collect.rules import Rules
from musicrl_hf.collect.server import serve
from musicrl_hf.collect.service import ListeningService
from musicrl_hf.collect.store import VoteStore
from musicrl_hf.collect.tables import clips, pairs

RATE = 32_000  # Hz
CLIP_S = 5.0


class Listener:
    """One browser's worth of questions, and the seconds that each took."""

    def __init__(self, client: httpx.AsyncClient, component: int, times: dict[str, list[float]]):
        self.client, self.component, self.times = client, component, times
        self.session, self.code = uuid.uuid4().hex, ""
        self.votes = 0

    async def timed(self, name: str, method: str, path: str, **options) -> httpx.Response:
        started = time.perf_counter()
        answer = await self.client.request(method, path, **options)
        self.times.setdefault(name, []).append(time.perf_counter() - started)
        answer.raise_for_status()
        return answer

    async def ask(self, question: str, **data) -> dict:
        body = {"session_hash": self.session, "component_id": self.component, "fn_name": question, "data": data}
        answer = (await self.timed(question, "POST", "gradio_api/component_server", json=body)).json()
        if not answer["ok"]:
            raise RuntimeError(f"{question}: {answer['error']}")
        return answer

    async def listen(self, consent: str, end: float, pause_s: float) -> None:
        if not self.code:
            await self.timed("page", "GET", "")
            self.code = (await self.ask("consent", consent_id=consent))["code"]
        while time.monotonic() < end:
            deal = (await self.ask("next", code=self.code))["deal"]
            if deal is None:
                raise RuntimeError("the pairs ran out: give more --pairs")
            await asyncio.gather(*(self.timed("clip", "GET", f"clip/{deal['clip_token']}/{side}") for side in "ab"))
            await asyncio.sleep(random.uniform(0.5, 1.5) * pause_s)
            await self.ask("vote", code=self.code, token=deal["token"], preference="a", seconds_a=5.0, seconds_b=5.0)
            self.votes += 1


def cpu_seconds(process: int) -> float:
    """What a process has used of a processor, in seconds (Linux)."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(address: str, server: int, listeners: int, seconds: float, pause_s: float) -> dict:
    """All listeners for some seconds."""
    before = cpu_seconds(server)
    times: dict[str, list[float]] = {}
    # A connection is let go of before the server does: where both wait 5 s, a question may meet a closed one.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60, trust_env=False) as client:
        config = (await client.get("config")).json()
        (part,) = (part for part in config["components"] if part["type"] == "html")
        crowd = [Listener(client, part["id"], times) for _ in range(listeners)]
        started = time.monotonic()
        consent = part["props"]["props"]["settings"]["consent_id"]
        await asyncio.gather(*(one.listen(consent, started + seconds, pause_s) for one in crowd))
        took = time.monotonic() - started
    votes = sum(one.votes for one in crowd)
    used = cpu_seconds(server) - before
    waits = {
        name: {
            "asked": len(own),
            "median_s": round(float(np.median(own)), 4),
            "p95_s": round(float(np.quantile(own, 0.95)), 4),
        }
        for name, own in times.items()
    }
    return {
        "votes": votes,
        "seconds": round(took, 1),
        "votes_per_second": round(votes / took, 1),
        "server_cpu_s_per_vote": round(used / votes, 4),
        "waits": waits,
    }


def fill(store: VoteStore, number: int) -> None:
    """Pairs of noise: the files of a few clips, with many rows."""
    noise = torch.Generator().manual_seed(0)
    with store.write() as connection:
        for n in range(number):
            rows = []
            for model in ("x", "y"):
                clip, seconds = store.save_clip(torch.randn(1, int(RATE * CLIP_S), generator=noise) / 10, RATE)
                rows.append({"id": clip, "model": model, "seed": n, "duration_s": seconds})
            connection.execute(insert(clips), rows)
            row = {
                "id": uuid.uuid4().hex,
                "kind": "pair",
                "prompt": f"prompt {n}",
                "owner": None,
                "made_at": n,
                "live": 0,
            }
            connection.execute(insert(pairs).values(**row, first=rows[0]["id"], second=rows[1]["id"]))


def serve_pairs(where: str, clip_folder: str, number: int) -> None:
    """The server's process."""
    torch.set_num_threads(1)
    store = VoteStore(where, clip_folder)
    fill(store, number)
    generous = {"votes_per_minute": 10**6, "votes_per_day": 10**6, "joins_per_hour": 10**6}
    desk = Desk(store, Rules(min_seconds=0, check_every=0, raters=10**6, **generous))
    serve(ListeningService(desk, None, Leaderboard(store)), port=0, ready=lambda address: print(address, flush=True))


@contextmanager
def place(postgresql: bool, folder: Path) -> Iterator[str]:
    """A fresh store: a folder, or a database on the server that `.ci/postgresql` started."""
    if not postgresql:
        yield str(folder / "store")
        return
    server = make_url(os.environ["MUSICRL_TEST_POSTGRESQL"])
    engine = create_engine(server.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    name = f"load_{uuid.uuid4().hex}"
    with engine.connect() as connection:
        connection.execute(text(f"create database {name}"))
    try:
        yield server.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.execute(text(f"drop database {name} with (force)"))
        engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description="Votes a second of the listening page.")
    parser.add_argument("--listeners", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the two parts")
    parser.add_argument("--pause_s", type=float, default=10.0, help="that people listen before they vote, on average")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--postgresql", action="store_true", help="where MUSICRL_TEST_POSTGRESQL says; else SQLite")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve_pairs(*given.serve, given.pairs)
        return

    with tempfile.TemporaryDirectory() as scratch, place(given.postgresql, Path(scratch)) as where:
        command = [sys.executable, __file__, "--serve", where, f"{scratch}/clips", "--pairs", str(given.pairs)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            parts = {"flood": 0.0, "paced": given.pause_s}
            result = {
                name: asyncio.run(measure(address, server.pid, given.listeners, given.seconds, pause_s))
                for name, pause_s in parts.items()
            }
        finally:
            server.terminate()
            server.wait()
    about = {
        "store": "PostgreSQL" if given.postgresql else "SQLite",
        "listeners": given.listeners,
        "clip_s": CLIP_S,
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": [
            round(number, 1) for number in os.getloadavg()
        ],  # of all processes of the machine: 1, 5 and 15 minutes
    }
    print(json.dumps(about | result, indent=1))


if __name__ == "__main__":
    main()
