"""Stage 5b, for a GPU: the codec's decoder once more, on batches of a size for which a CPU has no time.

    python recipes/polish.py --work build/tiny --device cuda --minutes 4

The codes are what stage 5 wrote, of whole clips, so the encoder does not run; the generator stays valid. The losses are
those of the codec's adversarial stage (codec.py), the discriminator is a wider one that begins anew. Where its minutes are
spent it only saves and measures: so training can be done on one machine, and the measuring on another.
"""

import math
import time

import numpy as np
import torch
from codec import ADVERSARIAL_SHARE, EAR_SHARE, build, opinion, publish, train_discriminator
from codec_losses import TRAINED_FLOOR, ReconstructionLoss, balanced_backward
from common import (
    TINY_MINUTES,
    load_clips,
    load_training_state,
    read_json,
    save_training_state,
    say,
    stage_arguments,
    start,
    to_float,
)
from ear import MINUTES as EAR_MINUTES
from ear import Ears, load_or_train_ears
from encodec import EncodecModel as EncodecPackageModel
from encodec.msstftd import MultiScaleSTFTDiscriminator
from mining import Mining
from safetensors.torch import load_file
from torch import Tensor, nn

FRAME = 320  # samples
CROP_FRAMES = 50
LEARNING_RATE, WARMUP_STEPS = (4e-4, 2e-5), 100  # at the start, at the end of the cosine
LOG_MEL_WEIGHT = 2.0
DISCRIMINATOR_FILTERS, DISCRIMINATOR_RATE, DISCRIMINATOR_ALONE = 16, 3e-4, 200  # the last in steps
SAVE_EVERY_S, TELL_EVERY = 60, 100  # steps


def draw(clips: np.ndarray, codes: Tensor, chosen: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Crops of the clips `chosen` [B]: waves [B, T] and their codes [K, B, F]."""
    begins = rng.integers(codes.shape[-1] - CROP_FRAMES + 1, size=len(chosen))
    pairs = list(zip(chosen, begins, strict=True))
    waves = np.stack([clips[i, f * FRAME : (f + CROP_FRAMES) * FRAME] for i, f in pairs])
    some = torch.stack([codes[i, :, f : f + CROP_FRAMES] for i, f in pairs], 1)
    return to_float(waves), some.long()


def train(args, model: EncodecPackageModel, clips: np.ndarray, rows: list[dict], ears: Ears) -> dict:
    """Train the decoder until `args.minutes` are spent, over all restarts."""
    codes = load_file(args.work / "codes_train.safetensors")["codes"]
    parameters = list(model.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE[0], betas=(0.8, 0.95), weight_decay=1e-4)
    discriminator = MultiScaleSTFTDiscriminator(filters=DISCRIMINATOR_FILTERS)
    opponent = torch.optim.AdamW(discriminator.parameters(), lr=DISCRIMINATOR_RATE, betas=(0.5, 0.9))
    folder, opponent_folder = args.work / "polish_training", args.work / "polish_training_discriminator"
    progress = load_training_state(folder, model, optimizer)
    if progress is None:
        before = load_training_state(args.work / "codec_training", model, torch.optim.AdamW(model.parameters()))
        if before is None:
            raise SystemExit(f"{args.work / 'codec_training'} is missing: codec.py comes first")
        progress = {"step": 0, "seconds": 0.0, "mel_distances": before["mel_distances"], "log": []}
    load_training_state(opponent_folder, discriminator, opponent)
    seconds_before, began, saved_at = progress["seconds"], time.time(), time.time()
    if seconds_before >= 60 * args.minutes:
        return progress
    for part in (model, discriminator, ears):
        part.to(args.device)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    rng = np.random.default_rng([args.seed, progress["step"]])
    mining = Mining([row["instrument"] for row in rows[: len(codes)]], progress["mel_distances"])
    criterion, losses = ReconstructionLoss(args.device), []
    torch.backends.cudnn.benchmark = True  # all batches are alike
    while progress["seconds"] < 60 * args.minutes:
        done = progress["seconds"] / (60 * args.minutes)
        decay = 0.5 * (1 + math.cos(math.pi * done))
        warm = min(1.0, (progress["step"] + 1) / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = warm * (LEARNING_RATE[1] + (LEARNING_RATE[0] - LEARNING_RATE[1]) * decay)
        chosen = mining.choose(args.crops, rng)
        wave, some = (it.to(args.device) for it in draw(clips, codes, chosen, rng))
        output = model.decoder(model.quantizer.vq.decode(some))[:, 0, : wave.shape[1]]
        loss = criterion(wave, output, LOG_MEL_WEIGHT)
        optimizer.zero_grad()
        train_discriminator(discriminator, opponent, wave, output)
        share = 0.0 if progress["step"] < DISCRIMINATOR_ALONE else ADVERSARIAL_SHARE
        heard = ears.distance(wave, output)
        balanced_backward(output, loss, [(opinion(discriminator, wave, output), share), (heard, EAR_SHARE)])
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        with torch.no_grad():
            mel = criterion.mel_distances(wave, output, TRAINED_FLOOR)
            told = torch.cat([mel, torch.stack([loss, heard])]).tolist()
        mining.learn(chosen.tolist(), told[:-2])
        losses = [*losses[1 - TELL_EVERY :], [np.mean(told[:-2]), *told[-2:]]]
        progress |= {"step": progress["step"] + 1, "seconds": seconds_before + time.time() - began}
        if progress["step"] % TELL_EVERY == 0:
            means = np.mean(losses, 0).round(4).tolist()
            progress["log"].append([progress["step"], round(progress["seconds"] / 60, 2), *means])
            mel, loss, heard = means
            say(f"polish {progress['seconds']:.0f} s, step {progress['step']}: mel {mel}, loss {loss}, ears {heard}")
        if time.time() - saved_at > SAVE_EVERY_S or progress["seconds"] >= 60 * args.minutes:
            saved_at = time.time()
            progress |= {"mel_distances": mining.distances, "device": where, "crops": args.crops}
            save_training_state(opponent_folder, discriminator, opponent, {"step": progress["step"]})
            save_training_state(folder, model, optimizer, progress)
    model.to("cpu")
    return progress


def main() -> None:
    parser = stage_arguments(__doc__.splitlines()[0], minutes=4)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--crops", type=int, default=48, help="crops a batch")
    parser.add_argument("--train_only", action="store_true", help="save the training's state and measure nothing")
    args = parser.parse_args()
    start(args)
    clips, rows = load_clips(args.work, "train")
    model = build()
    model.train()
    ears = load_or_train_ears(args.work, clips, rows, args.seed, TINY_MINUTES if args.tiny else EAR_MINUTES)
    progress = train(args, model, clips, rows, ears)
    if args.train_only:
        return
    codec = read_json(args.work / "codec_training" / "progress.json")
    spent = {"steps": codec["steps"], "minutes": round(codec["seconds"] / 60, 1)}
    polish = {name: progress[name] for name in ("step", "device", "crops", "log")}
    polish["minutes"] = round(progress["seconds"] / 60, 2)
    publish(args, model, spent | {"polish": polish})


if __name__ == "__main__":
    main()
