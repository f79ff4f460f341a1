"""How much faster is sampling on a GPU when a decoder step is recorded once and replayed (a CUDA graph), not launched kernel by kernel?

    python benchmarks/cuda_graph.py --batch 1 16 64

Both sides are this package's, and take turns; recording is part of what is timed. Greedy codes of both are compared. Leaves
benchmarks/results/cuda_graph_cuda.json.
"""

import argparse
import statistics

import torch
from measuring import Stopwatch, add_shared_options, hardware, shown, spread, write_result

from musicrl_hf import MusicRLForConditionalGeneration, load_generator

PROMPTS = ["a slow air played by a flute", "piano, fast tempo, with a band and drums"]
WAYS = {"greedy": {"do_sample": False}, "top-k 250": {"do_sample": True, "top_k": 250}}


def compare(model: MusicRLForConditionalGeneration, batch: int, guidance_scale: float, way: str, given) -> dict:
    """Seconds of both sides in turns, and the share of equal codes where nothing is drawn."""
    inputs = model.text_inputs([PROMPTS[i % 2] for i in range(batch)])
    how = {"guidance_scale": guidance_scale, **WAYS[way]}
    watch, frames = Stopwatch(given.device), model.frames_for(given.duration_s)
    codes, taken = {}, {False: [], True: []}
    for turn in range(given.repeats + 1):  # the first is not timed
        for graph in taken:

            def sample(graph=graph) -> None:
                codes[graph] = model.sample_codes(*inputs, frames, cuda_graph=graph, **how)

            seconds = watch.seconds(sample)
            if turn:
                taken[graph].append(seconds)
    return {
        "batch": batch,
        "guidance": guidance_scale,
        "way": way,
        "seconds": {"launched": statistics.median(taken[False]), "replayed": statistics.median(taken[True])},
        "ratio": spread([a / b for a, b in zip(taken[False], taken[True], strict=True)]),
        "equal_codes": float((codes[False] == codes[True]).float().mean()) if way == "greedy" else None,
    }


def row_of(found: dict) -> dict[str, str]:
    equal = found["equal_codes"]
    return {
        "clips": str(found["batch"]),
        "guidance": f"{found['guidance']:g}",
        "codes": found["way"] if equal is None else f"{found['way']}, {100 * equal:.1f} % the same",
        "s launched, and replayed": ", ".join(f"{seconds:.3f}" for seconds in found["seconds"].values()),
        "times faster": shown(found["ratio"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="musicrl-tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--duration_s", type=float, default=3.0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    add_shared_options(parser)
    given = parser.parse_args()
    if not given.device.startswith("cuda"):
        raise SystemExit(
            f"benchmarks/cuda_graph.py: `--device` is {given.device!r}, and only a CUDA device has graphs."
        )
    where = hardware(given.device)
    model = load_generator(given.model, dtype=getattr(torch, given.dtype), device=given.device)
    measured = []
    for batch in given.batch:
        for guidance_scale, way in ((1.0, "greedy"), (3.0, "top-k 250")):
            measured.append(compare(model, batch, guidance_scale, way, given))
            print(row_of(measured[-1]), flush=True)
    name = "cuda_graph" if given.dtype == "float32" else f"cuda_graph_{given.dtype}"
    what = f"Clips of {given.duration_s:g} s from `{given.model}` ({given.dtype}), a step's kernels launched one by one or replayed"
    write_result(given.results, name, what, where, [row_of(found) for found in measured], measured, given.device)


if __name__ == "__main__":
    main()
