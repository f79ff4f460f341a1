"""One LoRA adapter in place of several that stand on each other.

    python recipes/paper/one_adapter.py larger/ru_last --base seed_0/r --out larger/ru

PPO from an adapter trains another on top of it, so that three rounds are three adapters. What they add to a layer is one
product of the ranks in a row. `--base` is what the lowest of them stands on, which may be an adapter itself.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from musicrl_hf.audio import atomic_path

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def stack_of(folder: Path, base: str) -> list[Path]:
    """The adapter and those between it and `base`, the lowest first.

    Raises:
        ValueError: they do not stand on `base`.
    """
    below = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    if below == base or (Path(base).exists() and Path(below).resolve() == Path(base).resolve()):
        return [folder]
    if not (Path(below) / CONFIG).is_file():
        raise ValueError(
            f"`base` = {base!r}: {folder} stands on {below!r}, and that is no adapter; give what they stand on."
        )
    return [*stack_of(Path(below), base), folder]


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A's below each other, B's beside each other: their product is the sum of the products.

    Raises:
        ValueError: something else than LoRA matrices, or other layers in one than in another.
    """
    if any(part.keys() != parts[0].keys() for part in parts):
        raise ValueError("the adapters are of different layers: they cannot be joined.")
    found = {}
    for name in parts[0]:
        if not name.endswith(("lora_A.weight", "lora_B.weight")):
            raise ValueError(f"{name!r} is no LoRA matrix: only adapters of nothing else can be joined.")
        found[name] = torch.cat([part[name] for part in parts], 0 if name.endswith("lora_A.weight") else 1)
    return found


def join(folder: Path, base: str, out: Path) -> int:
    """Write the adapter, and say how many it is made of; ValueError where those in the stack are scaled differently."""
    stack = stack_of(folder, base)
    configs = [json.loads((part / CONFIG).read_text()) for part in stack]
    scales = {config["lora_alpha"] / config["r"] for config in configs}
    others = [
        name for name in ("use_rslora", "rank_pattern", "alpha_pattern") for config in configs if config.get(name)
    ]
    if len(scales) > 1 or others:
        raise ValueError(f"the adapters under {folder} are scaled by {sorted(scales)} {others}: they cannot be joined.")
    rank = sum(config["r"] for config in configs)
    config = configs[-1] | {
        "r": rank,
        "lora_alpha": round(rank * scales.pop()),
        "base_model_name_or_path": configs[0]["base_model_name_or_path"],
    }
    weights = joined([load_file(part / WEIGHTS) for part in stack])
    with atomic_path(out) as temporary:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
    return len(stack)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path, help="folder of the last one")
    parser.add_argument("--base", required=True, help="what the lowest one stands on: a name or a folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the one adapter")
    args = parser.parse_args()
    print(f"{args.out}: {join(args.adapter, args.base, args.out)} adapters in one")


if __name__ == "__main__":
    main()
