"""The project's counterpart of MusicRL's tables: three seeds of the loop, methods, rewards' ablations, over-optimisation, what ships.

    python recipes/paper/run.py --work build/paper            # or `make paper`
    python recipes/paper/run.py --work build/paper --parts align --seeds 1
    python recipes/paper/gather.py --work build/paper         # writes results/paper.json

A run that is finished is skipped. Its command, seconds and peak memory are kept in WORK/runs/NAME.json. Two runs beside each
other, one thread each, do more in an hour on two cores than two threads for one: start this twice with other `--seeds`.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from parts import PLANS
from plan import TINY, Run, Sizes, aligned, second_round

from musicrl_hf.audio import atomic_path

PARTS = ("align", "second", *PLANS)


def execute(run: Run, work: Path, threads: int) -> None:
    """Run one command, unless its folder is there; SystemExit where it fails."""
    record = work / "runs" / f"{run.name}.json"
    if run.folder.exists() and record.exists():
        return print(f"== {run.name}: done before", flush=True)
    here = Path(__file__).resolve().parent
    words = [
        sys.executable,
        *([str(here / f"{run.script}.py")] if run.script else ["-m", "musicrl_hf.cli"]),
        *run.command,
    ]
    shown = f"{'python recipes/paper/' + run.script + '.py' if run.script else 'musicrl'} {shlex.join(run.command)}"
    print(f"== {run.name}: {shown}", flush=True)
    started = time.monotonic()
    paths = os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}  # for rewards of this folder
    with subprocess.Popen(words, env=environment) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{run.name} ended with {process.returncode}")
    found = {
        "command": shown,
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_mb": round(usage.ru_maxrss / 1024),  # Linux counts in kilobytes
    }
    with atomic_path(record) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/paper"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument(
        "--recipe",
        default="paper",
        help="of musicrl align; tiny is the short version, of which no other part can be made",
    )
    parser.add_argument("--runs", nargs="+", help="only these of the parts' runs, by name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a step or two of everything: shows that it runs")
    args = parser.parse_args()
    sizes = TINY if args.tiny else Sizes()
    runs: list[Run] = []
    if "align" in args.parts:
        runs += [aligned(args.work, seed, sizes, args.recipe) for seed in args.seeds]
    if "second" in args.parts:
        runs += [second_round(args.work, seed, sizes, args.recipe) for seed in args.seeds]
    for part, planned in PLANS.items():
        if part in args.parts:
            runs += planned(args.work, sizes)
    if unknown := sorted({*(args.runs or ())} - {run.name for run in runs}):
        parser.error(f"--runs {' '.join(unknown)}: there are {', '.join(run.name for run in runs)}")
    for run in (run for run in runs if run.name in (args.runs or (run.name,))):
        execute(run, args.work, args.threads)


if __name__ == "__main__":
    main()
