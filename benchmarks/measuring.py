"""What the benchmarks that write into benchmarks/results share: pairs of timings, peaks of memory, the name of the hardware."""

import ctypes
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from musicrl_hf.audio import atomic_path

RESULTS = Path(__file__).parent / "results"


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_mb(work: Callable[[], Any]) -> float | None:
    """Memory in MB that a call takes at its peak on top of what was held before; None where the system does not say."""
    if torch.cuda.is_available():
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


def hardware() -> str:
    """Processor, threads, versions, and whether other work was there: a load before the first timing."""
    named = Path("/proc/cpuinfo")
    lines = named.read_text().splitlines() if named.is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    load = os.getloadavg()[0]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu} ({platform.machine()})"
    shared = f"**shared** with other work (load {load:.1f})" if load > 0.5 else "idle otherwise"
    return (
        f"{where}, {torch.get_num_threads()} of {os.cpu_count()} cores, {shared}; torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )


def write_result(name: str, what: str, where: str, rows: Sequence[dict[str, str]], measured: Any) -> None:
    """Leave benchmarks/results/`name`.json: the command, the hardware, the rows of its table, and the numbers behind them."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    found = {"what": what, "command": command, "hardware": where, "rows": rows, "measured": measured}
    RESULTS.mkdir(exist_ok=True)
    with atomic_path(RESULTS / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
