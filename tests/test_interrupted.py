"""Training that is cut short: by SIGKILL, SIGTERM, a full disk, a reward that fails, a clip that is none.

Whatever it is, what stands in `output_dir` is whole, one line says what happened, and the run goes on to the same weights. Of two processes: `test_interrupted_processes.py`.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import interrupted
import pytest
from interrupted import OPTIONS, finish, job, last_step, small_disk, start, weights_of, whole_and_tidy

from musicrl_hf.audio import audio_bytes
from musicrl_hf.cli import main
from musicrl_hf.preferences.schema import preferences_from_rows, save_preferences
from musicrl_hf.training.checkpoints import ASIDE, check_checkpoint, checkpoints_in, find_checkpoint
from musicrl_hf.training.stopping import STOPPED

KILLS = 20  # of each trainer
SHORT = {"max_steps": "6"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return interrupted.prepare(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def unbroken(root):
    """The weights that a job of so many steps ends with when nothing happens; each is run once."""
    made: dict[tuple, bytes] = {}

    def weights(kind: str, **fields: str) -> bytes:
        key = (kind, *sorted(fields.items()))
        if key not in made:
            folder = root / "unbroken" / f"{kind}-{len(made)}"
            log = folder.with_suffix(".log")
            folder.parent.mkdir(exist_ok=True)
            assert finish(start(job(kind, folder, **fields), root, log)) == 0, log.read_text()
            made[key] = weights_of(folder)
        return made[key]

    return weights


def wait_for_step(step: int, folder: Path, process, seconds: float = 1500) -> None:
    """Until a checkpoint of this step or a later one is there."""
    until = time.monotonic() + seconds
    while last_step(folder) < step and process.is_alive():
        assert time.monotonic() < until
        time.sleep(0.01)


# -- kill -9 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_killed_run_ends_with_the_weights_of_an_unbroken_one(kind, root, unbroken, tmp_path):
    """Killed anywhere from its first moment on, behind a step that chance names, and, every other time, while it saves.

    A run that is over before its kill comes must have ended as the unbroken one did, and begins anew.
    """
    long = {"max_steps": "80"}
    begun = time.monotonic()
    wanted = unbroken(kind, **long)
    whole_s = time.monotonic() - begun  # on this machine: what chance draws moments from
    chance = random.Random(kind)
    folder, log = tmp_path / "out", tmp_path / "log"
    kills, saving, over = 0, 0, 0
    while kills < KILLS:
        saved = last_step(folder)
        resume = {"resume_from_checkpoint": "last"} if saved else {}
        process = start(job(kind, folder, **long, **resume), root, log)
        if kills % 4:
            wait_for_step(saved + chance.randint(0, 3), folder, process)
        else:
            time.sleep(chance.uniform(0, whole_s * (80 - saved) / 80))
        if kills % 2:  # while the next checkpoint is being saved
            while not any(folder.glob(f"{ASIDE}checkpoint-*")) and process.is_alive():
                time.sleep(0.001)
        time.sleep(chance.uniform(0, (1 if kills % 2 else 4) * whole_s / 80))
        process.kill()
        ended = finish(process)
        assert ended in (0, -signal.SIGKILL), log.read_text()
        if ended == 0:
            assert weights_of(folder) == wanted
            shutil.rmtree(folder)
            over += 1
            assert over < KILLS  # else nothing is killed
            continue
        kills += 1
        saving += any(folder.glob(f"{ASIDE}checkpoint-*"))
    print(
        f"{kind}: {kills} kills, {saving} of them while a checkpoint was being saved; {over} runs ended before theirs"
    )
    resume = {"resume_from_checkpoint": "last"} if last_step(folder) else {}
    assert finish(start(job(kind, folder, **long, **resume), root, log)) == 0, log.read_text()
    assert weights_of(folder) == wanted
    whole_and_tidy(folder)
    assert len(checkpoints_in(folder)) == 2  # save_total_limit


def killed_while_saving(moment: int, root: Path, folder: Path) -> None:
    """A run of six steps that dies in its second checkpoint, and is resumed."""
    log = folder.with_suffix(".log")
    process = start(job("ppo", folder, **SHORT), root, log, interrupted.run_and_die_while_saving, moment)
    assert finish(process) == -signal.SIGKILL
    resumed = find_checkpoint("last", str(folder))
    assert Path(resumed).name in ("checkpoint-2", "checkpoint-4")
    check_checkpoint(resumed)
    assert finish(start(job("ppo", folder, **SHORT, resume_from_checkpoint="last"), root, log)) == 0
    whole_and_tidy(folder)


@pytest.mark.parametrize("moment", [9])
def test_a_run_killed_while_it_saves(moment, root, unbroken, tmp_path):
    killed_while_saving(moment, root, tmp_path / "out")
    assert weights_of(tmp_path / "out") == unbroken("ppo", **SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(1, 40, 4))
def test_a_run_killed_at_any_file_of_a_checkpoint(moment, root, unbroken, tmp_path):
    killed_while_saving(moment, root, tmp_path / "out")
    assert weights_of(tmp_path / "out") == unbroken("ppo", **SHORT)


# -- SIGTERM ---------------------------------------------------------------------------------------------------------------


def test_a_terminated_run_saves_says_so_and_goes_on(root, unbroken, tmp_path):
    folder, log = tmp_path / "out", tmp_path / "log"
    process = start(job("ppo", folder, **SHORT, save_steps="0"), root, log)
    while not (folder / "metrics.jsonl").is_file() and process.is_alive():  # until a step was made
        time.sleep(0.01)
    process.terminate()
    assert finish(process) == STOPPED == 143
    (checkpoint,) = checkpoints_in(folder)
    assert int(checkpoint.name.partition("-")[2]) % 2 == 0  # a set of clips is used up
    whole_and_tidy(folder)
    said = log.read_text().splitlines()[-1]
    assert said == f"Stopped by SIGTERM: go on with --resume_from_checkpoint {checkpoint}."
    assert not (folder / "result.json").exists()  # it is not finished
    again = job("ppo", folder, **SHORT, save_steps="0", resume_from_checkpoint="last")
    assert finish(start(again, root, log)) == 0
    assert weights_of(folder) == unbroken("ppo", **SHORT)


@pytest.mark.parametrize(("later", "status"), [(0.0, STOPPED), (60.0, -signal.SIGTERM)])
def test_a_second_sigterm_is_the_same_one_unless_it_comes_later(later, status, root, tmp_path):
    """The job's reward sends the process both; it cannot save before the step is done."""
    source = f"""
import os, signal, time

def told_twice(prompts, audio, rate, clock=time.monotonic):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    time.monotonic = lambda: clock() + {later}
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    return audio.abs().mean((1, 2))
"""
    (root / "signals.py").write_text(source)
    folder, log = tmp_path / "out", tmp_path / "log"
    words = job("ppo", folder, **SHORT, save_steps="0", reward="signals:told_twice")
    assert finish(start(words, root, log)) == status, log.read_text()
    assert len(checkpoints_in(folder)) == (status == STOPPED)


# -- a full disk -----------------------------------------------------------------------------------------------------------


def said_in_one_line(log: Path, folder: Path) -> str:
    text = log.read_text()
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if "musicrl: error:" in line]
    assert f"{folder}/" in line
    assert "could not be written" in line
    assert "--resume_from_checkpoint last" in line
    return line


@pytest.mark.parametrize("limit", [230_000, 150_000], ids=["optimiser", "weights"])  # which is the larger file
def test_a_file_that_cannot_be_written_whole(limit, root, unbroken, tmp_path):
    folder, log = tmp_path / "out", tmp_path / "log"
    process = start(job("ppo", folder, **SHORT), root, log, interrupted.run_on_a_full_disk, limit)
    assert finish(process) == 2, log.read_text()
    said_in_one_line(log, folder)
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-2"]
    whole_and_tidy(folder)
    assert finish(start(job("ppo", folder, **SHORT, resume_from_checkpoint="last"), root, log)) == 0
    assert weights_of(folder) == unbroken("ppo", **SHORT)


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_disk_that_is_full_as_clips_are_encoded(kind, root, unbroken, tmp_path):
    folder, log = tmp_path / "out", tmp_path / "log"
    process = start(job(kind, folder, **SHORT), root, log, interrupted.run_on_a_full_disk_while_encoding, 2000)
    assert finish(process) == 2, log.read_text()
    assert "Traceback" not in log.read_text()
    (line,) = [line for line in log.read_text().splitlines() if "musicrl: error:" in line]
    assert ".safetensors could not be written" in line
    assert not [path for path in folder.rglob("*") if ".safetensors" in path.name]
    assert finish(start(job(kind, folder, **SHORT), root, log)) == 0
    assert weights_of(folder) == unbroken(kind, **SHORT)


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="only root may mount a small disk")
@pytest.mark.slow
@pytest.mark.parametrize("room", [0.2, 0.9, 1.2, 1.5, 1.9])
def test_a_disk_that_fills_up(room, root, unbroken, tmp_path):
    """With room for so many checkpoints."""
    wanted = unbroken("ppo", **SHORT)
    reference = root / "unbroken"
    checkpoint = next(reference.glob("ppo-*/checkpoint-6"))
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    log = tmp_path / "log"
    with small_disk(tmp_path / "disk", int(room * size)):
        folder = tmp_path / "disk" / "out"
        assert finish(start(job("ppo", folder, **SHORT), root, log)) == 2, log.read_text()
        said_in_one_line(log, folder)
        assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-2"] * (room > 1.1)
        assert not list(folder.glob(f"{ASIDE}*"))
        if room > 1.1:
            whole_and_tidy(folder)
            subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(tmp_path / "disk")], check=True)
            assert finish(start(job("ppo", folder, **SHORT, resume_from_checkpoint="last"), root, log)) == 0
            assert weights_of(folder) == wanted


# -- rewards and clips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("raises_later", "Reward `my_rewards:raises_later` raised KeyError for 4 clips: 'boom' ("),
        (
            "hangs_later",
            "Reward `my_rewards:hangs_later` has not answered for 4 clips within 1 s: look at what it waits",
        ),
        (
            "no_number_later",
            "Reward `my_rewards:no_number_later` returned NaN or infinite scores for clip(s) [0, 1, 2, 3]",
        ),
    ],
)
def test_a_reward_that_fails_is_named_and_what_was_saved_stays_whole(
    kind, name, complaint, root, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(root)
    monkeypatch.delitem(__import__("sys").modules, "my_rewards", raising=False)
    fields = {"reward": f"my_rewards:{name}", "reward_timeout_s": "1"}
    if kind == "ppo":
        fields |= {"num_mini_batches": "1"}
    words = job(kind, tmp_path / "out", **SHORT, **fields, save_steps="1")
    assert main(words) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert "Traceback" not in said
    assert [path.name for path in checkpoints_in(tmp_path / "out")] == ["checkpoint-1", "checkpoint-2"]
    whole_and_tidy(tmp_path / "out")


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_clip_that_fails_to_decode_is_named_and_nothing_is_left_behind(kind, root, tmp_path, monkeypatch, capsys):
    """Its header is whole, so that only reading it all finds out."""
    rows = [interrupted.vote(number) for number in range(12)]
    whole = audio_bytes(0.3 * interrupted.torch.randn(1, 4000), interrupted.SAMPLING_RATE, "flac")
    for row in rows:
        row["rejected"] = whole[: len(whole) // 2]
    save_preferences(preferences_from_rows(rows), tmp_path / "votes")
    monkeypatch.chdir(root)
    assert main(job(kind, tmp_path / "out", preferences=str(tmp_path / "votes"))) == 2
    said = capsys.readouterr().err
    assert "row 0: rejected: the given bytes" in said
    assert "Traceback" not in said
    assert not checkpoints_in(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.safetensors"))
