"""Stage 8: a CLAP model in miniature, contrastive on rendered clips and their captions (Wu et al. 2023).

    python recipes/adherence.py --work build/tiny --minutes 27

Half of the clips that it hears in training went through the codec, since everything that the generator makes does.
"""

import math
import time

import numpy as np
import torch
from captions import INSTRUMENTS, article
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
    write_array,
    write_json,
)
from elu import use_fast_elu
from generator import Captions, move_files
from safetensors.torch import load_file
from text import MAX_TOKENS, VOCABULARY, load_or_train_tokenizer
from torch import Tensor
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, EncodecModel

from musicrl_hf.rewards.clap import audio_embeddings, log_mel, text_embeddings

BATCH = 48
LEARNING_RATE, WARMUP_STEPS = 2e-3, 60
CODED_CLIPS, CODED_SHARE = 500, 0.5  # training clips that are decoded from codes, and their share of a batch
ONE_BACKING_SHARE = 0.5  # of the batches
SHORT_SHARE = 0.5  # of the batches hear 5 s
SHORT_S = 5
RETRIEVAL_CLIPS = 200  # among so many test clips the right one is looked for
SAVE_EVERY_S = 120


def build() -> tuple[ClapModel, ClapFeatureExtractor]:
    """A CLAP model of about a million parameters, and its feature extractor for 16 kHz."""
    extractor = ClapFeatureExtractor(
        feature_size=64, sampling_rate=SAMPLING_RATE, hop_length=160, max_length_s=10, fft_window_size=1024,
        frequency_min=40, frequency_max=8000, truncation="rand_trunc", padding="repeatpad",
    )  # fmt: skip
    depth, width = 4, 24
    config = ClapConfig(
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 192, "max_position_embeddings": MAX_TOKENS + 2, "type_vocab_size": 1,
            "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "projection_dim": 64,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        audio_config={
            "spec_size": 256, "num_mel_bins": 64, "patch_size": 4, "patch_stride": [4, 4], "window_size": 8,
            "patch_embeds_hidden_size": width, "hidden_size": width * 2 ** (depth - 1), "depths": [1, 1, 2, 1],
            "num_attention_heads": [1, 2, 4, 8], "mlp_ratio": 2.0, "projection_dim": 64, "enable_fusion": False,
            "drop_path_rate": 0.0, "hidden_dropout_prob": 0.0, "num_classes": 16,
        },
        projection_dim=64,
    )  # fmt: skip
    return ClapModel(config), extractor


def coded_clips(args) -> np.ndarray:
    """The first training clips as the codec gives them back: int16 [N, T], cached in the work folder."""
    out = args.work / "coded_train.npy"
    if not out.exists():
        codec = use_fast_elu(EncodecModel.from_pretrained(args.work / "codec").eval())
        codes = load_file(args.work / "codes_train.safetensors")["codes"][:CODED_CLIPS].long()
        parts = []
        with torch.no_grad():
            for some in codes.split(10):
                wave = codec.decode(some[None], [None]).audio_values[:, 0]
                parts.append((wave.clamp(-1, 1) * 32767).round().to(torch.int16).numpy())
        write_array(out, np.concatenate(parts))
        say(f"{len(codes)} clips decoded")
    return np.load(out, mmap_mode="r")


def mel_features(args, name: str, clips: np.ndarray, extractor: ClapFeatureExtractor) -> np.ndarray:
    """Log-mel features [N, frames, mels] of clips, in dB as float16, cached in the work folder: each is heard often."""
    out = args.work / f"mel_{name}.npy"
    if not out.exists():
        parts = []
        for first in range(0, len(clips), 20):
            parts.append(log_mel(to_float(clips[first : first + 20]), extractor)[:, 0].half().numpy())
        write_array(out, np.concatenate(parts))
        say(f"features of {len(clips)} clips")
    return np.load(out, mmap_mode="r")


def draw_batch(
    clean: np.ndarray, coded: np.ndarray, backings: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, Tensor]:
    """Indices [B] of different clips and their features [B, 1, frames, mels], at a random loudness.

    In half of the batches all clips have one backing: a drum beat is told from a bass line within a minute, and
    instruments are learned only where nothing easier tells the clips apart. `coded` are the first clips through the
    codec. A 5 s crop is repeated, as the feature extractor does it.
    """
    everywhere = np.arange(len(clean))
    pool = everywhere[backings == rng.choice(backings)] if rng.random() < ONE_BACKING_SHARE else everywhere
    from_codec = pool[pool < len(coded)]
    n_coded = min(round(CODED_SHARE * BATCH), len(from_codec))
    chosen = rng.choice(from_codec, n_coded, replace=False)
    rest = rng.choice(np.setdiff1d(pool, chosen), BATCH - n_coded, replace=False)
    mels = [coded[i] for i in chosen] + [clean[i] for i in rest]
    features = torch.from_numpy(np.stack(mels)).float()
    frames = features.shape[1]
    if rng.random() < SHORT_SHARE:
        short = frames // 2
        begins = rng.integers(frames - short + 1, size=BATCH)
        crops = torch.stack([mel[b : b + short] for mel, b in zip(features, begins, strict=True)])
        features = torch.cat([crops, crops, crops[:, : frames - 2 * short]], 1)
    gain_db = torch.from_numpy(rng.uniform(-6, 6, (BATCH, 1, 1))).float()
    return np.concatenate([chosen, rest]), (features + gain_db)[:, None]


def train(args, model: ClapModel, rows: list[dict], captions: Captions, clean: np.ndarray, coded: np.ndarray) -> dict:
    """Train until `args.minutes` are spent, over all restarts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    folder = args.work / "adherence_training"
    progress = load_training_state(folder, model, optimizer) or {"step": 0, "seconds": 0.0}
    rng = np.random.default_rng(args.seed + progress["step"])
    backings = np.array([row["backing"] for row in rows])
    model.train()
    began, spent_before, saved_at, told_at, recent = time.time(), progress["seconds"], time.time(), time.time(), []
    while progress["seconds"] < 60 * args.minutes:
        done = progress["seconds"] / (60 * args.minutes)
        warm = min(1.0, (progress["step"] + 1) / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        chosen, features = draw_batch(clean, coded, backings, rng)
        ids, mask = captions.draw(chosen, rng)
        never_longer = torch.zeros(len(features), 1, dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(
                input_ids=ids, attention_mask=mask, input_features=features, is_longer=never_longer, return_loss=True
            )
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-49:], output.loss.item()]
        progress = {"step": progress["step"] + 1, "seconds": spent_before + time.time() - began}
        if time.time() - told_at > 30:
            told_at = time.time()
            say(
                f"adherence {progress['seconds'] / 60:.1f} of {args.minutes} min, step {progress['step']}, "
                f"loss {np.mean(recent):.3f} (chance {math.log(BATCH):.2f})"
            )
        if time.time() - saved_at > SAVE_EVERY_S:
            saved_at = time.time()
            save_training_state(folder, model, optimizer, progress)
    save_training_state(folder, model, optimizer, progress)
    return progress


def instrument_prompts() -> list[str]:
    return [f"a tune played by {article(name)}" for name in INSTRUMENTS]


@torch.no_grad()
def evaluate(
    model: ClapModel, tokenizer, extractor: ClapFeatureExtractor, audio: Tensor, rows: list[dict], texts: list[str]
) -> dict:
    """Retrieval by one text each, and instrument by prompt, on held-out clips [N, T]."""
    sound = torch.cat([audio_embeddings(model, extractor, a[:, None], SAMPLING_RATE)[:, 0] for a in audio.split(20)])
    similarity = text_embeddings(model, tokenizer, texts) @ sound.T
    rank = (similarity > similarity.diag()[:, None]).sum(1)
    back = (similarity > similarity.diag()[None]).sum(0)
    named = (sound @ text_embeddings(model, tokenizer, instrument_prompts()).T).argmax(1)
    truth = torch.tensor([list(INSTRUMENTS).index(row["instrument"]) for row in rows])
    return {
        "clips": len(rows),
        "recall_at_1_text_to_sound": round(float((rank < 1).float().mean()), 3),
        "recall_at_10_text_to_sound": round(float((rank < 10).float().mean()), 3),
        "recall_at_10_sound_to_text": round(float((back < 10).float().mean()), 3),
        "recall_at_10_chance": round(10 / len(rows), 3),
        "instrument_accuracy": round(float((named == truth).float().mean()), 3),
        "instrument_accuracy_chance": round(1 / len(INSTRUMENTS), 4),
    }


def main() -> None:
    args = stage_arguments(__doc__.splitlines()[0], minutes=27).parse_args()
    start(args)
    finished = args.work / "adherence_finished.json"
    if finished.exists() and not args.force:
        return say(f"{finished} is there")
    clips, rows = load_clips(args.work, "train")
    tokenizer = load_or_train_tokenizer(args.work / "adherence_tokenizer", rows, with_bos=True)
    model, extractor = build()
    clean = mel_features(args, "train", clips, extractor)
    coded = mel_features(args, "coded_train", coded_clips(args), extractor)
    progress = train(args, model, rows, Captions(rows, tokenizer), clean, coded)
    model.eval()
    held_out, rows = load_clips(args.work, "test")
    rows = rows[:RETRIEVAL_CLIPS]
    audio = to_float(held_out[: len(rows)])
    short = SHORT_S * SAMPLING_RATE
    codec = use_fast_elu(EncodecModel.from_pretrained(args.work / "codec").eval())
    codes = load_file(args.work / "codes_test.safetensors")["codes"][: len(rows)].long()
    with torch.no_grad():
        coded = torch.cat([codec.decode(some[None], [None]).audio_values[:, 0] for some in codes.split(10)])
    captions, paraphrases = [row["captions"][0] for row in rows], [row["paraphrase"] for row in rows]
    results: dict = {"step": progress["step"], "minutes": round(progress["seconds"] / 60, 1)}
    results["parameters"] = sum(p.numel() for p in model.parameters())
    for name, waves, texts in (
        ("test_10_s", audio, captions),
        ("test_10_s_paraphrased", audio, paraphrases),
        ("test_5_s", audio[:, :short], captions),
        ("test_5_s_through_codec", coded[:, :short], captions),
    ):
        results[name] = evaluate(model, tokenizer, extractor, waves, rows, texts)
    aside = args.checkpoints / ".musicrl-tiny-adherence.part"
    for part in (model, tokenizer, extractor):
        part.save_pretrained(aside)
    results["bytes"] = move_files(aside, args.checkpoints / "musicrl-tiny-adherence")
    say(str(results))
    record(args, "adherence", results)
    write_json(finished, results)


if __name__ == "__main__":
    main()
