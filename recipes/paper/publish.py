"""Take one seed's adapters into the package: musicrl-tiny-r, -u and -ru, in half precision, each on the model that it was tuned from.

python recipes/paper/publish.py --work build/paper --seed 0
python model_cards/build.py
"""

import argparse
import json
import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from musicrl_hf.bundled import CHECKPOINTS, write_manifest

BASES = {"r": "musicrl-tiny", "u": "musicrl-tiny", "ru": "musicrl-tiny-r"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def publish(source: Path, target: Path, base: str) -> int:
    """Write an adapter's weights and configuration, aside and renamed; bytes of the folder.

    Raises:
        FileNotFoundError: `source` holds no adapter.
    """
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    target.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.half() for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(halves, target / f".{WEIGHTS}.part", metadata={"format": "pt"})
    (target / f".{WEIGHTS}.part").chmod(0o644)
    (target / f".{CONFIG}.part").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for name in (WEIGHTS, CONFIG):
        os.replace(target / f".{name}.part", target / name)
    return sum(path.stat().st_size for path in target.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/paper"))
    parser.add_argument("--seed", type=int, default=0, help="whose adapters")
    args = parser.parse_args()
    for name, base in BASES.items():
        target = CHECKPOINTS / f"musicrl-tiny-{name}"
        print(f"{target.name}: {publish(args.work / f'seed_{args.seed}' / name, target, base) / 1e6:.2f} MB")
    print(write_manifest())


if __name__ == "__main__":
    main()
