"""Counts, intervals and rankings, against values that are worked out here by hand or by a slow twin."""

import math

import numpy as np
import pytest
from scipy.stats import wilcoxon

from musicrl_hf.evaluation.win_rates import (
    Rating,
    as_json,
    bradley_terry,
    can_be_ranked,
    mean_opinion_scores,
    mean_with_interval,
    models_of,
    votes_from_scores,
    wilcoxon_signed_rank,
    win_rate,
    win_rate_matrix,
)
from musicrl_hf.preferences.schema import Vote


def votes_of(*counts):
    """(a, b, wins of a, ties, wins of b) -> votes, each on a prompt of its own and with the sides taking turns."""
    votes = []
    for a, b, *numbers in counts:
        for label, number in zip(("a", "tie", "b"), numbers, strict=True):
            for _ in range(number):
                swapped = len(votes) % 2
                shown = {"a": "b", "b": "a"}.get(label, label) if swapped else label
                votes.append(Vote(f"p{len(votes)}", *((b, a) if swapped else (a, b)), shown))
    return votes


def test_win_rate_is_wins_over_decided():
    votes = votes_of(("r", "base", 6, 3, 2), ("r", "u", 1, 0, 4))
    rate = win_rate(votes, "r", "base")
    assert (rate.wins, rate.ties, rate.losses, rate.prompts) == (6, 3, 2, 11)
    assert rate.win_rate == pytest.approx(6 / 8)
    assert win_rate(votes, "base", "r").win_rate == pytest.approx(2 / 8)
    assert win_rate(votes, "r").win_rate == pytest.approx(7 / 13)
    assert win_rate([*votes, Vote("q", "r", "base", "both_bad")], "r", "base").ties == 4
    with pytest.raises(ValueError, match="no vote compares 'u' with 'base'"):
        win_rate(votes, "u", "base")


def test_the_paper_s_table_gives_the_paper_s_win_rates():
    """MusicRL's 303 ratings a pair: R - MusicLM 65.0 / 22.1 / 12.9 % is 83 %, RU - R 42.6 / 35.6 / 21.8 % is 66 %."""
    votes = votes_of(("r", "musiclm", 197, 67, 39), ("ru", "r", 129, 108, 66))
    assert round(100 * win_rate(votes, "r", "musiclm").win_rate) == 83
    assert round(100 * win_rate(votes, "ru", "r").win_rate) == 66


def test_only_ties_have_no_win_rate():
    rate = win_rate(votes_of(("x", "y", 0, 3, 0)), "x", "y")
    assert math.isnan(rate.win_rate)
    assert as_json(rate)["win_rate"] is None
    assert as_json(rate)["low"] is None


def test_the_interval_resamples_prompts_and_not_votes():
    """Ten votes on one prompt are one observation: two prompts that disagree leave everything open."""
    two_prompts = [Vote("p", "x", "y", "a")] * 50 + [Vote("q", "x", "y", "b")] * 50
    rate = win_rate(two_prompts, "x", "y")
    assert (rate.low, rate.high) == (0.0, 1.0)
    hundred_prompts = votes_of(("x", "y", 50, 0, 50))
    rate = win_rate(hundred_prompts, "x", "y")
    # Binomial: 0.5 +- 1.96 * 0.05
    assert rate.low == pytest.approx(0.402, abs=0.02)
    assert rate.high == pytest.approx(0.598, abs=0.02)


def test_spellings_of_a_prompt_are_one_prompt():
    votes = [
        Vote(prompt, "x", "y", label) for prompt in ("A reel", "a reel", "a reel.", "an air") for label in ("a", "b")
    ]
    assert win_rate(votes, "x", "y").prompts == 2
    ratings = [Rating(prompt, model, 3.0 + (model == "x"), "l") for prompt in ("A reel", "a reel.") for model in "xy"]
    assert wilcoxon_signed_rank(ratings, "x", "y") == wilcoxon_signed_rank(ratings[:2], "x", "y")


def test_winning_everything_is_not_certainty():
    """Three wins of three: p**3 = 0.025 at the lower end of the exact interval."""
    rate = win_rate(votes_of(("x", "y", 3, 2, 0)), "x", "y")
    assert (rate.low, rate.high) == (pytest.approx(0.025 ** (1 / 3)), 1.0)
    lost = win_rate(votes_of(("x", "y", 3, 2, 0)), "y", "x")
    assert (lost.low, lost.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 3)))
    one_prompt = win_rate([Vote("p", "x", "y", "a")] * 30, "x", "y")
    assert one_prompt.low == pytest.approx(0.025), "thirty votes on one prompt are one trial"


def test_one_decided_prompt_tells_nothing():
    """It would be in every resample that has a share at all, which would look like certainty."""
    votes = [Vote(f"p{i}", "x", "y", "tie") for i in range(30)] + [Vote("q", "x", "y", choice) for choice in "aab"]
    found = win_rate(votes, "x", "y")
    assert (found.low, found.high) == (0.0, 1.0)
    assert found.win_rate == pytest.approx(2 / 3)
    several = win_rate([*votes, *(Vote("r", "x", "y", choice) for choice in "abb")], "x", "y")
    assert 0 < several.low < several.high < 1


def test_matrix_holds_every_pair_that_met_both_ways():
    votes = votes_of(("x", "y", 3, 0, 1), ("y", "z", 1, 0, 1))
    cells = {(rate.model, rate.against): rate.win_rate for rate in win_rate_matrix(votes)}
    assert cells == {("x", "y"): 0.75, ("y", "x"): 0.25, ("y", "z"): 0.5, ("z", "y"): 0.5}
    assert models_of(votes) == ["x", "y", "z"]


def test_bradley_terry_of_two_models_is_the_log_odds():
    ranking = bradley_terry(votes_of(("x", "y", 6, 4, 0)))
    # 6 wins and 4 ties at a half each: 8 to 2, so the strengths are log(4) apart and sum to 0.
    assert [entry.model for entry in ranking] == ["x", "y"]
    assert ranking[0].strength == pytest.approx(math.log(4) / 2)
    assert ranking[1].strength == pytest.approx(-math.log(4) / 2)


def test_bradley_terry_equals_the_textbook_iteration():
    """Against Zermelo's fixed point p_i = W_i / sum_j n_ij / (p_i + p_j), iterated to the end."""
    votes = votes_of(
        ("a", "b", 7, 2, 3), ("b", "c", 5, 1, 4), ("a", "c", 2, 0, 6), ("c", "d", 9, 3, 1), ("a", "d", 3, 1, 1)
    )
    names = models_of(votes)
    wins = dict.fromkeys(((i, j) for i in names for j in names), 0.0)
    for vote in votes:
        points = {"a": 1.0, "b": 0.0, "tie": 0.5}[vote.preference]
        wins[vote.model_a, vote.model_b] += points
        wins[vote.model_b, vote.model_a] += 1 - points
    strength = dict.fromkeys(names, 1.0)
    for _ in range(5000):
        strength = {
            i: sum(wins[i, j] for j in names)
            / sum((wins[i, j] + wins[j, i]) / (strength[i] + strength[j]) for j in names if j != i)
            for i in names
        }
    logs = {name: math.log(value) for name, value in strength.items()}
    centre = sum(logs.values()) / len(logs)
    ranking = bradley_terry(votes)
    assert {e.model: e.strength for e in ranking} == pytest.approx({n: v - centre for n, v in logs.items()}, abs=1e-6)
    assert [e.model for e in ranking] == sorted(names, key=lambda name: -logs[name])
    assert all(entry.low < entry.strength < entry.high for entry in ranking)


def test_a_model_that_never_lost_has_no_finite_strength():
    votes = votes_of(("x", "y", 3, 0, 0))
    assert not can_be_ranked(votes)
    with pytest.raises(ValueError, match="x, y cannot be ranked"):
        bradley_terry(votes)
    with pytest.raises(ValueError, match="votes is empty"):
        bradley_terry([])
    apart = votes_of(("x", "y", 1, 0, 1), ("v", "w", 1, 0, 1))  # two groups that never met
    assert not can_be_ranked(apart)


def test_wilcoxon_on_prompt_means():
    """Six prompts, all better by different amounts: both tails of the exact test hold 2 / 2**6."""
    ratings = []
    for i in range(6):
        ratings += [Rating(f"p{i}", "x", 3 + i / 10, "l1"), Rating(f"p{i}", "x", 3 + i / 10, "l2")]
        ratings += [Rating(f"p{i}", "y", 2 - i / 10, "l1")]
    p, prompts = wilcoxon_signed_rank(ratings, "x", "y")
    assert prompts == 6
    assert p == pytest.approx(2 / 2**6)
    assert wilcoxon_signed_rank(ratings, "x", "x") == (1.0, 6)
    with pytest.raises(ValueError, match="no common prompt"):
        wilcoxon_signed_rank([*ratings, Rating("q", "z", 1)], "x", "z")


def test_wilcoxon_ranks_equal_differences_alike():
    """Means of three ratings, 1/3 apart, differ in their last bit; all ratings raised by one change no difference."""
    random = np.random.default_rng(0)
    before = random.integers(1, 4, (24, 3))
    after = np.clip(before + random.integers(-1, 3, (24, 3)), 1, 4)

    def ratings(raised):
        tables = {"x": before + raised, "y": after + raised}
        return [Rating(str(p), name, float(r)) for name, table in tables.items() for p in range(24) for r in table[p]]

    exact = wilcoxon(before.sum(1) - after.sum(1)).pvalue
    found = [wilcoxon_signed_rank(ratings(raised), "x", "y")[0] for raised in (0, 1)]
    assert found == pytest.approx([exact, exact], rel=1e-12)
    assert 0 < exact < 1


def test_opinion_scores_average_ratings_and_resample_prompts():
    ratings = [Rating("p", "x", 5), Rating("p", "x", 4), Rating("q", "x", 3), Rating("p", "y", 2)]
    best, last = mean_opinion_scores(ratings)
    assert (best.model, best.mean, best.count) == ("x", 4.0, 3)
    assert (best.low, best.high) == (3.0, 4.5)  # only p: 4.5; only q: 3
    assert (last.mean, last.low, last.high) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="score is 6"):
        Rating("p", "x", 6)
    with pytest.raises(ValueError, match="ratings is empty"):
        mean_opinion_scores([])
    with pytest.raises(ValueError, match="values of 'x' is empty"):
        mean_with_interval("x", [])


def test_interval_of_a_mean_equals_a_plain_bootstrap():
    rng = np.random.default_rng(3)
    values = [(f"p{i}", float(v)) for i, v in enumerate(rng.normal(size=60))]
    got = mean_with_interval("x", values)
    numbers = np.array([v for _, v in values])
    plain = [rng.choice(numbers, len(numbers)).mean() for _ in range(4000)]
    assert got.low == pytest.approx(np.quantile(plain, 0.025), abs=0.04)
    assert got.high == pytest.approx(np.quantile(plain, 0.975), abs=0.04)


def test_scores_become_comparisons_of_one_listener_on_one_prompt():
    scores = {
        "x": [("p", "l1", 4.0), ("p", "l2", 3.0), ("q", "l1", 1.0)],
        "y": [("p", "l1", 2.0), ("p", "l2", 3.0), ("r", "l1", 5.0)],
    }
    assert votes_from_scores(scores) == [Vote("p", "x", "y", "a", "l1"), Vote("p", "x", "y", "tie", "l2")]


def test_a_vote_is_between_two_systems():
    with pytest.raises(ValueError, match="both 'x'"):
        Vote("p", "x", "x", "a")
    with pytest.raises(ValueError, match="preference is 'A'"):
        Vote("p", "x", "y", "A")
