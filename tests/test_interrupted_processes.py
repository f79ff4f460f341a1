"""Two processes of which one or both are cut short: neither waits for the other, what stands is whole, and they go on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import interrupted
import psutil
import pytest
from interrupted import job, last_step, small_disk, weights_of, whole_and_tidy

from musicrl_hf.training.checkpoints import check_checkpoint, checkpoints_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return interrupted.prepare(tmp_path_factory.mktemp("jobs"))


def launch(words: list[str], root: Path) -> subprocess.Popen:
    """A job in two processes, as torchrun starts them."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", "-m", "musicrl_hf.cli", *words]
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Both, in the order of their ranks."""
    below = psutil.Process(process.pid).children(recursive=True)
    found = [child for child in below if "musicrl_hf.cli" in child.cmdline()]
    assert [child.environ()["WORLD_SIZE"] for child in found] == ["2", "2"]
    return sorted(found, key=lambda child: child.environ()["RANK"])


def wait_for(path: str, folder: Path, process: subprocess.Popen) -> None:
    while not any(folder.glob(path)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def unbroken_pair(root):
    """The weights of the DPO that two processes end with when nothing happens."""
    folder = root / "unbroken_pair"
    whole = launch(job("dpo", folder), root)
    said = whole.communicate(timeout=500)[0]
    assert whole.returncode == 0, said
    assert len(list((folder / "codes").rglob("*.safetensors"))) == 2  # each encoded the clips of its share of the pairs
    return weights_of(folder)


def goes_on_as_two(words: list[str], root: Path, wanted: bytes) -> None:
    again = launch([*words, "--resume_from_checkpoint", "last"], root)
    said = again.communicate(timeout=500)[0]
    assert again.returncode == 0, said
    assert weights_of(Path(words[words.index("--output_dir") + 1])) == wanted


def test_two_processes_that_are_both_told_twice_save_once_and_go_on(root, unbroken_pair, tmp_path):
    """A scheduler's SIGTERM goes to the launcher and to its processes, and the launcher's to these again."""
    folder = tmp_path / "out"
    words = job("dpo", folder, save_steps="0")
    process = launch(words, root)
    wait_for("metrics.jsonl", folder, process)
    for each in (*workers_of(process), process):
        each.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=500)[0]
    (checkpoint,) = checkpoints_in(folder)
    whole_and_tidy(folder)
    assert 0 < last_step(folder) < interrupted.STEPS
    assert said.count(f"Stopped by SIGTERM: go on with --resume_from_checkpoint {checkpoint}.") == 1
    assert {path.name for path in checkpoint.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    goes_on_as_two(words, root, unbroken_pair)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_processes_that_is_killed_ends_both_and_they_go_on(rank, root, unbroken_pair, tmp_path):
    folder = tmp_path / "out"
    process = launch(job("dpo", folder), root)
    wait_for("checkpoint-*", folder, process)
    workers = workers_of(process)
    workers[rank].kill()
    said = process.communicate(timeout=60)[0]  # and not after a process group's half an hour
    assert process.returncode == 1, said
    assert not any(worker.is_running() for worker in workers)
    for checkpoint in checkpoints_in(folder):
        check_checkpoint(checkpoint)
    goes_on_as_two(job("dpo", folder), root, unbroken_pair)
    whole_and_tidy(folder)


@pytest.mark.parametrize(
    ("kind", "name", "complaint", "saved"),
    [
        ("ppo", "raises", "raised KeyError for 8 clips: 'boom' (", [2, 4]),
        ("grpo", "hangs", "has not answered for 4 clips within 2 s", [2]),
    ],
)
def test_a_reward_that_fails_in_one_of_two_processes_ends_both(kind, name, complaint, saved, root, tmp_path):
    """At its third set of clips, of which PPO makes two steps here."""
    (root / "one_rank.py").write_text(f"""
import os
from my_rewards import hangs_later as hangs, loud, raises_later as raises

def reward(prompts, audio, rate):
    return ({name} if os.environ["RANK"] == "1" else loud)(prompts, audio, rate)
""")
    folder = tmp_path / "out"
    process = launch(job(kind, folder, reward="one_rank:reward", reward_timeout_s="2", save_steps="2"), root)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert f"Reward `one_rank:reward` {complaint}" in said, said
    assert [path.name for path in checkpoints_in(folder)] == [f"checkpoint-{step}" for step in saved]
    whole_and_tidy(folder)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root may mount a small disk")
def test_a_disk_that_fills_up_ends_two_processes(root, unbroken_pair, tmp_path):
    """Its first process alone writes most of a checkpoint, while the second waits for it."""
    size = sum(path.stat().st_size for path in (root / "unbroken_pair").rglob("*") if path.is_file())
    with small_disk(tmp_path / "disk", int(0.7 * size)):
        folder = tmp_path / "disk" / "out"
        process = launch(job("dpo", folder), root)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 1
        (line,) = [line for line in said.splitlines() if "musicrl: error:" in line]
        assert "could not be written" in line
        whole_and_tidy(folder)
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", str(tmp_path / "disk")], check=True)
        goes_on_as_two(job("dpo", folder), root, unbroken_pair)
