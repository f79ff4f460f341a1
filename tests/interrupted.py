"""Training jobs at tiny size in processes of their own, which can be killed; see `test_interrupted.py` and `test_interrupted_processes.py`.

The processes are forked from one that has everything imported, and so begin within a moment.
"""

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from tiny import SAMPLING_RATE, tiny_generator

import musicrl_hf.training.dpo
import musicrl_hf.training.online
import musicrl_hf.training.ppo
import musicrl_hf.training.reward  # noqa: F401
from musicrl_hf.audio import audio_bytes
from musicrl_hf.cli import main
from musicrl_hf.preferences.schema import preferences_from_rows, save_preferences
from musicrl_hf.training.checkpoints import ASIDE, check_checkpoint, checkpoints_in

HERE = Path(__file__).parent
STEPS = 20
PROMPTS = ["slow piano", "fast drums", "sad violin", "happy flute", "loud rock", "soft jazz"]
REWARDS = """
import time

def loud(prompts, audio, rate):
    return audio.abs().mean((1, 2))

calls = []

def raises_later(prompts, audio, rate):
    calls.append(1)
    if len(calls) > 2:
        raise KeyError("boom")
    return audio.abs().mean((1, 2))

def hangs_later(prompts, audio, rate):
    calls.append(1)
    if len(calls) > 2:
        time.sleep(3600)
    return audio.abs().mean((1, 2))

def no_number_later(prompts, audio, rate):
    calls.append(1)
    return audio.abs().mean((1, 2)) * (float("nan") if len(calls) > 2 else 1)
"""
_ONLINE = {"--model": "generator", "--prompts": "prompts.txt", "--reward": "my_rewards:loud", "--duration_s": "0.1"}
OPTIONS = {
    "reward": {"--model": "generator", "--preferences": "votes", "--test_share": "0.3", "--lora_r": "2"},
    "dpo": {"--model": "generator", "--preferences": "votes"},
    "rloo": {**_ONLINE, "--num_iterations": "2", "--save_steps": "2"},
    "grpo": {**_ONLINE, "--lora_r": "2"},
    "ppo": {**_ONLINE, "--objective": "ppo", "--num_mini_batches": "2", "--save_steps": "2"},
}


def clip(seed: int) -> bytes:
    random = torch.Generator().manual_seed(seed)
    return audio_bytes(0.2 * torch.randn(1, SAMPLING_RATE // 4, generator=random), SAMPLING_RATE, "wav")


def vote(number: int) -> dict:
    return {
        "prompt": PROMPTS[number % len(PROMPTS)],
        "chosen": clip(2 * number),
        "rejected": clip(2 * number + 1),
        "chosen_model": "one",
        "rejected_model": "other",
        "preference": "ab"[number % 2],
        "listener": "test",
        "source": "test",
        "created_at": "2026-01-01T00:00:00+00:00",
    }


def prepare(root: Path) -> Path:
    """What the jobs read."""
    tiny_generator(dropout=0.1).save_pretrained(root / "generator")
    (root / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    (root / "my_rewards.py").write_text(REWARDS, encoding="utf-8")
    save_preferences(preferences_from_rows([vote(number) for number in range(12)]), root / "votes")
    return root


def job(kind: str, output: str | Path, **fields: str) -> list[str]:
    """The words of one job behind `musicrl`, which saves at every step that it may."""
    common = {"--max_steps": str(STEPS), "--save_steps": "1", "--logging_steps": "1", "--learning_rate": "1e-2"}
    common |= {"--per_device_train_batch_size": "4", "--output_dir": str(output)}
    given = {f"--{name}": value for name, value in fields.items()}
    return [kind, *(word for pair in (common | OPTIONS[kind] | given).items() for word in pair)]


def weights_of(folder: Path) -> bytes:
    """The file that a finished job leaves."""
    return next(folder.glob("*model.safetensors")).read_bytes()


def run_job(words: list[str], root: Path, log: Path) -> None:
    """In the child: the job, its outputs in `log`."""
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    torch.set_num_threads(1)
    sys.exit(main(words))


def run_and_die_while_saving(words: list[str], root: Path, log: Path, moment: int) -> None:
    """The job, killed by its own hand at the `moment`-th touch of a file while its second checkpoint is being saved."""
    touched, saving = 0, False

    def watch(event: str, arguments: tuple) -> None:
        nonlocal touched, saving
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            return
        saving = saving or (event == "os.mkdir" and str(arguments[0]).endswith(f"{ASIDE}checkpoint-4"))
        touched += saving
        if touched == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    run_job(words, root, log)


def run_on_a_full_disk(words: list[str], root: Path, log: Path, limit: int) -> None:
    """The job, which from its first checkpoint on may write no file of more than `limit` bytes."""

    def watch(event: str, arguments: tuple) -> None:
        if event == "os.rename" and str(arguments[1]).endswith("checkpoint-2"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    sys.addaudithook(watch)
    run_job(words, root, log)


def run_on_a_full_disk_while_encoding(words: list[str], root: Path, log: Path, limit: int) -> None:
    """The same from the first file of encoded clips on."""

    def watch(event: str, arguments: tuple) -> None:
        if event == "tempfile.mkdtemp" and ".safetensors." in str(arguments[0]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    sys.addaudithook(watch)
    run_job(words, root, log)


def start(words: list[str], root: Path, log: Path, target=run_job, *arguments) -> multiprocessing.Process:
    """A process that runs a job."""
    paths = [str(HERE), str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # for the process that all are forked from
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["interrupted"])
    process = context.Process(target=target, args=(words, root, log, *arguments), daemon=True)
    process.start()
    return process


def finish(process: multiprocessing.Process, seconds: float = 1500) -> int:
    """Its exit status; negative is a signal."""
    process.join(seconds)
    assert process.exitcode is not None, "the job did not end"
    return process.exitcode


# -- what is left ---------------------------------------------------------------------------------------------------------


def last_step(folder: Path) -> int:
    """Of the last checkpoint; 0 without one."""
    return max((int(path.name.partition("-")[2]) for path in checkpoints_in(folder)), default=0)


def whole_and_tidy(folder: Path) -> None:
    """Each checkpoint is whole, and nothing half done lies beside them."""
    found = checkpoints_in(folder)
    assert found
    for checkpoint in found:
        check_checkpoint(checkpoint)
    assert not list(folder.glob(f"{ASIDE}*"))


@contextmanager
def small_disk(place: Path, size: int):
    """A file system of its own with so many bytes."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)
