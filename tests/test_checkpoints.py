"""Which checkpoint is resumed from, which is refused, which are kept; a real one at tiny size, and what may befall it."""

import errno
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny import tiny_generator

from musicrl_hf.training.checkpoints import (
    check_checkpoint,
    checkpoints_in,
    find_checkpoint,
    keep_newest,
    writing,
)
from musicrl_hf.training.online import MusicRLOOTrainer
from musicrl_hf.training.online_config import MusicRLOOConfig
from musicrl_hf.training.ppo import MusicPPOTrainer
from musicrl_hf.training.ppo_config import MusicPPOConfig, PPOJob
from musicrl_hf.training.stopping import train_or_stop


def loudness(prompts, audio, sampling_rate):
    return audio.abs().mean((1, 2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An output folder with checkpoint-1 and checkpoint-2."""
    folder = tmp_path_factory.mktemp("run")
    args = MusicPPOConfig(
        output_dir=str(folder),
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        duration_s=0.1,
        per_device_train_batch_size=2,
        use_cpu=True,
    )
    MusicPPOTrainer(tiny_generator(), loudness, args, ["slow piano", "fast drums"]).train()
    return folder


@pytest.fixture
def folder(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


class Canary:
    """Unpickled by `pickle` itself, it would leave a file."""

    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_a_checkpoint_holds_all_that_a_run_goes_on_from(folder):
    assert {path.name for path in (folder / "checkpoint-2").iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "value_head.safetensors"),
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer.json", "trainer_state.json"),
    }
    assert find_checkpoint("last", str(folder)) == str(folder / "checkpoint-2")
    assert find_checkpoint(None, str(folder)) is None
    assert find_checkpoint(str(folder / "checkpoint-1"), "elsewhere") == str(folder / "checkpoint-1")


def test_the_last_is_the_one_that_was_saved_last(folder, capsys):
    """A longer run left checkpoint-9, and a run from the start in the same folder checkpoint-1 and checkpoint-2."""
    shutil.copytree(folder / "checkpoint-1", folder / "checkpoint-9")
    os.utime(folder / "checkpoint-9" / "trainer_state.json", (1, 1))
    (folder / "checkpoint-9" / "README.md").write_text("a card")  # the folder changes, and it is none the newer
    assert find_checkpoint("last", str(folder)) == str(folder / "checkpoint-2")
    said = capsys.readouterr().err
    assert said == f"Resuming from {folder}/checkpoint-2, which was saved last, after checkpoint-9.\n"
    keep_newest(folder, 2)
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-1", "checkpoint-2"]


def remove(path: Path) -> None:
    path.unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [remove, cut])
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"]
)
def test_one_that_lacks_something_is_passed_over_and_refused_by_name(name, damage, folder, capsys):
    damage(folder / "checkpoint-2" / name)
    assert find_checkpoint("last", str(folder)) == str(folder / "checkpoint-1")
    said = capsys.readouterr().err
    assert f"Passed over: {folder}/checkpoint-2" in said
    with pytest.raises(ValueError, match="checkpoint-2"):
        find_checkpoint(str(folder / "checkpoint-2"), str(folder))
    shutil.rmtree(folder / "checkpoint-1")
    with pytest.raises(FileNotFoundError, match="no checkpoint there.*checkpoint-2"):
        find_checkpoint("last", str(folder))


def test_what_is_not_finished_is_no_checkpoint(folder):
    (folder / "checkpoint-2").rename(folder / ".saving-checkpoint-2")
    (folder / "checkpoint-3").write_text("a file")
    (folder / "checkpoint-best").mkdir()
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-1"]
    assert find_checkpoint("last", str(folder)) == str(folder / "checkpoint-1")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_is_never_run(name, folder, tmp_path):
    torch.save({"state": Canary(tmp_path / "run_code")}, folder / "checkpoint-2" / name)
    for wanted in ("last", str(folder / "checkpoint-2")):
        with pytest.raises(ValueError, match=rf"{name} names .*mkdir, which it would call") as error:
            find_checkpoint(wanted, str(folder))
        assert "not opened" in str(error.value)
    # torch's reader, which the Trainer calls, does not run it either
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "checkpoint-2" / name, weights_only=True)
    assert not (tmp_path / "run_code").exists()


def test_a_bare_pickle_in_a_checkpoint_is_refused(folder, tmp_path):
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(pickle.dumps(Canary(tmp_path / "run_code")))
    with pytest.raises(ValueError, match="optimizer.pt is cut short"):
        check_checkpoint(folder / "checkpoint-2")
    assert not (tmp_path / "run_code").exists()


def test_a_zip_bomb_in_a_checkpoint_is_not_unpacked(folder):
    path = folder / "checkpoint-2" / "optimizer.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("optimizer/data.pkl", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="holds optimizer/data.pkl compressed"):
        find_checkpoint("last", str(folder))


def test_pickled_weights_are_not_resumed_from(folder, tmp_path):
    checkpoint = folder / "checkpoint-2"
    for path in checkpoint.glob("*.safetensors"):
        path.unlink()
    torch.save(Canary(tmp_path / "run_code"), checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which can run code as it loads"):
        find_checkpoint(str(checkpoint), str(folder))
    assert not (tmp_path / "run_code").exists()


def test_the_newest_and_the_best_are_kept(tmp_path):
    for number in (9, 10, 11, 3):  # the last of a later run
        (tmp_path / f"checkpoint-{number}").mkdir()
        os.utime(tmp_path / f"checkpoint-{number}", (number, number) if number != 3 else (20, 20))
    (tmp_path / "checkpoint-notes").mkdir()
    keep_newest(tmp_path, None)
    assert len(checkpoints_in(tmp_path)) == 4
    keep_newest(tmp_path, 2, str(tmp_path / "checkpoint-9"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("checkpoint-11", "checkpoint-3", "checkpoint-9", "checkpoint-notes")
    ]


def test_the_one_that_was_just_saved_stays(tmp_path):
    """Two that a clock which was ahead wrote: they count as older all the same."""
    for number, saved in ((100, 4e9), (200, 4e9 + 1), (5, 1.0)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        os.utime(tmp_path / f"checkpoint-{number}", (saved, saved))
    keep_newest(tmp_path, 2, made=tmp_path / "checkpoint-5")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-5", "checkpoint-200"]


def test_what_deepspeed_writes_is_looked_into_too(folder, tmp_path):
    (folder / "checkpoint-2" / "global_step2").mkdir()
    torch.save(Canary(tmp_path / "run_code"), folder / "checkpoint-2" / "global_step2" / "model_states.pt")
    with pytest.raises(ValueError, match="global_step2/model_states.pt names .*mkdir, which it would call"):
        find_checkpoint("last", str(folder))
    assert not (tmp_path / "run_code").exists()


def test_another_number_of_processes_is_said(folder, capsys):
    for number in (0, 1):
        shutil.copy(folder / "checkpoint-2" / "rng_state.pth", folder / "checkpoint-2" / f"rng_state_{number}.pth")
    (folder / "checkpoint-2" / "rng_state.pth").unlink()
    args = MusicPPOConfig(
        output_dir=str(folder), max_steps=2, duration_s=0.1, per_device_train_batch_size=2, use_cpu=True
    )
    trainer = MusicPPOTrainer(tiny_generator(), loudness, args, ["slow piano", "fast drums"])
    train_or_stop(trainer, str(folder / "checkpoint-2"))
    assert "checkpoint-2 was saved by 2 processes and goes on with 1: what is drawn" in capsys.readouterr().err
    train_or_stop(trainer, str(folder / "checkpoint-1"))
    assert "was saved by" not in capsys.readouterr().err


@pytest.mark.parametrize("relative", ["folder", "best"])
def test_the_best_is_kept_however_its_folder_is_spelled(relative, tmp_path, monkeypatch):
    """As where a run began with a relative `output_dir` and is resumed with an absolute one, or the other way round."""
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        (tmp_path / "out" / f"checkpoint-{number}").mkdir(parents=True)
        os.utime(tmp_path / "out" / f"checkpoint-{number}", (number, number))
    here, whole = Path("out"), tmp_path / "out"
    folder, best = (here, whole) if relative == "folder" else (whole, here)
    keep_newest(folder, 1, str(best / "checkpoint-1"))
    assert [path.name for path in checkpoints_in(whole)] == ["checkpoint-1", "checkpoint-3"]


def test_the_best_checkpoint_is_named_where_it_lies(tmp_path):
    args = MusicPPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        metric_for_best_model="reward",
        duration_s=0.1,
        per_device_train_batch_size=2,
        use_cpu=True,
    )
    trainer = MusicPPOTrainer(tiny_generator(), loudness, args, ["slow piano", "fast drums"], ["sad air"])
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    for path in checkpoints_in(tmp_path):
        state = json.loads((path / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]).parent == tmp_path


def test_only_what_could_not_be_written_is_called_so(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), writing(str(tmp_path)):
        raise RuntimeError("shapes differ")
    with pytest.raises(OSError, match=r"could not be written.*MiB are free"), writing(str(tmp_path / "not" / "there")):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="could not be written.*Permission denied") as caught, writing(str(tmp_path)):
        raise OSError(errno.EACCES, "Permission denied")
    assert "make room" not in str(caught.value)
    tokenizer = tiny_generator().tokenizer.backend_tokenizer  # raises an `Exception` of no class of its own
    with pytest.raises(OSError, match=r"could not be written \(No such file .*os error 2"), writing(str(tmp_path)):
        tokenizer.save(str(tmp_path / "not" / "there.json"))
    with pytest.raises(Exception, match="^another$"), writing(str(tmp_path)):
        raise Exception("another")


def test_a_checkpoint_of_a_step_behind_the_last_is_refused(folder):
    args = MusicPPOConfig(
        output_dir=str(folder), max_steps=1, duration_s=0.1, per_device_train_batch_size=2, use_cpu=True
    )
    trainer = MusicPPOTrainer(tiny_generator(), loudness, args, ["slow piano", "fast drums"])
    with pytest.raises(ValueError, match="`max_steps` = 1, and .*checkpoint-2 is of step 2: give more steps"):
        train_or_stop(trainer, str(folder / "checkpoint-2"))


def test_a_run_that_begins_anew_is_not_resumed_from_an_earlier_ones_checkpoints(folder, capsys):
    """Not even if it is cut short before it saves one; what lay there is called otherwise, until the next run begins."""
    kept = (folder / "checkpoint-2" / "model.safetensors").read_bytes()
    for saves in ("no", "steps"):
        args = MusicPPOConfig(
            output_dir=str(folder),
            max_steps=1,
            save_strategy=saves,
            save_steps=1,
            duration_s=0.1,
            per_device_train_batch_size=2,
            use_cpu=True,
        )
        trainer = MusicPPOTrainer(tiny_generator(), loudness, args, ["slow piano", "fast drums"])
        train_or_stop(trainer, None)
        said = capsys.readouterr().err
        if saves == "no":
            assert "are called earlier-checkpoint-1, earlier-checkpoint-2 now: to go on from one of them" in said
            with pytest.raises(FileNotFoundError, match="no checkpoint there"):
                find_checkpoint("last", str(folder))
            earlier = folder / "earlier-checkpoint-2"
            assert find_checkpoint(str(earlier), str(folder)) == str(earlier)
            assert (earlier / "model.safetensors").read_bytes() == kept
        else:
            assert "earlier" not in said  # that one left none
    assert [path.name for path in sorted(folder.glob("*checkpoint-*"))] == [
        "checkpoint-1",
        "earlier-checkpoint-1",
        "earlier-checkpoint-2",
    ]
    train_or_stop(trainer, None)
    assert [path.name for path in sorted(folder.glob("*checkpoint-*"))] == ["checkpoint-1", "earlier-checkpoint-1"]


def test_another_method_does_not_go_on_from_it(folder):
    args = MusicRLOOConfig(
        output_dir=str(folder),
        max_steps=3,
        duration_s=0.1,
        per_device_train_batch_size=2,
        num_generations=2,
        use_cpu=True,
    )
    trainer = MusicRLOOTrainer(tiny_generator(), loudness, args, Dataset.from_dict({"prompt": ["slow piano"]}))
    with pytest.raises(ValueError, match="checkpoint-2' was saved by MusicPPOTrainer, and this is MusicRLOOTrainer"):
        train_or_stop(trainer, str(folder / "checkpoint-2"))


def test_what_is_derived_from_a_trainer_goes_on_from_its_checkpoints(folder):
    class Derived(MusicPPOTrainer):
        pass

    args = MusicPPOConfig(
        output_dir=str(folder), max_steps=3, duration_s=0.1, per_device_train_batch_size=2, use_cpu=True
    )
    trainer = Derived(tiny_generator(), loudness, args, ["slow piano", "fast drums"])
    train_or_stop(trainer, str(folder / "checkpoint-2"))
    assert trainer.state.global_step == 3


def test_an_adapter_of_another_rank_does_not_go_on_from_it(folder):
    job = {"prompts": "src/musicrl_hf/prompts/train.txt", "reward": ["quality"], "output_dir": str(folder)}
    job["resume_from_checkpoint"] = "last"
    assert PPOJob(**job).checkpoint() == str(folder / "checkpoint-2")
    with pytest.raises(ValueError, match=r"`lora_r` = 3, and .*checkpoint-2 has no adapter \(`lora_r` 0\)"):
        PPOJob(**job, lora_r=3).checkpoint()
    (folder / "checkpoint-2" / "adapter_config.json").write_text('{"r": 2}')
    with pytest.raises(ValueError, match="`lora_r` = 3, and .*checkpoint-2 has an adapter of rank 2"):
        PPOJob(**job, lora_r=3).checkpoint()
    assert PPOJob(**job, lora_r=2).checkpoint() == str(folder / "checkpoint-2")
