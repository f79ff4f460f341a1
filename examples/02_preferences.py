"""Preferences: from clips of one's own, or from pairs that a generator samples and simulated listeners choose between.

    python examples/02_preferences.py --tiny
    python examples/02_preferences.py --folder my_clips --score_column rating --out out/preferences
    python examples/02_preferences.py --model facebook/musicgen-small --prompts prompts.txt

`--folder` holds clips and a table `clips.jsonl` (`prompt`, `audio`, `system` and a score a row) or `pairs.csv`. Without it, two
clips of `--model` are sampled for each prompt. Either way the result is one folder of Parquet files, which
`datasets.load_dataset` reads and every training command takes. `--tiny` samples four pairs of one second.
"""

import argparse
from pathlib import Path

from musicrl_hf import load_generator
from musicrl_hf.devices import find_device
from musicrl_hf.preferences import (
    cache_codes,
    decided_pairs,
    import_folder,
    load_preferences,
    sample_pairs,
    simulated_listeners,
)
from musicrl_hf.preferences.schema import read_prompts

PROMPTS = [
    "a dance tune with a melodic synth line and arpeggio",
    "a nostalgic tune played by an accordion band",
    "a slow air played by a flute, alone",
    "a lively reel played by a fiddle with drums",
]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a preference data set.")
    parser.add_argument("--folder", type=Path, help="clips of your own; without it, clips are sampled")
    parser.add_argument("--score_column", help="column of the table to compare clips by")
    parser.add_argument("--model", default="musicrl-tiny", help="bundled name, folder or Hub id")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt a line")
    parser.add_argument("--pairs_per_prompt", type=int, default=4)
    parser.add_argument("--duration_s", type=float, default=5.0, help="seconds a clip")
    parser.add_argument("--out", type=Path, default=Path("out/preferences"), help="folder to write")
    parser.add_argument("--tiny", action="store_true", help="four pairs of one second")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.pairs_per_prompt, arguments.duration_s = 1, 1.0

    generator = load_generator(arguments.model, device=find_device())
    if arguments.folder is not None:
        print(import_folder(arguments.folder, arguments.out, score_column=arguments.score_column))
    else:
        sample_pairs(
            generator,
            read_prompts(arguments.prompts) if arguments.prompts else PROMPTS,
            arguments.out,
            listeners=simulated_listeners(8),
            name=arguments.model,
            duration_s=arguments.duration_s,
            pairs_per_prompt=arguments.pairs_per_prompt,
        )

    preferences = load_preferences(arguments.out)
    for row in preferences.select(range(min(4, len(preferences)))):
        print(f"{row['preference']:8s} {row['chosen_model']} over {row['rejected_model']}: {row['prompt']}")
    labels = preferences["preference"]
    print(
        f"{len(preferences)} rows in {arguments.out}: " + ", ".join(f"{labels.count(k)} {k}" for k in sorted({*labels}))
    )

    # What training reads: codes, each distinct clip encoded once. Sampled clips came with theirs.
    with_codes = cache_codes(preferences, generator, arguments.out.with_name("codes"))
    first = with_codes[0]["chosen_codes"]
    print(f"codes of the first clip: {len(first)} codebooks x {len(first[0])} frames")
    if {*labels} & {"a", "b"}:
        print("for training:", decided_pairs(with_codes)[1])


if __name__ == "__main__":
    main()
