"""Memory stays where it is: over more preferences than it holds, and over a thousand steps."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_generator
from transformers import TrainerCallback

from musicrl_hf.audio import audio_bytes
from musicrl_hf.preferences.codes import ClipEncoder, clip_hash
from musicrl_hf.preferences.schema import preferences_from_rows, save_preferences
from musicrl_hf.rewards import PreferenceModel
from musicrl_hf.training.dpo import DPOJob, MusicDPOTrainer, run_dpo
from musicrl_hf.training.ppo import MusicPPOTrainer
from musicrl_hf.training.reward import RewardJob, run_reward
from musicrl_hf.training.sequences import ClipSequences

STATUS = Path("/proc/self/status")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not STATUS.is_file(), reason="Linux says what a process holds")]

FRAMES = 1500  # a clip of 30 s
FEW, MANY, ROUNDS = 150, 600, 3  # rows; pairs of runs
ROW_MB = 2 * 4 * FRAMES * 4 / 1e6  # the ids of both clips of a row, as TRL's trainers read them: int32


def held_mb() -> float:
    """What the process holds itself, without the files that are mapped into its memory."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("RssAnon")) / 1e3


@contextmanager
def peak_mb() -> Iterator[list[float]]:
    """The largest of many looks at `held_mb` while the body runs, in a list of one."""
    ctypes.CDLL(None).malloc_trim(0)
    peak, done = [held_mb()], threading.Event()

    def look() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], held_mb())
            time.sleep(0.005)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield peak
    finally:
        done.set()
        looking.join()


def saved_preferences(count: int, folder: Path) -> None:
    """Preferences on clips of a moment, whose codes, in the caches of both trainings, are those of 30 s."""
    random = torch.Generator().manual_seed(count)
    fixed = {"chosen_model": "x", "rejected_model": "y", "preference": "a", "listener": "rule", "source": "test"}
    fixed |= {"created_at": "2026-01-01T00:00:00"}

    def clip() -> bytes:
        return audio_bytes(torch.rand(1, 24, generator=random) - 0.5, 400, "wav")

    rows = [{"prompt": f"slow jazz {n}", "chosen": clip(), "rejected": clip(), **fixed} for n in range(count)]
    save_preferences(preferences_from_rows(rows), folder / "preferences")
    generator = tiny_generator()
    generator.save_pretrained(folder / "generator")
    caches = [
        folder / "codes" / ClipEncoder(generator).identity,
        ClipSequences(PreferenceModel.from_generator(generator), 20.0, folder / "codes").folder,
    ]
    for number, row in enumerate(rows):
        codes = {
            clip_hash(row[side]): torch.randint(16, (4, FRAMES), dtype=torch.int16) for side in ("chosen", "rejected")
        }
        for cache in caches:
            cache.mkdir(parents=True, exist_ok=True)
            save_file(codes, cache / f"{number}.safetensors")


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_set_of_preferences_may_be_larger_than_memory(kind, tmp_path):
    folders = [tmp_path / name for name in ("first", "few", "many")]
    for folder, count in zip(folders, (FEW, FEW, MANY), strict=True):
        saved_preferences(count, folder)

    def peak_of(folder: Path, number: int) -> float:
        shared = {"preferences": str(folder / "preferences"), "model": str(folder / "generator"), "max_steps": 1}
        shared |= {"output_dir": str(folder / f"out_{number}"), "per_device_train_batch_size": 1}
        with peak_mb() as peak:
            if kind == "reward":
                run_reward(RewardJob(**shared, per_device_eval_batch_size=1, cache_dir=str(folder / "codes")))
            else:
                run_dpo(DPOJob(**shared, codes_dir=str(folder / "codes")))
        return peak[0]

    first, few, many = folders
    peak_of(first, 0)  # loads what every run needs
    # What an allocator keeps comes and goes by some MB from run to run; what rows take is in every pair of runs.
    grown = [-peak_of(few, number) + peak_of(many, number) for number in range(ROUNDS)]
    assert min(grown) < (MANY - FEW) * ROW_MB / 4


class Held(TrainerCallback):
    """Notes what the process holds behind each hundredth step."""

    def __init__(self):
        self.mb = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 100 == 0:
            self.mb.append(held_mb())


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_memory_is_flat_over_a_thousand_steps(kind, tmp_path):
    held = Held()
    if kind == "dpo":
        from test_dpo import config, pairs

        args = config(tmp_path, max_steps=1000, learning_rate=1e-4)
        trainer = MusicDPOTrainer(tiny_generator(), args=args, train_dataset=pairs(), callbacks=[held])
    else:
        from test_ppo import PROMPTS, config, loudness

        args = config(tmp_path, objective="ppo", max_steps=1000, num_ppo_epochs=10, learning_rate=1e-4)
        trainer = MusicPPOTrainer(tiny_generator(), loudness, args, PROMPTS, callbacks=[held])
    trainer.train()
    assert len(held.mb) == 10
    assert held.mb[-1] - held.mb[1] < 8  # MB, of which the log of each step takes some
