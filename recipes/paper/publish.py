"""Take the first seed's adapters into the package: musicrl-tiny-r, -u and -ru, in half precision, with clips for their cards.

    python recipes/paper/publish.py --work build/paper
    python model_cards/build.py

The first seed whatever it came to: of several seeds the best one's figures would flatter. RU is that of the larger budget with guidance
in its weights, tuned on from there (guided.py), whose adapters `one_adapter.py` made one; the larger budget's U stays where it is, as it keeps
less than 80 % of the base's n-grams.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipe's stages, which are scripts
from common import SAMPLING_RATE
from gather import OUT, seeds_of, write
from judge import CARD_PROMPTS, sample
from one_adapter import CONFIG, SAMPLING, WEIGHTS
from safetensors.torch import load_file, save_file

from musicrl_hf import load_generator
from musicrl_hf.audio import write_audio
from musicrl_hf.bundled import CHECKPOINTS, write_manifest

BASES = {"r": "musicrl-tiny", "u": "musicrl-tiny", "ru": "musicrl-tiny-r"}


def publish(source: Path, target: Path, base: str) -> int:
    """Write an adapter's weights and configuration, and with what guidance it is played if it says so, aside and renamed; bytes of the folder.

    Raises:
        FileNotFoundError: `source` holds no adapter.
        ValueError: it is an adapter on something else than `base`.
    """
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    below = Path(config["base_model_name_or_path"]).name
    if below not in (base, base.removeprefix("musicrl-tiny-")):
        raise ValueError(f"{source} stands on {below!r}, and would be published as an adapter on {base!r}.")
    config["base_model_name_or_path"] = base
    target.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.half() for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(halves, target / f".{WEIGHTS}.part", metadata={"format": "pt"})
    (target / f".{WEIGHTS}.part").chmod(0o644)
    (target / f".{CONFIG}.part").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    names = [WEIGHTS, CONFIG]
    if (source / SAMPLING).is_file():
        names.append(SAMPLING)
        (target / f".{SAMPLING}.part").write_bytes((source / SAMPLING).read_bytes())
    else:
        (target / SAMPLING).unlink(missing_ok=True)
    for name in names:
        os.replace(target / f".{name}.part", target / name)
    return sum(path.stat().st_size for path in target.iterdir() if path.is_file())


def write_clips(target: Path) -> None:
    """Clips of the published adapter, for its card: samples/PROMPT.flac."""
    (target / "samples").mkdir(exist_ok=True)
    model = load_generator(target)
    waves = sample(model, CARD_PROMPTS, float(model.generation_config.guidance_scale or 3), seed=0)
    for prompt, wave in zip(CARD_PROMPTS, waves, strict=True):
        name = prompt.replace(" ", "_").replace(",", "")
        write_audio(target / "samples" / f"{name}.flac", wave[None], SAMPLING_RATE)


def note_shipped(results: Path) -> None:
    """Keep in results/paper.json what its loop's seeds came to, as the first of them ships: later runs are of others."""
    found = json.loads(results.read_text(encoding="utf-8"))
    of_loop = {key: found[key] for key in ("seeds", "date", "hardware", "win_rates")}
    found["shipped"] = of_loop | {"command": found["runs"][f"align_{found['seeds'][0]}"]["command"]}
    write(found, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/paper"))
    parser.add_argument("--names", nargs="+", choices=BASES, default=list(BASES))
    args = parser.parse_args()
    for name in args.names:
        folder = args.work / "guided" if name == "ru" else next(iter(seeds_of(args.work).values())).parent
        target = CHECKPOINTS / f"musicrl-tiny-{name}"
        print(f"{target.name}: {publish(folder / name, target, BASES[name]) / 1e6:.2f} MB")
    if {"r", "u"} & {*args.names}:
        note_shipped(OUT)
    for name in args.names:
        write_manifest()  # which a bundled base is compared with as it is loaded
        write_clips(CHECKPOINTS / f"musicrl-tiny-{name}")
    print(write_manifest())


if __name__ == "__main__":
    main()
