"""How long does a clip take from its prompt to its file, process start and loading apart?

    python benchmarks/prompt_to_file.py --model musicrl-tiny --duration_s 5

At MusicGen's own settings (guidance 3, top-k 250), one clip at a time, beside transformers' own `generate` with the same
weights and settings, written the same way, the two taking turns.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from measuring import Stopwatch, add_shared_options, hardware, shown, spread, write_result
from transformers import MusicgenForConditionalGeneration

from musicrl_hf import load_generator
from musicrl_hf.audio import write_audio
from musicrl_hf.bundled import resolve

PROMPT = "a nostalgic tune played by an accordion band"


def measure(given: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each turn on both sides; a first turn is not counted."""
    ours = load_generator(given.model, device=given.device)
    stock = MusicgenForConditionalGeneration.from_pretrained(resolve(given.model)).to(given.device).eval()
    steps = ours.frames_for(given.duration_s) + ours.config.num_codebooks - 1
    watch, seconds = Stopwatch(given.device), {"here": [], "stock": []}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():

        def here(seed: int) -> None:
            clip = ours.sample([PROMPT], given.duration_s, seed=seed)
            write_audio(Path(folder) / "here.wav", clip.audio[0], clip.sampling_rate)

        def there() -> None:
            ids, mask = ours.text_inputs([PROMPT])
            options = {"max_new_tokens": steps, "guidance_scale": 3.0, "top_k": 250, "do_sample": True}
            sound = stock.generate(input_ids=ids, attention_mask=mask, **options)
            write_audio(Path(folder) / "stock.wav", sound[0], ours.sampling_rate)

        for seed in range(given.repeats + 1):
            seconds["here"].append(watch.seconds(lambda seed=seed: here(seed)))
            seconds["stock"].append(watch.seconds(there))
    return {side: turns[1:] for side, turns in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="From prompt to file.")
    parser.add_argument("--model", default="musicrl-tiny")
    parser.add_argument("--duration_s", type=float, default=5.0)
    add_shared_options(parser)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    where, seconds = hardware(given.device), measure(given)
    row = {
        side: f"{statistics.median(turns):.2f} [{min(turns):.2f}, {max(turns):.2f}]" for side, turns in seconds.items()
    }
    row = {f"s, {side}": text for side, text in row.items()}
    row["times faster"] = shown(spread([b / a for a, b in zip(seconds["here"], seconds["stock"], strict=True)]))
    what = f"A clip of {given.duration_s:g} s from `{given.model}`, from its prompt to its file, model loaded"
    write_result(given.results, "prompt_to_file", what, where, [row], seconds, given.device)


if __name__ == "__main__":
    main()
