import errno
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_generator
from transformers import MusicgenForConditionalGeneration

from musicrl_hf import align
from musicrl_hf import stages as stages_module
from musicrl_hf.align import RECIPES, AlignJob, recipe_file, run_align
from musicrl_hf.config import load_config
from musicrl_hf.preferences import load_preferences
from musicrl_hf.stages import Stages, going_on_in


def loudness(prompts, audio, sampling_rate):
    return audio.square().mean((1, 2)).sqrt()


def smoothness(prompts, audio, sampling_rate):
    return -(audio[..., 1:] - audio[..., :-1]).abs().mean((1, 2))


def test_every_bundled_recipe_is_a_job():
    recipes = sorted(RECIPES.glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert load_config(AlignJob, recipe_file(path.stem)).output_dir


@pytest.mark.parametrize("bf16", [False, True])
def test_the_loop_end_to_end(bf16, tmp_path, capsys):
    """Random weights at tiny size: every stage runs on what the stage before it wrote, and the end is a stock MusicGen."""
    torch.manual_seed(0)
    tiny_generator().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text(
        "".join(f"{word} air\n" for word in ("slow", "fast", "happy", "sad", "loud", "soft", "pop", "rock"))
    )
    (tmp_path / "heldout.txt").write_text("piano reel\nflute reel\nviolin reel\n")
    job = AlignJob(
        output_dir=str(tmp_path / "out"),
        model=str(tmp_path / "model"),
        adherence="test_align:loudness",
        quality="test_align:smoothness",
        prompts=str(tmp_path / "prompts.txt"),
        eval_prompts=str(tmp_path / "heldout.txt"),
        heldout_prompts=3,
        duration_s=1.0,
        listeners=3,
        panel=6,
        reward_steps=2,
        ppo_steps=2,
        ppo_batch_size=2,
        bf16=bf16,
    )
    out = run_align(job)
    printed = capsys.readouterr().out
    trained = [json.loads((out / name / "result.json").read_text()) for name in ("preference", "r", "u", "ru")]
    assert [record["config"]["bf16"] for record in trained] == [bf16] * 4
    alone = [f"preference:{out / 'preference'}"]
    tuned = [(record["config"]["reward"], record["config"]["normalise"]) for record in trained[1:]]
    assert tuned[1:] == [(alone, "none")] * 2
    result = json.loads((out / "evaluation" / "results.json").read_text())
    assert result["models"] == ["base", "r", "u", "ru"]
    assert result["prompts"] == 3
    assert (out / "table.txt").read_text().strip() in printed
    assert "simulated listeners" in printed
    assert "Nobody listened" in printed
    assert "<audio" in (out / "evaluation" / "index.html").read_text()
    base = MusicgenForConditionalGeneration.from_pretrained(tmp_path / "model").state_dict()
    for name in ("r", "u", "ru"):
        tuned = MusicgenForConditionalGeneration.from_pretrained(out / name).state_dict()
        assert tuned.keys() == base.keys()
        assert any(not torch.equal(tuned[key], base[key]) for key in base if key.startswith("decoder."))
        assert all(torch.equal(tuned[key], base[key]) for key in base if key.startswith("audio_encoder."))
    assert run_align(job) == out  # everything is there: nothing is done again
    assert capsys.readouterr().out.count("done before") == 6
    with pytest.raises(ValueError, match=r"`ppo_steps` is 3, and .*out was begun with 2: give that, or another"):
        run_align(replace(job, ppo_steps=3))


def test_a_second_round_learns_from_both_and_starts_from_ru(tmp_path, capsys):
    """Adapters on adapters, a reward on the generator, and a second round: 32 pairs more, voted on between clips of ru."""
    torch.manual_seed(0)
    tiny_generator().save_pretrained(tmp_path / "model")
    words = ("slow", "fast", "happy", "sad", "loud", "soft", "pop", "rock")
    (tmp_path / "prompts.txt").write_text("".join(f"{word} air\n" for word in words))
    (tmp_path / "heldout.txt").write_text("piano reel\nflute reel\n")
    job = AlignJob(
        output_dir=str(tmp_path / "out"),
        model=str(tmp_path / "model"),
        adherence="test_align:loudness",
        quality="test_align:smoothness",
        prompts=str(tmp_path / "prompts.txt"),
        eval_prompts=str(tmp_path / "heldout.txt"),
        heldout_prompts=2,
        duration_s=0.5,
        listeners=3,
        panel=6,
        pairs_per_prompt=4,
        reward_backbone="generator",
        reward_steps=1,
        ppo_steps=1,
        ru_steps=2,
        ppo_batch_size=4,
        clips_per_prompt=2,
        normalise="normalise_then_sum",
        ru_adherence=0.25,
        variety=0.2,
        max_kl=7.5,
        lora_r=2,
        rounds=2,
    )
    out = run_align(job)
    votes, more, both = (load_preferences(out / name) for name in ("votes", "votes2", "votes_all"))
    assert (len(votes), len(more), len(both)) == (32, 32, 64)
    assert set(votes["chosen_model"]) == {"base"}
    assert set(more["chosen_model"]) == {"ru"}
    assert not set(votes["chosen_seed"]) & set(more["chosen_seed"])
    settings = {name: json.loads((out / name / "result.json").read_text())["config"] for name in ("r", "u", "ru")}
    assert {name: config["max_steps"] for name, config in settings.items()} == {"r": 1, "u": 1, "ru": 2}
    assert {name: config["num_generations"] for name, config in settings.items()} == {"r": 2, "u": 2, "ru": 2}
    said = capsys.readouterr().out
    assert "u: PPO on the learned preference reward and variety\n" in said
    assert "ru: PPO on the learned preference reward and adherence and variety, from r" in said
    combined = "normalise_then_sum"
    assert {name: config["normalise"] for name, config in settings.items()} == {
        "r": combined,
        "u": combined,
        "ru": combined,
    }
    assert settings["u"]["reward"] == [f"0.8*preference:{out / 'preference'}", "0.2*variety"]
    beside = ["0.25*test_align:loudness", "0.2*variety"]
    assert settings["ru"]["reward"] == [f"0.55*preference:{out / 'preference'}", *beside]
    ru2 = json.loads((out / "ru2" / "result.json").read_text())["config"]
    assert ru2["reward"] == [f"0.55*preference:{out / 'preference2'}", *beside]
    assert {name: config["kl_coef"] for name, config in settings.items()} == {"r": 0.002, "u": 0.002, "ru": 0.002}
    assert {config["max_kl"] for config in (*settings.values(), ru2)} == {7.5}
    result = json.loads((out / "evaluation2" / "results.json").read_text())
    assert result["models"] == ["base", "r", "u", "ru", "ru2"]
    assert "\nru2 against ru: " in (table := (out / "table.txt").read_text())
    assert table.endswith("Tuned for 1 steps of 4 clips (ru 2). This is the short version.\n")
    assert set(result["rewards"]) >= {"preference:preference", "preference:preference2"}
    assert {"preference", "preference2"} <= set(table.splitlines()[0].split())
    under = {name: json.loads((out / name / "adapter_config.json").read_text()) for name in ("r", "u", "ru", "ru2")}
    assert {name: Path(config["base_model_name_or_path"]).name for name, config in under.items()} == {
        "r": "model", "u": "model", "ru": "r", "ru2": "ru",
    }  # fmt: skip


class AskedToEnd:
    """A reward that has its own process asked to end, once, when it is asked for the `at`-th time."""

    asked, at = 0, 0

    def __call__(self, prompts, audio, sampling_rate):
        type(self).asked += 1
        if self.asked == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loudness(prompts, audio, sampling_rate)


asked_to_end = AskedToEnd()


def test_a_stage_that_was_asked_to_end_goes_on_and_ends_as_one_that_was_not(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    tiny_generator().save_pretrained(tmp_path / "model")
    words = ("slow", "fast", "happy", "sad", "loud", "soft", "pop", "rock")
    (tmp_path / "prompts.txt").write_text("".join(f"{word} air\n" for word in words))
    (tmp_path / "heldout.txt").write_text("piano reel\n")
    job = AlignJob(
        output_dir=str(tmp_path / "unbroken"),
        model=str(tmp_path / "model"),
        adherence="test_align:asked_to_end",
        quality="test_align:smoothness",
        prompts=str(tmp_path / "prompts.txt"),
        eval_prompts=str(tmp_path / "heldout.txt"),
        heldout_prompts=1,
        duration_s=0.5,
        listeners=3,
        panel=6,
        reward_steps=1,
        ppo_steps=3,
        ppo_batch_size=2,
    )
    heard: dict[str, int] = {}

    class UpToR(Stages):
        def run(self, name, summary, work):
            if name in ("votes", "preference", "r"):
                before = AskedToEnd.asked
                super().run(name, summary, work)
                heard[name] = AskedToEnd.asked - before
            else:
                raise InterruptedError(name)

    monkeypatch.setattr(align, "Stages", UpToR)
    with pytest.raises(InterruptedError):
        run_align(job)
    assert heard["r"] == 3  # a step each
    again = replace(job, output_dir=str(tmp_path / "broken"))
    monkeypatch.setattr(AskedToEnd, "at", AskedToEnd.asked + heard["preference"] + 2)
    with pytest.raises(SystemExit) as ended:
        run_align(again)
    assert ended.value.code == 143
    assert "give the same command again, which goes on from there" in capsys.readouterr().err
    out = tmp_path / "broken"
    assert [path.name for path in (out / "r").glob("checkpoint-*")] == ["checkpoint-2"]
    begun = json.loads((out / "stages" / "r.begun").read_text())["seconds"]
    with pytest.raises(InterruptedError):
        run_align(again)
    assert heard["r"] == 1  # the third step alone
    weights = [load_file(tmp_path / name / "r" / "model.safetensors") for name in ("unbroken", "broken")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weights[1][name], weight), name
    assert not list((out / "r").glob("checkpoint-*"))
    assert not (out / "stages" / "r.begun").exists()
    assert json.loads((out / "stages" / "r.json").read_text())["seconds"] > begun > 0


def test_what_a_kill_left_of_a_checkpoint_is_no_place_to_go_on_from(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "trainer_state.json").write_text("{}")
    with going_on_in(tmp_path) as last:
        assert last is None
    assert not list(tmp_path.iterdir())
    with going_on_in(tmp_path / "not there yet") as last:
        assert last is None


def test_a_disk_that_is_full_hides_no_error(tmp_path, monkeypatch):
    def full(path, seconds):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stages_module, "_note", full)
    with pytest.raises(ZeroDivisionError):
        Stages(tmp_path, 1).run("r", "divides by nothing", lambda: 1 / 0)


def test_prompts_on_both_sides_are_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("slow air\nfast air\n")
    (tmp_path / "heldout.txt").write_text("Waltz\nSlow  air!\n")
    with pytest.raises(ValueError, match="`eval_prompts` holds 'Slow  air!', which `prompts` holds too"):
        run_align(
            AlignJob(
                output_dir=str(tmp_path / "out"),
                prompts=str(tmp_path / "prompts.txt"),
                eval_prompts=str(tmp_path / "heldout.txt"),
                heldout_prompts=2,
            )
        )
    assert not (tmp_path / "out").exists()  # nothing is left of what was refused


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("panel", 0),
        ("ppo_steps", 0),
        ("ru_steps", 0),
        ("duration_s", 31.0),
        ("rounds", 3),
        ("normalise", "mean"),
        ("ru_adherence", 1.0),
        ("max_kl", 0.0),
        ("variety", -0.1),
        ("variety", 1.0),
    ],
)
def test_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be .*got {value!r}"):
        AlignJob(output_dir="out", **{field: value})


def test_variety_needs_clips_to_compare_and_room_beside_adherence():
    with pytest.raises(
        ValueError, match="`clips_per_prompt` is 1, and `variety` compares a prompt's clips: give at least 2"
    ):
        AlignJob(output_dir="out", variety=0.2)
    with pytest.raises(ValueError, match="`ru_adherence` and `variety` add up to 1 and leave no preference: lower one"):
        AlignJob(output_dir="out", variety=0.4, ru_adherence=0.6, clips_per_prompt=2, ppo_batch_size=4)
