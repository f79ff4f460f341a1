"""RLOO and GRPO on held-out prompts: what evaluations say, and the guard that ends a run with its best policy."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from test_online import LORA, TRAINERS, GRPOJob, RLOOJob, both, config, logged, loudness, prompts
from tiny import tiny_generator

from musicrl_hf.flat import FlatMusicRLForCausalLM
from musicrl_hf.rewards import CombinedReward
from musicrl_hf.rewards.variety import variety
from musicrl_hf.training.callbacks import KLBudget
from musicrl_hf.training.guard import OverOptimisationGuard
from musicrl_hf.training.losses import step_sums
from musicrl_hf.training.online import run_grpo, run_rloo
from musicrl_hf.training.ppo_sampler import EVALUATION, clip_seed

JOBS = {"rloo": (RLOOJob, run_rloo), "grpo": (GRPOJob, run_grpo)}
HELD_OUT = Dataset.from_dict({"prompt": ["a reel", "a sad song", "rock and pop"]})


def quietness(texts, audio, sampling_rate):
    return -loudness(texts, audio, sampling_rate)


def evaluating(folder, **options):
    steps = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 2}
    return config(folder=folder, **steps, **options)


@both
@pytest.mark.parametrize("anchored", ["by a copy", "by another", "without its adapter", "not at all"])
def test_an_evaluation_says_what_held_out_clips_are_worth_and_how_far_they_are(kind, anchored, tmp_path):
    """Against the clips sampled, scored and compared with the anchor one by one."""
    beta = 0.0 if anchored == "not at all" else 0.05
    options = {"beta": beta, "temperature": 0.8, "max_steps": 2, "learning_rate": 3e-2}
    torch.manual_seed(5)
    other = tiny_generator(seed=3)
    trainer = TRAINERS[kind](
        tiny_generator(),
        CombinedReward({"loud": loudness}, {"loud": 2.0}, "normalise_then_sum"),
        evaluating(kind=kind, folder=tmp_path, **options),
        prompts(),
        ref_model=other if anchored == "by another" else None,
        peft_config=LORA if anchored == "without its adapter" else None,
        eval_dataset=HELD_OUT,
        watch={"quiet": quietness},
    )
    trainer.train()
    anchor = {"by another": other, "not at all": None}.get(anchored, tiny_generator())
    generator, scores, kls, entropies = trainer.generator, [], [], []
    for number, batch in enumerate((HELD_OUT["prompt"][:2], HELD_OUT["prompt"][2:])):
        text = generator.text_inputs(batch)
        random = torch.Generator().manual_seed(clip_seed(trainer.args.seed, number, EVALUATION))
        codes = generator.sample_codes(*text, 5, temperature=0.8, generator=random)
        with torch.no_grad():
            ref = None if anchor is None else anchor.code_logits(codes, *text, 0.8)
            seen = generator.score_codes(codes, *text, 0.8, ref)
        scores += loudness(batch, generator.decode_codes(codes, 40), 400).tolist()
        entropies += (step_sums(seen.entropies, seen.mask).sum(1) / seen.mask[0].sum()).tolist()
        kls += [] if seen.kl is None else step_sums(seen.kl, seen.mask).sum(1).tolist()
    found = {name: logged(trainer, name)[-1] for name in ("eval_reward", "eval_entropy", "eval_watch/quiet")}
    mean = sum(scores) / 3
    wanted = {"eval_reward": 2 * mean, "eval_entropy": sum(entropies) / 3, "eval_watch/quiet": -mean}
    assert found == pytest.approx(wanted, rel=1e-4)
    assert logged(trainer, "eval_reward/loud")[-1] == pytest.approx(mean, rel=1e-4)
    kl = logged(trainer, "eval_kl")
    assert len(kl) == (3 if beta else 0)
    assert not kl or kl[-1] == pytest.approx(sum(kls) / 3, rel=1e-3)
    assert not kl or (kl[0] == pytest.approx(0, abs=1e-4)) == (anchored != "by another")
    assert not kl or kl[-1] > 0.01


@both
def test_an_evaluation_changes_nothing_of_a_training(kind, tmp_path):
    runs = []
    for args in (config(kind, tmp_path, max_steps=3), evaluating(kind=kind, folder=tmp_path, max_steps=3)):
        trainer = TRAINERS[kind](
            tiny_generator(), [loudness, quietness], args, prompts(), peft_config=LORA, eval_dataset=HELD_OUT
        )
        trainer.train()
        runs.append(trainer)
        assert trainer.model.training
    assert len(logged(runs[1], "eval_reward")) == 4
    assert logged(runs[1], "eval_reward") == [0.0] * 4  # the sum of both
    assert {"eval_reward/loudness", "eval_reward/quietness"} <= set().union(*runs[1].state.log_history)
    kept = [[line for line in run.state.log_history if "loss" in line] for run in runs]
    for ours, theirs in zip(*kept, strict=True):
        assert {k: v for k, v in ours.items() if "time" not in k} == {
            k: v for k, v in theirs.items() if "time" not in k
        }
    for ours, theirs in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@both
def test_several_rewards_are_evaluated_by_their_weighted_sum(kind, tmp_path):
    """Two of one name are told apart, and one of weight 0, which TRL logs, is no part of it."""
    rewards = [loudness, quietness, CombinedReward({"a": loudness}), CombinedReward({"b": loudness})]
    args = config(kind, tmp_path, reward_weights=[2.0, 0.0, 0.5, 0.25])
    found = TRAINERS[kind](tiny_generator(), rewards, args, prompts(), eval_dataset=HELD_OUT).evaluate()
    parts = {f"eval_reward/{name}" for name in ("loudness", "CombinedReward 3", "CombinedReward 4")}
    assert {name for name in found if name.startswith("eval_reward/")} == parts
    assert found["eval_reward"] == pytest.approx(2.75 * found["eval_reward/loudness"], rel=1e-5)


def guarded(kind, folder, watch, lora, patience=2, **options):
    steps = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
    steps |= {"metric_for_best_model": "watch/meant", "greater_is_better": True, "save_total_limit": 2}
    return TRAINERS[kind](
        tiny_generator(),
        loudness,
        evaluating(kind=kind, folder=folder, **(steps | options)),
        prompts(),
        callbacks=[OverOptimisationGuard("eval_watch/meant", patience)],
        peft_config=LORA if lora else None,
        eval_dataset=HELD_OUT,
        watch={"meant": watch},
    )


@both
@pytest.mark.parametrize("lora", [False, True])
def test_a_run_that_over_optimises_stops_and_ends_with_its_best_policy(kind, lora, tmp_path):
    """What is meant is known of each step beforehand: two clips and one are asked for at each."""
    meant, asked = [0.1, 0.2, 0.5, 0.3, 0.4, 0.9], []

    def watch(texts, audio, sampling_rate):
        asked.append(len(texts))
        return torch.full((len(texts),), meant[(len(asked) - 1) // 2])

    trainer = guarded(kind, tmp_path / "run", watch, lora)
    trainer.train()
    assert asked == [2, 1] * 5
    assert logged(trainer, "eval_watch/meant") == pytest.approx(meant[:5])
    assert (trainer.state.global_step, trainer.state.best_global_step) == (4, 2)
    trainer.save_model(str(tmp_path / "out"))
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    saved, best, last = (
        load_file(folder / file)
        for folder in (tmp_path / "out", tmp_path / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-4")
    )
    assert saved.keys() == best.keys()
    assert all(torch.equal(value, best[name]) for name, value in saved.items())
    assert not all(torch.equal(value, last[name]) for name, value in saved.items())


@both
def test_a_guarded_run_that_is_resumed_ends_the_same(kind, tmp_path):
    options = {"save_total_limit": None, "patience": 3, "learning_rate": 3e-2}
    straight = guarded(kind, tmp_path / "run", quietness, True, **options)
    straight.train()
    best, last = straight.state.best_global_step, straight.state.global_step
    assert 0 <= best < last < 12
    again = guarded(kind, tmp_path / "run", quietness, True, **options)
    again.args.eval_on_start = False
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{max(best, 1)}"))
    assert (again.state.best_global_step, again.state.global_step) == (best, last)
    assert again.state.best_metric == straight.state.best_metric
    for ours, theirs in zip(again.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@both
def test_the_job_from_settings_to_the_best_policy(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("held_out_rewards.py").write_text(
        "def loud(prompts, audio, rate):\n    return audio.square().mean((1, 2)).sqrt()\n"
        "def quiet(prompts, audio, rate):\n    return -loud(prompts, audio, rate)\n"
    )
    tiny_generator().save_pretrained("base")
    Path("prompts.txt").write_text("slow piano\nfast guitar\n")
    Path("held_out.txt").write_text("a reel\na sad song\nrock\n")
    job, run = JOBS[kind]
    run(
        job(
            model="base",
            prompts="prompts.txt",
            eval_prompts="held_out.txt",
            reward=["held_out_rewards:loud"],
            watch=["held_out_rewards:quiet"],
            guard="watch/held_out_rewards:quiet",
            guard_patience=2,
            output_dir="out",
            duration_s=0.1,
            max_steps=8,
            eval_steps=1,
            save_steps=1,
            learning_rate=3e-2,
            per_device_train_batch_size=4,
            num_generations=2,
            lora_r=2,
        )
    )
    result = json.loads(Path("out/result.json").read_text())
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    curve = [line["eval_watch/held_out_rewards:quiet"] for line in lines if "eval_reward" in line]
    best = curve.index(max(curve))
    assert result["metrics"]["best_step"] == best
    assert len(curve) == best + 3
    assert result["metrics"]["eval_watch/held_out_rewards:quiet"] == max(curve)
    assert {"eval_kl", "eval_entropy", "eval_reward"} <= set(result["metrics"])
    kept = load_file(f"out/checkpoint-{best}/adapter_model.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in load_file("out/adapter_model.safetensors").items())


@both
def test_what_cannot_be_evaluated_is_refused(kind, tmp_path, monkeypatch):
    build = partial(TRAINERS[kind], tiny_generator(), loudness, config(kind, tmp_path), prompts())
    with pytest.raises(ValueError, match="`eval_dataset` must have a `prompt` column and at least one row, got 0 rows"):
        build(eval_dataset=Dataset.from_dict({"prompt": []}))
    with pytest.raises(ValueError, match="`watch` = quiet is scored at evaluations only, but `eval_dataset` is None"):
        build(watch={"quiet": quietness})
    with pytest.raises(ValueError, match="`watch` compares the clips of a prompt"):
        build(watch={"variety": variety}, eval_dataset=HELD_OUT)
    with pytest.raises(ValueError, match=r"`watch\['quiet'\]` must be a callable"):
        build(watch={"quiet": 3}, eval_dataset=HELD_OUT)
    with pytest.raises(ValueError, match="`eval_dataset` is empty"):
        build().evaluate()
    with pytest.raises(ValueError, match="`num_generations_eval` = 4: .* leave it 1"):
        config(kind, tmp_path, num_generations_eval=4)
    job = partial(JOBS[kind][0], prompts="p.txt", output_dir="out")
    with pytest.raises(ValueError, match="`eval_steps` = 5 needs held-out prompts"):
        job(eval_steps=5)
    with pytest.raises(ValueError, match="`watch` = .* `eval_steps` = 0"):
        job(watch=["quality"], eval_prompts="h.txt")
    with pytest.raises(
        ValueError, match="`guard` = 'watch/tempo' is no metric of the evaluations; they are reward, reward/"
    ):
        job(guard="watch/tempo", eval_steps=1, eval_prompts="h.txt", save_steps=1)
    with pytest.raises(ValueError, match="`save_steps` must be `eval_steps` and above 0, got 2 and 1"):
        job(guard="reward", eval_steps=1, eval_prompts="h.txt", save_steps=2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="`eval_dataset`: FSDP and ZeRO-3 share out"):
        build(eval_dataset=HELD_OUT)
    shared = JOBS[kind][0](prompts="p.txt", output_dir=str(tmp_path / "out"), reward=["quality"], sample_steps=5)
    with pytest.raises(ValueError, match="`sample_steps` = 5: FSDP and ZeRO-3 share out"):
        JOBS[kind][1](shared)


def test_an_adapter_that_is_trained_on_is_compared_with_itself_as_it_was(tmp_path):
    model = get_peft_model(FlatMusicRLForCausalLM.from_generator(tiny_generator()), LORA)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    trainer = TRAINERS["rloo"](
        model, loudness, evaluating(kind="rloo", folder=tmp_path, max_steps=2), prompts(), eval_dataset=HELD_OUT
    )
    trainer.train()
    kl = logged(trainer, "eval_kl")
    assert abs(kl[0]) < 1e-4
    assert kl[-1] > 1e-3


@both
def test_an_evaluation_beyond_the_budget_of_kl_ends_the_run(kind, tmp_path, capsys):
    """Before the log of the next step, whose KL is of the same policy, would."""
    budget = KLBudget(1e-3, codes=20)
    args = evaluating(kind=kind, folder=tmp_path, max_steps=4, learning_rate=3e-2)
    trainer = TRAINERS[kind](tiny_generator(), loudness, args, prompts(), callbacks=[budget], eval_dataset=HELD_OUT)
    trainer.train()
    kls = logged(trainer, "eval_kl")
    assert len(kls) == 2
    assert kls[1] > 1e-3
    assert trainer.state.global_step == 1
    assert f"KL to the anchor is {kls[1]:.4g} nats a clip" in capsys.readouterr().out


def test_a_result_is_of_the_step_that_was_saved(tmp_path, monkeypatch):
    """Of a guarded run the loss and the evaluation are of its best step, and not of the last."""
    monkeypatch.chdir(tmp_path)
    Path("stepped_rewards.py").write_text(
        "import torch\n"
        "asked = []\n"
        "def loud(prompts, audio, rate):\n    return audio.square().mean((1, 2)).sqrt()\n"
        "def meant(prompts, audio, rate):\n"
        "    asked.append(0)\n    return torch.full((len(prompts),), [1.0, 2.0, 4.0, 3.0, 0.0][len(asked) - 1])\n"
    )
    tiny_generator().save_pretrained("base")
    Path("prompts.txt").write_text("slow piano\nfast guitar\n")
    options = {"model": "base", "prompts": "prompts.txt", "eval_prompts": "prompts.txt", "output_dir": "out"}
    options |= {"duration_s": 0.1, "max_steps": 8, "eval_steps": 1, "save_steps": 1, "logging_steps": 1, "lora_r": 2}
    options |= {
        "per_device_train_batch_size": 4,
        "reward": ["stepped_rewards:loud"],
        "watch": ["stepped_rewards:meant"],
        "guard_patience": 2,
    }
    run_rloo(RLOOJob(**options, guard="watch/stepped_rewards:meant", num_generations=2))
    metrics = json.loads(Path("out/result.json").read_text())["metrics"]
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert metrics["best_step"] == metrics["step"] == 2
    assert metrics["eval_watch/stepped_rewards:meant"] == 4.0
    (of_best,) = [line for line in lines if line["step"] == 2 and "loss" in line]
    assert {name: metrics[name] for name in ("loss", "kl", "reward")} == {
        name: of_best[name] for name in ("loss", "kl", "reward")
    }
    assert max(line["step"] for line in lines) == 4


@both
def test_what_is_wrong_is_called_by_its_own_name(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_generator().save_pretrained("base")
    Path("prompts.txt").write_text("slow piano\nfast guitar\n")
    job, run = JOBS[kind]
    options = {"model": "base", "prompts": "prompts.txt", "output_dir": "out", "num_generations": 4, "max_steps": 1}
    with pytest.raises(FileNotFoundError, match="`eval_prompts`: there is no file none.txt"):
        run(job(eval_prompts="none.txt", **options))
    with pytest.raises(ValueError, match="`watch` = 'qualty' is unknown"):
        run(job(eval_prompts="prompts.txt", eval_steps=1, watch=["qualty"], **options))
    for name in ("beta", "epsilon"):
        with pytest.raises(ValueError, match=f"`{name}` must be at least 0, got -1"):
            job(**options, **{name: -1})
    with pytest.raises(ValueError, match="`num_iterations` must be at least 1, got 0"):
        job(**options, num_iterations=0)
