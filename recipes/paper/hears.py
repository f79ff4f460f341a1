"""What of the simulated listeners' taste does a reward hear? Their liking is a sum over descriptors of the sound: how far do a
reward's differences between two clips go with each of the sum's terms?

    python recipes/paper/hears.py --preferences votes --test_share 0.4 \
        --rewards "CLAP=preference:clap" "generator=preference:generator" adherence

Votes are those of the prompts that `musicrl reward` holds out with the same `--test_share` and `--seed`. A correlation is about
zero, as which clip of a pair stands first means nothing. Leaves results/reward_hears.json.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from plan import PANEL
from torch import Tensor

from musicrl_hf.audio import atomic_path, match_loudness, read_audio
from musicrl_hf.preferences.listeners import (
    FEATURES,
    LISTENER_VERSION,
    PANEL_SEED,
    PANEL_SIZE,
    clip_features,
    simulated_listeners,
)
from musicrl_hf.preferences.schema import AUDIO_COLUMNS, decided_pairs, load_preferences
from musicrl_hf.preferences.splits import split_by_prompt
from musicrl_hf.rewards.combine import load_rewards
from musicrl_hf.training.reward_report import share_right

OUT = Path(__file__).resolve().parents[2] / "results" / "reward_hears.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preferences", required=True)
    parser.add_argument("--test_share", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rewards", nargs="+", required=True, help="NAME=SPEC, or a spec that is its own name")
    parser.add_argument("--batch_size", type=int, default=32, help="clips scored at once")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows, _ = decided_pairs(split_by_prompt(load_preferences(args.preferences), args.test_share, args.seed)["test"])
    print(f"{len(rows)} held-out votes", flush=True)
    weights = torch.tensor([one.weights for one in simulated_listeners(PANEL_SIZE, PANEL_SEED)]).mean(0)
    terms = differences(rows, args.batch_size, lambda *clips: weights * clip_features(*clips))
    named = dict(spec.split("=", 1) if "=" in spec else (spec, spec) for spec in args.rewards)
    given = [f'"{name}=SPEC"' if name != spec else name for name, spec in named.items()]
    margins = {
        name: differences(rows, args.batch_size, load_rewards(spec))
        for name, spec in {**named, "held-out panel": PANEL}.items()
    }
    found = {
        "what": "How a reward's differences between two clips of a prompt go with the terms of the simulated listeners' "
        f"liking ({LISTENER_VERSION}: nobody listened)",
        "command": f"python recipes/paper/hears.py --preferences VOTES --test_share {args.test_share:g} --seed {args.seed} "
        f"--rewards {' '.join(given)}",
        "votes": len(rows),
        "spread": {name: round(float(terms[:, i].std()), 3) for i, name in enumerate(FEATURES)},
        "rewards": {
            name: {
                "accuracy": round(share_right(own), 4),
                "correlation": {term: round(about_zero(own, terms[:, i]), 3) for i, term in enumerate(FEATURES)},
            }
            for name, own in margins.items()
        },
    }
    with atomic_path(args.out) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def differences(rows: Dataset, batch_size: int, score: Callable[[list[str], Tensor, int], Tensor]) -> Tensor:
    """Chosen minus rejected of what `score` says of clips at equal loudness, [N, ...]; a clip of a prompt is asked about once."""
    sides = [[(row["prompt"], row[side]["bytes"]) for row in rows] for side in AUDIO_COLUMNS]
    clips = list(dict.fromkeys(clip for side in sides for clip in side))
    scores: dict[tuple[str, bytes], Tensor] = {}
    for start in range(0, len(clips), batch_size):
        part = clips[start : start + batch_size]
        heard = [read_audio(data) for _, data in part]
        if len({(audio.shape, rate) for audio, rate in heard}) > 1:
            raise SystemExit(
                "--preferences: clips of several lengths or rates; these are of `musicrl pairs`, and alike"
            )
        audio, rate = torch.stack([match_loudness(audio, rate) for audio, rate in heard]), heard[0][1]
        scores |= zip(part, score([prompt for prompt, _ in part], audio, rate), strict=True)
    chosen, rejected = (torch.stack([scores[clip] for clip in side]) for side in sides)
    return chosen - rejected


def about_zero(a: Tensor, b: Tensor) -> float:
    """Correlation of differences whose sign is a matter of order."""
    return float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-12))


if __name__ == "__main__":
    main()
