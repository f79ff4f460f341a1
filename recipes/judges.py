"""Stage 3: the judges, which say whether the generator does what it was asked, and by which nothing is trained.

    python recipes/judges.py --work build/tiny --minutes 6

Trains the classifier and takes the key profiles from the `judges` split of tunes, which no other stage reads, and
measures classifier, tempo and key estimator on test clips of 5 s, as long as those that will be judged.
"""

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from classifier import HOP, WEIGHTS, Classifier, augment, hear, truths
from common import (
    SAMPLING_RATE,
    load_clips,
    load_training_state,
    record,
    save_training_state,
    say,
    stage_arguments,
    start,
    to_float,
    write_json,
)
from estimators import (
    TEMPO_TOLERANCES,
    faults,
    key,
    key_of_row,
    key_profiles,
    key_relation,
    pitch_classes,
    same_tempo,
    tempo,
)
from measures import tune_measures
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

JUDGED_S = 5  # seconds of a clip
BATCH = 32
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY = 3e-3, 50, 0.05
BACKING_WEIGHT = 0.5  # of the second loss
LABEL_SMOOTHING = 0.05
SAVE_EVERY_S = 120


@torch.no_grad()
def all_spectra(model: Classifier, clips: np.ndarray, size: int = 32) -> Tensor:
    """Band powers [N, MELS, frames] of int16 clips, as half-precision decibels: each clip is heard many times."""
    parts = [model.spectra(to_float(clips[first : first + size])) for first in range(0, len(clips), size)]
    return torch.cat([(10 * torch.log10(part + 1e-10)).half() for part in parts])


def train_classifier(
    folder: Path, model: Classifier, clips: np.ndarray, rows: list[dict], minutes: float, seed: int
) -> dict:
    """Train on 5 s crops until `minutes` are spent, over all restarts; `folder` keeps the state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    progress = load_training_state(folder, model, optimizer) or {"step": 0, "seconds": 0.0}
    spectra, truth = all_spectra(model, clips), truths(rows)
    frames = JUDGED_S * SAMPLING_RATE // HOP
    rng = np.random.default_rng([seed, progress["step"]])
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    began, spent_before, saved_at, told_at, recent = time.time(), progress["seconds"], time.time(), time.time(), []
    while progress["seconds"] < 60 * minutes:
        model.train()
        done = progress["seconds"] / (60 * minutes)
        warm = min(1.0, (progress["step"] + 1) / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * done))
        chosen = rng.integers(len(spectra), size=BATCH)
        begins = rng.integers(spectra.shape[2] - frames + 1, size=BATCH)
        crops = torch.stack([spectra[i, :, b : b + frames] for i, b in zip(chosen, begins, strict=True)])
        instrument, backing = model(augment(10 ** (crops.float() / 10), rng))
        loss = criterion(instrument, truth["instrument"][chosen])
        (loss + BACKING_WEIGHT * criterion(backing, truth["backing"][chosen])).backward()
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-99:], loss.item()]
        progress = {"step": progress["step"] + 1, "seconds": spent_before + time.time() - began}
        if time.time() - told_at > 30:
            told_at = time.time()
            spent = progress["seconds"] / 60
            say(f"{folder.name} {spent:.1f} of {minutes:g} min, step {progress['step']}, loss {np.mean(recent):.3f}")
        if time.time() - saved_at > SAVE_EVERY_S:
            saved_at = time.time()
            save_training_state(folder, model, optimizer, progress)
    save_training_state(folder, model, optimizer, progress)
    return progress


def learn_keys(clips: np.ndarray, rows: list[dict]) -> np.ndarray:
    """`key_profiles` of both halves of int16 clips [N, T] with known keys."""
    keys = [key_of_row(row) for row in rows]
    size = clips.shape[1] // 2
    heard = [
        pitch_classes(to_float(clip[half * size : (half + 1) * size]).numpy()) for half in (0, 1) for clip in clips
    ]
    return key_profiles(np.stack(heard), np.tile([k[0] for k in keys], 2), np.tile([k[1] for k in keys], 2))


class Judges(NamedTuple):
    """The classifier and the key profiles [2, 12]."""

    classifier: Classifier
    profiles: np.ndarray

    def save(self, work: Path) -> None:
        tensors = dict(self.classifier.state_dict()) | {"key_profiles": torch.from_numpy(self.profiles)}
        save_file(tensors, work / (WEIGHTS + ".part"))
        os.replace(work / (WEIGHTS + ".part"), work / WEIGHTS)

    @classmethod
    def load(cls, work: Path) -> "Judges":
        """The judges of a work folder.

        Raises:
            FileNotFoundError: the stage has not been run there.
        """
        tensors = load_file(work / WEIGHTS)
        profiles, classifier = tensors.pop("key_profiles").numpy(), Classifier()
        classifier.load_state_dict(tensors)
        return cls(classifier.eval(), profiles)

    def hear(self, audio: Tensor) -> dict:
        """What the judges make of clips [N, T]: `classifier.hear`, "bpm" [N], "key", "faults" and "measures" (lists)."""
        waves = [wave.numpy() for wave in audio]
        return hear(self.classifier, audio) | {
            "bpm": np.array([tempo(wave) for wave in waves]),
            "key": [key(wave, self.profiles) for wave in waves],
            "faults": [faults(wave) for wave in waves],
            "measures": [tune_measures(wave) for wave in waves],
        }


def against_chance(agrees: np.ndarray) -> dict[str, float] | None:
    """Agreement [N, N] of what was heard in clip i with the facts of clip j: with its own facts, and with another's.

    None for fewer than two clips.
    """
    n = len(agrees)
    if n < 2:
        return None
    own = np.trace(agrees)
    return {"share": round(float(own / n), 3), "chance": round(float((agrees.sum() - own) / (n * (n - 1))), 3)}


def agreement(heard: dict, rows: list[dict], has_bpm: np.ndarray, has_key: np.ndarray) -> dict:
    """How often the judges hear what the facts say, and how often they would if clips and facts were shuffled.

    Args:
        heard: from `Judges.hear`, of N clips.
        rows: the facts of the clips, or of those that were asked for.
        has_bpm, has_key: [N] bool, the clips that count for tempo and key.
    """
    truth = truths(rows)
    found: dict = {}
    for name, values in truth.items():
        found[name] = against_chance((heard[name][:, None] == values[None]).numpy())
    bpm = np.array([row["bpm"] for row in rows])[has_bpm]
    found["tempo_clips"], found["key_clips"] = len(bpm), int(has_key.sum())
    for tolerance in TEMPO_TOLERANCES:
        agrees = same_tempo(heard["bpm"][has_bpm][:, None], bpm[None], tolerance)
        found[f"tempo_within_{tolerance:.0%}"] = against_chance(agrees)
    keyed = np.flatnonzero(has_key)
    relations = [[key_relation(heard["key"][i], key_of_row(rows[j])) for j in keyed] for i in keyed]
    for name in ("same", "neighbour", "signature"):
        found[f"key_{name}"] = against_chance(np.array([[pair[name] for pair in line] for line in relations]))
    return found


def reliability(judges: Judges, clips: np.ndarray, rows: list[dict]) -> dict:
    """What the judges get right on the first seconds of int16 clips [N, T] with known facts; also on solos alone."""
    heard = judges.hear(to_float(clips[:, : JUDGED_S * SAMPLING_RATE]))
    everywhere = np.ones(len(rows), bool)
    found: dict = {"clips": len(rows), "all": agreement(heard, rows, everywhere, everywhere)}
    solo = [i for i, row in enumerate(rows) if row["backing"] == "none"]
    of_solo = {
        name: [values[i] for i in solo] if isinstance(values, list) else values[solo] for name, values in heard.items()
    }
    on_solo = agreement(of_solo, [rows[i] for i in solo], everywhere[solo], everywhere[solo])
    found["unaccompanied"] = {name: share for name, share in on_solo.items() if name not in ("backing", "drums")}
    found["faulty_clips"] = count_faults(heard)
    return found


def count_faults(heard: dict) -> dict[str, int]:
    """How many clips have each fault."""
    return {name: sum(row[name] for row in heard["faults"]) for name in heard["faults"][0]}


def main() -> None:
    args = stage_arguments(__doc__.splitlines()[0], minutes=6).parse_args()
    start(args)
    finished = args.work / "judges_finished.json"
    if finished.exists() and not args.force:
        return say(f"{finished} is there")
    clips, rows = load_clips(args.work, "judges")
    model = Classifier()
    progress = train_classifier(args.work / "judges_training", model, clips, rows, args.minutes, args.seed)
    judges = Judges(model.eval(), learn_keys(clips, rows))
    judges.save(args.work)
    results: dict = {"step": progress["step"], "minutes": round(progress["seconds"] / 60, 1)}
    results["parameters"] = sum(p.numel() for p in model.parameters())
    for split in ("validation", "test", "test_other_font"):
        results[split] = reliability(judges, *load_clips(args.work, split))
    say(str(results))
    record(args, "judges", results)
    write_json(finished, results)


if __name__ == "__main__":
    main()
