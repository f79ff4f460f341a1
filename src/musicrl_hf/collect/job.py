"""`musicrl collect` and `musicrl export`: their fields, and what runs them."""

import json
import re
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..audio import MAX_DURATION_S
from ..bundled import is_repo_id
from ..preferences.schema import read_prompts
from ..sampling import check_sampling
from . import require_extra
from .rules import Rules, rule

if TYPE_CHECKING:
    from socket import socket

    from ..generator import MusicRLForConditionalGeneration
    from .desk import Desk
    from .export import ExportResult
    from .maker import PairMaker
    from .publishing import Publisher
    from .store import VoteStore

BUNDLED_PROMPTS = Path(__file__).parent.parent / "prompts" / "train.txt"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds
_LEAST_S = 10
_STORE_HELP = "folder of the votes and clips, or postgresql://USER@HOST/NAME"
_CLIPS_HELP = "folder of the clips, where the store is a URL; with PostgreSQL one that all machines see"


@dataclass(frozen=True, kw_only=True)
class CollectJob(Rules):
    """What `musicrl collect` takes: generators, prompts, a store, how the page is served, and the rules for listeners."""

    model: str = rule("musicrl-tiny", "generator: bundled name, folder or Hub id; or label=name")
    against: list[str] = field(
        default_factory=list,
        metadata={"help": "further generators, every two of which meet; without any, one meets itself"},
    )
    prompts: str | None = rule(None, "text file, one prompt a line; without one, the bundled prompts")
    store: str = rule("collected", _STORE_HELP)
    clips: str | None = rule(None, _CLIPS_HELP)
    host: str = rule("127.0.0.1", "address that the page is served on; 0.0.0.0 lets others in")
    port: int = rule(7860, "port of the page")
    hostnames: list[str] = field(
        default_factory=list,
        metadata={
            "help": "names that the page is opened by, such as music.example.org, where a web server is before it"
        },
    )
    ahead: int = rule(8, "pairs that the page has ready, made while others listen")
    leaderboard: bool = rule(True, "show the ranking of the generators on the page")
    every: str | None = rule(None, "export again and again while the page runs: 10m, 2h or 1d")
    out: str | None = rule(None, "folder for these exports")
    push: str | None = rule(None, "Hub id to publish them under")
    private: bool = rule(False, "make a new data set on the Hub visible to you alone")
    simulate: int = rule(0, "open no page, but have so many simulated listeners vote, to rehearse")
    pairs: int = rule(0, "pairs to have ready before simulated listeners vote; 0 for one a prompt")
    duration_s: float = rule(5.0, "seconds a clip")
    temperature: float = rule(1.0, "of sampling")
    top_k: int | None = rule(250, "likeliest codes to sample from; none for all")
    guidance_scale: float | None = rule(
        None, "classifier-free guidance, 1 is no guidance; none for each model's own, mostly 3"
    )
    device: str | None = rule(None, "cpu, cuda, mps ...; none for the accelerator that there is, else the CPU")
    dtype: str = rule("float32", "of the generators: float32, bfloat16 or float16")
    seed: int | None = rule(None, "makes pairs and simulated listeners reproducible; empty draws one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.duration_s <= MAX_DURATION_S:
            raise ValueError(f"`duration_s` must be in (0, {MAX_DURATION_S:g}] seconds, got {self.duration_s!r}.")
        check_sampling(self.temperature, self.top_k, self.guidance_scale, frames=1)
        numbers = {"simulate": (self.simulate, 0), "pairs": (self.pairs, 0), "ahead": (self.ahead, 1)}
        for name, (number, least) in numbers.items():
            if number < least:
                raise ValueError(f"`{name}` is {number}: it has to be {least} or more.")
        if not 0 <= self.port < 65536:
            raise ValueError(f"`port` is {self.port}: ports are 1 to 65535, and 0 takes a free one.")
        for name in self.hostnames:
            if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
                raise ValueError(f"`hostnames` has {name!r}: give names alone, such as music.example.org.")
        if self.study and self.pairs:
            raise ValueError(f"`pairs` is {self.pairs}, but a study has fixed pairs: leave it out.")
        if self.study and not self.against:
            raise ValueError("`study` compares two generators or more: give --against.")
        if self.every is not None:
            seconds_of(self.every)
        if (self.every is None) != (self.out is None) or (self.push is not None and self.every is None):
            raise ValueError(
                f"`every` is {self.every} and `out` {self.out}: to export while the page runs, give both, and --push to publish."
            )
        if self.push is not None and not is_repo_id(self.push):
            raise ValueError(f'`push` is {self.push!r}: give a name on the Hub, "namespace/name".')
        if self.simulate and self.every:
            raise ValueError(f"`every` is {self.every}, but `simulate` opens no page: run `musicrl export` afterwards.")

    @property
    def rules(self) -> Rules:
        """The rules alone."""
        return Rules(**{rule.name: getattr(self, rule.name) for rule in fields(Rules)})


@dataclass(kw_only=True)
class ExportJob:
    """What `musicrl export` takes: a store, and where its votes go."""

    store: str = rule("collected", _STORE_HELP)
    clips: str | None = rule(None, _CLIPS_HELP)
    out: str = field(metadata={"help": "folder for the data set, new or an earlier export"})
    push: str | None = rule(None, "Hub id to publish it under")
    private: bool = rule(False, "make a new data set on the Hub visible to you alone")
    licence: str | None = rule(None, "take the votes given under this one, where listeners agreed to several")
    test_share: float = rule(0.1, "share of the prompts that is held out; 0 for no split")
    seed: int = rule(0, "of the split")


def run_collect(job: CollectJob) -> str:
    """Open the listening page until it is interrupted; or make pairs and have simulated listeners vote on them.

    Returns:
        what was done, in words.

    Raises:
        ImportError: the extra is not installed.
        OSError: the port is taken.
        PermissionError, ConnectionError: `push`, and the Hub does not accept the token or was not reached.
        ValueError, FileNotFoundError: no such model or prompts, or models that make no pair; no store is made then. `every`
            where the votes of the store are under another licence, or `out` or `push` hold another collection's. A label under
            which the store has clips of other weights.
    """
    require_extra()
    from ..hub import check_sign_in
    from .labels import check_labels
    from .ownership import check_out
    from .server import listen
    from .store import VoteStore

    # Whatever keeps the page from opening is met before a store is made.
    prompts = read_prompts(job.prompts or BUNDLED_PROMPTS)
    names = _find_models(job)
    if job.out is not None:
        check_out(job.out)
    if job.push is not None:
        check_sign_in(job.push)
    with nullcontext() if job.simulate else listen(job.host, job.port) as listening:
        models = _load_models(job, names)
        store = VoteStore(job.store, job.clips)
        try:
            check_labels(store, names)
            desk, maker = _prepare(job, store, models, prompts)
            return _simulate(job, desk, maker) if listening is None else _open_page(job, desk, maker, listening)
        finally:
            store.close()


def _prepare(
    job: CollectJob, store: "VoteStore", models: dict[str, "MusicRLForConditionalGeneration"], prompts: list[str]
) -> tuple["Desk", "PairMaker"]:
    from .desk import Desk
    from .maker import PairMaker

    if job.every is not None:
        _check_exports(job, store)
    if (there := _contents(job, store)) is not None:
        print(there, flush=True)
    desk = Desk(store, job.rules, seed=job.seed)
    maker = PairMaker(
        store,
        models,
        prompts,
        duration_s=job.duration_s,
        temperature=job.temperature,
        top_k=job.top_k,
        guidance_scale=job.guidance_scale,
        seed=job.seed,
        check_every=job.check_every,
    )
    return desk, maker


def _contents(job: CollectJob, store: "VoteStore") -> str | None:
    """What the store holds that this collection adds to; None where that is nothing."""
    from sqlalchemy import func, select

    from ..preferences.listeners import is_simulated
    from .tables import clips, pairs, settings, votes

    alone = select(func.count()).where(pairs.c.kind == "pair", pairs.c.owner.is_(None), pairs.c.live == 0)
    with store.read() as connection:
        waiting = connection.scalar(alone)
        given = connection.execute(select(votes.c.listener, func.count()).group_by(votes.c.listener)).all()
        models = connection.scalars(select(clips.c.model).distinct().order_by(clips.c.model)).all()
        before = connection.scalar(select(settings.c.value).where(settings.c.name == "rules"))
    unheard = (
        f" Pairs of clips of {', '.join(models)} that nobody has heard are dealt first, {waiting} of them: for other prompts, models or "
        "lengths give another --store."
        if waiting
        else ""
    )
    if not given:
        return f"The store {store.name} holds no vote yet.{unheard}" if waiting else None
    simulated = sum(count for listener, count in given if is_simulated(listener))
    total = sum(count for _, count in given)
    now, then = json.loads(json.dumps(asdict(job.rules))), json.loads(before or "{}")
    changed = [name for name in now if then.get(name) != now[name]]
    rules = f"; other {', '.join(changed)} than then" if changed else ""
    return f"The store {store.name} holds {total} votes already, {simulated} of them simulated, on clips of {', '.join(models)}{rules}.{unheard}"


def _check_exports(job: CollectJob, store: "VoteStore") -> None:
    """Refuse exports in turn that would write over another collection's, or of votes that no one data set can hold."""
    from .export import licences_of
    from .ownership import check_out, check_push

    if job.out is not None:
        check_out(job.out, store.collection)
    if job.push is not None:
        check_push(job.push, store.collection)
    there = licences_of(store)
    if set(there) - {job.licence}:
        raise ValueError(
            f"`every` is {job.every}, but the store {store.name} holds votes under {', '.join(there)}, and this page asks for "
            f"{job.licence}: a data set has one licence. Give a --store of its own, or leave --every out and export each with "
            "`musicrl export --licence`."
        )


def _simulate(job: CollectJob, desk: "Desk", maker: "PairMaker") -> str:
    """Make pairs, and have simulated listeners vote on them."""
    from ..preferences.listeners import simulated_listeners
    from .simulate import enrol, simulate

    listeners = simulated_listeners(job.simulate, job.seed or 0)
    enrol(desk, listeners)  # refused before pairs are made
    _make_pairs(job, desk.open_pairs(), maker)
    given = simulate(desk, listeners)
    told = f"{given.total()} votes of {len(given)} simulated listeners to {desk.store.name}"
    if len(given) < job.simulate:
        told += (
            f"; nothing was left for {job.simulate - len(given)} of the {job.simulate}: `raters` is {job.raters} listeners "
            "a pair, so give a larger --raters, or more pairs (--pairs; in a study --prompts)"
        )
    return told


def _open_page(job: CollectJob, desk: "Desk", maker: "PairMaker", listening: "socket") -> str:
    """Serve the page, with what makes its pairs and what exports its votes beside it."""
    import signal

    from sqlalchemy import select

    from .leaderboard import Leaderboard
    from .pool import PairPool
    from .server import serve_on
    from .service import ListeningService
    from .tables import votes

    store, publisher = desk.store, _publisher(job, desk.store)
    pool = PairPool(desk, maker, ahead=job.ahead)
    service = ListeningService(desk, pool, Leaderboard(store) if job.leaderboard else None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl+C does
    try:
        pool.start()
        if publisher is not None:
            publisher.start()
        with suppress(KeyboardInterrupt):  # raised or not, as the event loop has it
            serve_on(listening, service, job.host, job.hostnames, ready=partial(_announce, store.admin_token))
        print("Closing the page.", flush=True)
    finally:
        pool.stop()
        if publisher is not None:
            publisher.stop()
    with store.read() as connection:
        if connection.scalar(select(votes.c.deal).limit(1)) is None:
            return f"nothing but pairs to {store.name}: nobody has voted yet"
    return f"the votes to {store.name}; `musicrl export` makes a data set of them"


def _publisher(job: CollectJob, store: "VoteStore") -> "Publisher | None":
    from .export import export_votes, publish
    from .publishing import Publisher

    if job.every is None or job.out is None:
        return None
    if job.push is None:
        work = partial(export_votes, store, job.out)
    else:
        work = partial(publish, store, job.out, job.push, private=job.private or None)
    return Publisher(store, seconds_of(job.every), lambda: print(f"Exported {work()}", flush=True))


def _announce(admin_token: str, address: str) -> None:
    print(f"Listening page: {address}", flush=True)
    print(
        f'Export, for you alone: curl --fail -H "Authorization: Bearer {admin_token}" -o votes.zip {address}export',
        flush=True,
    )


def run_export(job: ExportJob) -> "ExportResult":
    """Export the votes, and publish them where `push` names a data set.

    Raises:
        ImportError: the extra is not installed.
        FileNotFoundError: there is no such store; none is made.
    """
    require_extra()
    from .export import export_votes, publish
    from .store import VoteStore

    store = VoteStore(job.store, job.clips, create=False)
    split: dict[str, Any] = {"test_share": job.test_share, "seed": job.seed}
    try:
        if job.push is not None:
            return publish(store, job.out, job.push, private=job.private or None, licence=job.licence, **split)
        return export_votes(store, job.out, licence=job.licence, **split)
    finally:
        store.close()


def _find_models(job: CollectJob) -> dict[str, str]:
    """Label -> checkpoint, each of which is there."""
    from ..evaluation.report import label_models
    from ..places import find_model

    names = label_models([job.model, *job.against], "model and against")
    for number, name in enumerate(names.values()):
        find_model(name, "musicgen", "against" if number else "model")
    return names


def _load_models(job: CollectJob, names: dict[str, str]) -> dict[str, "MusicRLForConditionalGeneration"]:
    from ..devices import find_device, find_dtype
    from ..generator import load_generator
    from .maker import check_alike

    device, dtype = find_device(job.device), find_dtype(job.dtype)
    models = {label: load_generator(name, device=device, dtype=dtype) for label, name in names.items()}
    check_alike(models)
    return models


def _make_pairs(job: CollectJob, there: int, maker: "PairMaker") -> None:
    from tqdm.auto import tqdm

    if job.study:
        list(tqdm(maker.make_study(), desc="making the pairs of the study", unit=" pairs"))
        return
    wanted = job.pairs or len(maker.prompts)
    ready = min(there, wanted)
    with tqdm(total=wanted, initial=ready, desc="making pairs") as bar:
        while ready < wanted:
            is_pair = maker.make_next()
            ready += is_pair  # counted here: a bar that is switched off counts nothing
            bar.update(is_pair)


def seconds_of(text: str) -> int:
    """A span of time such as "30s", "10m", "2h" or "1d", in seconds.

    Raises:
        ValueError: it is none, or below 10 s.
    """
    found = re.fullmatch(r"(\d+)\s*([smhd])", text.strip())
    if found is None or int(found[1]) * _UNITS[found[2]] < _LEAST_S:
        raise ValueError(f"`every` is {text!r}: give a span of {_LEAST_S} s or more, such as 10m, 2h or 1d.")
    return int(found[1]) * _UNITS[found[2]]
