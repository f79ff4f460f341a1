"""Sample pairs of clips from one or two generators and have a listener choose: the step that starts every round."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from tqdm.auto import tqdm

from ..audio import atomic_path, audio_bytes, match_loudness
from ..generator import Clips, MusicRLForConditionalGeneration
from .codes import CODE_FEATURES, ClipEncoder, codes_column
from .listeners import Judgement
from .schema import check_target, preferences_from_rows, save_preferences


class Listener(Protocol):
    """Whoever chooses between two clips [C, T]."""

    @property
    def name(self) -> str: ...

    def __call__(self, prompt: str, audio_a: Tensor, audio_b: Tensor, sampling_rate: int) -> Judgement: ...


def sample_pairs(
    generator: MusicRLForConditionalGeneration,
    prompts: Sequence[str],
    out: str | Path,
    *,
    listeners: Sequence[Listener],
    name: str,
    against: MusicRLForConditionalGeneration | None = None,
    against_name: str | None = None,
    duration_s: float = 5.0,
    pairs_per_prompt: int = 1,
    votes_per_pair: int = 1,
    batch_size: int = 8,
    temperature: float = 1.0,
    top_k: int | None = None,
    guidance_scale: float = 1.0,
    seed: int = 0,
    weights: Sequence[str] = (),
    on_batch: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a preference data set of freshly sampled pairs.

    Each pair is judged by `votes_per_pair` different listeners, in turn over the pairs, a row for each vote. Listeners hear both clips at the same loudness, in a
    random order; the rows hold the clips as sampled, with the sampled codes (`chosen_codes`, `rejected_codes`), so that
    training sees the policy's own actions rather than an encoding of their sound.

    Args:
        generator: samples one clip of each pair, and the other one too where `against` is not given.
        prompts: texts; each gives `pairs_per_prompt` pairs.
        out: folder to write; a run that was cut short goes on from `out` + ".partial".
        listeners: who chooses, for example `simulated_listeners(12)`.
        votes_per_pair: listeners of each pair; with two or more, how far they agree can be counted (`count_agreement`).
        name, against_name: what to call the generators in the rows.
        duration_s: seconds a clip.
        temperature, top_k, guidance_scale: of the sampling; the defaults sample the policy itself.
        seed: a batch is sampled with seed + a number of its own, which the rows hold.
        batch_size: pairs sampled together.
        weights: what tells the generators' and the judges' weights from others under the same names (`places.weights_of`), so that a
            run that was cut short does not go on with others.
        on_batch: called with (batches done, batches in all).

    Returns:
        `out`.

    Raises:
        ValueError: if there are no prompts, fewer listeners than votes a pair, two of one name, an option is out of range, or `out` + ".partial" was begun
            with other options; if the generators differ in sampling rate or channels.
    """
    jobs = [(prompt, number) for prompt in prompts for number in range(pairs_per_prompt)]
    if not jobs or not listeners:
        raise ValueError(f"{len(jobs)} pairs for {len(listeners)} listeners: give at least one prompt and one listener")
    if not 1 <= votes_per_pair <= len({listener.name for listener in listeners}):
        raise ValueError(
            f"votes_per_pair is {votes_per_pair}, and there are {len({listener.name for listener in listeners})} listeners: "
            "give a number from 1 to theirs, as nobody votes twice on a pair"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: sample at least one pair at a time")
    if (against is None) != (against_name is None):
        raise ValueError(f"against_name is {against_name!r}: give it together with `against`, or neither")
    if against is not None and _layout(against) != _layout(generator):
        raise ValueError(
            f"generator and against differ in (Hz, channels): {_layout(generator)} and {_layout(against)}; "
            "a pair has to sound alike in everything but the music"
        )
    check_target(out)
    sampling: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "guidance_scale": guidance_scale,
        "duration_s": duration_s,
    }
    encoders = [ClipEncoder(generator), ClipEncoder(against or generator)]
    options = {
        **sampling,
        "models": [name, against_name],
        **({"weights": list(weights)} if weights else {}),
        "codecs": [encoder.identity for encoder in encoders],
        "listeners": [listener.name for listener in listeners],
        "votes_per_pair": votes_per_pair,
        "seed": seed,
        "batch_size": batch_size,
        "jobs": hashlib.sha256(json.dumps(jobs).encode()).hexdigest(),
    }
    out = Path(out)
    partial = out.with_name(out.name + ".partial")
    _begin(partial, options)

    starts = range(0, len(jobs), batch_size)
    for batch, start in enumerate(tqdm(starts, desc="sampling pairs")):
        part = partial / f"{batch:06d}.parquet"
        if not part.is_file():
            rows = jobs[start : start + batch_size]
            seeds = (seed + 2 * batch, seed + 2 * batch + 1)
            texts = [prompt for prompt, _ in rows]
            clips = [
                model.sample(texts, seed=own, **sampling)
                for model, own in zip((generator, against or generator), seeds, strict=True)
            ]
            turns = [
                range(pair * votes_per_pair, (pair + 1) * votes_per_pair) for pair in range(start, start + len(rows))
            ]
            judges = [[listeners[turn % len(listeners)] for turn in own] for own in turns]
            names = (name, against_name or name)
            judged = _label(texts, clips, judges, names, seeds, encoders)
            with atomic_path(part) as temporary:
                pq.write_table(judged.data.table, temporary)
        if on_batch is not None:
            on_batch(batch + 1, len(starts))
    parts = [pq.read_table(partial / f"{batch:06d}.parquet") for batch in range(len(starts))]
    save_preferences(Dataset(pa.concat_tables(parts)), out)
    shutil.rmtree(partial)
    return out


def _layout(model: MusicRLForConditionalGeneration) -> tuple[int, int]:
    return model.sampling_rate, model.config.audio_channels


def _begin(partial: Path, options: dict[str, Any]) -> None:
    """Open the folder of finished batches; one that was begun with other options must not be mixed in."""
    path = partial / "options.json"
    if path.is_file():
        begun = json.loads(path.read_text())
        changed = sorted(key for key in options if begun.get(key) != options[key])
        if changed:
            raise ValueError(
                f"{partial} was begun with another {', '.join(changed)}: delete it or give the same options"
            )
        return
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(options, indent=1))


def _label(
    prompts: Sequence[str],
    clips: Sequence[Clips],
    judges: Sequence[Sequence[Listener]],
    names: tuple[str, str],
    seeds: tuple[int, int],
    encoders: Sequence[ClipEncoder],
) -> Dataset:
    """Have each pair judged in a random order, and turn each vote into a row with codes."""
    rate, now = clips[0].sampling_rate, datetime.now(UTC).isoformat(timespec="seconds")
    seconds = clips[0].audio.shape[-1] / rate
    rows, codes = [], []
    for i, (prompt, of_pair) in enumerate(zip(prompts, judges, strict=True)):
        heard = [match_loudness(own.audio[i].cpu(), rate) for own in clips]
        encoded = [audio_bytes(own.audio[i].cpu(), rate) for own in clips]
        for vote, judge in enumerate(of_pair):
            # The side must not tell which generator it was; the coin hangs on the pair and the vote's number alone, so a
            # rerun repeats it.
            key = f"{prompt}\x1f{seeds}\x1f{i}" + (f"\x1f{vote}" if vote else "")
            coin = hashlib.sha256(key.encode()).digest()[0] % 2
            order = (1, 0) if coin else (0, 1)
            judgement = judge(prompt, heard[order[0]], heard[order[1]], rate)
            won = order if judgement.preference != "b" else order[::-1]
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": encoded[won[0]],
                    "rejected": encoded[won[1]],
                    "chosen_model": names[won[0]],
                    "rejected_model": names[won[1]],
                    "chosen_seed": seeds[won[0]],
                    "rejected_seed": seeds[won[1]],
                    "preference": judgement.preference,
                    "confidence": judgement.confidence,
                    "seconds_chosen": seconds,
                    "seconds_rejected": seconds,
                    "listener": judge.name,
                    "source": "sampled",
                    "created_at": now,
                }
            )
            codes.append([clips[k].codes[i].cpu() for k in won])
    ds = preferences_from_rows(rows)
    if encoders[0].identity != encoders[1].identity:
        return ds  # codes of two codecs cannot stand in one data set; the codec at hand encodes the clips
    columns = [codes_column(column) for column in zip(*codes, strict=True)]
    table = pa.table([*columns, pa.array([encoders[0].identity] * len(ds))], schema=CODE_FEATURES.arrow_schema)
    return concatenate_datasets([ds, Dataset(table)], axis=1)
