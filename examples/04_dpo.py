"""Direct preference optimisation: learn from votes alone, without a reward and without sampling.

    python examples/04_dpo.py --tiny
    python examples/04_dpo.py --preferences runs/votes --model facebook/musicgen-small --lora_r 16 --max_steps 500
    accelerate launch examples/04_dpo.py --config examples/configs/dpo.yaml

Every field of `DPOJob` also goes as `--field value`. `preferences` is what `musicrl import` wrote; its
clips are encoded once, and the codec is not run again. Without it, simulated listeners vote on pairs that the model samples
first. The result is a stock MusicGen (or, with `--lora_r`, a PEFT adapter), which plays without this package too. `--tiny`
makes four steps on votes about half-second clips.
"""

import argparse
import json
from pathlib import Path

from musicrl_hf import load_generator
from musicrl_hf.config import load_config
from musicrl_hf.preferences.listeners import simulated_listeners
from musicrl_hf.preferences.pairs import sample_pairs
from musicrl_hf.training.dpo import DPOJob, run_dpo
from musicrl_hf.training.processes import end_processes

PROMPTS = [
    "a dance tune with a melodic synth line and arpeggio",
    "a nostalgic tune played by an accordion band",
    "a slow air played by a flute",
    "a lively reel played by a violin with chords",
]
DEFAULTS = ["--output_dir", "out/dpo", "--learning_rate", "3e-5", "--max_steps", "100"]
TINY = ["--max_steps", "4", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--learning_rate", "1e-4"]


def vote(model: str, folder: Path, duration_s: float) -> Path:
    """Two clips a prompt from the model itself, and the choices of simulated listeners."""
    generator = load_generator(model)
    listeners = simulated_listeners(4)
    return sample_pairs(
        generator, PROMPTS, folder, listeners=listeners, name=model, duration_s=duration_s, pairs_per_prompt=4
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Direct preference optimisation of a generator.")
    parser.add_argument("--config", type=Path, help="flat YAML file of a DPOJob")
    parser.add_argument("--tiny", action="store_true", help="four steps on votes about half-second clips")
    arguments, fields = parser.parse_known_args()

    votes = "out/tiny_votes" if arguments.tiny else "out/votes"  # of half a second and of three
    defaults = [] if arguments.config else [*DEFAULTS, "--preferences", votes]
    job = load_config(DPOJob, arguments.config, [*defaults, *(TINY if arguments.tiny else []), *fields])
    if arguments.config is None and job.preferences == votes and not Path(job.preferences).exists():
        vote(job.model, Path(job.preferences), duration_s=0.5 if arguments.tiny else 3.0)
    out = run_dpo(job)

    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            print(f"step {line['step']:4d}  loss {line['loss']:.4f}  reward margin {line['rewards/margins']:+.4f}")
    counts = json.loads((out / "result.json").read_text())["metrics"]
    print(f"{counts['pairs']} pairs with a winner, {counts['left_out']} votes without; the model is in {out}")
    end_processes()


if __name__ == "__main__":
    main()
