"""How many kernels does a DPO step start, here and with stock TRL? On a GPU that few clips leave idle that is its time.

    python benchmarks/launches.py --batch 4 --duration_s 3

Counted on a CPU, where no GPU is needed: torch's operations of one training step, forward and backward, that make numbers and do not
merely look at some in another way (a GPU may start several kernels for one, or one for several). Trainers, pairs and stock TRL are
those of training.py. Parts of the logits are as large as on a CPU and as on an accelerator (`musicrl_hf.likelihood`). Leaves
benchmarks/results/launches.json.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from measuring import add_shared_options, hardware, write_result
from torch.utils._python_dispatch import TorchDispatchMode
from training import trainer_of
from transformers import PrinterCallback
from trl import DPOTrainer

from musicrl_hf import likelihood

SIDES = {
    "accelerator": "musicrl_hf, logits in parts as on a GPU",
    "cpu": "musicrl_hf, in parts as on a CPU",
    "head": "TRL's head over K * V ids on the same decoder",
}
START_NOTHING = {"_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh"}


class Operations(TorchDispatchMode):
    """Counts what is started while it is entered: operations that write numbers, and whose results are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function._schema.returns
        looks = any(one.alias_info is not None and not one.alias_info.is_write for one in results)
        self.count += not looks and function._schema.name.removeprefix("aten::") not in START_NOTHING
        return function(*args, **(kwargs or {}))


@contextmanager
def parts_as_on(kind: str) -> Iterator[None]:
    """Logits are worked out in parts of an accelerator's size, where a CPU takes smaller ones."""
    size = likelihood.LOGITS_AT_ONCE
    likelihood.LOGITS_AT_ONCE = size * (likelihood.TIMES_ON_AN_ACCELERATOR if kind == "accelerator" else 1)
    try:
        yield
    finally:
        likelihood.LOGITS_AT_ONCE = size


def operations_of_a_step(trainer: DPOTrainer) -> int:
    """Of the last of its steps: the first ones make what is kept."""
    trainer.pop_callback(PrinterCallback)
    step, counts = trainer.training_step, []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        with Operations() as operations:
            loss = step(*args, **kwargs)
        counts.append(operations.count)
        return loss

    trainer.training_step = counted
    trainer.train()
    return counts[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Operations of a DPO step against stock TRL on a K * V vocabulary.")
    parser.add_argument("--model", default="musicrl-tiny")
    parser.add_argument("--batch", type=int, nargs="+", default=[4], help="pairs a step")
    parser.add_argument("--duration_s", type=float, default=3.0)
    parser.add_argument("--tiny", action="store_true", help="one pair of .2 s clips: to see that it runs")
    add_shared_options(parser)
    given = parser.parse_args()
    if given.device != "cpu":
        raise SystemExit(f"`--device` is {given.device!r}, and operations are counted on a CPU: give cpu.")
    if given.tiny:
        given.batch, given.duration_s = [1], 0.2
    torch.set_num_threads(given.threads)
    measured = []
    for batch in given.batch:
        counts = {}
        for side in SIDES:
            one_step = argparse.Namespace(model=given.model, size=None, bf16=False, device="cpu", steps=1)
            with parts_as_on(side), tempfile.TemporaryDirectory() as folder:
                kind = "head" if side == "head" else "musicrl_hf"
                counts[side] = operations_of_a_step(trainer_of(kind, batch, given.duration_s, one_step, folder))
        measured.append({"batch": batch, "duration_s": given.duration_s, "operations": counts})
        print(measured[-1], flush=True)
    rows = [
        {"pairs a step": str(found["batch"]), "clips": f"{found['duration_s']:g} s"}
        | {SIDES[side]: str(count) for side, count in found["operations"].items()}
        for found in measured
    ]
    what = f"Operations of a DPO step of `{given.model}`, forward and backward, counted without views: what a GPU has to start"
    write_result(given.results, "launches", what, hardware("cpu"), rows, measured)


if __name__ == "__main__":
    main()
