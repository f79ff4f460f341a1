"""Compare generators side by side: sample, rate, count, and write the result as JSON and as a page to look at."""

import base64
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..audio import atomic_path, audio_bytes, match_loudness
from ..config import changed_fields
from ..devices import find_device, find_dtype
from ..generator import Clips, MusicRLForConditionalGeneration, load_generator
from ..places import check_output, find_model
from ..preferences.importers import has_prompts, read_votes, table_of, vote_columns, write_csv
from ..preferences.listeners import LISTENER_VERSION, SimulatedListener, simulated_listeners
from ..preferences.schema import Vote, read_prompts
from ..records import read_collection
from ..rewards import Reward
from ..rewards.combine import find_reward, find_rewards, label_specs, move_reward
from ..rewards.contract import ask_reward
from .counting import count_votes, ranking, ratings_in
from .metrics import CLIP_METRICS, DIVERSITY_METRICS, clip_metrics, distinct_ngrams, diversity
from .page import headline, render_page
from .study import Rater, best_of_player, check_replaced, check_study, sample_study
from .win_rates import (
    MeanScore,
    Rating,
    WinRate,
    as_json,
    mean_opinion_scores,
    mean_with_interval,
    votes_from_scores,
    wilcoxon_signed_rank,
    win_rate_matrix,
)

RESULT_FILE = "results.json"
PAGE_FILE = "index.html"
_NGRAM = 4


@dataclass(kw_only=True)
class EvaluateJob:
    """What `musicrl evaluate` takes: generators to compare, or a table of votes to count."""

    models: list[str] = field(
        default_factory=list,
        metadata={"help": "generators to compare: bundled names, folders or Hub ids; or label=name"},
    )
    prompts: str | None = field(default=None, metadata={"help": "text file, one prompt a line"})
    votes: str | None = field(
        default=None, metadata={"help": "CSV of votes, or folder of preferences, to count instead"}
    )
    out: str = field(metadata={"help": "folder for results.json, index.html, votes.csv, ratings.csv and clips/"})
    rewards: list[str] = field(default_factory=list, metadata={"help": "rewards to score the clips with as well"})
    best_of: int = field(
        default=1,
        metadata={
            "help": "above 1, one more system: the first model, of so many clips each time the one that best_of_reward prefers"
        },
    )
    best_of_reward: list[str] = field(
        default_factory=list, metadata={"help": "reward of best_of; several are added up, each with weight* if wanted"}
    )
    listeners: int = field(default=12, metadata={"help": "size of the population of simulated listeners"})
    raters_per_clip: int = field(default=3, metadata={"help": "listeners who rate each clip; the paper has 3"})
    duration_s: float = field(default=5.0, metadata={"help": "seconds a clip"})
    samples_per_prompt: int = field(
        default=2, metadata={"help": "clips a prompt; all are rated, and two or more tell the diversity"}
    )
    temperature: float = field(default=1.0, metadata={"help": "of sampling"})
    top_k: int | None = field(default=None, metadata={"help": "likeliest codes to sample from; none for all"})
    guidance_scale: float | None = field(default=1.0, metadata={"help": "1 is no guidance; none for each model's own"})
    batch_size: int = field(default=8, metadata={"help": "clips sampled together"})
    players: int = field(default=12, metadata={"help": "prompts whose clips the page plays"})
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, mps ...; none for the accelerator that there is, else the CPU"}
    )
    dtype: str = field(default="float32", metadata={"help": "of the generators: float32, bfloat16 or float16"})
    seed: int = field(default=0, metadata={"help": "of sampling, listeners and bootstrap"})

    def __post_init__(self) -> None:
        if bool(self.votes) == bool(self.models):
            raise ValueError(f"models is {self.models} and votes is {self.votes!r}: give generators or a vote table")
        if self.models and self.prompts is None:
            raise ValueError("prompts is not given: name a text file with one prompt a line")
        if self.votes and (given := changed_fields(self, but=("votes", "out", "seed"))):
            raise ValueError(
                f"{given[0]} is {vars(self)[given[0]]!r}: votes are counted, not clips sampled; leave it out"
            )
        if self.best_of < 1 or (self.best_of > 1) != bool(self.best_of_reward):
            raise ValueError(
                f"best_of is {self.best_of} and best_of_reward is {self.best_of_reward}: give both, for models that are "
                "sampled here, as in --best_of 4 --best_of_reward quality"
            )
        label_models(self.models)
        label_specs(self.rewards)


def run_evaluate(job: EvaluateJob) -> Path:
    """Run an evaluation, print what came out, and return the path of its page."""
    out = Path(job.out)
    check_output(out, "an evaluation", "out")
    check_replaced(
        out, None if job.votes is None else table_of(job.votes), (RESULT_FILE, PAGE_FILE, "votes.csv", "ratings.csv")
    )
    result = _evaluate(job, out) if job.votes is None else evaluate_votes(job.votes, out, seed=job.seed)
    print(headline(result))
    return out / PAGE_FILE


def _evaluate(job: EvaluateJob, out: Path) -> dict[str, Any]:
    models = label_models(job.models)
    for name in models.values():
        find_model(name, "musicgen", "models")
    loaders = {label: find_reward(spec) for label, spec in label_specs(job.rewards).items()}
    load_chooser = find_rewards(job.best_of_reward) if job.best_of > 1 else None
    device, dtype = find_device(job.device), find_dtype(job.dtype)
    rewards = {label: load() for label, load in loaders.items()}
    chooser = None if load_chooser is None else load_chooser()
    for reward in [*rewards.values(), *([chooser] if chooser else [])]:
        move_reward(reward, device)
    return evaluate_models(
        models,
        read_prompts(job.prompts or ""),
        out,
        listeners=simulated_listeners(job.listeners, job.seed),
        rewards=rewards,
        best_of=job.best_of,
        best_of_reward=chooser,
        best_of_name=next(iter(label_specs([" + ".join(job.best_of_reward)]))),
        load=partial(load_generator, device=device, dtype=dtype),
        raters_per_clip=job.raters_per_clip,
        duration_s=job.duration_s,
        samples_per_prompt=job.samples_per_prompt,
        temperature=job.temperature,
        top_k=job.top_k,
        guidance_scale=job.guidance_scale,
        batch_size=job.batch_size,
        players=job.players,
        seed=job.seed,
    )


def evaluate_models(
    models: Mapping[str, str | MusicRLForConditionalGeneration],
    prompts: Sequence[str],
    out_dir: str | Path,
    *,
    listeners: Sequence[Rater],
    rewards: Mapping[str, Reward] | None = None,
    best_of: int = 1,
    best_of_reward: Reward | None = None,
    best_of_name: str = "reward",
    raters_per_clip: int = 3,
    duration_s: float = 5.0,
    samples_per_prompt: int = 2,
    temperature: float = 1.0,
    top_k: int | None = None,
    guidance_scale: float | None = 1.0,
    batch_size: int = 8,
    players: int = 12,
    load: Callable[[str], MusicRLForConditionalGeneration] = load_generator,
    seed: int = 0,
) -> dict[str, Any]:
    """Sample every model on the same prompts with the same seeds, and compare the clips.

    As in MusicRL's study (section 4.3) each clip is rated from 1 to 5 by a few listeners, who rate all models' clips of
    a prompt, and the higher rating wins. They hear clips of equal loudness; rewards and metrics get them as sampled.

    Args:
        models: label -> a loaded generator, or a name to load one from (one at a time is held).
        prompts: distinct texts.
        out_dir: gets `results.json`, `index.html`, `votes.csv` (which `evaluate_votes` reads), `ratings.csv` and `clips/`.
        listeners: for example `simulated_listeners(12)`.
        rewards: label -> reward; each gives a mean, and win rates in which the higher reward wins.
        best_of, best_of_reward: above 1, the first model is there once more, called "LABEL best of N", of whose N clips each
            time the one is kept that this reward scores highest (see `rewards.best_of`).
        best_of_name: what the page calls that reward.
        raters_per_clip: how many of the listeners rate the clips of a prompt; they take turns.
        duration_s: seconds a clip.
        samples_per_prompt: each is rated, by other listeners than the others, and stands against the other models'
            clip of the same seed; the first is played. Two or more tell the diversity.
        temperature, top_k, guidance_scale: of the sampling; a guidance scale of None is each model's own.
        players: prompts whose clips are embedded in the page, spread over the list.
        load: loads a generator by name, and puts it where it shall run.

    Returns:
        what `results.json` holds.

    Raises:
        ValueError: for no models, no prompts, the same prompt twice, too few listeners, or numbers below 1.
    """
    prompts = list(prompts)
    check_study(models, prompts, listeners, raters_per_clip, samples_per_prompt, batch_size)
    systems, best_label = dict(models), None
    if best_of > 1:
        first = next(iter(models))
        best_label = f"{first} best of {best_of}"
        if best_of_reward is None or best_label in models:
            raise ValueError(f"best_of is {best_of}: give best_of_reward, and call no other model {best_label!r}")
        systems[best_label] = models[first]
    started = time.monotonic()
    out_dir, rewards = Path(out_dir), dict(rewards or {})
    sampling = {"temperature": temperature, "top_k": top_k, "guidance_scale": guidance_scale, "duration_s": duration_s}
    shown = {round(i * (len(prompts) - 1) / max(1, min(players, len(prompts)) - 1)) for i in range(players)}
    shown = {number for number in shown if number < len(prompts)}

    rated: dict[str, list[tuple[str, str, float]]] = {}
    scores: dict[str, dict[str, list[tuple[str, str, float]]]] = {name: {} for name in rewards}
    metrics: dict[str, dict[str, MeanScore | float]] = {}
    played: dict[int, dict[str, Any]] = {
        number: {"prompt": prompts[number], "clips": {}, "scores": {}} for number in sorted(shown)
    }
    with tqdm(total=len(systems) * len(prompts), desc="evaluating") as bar:
        for label, source in systems.items():
            model = load(source).eval() if isinstance(source, str) else source
            play: Callable[..., Clips] = model.sample
            if label == best_label and best_of_reward is not None:
                play = best_of_player(model, best_of, best_of_reward, best_of_name)
            collected: dict[str, list[tuple[str, float]]] = {}
            codes: list[Tensor] = []
            rated[label] = []
            for name in scores:
                scores[name][label] = []
            for number, prompt, own_codes, audio in sample_study(
                play, prompts, samples_per_prompt, batch_size, seed, sampling
            ):
                rate = model.sampling_rate
                codes.extend(own_codes)
                matched = torch.stack([match_loudness(clip, rate) for clip in audio])
                for place in range(samples_per_prompt * raters_per_clip):
                    rater = listeners[(number * samples_per_prompt * raters_per_clip + place) % len(listeners)]
                    heard = matched[place // raters_per_clip]
                    rated[label].append((prompt, rater.name, float(rater.rate([prompt], heard[None], rate)[0])))
                own = [value for _, _, value in rated[label][-samples_per_prompt * raters_per_clip :]]
                of_first = {"rating": fmean(own[:raters_per_clip])}
                for name, reward in rewards.items():
                    value = ask_reward(reward, [prompt] * len(audio), audio, rate, name)
                    scores[name][label].append((prompt, name, float(value.mean())))
                    of_first[name] = float(value[0])
                measured = {key: float(value.mean()) for key, value in clip_metrics(audio, rate).items()}
                measured |= diversity(audio, rate) if len(audio) > 1 else {}
                for key, number_measured in measured.items():
                    collected.setdefault(key, []).append((prompt, number_measured))
                encoded = audio_bytes(matched[0], rate)
                _save_clip(out_dir, label, number, encoded)
                if number in played:
                    played[number]["clips"][label] = base64.b64encode(encoded).decode()
                    played[number]["scores"][label] = of_first
                bar.update()
            metrics[label] = {key: mean_with_interval(label, values, seed=seed) for key, values in collected.items()}
            metrics[label]["distinct_ngrams"] = distinct_ngrams(codes, _NGRAM)

    ratings = [Rating(prompt, label, value, who) for label, rows in rated.items() for prompt, who, value in rows]
    votes = votes_from_scores(rated)
    result = {
        "kind": "models",
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "models": list(systems),
        "best_of": best_label and {"model": best_label, "of": next(iter(models)), "n": best_of, "reward": best_of_name},
        "prompts": len(prompts),
        "settings": sampling | {"samples_per_prompt": samples_per_prompt, "seed": seed},
        "raters": {
            "listeners": len(listeners),
            "per_clip": raters_per_clip,
            "clips_per_prompt": samples_per_prompt,
            "simulated": LISTENER_VERSION if all(isinstance(who, SimulatedListener) for who in listeners) else None,
        },
        "mos": [as_json(score) for score in mean_opinion_scores(ratings, seed=seed)],
        "win_rates": [
            as_json(rate) | {"wilcoxon_p": wilcoxon_signed_rank(ratings, rate.model, rate.against)[0]}
            for rate in win_rate_matrix(votes, list(systems), seed=seed)
        ],
        **ranking(votes, seed),
        "rewards": {name: _reward_result(scores[name], seed) for name in rewards},
        "metrics": {
            label: {key: as_json(value) if isinstance(value, MeanScore) else value for key, value in table.items()}
            for label, table in metrics.items()
        },
        "metric_notes": CLIP_METRICS
        | DIVERSITY_METRICS
        | {"distinct_ngrams": f"distinct over all {_NGRAM}-grams of the first codebook"},
    }
    _write(out_dir, result, votes, list(played.values()), ratings)
    return result


def evaluate_votes(source: str | Path | Sequence[Vote], out_dir: str | Path, *, seed: int = 0) -> dict[str, Any]:
    """Win rates and a Bradley-Terry ranking of votes that were collected elsewhere, and opinion scores of a study's.

    Args:
        source: CSV or folder of preferences as `read_votes` takes it, or votes. A folder that `musicrl export` wrote after
            a study holds ratings too, and each such folder how far its listeners agree.
        out_dir: gets `results.json`, `index.html` and `votes.csv`.

    Returns:
        what `results.json` holds; `prompts` is None where the table names none.

    Raises:
        ValueError: if there are no votes, or the table is not valid.
    """
    path = Path(source) if isinstance(source, str | Path) else None
    votes = read_votes(source) if isinstance(source, str | Path) else list(source)
    if path is not None and not votes:
        raise ValueError(
            f"`votes`: {path} holds no vote between two systems: its clips are of one system, or nothing says of which. Collect "
            "with --against, or name system_a and system_b in the table that is imported."
        )
    result = count_votes(votes, ratings_in(path) if path is not None and path.is_dir() else [], seed=seed)
    if path is not None and not has_prompts(path):
        result["prompts"] = None
    if path is not None and (record := read_collection(path)) is not None:
        result["agreement"] = {
            "krippendorff_alpha": record.agreement,
            "shared_pairs": record.shared_pairs,
            "checks": record.checks,
        }
    _write(Path(out_dir), result, votes, [])
    return result


def label_models(names: Sequence[str], argument: str = "`models`") -> dict[str, str]:
    """Label -> checkpoint of entries `name` or `label=name`; without a label the name's last part serves.

    Args:
        names: the entries.
        argument: what messages call them.

    Raises:
        ValueError: if two entries have the same label.

    Example:
        >>> label_models(["musicrl-tiny", "tuned=runs/dpo"])
        {'musicrl-tiny': 'musicrl-tiny', 'tuned': 'runs/dpo'}
    """
    labelled: dict[str, str] = {}
    for entry in names:
        label, separator, name = entry.partition("=")
        if not separator or "/" in label:
            label, name = Path(entry).name, entry
        if label in labelled or not label:
            raise ValueError(
                f"{argument} is {', '.join(names)}: {label!r} is there twice; write label=name to tell them apart"
            )
        if not clip_folder(label).strip(".") or clip_folder(label) in map(clip_folder, labelled):
            raise ValueError(f"{argument}: no folder of clips can have {label!r} alone for a name; write label=name")
        labelled[label] = name
    return labelled


def clip_folder(label: str) -> str:
    return re.sub(r"[^\w.-]+", "_", label)


def _save_clip(out_dir: Path, label: str, number: int, encoded: bytes) -> None:
    with atomic_path(out_dir / "clips" / clip_folder(label) / f"{number:04d}.flac") as temporary:
        temporary.write_bytes(encoded)


def _reward_result(rows: Mapping[str, Sequence[tuple[str, str, float]]], seed: int) -> dict[str, Any]:
    means = [
        mean_with_interval(label, [(prompt, value) for prompt, _, value in own], seed=seed)
        for label, own in rows.items()
    ]
    votes = votes_from_scores(rows)
    rates: list[WinRate] = win_rate_matrix(votes, list(rows), seed=seed)
    return {"means": [as_json(mean) for mean in means], "win_rates": [as_json(rate) for rate in rates]}


def _write(
    out_dir: Path,
    result: dict[str, Any],
    votes: Sequence[Vote],
    players: Sequence[dict[str, Any]],
    ratings: Sequence[Rating] = (),
) -> None:
    with atomic_path(out_dir / RESULT_FILE) as temporary:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    rows = ((vote.prompt, vote.model_a, vote.model_b, vote.preference, vote.listener) for vote in votes)
    write_csv(out_dir / "votes.csv", vote_columns(result["prompts"] is not None), rows)
    (out_dir / "ratings.csv").unlink(missing_ok=True)  # those of an evaluation before
    if ratings:
        scores = ((rating.prompt, rating.model, rating.score, rating.listener) for rating in ratings)
        write_csv(out_dir / "ratings.csv", ("prompt", "model", "score", "listener"), scores)
    with atomic_path(out_dir / PAGE_FILE) as temporary:
        temporary.write_text(render_page(result, players), encoding="utf-8")
