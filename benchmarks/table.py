"""The tables of all files in benchmarks/results: all of them in benchmarks/README.md, and the ratios alone in README.md.

python benchmarks/table.py
"""

import json
import re
from pathlib import Path
from typing import Any

from musicrl_hf.audio import atomic_path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- from benchmarks/results: -->", "<!-- :from benchmarks/results -->"
RATIOS = ("times faster", "codes, times faster")  # columns; a result has one of them or none
SHARE = "share of the memory"
CLAUSE = re.compile(r"(?:[^,;(]|\([^)]*\))+")  # up to the first comma or semicolon outside brackets


def device_of(result: Path) -> str:
    """CPU or GPU: `measuring.write_result` ends the name of what was measured on a GPU in its kind of device."""
    return "GPU" if result.stem.endswith(("_cuda", "_mps", "_xpu")) else "CPU"


def short_name(hardware: str) -> str:
    """AMD EPYC for "AMD EPYC (x86_64), 1 of 2 cores, ...", Intel Xeon for "Intel(R) Xeon(R) Processor (x86_64), ..."; AVX2 is told."""
    name = re.sub(r"\(.*?\)|,.*| Processor", "", hardware).strip()
    return f"{name} (AVX2)" if "(x86_64, AVX2)" in hardware else name


FAST = """## What makes it fast

Codes are sampled with keys and values in place, the text's computed once, and linear layers as one product in a layout that
the CPU reads fastest; on CUDA a step is recorded once and replayed (`cuda_graph=False` of `sample` and `sample_codes`
launches its kernels instead). What a LoRA adapter adds is part of the same products, so that in float32 a policy
with one is sampled as fast as a policy without. `--dtype bfloat16` halves what a step has to read. On x86 CPUs sampling holds a second copy of the
decoder's weights while it lasts. Training holds the policy's logits of a few clips and one codebook at a time, and works them out
again in the backward pass (PPO holds its anchor's whole).

Codes of `musicrl-tiny` come 1.5 to 2.8 times as fast on a CPU with AVX-512 and 1.2 to 2.0 times without; if matrix products were all that takes time, it would be 2.5 to 4.9
times and 1.5 to 3.7: what a library without faster products can hope for at 64 greedy clips there is 1.5. Where the codes of a rollout are wanted
too, which `generate` keeps to itself, it is 2.5 to 2.8 times as fast on the Intel CPU and 3.1 to 3.7 times on the AMD's, both before decoding and scoring took less, and 2.9 to 3.7 times without AVX-512, after it (2.2 and 2.8 where they are not). At musicgen-small's size products are nearly all that
there is on a CPU: without AVX-512 a step of a single clip, which waits for its weights, is 1.3 (guidance 1) and 1.5 times as fast, one of 4 clips 1.3, one of 16 1.1 to 1.3, one of 64 1.1 to 1.2; with it a
single clip's is 1.7 and 2.9 times as fast. A single clip's products have layouts of their own without AVX-512: in oneDNN's, which is the best from 2 rows on, such a step was .95 times as fast as the stock library's. On the GPU a decoder step of
musicgen-small's size takes 1.8 ms, ten times what reading its weights takes. DPO of so small a decoder as `musicrl-tiny`'s is **slower** there than stock TRL's, .61 to .96 times as fast, but for 32 pairs a step against a causal LM (1.25):
such a GPU waits for Python in both. At musicgen-small's size and 8 pairs of 10 s a step took 144 ms, 2.16 times as fast as stock TRL's, with .45 of
the memory while what norms and GELUs put out was kept; now it takes 189 ms, of which most is likely to be Python's.

What was tried and left out. `torch.compile` of the decoder step (musicrl-tiny, one core of the Intel CPU): 1.05 ms a step where it is 1.75 for one clip, 3.8
for 5.0 at 16, but 11.8 for 11.1 at 64, and each shape takes 16 to 33 s to compile; a recorded CUDA graph takes the same calls out of the way at no such price. Of each decoder layer
in DPO: 156 ms a step where it is 163 with all that layers put out kept (24 thin layers in bfloat16, a CPU), and nothing for musicrl-tiny in float32. Weights in int8 were not tried: they choose
other codes than the stock library does."""


def read(results: Path) -> dict[Path, dict[str, Any]]:
    """Every result, in the order of the file names."""
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}


def table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the header."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def page(results: Path) -> str:
    """benchmarks/README.md: what each result is, its table, the command and the hardware."""
    parts = [
        "# Benchmarks",
        "Made by `python benchmarks/table.py` from [results](results), a file for each script and device. Both sides of a ratio ran in "
        "turns in one process, with the same weights and prompts; a ratio is the median of those of neighbouring turns, and their range "
        'stands in brackets. "OTHERS" are greedy codes that differ from the stock library\'s, by near ties in bfloat16; "were they products '
        'alone" is the ratio that matrix products alone would have. '
        "Training and growth on the Intel CPU were measured before training and sampling took fewer calls; training of `musicrl-tiny` on a GPU was measured before what norms and GELUs put out was made again instead of kept, all on an "
        "AMD EPYC with AVX-512 before top-k was a threshold, before codes were decoded by matrix products and before silence behind a clip was "
        "passed over, and rollouts with AVX-512 before the codec's decoder took less room and sound that CLAP repeats was looked at once. Steps of "
        "musicgen-small's size for 2 clips or more were measured while products of 1024 by 1024 were MKL's there, which are oneDNN's now. "
        "[SCALING.md](SCALING.md) carries the growth to 64 GPUs on paper; `gpu.sh` measures all that needs a GPU in a quarter of an hour.",
        FAST,
        "## Tables",
    ]
    for path, found in read(results).items():
        rows = [list(found["rows"][0]), *(list(row.values()) for row in found["rows"])]
        parts.append(
            f"**On a {device_of(path)}.** {found['what']}: `{found['command']}`, {found['hardware']}.\n\n{table(rows)}"
        )
    return "\n\n".join(parts) + "\n"


def ratios(rows: list[dict[str, str]], column: str) -> str:
    """The medians of a column as `lowest to highest`, or the only one; empty where no row has the column."""
    medians = [match[1] for row in rows if (match := re.match(r"\*\*([\d.]+)\*\*", row.get(column, "")))]
    bounds = [min(medians, key=float), max(medians, key=float)] if medians else []
    return " to ".join(dict.fromkeys(bounds))


def summary(results: Path) -> str:
    """README.md: how many times faster than the stock library, and in how much of its memory."""
    rows = [["what", "on", "times faster than the stock library", "share of its memory"]]
    for found in read(results).values():
        column = next((name for name in RATIOS if name in found["rows"][0]), None)
        if column is None:
            continue
        against = dict.fromkeys(row.get("against", "") for row in found["rows"])
        for other in against:
            same = [row for row in found["rows"] if row.get("against", "") == other]
            what = CLAUSE.match(found["what"])[0] + (f", against {other}" if other else "")
            rows.append([what, short_name(found["hardware"]), ratios(same, column), ratios(same, SHARE)])
    return table(rows)


def filled(readme: str, results: Path) -> str:
    """The README with the summary between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{summary(results)}\n{END}{after}"


def main() -> None:
    readme = ROOT / "README.md"
    for path, text in (
        (ROOT / "benchmarks" / "README.md", page(RESULTS)),
        (readme, filled(readme.read_text(encoding="utf-8"), RESULTS)),
    ):
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
