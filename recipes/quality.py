"""Stage 10: a predictor of the mean opinion score on the frozen sound encoder of stage 9.

    python recipes/quality.py --work build/tiny

Its labels are the simulated scores of degradations.py. Nobody rated anything: it knows this ladder, and not what people
like about music.
"""

import numpy as np
import torch
from codec_measures import visqol, visqol_score
from common import (
    FRAME_RATE,
    SAMPLING_RATE,
    load_clips,
    read_json,
    record,
    say,
    stage_arguments,
    start,
    to_float,
    write_array,
    write_json,
)
from degradations import LADDERS, UNSEEN, decode_degraded, degrade, measure_losses
from elu import use_fast_elu
from generator import move_files
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor
from transformers import EncodecModel

from musicrl_hf.rewards.clap import load_clap
from musicrl_hf.rewards.quality import QualityModel

N_EXAMPLES = {"train": 6000, "validation": 400, "test": 600, "unseen": 200}
N_MEASURED = 4  # validation clips by which the ladders are measured
CROP_S = 5
CODED_SHARE, SCRAMBLED_SHARE, NO_MUSIC_SHARE = 0.45, 0.4, 0.03
STEPS, LEARNING_RATE, WEIGHT_DECAY = 1500, 2e-3, 0.05
KINDS = ("clean", *LADDERS, "codec", "scrambled", "several", "no_music")


def example(clip: np.ndarray, codes: Tensor, codec: EncodecModel, losses_of: dict, rng: np.random.Generator) -> tuple:
    """A degraded 5 s crop [T] of one clip, its simulated score, and the kind of degradation."""
    length = CROP_S * SAMPLING_RATE
    if rng.random() < NO_MUSIC_SHARE:
        colour = rng.choice(["white", "quiet", "clicks"])
        wave = rng.standard_normal(length) * (1e-3 if colour == "quiet" else 0.1)
        if colour == "clicks":
            wave *= rng.random(length) < 1e-4
        return wave.astype(np.float32), 1.0, "no_music"
    kept, losses, kind = 0, [], "clean"
    begin = int(rng.integers((clip.shape[0] - length) // (SAMPLING_RATE // FRAME_RATE)))  # frames
    if rng.random() < CODED_SHARE:
        kept = int(rng.choice([4, 4, 4, 3, 2, 1]))
        scrambled = float(rng.random()) if rng.random() < SCRAMBLED_SHARE else 0.0
        crop = codes[:, begin : begin + CROP_S * FRAME_RATE]
        wave, loss = decode_degraded(codec, crop, kept, scrambled, losses_of, rng)
        losses.append(loss)
        kind = "scrambled" if scrambled else "codec"
    else:
        start_sample = begin * (SAMPLING_RATE // FRAME_RATE)
        wave = to_float(clip[start_sample : start_sample + length]).numpy()
    n_more = rng.choice([0, 1, 2], p=[0.5, 0.35, 0.15] if kept else [0.12, 0.68, 0.2])
    for name in rng.choice(list(LADDERS), n_more, replace=False):
        wave, loss = degrade(wave, name, float(rng.random()), losses_of, rng)
        losses.append(loss)
        kind = str(name) if kind == "clean" and len(losses) == 1 else "several"
    return wave, 1 + 4 * float(np.prod([1 - loss for loss in losses])), kind


def unseen_example(clip: np.ndarray, losses_of: dict, rng: np.random.Generator) -> tuple:
    """A 5 s crop [T] under a degradation that no training example has, its simulated score, and 0 for the kind."""
    begin = int(rng.integers(clip.shape[0] - CROP_S * SAMPLING_RATE))
    wave = to_float(clip[begin : begin + CROP_S * SAMPLING_RATE]).numpy()
    wave, loss = degrade(wave, str(rng.choice(list(UNSEEN))), float(rng.random()), losses_of, rng)
    return wave, 1 + 4 * (1 - loss), KINDS[0]


def ladders_of(args, codec: EncodecModel) -> dict[str, list[float]]:
    """`measure_losses` on a few validation clips, cached in the work folder."""
    path = args.work / "quality_ladders.json"
    if not path.exists():
        if visqol_score() is None:
            raise SystemExit("audio-samples-qoe is missing: pip install --no-deps -r recipes/requirements-alone.txt")
        clips, _ = load_clips(args.work, "validation")
        n, seconds = (1, 1) if args.tiny else (N_MEASURED, CROP_S)
        crops = to_float(clips[:n, : seconds * SAMPLING_RATE]).numpy()
        codes = load_file(args.work / "codes_validation.safetensors")["codes"][:n, :, : seconds * FRAME_RATE]
        write_json(path, measure_losses(crops, codes, codec, visqol, np.random.default_rng(args.seed)))
        say(f"quality: ladders measured: {read_json(path)}")
    return read_json(path)


def examples_of(args, name: str) -> tuple[np.ndarray, dict[str, Tensor]]:
    """Waves [N, T] as int16, and simulated scores [N] and kinds [N], cached in the work folder.

    Args:
        name: a split, or "unseen" for test clips under a degradation that no other example has.
    """
    waves_path, labels_path = args.work / f"quality_{name}.npy", args.work / f"quality_{name}.safetensors"
    if not waves_path.exists() or args.force:
        split = "test" if name == "unseen" else name
        size = N_EXAMPLES[name] // (100 if args.tiny else 1)
        clips, _ = load_clips(args.work, split)
        codes = load_file(args.work / f"codes_{split}.safetensors")["codes"]
        codec = use_fast_elu(EncodecModel.from_pretrained(args.work / "codec").eval())
        losses_of = ladders_of(args, codec)
        rng = np.random.default_rng([args.seed, len(clips), size])
        waves, scores, kinds = np.zeros((size, CROP_S * SAMPLING_RATE), np.int16), [], []
        for n, i in enumerate(rng.integers(len(codes), size=size)):
            if name == "unseen":
                wave, score, kind = unseen_example(clips[i], losses_of, rng)
            else:
                wave, score, kind = example(clips[i], codes[i], codec, losses_of, rng)
            waves[n] = (wave / max(1.0, np.abs(wave).max()) * 32767).astype(np.int16)
            scores.append(score)
            kinds.append(KINDS.index(kind))
            if n % 200 == 199:
                say(f"quality: {n + 1} of {size} {name} examples")
        save_file({"scores": torch.tensor(scores), "kinds": torch.tensor(kinds)}, labels_path)
        write_array(waves_path, waves)
    return np.load(waves_path, mmap_mode="r"), load_file(labels_path)


def features_of(args, model: QualityModel, split: str) -> dict[str, Tensor]:
    """Features [N, D], simulated scores [N] and kinds [N] of a split."""
    waves, labels = examples_of(args, split)
    parts = []
    for first in range(0, len(waves), 20):
        parts.append(model.features(to_float(waves[first : first + 20])[:, None], SAMPLING_RATE))
    say(f"quality: features of {len(waves)} {split} examples")
    return labels | {"features": torch.cat(parts)}


def train(model: QualityModel, data: dict[str, dict[str, Tensor]]) -> float:
    """Fit the head to the scores (mean squared error); keep the step that is best on validation. Its error there."""
    model.head.fit(data["train"]["features"])
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best, kept = float("inf"), {}
    for step in range(STEPS):
        model.train()
        batch = torch.randint(len(data["train"]["scores"]), (256,))
        loss = (model.score_features(data["train"]["features"][batch]) - data["train"]["scores"][batch]).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 24:
            model.eval()
            with torch.no_grad():
                error = (
                    (model.score_features(data["validation"]["features"]) - data["validation"]["scores"])
                    .pow(2)
                    .mean()
                    .item()
                )
            if error < best:
                best, kept = error, {name: value.clone() for name, value in model.head.state_dict().items()}
    model.head.load_state_dict(kept)
    return best


def main() -> None:
    parser = stage_arguments(__doc__.splitlines()[0])
    parser.add_argument("--examples-only", action="store_true", help="only make the examples, beside stage 9")
    args = parser.parse_args()
    start(args)
    if args.examples_only:
        for split in N_EXAMPLES:
            examples_of(args, split)
        return None
    finished = args.work / "quality_finished.json"
    if finished.exists() and not args.force:
        return say(f"{finished} is there")
    clap, _, extractor = load_clap(str(args.checkpoints / "musicrl-tiny-adherence"))
    model = QualityModel.from_clap(clap, extractor)
    data = {split: features_of(args, model, split) for split in N_EXAMPLES}
    error = train(model, data)
    model.eval()
    test = data["test"]
    with torch.no_grad():
        predicted = model.score_features(test["features"])
        unseen = model.score_features(data["unseen"]["features"])
    results: dict = {
        "labels": "simulated by recipes/degradations.py; nobody rated anything",
        "losses": read_json(args.work / "quality_ladders.json"),
        "examples": {name: len(rows["scores"]) for name, rows in data.items()},
        "validation_rmse": round(error**0.5, 3),
        "test_rmse": round(float((predicted - test["scores"]).pow(2).mean().sqrt()), 3),
        "test_spearman": round(float(spearmanr(predicted, test["scores"]).statistic), 3),
        "unseen_kind": {
            "kind": next(iter(UNSEEN)),
            "spearman": round(float(spearmanr(unseen, data["unseen"]["scores"]).statistic), 3),
            "rmse": round(float((unseen - data["unseen"]["scores"]).pow(2).mean().sqrt()), 3),
        },
        "by_kind": {},
    }
    for index, kind in enumerate(KINDS):
        rows = test["kinds"] == index
        own = {"examples": int(rows.sum())}
        if own["examples"]:
            own["simulated_mean"] = round(float(test["scores"][rows].mean()), 2)
            own["predicted_mean"] = round(float(predicted[rows].mean()), 2)
        if own["examples"] > 10 and kind not in ("clean", "no_music"):  # these have one score only
            own["spearman"] = round(float(spearmanr(predicted[rows], test["scores"][rows]).statistic), 3)
        results["by_kind"][kind] = own
    aside = args.checkpoints / ".musicrl-tiny-quality.part"
    model.save_pretrained(aside)
    results["bytes"] = move_files(aside, args.checkpoints / "musicrl-tiny-quality")
    say(str(results))
    record(args, "quality", results)
    write_json(finished, results)


if __name__ == "__main__":
    main()
