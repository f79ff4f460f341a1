"""The tables of all files in benchmarks/results, into README.md between its marks.

python benchmarks/table.py
"""

import json
from pathlib import Path

from musicrl_hf.audio import atomic_path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- from benchmarks/results: -->", "<!-- :from benchmarks/results -->"


def device_of(result: Path) -> str:
    """CPU or GPU: `measuring.write_result` ends the name of what was measured on a GPU in its kind of device."""
    return "GPU" if result.stem.endswith(("_cuda", "_mps", "_xpu")) else "CPU"


def block(results: Path) -> str:
    """Every result in the order of the file names: what it is, its table, the command and the hardware."""
    parts = []
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        lines = [
            list(found["rows"][0]),
            ["---"] * len(found["rows"][0]),
            *(list(row.values()) for row in found["rows"]),
        ]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        parts.append(
            f"**On a {device_of(path)}.** {found['what']}: `{found['command']}`, {found['hardware']}.\n\n{table}"
        )
    return "\n\n".join(parts)


def filled(readme: str, results: Path) -> str:
    """The README with the tables between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{block(results)}\n{END}{after}"


def main() -> None:
    readme = filled((ROOT / "README.md").read_text(encoding="utf-8"), ROOT / "benchmarks" / "results")
    with atomic_path(ROOT / "README.md") as temporary:
        temporary.write_text(readme, encoding="utf-8")


if __name__ == "__main__":
    main()
