"""Stage 8: the generator, a MusicGen of about 6M parameters, trained from scratch on captions and codes.

    python recipes/generator.py --work build/tiny --minutes 62      trains and writes the bundled folder
    python recipes/generator.py --work build/tiny --export          only writes it, from the last saved step

Teacher forced on delayed codes, with the text left out now and then for classifier-free guidance (Ho and Salimans 2022).
The loss is ours, over the delayed ids: the stock `labels=` knows nothing of the delay pattern. Every crop begins at a bar
line, and some batches are blind: of text and positions alone the score is to be told, which makes a clock (README.md).
"""

import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import (
    CODEBOOK_SIZE,
    FRAME_RATE,
    N_CODEBOOKS,
    load_training_state,
    read_json,
    record,
    save_training_state,
    say,
    stage_arguments,
    start,
    write_json,
)
from facts import SIZES, FactHeads, fact_classes
from safetensors.torch import load_file
from score import SIZES as SCORE_SIZES
from score import ScoreHeads, bar_lines, load_or_write_scores
from text import load_or_train_tokenizer
from text_encoder import COMPLETE, WIDTH, Captions, load_text_encoder, text_config
from torch import Tensor, nn
from transformers import EncodecModel, MusicgenDecoderConfig

from musicrl_hf.generator import MusicRLConfig, MusicRLForConditionalGeneration

CROP_S = 5  # seconds that the published model plays by default, and that are evaluated


class Batch(NamedTuple):
    """Crops, their frames, and the share of them that begins with the clip's first bar; blind: no codes are shown."""

    size: int
    frames: int
    from_start: float
    is_blind: bool = False


# In turn, of about 2,000 frames each. Openings are where the words tell most; whole clips make later positions known.
BATCHES = (Batch(32, 62, 1.0), Batch(8, 250, 0.5), Batch(16, 125, 1.0), Batch(8, 250, 0.5), Batch(32, 62, 1.0))
BATCHES += (Batch(8, 250, 0.5), Batch(4, 500, 1.0))
BLIND = Batch(16, 250, 0.5, is_blind=True)
BLIND_FIRST, BLIND_EVERY = 500, (2, 4)  # so many blind batches are every second one, then every fourth
FACTS_WEIGHT, FACTS_BEHIND = 0.2, 1  # how much the mean of the fact heads' losses counts; behind which layer they read
SCORE_WEIGHT, CLOCK_BEHIND, NOTES_BEHIND = 1.0, 1, 3  # likewise for the score, see score.py
DAMAGED, SPANS, MOST_LATE = 0.5, 3, 6  # share of the clips, spans of each, frames
NULL_TEXT = 0.1  # of the prompts are left out
LEARNING_RATE, WARMUP_STEPS = 1.5e-3, 200
EMBEDDING_SPREAD, HEAD_SPREAD = 0.35, 0.05  # four embeddings are added to positions of spread .7
SAVE_EVERY_S = 120


def build(codec: EncodecModel) -> MusicRLForConditionalGeneration:
    """A MusicGen with a small T5 encoder, a small decoder and the trained codec."""
    decoder = MusicgenDecoderConfig(
        vocab_size=CODEBOOK_SIZE, num_codebooks=N_CODEBOOKS, audio_channels=1, hidden_size=WIDTH, num_hidden_layers=4,
        ffn_dim=1024, num_attention_heads=4, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0,
        pad_token_id=CODEBOOK_SIZE, bos_token_id=CODEBOOK_SIZE,
    )  # fmt: skip
    config = MusicRLConfig(
        text_encoder=text_config().to_dict(), audio_encoder=codec.config.to_dict(), decoder=decoder.to_dict()
    )
    # EnCodec has no sdpa attention in transformers, the decoder has.
    attention = {"decoder": "sdpa", "text_encoder": "eager", "audio_encoder": "eager"}
    model = MusicRLForConditionalGeneration._from_config(config, attn_implementation=attention)
    model.audio_encoder.load_state_dict(codec.state_dict())
    model.freeze_codec()
    start_from_codebooks(model)
    generation = model.generation_config
    generation.do_sample = True
    generation.guidance_scale = 3.0
    generation.max_length = CROP_S * FRAME_RATE + N_CODEBOOKS - 1  # stock `generate` then gives exactly five seconds
    model.restore_audio_token_ids()
    return model


@torch.no_grad()
def start_from_codebooks(model: MusicRLForConditionalGeneration) -> None:
    """Give codes that sound alike embeddings and output weights that are alike, in place.

    Each codebook's entries are turned into the decoder's width by a random rotation. Drawn one by one, as small as
    MusicGen draws them, embeddings drown in the positions' sines until each of the 4 x 1,024 has been met many times.
    """
    for layer, table, head in zip(
        model.audio_encoder.quantizer.layers,
        model.decoder.model.decoder.embed_tokens,
        model.decoder.lm_heads,
        strict=True,
    ):
        entries = layer.codebook.embed - layer.codebook.embed.mean(0)
        width, dimension = table.weight.shape[1], entries.shape[1]
        turned = entries @ torch.linalg.qr(torch.randn(width, width)).Q[:dimension]
        turned = turned / turned.pow(2).mean().sqrt()
        table.weight[:CODEBOOK_SIZE] = EMBEDDING_SPREAD * turned
        head.weight.copy_(HEAD_SPREAD * turned)


def code_losses(
    model: MusicRLForConditionalGeneration, codes: Tensor, text: tuple[Tensor, Tensor], shown: Tensor | None = None
) -> Tensor:
    """Cross entropy in nats [B, K] of codes [B, K, F], under prompts (input_ids, attention_mask) [B, P].

    Where given, `shown` [B, K, F] is what the decoder is shown in their place.

    A row whose attention mask is all 0 has no text, as the second half of a guided batch has in `generate`.
    """
    states = model.encode_text(*text)
    hidden, _ = model.decoder_hidden(codes if shown is None else shown, states, text[1])
    frames = codes.shape[-1]
    losses = []
    for k, head in enumerate(model.decoder.lm_heads):
        # Codebook k lags k steps: its codes are what the steps k to k + F predict; all others are pads.
        logits = head(hidden[:, k : k + frames]).flatten(0, 1).float()  # softmax over the last axis is the fast one
        nats = nn.functional.cross_entropy(logits, codes[:, k].flatten(), reduction="none")
        losses.append(nats.view(len(codes), frames).mean(1))
    return torch.stack(losses, 1)


def draw_codes(
    codes: Tensor, scores: np.ndarray, bars: list[np.ndarray], batch: Batch, rng: np.random.Generator
) -> tuple[np.ndarray, Tensor, Tensor]:
    """Clip indices [B], crops of their codes [B, K, F] and of their scores [B, 5, F], from bar lines `bars` on.

    Codes of a blind batch are pads. F is less than the batch's frames where a clip ends before.
    """
    clips = rng.integers(len(codes), size=batch.size)
    starts = []
    for i, is_opening in zip(clips, rng.random(batch.size) < batch.from_start, strict=True):
        possible = bars[i][bars[i] <= codes.shape[-1] - batch.frames]
        starts.append(bars[i][0] if is_opening or len(possible) == 0 else rng.choice(possible))
    frames = min(batch.frames, codes.shape[-1] - max(starts))
    crops = torch.stack([codes[i, :, s : s + frames] for i, s in zip(clips, starts, strict=True)]).long()
    score = np.stack([scores[i, :, s : s + frames] for i, s in zip(clips, starts, strict=True)])
    if batch.is_blind:
        crops = torch.full_like(crops, CODEBOOK_SIZE)
    return clips, crops, torch.from_numpy(score).long()


def damaged(codes: Tensor, rng: np.random.Generator) -> Tensor:
    """Codes [B, K, F] with spans that cannot be relied on, in `DAMAGED` of the clips: pads, another clip, or what was before.

    What a model plays strays from what it was trained on, and it follows its own past before it follows words and positions.
    A past that may mislead teaches it to ask them too (Bengio et al. 2015, arXiv:1506.03099, show it what it played).
    """
    shown, frames = codes.clone(), codes.shape[-1]
    for row in np.flatnonzero(rng.random(len(codes)) < DAMAGED):
        for _ in range(SPANS):
            length = int(rng.integers(3, frames // 4))
            begin = int(rng.integers(MOST_LATE, frames - length))
            span = slice(begin, begin + length)
            kind = rng.integers(3)
            if kind == 0:
                shown[row, :, span] = CODEBOOK_SIZE
            elif kind == 1:
                shown[row, :, span] = codes[row - 1, :, span]
            else:
                late = int(rng.integers(1, MOST_LATE + 1))
                shown[row, :, span] = codes[row, :, begin - late : begin - late + length]
    return shown


def plan(step: int, blind_steps: int) -> Batch:
    """The batch of a step, after so many blind ones."""
    every = BLIND_EVERY[blind_steps >= BLIND_FIRST]
    return BLIND if step % every == every - 1 else BATCHES[(step - step // every) % len(BATCHES)]


def train(args, model: MusicRLForConditionalGeneration, captions: Captions, facts: Tensor) -> dict:
    """Train on captions and facts [N, facts] until `args.minutes` are spent, over all restarts; the schedule follows the time."""
    model.to(args.device)
    facts = facts.to(args.device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    folder = args.work / "generator_training"
    progress = {"step": 0, "blind_steps": 0, "seconds": 0.0, "frames": 0, "log": []}
    progress |= load_training_state(folder, model, optimizer) or {}
    decoder = model.decoder.model.decoder
    heads = FactHeads(decoder.layers[FACTS_BEHIND], model.enc_to_dec_proj, decoder.config.hidden_size)
    score_heads = ScoreHeads(decoder.layers[CLOCK_BEHIND], decoder.layers[NOTES_BEHIND], decoder.config.hidden_size)
    all_heads = nn.ModuleList([heads, score_heads]).to(args.device)
    heads_optimizer = torch.optim.AdamW(all_heads.parameters(), lr=LEARNING_RATE)
    heads_folder = folder.with_name("generator_training_heads")
    load_training_state(heads_folder, all_heads, heads_optimizer)
    if progress["step"]:
        say(f"resumed at step {progress['step']}, {progress['seconds'] / 60:.1f} min")
    rng = np.random.default_rng(args.seed + progress["step"])
    codes = load_file(args.work / "codes_train.safetensors")["codes"]
    scores = load_or_write_scores(args.work, "train", len(codes), args.seed, args.tiny)
    bars = bar_lines(scores)
    model.train()
    model.audio_encoder.eval()
    began, spent_before, saved_at, told_at = time.time(), progress["seconds"], time.time(), time.time()
    recent, recent_blind = [], []
    while progress["seconds"] < 60 * args.minutes:
        done = progress["seconds"] / (60 * args.minutes)
        warm = min(1.0, (progress["step"] + 1) / WARMUP_STEPS)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        batch = plan(progress["step"], progress["blind_steps"])
        batch = batch._replace(size=batch.size * args.times)
        clips, crops, score = draw_codes(codes, scores, bars, batch, rng)
        shown = (crops if batch.is_blind else damaged(crops, rng)).to(args.device)
        crops, score = crops.to(args.device), score.to(args.device)
        null, complete = (0.0, 1.0) if batch.is_blind else (NULL_TEXT, COMPLETE)
        ids, mask = (some.to(args.device) for some in captions.draw(clips, rng, null, complete))
        with torch.autocast(torch.device(args.device).type, torch.bfloat16):
            if batch.is_blind:
                model.decoder_hidden(crops, model.encode_text(ids, mask), mask)
            else:
                losses = code_losses(model, crops, (ids, mask), shown)
            told = heads.losses(facts[clips], mask)
            played = score_heads.losses(score)
        of_facts = FACTS_WEIGHT * sum(some.mean() for some in told.values())
        optimizer.zero_grad()
        heads_optimizer.zero_grad()
        of_score = score_heads.loss(played)
        of_codes = of_score if batch.is_blind else losses.mean() + SCORE_WEIGHT * of_score
        (of_codes + of_facts).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        heads_optimizer.step()
        if batch.is_blind:
            recent_blind = [*recent_blind[-49:], played.tolist()]
        else:
            recent = [*recent[-199:], torch.cat([losses.mean(0), played, *told.values()]).tolist()]
        progress["blind_steps"] += batch.is_blind
        progress["step"] += 1
        progress["frames"] += crops.shape[0] * crops.shape[-1]
        progress["seconds"] = spent_before + time.time() - began
        if time.time() - told_at > 60:
            told_at = time.time()
            mean, blind = np.mean(recent, axis=0), np.mean(recent_blind, axis=0)
            minutes = progress["seconds"] / 60
            nats = float(mean[:N_CODEBOOKS].mean())
            progress["log"].append([progress["step"], round(minutes, 1), round(nats, 4), blind.round(3).tolist()])
            by_codebook = " ".join(f"{value:.2f}" for value in mean[:N_CODEBOOKS])
            of_score = mean[N_CODEBOOKS : N_CODEBOOKS + len(SCORE_SIZES)]
            by_part = ", ".join(f"{n} {v:.2f} {b:.2f}" for n, v, b in zip(SCORE_SIZES, of_score, blind, strict=True))
            nats_of_facts = zip(SIZES, *mean[N_CODEBOOKS + len(SCORE_SIZES) :].reshape(len(told), -1), strict=True)
            by_fact = ", ".join(f"{name} {heard:.2f} {read:.2f}" for name, heard, read in nats_of_facts)
            speed = progress["frames"] / progress["seconds"]
            say(
                f"generator {minutes:.1f} of {args.minutes} min, step {progress['step']}, loss {nats:.3f} "
                f"({by_codebook}) nats; score, seen and blind: {by_part}; facts, by decoder and text: {by_fact}; {speed:.0f} frames/s"
            )
        if time.time() - saved_at > SAVE_EVERY_S:
            saved_at = time.time()
            save_training_state(folder, model, optimizer, progress)
            save_training_state(heads_folder, all_heads, heads_optimizer, {})
            codes = load_file(args.work / "codes_train.safetensors")["codes"]  # stage 5 may still be adding to it
    save_training_state(folder, model, optimizer, progress)
    model.to("cpu")
    return progress


@torch.no_grad()
def evaluate(model: MusicRLForConditionalGeneration, codes: Tensor, bars: list[np.ndarray], captions: Captions) -> dict:
    """Cross entropy on held-out clips [N, K, F], with their caption, another clip's, and none.

    From the first bar on; where an upbeat is so long that too little follows, from the start.
    """
    model.eval()
    length = CROP_S * FRAME_RATE
    begins = [int(some[0]) if some[0] + length <= codes.shape[-1] else 0 for some in bars]
    found: dict[str, list[Tensor]] = {"own_caption": [], "other_caption": [], "no_caption": []}
    for first in range(0, len(codes), 10):
        clips = np.arange(first, min(first + 10, len(codes)))
        crop = torch.stack([codes[i, :, begins[i] : begins[i] + length] for i in clips]).long()
        ids, mask = captions.draw(clips, None)
        found["own_caption"].append(code_losses(model, crop, (ids, mask)))
        found["no_caption"].append(code_losses(model, crop, (ids, mask * 0)))
        other = captions.draw((clips + len(codes) // 2) % len(codes), None)
        found["other_caption"].append(code_losses(model, crop, other))
    means = {name: torch.cat(rows).mean(0) for name, rows in found.items()}
    return {
        name: {"nats": round(float(v.mean()), 4), "by_codebook": [round(float(x), 3) for x in v]}
        for name, v in means.items()
    }


def export(model: MusicRLForConditionalGeneration, folder: Path) -> int:
    """Write a stock MusicGen folder, file by file aside and renamed; weights in half precision, read as float32.

    Returns:
        bytes of the folder.
    """
    aside = folder.with_name(f".{folder.name}.part")
    model.eval().half()
    model.save_pretrained(aside)
    model.float()
    config = json.loads((aside / "config.json").read_text())
    for part in (config, config["text_encoder"], config["audio_encoder"], config["decoder"]):
        part["dtype"] = "float32"
        part.pop("_name_or_path", None)  # a path of this machine
    write_json(aside / "config.json", config)
    return move_files(aside, folder)


def move_files(aside: Path, folder: Path) -> int:
    """Replace a folder's files one by one, the weights first; bytes of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(aside.iterdir(), key=lambda p: p.suffix != ".safetensors"):
        path.chmod(0o644)  # safetensors files come out readable by their owner only
        os.replace(path, folder / path.name)
    aside.rmdir()
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    parser = stage_arguments(__doc__.splitlines()[0], minutes=62)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--times", type=int, default=1, help="so many times as many clips a batch: for a GPU")
    parser.add_argument("--export", action="store_true", help="only write the bundled folder from the last saved step")
    args = parser.parse_args()
    start(args)
    finished = args.work / "generator_finished.json"
    if finished.exists() and not (args.force or args.export):
        return say(f"{finished} is there")
    rows = read_json(args.work / "rows_train.json")
    tokenizer = load_or_train_tokenizer(args.work / "tokenizer", rows, with_bos=False)
    model = build(EncodecModel.from_pretrained(args.work / "codec"))
    model.tokenizer = tokenizer
    if args.export:
        state = load_file(args.work / "generator_training" / "state.safetensors")
        state = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
        state |= {f"audio_encoder.{n}": t for n, t in model.audio_encoder.state_dict().items()}  # may be newer
        model.load_state_dict(state)
        return say(f"{export(model, args.checkpoints / 'musicrl-tiny') / 1e6:.1f} MB written")
    if not (args.work / "generator_training").exists():  # a training that goes on has its own
        load_text_encoder(args.work, model.text_encoder, model.enc_to_dec_proj)
    progress = train(args, model, Captions(rows, tokenizer), fact_classes(rows))
    results: dict = {name: progress[name] for name in ("step", "blind_steps", "frames", "log")}
    results["minutes"] = round(progress["seconds"] / 60, 1)
    if "earlier" in progress:  # runs that this one went on from, see go_on.py
        results["earlier"] = progress["earlier"]
    for split in ("validation", "test"):
        held_out = load_file(args.work / f"codes_{split}.safetensors")["codes"]
        bars = bar_lines(load_or_write_scores(args.work, split, len(held_out), args.seed, args.tiny))
        others = Captions(read_json(args.work / f"rows_{split}.json"), tokenizer)
        results[split] = evaluate(model, held_out, bars, others)
    # The codec's decoder may have been trained further beside this stage; the codes are the same.
    model.audio_encoder.load_state_dict(EncodecModel.from_pretrained(args.work / "codec").state_dict())
    parts = {"text_encoder": model.text_encoder, "decoder": model.decoder, "codec": model.audio_encoder}
    results["parameters"] = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    results["bytes"] = export(model, args.checkpoints / "musicrl-tiny")
    say(str({name: value for name, value in results.items() if name != "log"}))
    record(args, "generator", results)
    write_json(finished, results)


if __name__ == "__main__":
    main()
