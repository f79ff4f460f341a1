"""The README shows what benchmarks/results holds, and each benchmark measures what it says, at tiny size."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recorders import Again
from tiny import tiny_generator

from musicrl_hf import step_graph

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def load_benchmark(monkeypatch):
    """Imports a module of that folder by name, as a script in it does. (`benchmark` is the fixture of a pytest plugin.)"""
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


def test_the_pages_have_the_tables_of_the_results(load_benchmark):
    table, results = load_benchmark("table"), BENCHMARKS / "results"
    assert len(list(results.glob("*.json"))) > 1
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(table.BEGIN) == readme.count(table.END) == 1
    assert table.filled(readme, results) == readme, "run python benchmarks/table.py"
    assert (BENCHMARKS / "README.md").read_text(encoding="utf-8") == table.page(results), (
        "run python benchmarks/table.py"
    )


def test_a_table_has_a_row_a_measurement_and_the_summary_their_range(load_benchmark, tmp_path):
    found = {
        "what": "Steps (of 1, 2), alone; the rest is told elsewhere",
        "command": "python x.py",
        "hardware": "a CPU",
        "rows": [
            {"n": "1", "times faster": "**2.00** [1.90, 2.10]", "share of the memory": "**0.30**"},
            {"n": "2", "times faster": "**10.00** [9, 11]", "share of the memory": "**0.30**"},
        ],
    }
    (tmp_path / "x.json").write_text(json.dumps(found))
    against = [row | {"against": name} for name, row in zip("ab", found["rows"], strict=True)]
    (tmp_path / "x_cuda.json").write_text(json.dumps({**found, "hardware": "a GPU", "rows": against}))
    (tmp_path / "y.json").write_text(json.dumps({**found, "rows": [{"n": "1", "s": "**2.00**"}]}))  # no ratio in it
    table = load_benchmark("table")
    header, _, *rows = table.summary(tmp_path).splitlines()
    assert header == "| what | on | times faster than the stock library | share of its memory |"
    assert rows == [
        "| Steps (of 1, 2) | a CPU | 2.00 to 10.00 | 0.30 |",
        "| Steps (of 1, 2), against a | a GPU | 2.00 | 0.30 |",
        "| Steps (of 1, 2), against b | a GPU | 10.00 | 0.30 |",
    ]
    names = {
        "AMD EPYC (x86_64, AVX2), 1 of 2 cores": "AMD EPYC (AVX2)",
        "AMD EPYC (x86_64, AVX512), 1 core": "AMD EPYC",
    }
    names |= {"AMD EPYC (x86_64), 1 of 2 cores": "AMD EPYC", "NVIDIA H200, 8 of 16 cores": "NVIDIA H200"}
    names["Intel(R) Xeon(R) Processor (x86_64), 1 of 2 cores, **shared** with other work (load 1.8)"] = "Intel Xeon"
    assert {hardware: table.short_name(hardware) for hardware in names} == names
    text = table.filled(f"before {table.BEGIN} old {table.END} after", tmp_path)
    assert text == f"before {table.BEGIN}\n{table.summary(tmp_path)}\n{table.END} after"
    page = table.page(tmp_path)
    what = "Steps (of 1, 2), alone; the rest is told elsewhere: `python x.py`"
    assert (
        f"**On a CPU.** {what}, a CPU.\n\n| n | times faster | share of the memory |\n| --- | --- | --- |\n| 1 | **2"
        in page
    )
    assert f"**On a GPU.** {what}, a GPU.\n\n| n | times faster" in page
    assert page.endswith("| n | s |\n| --- | --- |\n| 1 | **2.00** |\n")


def test_a_recorded_step_is_measured_beside_a_launched_one(load_benchmark, monkeypatch):
    cuda_graph = load_benchmark("cuda_graph")
    monkeypatch.setitem(step_graph.RECORDERS, "cpu", Again)
    given = SimpleNamespace(device="cpu", duration_s=0.2, repeats=2)
    found = cuda_graph.compare(tiny_generator(), 2, 3.0, "greedy", given)
    assert found["equal_codes"] == 1
    assert min(found["seconds"].values()) > 0
    assert cuda_graph.row_of(found)["codes"] == "greedy, 100.0 % the same"


def test_a_recorded_step_is_not_measured_without_cuda(load_benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cuda_graph.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match="`--device` is 'cpu', and only a CUDA device has graphs"):
        load_benchmark("cuda_graph").main()


def test_a_clip_is_measured_from_its_prompt_to_its_file(load_benchmark, tmp_path, monkeypatch):
    found = measured(monkeypatch, load_benchmark("prompt_to_file"), "--duration_s 0.2 --repeats 2", tmp_path)
    assert [len(found["measured"][side]) for side in ("here", "stock")] == [2, 2]
    assert min(found["measured"]["here"] + found["measured"]["stock"]) > 0
    assert list(found["rows"][0]) == ["s, here", "s, stock", "times faster"]


def test_sampling_is_measured_on_both_sides(load_benchmark, tmp_path, monkeypatch):
    sampling = load_benchmark("sampling")
    found = measured(monkeypatch, sampling, "--batch 2 --duration_s 0.1 --repeats 2", tmp_path)
    assert [row["same_codes"] for row in found["measured"] if row["greedy"]] == [True, True]
    assert len(found["rows"]) == 4
    for row in found["measured"]:
        assert row["codes_ratio"]["lowest"] <= row["codes_ratio"]["median"] <= row["codes_ratio"]["highest"]
        assert min(row["median_s"].values()) > 0
    monkeypatch.setattr(sampling, "SIZES", {"small": (2, 32, 2, 64)})
    found = measured(
        monkeypatch, sampling, "--size small --batch 1 2 --steps 24 --repeats 2", tmp_path, "sampling_small"
    )
    assert [row["batch"] for row in found["measured"]] == [1, 1, 2, 2]
    # Layers: four matrices of attention, two of the text's, two around the activation; and four heads.
    assert found["measured"][0]["weights_mb"] == pytest.approx(4e-6 * (2 * (6 * 32**2 + 2 * 32 * 64) + 4 * 2048 * 32))


def test_rollouts_are_measured_on_both_sides(load_benchmark, tmp_path, monkeypatch):
    found = measured(monkeypatch, load_benchmark("rollout"), "--tiny", tmp_path)
    ((row,), (shown,)) = found["measured"], found["rows"]
    assert row["batch"] == 2
    assert row["scores_differ_by"] < 1e-4
    for side, seconds in row["median_s"].items():
        assert min(seconds[part] for part in ("sample", "decode", "score")) > 0
        assert sum(seconds[part] for part in ("sample", "decode", "score")) < 1.5 * seconds["whole"]
        assert (seconds["encode"] > 0) == (side == "stock")
    assert row["with_codes_ratio"]["median"] > row["whole_ratio"]["median"]
    assert "times faster" in shown


def test_a_decoder_of_another_size_stands_in_the_place_of_the_models(load_benchmark, monkeypatch):
    training = load_benchmark("training")
    monkeypatch.setattr(training, "SIZES", {"small": (2, 64, 4, 128)})
    given = SimpleNamespace(model="musicrl-tiny", size="small", device="cpu")
    sized = training.generator_of(given)
    decoder = sized.config.decoder
    shape = (decoder.num_hidden_layers, decoder.hidden_size, decoder.num_attention_heads, decoder.ffn_dim)
    assert shape == (2, 64, 4, 128)
    assert (sized.config.num_codebooks, sized.config.codebook_size) == (4, 1024)
    codes = torch.zeros(1, 4, 3, dtype=torch.long)
    assert sized.step_logprobs(codes, ["a slow air"]).shape == (1, 3 + 3)


def test_dpo_is_measured_on_both_sides(load_benchmark, tmp_path, monkeypatch):
    found = measured(monkeypatch, load_benchmark("training"), "--tiny", tmp_path)
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


def test_an_iteration_of_ppo_is_taken_apart_with_an_adapter_and_without(load_benchmark, tmp_path, monkeypatch):
    adapter, whole = measured(monkeypatch, load_benchmark("ppo_iteration"), "--tiny", tmp_path)["measured"]
    assert (adapter["lora_r"], whole["lora_r"]) == (16, 0)
    for found in (adapter, whole):
        assert min(found[part] for part in ("sample_s", "decode_s", "score_s", "update_s")) > 0
    if sys.platform == "linux":
        assert whole["peak_mb"] > adapter["peak_mb"] > 10  # gradients and AdamW of all weights


def test_what_a_dpo_step_starts_is_counted_on_both_sides(load_benchmark, tmp_path, monkeypatch):
    launches = load_benchmark("launches")
    with launches.Operations() as operations:
        made = torch.ones(2, 3)
        (made.T.reshape(-1)[:2] + 1).sum()  # a view, a copy as it is turned round, a view, a sum, a sum
    assert operations.count == 4
    found = measured(monkeypatch, launches, "--tiny", tmp_path)
    (row,) = found["measured"]
    assert row["operations"]["accelerator"] == row["operations"]["cpu"] > 100  # so few clips are one part on either
    assert row["operations"]["head"] > 100
    monkeypatch.setattr(launches.likelihood, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(launches.likelihood, "TIMES_ON_AN_ACCELERATOR", 2**24)
    (row,) = measured(monkeypatch, launches, "--tiny", tmp_path)["measured"]
    assert row["operations"]["accelerator"] < row["operations"]["cpu"]  # a part a clip


def test_growth_is_measured_beside_its_lines(load_benchmark, tmp_path, monkeypatch):
    growth = load_benchmark("growth")
    found = measured(monkeypatch, growth, "--tiny --repeats 1", tmp_path)
    assert list(found["measured"]) == ["batch", "codebooks", "model size"]
    for first, second in found["measured"].values():
        assert second["x"] > first["x"]
        for kind in ("sampling", "step"):
            assert min(first[kind]["s"], second[kind]["s"]) > 0
            assert first[kind]["line_s"] == pytest.approx(first[kind]["s"])
            assert second[kind]["line_mb"] > first[kind]["line_mb"]


def test_the_lines_count_what_a_decoder_has_and_does(load_benchmark):
    growth, sampling = load_benchmark("growth"), load_benchmark("sampling")
    point = growth.Point(duration_s=0.2, batch=3, codebooks=2, layers=2, width=64, codebook_size=32)
    model = sampling.random_generator(2, 64, 1, 256, 2, 32)
    matrices = {name: weight.numel() for name, weight in model.decoder.named_parameters() if weight.dim() == 2}
    embeddings = sum(size for name, size in matrices.items() if "embed" in name)
    text = sum(
        size for name, size in matrices.items() if "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
    )
    assert point.weights == sum(matrices.values()) - embeddings - text
    assert point.trained == sum(matrices.values()) - 2 * 64  # the embedding of each codebook's pad
    # 3 clips of 11 steps; each step sees half of the 11 and the 8 of the text, in 2 layers of 64.
    assert point.operations("sampling") == 33 * (2 * point.weights + 4 * 2 * 64 * (5.5 + 8))


def test_the_page_on_scaling_is_what_the_results_say(load_benchmark):
    scaling = load_benchmark("scaling")
    assert scaling.PAGE.read_text(encoding="utf-8") == scaling.page(), "run python benchmarks/scaling.py"


def test_the_arithmetic_of_scaling_by_hand(load_benchmark):
    scaling = load_benchmark("scaling")
    small, large = scaling.SIZES
    # 24 layers of 16 x 1024^2, and 4 x 2048 x 1024 for heads and again for embeddings: the 420M of musicgen-small's decoder.
    assert small.point.trained == 24 * 16 * 1024**2 + 2 * 4 * 2048 * 1024
    assert round(large.point.trained / 1e9, 2) == 3.25
    # Keys and values of 10 s: 2 of 24 layers of 1024, 2 bytes each, for 503 decoder steps and 16 tokens of text.
    assert small.cache == 2 * 24 * 1024 * 2 * (503 + 16)
    assert small.reduced(False, 1) == 0
    assert small.reduced(False, 8) == 2 * 7 / 8 * 4 * small.point.trained
    held = small.memory(adapter=False)
    assert held["all"] == sum(bytes for name, bytes in held.items() if name != "all")
    assert held["gradients and AdamW"] == 12 * small.point.trained


def test_a_plot_is_the_same_from_the_same_numbers(load_benchmark, tmp_path):
    pytest.importorskip("matplotlib")
    growth = load_benchmark("growth")
    drawn = BENCHMARKS / "results" / "growth.svg"
    (tmp_path / "growth.json").write_text((BENCHMARKS / "results" / "growth.json").read_text())
    found = growth.draw(tmp_path / "growth.json").read_text()
    assert found == growth.draw(tmp_path / "growth.json").read_text()
    assert {"clip length", "model size"} <= set(json.loads((tmp_path / "growth.json").read_text())["measured"])
    assert drawn.is_file()


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
