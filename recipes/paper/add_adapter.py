"""A share of what one adapter learned, on another generator of the same base: weights are added, nothing is trained.

    python recipes/paper/add_adapter.py guided/distilled --share 0.5 --on larger/ru --out ru_guided

Both start from the same weights, so that what each of them changed can stand side by side (task arithmetic, Ilharco et al. 2023,
arXiv:2212.04089). The adapter that is written stands on the other generator, which may be an adapter itself.
"""

import argparse
import json
import math
from pathlib import Path

from one_adapter import CONFIG, WEIGHTS
from safetensors.torch import load_file, save_file

from musicrl_hf.audio import atomic_path
from musicrl_hf.bundled import resolve
from musicrl_hf.places import base_of_adapter, whole_path


def grown_from(name: str) -> Path:
    """The folder of the generator below all adapters."""
    folder = Path(resolve(name, "on"))
    return grown_from(base_of_adapter(folder)) if (folder / CONFIG).is_file() else folder.resolve()


def add(folder: Path, share: float, on: str, out: Path) -> None:
    """Write `share` of the LoRA adapter in `folder` as an adapter on `on`, which grew from what that stood on.

    Raises:
        ValueError: a share that is no finite number; something else than LoRA matrices in the folder; generators that have not
            grown from one.
    """
    if not math.isfinite(share):
        raise ValueError(f"`share` must be a finite number, got {share!r}.")
    weights = load_file(folder / WEIGHTS)
    for name in weights:
        if not name.endswith(("lora_A.weight", "lora_B.weight")):
            raise ValueError(f"`adapter` = {folder}: {name!r} is no LoRA matrix; give an adapter of nothing else.")
    roots = [grown_from(str(name)) for name in (folder, on)]
    if roots[0] != roots[1]:
        raise ValueError(
            f"`on` = {on!r} has grown from {roots[1]}, and {folder} from {roots[0]}: give one of the same base."
        )
    weights = {name: value * share if name.endswith("lora_B.weight") else value for name, value in weights.items()}
    config = json.loads((folder / CONFIG).read_text()) | {"base_model_name_or_path": whole_path(on)}
    with atomic_path(out) as temporary:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path, help="folder of the adapter that is added")
    parser.add_argument("--share", type=float, default=1.0, help="of what it changes")
    parser.add_argument("--on", required=True, help="what it is added to: a name or a folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter on that")
    args = parser.parse_args()
    add(args.adapter, args.share, args.on, args.out)
    print(f"{args.out}: {args.share:g} of {args.adapter} on {args.on}")


if __name__ == "__main__":
    main()
