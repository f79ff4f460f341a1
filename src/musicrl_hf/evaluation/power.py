"""How many comparisons a study needs before it can tell a win rate from a coin: from counts, and by simulation.

Counts: an exact two-sided binomial test on comparisons that are independent of each other, one a prompt. Simulation: several
listeners hear each pair. They agree with each other, so their votes on a pair are worth less than as many on different
pairs; the test is the package's own interval, which resamples prompts (`win_rates.win_rate`).
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import binom, norm
from tqdm.auto import tqdm

from .win_rates import CONFIDENCE, exact_bound

PEOPLE_AGREE = 0.75  # of two listeners on public music pairs
MOST = 2_000_000  # comparisons; a win rate that needs more is not told apart from a coin
STUDIES = 400  # simulated ones for each size that is tried
RESAMPLES = 200  # of the prompts in each of them
FEW = 40  # prompts; where so many or fewer should do, each number is tried


def comparisons_needed(win_rate: float, power: float = 0.8) -> int:
    """Decided comparisons, each of another pair, after which a binomial test against 1/2 is as likely as `power` to reject.

    From that number on it stays so: the exact test's power is a saw tooth.

    Args:
        win_rate: wins / (wins + losses), other than 1/2.
        power: probability, in (0, 1).

    Raises:
        ValueError: a value out of range; more than 2,000,000 comparisons.

    Example:
        >>> comparisons_needed(0.55)
        820
    """
    _check(win_rate, power)
    rate = max(win_rate, 1 - win_rate)
    z = norm.ppf(0.5 + CONFIDENCE / 2) / 2 + norm.ppf(power) * math.sqrt(rate * (1 - rate))
    about = (z / (rate - 0.5)) ** 2
    if about > MOST:
        raise ValueError(
            f"`win_rate` = {win_rate!r} needs about {about:.0f} comparisons: nobody collects so many. Give one further from 0.5, such as 0.55."
        )
    numbers = np.arange(1, math.ceil(1.5 * about) + 60)
    most_losses = binom.ppf((1 - CONFIDENCE) / 2, numbers, 0.5) - 1  # so few are still surprising for a coin
    reaches = (
        binom.cdf(most_losses, numbers, 1 - rate) + binom.sf(numbers - most_losses - 1, numbers, 1 - rate) >= power
    )
    return int(numbers[np.flatnonzero(~reaches)[-1] + 1]) if not reaches.all() else 1


def agreement_spread(agreement: float) -> float:
    """Spread of the pairs, in units of one listener's noise, at which two listeners agree on a share of pairs.

    Where a listener's choice is the sign of (what both hear in the pair + own noise), both normal, two of them agree with
    probability 1/2 + arcsin(rho) / pi, rho being the part of the variance that they share.

    Raises:
        ValueError: no agreement between chance and certainty.
    """
    if not 0.5 <= agreement < 1:
        raise ValueError(f"`agreement` must lie in [0.5, 1), chance to certainty, got {agreement!r}.")
    shared = math.sin(math.pi * (agreement - 0.5))
    return math.sqrt(shared / (1 - shared))


def simulated_power(
    win_rate: float,
    prompts: int,
    listeners: int,
    agreement: float = PEOPLE_AGREE,
    studies: int = STUDIES,
    seed: int = 0,
) -> float:
    """Share of simulated studies whose 95 % interval over prompts leaves out 1/2.

    Args:
        win_rate: the true one.
        prompts: pairs, each of another prompt.
        listeners: who choose between each pair; nobody calls a tie.
        agreement: of two listeners on pairs of equally good systems, in [.5, 1).
    """
    _check(win_rate, 0.5)
    if prompts < 2 or listeners < 1:
        raise ValueError(f"`prompts` must be at least 2 and `listeners` at least 1, got {prompts!r} and {listeners!r}.")
    spread, rng = agreement_spread(agreement), np.random.default_rng(seed)
    shift = norm.ppf(win_rate) * math.sqrt(1 + spread**2)
    tail = 100 * (1 - CONFIDENCE) / 2
    found = 0
    for _ in range(studies):
        chance = norm.cdf(shift + spread * rng.standard_normal(prompts))
        shares = rng.binomial(listeners, chance) / listeners
        if shares.min() == 1 or shares.max() == 0:  # `win_rate` takes an exact bound there
            found += bool(exact_bound(prompts) > 0.5)
            continue
        weights = rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
        low, high = np.percentile(weights @ shares / prompts, [tail, 100 - tail])
        found += bool(low > 0.5 or high < 0.5)
    return found / studies


def prompts_needed(
    win_rate: float, listeners: int, power: float = 0.8, agreement: float = PEOPLE_AGREE, seed: int = 0
) -> int:
    """Prompts whose pairs `listeners` hear each, for which `simulated_power` comes to `power`; within about a tenth.

    The number that follows from the variance of a prompt's share is corrected by the power that a simulation finds there. Where
    that is a few dozen, each number is tried, from 4 on: so few may all be won, and the power does not follow from the variance.
    """
    _check(win_rate, power)
    spread = agreement_spread(agreement)
    shift = norm.ppf(win_rate) * math.sqrt(1 + spread**2)
    chance = norm.cdf(shift + spread * np.random.default_rng(seed).standard_normal(200_000))
    variance = chance.var() + (chance * (1 - chance)).mean() / listeners
    wanted = norm.ppf(0.5 + CONFIDENCE / 2) + norm.ppf(power)
    about = variance * (wanted / (win_rate - 0.5)) ** 2
    if about * listeners > MOST:
        raise ValueError(
            f"`win_rate` = {win_rate!r} needs about {about:.0f} prompts: nobody collects so many. Give one further from 0.5, such as 0.55."
        )
    if about < FEW:
        size = 4
        while simulated_power(win_rate, size, listeners, agreement, seed=seed) < power:
            size += 1
        return size
    size = round(about)
    reached = simulated_power(win_rate, size, listeners, agreement, seed=seed)
    reached = min(max(reached, 0.5 / STUDIES), 1 - 0.5 / STUDIES)
    corrected = wanted / (norm.ppf(0.5 + CONFIDENCE / 2) + norm.ppf(reached))
    return round(size * min(max(corrected, 0.7), 1.5) ** 2)


@dataclass(kw_only=True)
class PowerJob:
    """Which win rates a table of study sizes is for."""

    win_rates: list[float] = field(
        default_factory=lambda: [0.55, 0.6, 0.66, 0.74, 0.87],
        metadata={"help": "true win rates, each other than 0.5"},
    )
    listeners: int = field(default=3, metadata={"help": "listeners who hear each pair (the paper: 3)"})
    agreement: float = field(
        default=PEOPLE_AGREE,
        metadata={"help": "how often two listeners choose alike between equally good systems, in [.5, 1)"},
    )
    power: float = field(
        default=0.8, metadata={"help": "probability with which the study is to tell the win rate from a coin"}
    )
    seed: int = field(default=0, metadata={"help": "of the simulated studies"})

    def __post_init__(self) -> None:
        if self.listeners < 1:
            raise ValueError(f"`listeners` must be at least 1, got {self.listeners!r}.")


def run_power(job: PowerJob) -> None:
    """Print how large a study has to be for each win rate: the rows of `power_table`."""
    rows = power_table(job)
    print(
        f"To tell a win rate from a coin with probability {job.power:g}, at 95 % confidence; ties come on top.\n"
        f"{'win rate':>10}{'pairs, heard once':>27}{f'pairs, heard by {job.listeners}':>27}{'votes':>9}"
    )
    for row in rows:
        print(f"{row['win_rate']:>10.0%}{row['comparisons']:>27,}{row['prompts']:>27,}{row['votes']:>9,}")
    print(
        f"First by an exact binomial test, then by simulated studies of listeners who agree on {job.agreement:.0%} of equal pairs, "
        "with a bootstrap over prompts: two tests, which differ a little where one listener hears each pair. Nobody listened."
    )


def power_table(job: PowerJob) -> list[dict[str, Any]]:
    """A row a win rate: `win_rate`, `comparisons` by counts, `prompts` by simulation, and `votes` = prompts x listeners."""
    rows = []
    for rate in tqdm(job.win_rates, desc="simulated studies", leave=False):
        prompts = prompts_needed(rate, job.listeners, job.power, job.agreement, job.seed)
        counted = comparisons_needed(rate, job.power)
        rows.append({"win_rate": rate, "comparisons": counted, "prompts": prompts, "votes": prompts * job.listeners})
    return rows


def _check(win_rate: float, power: float) -> None:
    if not 0 < win_rate < 1 or win_rate == 0.5:
        raise ValueError(
            f"`win_rate` must lie in (0, 1), so 0.6 and not 60, and differ from 0.5, which is a coin's; got {win_rate!r}."
        )
    if not 0 < power < 1:
        raise ValueError(f"`power` must lie in (0, 1), got {power!r}.")
