"""RL fine-tuning: sample clips, score them, move the policy towards what scored well, stay near where it started.

    python examples/06_ppo.py --tiny
    python examples/06_ppo.py --objective paper --model facebook/musicgen-small \
        --reward adherence:laion/larger_clap_music --max_steps 2000 --lora_r 16
    accelerate launch examples/06_ppo.py --config examples/configs/musicrl_r.yaml

Every field of `PPOJob` also goes as `--field value`. What to look at afterwards: `metrics.jsonl` (reward against KL),
`samples/step_N/*.wav` (the same prompts and seed at each step, so that only the model differs), and the model itself, which
is a stock MusicGen. `--tiny` makes four steps on half-second clips.
"""

import argparse
import json
import tempfile
from pathlib import Path

from musicrl_hf.config import load_config
from musicrl_hf.training.ppo import run_ppo
from musicrl_hf.training.ppo_config import PPOJob
from musicrl_hf.training.processes import end_processes

PROMPTS = [
    "a dance tune with a melodic synth line and arpeggio",
    "a nostalgic tune played by an accordion band",
    "a slow air played by a flute",
    "a lively reel played by a violin with chords",
]
DEFAULTS = ["--output_dir", "out/ppo", "--duration_s", "3", "--learning_rate", "3e-5", "--max_steps", "100"]
TINY = [
    *("--duration_s", "0.5", "--max_steps", "4", "--per_device_train_batch_size", "4", "--logging_steps", "1"),
    *("--sample_steps", "4", "--learning_rate", "1e-4"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="RL fine-tuning of a generator.")
    parser.add_argument("--config", type=Path, help="flat YAML file of a PPOJob")
    parser.add_argument("--tiny", action="store_true", help="four steps on half-second clips")
    arguments, fields = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        ours = [] if arguments.config else [*DEFAULTS, "--prompts", str(prompts), "--eval_prompts", str(prompts)]
        job = load_config(PPOJob, arguments.config, [*ours, *(TINY if arguments.tiny else []), *fields])
        out = run_ppo(job)

    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            print(f"step {line['step']:4d}  reward {line['reward']:.3f}  KL {line['kl']:.3f} nats a clip")
    print(f"model, samples and metrics are in {out}")
    end_processes()


if __name__ == "__main__":
    main()
