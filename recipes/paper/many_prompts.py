"""Many prompts, written by the rules of ../captions.py for facts drawn at random: more than the package brings.

    python recipes/paper/many_prompts.py --count 2048 prompts.txt

None is among the bundled ones, which are collected, tuned and compared on elsewhere. Nobody has to have tunes for it.
"""

import argparse
import random
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from arrange import BPM, NOTE_NAMES
from captions import BACKINGS, INSTRUMENTS, TEMPI, captions, mood_by_rule
from render import MODE_SHARES

from musicrl_hf.audio import atomic_path
from musicrl_hf.preferences.schema import normalise_prompt, read_prompts

BUNDLED = Path(__file__).parent.parent.parent / "src" / "musicrl_hf" / "prompts"
KINDS = {  # and their metre, about as often as in the bundled prompts
    "folk tune": "4/4", "reel": "4/4", "jig": "6/8", "waltz": "3/4", "air": "4/4", "hornpipe": "4/4", "polka": "2/4",
}  # fmt: skip
KIND_SHARES = (60, 10, 8, 8, 4, 4, 2)


def random_facts(rng: random.Random) -> dict:
    """A clip's facts as captions.py reads them, each drawn by itself."""
    instrument, tempo = rng.choice(list(INSTRUMENTS)), rng.choice(TEMPI)
    mode = rng.choices(list(MODE_SHARES), list(MODE_SHARES.values()))[0]
    kind = rng.choices(list(KINDS), KIND_SHARES)[0]
    return {
        "instrument": instrument,
        "backing": rng.choice(BACKINGS),
        "bpm": rng.uniform(*BPM[tempo]),
        "tempo": tempo,
        "key": rng.choice(NOTE_NAMES),
        "mode": mode,
        "metre": KINDS[kind],
        "kind": kind,
        "mood": mood_by_rule(mode, tempo, instrument, rng),
    }


def many_prompts(count: int, seed: int = 0, but_not: Iterable[str] = ()) -> list[str]:
    """`count` different prompts, none of those of `but_not`, one phrasing of each clip that nobody rendered."""
    rng = random.Random(seed)
    bundled = [prompt for name in ("train", "heldout") for prompt in read_prompts(BUNDLED / f"{name}.txt")]
    known = {normalise_prompt(prompt) for prompt in (*bundled, *but_not)}
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        prompt = rng.choice(captions(random_facts(rng), rng))
        if normalise_prompt(prompt) not in known:
            prompts[prompt] = None
    return list(prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write many prompts, one a line.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--but_not", type=Path, help="file of prompts that are not to be among them")
    parser.add_argument(
        "--halves", type=Path, nargs=2, help="two more files, for the first and the second half of them"
    )
    parser.add_argument(
        "--part", nargs=3, metavar=("FROM", "UP_TO", "FILE"), help="one more file, for those of them, from 0"
    )
    arguments = parser.parse_args()
    known = read_prompts(arguments.but_not) if arguments.but_not else []
    prompts, half = many_prompts(arguments.count, arguments.seed, known), arguments.count // 2
    files = {}
    if arguments.halves:
        files |= dict(zip(arguments.halves, (prompts[:half], prompts[half:]), strict=True))
    if arguments.part:
        *bounds, out = arguments.part
        if not all(bound.isdecimal() for bound in bounds):
            raise SystemExit(f"`--part` must be two numbers and a file, got {' '.join(arguments.part)}.")
        first, end, out = int(bounds[0]), int(bounds[1]), Path(out)
        if not 0 <= first < end <= len(prompts):
            raise SystemExit(
                f"`--part` must be within 0 and {len(prompts)}, the first below the second, got {first} {end}."
            )
        files[out] = prompts[first:end]
    for out, part in {**files, arguments.out: prompts}.items():
        with atomic_path(out) as path:
            path.write_text("\n".join(part) + "\n")


if __name__ == "__main__":
    main()
