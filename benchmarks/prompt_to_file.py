"""How long does a clip take from its prompt to its file, process start and loading apart?

    python benchmarks/prompt_to_file.py --model musicrl-tiny --duration_s 5

At MusicGen's own settings (guidance 3, top-k 250), one clip at a time. Seconds of each repeat, and of transformers' own
`generate` with the same weights and settings, written the same way, in the same run.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import MusicgenForConditionalGeneration

from musicrl_hf import load_generator
from musicrl_hf.audio import write_audio
from musicrl_hf.bundled import resolve

PROMPT = "a nostalgic tune played by an accordion band"


def main() -> None:
    parser = argparse.ArgumentParser(description="From prompt to file.")
    parser.add_argument("--model", default="musicrl-tiny")
    parser.add_argument("--duration_s", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="torch threads; empty for all cores")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    ours = load_generator(given.model)
    stock = MusicgenForConditionalGeneration.from_pretrained(resolve(given.model)).eval()
    steps = ours.frames_for(given.duration_s) + ours.config.num_codebooks - 1
    times: dict[str, list[float]] = {"musicrl_hf": [], "transformers": []}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for seed in range(given.repeats + 1):  # the first is not counted
            started = time.perf_counter()
            clip = ours.sample([PROMPT], given.duration_s, seed=seed)
            write_audio(Path(folder) / "ours.wav", clip.audio[0], clip.sampling_rate)
            times["musicrl_hf"].append(time.perf_counter() - started)
            started = time.perf_counter()
            ids, mask = ours.text_inputs([PROMPT])
            sound = stock.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=steps, guidance_scale=3.0, top_k=250, do_sample=True
            )
            write_audio(Path(folder) / "stock.wav", sound[0], clip.sampling_rate)
            times["transformers"].append(time.perf_counter() - started)
    counted = {name: values[1:] for name, values in times.items()}
    medians = {name: statistics.median(values) for name, values in counted.items()}
    result = {
        "model": given.model,
        "clip_s": given.duration_s,
        "median_s": {name: round(value, 3) for name, value in medians.items()},
        "range_s": {name: [round(min(values), 3), round(max(values), 3)] for name, values in counted.items()},
        "times_faster": round(medians["transformers"] / medians["musicrl_hf"], 2),
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}",
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
