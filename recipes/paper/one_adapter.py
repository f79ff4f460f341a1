"""One LoRA adapter in place of several that stand on each other.

    python recipes/paper/one_adapter.py larger/ru_last --base seed_0/r --out larger/ru

PPO from an adapter trains another on top of it, so that three rounds are three adapters. What they add to a layer is one
product of the ranks in a row. `--base` is what the lowest of them stands on, which may be an adapter itself. `--rank` keeps of
each product the nearest one of that rank (Eckart and Young 1936), and says how much of it that is.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from musicrl_hf.audio import atomic_path

WEIGHTS, CONFIG, SAMPLING = "adapter_model.safetensors", "adapter_config.json", "generation_config.json"


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


def of_rank(weights: dict[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """The nearest products B A of that rank, and the share of their squared Frobenius norm that the least of them keeps."""
    found, kept = {}, 1.0
    for name in (name for name in weights if name.endswith("lora_A.weight")):
        name_b = name.replace("lora_A", "lora_B")
        q_a, r_a = torch.linalg.qr(weights[name].double().T)
        q_b, r_b = torch.linalg.qr(weights[name_b].double())
        u, size, v = torch.linalg.svd(r_b @ r_a.T)  # of B A = q_b (r_b r_a') q_a', without making it
        root = size[:rank].sqrt()
        found[name] = (root[:, None] * (q_a @ v[:rank].T).T).to(weights[name]).contiguous()
        found[name_b] = ((q_b @ u[:, :rank]) * root).to(weights[name_b]).contiguous()
        kept = min(kept, float((size[:rank] ** 2).sum() / (size**2).sum().clamp(min=1e-30)))
    return found, kept


def join(
    folder: Path, base: str, out: Path, rank: int | None = None, guidance_scale: float | None = None
) -> tuple[int, float]:
    """Write the adapter, and at what guidance scale it is sampled by default where that is given; how many it is made of, and the least share that `rank` keeps of what they change in a layer.

    Raises:
        ValueError: those in the stack are scaled differently, or a rank that is not from 1 to the sum of theirs.
    """
    stack = stack_of(folder, base)
    configs = [json.loads((part / CONFIG).read_text()) for part in stack]
    scales = {config["lora_alpha"] / config["r"] for config in configs}
    others = [
        name for name in ("use_rslora", "rank_pattern", "alpha_pattern") for config in configs if config.get(name)
    ]
    if len(scales) > 1 or others:
        raise ValueError(f"the adapters under {folder} are scaled by {sorted(scales)} {others}: they cannot be joined.")
    whole, kept = sum(config["r"] for config in configs), 1.0
    if rank is not None and not 1 <= rank <= whole:
        raise ValueError(f"`rank` must be from 1 to {whole}, the sum of the adapters' ranks, got {rank}.")
    weights = joined([load_file(part / WEIGHTS) for part in stack])
    if rank is not None:
        weights, kept = of_rank(weights, rank)
    rank = whole if rank is None else rank
    config = configs[-1] | {
        "r": rank,
        "lora_alpha": round(rank * scales.pop()),
        "base_model_name_or_path": configs[0]["base_model_name_or_path"],
    }
    with atomic_path(out) as temporary:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        save_file(weights, temporary / WEIGHTS, metadata={"format": "pt"})
        if guidance_scale is not None:
            (temporary / SAMPLING).write_text(json.dumps({"guidance_scale": guidance_scale}) + "\n")
    return len(stack), kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path, help="folder of the last one")
    parser.add_argument("--base", required=True, help="what the lowest one stands on: a name or a folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the one adapter")
    parser.add_argument("--rank", type=int, help="of the one adapter; all of theirs by default")
    parser.add_argument("--guidance_scale", type=float, help="that it is sampled at by default; that of its base")
    args = parser.parse_args()
    count, kept = join(args.adapter, args.base, args.out, args.rank, args.guidance_scale)
    print(f"{args.out}: {count} adapters in one, {kept:.2%} or more of the square of what they change in a layer")


if __name__ == "__main__":
    main()
