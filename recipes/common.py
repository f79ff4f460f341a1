"""What every stage shares: the work folder, atomic writes, clips on disk and the record of what was measured."""

import argparse
import json
import os
import random
import shlex
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

SAMPLING_RATE = 16_000  # Hz
CLIP_S = 10  # seconds
FRAME_RATE = 50  # codec frames per second
N_CODEBOOKS = 4
CODEBOOK_SIZE = 1024
TINY_MINUTES = 0.25  # of training a stage, with --tiny
PACKAGES = ("torch", "transformers", "encodec", "numpy", "scipy", "music21", "pretty_midi", "tinysoundfont")


def stage_arguments(description: str, minutes: float | None = None) -> argparse.ArgumentParser:
    """Command line of one stage: the work folder, threads, seed and, where it trains, its budget in minutes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="folder for data and checkpoints")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="run again although the stage is finished")
    parser.add_argument("--tiny", action="store_true", help="little data and seconds of training: shows that it runs")
    if minutes is not None:
        parser.add_argument(
            "--minutes", type=float, help=f"training time, over all restarts (min; default {minutes:g})"
        )
        parser.set_defaults(default_minutes=minutes)
    return parser


def start(args: argparse.Namespace) -> None:
    """Create the work folder, fill in the budget, set the threads and seed every generator."""
    args.work.mkdir(parents=True, exist_ok=True)
    args.checkpoints, args.results = args.work / "checkpoints", args.work / "results"
    if "default_minutes" in args and args.minutes is None:
        args.minutes = TINY_MINUTES if args.tiny else args.default_minutes
    torch.set_num_threads(args.threads)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)


def say(text: str) -> None:
    """Print with the time, unbuffered, so that a log can be followed."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def write_json(path: Path, content: object) -> None:
    """Write aside and rename: a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf8")
    os.replace(aside, path)


def read_json(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf8"))


def write_array(path: Path, array: np.ndarray) -> None:
    """`np.save`, written aside and renamed."""
    aside = path.with_name(path.name + ".part")
    with open(aside, "wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(aside, path)


def load_clips(work: Path, split: str) -> tuple[np.ndarray, list[dict]]:
    """Clips [N, T] as int16, memory-mapped, and one row of captions and metadata for each."""
    return np.load(work / f"clips_{split}.npy", mmap_mode="r"), read_json(work / f"rows_{split}.json")


def to_float(clips: np.ndarray) -> torch.Tensor:
    """int16 samples [..., T] to float32 in [-1, 1]."""
    return torch.from_numpy(clips.astype(np.float32) / 32767.0)


def random_crops(
    clips: np.ndarray, size: int, n_samples: int, rng: np.random.Generator, chosen: np.ndarray | None = None
) -> tuple[torch.Tensor, list[int]]:
    """`size` crops [B, n_samples] from random places of the clips `chosen` [B] (random ones), and those clips' indices."""
    if chosen is None:
        chosen = rng.integers(len(clips), size=size)
    starts = rng.integers(clips.shape[1] - n_samples + 1, size=size)
    crops = np.stack([clips[i, s : s + n_samples] for i, s in zip(chosen, starts, strict=True)])
    return to_float(crops), chosen.tolist()


def save_training_state(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Weights and optimiser moments as safetensors, progress as JSON; the folder's files are replaced one by one."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for index, slot in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value.clone() for key, value in slot.items()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "state.safetensors.part")
    os.replace(folder / "state.safetensors.part", folder / "state.safetensors")
    write_json(folder / "progress.json", progress)


def load_training_state(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
    """Restore what `save_training_state` wrote; None where nothing was saved yet."""
    if not (folder / "progress.json").exists():
        return None
    tensors = load_file(folder / "state.safetensors")
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            slots.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return read_json(folder / "progress.json")


def versions() -> dict[str, str]:
    """Versions of what the results depend on, as far as it is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # the later stages run without what plays the clips
    return found


def record(args: argparse.Namespace, name: str, results: dict) -> None:
    """Keep what was measured in WORK/results/NAME.json, with the command, seed, machine and versions."""
    words = sys.argv[1:]
    if "--work" in words:
        words[words.index("--work") + 1] = "build/tiny"  # whose folder it was does not matter
    lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    on_gpu = vars(args).get("device", "cpu").startswith("cuda")
    gpu = f"trained on one {torch.cuda.get_device_name()}" if on_gpu else "no GPU"
    write_json(
        args.results / f"{name}.json",
        results
        | {
            "command": "python recipes/" + shlex.join([Path(sys.argv[0]).name, *words]),
            "seed": args.seed,
            "date": time.strftime("%Y-%m-%d"),
            "hardware": f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} cores used, {gpu}",
            "versions": versions(),
        },
    )
