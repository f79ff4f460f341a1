"""All stages in order; a finished stage is skipped, an interrupted one goes on where it stopped.

python recipes/run.py --work build/tiny
"""

import subprocess
import sys
from pathlib import Path

STAGES = (
    "corpus",
    "render",
    "judges",
    "codec",
    "codes",
    "decoder",
    "text_encoder",
    "generator",
    "adherence",
    "quality",
    "judge",
)


def main() -> None:
    for stage in STAGES:
        script = Path(__file__).with_name(f"{stage}.py")
        print(f"== {stage}", flush=True)
        subprocess.run([sys.executable, str(script), *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
