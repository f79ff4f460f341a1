"""Learn what a listener prefers, from pairs of clips: train a preference reward and test it on prompts it never saw.

    python examples/03_reward.py --tiny
    python examples/03_reward.py --preferences runs/prefs --backbone generator --max_steps 300

`--preferences` takes a folder of `musicrl import`, or a Hub id. `--tiny` first makes 24 pairs of a clean
and a noisy tone, so that there is something to learn in seconds.
"""

import argparse
import json
from pathlib import Path

import torch

from musicrl_hf import load_reward
from musicrl_hf.audio import audio_bytes
from musicrl_hf.preferences.schema import preferences_from_rows, save_preferences
from musicrl_hf.training.reward import RewardJob, run_reward

SAMPLING_RATE = 16000  # Hz


def tone(pitch_hz: float, noise: float) -> torch.Tensor:
    """Two seconds [1, T] of a tone in noise."""
    time = torch.arange(2 * SAMPLING_RATE) / SAMPLING_RATE
    return 0.2 * (torch.sin(2 * torch.pi * pitch_hz * time) + noise * torch.randn(len(time)))[None]


def make_pairs(folder: Path) -> Path:
    """24 comparisons in which the cleaner tone won."""
    rows = []
    for number in range(24):
        clean, noisy = tone(200.0 + 25 * number, 0.05), tone(200.0 + 25 * number, 0.8)
        rows.append(
            {
                "prompt": f"a tone of {200 + 25 * number} Hz",
                "chosen": audio_bytes(clean, SAMPLING_RATE),
                "rejected": audio_bytes(noisy, SAMPLING_RATE),
                "chosen_model": "clean",
                "rejected_model": "noisy",
                "preference": "ab"[number % 2],
                "listener": "rule:less-noise",
                "source": "example",
                "created_at": "2026-01-01T00:00:00+00:00",
            }
        )
    return save_preferences(preferences_from_rows(rows), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a preference reward.")
    parser.add_argument("--preferences", help="folder or Hub id")
    parser.add_argument("--backbone", default="clap", choices=["clap", "generator"])
    parser.add_argument("--model", help="CLAP model or generator to start from; the bundled one by default")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("out/reward"), help="folder for the model")
    parser.add_argument("--tiny", action="store_true", help="make pairs of tones and take 20 steps")
    arguments = parser.parse_args()
    if not arguments.tiny and arguments.preferences is None:
        parser.error("give --preferences, or --tiny for an example that brings its own")

    torch.manual_seed(0)
    job = RewardJob(
        preferences=str(make_pairs(arguments.out / "pairs")) if arguments.tiny else arguments.preferences,
        output_dir=str(arguments.out / "model"),
        backbone=arguments.backbone,
        model=arguments.model,
        max_steps=20 if arguments.tiny else arguments.max_steps,
        per_device_train_batch_size=8,
        test_share=0.3,
    )
    folder = run_reward(job)
    result = json.loads((folder / "result.json").read_text())["metrics"]
    low, high = result["chance_interval"]
    print(
        f"right on {result['accuracy']:.0%} of {result['n_pairs']} pairs of held-out prompts (chance {low:.0%}-{high:.0%})"
    )

    reward = load_reward(f"preference:{folder}")
    clips = torch.stack([tone(440.0, 0.05), tone(440.0, 0.8)])
    scores = reward(["a tone of 440 Hz"] * 2, clips, SAMPLING_RATE)
    print(f"clean {scores[0]:.2f}, noisy {scores[1]:.2f}")


if __name__ == "__main__":
    main()
