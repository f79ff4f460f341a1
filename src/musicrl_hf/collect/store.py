"""The store of votes: SQLite in a folder, or PostgreSQL for more than one machine, and the folder of the clips.

A write is durable when its transaction ends: SQLite keeps a write-ahead log that is synced at each commit, PostgreSQL does
the same. Tables are brought up to date by Alembic (`migrations/`) when a store is opened.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, NullPool, create_engine, event, insert, inspect, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError
from torch import Tensor

from ..audio import atomic_path, audio_bytes, match_loudness, read_audio
from ..preferences.schema import clip_path
from .tables import clips, settings

logger = logging.getLogger(__name__)

DATABASE_FILE = "votes.db"
CLIP_FOLDER = "clips"
OWNER_FILE = ".collection"  # in the clip folder: the id of the collection whose clips lie there
LAST_WITHDRAWAL = "withdrawal"  # setting: an id that says nothing but that somebody withdrew since the one before
_MIGRATIONS = Path(__file__).parent / "migrations"
_LOCK = 7_064_311  # PostgreSQL's advisory lock: any number that is ours
_CLIP_ID = re.compile("[0-9a-f]{32}")
_BUSY_S = 30.0  # how long one who would write waits for another
_ORPHAN_AGE_S = 3600.0  # a clip file without a row is one that is being written, or that nobody will ask for


class VoteStore:
    """Votes, deals, pairs and clips.

    Args:
        where: a folder, which holds `votes.db` and `clips/`; or a URL, "sqlite:///FILE" or "postgresql://USER@HOST/NAME".
        clip_folder: where the clips lie; needed with PostgreSQL, where all machines have to see the same folder.
        create: make the store where there is none; False refuses, and leaves nothing behind.

    Raises:
        ValueError: a URL of another kind, no `clip_folder` where it is needed, a file or database of something else, or a
            store written by a newer version, or a clip folder of another collection.
        FileNotFoundError: `create` is False and there is no such store, or no folder of its clips.
        ConnectionError: the database was not reached.
    """

    def __init__(self, where: str | Path, clip_folder: str | Path | None = None, *, create: bool = True):
        self.url, self.clip_folder = _locate(str(where), clip_folder)
        self.name = repr(make_url(self.url)) if "://" in str(where) else str(where)  # as it was given, less a password
        if create:
            _check_new(Path(where).expanduser(), self.name)
            _check_unowned(self.url, self.clip_folder)
        else:
            _check_there(self.url, self.clip_folder)
        self.engine = _engine(self.url)
        # SQLite has one writer at a time and lets the others poll; a lock of our own has them wait in turn.
        self._writer = threading.Lock() if self.is_sqlite else nullcontext()
        with _explained(self.name):
            self._migrate()
        self.clip_folder.mkdir(parents=True, exist_ok=True)
        self.salt, self.key = self._secret("salt"), self._secret("key")
        self.admin_token = self._secret("admin")  # lets whoever runs the page fetch an export from it
        self._own_clips(create)
        if create:
            self._remove_orphans()

    @property
    def is_sqlite(self) -> bool:
        """Whether this is the embedded store."""
        return self.engine.dialect.name == "sqlite"

    @property
    def collection(self) -> str:
        """Id of the collection, 32 hexadecimal digits: public, and it does not tell the salt."""
        return hmac.new(self.salt.encode(), b"collection", hashlib.sha256).hexdigest()[:32]

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads, and sees one state of the store throughout."""
        with self.engine.connect().execution_options(musicrl_read=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def write(self, exclusive: bool = False) -> Iterator[Connection]:
        """A transaction; what it wrote is durable when the block ends, and gone if it raises.

        Args:
            exclusive: no other exclusive transaction runs beside it, on any machine.
        """
        with self._writer, self.engine.begin() as connection:
            if exclusive and not self.is_sqlite:
                connection.execute(text("select pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            yield connection

    def forget(self) -> None:
        """Have what was deleted vanish from the disk: SQLite's write-ahead log keeps what the database file held before."""
        if not self.is_sqlite:
            return
        with self._writer, closing(self.engine.raw_connection()) as connection:
            busy, *_ = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            logger.warning("%s is read all the time: what was withdrawn stays in its log until it is closed", self.name)

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()

    # -- clips -----------------------------------------------------------------------------------------------------

    def save_clip(self, audio: Tensor, sampling_rate: int) -> tuple[str, float]:
        """Write a clip [C, T] at -23 LUFS as 16-bit WAV, whole or not at all; its row is written with its pair's.

        Returns:
            its id and its length in seconds.

        Raises:
            ValueError: a clip that nobody could use: silent, empty, NaN or over 30 s.
        """
        data = audio_bytes(match_loudness(audio.detach().float().cpu(), sampling_rate), sampling_rate, "wav")
        read_audio(data)
        clip = uuid.uuid4().hex
        with atomic_path(self.clip_folder / f"{clip}.wav") as temporary, open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return clip, audio.shape[-1] / sampling_rate

    def clip_file(self, clip: str) -> Path:
        """The file of a clip.

        Raises:
            ValueError: not the id of a clip: nothing outside the clip folder is ever opened.
            FileNotFoundError: the file is gone.
        """
        if not _CLIP_ID.fullmatch(clip):
            raise ValueError(f"clip {clip!r} is not the id of a clip: ids have 32 hexadecimal digits")
        return clip_path(self.clip_folder, f"{clip}.wav")

    def remove_clips(self, ids: list[str]) -> None:
        """Delete the files of clips whose rows are gone."""
        for clip in ids:
            (self.clip_folder / f"{clip}.wav").unlink(missing_ok=True)

    # -- opening ---------------------------------------------------------------------------------------------------

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        with self.write(exclusive=True) as connection:
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise ValueError(
                    f"store {self.name} cannot be brought up to date ({error}): a newer musicrl_hf wrote it; "
                    "install that one."
                ) from error

    def _secret(self, name: str) -> str:
        """A secret of this store, made when it is first asked for."""
        with self.write(exclusive=True) as connection:
            known = connection.scalar(select(settings.c.value).where(settings.c.name == name))
            if known is None:
                known = secrets.token_hex(32)
                connection.execute(insert(settings).values(name=name, value=known))
            return known

    def _own_clips(self, mark: bool) -> None:
        """Refuse a folder of another collection's clips, and mark it as this one's where it has no mark yet."""
        with self.write(exclusive=True) as connection:
            owner = _owner_of(self.clip_folder)
            if owner is None:  # new, or as an earlier version left it: then some of the clips have rows here
                there, known = self._clip_files().keys(), connection.scalars(select(clips.c.id))
                owned = not there or not there.isdisjoint(known)
                if owned and mark:
                    with atomic_path(self.clip_folder / OWNER_FILE) as temporary:
                        temporary.write_text(f"{self.collection}\n", encoding="utf-8")
            else:
                owned = owner == self.collection
        if not owned:
            raise ValueError(_foreign_clips(self.clip_folder))

    def _clip_files(self) -> dict[str, Path]:
        """Id -> file of what is named as this package names clips; other files in the folder are somebody else's."""
        return {path.stem: path for path in self.clip_folder.glob("*.wav") if _CLIP_ID.fullmatch(path.stem)}

    def _remove_orphans(self) -> None:
        """Delete clips that a killed process wrote without their rows."""
        there = self._clip_files()
        with self.read() as connection:
            known = set(connection.scalars(select(clips.c.id)))
        before = time.time() - _ORPHAN_AGE_S
        for clip, path in there.items():
            with suppress(FileNotFoundError):  # another process removes them too
                if clip not in known and path.stat().st_mtime < before:
                    path.unlink()


def _locate(where: str, clip_folder: str | Path | None) -> tuple[str, Path]:
    if "://" not in where:
        folder = Path(where).expanduser()
        # Not put together as text: a folder's name may hold what a URL would read.
        address = URL.create("sqlite", database=str(folder / DATABASE_FILE)).render_as_string()
        return address, Path(clip_folder or folder / CLIP_FOLDER).expanduser()
    try:
        url = make_url(where)
    except ArgumentError as error:
        raise ValueError(
            f"store {where!r} is no URL ({error}): give a folder or postgresql://USER@HOST/NAME"
        ) from error
    kind = url.get_backend_name()
    if kind == "sqlite" and url.database:
        return where, Path(clip_folder or Path(url.database).parent / CLIP_FOLDER).expanduser()
    if kind != "postgresql":
        raise ValueError(f"store {where!r} is {kind}: give a folder, sqlite:///FILE or postgresql://USER@HOST/NAME")
    if clip_folder is None:
        raise ValueError("clips is not given: with PostgreSQL, name a folder that all machines see")
    address = url.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    return address, Path(clip_folder).expanduser()


def _check_new(folder: Path, name: str) -> None:
    """Refuse a folder of something else: what lies beside a store is easily taken for a part of it, and the store for theirs."""
    # Looked at once: another process may be making the store, whose database comes with files beside it.
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(each for each in names - {CLIP_FOLDER} if not each.startswith(DATABASE_FILE))
    if others and DATABASE_FILE not in names:
        raise ValueError(
            f"store {name} is a folder that holds {others[0]}: give a new folder, or that of an earlier collection"
        )


def _owner_of(clip_folder: Path) -> str | None:
    """The id of the collection that marked a clip folder; None where none did."""
    try:
        return (clip_folder / OWNER_FILE).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def _foreign_clips(clip_folder: Path) -> str:
    return f"`clips` is {clip_folder}, which holds the clips of another collection: give a folder of its own"


def _check_unowned(url: str, clip_folder: Path) -> None:
    """Refuse to make a new SQLite store on the clips of another, before there is a file of it."""
    owned, place = _owner_of(clip_folder) is not None, make_url(url)  # a store marks its clips after it has its file
    if owned and place.get_backend_name() == "sqlite" and not Path(place.database or "").exists():
        raise ValueError(_foreign_clips(clip_folder))


def _check_there(url: str, clip_folder: Path) -> None:
    """Refuse a place without a store, by a connection of its own that changes nothing there."""
    place, remedy = make_url(url), "give the --store, and the --clips, of `musicrl collect`."
    if place.get_backend_name() == "sqlite" and not Path(place.database or "").is_file():
        raise FileNotFoundError(f"`store`: there is no file {place.database}; {remedy}")
    with _explained(repr(place)):
        if not inspect(create_engine(url, poolclass=NullPool)).has_table(settings.name):
            raise ValueError(f"`store` is {place!r}, a database that holds no votes of a listening page; {remedy}")
    if not clip_folder.is_dir():
        raise FileNotFoundError(f"`clips`: there is no folder {clip_folder}; {remedy}")


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What a database says when it is opened, as errors that name the store and hide its password."""
    try:
        yield
    except DatabaseError as error:
        told = str(error.orig).strip().splitlines()[0]
        if isinstance(error, OperationalError):
            raise ConnectionError(
                f"store {name} was not reached ({told}): check the URL, and that the database is running."
            ) from error
        raise ValueError(
            f"store {name} cannot be read ({told}): give one of `musicrl collect`, or a new one."
        ) from error


def _engine(url: str) -> Engine:
    if not url.startswith("sqlite"):
        return create_engine(url, pool_size=16, max_overflow=16, pool_pre_ping=True)
    Path(make_url(url).database or "").parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, pool_size=16, max_overflow=64)

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # transactions begin where we say so, not where the driver guesses
        # What is deleted is overwritten: after `VoteStore.forget`, what was withdrawn is nowhere in the files.
        pragmas = (
            f"busy_timeout = {round(_BUSY_S * 1000)}",
            "synchronous = FULL",
            "foreign_keys = ON",
            "secure_delete = ON",
        )
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
        _keep_log(connection)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that began by reading cannot always become a writing one: writers say so at once.
        reads = connection.get_execution_options().get("musicrl_read", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def _keep_log(connection: sqlite3.Connection) -> None:
    """Have a database keep a write-ahead log, waiting for others that open it: here SQLite heeds no `busy_timeout`."""
    give_up = time.monotonic() + _BUSY_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY  # whatever the reason, which stands above
            if not busy or time.monotonic() > give_up:
                raise
            time.sleep(0.01)
