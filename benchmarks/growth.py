"""How do sampling and a training step grow with clip length, batch, codebooks and model size?

    python benchmarks/growth.py
    python benchmarks/growth.py --draw

Decoders with random weights, one thing growing at a time; "sampling" is `sample_codes` without guidance, "step" a forward and
backward pass over as many clips and a step of AdamW, neither its first. Of several turns the least seconds. Peaks of memory are
of a process of their own, on top of the weights and, for a step, of AdamW's means.

Beside each stands what arithmetic says: for seconds `operations`, on a line through the first point; for memory `numbers`, four
bytes each, of which one constant is fitted. Leaves benchmarks/results/growth.json; `--draw` draws growth.svg beside it, with matplotlib.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from measuring import Stopwatch, add_shared_options, hardware, peak_mb, write_result
from sampling import random_generator

from musicrl_hf.audio import atomic_path

FRAME_RATE = 50  # decoder steps a second
TEXT = 8  # tokens of the prompt
KINDS = ("sampling", "step")


@dataclass(frozen=True)
class Point:
    """One setting: seconds of sound, clips, K codebooks of V codes, layers L of width H (heads of 64, feed-forward 4 H)."""

    duration_s: float = 5.0
    batch: int = 2
    codebooks: int = 4
    layers: int = 4
    width: int = 256
    codebook_size: int = 1024

    @property
    def frames(self) -> int:
        return round(self.duration_s * FRAME_RATE)

    @property
    def steps(self) -> int:
        """Decoder steps S."""
        return self.frames + self.codebooks - 1

    @property
    def weights(self) -> int:
        """Numbers that a decoder step multiplies with: 14 H^2 a layer (4 for itself, 2 for the text, 8 around it) and K heads."""
        return 14 * self.layers * self.width**2 + self.codebooks * self.codebook_size * self.width

    @property
    def trained(self) -> int:
        """Parameters: those, the text's keys and values, and the embeddings of the codes."""
        return self.weights + 2 * self.layers * self.width**2 + self.codebooks * self.codebook_size * self.width

    def operations(self, kind: str) -> float:
        """Multiplications and additions: two a weight and position, and attention's four H a layer and pair of positions.

        A sampled position sees those before it, half of the square; in training the whole square is computed, the backward
        pass is twice the forward one, and the heads' logits are worked out once more.
        """
        positions, seen = self.batch * self.steps, (self.steps / 2 if kind == "sampling" else self.steps) + TEXT
        forward = positions * (2 * self.weights + 4 * self.layers * self.width * seen)
        return forward if kind == "sampling" else 3 * forward + self.heads_again

    @property
    def heads_again(self) -> int:
        """Operations of the heads in the backward pass, which works their logits out anew."""
        return 2 * self.batch * self.steps * self.codebooks * self.codebook_size * self.width

    def numbers(self, kind: str) -> float:
        """Floats that are held. Sampling: keys and values, and a second copy of the weights, whose layout is faster to read.
        A step: gradients, and for each position what the backward pass needs, 13 H a layer: the tensors of a layer, counted, without the
        7 H that norms and GELU put out, which are made again. That attention copies none of them was told by the measured batch of 16."""
        positions = self.batch * self.steps
        if kind == "sampling":
            return 2 * self.layers * positions * self.width + self.weights
        return self.trained + positions * 13 * self.layers * self.width


AXES: dict[str, tuple[str, list[Point]]] = {  # name -> field that grows (or what else to show), its points
    "clip length": ("duration_s", [Point(duration_s=s) for s in (5.0, 10.0, 20.0, 30.0)]),
    "batch": ("batch", [Point(batch=n) for n in (1, 2, 4, 8, 16)]),
    "codebooks": ("codebooks", [Point(codebooks=k) for k in (2, 4, 8)]),
    "model size": (
        "weights",
        [Point(layers=layers, width=width) for layers, width in ((2, 128), (4, 256), (6, 384), (8, 512))],
    ),
}
UNITS = {
    "duration_s": (1, "{:g} s"),
    "batch": (1, "{}"),
    "codebooks": (1, "{}"),
    "weights": (1e6, "{:.1f}M weights"),
}


LABELS = {"clip length": " (s)", "model size": " (million weights)"}


def works(point: Point, device: str) -> dict[str, Callable[[], object]]:
    """What is measured at a point, on a generator of its own."""
    generator = random_generator(
        point.layers, point.width, point.width // 64, 4 * point.width, point.codebooks, point.codebook_size
    ).to(device)
    generator.disable_dropout()
    generator.freeze_codec()
    generator.text_encoder.requires_grad_(False)
    ids = torch.randint(2, 32, (point.batch, TEXT), device=device)
    mask = torch.ones_like(ids)
    codes = torch.randint(point.codebook_size, (point.batch, point.codebooks, point.frames), device=device)

    optimizer = torch.optim.AdamW([weight for weight in generator.parameters() if weight.requires_grad], lr=0.0)

    def step(frames: int = point.frames) -> None:
        (-generator.score_codes(codes[..., :frames], ids, mask).logprobs.mean()).backward()
        optimizer.step()
        generator.zero_grad()

    step(2)  # from now on AdamW has its means
    return {"sampling": lambda: generator.sample_codes(ids, mask, point.frames), "step": step}


def points_of(tiny: bool) -> dict[str, list[Point]]:
    small = {"duration_s": 0.2, "codebook_size": 64}
    return {
        axis: [replace(point, **small) for point in points[:2]] if tiny and field != "duration_s" else points
        for axis, (field, points) in AXES.items()
        if not tiny or field != "duration_s"
    }


def measure(given: argparse.Namespace) -> dict[str, list[dict]]:
    """Of every axis its points, and at each: seconds, peak of memory, and both lines."""
    peaks, watch = peaks_of_their_own(given), Stopwatch(given.device)
    found = {}
    for axis, points in points_of(given.tiny).items():
        field, taken = AXES[axis][0], [dict.fromkeys(KINDS, float("inf")) for _ in points]
        for _ in range(given.repeats):
            for point, least in zip(points, taken, strict=True):
                for kind, work in works(point, given.device).items():
                    least[kind] = min(least[kind], watch.seconds(work))
        found[axis] = [
            {
                "x": getattr(point, field),
                **asdict(point),
                **{
                    kind: {
                        "s": least[kind],
                        "line_s": taken[0][kind] * point.operations(kind) / points[0].operations(kind),
                        "mb": mb[kind],
                        "line_mb": 4e-6 * point.numbers(kind),
                    }
                    for kind in KINDS
                },
            }
            for point, least, mb in zip(points, taken, peaks[axis], strict=True)
        ]
        print(row_of(axis, found[axis]), flush=True)
    return found


def peaks_of_their_own(given: argparse.Namespace) -> dict[str, list[dict[str, float | None]]]:
    """Peaks of memory in MB, from a process that gives back what it frees at once."""
    options = ["--peaks", "--threads", str(given.threads), "--device", given.device, *["--tiny"] * given.tiny]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, *options], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def peaks(given: argparse.Namespace) -> dict[str, list[dict[str, float | None]]]:
    found: dict[str, list[dict[str, float | None]]] = {}
    for work in works(Point(duration_s=0.1), given.device).values():  # what the first call of all loads
        work()
    for axis, points in points_of(given.tiny).items():
        found[axis] = []
        for point in points:
            by_kind = works(point, given.device)
            found[axis].append({kind: peak_mb(work, given.device) for kind, work in by_kind.items()})
    return found


def row_of(axis: str, points: list[dict]) -> dict[str, str]:
    first, last = points[0], points[-1]
    scale, unit = UNITS[AXES[axis][0]]

    def seconds_of(kind: str) -> str:
        taken = [point[kind]["s"] for point in (first, last)]
        line = last[kind]["line_s"] / first[kind]["s"]
        return f"{taken[0]:.2g}, {taken[1]:.2g}: **{taken[1] / taken[0]:.1f}** ({line:.1f})"

    def memory_of(kind: str) -> str:
        return ", ".join(
            f"{'' if point[kind]['mb'] is None else format(point[kind]['mb'], '.0f')} ({point[kind]['line_mb']:.0f})"
            for point in (first, last)
        )

    return {
        "what grows": axis,
        "from, to": ", ".join(unit.format(point["x"] / scale if scale > 1 else point["x"]) for point in (first, last)),
        "s to sample": seconds_of("sampling"),
        "MB": memory_of("sampling"),
        "s a training step": seconds_of("step"),
        "MB of it": memory_of("step"),
    }


def draw(path: Path) -> Path:
    """An SVG of a result beside it: measured points, and the line of arithmetic through the first."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "musicrl"  # the same file from the same numbers
    import matplotlib.pyplot as plt

    found = json.loads(path.read_text(encoding="utf-8"))["measured"]
    figure, grid = plt.subplots(2, len(found), figsize=(3.2 * len(found), 6), squeeze=False)
    for column, (axis, points) in enumerate(found.items()):
        x = [point["x"] for point in points]
        for axes, what in zip(grid[:, column], ("s", "mb"), strict=True):
            for kind, colour in zip(KINDS, ("tab:blue", "tab:red"), strict=True):
                name = {"sampling": "sampling", "step": "training step"}[kind]
                axes.plot(x, [point[kind][what] for point in points], "o", color=colour, label=name)
                axes.plot(x, [point[kind][f"line_{what}"] for point in points], "--", color=colour, linewidth=1)
            axes.set_yscale("log", subs=(2, 5))
            axes.set(xscale="log", xlabel=axis + LABELS.get(axis, ""))
            axes.set_xticks(x, [f"{value / UNITS[AXES[axis][0]][0]:.2g}" for value in x])
            axes.xaxis.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
    grid[0, 0].set_ylabel("seconds")
    grid[1, 0].set_ylabel("peak memory, MB")
    grid[0, 0].legend(fontsize=8)
    figure.suptitle("measured (dots) and what arithmetic says (dashed; of seconds from the first dot on)")
    figure.tight_layout()
    with atomic_path(path.with_suffix(".svg")) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return path.with_suffix(".svg")


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost against clip length, batch, codebooks and model size.")
    parser.add_argument("--tiny", action="store_true", help="two points an axis, clips of .2 s: to see that it runs")
    parser.add_argument("--peaks", action="store_true", help="print the peaks of memory as JSON, and no more")
    parser.add_argument("--draw", action="store_true", help="draw the SVG of the JSON that is there, and no more")
    add_shared_options(parser)
    parser.set_defaults(repeats=2)
    given = parser.parse_args()

    if given.draw:
        for path in sorted(given.results.glob("growth*.json")):
            print(draw(path))
        return
    torch.set_num_threads(given.threads)
    if given.peaks:
        print(json.dumps(peaks(given)))
        return
    where, measured = hardware(given.device), measure(given)
    base = Point()
    what = (
        f"Growth of sampling and of a training step (random weights, {base.layers} layers of {base.width}, {base.duration_s:g} s, "
        f"{base.batch} clips, {base.codebooks} codebooks where nothing else is said); in brackets what arithmetic says, "
        "for a step's memory with one constant fitted to the batch of 16 "
        "([plot](results/growth.svg), [to 64 GPUs](SCALING.md))"
    )
    rows = [row_of(axis, points) for axis, points in measured.items()]
    write_result(given.results, "growth", what, where, rows, measured, given.device)


if __name__ == "__main__":
    main()
