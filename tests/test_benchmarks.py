"""The README shows what benchmarks/results holds, and each benchmark measures what it says, at tiny size."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of that folder by name, as a script in it does."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def measured(monkeypatch, module, options, folder, name=None):
    """What a benchmark leaves in its JSON file when it is run with these options on one thread of the CPU."""
    arguments = [*options.split(), *"--threads 1 --device cpu --results".split(), str(folder)]
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    threads = torch.get_num_threads()
    module.main()
    torch.set_num_threads(threads)
    return json.loads((folder / f"{name or module.__name__}.json").read_text())


def test_the_readme_has_the_tables_of_the_results(benchmark):
    table, results = benchmark("table"), BENCHMARKS / "results"
    assert len(list(results.glob("*.json"))) > 1
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(table.BEGIN) == readme.count(table.END) == 1
    assert table.filled(readme, results) == readme, "run python benchmarks/table.py"


def test_a_table_has_a_row_a_measurement(benchmark, tmp_path):
    found = {
        "what": "Steps",
        "command": "python x.py",
        "hardware": "a CPU",
        "rows": [{"n": "1", "s": "2.0"}, {"n": "2", "s": "3.0"}],
    }
    (tmp_path / "x.json").write_text(json.dumps(found))
    table = benchmark("table")
    text = table.filled(f"before {table.BEGIN} old {table.END} after", tmp_path)
    expected = "Steps: `python x.py`, a CPU.\n\n| n | s |\n| --- | --- |\n| 1 | 2.0 |\n| 2 | 3.0 |"
    assert text == f"before {table.BEGIN}\n{expected}\n{table.END} after"


def test_sampling_is_measured_on_both_sides(benchmark, tmp_path, monkeypatch):
    sampling = benchmark("sampling")
    found = measured(monkeypatch, sampling, "--batch 2 --duration_s 0.1 --repeats 2", tmp_path)
    assert [row["same_codes"] for row in found["measured"] if row["greedy"]] == [True, True]
    assert len(found["rows"]) == 4
    for row in found["measured"]:
        assert row["codes_ratio"]["lowest"] <= row["codes_ratio"]["median"] <= row["codes_ratio"]["highest"]
        assert min(row["median_s"].values()) > 0
    monkeypatch.setattr(sampling, "SIZES", {"small": (2, 32, 2, 64)})
    found = measured(monkeypatch, sampling, "--size small --steps 24 --repeats 2", tmp_path, "sampling_small")
    # Layers: four matrices of attention, two of the text's, two around the activation; and four heads.
    assert found["measured"][0]["weights_mb"] == pytest.approx(4e-6 * (2 * (6 * 32**2 + 2 * 32 * 64) + 4 * 2048 * 32))


def test_rollouts_are_measured_on_both_sides(benchmark, tmp_path, monkeypatch):
    found = measured(monkeypatch, benchmark("rollout"), "--tiny", tmp_path)
    ((row,), (shown,)) = found["measured"], found["rows"]
    assert row["batch"] == 2
    assert row["scores_differ_by"] < 1e-4
    for side, seconds in row["median_s"].items():
        assert min(seconds[part] for part in ("sample", "decode", "score")) > 0
        assert sum(seconds[part] for part in ("sample", "decode", "score")) < 1.5 * seconds["whole"]
        assert (seconds["encode"] > 0) == (side == "stock")
    assert row["with_codes_ratio"]["median"] > row["whole_ratio"]["median"]
    assert "times faster" in shown


def test_dpo_is_measured_on_both_sides(benchmark, tmp_path, monkeypatch):
    found = measured(monkeypatch, benchmark("training"), "--tiny", tmp_path)
    assert [row["against"] for row in found["measured"]] == ["head", "lm"]
    same, other = (row["losses"] for row in found["measured"])
    assert same[0] == pytest.approx(same[1], rel=1e-3, abs=1e-4)  # one generator seen in two ways
    assert [losses[0] for losses in other] == pytest.approx(
        [math.log(2)] * 2, abs=1e-4
    )  # any model, before its first step
    for row in found["measured"]:
        assert row["ratio"]["lowest"] <= row["ratio"]["median"] <= row["ratio"]["highest"]
        assert min(row["median_s"].values()) > 0
        if sys.platform == "linux":
            assert min(row["peak_mb"].values()) > 10


def test_without_a_gpu_the_gpu_script_says_so_in_a_line(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), sys.executable]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no CUDA device" in line


def test_what_the_gpu_script_starts_is_there():
    script = (BENCHMARKS / "gpu.sh").read_text(encoding="utf-8")
    started = [line.split()[2] for line in script.splitlines() if line.strip().startswith("launch ")]
    assert set(started) == {"one_gpu", "several_gpus", "fsdp2"}
    assert all((ROOT / "examples" / "accelerate" / f"{name}.yaml").is_file() for name in started)
    assert (ROOT / "src/musicrl_hf/prompts/train.txt").is_file()
