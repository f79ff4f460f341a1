"""How large a study has to be: exact counts against their definition, simulation against counts."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from musicrl_hf.cli import main
from musicrl_hf.evaluation.power import (
    PEOPLE_AGREE,
    PowerJob,
    agreement_spread,
    comparisons_needed,
    power_table,
    prompts_needed,
    simulated_power,
)
from musicrl_hf.evaluation.win_rates import win_rate
from musicrl_hf.preferences.schema import Vote


def exact_power(number: int, rate: float) -> float:
    """By definition: the probability of all outcomes that scipy's two-sided test calls significant."""
    return sum(
        math.comb(number, wins) * rate**wins * (1 - rate) ** (number - wins)
        for wins in range(number + 1)
        if binomtest(wins, number, 0.5).pvalue <= 0.05
    )


@pytest.mark.parametrize("rate", [0.7, 0.8, 0.13])
def test_comparisons_are_the_first_number_from_which_the_exact_test_has_its_power(rate):
    needed = comparisons_needed(rate)
    assert exact_power(needed - 1, rate) < 0.8
    assert all(exact_power(number, rate) >= 0.8 for number in range(needed, needed + 12))


def test_the_papers_question_55_against_50():
    assert comparisons_needed(0.55) == 820
    assert comparisons_needed(0.45) == 820


def test_two_simulated_listeners_agree_as_often_as_asked_for():
    rng = np.random.default_rng(0)
    heard = agreement_spread(0.75) * rng.standard_normal(200_000)
    first, second = (heard + rng.standard_normal(len(heard)) > 0 for _ in range(2))
    assert (first == second).mean() == pytest.approx(0.75, abs=0.005)


def test_simulation_agrees_with_counts_where_one_listener_hears_each_pair():
    reached = simulated_power(0.65, comparisons_needed(0.65), listeners=1)
    assert reached == pytest.approx(0.8, abs=0.08)  # three standard errors of 400 studies, and the saw tooth


def test_a_coin_is_rarely_called_something_else():
    assert simulated_power(0.5 + 1e-9, 120, listeners=3) < 0.1


def test_more_listeners_a_pair_need_fewer_pairs_and_more_votes():
    alone, three = (prompts_needed(0.65, listeners) for listeners in (1, 3))
    assert three < alone < 3 * three
    assert simulated_power(0.65, three, listeners=3, seed=1) == pytest.approx(0.8, abs=0.1)


@pytest.mark.parametrize("rate", [0.87, 0.95, 0.99])
def test_a_small_study_has_its_power_by_the_interval_that_a_comparison_gives(rate):
    """So few pairs are often all won, which alone is no proof."""
    size, studies, random = prompts_needed(rate, 3), 200, np.random.default_rng(3)
    spread, found = agreement_spread(PEOPLE_AGREE), 0
    for study in range(studies):
        shift = norm.ppf(rate) * math.sqrt(1 + spread**2)
        wins = random.binomial(3, norm.cdf(shift + spread * random.standard_normal(size)))
        votes = [Vote(str(i), "x", "y", "a" if j < wins[i] else "b") for i in range(size) for j in range(3)]
        result = win_rate(votes, "x", "y", n_bootstrap=200, seed=study)
        found += result.low > 0.5 or result.high < 0.5
    assert found / studies > 0.8 - 3 * math.sqrt(0.8 * 0.2 / studies)
    assert size >= 6
    assert all(simulated_power(rate, fewer, 3) < 0.8 for fewer in range(4, size))  # and not a pair more than it takes


@pytest.mark.parametrize("listeners", [1, 3, 10])
def test_the_surer_the_win_the_smaller_the_study(listeners):
    sizes = [prompts_needed(rate, listeners) for rate in (0.66, 0.8, 0.9, 0.99, 0.999)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 6  # the fewest of which all won are no coin's


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PowerJob(listeners=0), "`listeners` must be at least 1"),
        (lambda: comparisons_needed(0.5), "`win_rate` must lie in"),
        (lambda: comparisons_needed(0.5001), "nobody collects so many"),
        (lambda: prompts_needed(0.5001, 3), "nobody collects so many"),
        (lambda: comparisons_needed(0.6, 1.0), "`power` must lie in"),
        (lambda: agreement_spread(1.0), "`agreement` must lie in"),
        (lambda: simulated_power(0.6, 1, 3), "`prompts` must be at least 2"),
    ],
)
def test_what_is_out_of_range_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_command_prints_a_row_for_each_rate(capsys):
    assert main(["power", "--win_rates", "0.8", "0.9", "--listeners", "2"]) == 0
    printed = capsys.readouterr().out
    for row in power_table(PowerJob(win_rates=[0.8, 0.9], listeners=2)):
        assert f"{row['win_rate']:.0%}" in printed
        assert f"{row['votes']:,}" in printed
