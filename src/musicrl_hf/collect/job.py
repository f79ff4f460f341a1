"""`musicrl collect` and `musicrl export`: their fields, and what runs them."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..audio import MAX_DURATION_S
from ..preferences.schema import read_prompts
from . import require_extra
from .rules import Rules, rule

if TYPE_CHECKING:
    from .export import ExportResult
    from .maker import PairMaker

_STORE_HELP = "folder of the votes and clips, or postgresql://USER@HOST/NAME"
_CLIPS_HELP = "folder of the clips, where the store is a URL; with PostgreSQL one that all machines see"


@dataclass(frozen=True, kw_only=True)
class CollectJob(Rules):
    """What `musicrl collect` takes: generators, prompts, a store, and the rules for listeners."""

    model: str = rule("musicrl-tiny", "generator: bundled name, folder or Hub id; or label=name")
    against: list[str] = field(
        default_factory=list,
        metadata={"help": "further generators, every two of which meet; without any, one meets itself"},
    )
    prompts: str = field(metadata={"help": "text file, one prompt a line"})
    store: str = rule("collected", _STORE_HELP)
    clips: str | None = rule(None, _CLIPS_HELP)
    simulate: int = field(metadata={"help": "have so many simulated listeners vote, to rehearse"})
    pairs: int = rule(0, "pairs to have ready before simulated listeners vote; 0 for one a prompt")
    duration_s: float = rule(5.0, "seconds a clip")
    temperature: float = rule(1.0, "of sampling")
    top_k: int | None = rule(250, "likeliest codes to sample from; empty for all")
    guidance_scale: float = rule(3.0, "classifier-free guidance; 1 is none")
    seed: int | None = rule(None, "makes pairs and simulated listeners reproducible; empty draws one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.duration_s <= MAX_DURATION_S:
            raise ValueError(f"`duration_s` must be in (0, {MAX_DURATION_S:g}] seconds, got {self.duration_s!r}.")
        if self.simulate < 1:
            raise ValueError(f"`simulate` is {self.simulate}: it has to be 1 or more.")
        if self.pairs < 0:
            raise ValueError(f"`pairs` is {self.pairs}: it has to be 0 or more.")
        if self.study and self.pairs:
            raise ValueError(f"`pairs` is {self.pairs}, but a study has fixed pairs: leave it out.")

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
    """Make pairs and have simulated listeners vote on them.

    Returns:
        what was done, in words.

    Raises:
        ImportError: the extra is not installed.
    """
    require_extra()
    from ..preferences.listeners import simulated_listeners
    from .desk import Desk
    from .maker import PairMaker
    from .simulate import simulate
    from .store import VoteStore

    prompts = read_prompts(job.prompts)
    store = VoteStore(job.store, job.clips)
    desk = Desk(store, job.rules)
    maker = PairMaker(
        store,
        _load_models([job.model, *job.against]),
        prompts,
        duration_s=job.duration_s,
        temperature=job.temperature,
        top_k=job.top_k,
        guidance_scale=job.guidance_scale,
        seed=job.seed,
        check_every=job.check_every,
    )
    _make_pairs(job, desk.open_pairs(), maker)
    given = simulate(desk, simulated_listeners(job.simulate, job.seed or 0))
    store.close()
    return f"{given} votes of {job.simulate} simulated listeners to {store.engine.url!r}"


def run_export(job: ExportJob) -> "ExportResult":
    """Export the votes, and publish them where `push` names a data set.

    Raises:
        ImportError: the extra is not installed.
        FileNotFoundError: there is no such store.
    """
    require_extra()
    from .export import export_votes, publish
    from .store import DATABASE_FILE, VoteStore

    if "://" not in job.store and not (Path(job.store) / DATABASE_FILE).is_file():
        raise FileNotFoundError(f"`store`: {job.store} holds no {DATABASE_FILE}; give the folder of `musicrl collect`.")
    store = VoteStore(job.store, job.clips)
    split: dict[str, Any] = {"test_share": job.test_share, "seed": job.seed}
    try:
        if job.push is not None:
            return publish(store, job.out, job.push, private=job.private or None, licence=job.licence, **split)
        return export_votes(store, job.out, licence=job.licence, **split)
    finally:
        store.close()


def _load_models(names: list[str]) -> dict:
    from ..evaluation.report import label_models
    from ..generator import load_generator

    return {label: load_generator(name).eval() for label, name in label_models(names).items()}


def _make_pairs(job: CollectJob, there: int, maker: "PairMaker") -> None:
    from tqdm.auto import tqdm

    if job.study:
        list(tqdm(maker.make_study(), desc="making the pairs of the study", unit=" pairs"))
        return
    wanted = job.pairs or len(maker.prompts)
    with tqdm(total=wanted, initial=min(there, wanted), desc="making pairs") as bar:
        while bar.n < wanted:
            bar.update(maker.make_next())
