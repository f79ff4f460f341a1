"""Stage 9: a CLAP model in miniature, contrastive on rendered clips and their captions (Wu et al. 2023).

    python recipes/adherence.py --work build/tiny --minutes 30

A clip is told from other clips' captions, and its own caption from one that differs in a single fact (one_fact.py). Beside
that, linear heads read all facts from both encoders (they are thrown away with the training), and the text encoder learns
them first, alone, for a minute. Half of the clips that it hears went through the codec, since everything that the generator
makes does.
"""

import math
import random
import time

import numpy as np
import torch
from captions import INSTRUMENTS, article, captions, complete
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
from facts import CLASSES, SIZES, fact_classes, fact_losses
from generator import move_files
from one_fact import FACTS, draw_captions
from safetensors.torch import load_file
from text import MAX_TOKENS, VOCABULARY, load_or_train_tokenizer
from torch import Tensor, nn
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, EncodecModel

from musicrl_hf.rewards.clap import audio_embeddings, log_mel, text_embeddings

BATCH = 48
LEARNING_RATE, WARMUP_STEPS = 3e-3, 100
TEXT_STEPS, TEXT_BATCH, TEXT_RATE = 1500, 64, 2e-3  # of the text encoder alone
FACT_WEIGHT = 0.5  # of each fact's cross entropy, beside the contrastive losses
CODED_CLIPS, CODED_SHARE = 1400, 0.5  # training clips that are decoded from codes, and their share of a batch
ONE_BACKING_SHARE = 0.5  # of the batches
HEARD_S = 5  # the extractor's segment; a longer clip is heard as several
TILT_DB = 3.0  # spread of a random equaliser
RETRIEVAL_CLIPS = 200  # among so many test clips the right one is looked for
SAVE_EVERY_S = 120


def build() -> tuple[ClapModel, ClapFeatureExtractor]:
    """A CLAP model of about a million parameters, and its feature extractor for 16 kHz.

    128 bands of a window of 128 ms part the semitones from the middle of the staff on; with 64 of 64 ms no key is heard.
    """
    extractor = ClapFeatureExtractor(
        feature_size=128, sampling_rate=SAMPLING_RATE, hop_length=160, max_length_s=HEARD_S, fft_window_size=2048,
        frequency_min=40, frequency_max=8000, truncation="rand_trunc", padding="repeatpad",
    )  # fmt: skip
    config = ClapConfig(
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 192, "max_position_embeddings": MAX_TOKENS + 2, "type_vocab_size": 1,
            "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "projection_dim": 64,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
        audio_config={
            "spec_size": 256, "num_mel_bins": 128, "patch_size": 8, "patch_stride": [8, 8], "window_size": 8,
            "patch_embeds_hidden_size": 48, "hidden_size": 192, "depths": [1, 2, 1], "num_hidden_layers": 3,
            "num_attention_heads": [2, 4, 8], "mlp_ratio": 2.0, "projection_dim": 64, "enable_fusion": False,
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


class Learner(nn.Module):
    """The CLAP model with a linear head for all facts on each encoder's pooled state.

    Args:
        model: of `build`.
        tokenizer: of its text encoder.
    """

    def __init__(self, model: ClapModel, tokenizer) -> None:
        super().__init__()
        self.model, self.tokenizer, classes = model, tokenizer, sum(SIZES.values())
        self.sound_head = nn.Linear(model.config.audio_config.hidden_size, classes)
        self.text_head = nn.Linear(model.config.text_config.hidden_size, classes)

    def sound_state(self, features: Tensor) -> Tensor:
        """Pooled states [B, D] of features [B, 1, frames, mels]."""
        never_longer = torch.zeros(len(features), 1, dtype=torch.bool)
        return self.model.audio_model(features, is_longer=never_longer).pooler_output

    def text_state(self, texts: list[str]) -> Tensor:
        """Pooled states [B, D]."""
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        return self.model.text_model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).pooler_output

    def losses(self, features: Tensor, drawn: list, facts: Tensor) -> dict[str, Tensor]:
        """Nats: "clips" (which caption is whose), one for each of `FACTS`, and "facts" (all, of both heads).

        Args:
            features: [B, 1, frames, mels].
            drawn: `Drawn` captions, B.
            facts: classes [B, facts].
        """
        texts = [text.right for text in drawn] + [wrong for text in drawn for wrong in text.wrong]
        with torch.autocast("cpu", torch.bfloat16):
            sound_state, text_state = self.sound_state(features), self.text_state(texts)
            sound = self.model.audio_projection(sound_state).float()
            text = self.model.text_projection(text_state).float()
        sound, text = nn.functional.normalize(sound, dim=-1), nn.functional.normalize(text, dim=-1)
        scale, size = self.model.logit_scale_a.exp(), len(drawn)
        similar = scale * sound @ text[:size].T
        own = torch.arange(size)
        both_ways = nn.functional.cross_entropy(similar, own) + nn.functional.cross_entropy(similar.T, own)
        wrong = scale * torch.einsum("bd,bfd->bf", sound, text[size:].view(size, len(FACTS), -1))
        named = torch.tensor([[other != text.right for other in text.wrong] for text in drawn])
        lost = nn.functional.softplus(wrong - similar.diag()[:, None]).masked_fill(~named, 0.0)
        complete_ones = torch.tensor([text.complete for text in drawn])
        told = pooled_fact_losses(self.sound_head, sound_state, facts).sum()
        if complete_ones.any():
            told = (
                told + pooled_fact_losses(self.text_head, text_state[:size][complete_ones], facts[complete_ones]).sum()
            )
        return (
            {"clips": both_ways / 2}
            | dict(zip(FACTS, lost.sum(0) / named.sum(0).clamp(min=1), strict=True))
            | {"facts": told}
        )


def pooled_fact_losses(head: nn.Module, states: Tensor, facts: Tensor) -> Tensor:
    """`fact_losses` of one state [B, D] a clip."""
    return fact_losses(head, states.float()[:, None], facts, torch.ones(len(states), 1, dtype=torch.bool))


def draw_batch(
    clean: np.ndarray, coded: np.ndarray, backings: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, Tensor]:
    """Indices [B] of different clips and the features [B, 1, frames, mels] of a random crop of each.

    At a random loudness and through a random equaliser. In half of the batches all clips have one backing: a drum beat is
    told from a bass line within a minute, and instruments are learned only where nothing easier tells the clips apart.
    `coded` are the first clips through the codec.
    """
    everywhere = np.arange(len(clean))
    pool = everywhere[backings == rng.choice(backings)] if rng.random() < ONE_BACKING_SHARE else everywhere
    from_codec = pool[pool < len(coded)]
    n_coded = min(round(CODED_SHARE * BATCH), len(from_codec))
    chosen = rng.choice(from_codec, n_coded, replace=False)
    rest = rng.choice(np.setdiff1d(pool, chosen), BATCH - n_coded, replace=False)
    frames = HEARD_S * 100 + 1
    begins = rng.integers(clean.shape[1] - frames + 1, size=BATCH)
    whole = [coded[i] for i in chosen] + [clean[i] for i in rest]
    crops = np.stack([mel[begin : begin + frames] for mel, begin in zip(whole, begins, strict=True)])
    gain_db = torch.from_numpy(rng.uniform(-6, 6, (BATCH, 1, 1))).float()
    tilt_db = torch.from_numpy(rng.normal(0, TILT_DB, (BATCH, 1, 6))).float()
    tilt_db = nn.functional.interpolate(tilt_db, size=crops.shape[2], mode="linear", align_corners=True)
    return np.concatenate([chosen, rest]), (torch.from_numpy(crops).float() + gain_db + tilt_db)[:, None]


def teach_text(args, learner: Learner, rows: list[dict], facts: Tensor, steps: int) -> None:
    """The text encoder alone learns all facts from captions that name all: beside music it would never learn the key."""
    learned = [*learner.model.text_model.parameters(), *learner.text_head.parameters()]
    optimizer = torch.optim.AdamW(learned, lr=TEXT_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rng, recent = random.Random(args.seed), []
    for step in range(steps):
        warm, cosine = min(1.0, (step + 1) / WARMUP_STEPS), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = TEXT_RATE * warm * (0.1 + 0.9 * cosine)
        chosen = [rng.randrange(len(rows)) for _ in range(TEXT_BATCH)]
        state = learner.text_state([complete(rows[i], rng) for i in chosen])
        losses = pooled_fact_losses(learner.text_head, state, facts[chosen])
        optimizer.zero_grad()
        losses.sum().backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        recent = [*recent[-49:], losses.detach()]
    told = dict(zip(SIZES, torch.stack(recent).mean(0).tolist(), strict=True))
    say("text alone, nats: " + ", ".join(f"{name} {value:.2f}" for name, value in told.items()))


def train(args, learner: Learner, rows: list[dict], clean: np.ndarray, coded: np.ndarray) -> dict:
    """Train until `args.minutes` are spent, over all restarts."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    folder, facts = args.work / "adherence_training", fact_classes(rows)
    progress = load_training_state(folder, learner, optimizer)
    if progress is None:
        teach_text(args, learner, rows, facts, 20 if args.tiny else TEXT_STEPS)
        progress = {"step": 0, "seconds": 0.0}
    rng, words = (
        make([args.seed, progress["step"]]) for make in (np.random.default_rng, lambda seed: random.Random(str(seed)))
    )
    backings = np.array([row["backing"] for row in rows])
    learner.train()
    began, spent_before, saved_at, told_at, recent = time.time(), progress["seconds"], time.time(), time.time(), []
    while progress["seconds"] < 60 * args.minutes:
        done = progress["seconds"] / (60 * args.minutes)
        warm = min(1.0, (progress["step"] + 1) / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        chosen, features = draw_batch(clean, coded, backings, rng)
        losses = learner.losses(features, [draw_captions(rows[i], rows, words) for i in chosen], facts[chosen])
        loss = losses["clips"] + FACT_WEIGHT * (losses["facts"] + sum(losses[name] for name in FACTS))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-49:], torch.stack([value.detach() for value in losses.values()])]
        progress = {"step": progress["step"] + 1, "seconds": spent_before + time.time() - began}
        if time.time() - told_at > 30:
            told_at, means = time.time(), torch.stack(recent).mean(0).tolist()
            told = ", ".join(f"{name} {value:.2f}" for name, value in zip(losses, means, strict=True))
            say(
                f"adherence {progress['seconds'] / 60:.1f} of {args.minutes} min, step {progress['step']}, nats: {told}"
            )
        if time.time() - saved_at > SAVE_EVERY_S:
            saved_at = time.time()
            save_training_state(folder, learner, optimizer, progress)
    save_training_state(folder, learner, optimizer, progress)
    return progress


def instrument_prompts() -> list[str]:
    return [f"a tune played by {article(name)}" for name in INSTRUMENTS]


@torch.no_grad()
def evaluate(
    model: ClapModel, tokenizer, extractor: ClapFeatureExtractor, audio: Tensor, rows: list[dict], texts: list[str]
) -> dict:
    """Retrieval by one text each, and instrument by prompt, on held-out clips [N, T]."""
    sound = torch.cat([audio_embeddings(model, extractor, a[:, None], SAMPLING_RATE).mean(1) for a in audio.split(20)])
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


@torch.no_grad()
def facts_told(
    model: ClapModel, tokenizer, extractor: ClapFeatureExtractor, audio: Tensor, rows: list[dict]
) -> dict[str, dict]:
    """How often a clip [T] is nearest to its caption among those that name another class of one fact, and of how many."""
    sound = torch.cat([audio_embeddings(model, extractor, a[:, None], SAMPLING_RATE).mean(1) for a in audio.split(20)])
    found = {}
    for fact, classes in CLASSES.items():
        right = 0
        for row, vector in zip(rows, sound, strict=True):
            names = [row[fact], *(name for name in classes if name != row[fact])]
            texts = [captions(row | {"mood": "", fact: name}, random.Random(0))[0] for name in names]
            right += int((text_embeddings(model, tokenizer, texts) @ vector).argmax() == 0)
        found[fact] = {"share": round(right / len(rows), 3), "chance": round(1 / len(classes), 3)}
    return found


def main() -> None:
    args = stage_arguments(__doc__.splitlines()[0], minutes=30).parse_args()
    start(args)
    finished = args.work / "adherence_finished.json"
    if finished.exists() and not args.force:
        return say(f"{finished} is there")
    clips, rows = load_clips(args.work, "train")
    tokenizer = load_or_train_tokenizer(args.work / "adherence_tokenizer", rows, with_bos=True)
    model, extractor = build()
    clean = mel_features(args, "train", clips, extractor)
    coded = mel_features(args, "coded_train", coded_clips(args), extractor)
    progress = train(args, Learner(model, tokenizer), rows, clean, coded)
    model.eval()
    held_out, rows = load_clips(args.work, "test")
    rows = rows[:RETRIEVAL_CLIPS]
    audio = to_float(held_out[: len(rows)])
    short = HEARD_S * SAMPLING_RATE
    codec = use_fast_elu(EncodecModel.from_pretrained(args.work / "codec").eval())
    codes = load_file(args.work / "codes_test.safetensors")["codes"][: len(rows)].long()
    with torch.no_grad():
        coded = torch.cat([codec.decode(some[None], [None]).audio_values[:, 0] for some in codes.split(10)])
    named, paraphrases = [row["captions"][0] for row in rows], [row["paraphrase"] for row in rows]
    results: dict = {"step": progress["step"], "minutes": round(progress["seconds"] / 60, 1)}
    results["parameters"] = sum(p.numel() for p in model.parameters())
    for name, waves, texts in (
        ("test_10_s", audio, named),
        ("test_10_s_paraphrased", audio, paraphrases),
        ("test_5_s", audio[:, :short], named),
        ("test_5_s_through_codec", coded[:, :short], named),
    ):
        results[name] = evaluate(model, tokenizer, extractor, waves, rows, texts)
    for name, waves in (("test_5_s", audio[:, :short]), ("test_5_s_through_codec", coded[:, :short])):
        results[name]["facts_told"] = facts_told(model, tokenizer, extractor, waves, rows)
    aside = args.checkpoints / ".musicrl-tiny-adherence.part"
    for part in (model, tokenizer, extractor):
        part.save_pretrained(aside)
    results["bytes"] = move_files(aside, args.checkpoints / "musicrl-tiny-adherence")
    say(str(results))
    record(args, "adherence", results)
    write_json(finished, results)


if __name__ == "__main__":
    main()
