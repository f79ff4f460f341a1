"""Stage 8: what the bundled generator plays, by measure: tunes or noise, and the instrument that was asked for?

    python recipes/listen.py --work build/tiny

Writes the clips to WORK/listen as WAV. The same measures are taken of rendered clips, of those through the codec and of
random codes, so that the generator's figures have something to stand beside.
"""

import numpy as np
import soundfile as sf
import torch
from adherence import instrument_prompts
from captions import INSTRUMENTS
from common import CODEBOOK_SIZE, N_CODEBOOKS, SAMPLING_RATE, load_clips, record, say, stage_arguments, start, to_float
from measures import tune_measures
from torch import Tensor

from musicrl_hf.generator import MusicRLForConditionalGeneration
from musicrl_hf.rewards.adherence import AdherenceReward
from musicrl_hf.rewards.clap import audio_embeddings, text_embeddings
from musicrl_hf.rewards.quality import QualityModel

DURATION_S = 5.0
ARTICLE_PROMPTS = [
    "a dance tune with a melodic synth line and arpeggio",
    "a nostalgic tune played by an accordion band",
]


def summary(audio: Tensor) -> dict[str, float]:
    """Medians of `tune_measures` over clips [B, T]."""
    rows = [tune_measures(wave.numpy()) for wave in audio]
    return {name: round(float(np.median([row[name] for row in rows])), 3) for name in rows[0]}


@torch.no_grad()
def heard_instruments(adherence: AdherenceReward, audio: Tensor) -> Tensor:
    """Index [B] of the instrument whose prompt fits each clip [B, T] best."""
    text = text_embeddings(adherence.model, adherence.tokenizer, instrument_prompts())
    sound = audio_embeddings(adherence.model, adherence.feature_extractor, audio[:, None], SAMPLING_RATE)[:, 0]
    return (sound @ text.T).argmax(1)


def main() -> None:
    parser = stage_arguments(__doc__.splitlines()[0])
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=4, help="clips of each of the 16 instruments")
    args = parser.parse_args()
    start(args)
    model = MusicRLForConditionalGeneration.from_pretrained(str(args.checkpoints / "musicrl-tiny")).eval()
    adherence = AdherenceReward.from_pretrained(str(args.checkpoints / "musicrl-tiny-adherence"))
    quality = QualityModel.from_pretrained(str(args.checkpoints / "musicrl-tiny-quality")).eval()
    folder = args.work / "listen"
    folder.mkdir(exist_ok=True)
    prompts = instrument_prompts()
    played = []
    for seed in range(args.rounds):
        clips = model.sample(prompts, DURATION_S, guidance_scale=args.guidance_scale, seed=seed)
        played.append(clips.audio[:, 0])
        say(f"round {seed + 1} of {args.rounds}")
    for seed, audio in enumerate(played[:1]):
        for name, wave in zip(INSTRUMENTS, audio, strict=True):
            sf.write(folder / f"{name.replace(' ', '_')}_{seed}.wav", wave.numpy(), SAMPLING_RATE)
    named = model.sample(ARTICLE_PROMPTS, DURATION_S, guidance_scale=args.guidance_scale, seed=0).audio[:, 0]
    for index, wave in enumerate(named):
        sf.write(folder / f"article_prompt_{index}.wav", wave.numpy(), SAMPLING_RATE)
    audio = torch.cat(played)
    held_out, rows = load_clips(args.work, "test")
    rendered = to_float(held_out[:32, : int(DURATION_S * SAMPLING_RATE)])
    coded = model.decode_codes(model.encode_audio(rendered[:, None]))[:, 0]
    noise = torch.randint(CODEBOOK_SIZE, (8, N_CODEBOOKS, model.frames_for(DURATION_S)))
    groups = {
        "generated": audio,
        "rendered": rendered,
        "rendered_through_codec": coded,
        "random_codes": model.decode_codes(noise)[:, 0],
        "article_prompts": named,
    }
    results: dict = {"clips": {name: len(group) for name, group in groups.items()}}
    results["guidance_scale"] = args.guidance_scale
    results["medians"] = {name: summary(group) for name, group in groups.items()}
    for name, group in groups.items():
        results["medians"][name]["mos"] = round(float(quality.mos(group[:, None], SAMPLING_RATE).median()), 2)
    asked = torch.arange(len(INSTRUMENTS)).repeat(args.rounds)
    truth = torch.tensor([list(INSTRUMENTS).index(row["instrument"]) for row in rows[: len(coded)]])
    results["instrument_accuracy"] = {
        "generated": round(float((heard_instruments(adherence, audio) == asked).float().mean()), 3),
        "rendered": round(float((heard_instruments(adherence, rendered) == truth).float().mean()), 3),
        "rendered_through_codec": round(float((heard_instruments(adherence, coded) == truth).float().mean()), 3),
        "chance": 1 / len(INSTRUMENTS),
    }
    own = adherence(prompts * args.rounds, audio[:, None], SAMPLING_RATE)
    other = adherence((prompts[5:] + prompts[:5]) * args.rounds, audio[:, None], SAMPLING_RATE)
    results["adherence"] = {"own_prompt": round(float(own.mean()), 3), "other_prompt": round(float(other.mean()), 3)}
    results["silent_clips"] = int((audio.pow(2).mean(1) < 1e-5).sum())
    results["clipped_clips"] = int(((audio.abs() > 0.999).float().mean(1) > 1e-3).sum())
    say(str(results))
    record(args, "listen", results)


if __name__ == "__main__":
    main()
