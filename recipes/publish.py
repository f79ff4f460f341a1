"""Take the finished files of a work folder into the package: checkpoints, and what was measured.

    python recipes/publish.py --work build/tiny
    python model_cards/build.py
    python recipes/publish.py --manifest          # SHA256SUMS alone, for the files that are in the package

Apart from the stages, so that a trial run never changes what the package ships.
"""

import argparse
import os
import shutil
from pathlib import Path

from musicrl_hf.bundled import write_manifest

RECIPES = Path(__file__).resolve().parent
CHECKPOINTS = RECIPES.parent / "src" / "musicrl_hf" / "checkpoints"
MODELS = ("musicrl-tiny", "musicrl-tiny-adherence", "musicrl-tiny-quality")


def copy_files(source: Path, target: Path) -> int:
    """Copy the files of a folder aside and rename them, the weights first; bytes copied."""
    total = 0
    files = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: path.suffix != ".safetensors"):
        final = target / path.relative_to(source)
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = final.with_name(f".{final.name}.part")
        shutil.copyfile(path, aside)
        os.replace(aside, final)
        total += path.stat().st_size
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="folder of a finished run")
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS, help="where the package keeps them")
    parser.add_argument("--results", type=Path, default=RECIPES / "results", help="where measurements are kept")
    parser.add_argument("--manifest", action="store_true", help="only write SHA256SUMS of what the package keeps")
    args = parser.parse_args()
    if args.manifest:
        print(write_manifest(args.checkpoints))
        return
    missing = [name for name in MODELS if not (args.work / "checkpoints" / name / "config.json").exists()]
    if missing:
        raise SystemExit(f"{args.work} has no {', '.join(missing)} yet: run recipes/run.py --work {args.work} first.")
    for name in MODELS:
        print(f"{name}: {copy_files(args.work / 'checkpoints' / name, args.checkpoints / name) / 1e6:.1f} MB")
    print(write_manifest(args.checkpoints))
    print(f"measurements: {copy_files(args.work / 'results', args.results)} bytes; now run model_cards/build.py")


if __name__ == "__main__":
    main()
