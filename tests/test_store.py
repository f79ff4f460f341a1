import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyloudnorm
import pytest
import soundfile
import stores
import torch
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, select, text
from stores import RATE, add_pair, tone, votes_in

from musicrl_hf.audio import read_audio
from musicrl_hf.collect.desk import Desk
from musicrl_hf.collect.rules import Answer, Rules
from musicrl_hf.collect.store import DATABASE_FILE, OWNER_FILE, VoteStore
from musicrl_hf.collect.tables import clips, consents, metadata


def test_migrations_make_exactly_the_tables(store):
    with store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert context.get_current_revision() == "0001"


def test_a_store_keeps_its_secrets_and_has_others_than_the_next(place, tmp_path):
    first, again = VoteStore(*place), VoteStore(*place)
    assert (first.salt, first.key) == (again.salt, again.key)
    assert first.salt != first.key
    assert VoteStore(tmp_path / "other").salt != first.salt
    first.close()
    again.close()


def test_processes_that_open_a_new_store_at_once_agree(place):
    opened = []
    threads = [threading.Thread(target=lambda: opened.append(VoteStore(*place))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 6
    assert len({store.salt for store in opened}) == 1
    for store in opened:
        store.close()


def test_a_new_store_waits_for_one_that_is_making_it(tmp_path):
    maker = sqlite3.connect(tmp_path / DATABASE_FILE, isolation_level=None, check_same_thread=False)
    maker.execute("BEGIN IMMEDIATE")  # no write-ahead log yet: to begin one, SQLite itself refuses at once
    timer = threading.Timer(0.5, maker.execute, ["ROLLBACK"])
    timer.start()
    store = VoteStore(tmp_path)
    with store.read() as connection:
        assert connection.scalar(text("PRAGMA journal_mode")) == "wal"
    store.close()
    timer.join()
    maker.close()


def test_a_store_of_a_newer_version_is_refused(place):
    store = VoteStore(*place)
    with store.write() as connection:
        connection.execute(text("update alembic_version set version_num = '9999'"))
    store.close()
    with pytest.raises(ValueError, match="9999.*a newer musicrl_hf wrote it"):
        VoteStore(*place)


@pytest.mark.parametrize(
    ("where", "error", "complaint"),
    [
        ("mysql://me@there/votes", ValueError, "is mysql: give a folder"),
        ("postgresql://me@127.0.0.1/votes", ValueError, "clips is not given"),
        ("://", ValueError, "is no URL"),
    ],
)
def test_other_places_are_refused(where, error, complaint):
    with pytest.raises(error, match=complaint):
        VoteStore(where)


@pytest.mark.parametrize("name", ["a%20b", "votes?", "~ % #"])
def test_a_folder_may_be_called_as_it_likes(name, tmp_path):
    VoteStore(tmp_path / name).close()
    assert (tmp_path / name / DATABASE_FILE).is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    VoteStore("~/votes", "~/sounds").close()
    assert (tmp_path / "votes" / DATABASE_FILE).is_file()
    assert (tmp_path / "sounds").is_dir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds letter.txt"):
        VoteStore("~/docs")


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path):
    with pytest.raises(ConnectionError, match=r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:9/votes was not reached"):
        VoteStore("postgresql://me:secret@127.0.0.1:9/votes", tmp_path)


def test_a_write_that_fails_leaves_nothing(store):
    row = {"id": "c", "text": "t", "licence": "mit"}

    def fail() -> None:
        with store.write() as connection:
            connection.execute(insert(consents).values(row))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with store.read() as connection:
        assert connection.execute(select(consents)).all() == []


def test_clips_are_whole_16_bit_files_of_one_loudness(store):
    for level in (0.9, 0.01):
        clip, seconds = store.save_clip(tone(440, 2.0, level), RATE)
        path = store.clip_file(clip)
        samples, rate = soundfile.read(path)
        assert seconds == 2.0
        assert soundfile.info(path).subtype == "PCM_16"
        assert pyloudnorm.Meter(rate).integrated_loudness(samples) == pytest.approx(-23, abs=0.1)
    assert len(list(store.clip_folder.glob("*.wav"))) == 2


@pytest.mark.parametrize("audio", [torch.zeros(1, RATE), torch.full((1, RATE), float("nan")), torch.zeros(1, 0)])
def test_a_clip_that_nobody_could_use_is_not_kept(store, audio):
    with pytest.raises(ValueError, match="silent|NaN|empty"):
        store.save_clip(audio, RATE)
    assert list(store.clip_folder.glob("*.wav")) == []


def test_nothing_outside_the_clip_folder_is_opened(store, tmp_path):
    (tmp_path / "secret.wav").write_bytes(b"x")
    for name in ("../secret", str(tmp_path / "secret"), "", "A" * 32, "..%2fsecret"):
        with pytest.raises(ValueError, match="is not the id of a clip"):
            store.clip_file(name)
    link = store.clip_folder / f"{'a' * 32}.wav"
    link.symlink_to(tmp_path / "secret.wav")
    with pytest.raises(ValueError, match="leads out of"):
        store.clip_file("a" * 32)
    with pytest.raises(FileNotFoundError):
        store.clip_file("b" * 32)


def test_files_without_rows_go_when_they_are_old(place):
    store = VoteStore(*place)
    old, _ = store.save_clip(tone(300), RATE)
    young, _ = store.save_clip(tone(300), RATE)
    kept, _ = store.save_clip(tone(300), RATE)
    with store.write() as connection:
        connection.execute(insert(clips).values(id=kept, model="x", seed=0, duration_s=1.0))
    for clip in (old, kept):
        os.utime(store.clip_file(clip), (0, time.time() - 4000))
    store.close()
    VoteStore(*place).close()
    assert {path.stem for path in store.clip_folder.glob("*.wav")} == {young, kept}


def make_old(folder):
    for path in folder.iterdir():
        os.utime(path, (0, time.time() - 4000))


def test_files_that_are_no_clips_of_a_store_stay(tmp_path):
    """A folder of one's own may be the clip folder: only what is named as a clip can be one without its row."""
    mine = tmp_path / "music"
    mine.mkdir()
    for name in ("my song.wav", "A" * 32 + ".wav", "0" * 31 + ".wav"):
        (mine / name).write_bytes(b"x")
    make_old(mine)
    before = {path.name for path in mine.iterdir()}
    VoteStore(tmp_path / "store", mine).close()
    VoteStore(tmp_path / "store", mine).close()
    assert {path.name for path in mine.glob("*.wav")} == before


def test_reading_a_store_removes_nothing(place):
    store = VoteStore(*place)
    orphan, _ = store.save_clip(tone(300), RATE)
    make_old(store.clip_folder)
    store.close()
    VoteStore(*place, create=False).close()
    assert store.clip_file(orphan).is_file()


def test_the_clips_of_another_collection_are_refused_and_stay(place, tmp_path):
    store = VoteStore(*place)
    add_pair(store, "jazz")
    make_old(store.clip_folder)
    before = {path: path.read_bytes() for path in store.clip_folder.iterdir()}
    store.close()
    VoteStore(tmp_path / "other").close()
    refused = [
        (f"sqlite:///{tmp_path}/new.db", True),
        (str(tmp_path / "other"), True),
        (str(tmp_path / "other"), False),
    ]
    for where, create in refused:
        with pytest.raises(ValueError, match="`clips` is .*clips, which holds the clips of another collection: give a"):
            VoteStore(where, store.clip_folder, create=create)
    assert not (tmp_path / "new.db").exists()
    (store.clip_folder / OWNER_FILE).unlink()  # as a version without marks left it
    with pytest.raises(ValueError, match="clips of another collection"):
        VoteStore(tmp_path / "other", store.clip_folder)
    VoteStore(*place).close()  # its own
    assert {path: path.read_bytes() for path in store.clip_folder.iterdir()} == before
    assert store.salt not in (store.clip_folder / OWNER_FILE).read_text()


def test_no_acknowledged_vote_is_lost_when_the_process_is_killed(place):
    """50 listeners vote at once in a process that is killed (-9), time and again; another makes pairs meanwhile."""
    store = VoteStore(*place)
    wait = random.Random(0)
    acknowledged: list[list[str]] = []
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "voting_process.py"), place[0], str(place[1] or "")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "begins\n"
        acknowledged += [process.stdout.readline().split() for _ in range(wait.randint(5, 40))]
        time.sleep(wait.uniform(0, 0.05))
        process.kill()
        lines = process.stdout.read().split("\n")[:-1]  # what the last, cut line said was never read
        process.wait()
        assert process.returncode == -9
        acknowledged += [line.split() for line in lines]

    kept = {row.deal: row for row in votes_in(store)}
    assert all(token.partition(".")[0] in kept for _, token in acknowledged)
    assert len({(row.listener, row.pair) for row in kept.values()}) == len(kept)
    with store.read() as connection:
        ids = connection.scalars(select(clips.c.id)).all()
    for clip in ids:
        assert read_audio(store.clip_file(clip))[0].shape == (1, RATE)
    # sent again, as a page does that got no answer
    desk = Desk(store, Rules(min_seconds=0, votes_per_minute=1000))
    assert [desk.vote(who, token, Answer("b", 1, 1)) for who, token in acknowledged[:20]] == [False] * 20
    assert len(votes_in(store)) == len(kept)
    store.close()


def test_the_kinds_of_store_that_are_tested_are_known():
    assert stores.KINDS[0] == "sqlite"
    assert set(stores.KINDS) <= {"sqlite", "postgresql"}
