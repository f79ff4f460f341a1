"""Stage 3: an EnCodec at 16 kHz, 50 frames a second, 4 codebooks of 512 entries (1.8 kbit/s).

    python recipes/codec.py --work build/tiny --minutes 50

Trained with the `encodec` package's network, since transformers' EncodecModel passes no gradient to its encoder, and
saved as transformers' EncodecModel. First without a quantiser, then k-means on the latents, then with EMA codebooks
(van den Oord et al. 2017, appendix A; residual quantisation as in Zeghidour et al. 2021, SoundStream).

For the second half of the time encoder and codebooks are frozen and only the decoder learns: the codes are then what
they will be, so stage 4 can begin beside it, and more minutes for the decoder later leave the generator valid.

What it leaves out: EnCodec's discriminators, its loss balancer and its entropy coder. EnCodec's own strides (8 5 4 2)
do not leave silence in this time on a CPU; two large strides and an LSTM do within a minute.
"""

import math
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from common import (
    CODEBOOK_SIZE,
    FRAME_RATE,
    N_CODEBOOKS,
    SAMPLING_RATE,
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
from elu import use_fast_elu
from encodec import EncodecModel as EncodecPackageModel
from encodec.modules import SEANetDecoder, SEANetEncoder
from encodec.quantization import ResidualVectorQuantizer
from measures import chroma_cosine, signal_to_noise_db
from torch import Tensor, nn
from transformers import EncodecConfig, EncodecModel

DIMENSION, N_FILTERS, RATIOS = 128, 32, [20, 16]
BANDWIDTH = N_CODEBOOKS * math.log2(CODEBOOK_SIZE) * FRAME_RATE / 1000  # kbit/s
CROP = 6400  # samples, 0.4 s
UNQUANTISED_SHARE = 0.26  # of the training time
DECODER_ONLY_FROM = 0.56  # likewise
BATCH = (4, 8)  # crops a step, without and with the quantiser
LEARNING_RATE = (1e-3, 5e-5)  # at the start, at the end of the cosine
EMA_DECAY, DEAD_SHARE = 0.99, 0.05  # an entry used less than this share of the mean use is replaced
COMMITMENT = 0.25
LOG_MEL_WEIGHT = (0.02, 0.4)  # at the start, at the end: first the notes, then the timbre
SAVE_EVERY_S = 120
STFT_SIZES = (512, 2048)
MEL_SIZE, N_MELS, MEL_FLOOR = 1024, 64, 0.05


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


def codebooks(model: EncodecPackageModel) -> list[nn.Module]:
    """The K codebooks, each with buffers embed [V, D], embed_avg [V, D], cluster_size [V], inited [1]."""
    return [layer._codebook for layer in model.quantizer.vq.layers]


def nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    """Index [N] of the entry of [V, D] nearest to each of [N, D]."""
    return (entries.pow(2).sum(1) - 2 * vectors @ entries.T).argmin(1)


@torch.no_grad()
def k_means(vectors: Tensor, n_clusters: int, iterations: int = 15) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random vectors: centres [V, D] and sizes [V]."""
    centres = vectors[torch.randperm(len(vectors))[:n_clusters]].clone()
    for _ in range(iterations):
        index = nearest(vectors, centres)
        sizes = torch.bincount(index, minlength=n_clusters).float()
        sums = torch.zeros_like(centres).index_add_(0, index, vectors)
        centres = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp(min=1), centres)
    return centres, sizes


@torch.no_grad()
def initialise_codebooks(model: EncodecPackageModel, vectors: Tensor, batch_vectors: int) -> None:
    """k-means of the latents [N, D], then of what the first codebook leaves over, and so on."""
    for book in codebooks(model):
        centres, sizes = k_means(vectors, CODEBOOK_SIZE)
        book.embed.copy_(centres)
        book.cluster_size.copy_(sizes * batch_vectors / len(vectors))  # as an average over steps would have it
        book.embed_avg.copy_(centres * book.cluster_size[:, None])
        book.inited.fill_(1)
        vectors = vectors - centres[nearest(vectors, centres)]


def quantise(model: EncodecPackageModel, latents: Tensor, update: bool) -> tuple[Tensor, Tensor]:
    """Latents [B, D, F] to their quantised value, gradient passed straight through, and the commitment loss.

    With `update` the codebooks follow the latents by exponential averages, and dead entries restart at a latent of
    this batch, its averages included: otherwise the next update would put the old entry back.
    """
    vectors = latents.transpose(1, 2).reshape(-1, DIMENSION)
    residual, total, commitment = vectors, torch.zeros_like(vectors), 0.0
    for book in codebooks(model):
        index = nearest(residual.detach(), book.embed)
        value = book.embed[index]
        commitment = commitment + (residual - value).pow(2).mean()
        total = total + value
        if update:
            with torch.no_grad():
                source = residual.detach()
                sizes = torch.bincount(index, minlength=CODEBOOK_SIZE).float()
                book.cluster_size.mul_(EMA_DECAY).add_(sizes, alpha=1 - EMA_DECAY)
                sums = torch.zeros_like(book.embed).index_add_(0, index, source)
                book.embed_avg.mul_(EMA_DECAY).add_(sums, alpha=1 - EMA_DECAY)
                mean_size = len(source) / CODEBOOK_SIZE
                dead = book.cluster_size < DEAD_SHARE * mean_size
                book.cluster_size[dead] = mean_size / 2
                book.embed_avg[dead] = source[torch.randint(len(source), (int(dead.sum()),))] * mean_size / 2
                book.embed.copy_(book.embed_avg / book.cluster_size[:, None].clamp(min=1e-5))
        residual = residual - value.detach()
    passed = vectors + (total - vectors).detach()
    return passed.reshape(latents.shape[0], -1, DIMENSION).transpose(1, 2), commitment


def mel_filters() -> Tensor:
    """Triangular filters [mels, bins] between 40 Hz and 8 kHz on the HTK mel scale."""
    mel = np.linspace(2595 * np.log10(1 + 40 / 700), 2595 * np.log10(1 + 8000 / 700), N_MELS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bins = np.fft.rfftfreq(MEL_SIZE, 1 / SAMPLING_RATE)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.tensor(np.maximum(0, np.minimum(rising, falling)), dtype=torch.float32)


class ReconstructionLoss:
    """L1 on the wave, on the complex and on the magnitude spectrum, relative to the clip, and on the log mel."""

    def __init__(self) -> None:
        self.windows = {size: torch.hann_window(size) for size in {*STFT_SIZES, MEL_SIZE}}
        self.filters = mel_filters()

    def spectrum(self, wave: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Complex spectrum and magnitude [B, bins, frames] of [B, T]."""
        z = torch.stft(wave, size, size // 4, window=self.windows[size], return_complex=True)
        return z, (z.real**2 + z.imag**2 + 1e-8).sqrt()

    def __call__(self, target: Tensor, output: Tensor, log_mel_weight: float) -> Tensor:
        loss = (target - output).abs().sum() / target.abs().sum()
        for size in STFT_SIZES:
            (z, magnitude), (z_out, magnitude_out) = self.spectrum(target, size), self.spectrum(output, size)
            difference = z - z_out
            scale = 2 * len(STFT_SIZES)
            loss = loss + (difference.real.abs() + difference.imag.abs()).sum() / (
                (z.real.abs() + z.imag.abs()).sum() * scale
            )
            loss = loss + (magnitude - magnitude_out).abs().sum() / (magnitude.sum() * scale)
        log_mel, log_mel_out = (
            torch.log(self.filters @ self.spectrum(wave, MEL_SIZE)[1] + MEL_FLOOR) for wave in (target, output)
        )
        return loss + log_mel_weight * (log_mel - log_mel_out).abs().mean()


def train(args, model: EncodecPackageModel, clips: np.ndarray) -> dict:
    """Train until `args.minutes` are spent, over all restarts; the schedule follows the time, not the steps."""
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE[0], betas=(0.8, 0.95), weight_decay=1e-4)
    folder = args.work / "codec_training"
    progress = load_training_state(folder, model, optimizer) or {"step": 0, "seconds": 0.0}
    frozen = progress.get("frozen", False)
    if progress["step"]:
        say(f"resumed at step {progress['step']}, {progress['seconds'] / 60:.1f} min")
    rng = np.random.default_rng(args.seed + progress["step"])
    criterion, losses, ratios = ReconstructionLoss(), [], []
    began, spent_before, saved_at, told_at = time.time(), progress["seconds"], time.time(), time.time()
    while progress["seconds"] < 60 * args.minutes:
        done = progress["seconds"] / (60 * args.minutes)
        quantised = frozen or done >= UNQUANTISED_SHARE
        if quantised and not codebooks(model)[0].inited.item():
            with torch.no_grad():
                crops = [random_crops(clips, 40, CROP * 2, rng)[0] for _ in range(15)]
                latents = torch.cat([model.encoder(c[:, None]).transpose(1, 2).reshape(-1, DIMENSION) for c in crops])
            initialise_codebooks(model, latents, BATCH[1] * CROP // math.prod(RATIOS))
            say(f"codebooks initialised from {len(latents)} latents")
        decay = 0.5 * (1 + math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE[1] + (LEARNING_RATE[0] - LEARNING_RATE[1]) * decay
        if done >= DECODER_ONLY_FROM and not frozen:
            frozen = True
            save_training_state(folder, model, optimizer, progress | {"frozen": True})
            say(
                f"encoder and codebooks frozen: {convert(model.eval(), args.work / 'codec', to_float(clips[:1])[None])}"
            )
            model.train()
        wave, _ = random_crops(clips, BATCH[quantised], CROP, rng)
        commitment = 0.0
        with torch.set_grad_enabled(not frozen):
            latents = model.encoder(wave[:, None])
            if quantised:
                latents, commitment = quantise(model, latents, update=not frozen)
        output = model.decoder(latents)[:, 0, :CROP]
        mel_weight = LOG_MEL_WEIGHT[0] + (LOG_MEL_WEIGHT[1] - LOG_MEL_WEIGHT[0]) * done
        loss = criterion(wave, output, mel_weight) + COMMITMENT * commitment
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        losses.append(loss.item())
        ratios.append(signal_to_noise_db(wave.numpy(), output.detach().numpy()))
        spent = spent_before + time.time() - began
        progress = {"step": progress["step"] + 1, "seconds": spent, "frozen": frozen}
        if time.time() - told_at > 30:
            told_at = time.time()
            minutes = progress["seconds"] / 60
            stage = "decoder only" if frozen else "quantised" if quantised else "continuous"
            say(
                f"codec {minutes:.1f} of {args.minutes} min, step {progress['step']}, "
                f"{stage}, loss {np.mean(losses[-100:]):.3f}, "
                f"SNR {np.mean(ratios[-100:]):.2f} dB"
            )
        if time.time() - saved_at > SAVE_EVERY_S:
            saved_at = time.time()
            save_training_state(folder, model, optimizer, progress)
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
def evaluate(model: EncodecModel, clips: np.ndarray) -> dict:
    """Encode and decode held-out clips [N, T]; with all codebooks and with the first few."""
    results: dict = {"clips": len(clips)}
    used = [set() for _ in range(N_CODEBOOKS)]
    scores: dict[int, list] = {k: [] for k in range(1, N_CODEBOOKS + 1)}
    for clip in clips:
        wave = to_float(clip)[None, None]
        codes = model.encode(wave).audio_codes
        for k in range(N_CODEBOOKS):
            used[k].update(codes[0, 0, k].tolist())
        for k, found in scores.items():
            output = model.decode(codes[:, :, :k], [None]).audio_values[0, 0].numpy()
            found.append((signal_to_noise_db(wave[0, 0].numpy(), output), chroma_cosine(wave[0, 0].numpy(), output)))
    results["codebook_entries_used"] = [len(entries) for entries in used]
    for k, found in scores.items():
        snr, chroma = np.mean(found, axis=0)
        results[f"{k}_codebooks"] = {"snr_db": round(float(snr), 2), "chroma_cosine": round(float(chroma), 4)}
    return results


def main() -> None:
    args = stage_arguments(__doc__.splitlines()[0], minutes=50).parse_args()
    start(args)
    folder, finished = args.work / "codec", args.work / "codec_finished.json"
    if finished.exists() and not args.force:
        return say(f"{finished} is there")
    clips, _ = load_clips(args.work, "train")
    model = build()
    model.train()
    progress = train(args, model, clips)
    model.eval()
    held_out, _ = load_clips(args.work, "test")
    parity = convert(model, folder, to_float(held_out[0])[None, None])
    results = evaluate(use_fast_elu(EncodecModel.from_pretrained(folder).eval()), held_out[:40])
    size = sum(p.numel() for p in model.encoder.parameters()) + sum(p.numel() for p in model.decoder.parameters())
    results |= {"bandwidth_kbps": BANDWIDTH, "network_parameters": size, "parity_with_encodec_package": parity}
    results |= {"steps": progress["step"], "minutes": round(progress["seconds"] / 60, 1)}
    say(str(results))
    record(args, "codec", results)
    write_json(finished, results)


if __name__ == "__main__":
    main()
