"""Stage 4: an EnCodec at 16 kHz, 50 frames a second, 4 codebooks of 1,024 entries (2.0 kbit/s).

    python recipes/codec.py --work build/tiny --minutes 90

Trained with the `encodec` package's network, since transformers' EncodecModel passes no gradient to its encoder, and
saved as transformers' EncodecModel. It starts as a lapped cosine transform (codec_start.py) whose coefficients k-means
gives codebooks. Three stages, by share of the time:

1. quantised: all of it learns, the codebooks by exponential averages (quantiser.py);
2. decoder: encoder and codebooks are frozen. The codes are now what they will be, so stage 5 of the recipe can begin
   beside it, and more training of the decoder (decoder.py) leaves the generator valid;
3. adversarial: as before, with EnCodec's multi-scale STFT discriminator (Defossez et al. 2022), which learns alone at first,
   and with ears (ear.py). Instruments whose spectra come out worse are played more often.

What it leaves out: EnCodec's entropy coder and its own strides (8 5 4 2), which from random weights do not leave silence in
this time on a CPU.
"""

import math
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from classifier import instruments_kept
from codec_losses import (
    TRAINED_FLOOR,
    ReconstructionLoss,
    adversarial_loss,
    balanced_backward,
    discriminator_loss,
    freeze,
)
from codec_measures import evaluate
from codec_start import start_from_cosines
from common import (
    CODEBOOK_SIZE,
    FRAME_RATE,
    N_CODEBOOKS,
    SAMPLING_RATE,
    TINY_MINUTES,
    load_clips,
    load_training_state,
    random_crops,
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
from encodec import EncodecModel as EncodecPackageModel
from encodec.modules import SEANetDecoder, SEANetEncoder
from encodec.msstftd import MultiScaleSTFTDiscriminator
from encodec.quantization import ResidualVectorQuantizer
from judges import JUDGED_S, Judges
from measures import signal_to_noise_db
from mining import Mining
from quantiser import initialise_codebooks, quantise
from torch import Tensor, nn
from transformers import EncodecConfig, EncodecModel

DIMENSION, N_FILTERS, RATIOS = 128, 32, [1, 20, 16]  # a last stage at the frame rate, 256 wide
BANDWIDTH = N_CODEBOOKS * math.log2(CODEBOOK_SIZE) * FRAME_RATE / 1000  # kbit/s
STAGES = (
    ("quantised", 0.0),
    ("decoder", 0.5),
    ("adversarial", 0.6),
)  # share of time at the start
STAGE_ORDER = {"start": -1} | {name: index for index, (name, _) in enumerate(STAGES)}
FROZEN_STAGES = ("decoder", "adversarial")  # encoder and codebooks stay
CROP = {"quantised": 6400, "decoder": 6400, "adversarial": 12_800}  # samples; an ear is to hear a note end
BATCH = {"quantised": 8, "decoder": 8, "adversarial": 2}  # crops a step
LEARNING_RATE, WARMUP_STEPS = (1e-3, 3e-5), 200  # at the start, at the end of the cosine
COMMITMENT = 0.25
LOG_MEL_WEIGHT = (0.1, 2.0)  # at the start, at the end: first the notes, then the timbre
DISCRIMINATOR_FILTERS, DISCRIMINATOR_RATE = 8, 3e-4
DISCRIMINATOR_EVERY, DISCRIMINATOR_ALONE = 2, 400  # steps: it learns in every second, and alone in the first
ADVERSARIAL_SHARE, EAR_SHARE = 1.0, 2.0  # of the length of the reconstruction's gradient
SAVE_EVERY_S = 120
MEASURED_CLIPS = 60
INSTRUMENT_CLIPS = 288  # each instrument with each accompaniment and tempo once


def build() -> EncodecPackageModel:
    """The `encodec` package's model at this size; the quantiser's own forward is not used in training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the package uses torch's older weight_norm
        network = {
            "channels": 1, "dimension": DIMENSION, "n_filters": N_FILTERS, "ratios": RATIOS, "norm": "weight_norm",
            "causal": False, "lstm": 1, "n_residual_layers": 1, "residual_kernel_size": 3, "compress": 2,
            "kernel_size": 7, "last_kernel_size": 7, "true_skip": True,
        }  # fmt: skip
        encoder, decoder = SEANetEncoder(**network), SEANetDecoder(**network)
    quantizer = ResidualVectorQuantizer(dimension=DIMENSION, n_q=N_CODEBOOKS, bins=CODEBOOK_SIZE)
    model = EncodecPackageModel(encoder, decoder, quantizer, [BANDWIDTH], SAMPLING_RATE, channels=1, normalize=False)
    return use_fast_elu(model)


class Budget:
    """Which stage the training is in: it follows the time that was spent, over all restarts, not the steps."""

    def __init__(self, minutes: float, seconds: float) -> None:
        self.total, self.before, self.began = 60 * minutes, seconds, time.time()

    @property
    def seconds(self) -> float:
        return self.before + time.time() - self.began

    @property
    def done(self) -> float:
        return self.seconds / self.total

    def stage(self, reached: str = "start") -> str:
        """The stage of this moment, never one before `reached`: a longer budget does not unfreeze the encoder."""
        by_time = max(index for index, (_, begin) in enumerate(STAGES) if begin <= self.done)
        return STAGES[max(by_time, STAGE_ORDER[reached])][0]

    def decay(self) -> float:
        """From 1 to 0 along a cosine, once until the encoder is frozen and once more for the decoder alone."""
        freezing = dict(STAGES)[FROZEN_STAGES[0]]
        done = self.done / freezing if self.done < freezing else (self.done - freezing) / (1 - freezing)
        return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def begin_stage(args, model: EncodecPackageModel, stage: str, clips: np.ndarray, rng: np.random.Generator) -> None:
    """What has to be done once: k-means for the codebooks, or a first conversion when the codes are what they will be."""
    if stage == "quantised":
        n_batches = 2 if args.tiny else 15
        start_from_cosines(model, RATIOS, random_crops(clips, 200, CROP[stage] * 2, rng)[0])
        with torch.no_grad():
            crops = [random_crops(clips, 40, CROP[stage] * 2, rng)[0] for _ in range(n_batches)]
            latents = torch.cat([model.encoder(c[:, None]).transpose(1, 2).reshape(-1, DIMENSION) for c in crops])
        initialise_codebooks(model, latents, BATCH[stage] * CROP[stage] // math.prod(RATIOS))
        say(f"codebooks initialised from {len(latents)} latents")
    if stage == "decoder":
        parity = convert(model.eval(), args.work / "codec", to_float(clips[:1])[None])
        say(f"encoder and codebooks frozen: {parity}")
        model.train()


def decode_crops(model: EncodecPackageModel, wave: Tensor, stage: str) -> tuple[Tensor, Tensor]:
    """Crops [B, T] through the codec as far as `stage` has it, and the commitment loss."""
    is_frozen = stage in FROZEN_STAGES
    with torch.set_grad_enabled(not is_frozen):
        latents = model.encoder(wave[:, None])
        latents, commitment = quantise(model, latents, update=not is_frozen)
    return model.decoder(latents)[:, 0, : wave.shape[1]], commitment


def train_discriminator(
    discriminator: nn.Module, optimizer: torch.optim.Optimizer, wave: Tensor, output: Tensor
) -> None:
    """One step of the discriminator on waves and what the codec made of them [B, T]."""
    freeze(discriminator, False)
    logits, _ = discriminator(torch.cat([wave, output.detach()])[:, None])
    halves = [scale.chunk(2) for scale in logits]
    optimizer.zero_grad()
    discriminator_loss([real for real, _ in halves], [fake for _, fake in halves]).backward()
    optimizer.step()
    freeze(discriminator, True)


def opinion(discriminator: nn.Module, wave: Tensor, output: Tensor) -> Tensor:
    """What the decoder is to minimise: `adversarial_loss` of waves and outputs [B, T]."""
    with torch.no_grad():
        _, real_features = discriminator(wave[:, None])
    fake, fake_features = discriminator(output[:, None])
    return adversarial_loss(fake, real_features, fake_features)


def train(args, model: EncodecPackageModel, clips: np.ndarray, rows: list[dict], ears: Ears) -> dict:
    """Train until `args.minutes` are spent, over all restarts."""
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE[0], betas=(0.8, 0.95), weight_decay=1e-4)
    discriminator = MultiScaleSTFTDiscriminator(filters=DISCRIMINATOR_FILTERS)
    opponent = torch.optim.AdamW(discriminator.parameters(), lr=DISCRIMINATOR_RATE, betas=(0.5, 0.9))
    folder, opponent_folder = args.work / "codec_training", args.work / "codec_training_discriminator"
    progress = load_training_state(folder, model, optimizer)
    progress = progress or {"step": 0, "seconds": 0.0, "stage": "start", "steps": dict.fromkeys(dict(STAGES), 0)}
    load_training_state(opponent_folder, discriminator, opponent)
    if progress["step"]:
        say(f"resumed at step {progress['step']}, {progress['seconds'] / 60:.1f} min")
    rng = np.random.default_rng([args.seed, progress["step"]])
    mining = Mining([row["instrument"] for row in rows], progress.get("mel_distances", {}))
    criterion, losses, ratios = ReconstructionLoss(), [], []
    budget, saved_at, told_at = Budget(args.minutes, progress["seconds"]), time.time(), time.time()
    while budget.done < 1:
        stage, done = budget.stage(progress["stage"]), budget.done
        for name in [
            name for name, _ in STAGES if STAGE_ORDER[progress["stage"]] < STAGE_ORDER[name] <= STAGE_ORDER[stage]
        ]:
            begin_stage(args, model, name, clips, rng)
        progress["stage"] = stage
        rate = LEARNING_RATE[1] + (LEARNING_RATE[0] - LEARNING_RATE[1]) * budget.decay()
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (progress["step"] + 1) / WARMUP_STEPS)
        chosen = mining.choose(BATCH[stage], rng) if stage == "adversarial" else None
        wave, chosen = random_crops(clips, BATCH[stage], CROP[stage], rng, chosen)
        output, commitment = decode_crops(model, wave, stage)
        mel_weight = LOG_MEL_WEIGHT[0] + (LOG_MEL_WEIGHT[1] - LOG_MEL_WEIGHT[0]) * done
        loss = criterion(wave, output, mel_weight) + COMMITMENT * commitment
        optimizer.zero_grad()
        if stage == "adversarial":
            # The discriminator learns alone at first: an untrained one only adds noise to the decoder's gradient.
            is_alone = progress["steps"][stage] < DISCRIMINATOR_ALONE
            if is_alone or progress["step"] % DISCRIMINATOR_EVERY == 0:
                train_discriminator(discriminator, opponent, wave, output)
            share = 0.0 if is_alone else ADVERSARIAL_SHARE
            others = [(opinion(discriminator, wave, output), share), (ears.distance(wave, output), EAR_SHARE)]
            balanced_backward(output, loss, others)
            with torch.no_grad():
                mining.learn(chosen, criterion.mel_distances(wave, output, TRAINED_FLOOR).tolist())
        else:
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        losses.append(loss.item())
        ratios.append(signal_to_noise_db(wave.numpy(), output.detach().numpy()))
        progress["steps"][stage] += 1
        progress |= {"step": progress["step"] + 1, "seconds": budget.seconds, "mel_distances": mining.distances}
        if time.time() - told_at > 30:
            told_at = time.time()
            say(
                f"codec {budget.seconds / 60:.1f} of {args.minutes} min, step {progress['step']}, {stage}, "
                f"loss {np.mean(losses[-100:]):.3f}, SNR {np.mean(ratios[-100:]):.2f} dB"
            )
        if time.time() - saved_at > SAVE_EVERY_S:
            saved_at = time.time()
            save_training_state(opponent_folder, discriminator, opponent, {"step": progress["step"]})
            save_training_state(folder, model, optimizer, progress)
    # A budget of seconds may pass a stage without a step in it: the codebooks are needed all the same.
    for name in [name for name, _ in STAGES if STAGE_ORDER[name] > STAGE_ORDER[progress["stage"]]]:
        begin_stage(args, model, name, clips, rng)
        progress["stage"] = name
    save_training_state(opponent_folder, discriminator, opponent, {"step": progress["step"]})
    save_training_state(folder, model, optimizer, progress)
    return progress


def transformers_config() -> EncodecConfig:
    """The same network in transformers' words."""
    return EncodecConfig(
        target_bandwidths=[BANDWIDTH],
        sampling_rate=SAMPLING_RATE,
        audio_channels=1,
        normalize=False,
        chunk_length_s=None,
        overlap=None,
        hidden_size=DIMENSION,
        num_filters=N_FILTERS,
        num_residual_layers=1,
        upsampling_ratios=RATIOS,
        norm_type="weight_norm",
        kernel_size=7,
        last_kernel_size=7,
        residual_kernel_size=3,
        dilation_growth_rate=2,
        use_causal_conv=False,
        pad_mode="reflect",
        compress=2,
        num_lstm_layers=1,
        codebook_size=CODEBOOK_SIZE,
        codebook_dim=DIMENSION,
        use_conv_shortcut=False,
    )


@torch.no_grad()
def convert(model: EncodecPackageModel, folder: Path, clip: Tensor) -> dict:
    """Save as transformers' EncodecModel and compare both on one clip [1, 1, T]: codes and wave."""
    from musicrl_hf.codec_conversion import convert_encodec_state_dict

    converted = EncodecModel(transformers_config()).eval()
    converted.load_state_dict(convert_encodec_state_dict(model.state_dict()))
    converted.save_pretrained(folder)
    codes = model.quantizer.vq.encode(model.encoder(clip), n_q=N_CODEBOOKS).transpose(0, 1)
    wave = model.decoder(model.quantizer.vq.decode(codes.transpose(0, 1)))
    codes_converted = converted.encode(clip).audio_codes[0]
    wave_converted = converted.decode(codes_converted[None], [None]).audio_values
    return {
        "codes_equal": bool((codes == codes_converted).all()),
        "codes_shape": list(codes_converted.shape),
        "largest_wave_difference": float((wave - wave_converted).abs().max()),
    }


@torch.no_grad()
def measure_instruments(judges: Judges, model: EncodecModel, clips: np.ndarray, rows: list[dict]) -> dict[str, float]:
    """`instruments_kept` on the first seconds of int16 clips [N, T]."""
    audio = to_float(clips[:, : JUDGED_S * SAMPLING_RATE])
    decoded = torch.cat([model(some[:, None]).audio_values[:, 0] for some in audio.split(20)])
    return instruments_kept(judges.classifier, audio, decoded, rows)


def forget_further_training(work: Path) -> None:
    """Let decoder.py begin anew: what it left went on from another decoder."""
    for name in ("decoder_finished.json", "decoder_before.json", "decoder_before.safetensors"):
        (work / name).unlink(missing_ok=True)
    shutil.rmtree(work / "decoder_training", ignore_errors=True)


def main() -> None:
    args = stage_arguments(__doc__.splitlines()[0], minutes=90).parse_args()
    start(args)
    folder, finished = args.work / "codec", args.work / "codec_finished.json"
    if finished.exists() and not args.force:
        return say(f"{finished} is there")
    clips, rows = load_clips(args.work, "train")
    model = build()
    model.train()
    ears = load_or_train_ears(args.work, clips, rows, args.seed, TINY_MINUTES if args.tiny else EAR_MINUTES)
    progress = train(args, model, clips, rows, ears)
    model.eval()
    held_out, rows = load_clips(args.work, "test")
    parity = convert(model, folder, to_float(held_out[0])[None, None])
    forget_further_training(args.work)
    converted = use_fast_elu(EncodecModel.from_pretrained(folder).eval())
    n_clips = 4 if args.tiny else MEASURED_CLIPS
    results = evaluate(converted, held_out[:n_clips])
    measured = slice(n_clips if args.tiny else INSTRUMENT_CLIPS)
    results["instruments"] = measure_instruments(Judges.load(args.work), converted, held_out[measured], rows[measured])
    other_font, _ = load_clips(args.work, "test_other_font")
    results["other_sound_font"] = evaluate(converted, other_font[:n_clips])
    size = sum(p.numel() for p in model.encoder.parameters()) + sum(p.numel() for p in model.decoder.parameters())
    results |= {"bandwidth_kbps": BANDWIDTH, "network_parameters": size, "parity_with_encodec_package": parity}
    results |= {"steps": progress["steps"], "minutes": round(progress["seconds"] / 60, 1)}
    say(str(results))
    record(args, "codec", results)
    write_json(finished, results)


if __name__ == "__main__":
    main()
