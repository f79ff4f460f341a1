"""How much faster are codes sampled here than by transformers' own `generate`, on the same weights and prompts?

    python benchmarks/sampling.py --model musicrl-tiny --batch 1 16 64

From prompts to sound. Both draw from the model itself (temperature 1, no top-k), or take the likeliest codes (--greedy,
where both must sound the same). Seconds of the fastest of some repeats; behind the stroke, of the codes alone.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import MusicgenForConditionalGeneration

from musicrl_hf import load_generator
from musicrl_hf.bundled import resolve

PROMPTS = ["a slow air played by a flute", "piano, fast tempo, with a band and drums"]


def fastest(work: Callable[[], Tensor], repeats: int) -> tuple[float, Tensor]:
    """Wall time of the fastest run, in seconds, and what the last one gave."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - started)
    return min(times), result


def compare(ours, stock, batch: int, given: argparse.Namespace) -> str:
    """One line of the table."""
    ids, mask = ours.text_inputs([PROMPTS[i % 2] for i in range(batch)])
    frames = ours.frames_for(given.duration_s)
    options = {"guidance_scale": given.guidance_scale, "do_sample": not given.greedy}
    steps = frames + ours.config.num_codebooks - 1
    drawing, codes = fastest(lambda: ours.sample_codes(ids, mask, frames, **options), given.repeats)
    decoding, sound = fastest(lambda: ours.decode_codes(codes), given.repeats)
    there, stock_sound = fastest(
        lambda: stock.generate(input_ids=ids, attention_mask=mask, max_new_tokens=steps, top_k=0, **options),
        given.repeats,
    )
    here = drawing + decoding
    line = (
        f"batch {batch:3}: {steps} steps, ours {here:6.2f} / {drawing:.2f} s, stock {there:6.2f} s, "
        f"{there / here:.2f} times faster"
    )
    if given.greedy:
        line += ", same sound" if (sound - stock_sound).abs().max() < 1e-5 else ", OTHER SOUND"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description="Sampling against transformers' own generate.")
    parser.add_argument("--model", default="musicrl-tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--duration_s", type=float, default=3.0)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()

    torch.set_num_threads(given.threads)
    ours = load_generator(given.model)
    stock = MusicgenForConditionalGeneration.from_pretrained(resolve(given.model)).eval()
    print(f"{platform.processor() or platform.machine()}, {given.threads} of {os.cpu_count()} threads")
    for batch in given.batch:
        print(compare(ours, stock, batch, given), flush=True)


if __name__ == "__main__":
    main()
