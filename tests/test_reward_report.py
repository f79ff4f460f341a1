"""The report of a preference reward: sums worked out by hand, and exact intervals against scipy and a slow twin."""

import math
from itertools import product

import pytest
import torch
from scipy.stats import binom

from musicrl_hf.audio import audio_bytes
from musicrl_hf.preferences.agreement import PairVote
from musicrl_hf.preferences.listeners import simulated_listeners
from musicrl_hf.preferences.schema import preferences_from_rows
from musicrl_hf.training.reward_report import (
    accuracy_line,
    accuracy_report,
    baseline_margins,
    calibration,
    coin_interval,
    report_text,
)


def one_vote_a_pair(count: int) -> list[PairVote]:
    return [PairVote((f"p{i}",), "clip", "3fa5") for i in range(count)]


def margin(probability: float) -> float:
    """The margin whose sigmoid is this."""
    return math.log(probability / (1 - probability))


def test_accuracy_report_by_hand():
    margins = torch.tensor([1.0, -1.0, 0.0, 2.0])
    report = accuracy_report(margins, [("a", "b"), ("b", "a"), ("a", "c"), ("c", "a")], one_vote_a_pair(4))
    assert report["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert (report["n_votes"], report["n_pairs"]) == (4, 4)
    assert report["by_models"] == {
        "a / b": {"accuracy": 0.5, "n_votes": 2},
        "a / c": {"accuracy": 0.75, "n_votes": 2},
    }
    by_hand = sum(math.log(1 + math.exp(-m)) for m in margins.tolist()) / 4
    assert report["log_loss"] == pytest.approx(by_hand, abs=1e-6)
    # 100 coins: 40 to 60 heads hold at least 95 % of the probability.
    hundred = accuracy_report(torch.tensor([1.0] * 70 + [-1.0] * 30), [("a", "b")] * 100, one_vote_a_pair(100))
    assert hundred["chance_interval"] == [0.4, 0.6]
    assert accuracy_line(hundred) == (
        "Accuracy on 100 held-out pairs: 70.0% (in 95 % of cases a coin gets between 40.0% and 60.0% of them right)"
    )


def test_calibration_error_by_hand():
    # Eight votes in three of the ten bins: four in (0.60, 0.65], two in (0.90, 0.95], and equal scores, 0.5, in the first.
    probabilities = [0.62, 0.64, 0.64, 0.62, 0.91, 0.93, 0.5, 0.5]
    signs = [1, 1, -1, 1, 1, -1, 1, 1]
    found = calibration(torch.tensor([s * margin(p) for s, p in zip(signs, probabilities)], dtype=torch.float64))
    # (0.60, 0.65]: 3 of 4 right, mean 0.63; (0.90, 0.95]: 1 of 2, mean 0.92; [0.50, 0.55]: equal scores, half of 2, mean 0.5.
    assert found["bins"] == {
        "above": [0.5, 0.6, 0.9],
        "n_votes": [2, 4, 2],
        "probability": [0.5, 0.63, 0.92],
        "accuracy": [0.5, 0.75, 0.5],
    }
    assert found["ece"] == pytest.approx(4 / 8 * (0.75 - 0.63) + 2 / 8 * (0.92 - 0.5) + 2 / 8 * 0)


def test_a_bin_has_its_upper_edge_and_not_its_lower():
    # 0.75 is an edge: it belongs to (0.70, 0.75].
    found = calibration(torch.tensor([margin(0.75)], dtype=torch.float64))
    assert found["bins"]["above"] == [0.7]
    assert calibration(torch.tensor([50.0]))["bins"]["above"] == [0.95], "1 is in the last"
    assert calibration(torch.tensor([0.0]))["bins"]["above"] == [0.5]


def test_error_of_a_calibrated_model_is_its_mean_over_all_outcomes():
    probabilities = [0.62, 0.64, 0.61, 0.91, 0.93]

    def error(signs):
        return calibration(torch.tensor([s * margin(p) for s, p in zip(signs, probabilities)], dtype=torch.float64))[
            "ece"
        ]

    mean = sum(
        error(signs) * math.prod(p if s > 0 else 1 - p for s, p in zip(signs, probabilities))
        for signs in product((1, -1), repeat=5)
    )
    found = calibration(torch.tensor([margin(p) for p in probabilities], dtype=torch.float64))
    assert found["ece_if_calibrated"] == pytest.approx(mean)
    assert calibration(torch.ones(2), independent=False)["ece_if_calibrated"] is None


def test_a_coin_is_tossed_once_a_pair():
    for count in (1, 2, 7, 100, 179):
        assert coin_interval([(1, 0)] * count) == tuple(binom.interval(0.95, count, 0.5))
    # Three listeners agreed on each of four pairs: 3 times what four coins get. One on whom they were divided, 2 to 1.
    assert coin_interval([(3, 0)] * 4) == tuple(3 * n for n in binom.interval(0.95, 4, 0.5))
    counts = [(2, 1), (3, 0), (1, 0)]
    outcomes = sorted(sum(pair) for pair in product(*counts))
    low, high = coin_interval(counts)
    assert (low, high) == (outcomes[0], outcomes[-1]), "of eight outcomes each has more than 2.5 %"


def test_several_listeners_of_a_pair_are_counted_as_what_they_are():
    people, rule = ("3fa5", "77b0"), simulated_listeners(1)[0].name
    choices = [
        ("p", "x", people[0]),
        ("p", "x", people[1]),
        ("p", "y", rule),
        ("q", "x", people[0]),
        ("q", "x", "reward:quality"),
    ]
    votes = [PairVote((pair,), clip, who) for pair, clip, who in choices]
    report = accuracy_report(torch.tensor([1.0, 1.0, -1.0, 2.0, 2.0]), [("a", "b")] * 5, votes)
    # p: of three comparisons the people's agrees; q: a person and a reward agree.
    assert report["judged_by"] == {
        "listeners": 4,
        "simulated": 1,
        "rewards": 1,
        "agreement": 2 / 4,
        "shared_pairs": 2,
        "comparisons": 4,
    }
    assert (report["n_votes"], report["n_pairs"]) == (5, 2)
    # The coins of p and q: 2 or 1 right votes, and 2 or 0.
    assert report["chance_interval"] == [1 / 5, 4 / 5]
    assert report["calibration"]["ece_if_calibrated"] is None
    text = report_text(report)
    assert "Accuracy on 5 votes on 2 held-out pairs: 80.0%" in text
    assert "Two listeners agree on 50.0% (of 4 comparisons on 2 pairs that several of them decided)" in text


def test_baselines_score_each_clip_once_for_its_prompt():
    clips = [audio_bytes(torch.full((1, 800), level), 8000) for level in (0.1, 0.2, 0.3)]
    row = {
        "preference": "a",
        "chosen_model": "x",
        "rejected_model": "y",
        "source": "test",
        "created_at": "2026-01-01T00:00:00+00:00",
    }
    pairs = [("p", 0, 1, "3fa5"), ("p", 1, 0, "77b0"), ("p", 2, 1, "3fa5"), ("q", 0, 1, "3fa5")]
    ds = preferences_from_rows(
        row | {"prompt": prompt, "chosen": clips[one], "rejected": clips[other], "listener": who}
        for prompt, one, other, who in pairs
    )
    asked = []

    def level(prompts, audio, sampling_rate):
        asked.append(prompts[0])
        assert audio.shape == (1, 1, 400), "0.05 s of 8000 Hz"
        return 10 * audio.mean((1, 2))

    assert baseline_margins(level, ds, 0.05, "level").tolist() == pytest.approx([-1, 1, 1, -1], abs=1e-2)
    assert sorted(asked) == ["p", "p", "p", "q", "q"]
    with pytest.raises(ValueError, match="Reward `level` returned NaN"):
        baseline_margins(lambda prompts, audio, rate: torch.full((1,), torch.nan), ds, 1.0, "level")
