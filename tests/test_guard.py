"""Watched rewards that fall while the trained one rises: the run stops, and what it leaves is the best policy."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import interrupted
import pytest
import torch
from interrupted import finish, job, start
from safetensors.torch import load_file
from test_ppo import LORA, PROMPTS, config, even_codes, logged, readable_generator
from tiny import tiny_generator
from torch import Tensor

from musicrl_hf.config import load_config
from musicrl_hf.generator import load_generator
from musicrl_hf.training.checkpoints import check_checkpoint, checkpoints_in
from musicrl_hf.training.guard import OverOptimisationGuard, has_stalled
from musicrl_hf.training.ppo import MusicPPOTrainer, run_ppo
from musicrl_hf.training.ppo_config import PPOJob
from musicrl_hf.training.ppo_policy import VALUE_FILE, add_lora
from musicrl_hf.training.stopping import STOPPED


def some_even_codes(prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor:
    """What even codes stand for: three of four are best, and more are worse again."""
    return -(even_codes(prompts, audio, sampling_rate) - 0.75).abs()


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "stalled"),
    [
        ([], 1, 0.0, False),
        ([0.5], 1, 0.0, False),  # nothing to compare with
        ([0.5, 0.5], 1, 0.0, True),  # no rise
        ([0.5, 0.4, 0.6], 1, 0.0, False),
        ([0.5, 0.4, 0.6], 2, 0.0, False),
        ([0.5, 0.4, 0.3], 3, 0.0, False),  # three are not behind the best yet
        ([0.5, 0.4, 0.3, 0.5], 3, 0.0, True),
        ([0.0, 0.25, 0.5, 0.75], 2, 0.5, True),  # at most .5 more than .25
        ([0.0, 0.25, 0.5, 0.875], 2, 0.5, False),
        ([0.0, 0.25, 0.5, 0.75], 3, 0.5, False),  # small steps that add up are a rise
        ([-2.0, -1.0, -1.5], 1, 0.0, True),
    ],
)
def test_when_it_has_stalled(values, patience, min_delta, stalled):
    assert has_stalled(values, patience, min_delta) == stalled


def guarded(folder: Path, watch, *, lora: bool = False, patience: int = 2, **options) -> MusicPPOTrainer:
    args = config(
        folder,
        **{
            "objective": "ppo",
            "kl_coef": 0.0,
            "max_steps": 60,
            "per_device_train_batch_size": 16,
            "per_device_eval_batch_size": 16,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "eval_on_start": True,
            "save_strategy": "steps",
            "save_steps": 4,
            "save_total_limit": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "watch/meant",
            "greater_is_better": True,
            **options,
        },
    )
    torch.manual_seed(0)
    generator = readable_generator()
    model = add_lora(generator, LORA, "base") if lora else generator
    guard = OverOptimisationGuard("eval_watch/meant", patience)
    held_out = ["jazz", "rock", "pop", "reel"] * 4
    return MusicPPOTrainer(model, even_codes, args, PROMPTS, held_out, callbacks=[guard], watch={"meant": watch})


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_that_over_optimises_stops_and_ends_with_its_best_policy(tmp_path, lora, capsys):
    trainer = guarded(tmp_path / "run", some_even_codes, lora=lora, learning_rate=3e-2 if lora else 1e-2)
    trainer.train()
    curve = logged(trainer, "eval_watch/meant")
    steps = [line["step"] for line in trainer.state.log_history if "eval_watch/meant" in line]
    assert steps == list(range(0, 4 * len(curve), 4))
    assert steps[-1] == trainer.state.global_step < 60
    best = curve.index(max(curve))
    assert 0 < best == len(curve) - 3  # the two behind it were the patience
    assert logged(trainer, "eval_reward")[-1] > logged(trainer, "eval_reward")[best]  # which went on rising
    assert f"in 2 evaluations: stopping at step {steps[-1]}." in capsys.readouterr().out

    trainer.save_model(str(tmp_path / "out"))
    kept = tmp_path / "run" / f"checkpoint-{steps[best]}"
    assert Path(trainer.state.best_model_checkpoint) == kept
    check_checkpoint(kept)
    assert kept in checkpoints_in(tmp_path / "run")
    for name in ("adapter_model.safetensors" if lora else "model.safetensors", VALUE_FILE):
        saved, wanted = load_file(tmp_path / "out" / name), load_file(kept / name)
        assert saved.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[key]) for key, value in saved.items())
    assert trainer.evaluate()["eval_watch/meant"] == pytest.approx(max(curve), abs=1e-6)


def test_the_policy_that_it_starts_from_may_be_the_best(tmp_path):
    def worse_and_worse(prompts, audio, rate):
        return -even_codes(prompts, audio, rate)

    trainer = guarded(tmp_path, worse_and_worse, learning_rate=3e-2)
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.global_step) == (0, 8)
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-0"
    for name, value in readable_generator().state_dict().items():
        assert torch.equal(trainer.model.generator.state_dict()[name], value)
    assert not trainer.model.value_head.bias.any()


@pytest.mark.parametrize("eval_steps", [1, 4])
def test_a_run_resumed_from_any_of_its_checkpoints_ends_the_same(tmp_path, eval_steps):
    options = {"eval_steps": eval_steps, "save_steps": eval_steps, "save_total_limit": None}
    folder, backup = tmp_path / "run", tmp_path / "backup"
    straight = guarded(folder, some_even_codes, **options)
    straight.train()
    ended = {name: value.clone() for name, value in straight.model.state_dict().items()}
    best, last = straight.state.best_global_step, straight.state.global_step
    assert 0 < best < last
    folder.rename(backup)
    for step in sorted({0, best - eval_steps, best, last - eval_steps, last}):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for checkpoint in checkpoints_in(backup):
            if int(checkpoint.name.partition("-")[2]) <= step:  # what was there when the run was interrupted
                shutil.copytree(checkpoint, folder / checkpoint.name)
        again = guarded(folder, some_even_codes, **options, eval_on_start=False)
        again.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert again.state.best_global_step == best
        assert again.state.best_metric == straight.state.best_metric
        assert again.state.global_step == last + (step == last)
        for name, value in ended.items():
            assert torch.equal(value, again.model.state_dict()[name]), (step, name)


def test_the_best_outlasts_a_resumed_run_that_spells_its_folder_otherwise(tmp_path, monkeypatch):
    def worse_and_worse(prompts, audio, rate):
        return -even_codes(prompts, audio, rate)

    monkeypatch.chdir(tmp_path)
    options = {"learning_rate": 3e-2, "eval_steps": 1, "save_steps": 1, "patience": 9}
    guarded(Path("out"), worse_and_worse, **options, max_steps=1).train()
    again = guarded(tmp_path / "out", worse_and_worse, **options, max_steps=3, eval_on_start=False)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert again.state.best_global_step == 0
    for name, value in readable_generator().state_dict().items():
        assert torch.equal(again.model.generator.state_dict()[name], value)


def test_a_checkpoint_that_was_kept_by_another_metric_is_refused(tmp_path):
    first = guarded(tmp_path, some_even_codes, max_steps=8, metric_for_best_model="reward")
    first.pop_callback(OverOptimisationGuard)
    first.train()
    again = guarded(tmp_path, some_even_codes, eval_on_start=False)
    with pytest.raises(ValueError, match="did not keep its best checkpoint by `eval_watch/meant`"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_best_checkpoint_that_is_gone_is_missed_at_once(tmp_path):
    first = guarded(tmp_path, lambda prompts, audio, rate: -even_codes(prompts, audio, rate), max_steps=4)
    first.train()
    shutil.rmtree(tmp_path / "checkpoint-0")
    again = guarded(tmp_path, some_even_codes, eval_on_start=False)
    with pytest.raises(FileNotFoundError, match="put checkpoint-0 back"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_guarded_run_that_is_cut_short_ends_with_the_weights_of_an_unbroken_one(tmp_path, sent):
    (tmp_path / "jobs").mkdir()
    root = interrupted.prepare(tmp_path / "jobs")
    # Of this seed the best step is not the first.
    fields = {"guard": "reward", "max_steps": "10", "eval_prompts": "prompts.txt", "eval_steps": "2", "seed": "2"}
    folders, log = [tmp_path / "unbroken", tmp_path / "broken"], tmp_path / "log"
    assert finish(start(job("ppo", folders[0], **fields), root, log)) == 0, log.read_text()

    process = start(job("ppo", folders[1], **fields), root, log)
    while not (folders[1] / "checkpoint-4").exists() and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, sent)
    assert finish(process) == (STOPPED if sent == signal.SIGTERM else -signal.SIGKILL), log.read_text()
    assert not (folders[1] / "result.json").exists()
    resumed = job("ppo", folders[1], **fields, resume_from_checkpoint="last")
    assert finish(start(resumed, root, log)) == 0, log.read_text()

    unbroken, broken = (json.loads((folder / "result.json").read_text())["metrics"] for folder in folders)
    assert broken["best_step"] == unbroken["best_step"] > 0
    assert broken["eval_reward"] == unbroken["eval_reward"]
    for name in ("model.safetensors", VALUE_FILE):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"guard": "quality"},
            "`guard` = 'quality' is no metric of the evaluations; they are reward, reward/adherence",
        ),
        ({"guard": "kl"}, "`guard` = 'kl' is no metric"),
        ({"guard": "watch/quality"}, "any reward more that `watch` names"),
        ({"guard": "reward", "eval_steps": 0, "save_steps": 0}, "`save_steps` must be `eval_steps` and above 0"),
        ({"guard": "reward", "save_steps": 4}, "got 4 and 2"),
        ({"guard": "reward", "save_total_limit": 1}, "`save_total_limit` = 1"),
        ({"guard_patience": 0}, "`guard_patience` must be at least 1"),
        ({"guard_min_delta": -0.1}, "`guard_min_delta` must be at least 0"),
        ({"guard_min_delta": float("nan")}, "`guard_min_delta` must be at least 0"),
    ],
)
def test_guards_that_make_no_sense_are_refused(options, message):
    fields = {"eval_steps": 2, "save_steps": 2, "eval_prompts": "p.txt", "reward": ["0.5*adherence"], **options}
    with pytest.raises(ValueError, match=message):
        PPOJob(prompts="p.txt", output_dir="out", **fields)


@pytest.mark.parametrize(("patience", "min_delta", "named"), [(0, 0.0, "patience"), (1, -1.0, "min_delta")])
def test_arguments_that_make_no_sense_are_refused(patience, min_delta, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        OverOptimisationGuard("eval_reward", patience, min_delta)


REWARDS = """
def loud(prompts, audio, rate):
    return audio.abs().mean((1, 2))

def quiet(prompts, audio, rate):
    return -loud(prompts, audio, rate)
"""


@pytest.mark.parametrize("guard", ["watch/my_guarded:quiet", "watch/my_guarded:loud"])
def test_the_job_from_yaml_to_the_best_policy(tmp_path, monkeypatch, capsys, guard):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_guarded.py").write_text(REWARDS)
    tiny_generator().save_pretrained(tmp_path / "base")
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    Path("job.yaml").write_text(
        "model: base\nprompts: prompts.txt\neval_prompts: prompts.txt\nreward: [2*my_guarded:loud]\noutput_dir: out\n"
        "watch: [my_guarded:quiet, my_guarded:loud]\nguard_patience: 2\nguard_min_delta: 1e-4\n"
        "max_steps: 12\nsave_steps: 2\neval_steps: 2\nduration_s: 0.1\nlogging_steps: 1\nlearning_rate: 1e-2\n"
    )
    out = run_ppo(load_config(PPOJob, "job.yaml", ["--guard", guard]))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_kl" in line]
    for line in evaluations:
        assert line["eval_watch/my_guarded:loud"] == line["eval_reward/my_guarded:loud"]
        assert line["eval_watch/my_guarded:quiet"] == pytest.approx(-line["eval_reward/my_guarded:loud"])
    best = max(evaluations, key=lambda line: line[f"eval_{guard}"])
    metrics = json.loads((out / "result.json").read_text())["metrics"]
    assert metrics["best_step"] == best["step"]
    assert {name: metrics[name] for name in best if name.startswith("eval_")} == {
        name: value for name, value in best.items() if name.startswith("eval_")
    }
    assert f"Saved the weights of step {best['step']}: the best, with {guard}" in capsys.readouterr().out
    for name in ("model.safetensors", VALUE_FILE):
        assert (out / name).read_bytes() == (out / f"checkpoint-{best['step']}" / name).read_bytes()
    load_generator(out).sample(["slow piano"], duration_s=0.1, seed=0)
