"""Where do the seconds of a PPO iteration of a larger generator go, and how much memory does it take at its peak?

    python benchmarks/ppo_iteration.py --device cuda --lora_r 16 0

A decoder of musicgen-small's size with random weights, the text encoder and codec of musicrl-tiny; clips are scored by the bundled adherence
reward, activations checkpointed. Each training is a process of its own. Seconds are of the last of a few iterations. Leaves
benchmarks/results/ppo_iteration.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from measuring import add_shared_options, hardware, peak_mb, write_result
from sampling import SIZES
from training import generator_of

from musicrl_hf.training.ppo import run_ppo
from musicrl_hf.training.ppo_config import PPOJob

PROMPTS = ["a slow air played by a flute", "piano, fast tempo, with a band and drums"]
PARTS = ("sample_s", "decode_s", "score_s", "update_s")


def train(model: str, folder: Path, lora_r: int, given: argparse.Namespace) -> dict:
    """Peak of memory in MB of a whole training, and the seconds of its last iteration."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"{PROMPTS[i % 2]}, take {i}" for i in range(given.clips)), encoding="utf-8")
    job = PPOJob(
        model=model,
        output_dir=str(folder / "tuned"),
        prompts=str(prompts),
        duration_s=given.duration_s,
        per_device_train_batch_size=given.at_once,
        gradient_accumulation_steps=given.clips // given.at_once,
        local_rollout_forward_batch_size=given.clips,
        max_steps=given.steps,
        logging_steps=1,
        gradient_checkpointing=True,
        bf16=given.bf16,
        lora_r=lora_r,
    )
    mb = peak_mb(lambda: run_ppo(job), given.device)
    lines = (folder / "tuned" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [line for line in map(json.loads, lines) if PARTS[0] in line][-1]
    return {"lora_r": lora_r, "peak_mb": mb, **{part: last[part] for part in PARTS}}


def measure(model: str, lora_r: int, given: argparse.Namespace) -> dict:
    """`train` in a process of its own, which nothing else has stretched."""
    command = [sys.executable, __file__, *sys.argv[1:], "--train", model, str(lora_r)]
    where = (
        {} if given.device.startswith("cuda") else {"CUDA_VISIBLE_DEVICES": ""}
    )  # a job takes the accelerator that it finds
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | where)
    return json.loads(done.stdout.splitlines()[-1])


def row_of(found: dict) -> dict[str, str]:
    return {
        "trained": f"LoRA, r = {found['lora_r']}" if found["lora_r"] else "all weights",
        "GB at the peak": "" if found["peak_mb"] is None else f"{found['peak_mb'] / 1e3:.2f}",
        **{f"s to {part.removesuffix('_s')}": f"{found[part]:.2f}" for part in PARTS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="musicrl-tiny")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the decoder, random weights")
    parser.add_argument(
        "--lora_r", type=int, nargs="+", default=[16, 0], help="ranks of adapters; 0 trains all weights"
    )
    parser.add_argument("--clips", type=int, default=16, help="an iteration")
    parser.add_argument("--at_once", type=int, default=4, help="clips in a forward pass with gradient")
    parser.add_argument("--duration_s", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--tiny", action="store_true", help="the model itself, 2 clips of .1 s: to see that it runs")
    parser.add_argument("--train", nargs=2, metavar=("MODEL", "RANK"), help="train this one, and print what it took")
    add_shared_options(parser)
    given = parser.parse_args()
    if given.tiny:
        given.size, given.clips, given.at_once, given.duration_s, given.steps = None, 2, 2, 0.1, 1
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        if given.train:
            model, rank = given.train
            print(json.dumps(train(model, Path(folder), int(rank), given)))
            return
        where = hardware(given.device)
        model = generator_of(given)
        model.save_pretrained(folder)
        del model
        measured = []
        for rank in given.lora_r:
            measured.append(measure(folder, rank, given))
            print(row_of(measured[-1]), flush=True)
    named = f"a decoder of musicgen-{given.size}'s size (random weights)" if given.size else f"`{given.model}`"
    what = (
        f"PPO iterations of {named}{' under bfloat16 autocast' if given.bf16 else ''}, {given.clips} clips of {given.duration_s:g} s, "
        f"{given.at_once} at once with gradient, activations checkpointed; text encoder and codec are musicrl-tiny's"
    )
    write_result(given.results, "ppo_iteration", what, where, [*map(row_of, measured)], measured, given.device)


if __name__ == "__main__":
    main()
