"""Sampled pairs that simulated listeners or a reward choose between, and DPO on a reward's choices."""

import json

import pytest
import torch
from tiny import tiny_generator

from musicrl_hf.audio import read_audio
from musicrl_hf.labelling import PairsJob, RewardListener, run_pairs
from musicrl_hf.preferences import pairs
from musicrl_hf.preferences.agreement import count_agreement, pair_votes
from musicrl_hf.preferences.listeners import count_listeners, simulated_listeners
from musicrl_hf.preferences.schema import load_preferences
from musicrl_hf.rewards import PreferenceModel
from musicrl_hf.training.dpo import DPOJob, run_dpo


def steadiness(prompts, audio, sampling_rate):
    """A reward for tests, blind to loudness: how little the clip changes from sample to sample."""
    return -(audio.diff(dim=-1).square().mean((1, 2)) / audio.square().mean((1, 2)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelling") / "model"
    tiny_generator().save_pretrained(folder)
    return str(folder)


def job(model, tmp_path, **options) -> PairsJob:
    (tmp_path / "prompts.txt").write_text("slow air\nfast reel\njazz piano\nloud rock\n")
    defaults = {
        "prompts": str(tmp_path / "prompts.txt"),
        "out": str(tmp_path / "pairs"),
        "duration_s": 0.5,
        "listeners": 4,
    }
    return PairsJob(model=model, **{**defaults, **options})


def test_a_reward_chooses_what_it_scores_higher_and_is_called_a_reward(model, tmp_path, capsys):
    ds = load_preferences(run_pairs(job(model, tmp_path, label_with=[f"0.5*{__name__}:steadiness"])))
    assert set(ds["listener"]) == {f"reward:0.5*{__name__}:steadiness"}
    assert count_listeners(ds["listener"]) == {"listeners": 1, "simulated": 0, "rewards": 1}
    assert set(ds["confidence"]) == {None}
    for row in ds:
        chosen, rejected = (
            steadiness(None, read_audio(row[side]["bytes"])[0][None], 400) for side in ("chosen", "rejected")
        )
        assert chosen > rejected
    assert set(ds["preference"]) == {"a", "b"}, "the clip that it prefers stands on either side"
    assert f"chosen by reward:0.5*{__name__}:steadiness: nobody listened." in capsys.readouterr().out


def test_equal_scores_are_a_tie_and_broken_ones_are_refused():
    one, other = torch.rand(1, 800), torch.rand(1, 800)
    assert RewardListener(lambda prompts, audio, rate: torch.ones(2), "even")("p", one, other, 8000).preference == "tie"
    with pytest.raises(ValueError, match="Reward `reward:odd` returned NaN"):
        RewardListener(lambda prompts, audio, rate: torch.full((2,), torch.nan), "odd")("p", one, other, 8000)


def test_simulated_listeners_choose_in_turn_and_their_agreement_is_counted(model, tmp_path, capsys):
    ds = load_preferences(run_pairs(job(model, tmp_path, votes_per_pair=3, seed=2)))
    assert list(ds["listener"]) == [simulated_listeners(4, seed=2)[turn % 4].name for turn in range(12)]
    assert count_agreement(pair_votes(ds)).pairs <= 4
    assert "12 rows" in (told := capsys.readouterr().out)
    assert "chosen by 4 simulated listeners: nobody listened." in told


def test_two_generators_are_called_by_their_labels(model, tmp_path):
    ds = load_preferences(run_pairs(job(f"old={model}", tmp_path, against=f"new={model}")))
    assert {*ds["chosen_model"], *ds["rejected_model"]} == {"old", "new"}


def test_dpo_on_a_rewards_choices_says_who_chose(model, tmp_path):
    """One round of iterated DPO: pairs of the current model, labelled by a reward."""
    run_pairs(job(model, tmp_path, label_with=[f"{__name__}:steadiness"]))
    out = run_dpo(
        DPOJob(
            model=model,
            preferences=str(tmp_path / "pairs"),
            output_dir=str(tmp_path / "round1"),
            max_steps=1,
            per_device_train_batch_size=2,
        )
    )
    metrics = json.loads((out / "result.json").read_text())["metrics"]
    assert metrics["judged_by"] == {"listeners": 1, "simulated": 0, "rewards": 1}
    again = load_preferences(
        run_pairs(job(str(out), tmp_path, out=str(tmp_path / "pairs2"), label_with=[f"{__name__}:steadiness"], seed=1))
    )
    assert set(again["chosen_model"]) == {"round1"}


def test_a_run_that_was_cut_short_does_not_go_on_with_other_weights(tmp_path, monkeypatch):
    """Of a generator, or of the reward that chooses, under the same name."""

    def save(seed: int, reward_seed: int) -> None:
        generator = tiny_generator()
        generator.decoder.lm_heads[0].weight.data += seed  # with the codec that it had
        generator.save_pretrained(tmp_path / "model")
        PreferenceModel.from_generator(tiny_generator(seed=reward_seed)).save_pretrained(tmp_path / "reward")

    own = job(str(tmp_path / "model"), tmp_path, label_with=[f"preference:{tmp_path / 'reward'}"])
    save(0, 0)
    with monkeypatch.context() as patched:
        patched.setattr(pairs, "save_preferences", cut_short)
        with pytest.raises(OSError, match="full"):
            run_pairs(own)
    for seed, reward_seed in ((1, 0), (0, 1)):
        save(seed, reward_seed)
        with pytest.raises(ValueError, match="was begun with another weights:"):
            run_pairs(own)
    save(0, 0)
    assert load_preferences(run_pairs(own)).num_rows == 4


def cut_short(*_):
    raise OSError("the disk is full")


def test_wrong_jobs_are_refused(model, tmp_path):
    for change, message in (
        ({"votes_per_pair": 5}, "`votes_per_pair` is 5, but there are 4 `listeners`"),
        ({"votes_per_pair": 2, "label_with": ["quality"]}, "`label_with` .'quality'. is one judge"),
        ({"pairs_per_prompt": 0}, "`pairs_per_prompt` must be at least 1"),
        ({"duration_s": 31.0}, "`duration_s` must be in"),
        ({"against": f"model={model}"}, "is there twice"),
        ({"label_with": ["loudest"]}, "`reward` = 'loudest' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            run_pairs(job(model, tmp_path, **change))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter"):
        run_pairs(job(model, tmp_path, out=str(tmp_path / "taken")))
