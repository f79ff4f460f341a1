"""How much faster is the native fused call than TRL's own head over a vocabulary of K * V?

    python benchmarks/flat_vs_kv.py --layers 2 --hidden 256 --codebook_size 1024 --frames 150

Prints seconds of one forward and backward pass over the same flat batch (CPU seconds of the process, so that other work on
the machine counts less; on a GPU the wall's), both losses, their ratio, and on a GPU the peak memory of each. Weights are random; what is compared is the same model seen in two ways.
"""

import argparse
import platform
import sys
import time
from pathlib import Path

import torch
from trl.trainer.utils import add_fused_lm_head

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from kv_variant import KVVariant
from tiny import tiny_generator

from musicrl_hf.flat import FlatMusicRLForCausalLM, FlatTokenizer, flatten_codes


def measure(
    model: FlatMusicRLForCausalLM, ids: torch.Tensor, labels: torch.Tensor, repeats: int
) -> tuple[float, float]:
    """Seconds of the fastest forward and backward pass, and the loss."""
    mask = torch.ones_like(ids)
    clock = time.perf_counter if ids.is_cuda else time.process_time
    seconds = []
    for _ in range(repeats):
        model.zero_grad()
        started = clock()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).loss
        loss.backward()
        if ids.is_cuda:
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return min(seconds), loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description="The native fused call against TRL's on K * V ids.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--codebooks", type=int, default=4)
    parser.add_argument("--codebook_size", type=int, default=1024)
    parser.add_argument("--frames", type=int, default=150, help="3 s at 50 frames a second")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()

    K, V = given.codebooks, given.codebook_size
    generator = tiny_generator(K=K, V=V, layers=given.layers, hidden=given.hidden).to(given.device)
    prompt = FlatTokenizer.for_generator(generator)(["slow jazz"] * given.batch, return_tensors="pt")["input_ids"]
    ids = torch.cat([prompt, flatten_codes(torch.randint(0, V, (given.batch, K, given.frames)), V)], 1).to(given.device)
    labels = ids.masked_fill(ids >= K * V, -100)
    native, stock = FlatMusicRLForCausalLM.from_generator(generator), KVVariant.from_generator(generator)
    add_fused_lm_head(stock, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))  # what DPO asks for

    device = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or platform.machine()
    print(f"{given}\n{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    taken = {}
    for name, model in (("native", native), ("K * V", stock)):
        if given.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        taken[name], loss = measure(model, ids, labels, given.repeats)
        peak = f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB" if given.device == "cuda" else ""
        print(f"{name:7s} {taken[name]:.3f} s, loss {loss:.6f}{peak}")
    print(f"ratio   {taken['K * V'] / taken['native']:.2f}")


if __name__ == "__main__":
    main()
