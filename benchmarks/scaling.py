"""What the published sizes of MusicGen would cost on 1, 8 and 64 GPUs, on paper: writes benchmarks/SCALING.md.

    python benchmarks/scaling.py

Its numbers are arithmetic on the assumptions below, and the growth that benchmarks/results/growth.json measured.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from growth import Point
from measuring import RESULTS

from musicrl_hf.audio import atomic_path

PAGE = Path(__file__).parent / "SCALING.md"
GPUS = (1, 8, 64)
LORA_R = 16
CLIPS, CLIP_S, TEXT = 16, 10.0, 16  # a GPU's clips an iteration, their seconds, tokens of a prompt
MICRO_BATCH = 4  # clips a forward and backward pass, with activations checkpointed


@dataclass(frozen=True)
class Machine:
    """What is assumed of a GPU and of what joins eight of them, and nodes of eight."""

    flops: float = 989e12  # bfloat16, dense, a second
    bandwidth: float = 3.35e12  # bytes a second of its memory
    memory: float = 80e9  # bytes
    inside: float = 450e9  # bytes a second to the others of a node, each way
    between: float = 50e9  # bytes a second and GPU to other nodes, each way
    utilisation: float = 0.4  # share of `flops` that a forward and backward pass reaches
    launch_s: float = 5e-6  # seconds that starting a kernel takes where no CUDA graph is used
    kernels_a_layer: int = 20  # of a decoder step


@dataclass(frozen=True)
class Size:
    """A published decoder: layers L of width H, K = 4 codebooks of V = 2048."""

    name: str
    layers: int
    width: int

    @property
    def point(self) -> Point:
        return Point(CLIP_S, CLIPS, 4, self.layers, self.width, 2048)

    @property
    def lora(self) -> int:
        """Parameters of an adapter on every linear layer: r (in + out) each, 26 r H a layer."""
        return 26 * LORA_R * self.width * self.layers

    def trained(self, adapter: bool) -> int:
        return self.lora if adapter else self.point.trained

    def memory(self, adapter: bool) -> dict[str, float]:
        """Bytes on each GPU, by what they hold: PPO under DDP."""
        point, trained = self.point, self.trained(adapter)
        micro = Point(CLIP_S, MICRO_BATCH, 4, self.layers, self.width, 2048)
        positions = MICRO_BATCH * micro.steps
        held = {
            "weights": 4 * (point.trained + (self.lora if adapter else 0)),
            "bfloat16 copy": 2 * point.weights,
            "anchor": 0 if adapter else 4 * point.trained,
            "gradients and AdamW": 12 * trained,
            "activations": positions * (2 * self.layers * self.width + 2 * 20 * self.width + 4 * 4 * 2048),
            "keys and values": CLIPS * self.cache,
        }
        return held | {"all": sum(held.values())}

    @property
    def cache(self) -> int:
        """Bytes of one clip's keys and values in bfloat16, its own and the text's."""
        return 2 * 2 * self.layers * self.width * (self.point.steps + TEXT)

    def sample_s(self, machine: Machine, graphs: bool) -> float:
        """Seconds to sample: each decoder step reads the weights and, on the mean, half of the keys and values."""
        reads = 2 * self.point.weights + CLIPS * self.cache / 2
        step = max(reads / machine.bandwidth, 2 * CLIPS * self.point.weights / machine.flops)
        started = 0 if graphs else machine.launch_s * machine.kernels_a_layer * self.layers
        return self.point.steps * max(step, started)

    def update_s(self, machine: Machine) -> float:
        """Seconds of one pass over the clips: policy forward, again for its checkpoints, and backward (4 forward passes), and
        the anchor; and, once a set of clips, policy and anchor as they were when it was sampled. 7 forward passes."""
        forward = (self.point.operations("step") - self.point.heads_again) / 3
        return 7 * forward / (machine.flops * machine.utilisation)

    def reduced(self, adapter: bool, gpus: int) -> float:
        """Bytes that each GPU sends in a ring all-reduce of float32 gradients."""
        return 2 * (gpus - 1) / gpus * 4 * self.trained(adapter)

    def reduce_s(self, machine: Machine, adapter: bool, gpus: int) -> float:
        return self.reduced(adapter, gpus) / (machine.inside if gpus <= 8 else machine.between)


SIZES = (Size("musicgen-small", 24, 1024), Size("musicgen-large", 48, 2048))


def table(rows: list[list[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def memory_table() -> str:
    parts = list(SIZES[0].memory(True))
    rows = [["", "trained", *parts]]
    for size in SIZES:
        for adapter in (True, False):
            held = size.memory(adapter)
            name = f"LoRA, r = {LORA_R}: {size.lora / 1e6:.0f}M" if adapter else f"all: {size.point.trained / 1e6:.0f}M"
            rows.append([size.name, name, *(f"{held[part] / 1e9:.1f}" for part in parts)])
    return table(rows)


def time_table(machine: Machine) -> str:
    rows = [
        [
            "",
            "trained",
            "GPUs",
            "clips an iteration",
            "GB sent a GPU",
            "s to reduce",
            "s to sample",
            "s to update",
            "of linear",
        ]
    ]
    for size in SIZES:
        sampling, update = size.sample_s(machine, graphs=False), size.update_s(machine)
        for adapter in (True, False):
            for gpus in GPUS:
                reduce_s = size.reduce_s(machine, adapter, gpus)
                rows.append(
                    [
                        size.name,
                        "LoRA" if adapter else "all",
                        str(gpus),
                        str(CLIPS * gpus),
                        f"{size.reduced(adapter, gpus) / 1e9:.2f}",
                        f"{reduce_s:.4f}",
                        f"{sampling:.2f}",
                        f"{update:.2f}",
                        f"{(sampling + update) / (sampling + update + reduce_s):.3f}",
                    ]
                )
    return table(rows)


def floors(machine: Machine) -> str:
    rows = [
        [
            "",
            "without CUDA graphs",
            "with them",
            "weights alone",
            "clips where arithmetic takes as long as reading weights",
        ]
    ]
    for size in SIZES:
        weights_s = size.point.steps * 2 * size.point.weights / machine.bandwidth
        rows.append(
            [
                size.name,
                *(f"{size.sample_s(machine, graphs):.2f} s" for graphs in (False, True)),
                f"{weights_s:.2f} s",
                f"{machine.flops / machine.bandwidth:.0f}",
            ]
        )
    return table(rows)


def growth_table() -> str:
    found = json.loads((RESULTS / "growth.json").read_text(encoding="utf-8"))
    return table([list(found["rows"][0]), *(list(row.values()) for row in found["rows"])])


def page() -> str:
    """The whole page."""
    found, machine = json.loads((RESULTS / "growth.json").read_text(encoding="utf-8")), Machine()
    batch = found["measured"]["batch"]
    length = found["measured"]["clip length"]
    by_length = length[-1]["step"]["s"] / length[0]["step"]["s"]
    off = max(
        point["step"]["line_mb"] / point["step"]["mb"] for points in found["measured"].values() for point in points
    )
    by_batch, by_step = (batch[-1][kind]["s"] / batch[0][kind]["s"] for kind in ("sampling", "step"))
    small, large = SIZES
    full = large.memory(False)
    there = json.loads((RESULTS / "sampling_small_bfloat16_cuda.json").read_text(encoding="utf-8"))
    step_ms = 1e3 * there["measured"][0]["median_s"]["step"]
    assumed_ms = 1e3 * small.sample_s(machine, graphs=True) / small.point.steps
    return f"""# From one core to 64 GPUs, on paper

The first table was measured, on one CPU core; everything behind it is arithmetic, by `python benchmarks/scaling.py`, on assumptions
that stand beside it. Two things have been set against a GPU since, one {there["hardware"].split(",")[0]}. A decoder step of
musicgen-small's size took {step_ms:.1f} ms, for one clip and replayed as a CUDA graph, where the page takes {assumed_ms:.1f} ms for {CLIPS}. So
sampling is likely to take some {step_ms / assumed_ms:.1f} times as long as the seconds with CUDA graphs below. And three iterations of `musicrl ppo` as assumed below, on random weights
of that size with codebooks of 1024, took 3.6 GB at their peak with LoRA and 9.5 GB with all weights; the third
sampled for 1.9 and 1.2 s ({small.sample_s(machine, graphs=False):.2f} s below, without graphs) and learned for 2.1 and 1.3 s, {1.3 / small.update_s(machine):.0f} to {2.1 / small.update_s(machine):.0f} times the {small.update_s(machine):.2f} s below, most of it likely
to be Python's: seconds of an update are a lower bound (read off once; `benchmarks/ppo_iteration.py` measures them). `benchmarks/gpu.sh` measures more.

## What was measured

`{found["command"]}`, {found["hardware"]}: a decoder of 4 layers of 256 with random weights. Of seconds: from, to, how many times
that is, and in brackets how many times the operations are; of memory in brackets the bytes that arithmetic counts.

{growth_table()}

![cost against clip length, batch, codebooks and model size](results/growth.svg)

* **Sampling** is short of its operations wherever a step has little to do: {batch[-1]["x"]} clips take {by_batch:.1f} times as long as
  one. A decoder step costs a fixed time, of which the clips that share it take a part each. On a GPU this goes further still.
* **A training step** has all positions at once and comes nearer to its operations, from below where its products are small: {by_step:.1f} times
  for {batch[-1]["x"]} clips, and {by_length:.1f} times for clips six times as long (the line counts the whole square of attention; half of it is masked).
* **Memory** of a step is what the backward pass keeps, linear in batch and length; gradients come while that goes. Its line is no
  prediction at 16 clips: that attention copies none of the 13 H of a position that a layer keeps was told there, and what it is worth shows
  in the other rows, where the line is up to {off:.1f} times too many. Sampling holds keys and values and, on x86 CPUs, a second copy of the weights.

## What is assumed

* A GPU does {machine.flops / 1e12:.0f} TFLOP/s in bfloat16, of which a forward and backward pass gets {machine.utilisation:.0%}, reads
  {machine.bandwidth / 1e12:.2f} TB/s and holds {machine.memory / 1e9:.0f} GB (the data sheet of an H100 SXM; {machine.utilisation:.0%} is a guess). It sends
  {machine.inside / 1e9:.0f} GB/s to the seven others of its node (NVLink 4) and {machine.between / 1e9:.0f} GB/s to other nodes (400 Gbit/s a GPU).
* Starting a kernel takes {machine.launch_s * 1e6:.0f} µs, and a layer of a decoder step is {machine.kernels_a_layer} kernels: a guess.
* Layers and widths as published: small {small.layers} of {small.width}, large {large.layers} of {large.width}; K = 4, V = 2048. That makes
  {small.point.trained / 1e6:.0f}M and {large.point.trained / 1e6:.0f}M parameters of decoder: 16 H² a layer, 2 K V H for embeddings and heads. Text encoder
  (T5-base's, 110M), codec and rewards are frozen and left out: under 2 GB together in float32, and their time is the clips', which
  GPUs share without a word to each other.
* PPO under DDP with `bf16`: weights, gradients and AdamW in float32 (4 + 4 + 8 bytes a trained number), the anchor in float32 (with
  LoRA it is the base, and costs nothing), matrices multiplied in bfloat16, of which a copy is held. Activations are checkpointed: one H a layer and position,
  a layer's 20 H (the 13 H above and the 7 H that are made again elsewhere), both in bfloat16, and one of [K, V] in float32 (the anchor's logits; the policy's own are worked out a few clips at a time), for {MICRO_BATCH} clips at a time.
* Each GPU samples {CLIPS} clips of {CLIP_S:g} s, {small.point.steps} decoder steps, in bfloat16, and passes over them once. Gradients are
  reduced once an iteration, in float32, in a ring, while nothing else runs: a worst case, for DDP reduces while it computes.

## Memory on each GPU, GB

{memory_table()}

Under DDP this does not depend on how many GPUs there are. musicgen-large with all weights takes {full["all"] / 1e9:.0f} of
{machine.memory / 1e9:.0f} GB: hardly anything else fits. FSDP 2 shares out weights, gradients and AdamW, {(full["weights"] + full["gradients and AdamW"]) / 1e9:.0f} GB of it,
{(full["weights"] + full["gradients and AdamW"]) / 8e9:.1f} GB each on 8; here that is for DPO, RLOO and GRPO, not for PPO. With LoRA either size fits anywhere from 24 GB on.

## Time of an iteration

{time_table(machine)}

"Of linear" is what is left of n GPUs' n-fold clips when all they do beside is to reduce gradients. So DDP scales to 64 GPUs for
both sizes; full training of large between nodes loses most, and LoRA sends {small.point.trained / small.lora:.0f} to {large.point.trained / large.lora:.0f} times less.

## Where it stops

* **Sampling does not get shorter.** It is most of an iteration, and is bound by what a decoder step costs however few clips share
  it. Seconds for {CLIPS} clips:

{floors(machine)}

  Up to some {machine.flops / machine.bandwidth:.0f} clips a GPU a step costs the same but for keys and values. So more GPUs bring more clips an iteration, not
  shorter iterations: at one and the same number of clips, 64 GPUs with 2 clips each are hardly faster than 8 with 16. What
  shortens it is CUDA graphs, fewer bytes a weight, and shorter clips.
* **The batch.** 64 GPUs with {CLIPS} clips each are {64 * CLIPS} clips an iteration. From where on a larger batch stops saving updates
  (McCandlish et al. 2018, [arXiv 1812.06162](https://arxiv.org/abs/1812.06162), measure it by the noise of the gradient) is not known for these
  rewards. It is likely what ends the scaling first.
* **Clips of unequal length, slow rewards.** All clips of a run are equally long, so that no GPU waits for another's sampling. A
  reward that takes longer on one process keeps the others waiting. `score_s` in `metrics.jsonl` is a mean over
  processes and does not show it.
* **Between nodes.** Reducing large's {large.point.trained * 4 / 1e9:.0f} GB takes {large.reduce_s(machine, False, 64):.2f} s at 64 GPUs. It is as long as all the rest where
  links between nodes are {(large.sample_s(machine, False) + large.update_s(machine)) / large.reduce_s(machine, False, 64):.0f} times slower than assumed: {machine.between / 1e9 / ((large.sample_s(machine, False) + large.update_s(machine)) / large.reduce_s(machine, False, 64)) * 8:.0f} Gbit/s. There, LoRA.
"""


def main() -> None:
    with atomic_path(PAGE) as temporary:
        temporary.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
