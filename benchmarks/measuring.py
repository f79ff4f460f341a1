"""What the benchmarks that write into benchmarks/results share: pairs of timings, peaks of memory, the name of the hardware."""

import argparse
import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from musicrl_hf.audio import atomic_path

RESULTS = Path(__file__).parent / "results"


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """What every benchmark here takes."""
    parser.add_argument("--repeats", type=int, default=5, help="turns that the two sides take")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the JSON file; table.py reads the default"
    )


class Stopwatch:
    """Seconds of calls, and of named parts of them: the wall's, or with one thread on a CPU those in which the process had a core,
    so that other work on the machine counts less. On a GPU each waits for what it started.

    Attributes:
        parts: name -> seconds, since `clear`.
    """

    def __init__(self, device: str):
        self.on_gpu = device.startswith("cuda")
        self._clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        self.parts: dict[str, float] = defaultdict(float)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Of one call."""
        started = self.now()
        work()
        return self.now() - started

    def part(self, name: str, function: Callable) -> Callable:
        """The same function, whose calls add to a part."""

        def timed(*args: Any, **options: Any) -> Any:
            started = self.now()
            result = function(*args, **options)
            self.parts[name] += self.now() - started
            return result

        return timed

    def clear(self) -> None:
        self.parts.clear()

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return self._clock()


def peak_mb(work: Callable[[], Any], device: str = "cpu") -> float | None:
    """Memory in MB that a call takes at its peak on top of what was held before; None where the system does not say."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status_kb("VmRSS")
    work()
    return (_status_kb("VmHWM") - before) * 1024 / 1e6


def _status_kb(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """Median and range of paired ratios."""
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def shown(ratios: dict[str, float]) -> str:
    return f"**{ratios['median']:.2f}** [{ratios['lowest']:.2f}, {ratios['highest']:.2f}]"


def hardware(device: str = "cpu") -> str:
    """Processor and the vector instructions that torch uses of it, threads, versions, and whether other work was there: a load before the first timing."""
    named = Path("/proc/cpuinfo")
    lines = named.read_text().splitlines() if named.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    load = os.getloadavg()[0]
    vectors = torch.backends.cpu.get_cpu_capability()
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"{cpu} ({platform.machine()}, {vectors})"
    shared = f"**shared** with other work (load {load:.1f})" if load > 0.5 else "idle otherwise"
    return (
        f"{where}, {torch.get_num_threads()} of {os.cpu_count()} cores, {shared}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )


def write_result(
    folder: Path, name: str, what: str, where: str, rows: Sequence[dict[str, str]], measured: Any, device: str = "cpu"
) -> None:
    """Leave `folder`/`name`.json: the command, the hardware, the rows of its table, and the numbers behind them.

    What was measured on a GPU stands beside what was measured on a CPU: its name ends in the device's.
    """
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    found = {"what": what, "command": command, "hardware": where, "rows": rows, "measured": measured}
    name = name if device == "cpu" else f"{name}_{device.partition(':')[0]}"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
