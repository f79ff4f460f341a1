"""Stage 6: the codec's decoder once more, from the codes of whole clips.

    python recipes/decoder.py --work build/tiny --minutes 60

What codec.py decodes is a crop with nothing before it, so its decoder hardly learns to remember what it has heard. Here
the part of the decoder at the frame rate is given the seconds before a crop as well; the rest, which is what costs, is
given the crop alone. Encoder and codebooks stay, and with them codes and generator. Instruments that the ears (ear.py)
take for others are played more often. What it leads to is a running average of the weights (Polyak and Juditsky 1992): of
steps that see one crop each, every single one is far from where they lead. What is kept is a mean of that and of the weights
before (Wortsman et al. 2022): it has nearly all of the gain, and less of the noise that steps without an adversary bring.

It changes WORK/codec, which the generator's stage takes into its checkpoint at its end; where that stage has ended,
`python recipes/generator.py --export` does it again. `--force` with more `--minutes` goes on.
"""

import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from codec import INSTRUMENT_CLIPS, MEASURED_CLIPS, measure_instruments
from codec_losses import ReconstructionLoss, balanced_backward
from codec_measures import entries_used, evaluate
from common import (
    FRAME_RATE,
    SAMPLING_RATE,
    TINY_MINUTES,
    load_clips,
    load_training_state,
    read_json,
    record,
    save_training_state,
    say,
    stage_arguments,
    start,
    to_float,
    write_json,
)
from ear import MINUTES as EAR_MINUTES
from ear import Ears, load_or_train_ears
from elu import use_fast_elu
from judges import Judges
from mining import Mining
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import EncodecModel

from musicrl_hf.audio import atomic_path

HOP = SAMPLING_RATE // FRAME_RATE  # samples a frame
BEFORE, CROP, AFTER = (
    150,
    100,
    8,
)  # frames: heard before a crop, decoded, and heard after it, as convolutions look ahead
MARGIN = 2  # frames that are decoded on either side of a crop and cut off
LEARNING_RATE, WARMUP_STEPS = (3e-4, 3e-5), 200  # at the start, at the end of the cosine
LOG_MEL_WEIGHT, EAR_SHARE = 3.0, 5.0
AVERAGING = 0.999  # of a step's weights
SHARE_BEFORE = 0.3  # of the weights before, in those that are kept
SAVE_EVERY_S = 120


def decode_crop(decoder: nn.Module, latents: Tensor, begin: int, length: int) -> Tensor:
    """The wave [B, length * HOP] of frames `begin` to `begin + length` of latents [B, D, F].

    All layers up to the first that leaves the frame rate are given all frames; the others the crop and `MARGIN` frames on
    either side, or fewer where the latents end, so that it is, to rounding, what decoding all frames would give there.
    """
    layers = list(decoder.layers)
    slow = next(i for i, layer in enumerate(layers) if getattr(layer, "conv", None) is not None and _stride(layer) > 1)
    for layer in layers[: slow - 1]:  # before it stands its activation
        latents = layer(latents)
    cut = min(begin, MARGIN)
    wave = latents[:, :, begin - cut : begin + length + MARGIN]
    for layer in layers[slow - 1 :]:
        wave = layer(wave)
    return wave[:, 0, cut * HOP : (cut + length) * HOP]


def _stride(layer: nn.Module) -> int:
    return layer.conv.stride[0]


def choose_frames(n_frames: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """Where the frames that are heard begin and end in a clip of `n_frames`, and where the crop begins in it."""
    begin = int(rng.integers(n_frames - CROP + 1))
    return max(0, begin - BEFORE), min(begin + CROP + AFTER, n_frames), begin


def train(args, model: EncodecModel, codes: Tensor, clips: np.ndarray, rows: list[dict], ears: Ears) -> dict:
    """Train the decoder until `args.minutes` are spent, over all restarts, and leave the averaged weights in `model`."""
    decoder = model.decoder.train()
    averaged = AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING))
    both = nn.ModuleDict({"decoder": decoder, "averaged": averaged})
    parameters = list(decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE[0], betas=(0.8, 0.95), weight_decay=1e-4)
    folder = args.work / "decoder_training"
    progress = load_training_state(folder, both, optimizer) or {"step": 0, "seconds": 0.0, "log": []}
    rng = np.random.default_rng([args.seed, progress["step"]])
    mining = Mining([row["instrument"] for row in rows], progress.get("ear_distances", {}))
    criterion, losses, spent_before = ReconstructionLoss(), [], progress["seconds"]
    began, saved_at, told_at = time.time(), time.time(), time.time()
    while progress["seconds"] < 60 * args.minutes:
        done = progress["seconds"] / (60 * args.minutes)
        rate = LEARNING_RATE[1] + (LEARNING_RATE[0] - LEARNING_RATE[1]) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (progress["step"] + 1) / WARMUP_STEPS)
        clip = int(mining.choose(1, rng)[0])
        first, end, begin = choose_frames(codes.shape[2], rng)
        wave = to_float(clips[clip, None, begin * HOP : (begin + CROP) * HOP])
        if not wave.any():
            continue  # silence has no spectrum to be compared with
        with torch.no_grad():
            latents = model.quantizer.decode(codes[None, clip, :, first:end].long().transpose(0, 1))
        output = decode_crop(decoder, latents, begin - first, CROP)
        loss, misheard = criterion(wave, output, LOG_MEL_WEIGHT), ears.distance(wave, output)
        optimizer.zero_grad()
        balanced_backward(output, loss, [(misheard, EAR_SHARE)])
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        averaged.update_parameters(decoder)
        mining.learn([clip], [misheard.item()])
        losses.append([loss.item(), misheard.item()])
        progress |= {"step": progress["step"] + 1, "seconds": spent_before + time.time() - began}
        progress |= {"ear_distances": mining.distances}
        if time.time() - told_at > 30:
            told_at, means = time.time(), np.mean(losses[-500:], 0).round(4).tolist()
            progress["log"] = [*progress["log"], [progress["step"], *means]]
            say(
                f"decoder {progress['seconds'] / 60:.1f} of {args.minutes:g} min, step {progress['step']}, "
                f"loss {means[0]:.3f}, ears {means[1]:.3f}"
            )
        if time.time() - saved_at > SAVE_EVERY_S:
            saved_at = time.time()
            save_training_state(folder, both, optimizer, progress)
    save_training_state(folder, both, optimizer, progress)
    decoder.load_state_dict(averaged.module.state_dict())
    model.eval()
    return progress


def mix(decoder: nn.Module, before: dict[str, Tensor], share: float) -> None:
    """Leave in `decoder` the mean of its weights and of those `before`, whose part in it is `share`."""
    now = decoder.state_dict()
    decoder.load_state_dict({name: torch.lerp(now[name], before[name].to(now[name]), share) for name in now})


def measure(args, model: EncodecModel) -> dict:
    """What codec.py measures of a codec, on the test clips and by the other sound font."""
    held_out, rows = load_clips(args.work, "test")
    n_clips, n_named = (4, 4) if args.tiny else (MEASURED_CLIPS, INSTRUMENT_CLIPS)
    results = evaluate(model, held_out[:n_clips])
    results["instruments"] = measure_instruments(Judges.load(args.work), model, held_out[:n_named], rows[:n_named])
    results["instruments_of_all"] = measure_instruments(Judges.load(args.work), model, held_out, rows)
    results["codebooks_of_all"] = entries_used(model, held_out)
    results["other_sound_font"] = evaluate(model, load_clips(args.work, "test_other_font")[0][:n_clips])
    return results


def replace_codec(model: EncodecModel, folder: Path) -> None:
    """Put the trained codec in the place of the one in `folder`."""
    aside = folder.with_name(folder.name + ".part")
    model.save_pretrained(aside)
    for path in sorted(aside.iterdir(), key=lambda path: path.suffix != ".safetensors"):
        os.replace(path, folder / path.name)
    aside.rmdir()


def main() -> None:
    args = stage_arguments(__doc__.splitlines()[0], minutes=60).parse_args()
    start(args)
    finished = args.work / "decoder_finished.json"
    if finished.exists() and not args.force:
        return say(f"{finished} is there")
    clips, rows = load_clips(args.work, "train")
    codes = load_file(args.work / "codes_train.safetensors")["codes"]
    clips, rows = clips[: len(codes)], rows[: len(codes)]
    model = use_fast_elu(EncodecModel.from_pretrained(args.work / "codec").eval())
    ears = load_or_train_ears(args.work, clips, rows, args.seed, TINY_MINUTES if args.tiny else EAR_MINUTES)
    noted, kept = args.work / "decoder_before.json", args.work / "decoder_before.safetensors"
    if not noted.exists():  # once: a second start finds the trained decoder in its place
        with atomic_path(kept) as temporary:
            save_file(model.decoder.state_dict(), temporary)
        write_json(noted, measure(args, model))
    progress = train(args, model, codes, clips, rows, ears)
    mix(model.decoder, load_file(kept), SHARE_BEFORE)
    replace_codec(model, args.work / "codec")
    results = measure(args, model) | {"before": read_json(noted), "step": progress["step"], "log": progress["log"]}
    results["minutes"] = round(progress["seconds"] / 60, 1)
    say(str({name: value for name, value in results.items() if name != "log"}))
    record(args, "decoder", results)
    write_json(finished, results)


if __name__ == "__main__":
    main()
