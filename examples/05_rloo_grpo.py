"""REINFORCE leave-one-out, or GRPO: compare the clips of one prompt with each other; no value model to train.

    python examples/05_rloo_grpo.py --tiny
    python examples/05_rloo_grpo.py --algorithm grpo --reward 0.5*adherence 0.5*quality --num_generations 8
    accelerate launch examples/05_rloo_grpo.py --config examples/configs/rloo.yaml

Every field of `RLOOJob` (or `GRPOJob`) also goes as `--field value`. A reward is a name, or a function of yours as
`module:function` that takes (prompts, audio [B, C, T], sampling rate) and returns scores [B]. Clips are sampled without
guidance and top-k, since those are what the policy would then not be scored on. `--tiny` makes two steps on half-second
clips.
"""

import argparse
import json
import tempfile
from pathlib import Path

from musicrl_hf.config import load_config
from musicrl_hf.training.online import GRPOJob, RLOOJob, run_grpo, run_rloo
from musicrl_hf.training.processes import end_processes

PROMPTS = [
    "a dance tune with a melodic synth line and arpeggio",
    "a nostalgic tune played by an accordion band",
    "a slow air played by a flute",
    "a lively reel played by a violin with chords",
]
ALGORITHMS = {"rloo": (RLOOJob, run_rloo), "grpo": (GRPOJob, run_grpo)}
DEFAULTS = ["--duration_s", "3", "--learning_rate", "3e-5", "--max_steps", "100"]
TINY = [
    *("--duration_s", "0.5", "--max_steps", "2", "--per_device_train_batch_size", "8", "--logging_steps", "1"),
    *("--learning_rate", "1e-4"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description="RLOO or GRPO on a generator.")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="rloo")
    parser.add_argument("--config", type=Path, help="flat YAML file of an RLOOJob or GRPOJob")
    parser.add_argument("--tiny", action="store_true", help="two steps on half-second clips")
    arguments, fields = parser.parse_known_args()

    job_class, run = ALGORITHMS[arguments.algorithm]
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(PROMPTS))
        defaults = [*DEFAULTS, "--output_dir", f"out/{arguments.algorithm}", "--prompts", str(prompts)]
        ours = [*([] if arguments.config else defaults), *(TINY if arguments.tiny else [])]
        out = run(load_config(job_class, arguments.config, [*ours, *fields]))

    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            print(f"step {line['step']:4d}  reward {line['reward']:.3f}  KL {line['kl']:.5f} nats a code")
    print(f"the model is in {out}")
    end_processes()


if __name__ == "__main__":
    main()
