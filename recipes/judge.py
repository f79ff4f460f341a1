"""Stage 11: what the generator plays, by judges that no reward knows: the instrument, tempo and key that were asked for?

    python recipes/judge.py --work build/tiny
    python recipes/judge.py --work build/tiny --generator musicrl-tiny       the one that ships with the package

Prompts are captions of held-out clips that name most facts, and for every second clip its paraphrase. The same is measured
of those clips themselves, of the clips through the generator's codec, and of random codes, so that the generator's figures
have something to stand beside. Some clips are written to WORK/judge as WAV, and those of the card beside the generator.
"""

import re
from pathlib import Path

import numpy as np
import soundfile as sf
import torch
from arrange import NOTE_NAMES
from classifier import truths
from common import SAMPLING_RATE, load_clips, record, say, stage_arguments, start, to_float
from judges import JUDGED_S, Judges, agreement, count_faults
from torch import Tensor

from musicrl_hf.audio import write_audio
from musicrl_hf.bundled import resolve
from musicrl_hf.evaluation.metrics import frechet_distance
from musicrl_hf.generator import MusicRLForConditionalGeneration
from musicrl_hf.rewards import load_reward

N_PROMPTS, TINY_PROMPTS = 200, 8
BATCH = 50  # clips sampled at once
N_WRITTEN = 16  # clips of each group as WAV
CODED = "real_through_codec"
MODELS = {"musicrl-tiny": None, "musicrl-tiny-adherence": "adherence", "musicrl-tiny-quality": "quality"}
CARD_PROMPTS = [  # clips that come with each model's card
    "a dance tune with a melodic synth line and arpeggio",
    "a nostalgic tune played by an accordion band",
    "a slow air played by a flute",
    "a lively reel played by a fiddle, with drums",
]


def named_facts(text: str) -> dict[str, bool]:
    """Whether a prompt names beats a minute, and a key with its tonic."""
    key = rf"\b(?:{'|'.join(sorted(NOTE_NAMES, key=len, reverse=True))}) (?:major|minor|dorian|mixolydian)\b"
    return {"bpm": bool(re.search(r"\b\d+ bpm\b", text)), "key": bool(re.search(key, text))}


def choose_prompts(rows: list[dict]) -> list[str]:
    """For each clip, in turn: its caption that names most facts (beats a minute first), or its paraphrase."""

    def facts(text: str) -> tuple[bool, bool]:
        return tuple(named_facts(text).values())

    return [row["paraphrase"] if i % 2 else max(row["captions"], key=facts) for i, row in enumerate(rows)]


def sample(model: MusicRLForConditionalGeneration, prompts: list[str], guidance: float, seed: int) -> Tensor:
    """A clip [N, T] for each prompt."""
    parts = []
    for first in range(0, len(prompts), BATCH):
        some = prompts[first : first + BATCH]
        parts.append(model.sample(some, JUDGED_S, guidance_scale=guidance, seed=seed + first).audio[:, 0])
        say(f"guidance {guidance:g}: {first + len(some)} of {len(prompts)} clips")
    return torch.cat(parts)


def figures(heard: dict, rows: list[dict], prompts: list[str], reference: Tensor) -> dict:
    """All that is measured of one group of clips; `reference` [N, D] are embeddings of as many other real clips."""
    named = [named_facts(prompt) for prompt in prompts]
    found = agreement(heard, rows, *(np.array([facts[name] for facts in named]) for name in ("bpm", "key")))
    right = heard["instrument"] == truths(rows)["instrument"]
    found["instrument_by_prompt"] = {
        "caption": round(float(right[::2].float().mean()), 3),
        "paraphrase": round(float(right[1::2].float().mean()), 3),
    }
    found["scale_share"] = round(float(np.mean([row["scale_share"] for row in heard["measures"]])), 4)
    found["frechet_distance"] = round(frechet_distance(reference, heard["embedding"]), 3)
    return found | {"faulty_clips": count_faults(heard), "medians": medians(heard)}


def medians(heard: dict) -> dict[str, float]:
    """Medians of `tune_measures`."""
    rows = heard["measures"]
    return {name: round(float(np.median([row[name] for row in rows])), 3) for name in rows[0]}


def write(folder: Path, name: str, audio: Tensor) -> None:
    """Clips [N, T] as NAME_00.wav and so on."""
    for i, wave in enumerate(audio):
        sf.write(folder / f"{name}_{i:02d}.wav", wave.numpy(), SAMPLING_RATE)


def main() -> None:
    parser = stage_arguments(__doc__.splitlines()[0])
    parser.add_argument("--generator", help="folder or bundled name (default: the work folder's generator)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 3.0], help="guidance scales")
    parser.add_argument("--prompts", type=int, help=f"number of held-out prompts (default {N_PROMPTS})")
    args = parser.parse_args()
    start(args)
    model = MusicRLForConditionalGeneration.from_pretrained(
        resolve(args.generator or args.checkpoints / "musicrl-tiny", "--generator")
    ).eval()
    judges = Judges.load(args.work)
    n_prompts = args.prompts or (TINY_PROMPTS if args.tiny else N_PROMPTS)
    clips, rows = load_clips(args.work, "test")
    # The test clips come in two turns of all settings: one half is asked for, the other is what sound is compared with.
    order, half = np.random.default_rng(args.seed), len(rows) // 2
    chosen = order.permutation(half)[:n_prompts]
    others = half + order.permutation(half)[:n_prompts]
    if len(chosen) < n_prompts:
        raise SystemExit(f"--prompts {n_prompts}: half of the {len(rows)} test clips are {half}.")
    rows = [rows[i] for i in chosen]
    prompts = choose_prompts(rows)
    n_samples = JUDGED_S * SAMPLING_RATE
    real, other = (to_float(clips[some, :n_samples]) for some in (chosen, others))
    encoded = torch.cat([model.encode_audio(some[:, None]) for some in real.split(BATCH)])
    size = (n_prompts, model.config.num_codebooks, model.frames_for(JUDGED_S))
    codes = torch.randint(model.config.codebook_size, size, generator=torch.Generator().manual_seed(args.seed))
    groups = {"real": real}
    for name, group in ((CODED, encoded), ("random_codes", codes)):
        groups[name] = torch.cat([model.decode_codes(some, n_samples)[:, 0] for some in group.split(BATCH)])
        say(name)
    for guidance in args.guidance:
        groups[f"generated_guidance_{guidance:g}"] = sample(model, prompts, guidance, args.seed)
    named = sample(model, CARD_PROMPTS, args.guidance[-1], args.seed)
    reference = judges.hear(other)["embedding"]
    results: dict = {"prompts": n_prompts, "seconds": JUDGED_S, "groups": {}}
    folder = args.work / "judge"
    folder.mkdir(exist_ok=True)
    for name, audio in groups.items():
        results["groups"][name] = figures(judges.hear(audio), rows, prompts, reference)
        say(f"{name}: {results['groups'][name]}")
        write(folder, name, audio[:N_WRITTEN])
    results["clips"] = {f"samples/{text.replace(' ', '_').replace(',', '')}.flac": text for text in CARD_PROMPTS}
    results["clips_medians"] = medians(judges.hear(named))
    if args.generator is None:
        results["clips_scores"] = {}
        for folder_name, kind in MODELS.items():
            model_folder = args.checkpoints / folder_name
            (model_folder / "samples").mkdir(exist_ok=True)
            for name, wave in zip(results["clips"], named, strict=True):
                write_audio(model_folder / name, wave[None], SAMPLING_RATE)
            if kind is not None:
                scores = load_reward(f"{kind}:{model_folder}")(CARD_PROMPTS, named[:, None], SAMPLING_RATE)
                results["clips_scores"][folder_name] = [round(float(score), 3) for score in scores]
    coded = results["groups"][CODED]
    for found in results["groups"].values():
        found["scale_share_of_real"] = round(found["scale_share"] / results["groups"]["real"]["scale_share"], 3)
        found["frechet_distance_of_codec"] = round(found["frechet_distance"] / coded["frechet_distance"], 2)
    results["first_prompts"] = prompts[:4]
    record(args, "judge", results)


if __name__ == "__main__":
    main()
