import pytest
import torch

from musicrl_hf.evaluation import diversity
from musicrl_hf.evaluation.report import EvaluateJob
from musicrl_hf.rewards import load_reward, load_rewards, score_clips
from musicrl_hf.rewards.variety import variety
from musicrl_hf.training.reward import RewardJob

RATE = 16000


def tones(*semitones, seconds=0.5):
    """Clips of one pitch each, [B, 1, T]."""
    time = torch.arange(int(seconds * RATE)) / RATE
    return torch.stack([0.3 * torch.sin(2 * torch.pi * 440 * 2 ** (step / 12) * time) for step in semitones])[:, None]


def test_clips_are_set_against_the_others_of_their_prompt_alone():
    scores = variety(["a", "b", "a", "b", "a"], tones(0, 0, 0, 6, 6), RATE)
    assert scores.tolist() == pytest.approx([0.5, 1.0, 0.5, 1.0, 1.0], abs=0.02)
    assert scores.dtype == torch.float32


def test_an_octave_is_no_other_harmony_and_a_lone_clip_has_nothing_to_differ_from():
    assert variety(["a", "a", "b"], tones(0, 12, 5), RATE).tolist() == pytest.approx([0, 0, 0], abs=0.01)


def test_the_mean_of_a_group_is_the_distance_that_evaluations_measure():
    audio = 0.1 * torch.randn(5, 2, RATE, generator=torch.Generator().manual_seed(0))
    expected = diversity(audio, RATE)["harmony_distance"]
    assert variety(["a"] * 5, audio, RATE).mean().item() == pytest.approx(expected, abs=1e-6)


def test_silence_is_no_variety():
    audio = torch.cat([tones(0, 6), torch.zeros(1, 1, RATE // 2), 1e-5 * tones(0, 6)])
    assert variety(["a"] * 5, audio, RATE).tolist() == pytest.approx([0.25, 0.25, 0, 0, 0], abs=0.01)
    assert diversity(audio[2:], RATE)["harmony_distance"] == 0
    assert variety(["a"] * 2, 0.1 * tones(0, 6), RATE).min() > 0.9  # quiet is not silent


def test_it_is_a_reward_by_name():
    assert load_reward("variety") is variety
    both = load_rewards("2*variety + quality")
    assert both.weights == {"variety": 2.0, "quality": 1.0}
    with pytest.raises(ValueError, match="Known forms.*variety"):
        load_reward("variety:name of nothing")


def test_where_a_clip_is_alone_it_is_refused():
    with pytest.raises(ValueError, match="`reward` names variety, which compares the clips of a prompt"):
        score_clips("quality + 0.5*variety", "a slow air", ["tune.wav"])
    for job, name in (
        (lambda: RewardJob(preferences="votes", output_dir="out", baselines=["variety"]), "baselines"),
        (lambda: EvaluateJob(models=["a", "b"], prompts="prompts.txt", out="out", rewards=["variety"]), "rewards"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` names variety"):
            job()
