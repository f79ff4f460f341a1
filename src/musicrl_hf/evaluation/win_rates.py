"""Who is preferred to whom, and how sure that is: win rates, opinion scores and rankings.

The study's rules are those of MusicRL (arXiv 2402.04229, sections 4.3 and 5.2): a win rate is wins / (wins + losses),
without a majority vote. The paper gives no intervals; here they come from a bootstrap over *prompts*, since votes on
one prompt are not independent of each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats import wilcoxon

from ..preferences.schema import Vote, normalise_prompt

CONFIDENCE = 0.95
N_BOOTSTRAP = 2000
_prompt = lru_cache(2**16)(normalise_prompt)  # two spellings are one prompt, also where votes are drawn anew


@dataclass(frozen=True)
class WinRate:
    """How `model` did against `against`. `win_rate`, `low` and `high` are NaN where nobody won or lost."""

    model: str
    against: str
    wins: int
    ties: int  # tie and both_bad
    losses: int
    prompts: int
    win_rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Rating:
    """One listener's rating of one model's clip for one prompt, 1 (bad) to 5 (excellent)."""

    prompt: str
    model: str
    score: float
    listener: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.score <= 5:
            raise ValueError(f"score is {self.score}: a rating lies between 1 and 5")


@dataclass(frozen=True)
class MeanScore:
    """A mean over prompts and listeners with its interval."""

    model: str
    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class Strength:
    """A model's place in a Bradley-Terry ranking.

    `strength` is in log-odds and sums to 0 over the models: model i beats j with probability
    sigmoid(strength_i - strength_j). `resamples` counts the bootstrap tables that could be ranked.
    """

    model: str
    strength: float
    low: float
    high: float
    resamples: int


def as_json(entry: WinRate | MeanScore | Strength) -> dict[str, Any]:
    """The fields of an entry, with null for NaN, which JSON does not have."""
    return {name: None if value != value else value for name, value in asdict(entry).items()}


def models_of(votes: Iterable[Vote]) -> list[str]:
    """Names of all models in the votes, sorted."""
    return sorted({name for vote in votes for name in (vote.model_a, vote.model_b)})


def win_rate(
    votes: Sequence[Vote], model: str, against: str | None = None, n_bootstrap: int = N_BOOTSTRAP, seed: int = 0
) -> WinRate:
    """Wins / (wins + losses) of `model` against one other model, or against all (None).

    Args:
        votes: any votes; those without `model` (or `against`) are not counted.
        n_bootstrap: resamples of the prompts for the 95 % percentile interval. Where one side won everything the
            interval is Clopper and Pearson's, with the prompts as trials; where one prompt alone was decided, all of [0, 1].

    Raises:
        ValueError: if no vote is about them.

    Example:
        >>> votes = [Vote("p", "x", "y", "a"), Vote("q", "x", "y", "tie"), Vote("r", "y", "x", "b")]
        >>> win_rate(votes, "x", "y").win_rate
        1.0
    """
    by_prompt: dict[str, list[int]] = {}
    for vote in votes:
        other = _other(vote, model)
        if other is None or against not in (None, other):
            continue
        counts = by_prompt.setdefault(_prompt(vote.prompt), [0, 0, 0])
        counts[_outcome(vote, model)] += 1
    if not by_prompt:
        raise ValueError(
            f"no vote compares {model!r} with {against or 'another model'!r}: {models_of(votes)} have votes"
        )
    table = np.array(list(by_prompt.values()), dtype=float)
    wins, ties, losses = table.sum(axis=0)
    resampled = _resample_counts(len(table), n_bootstrap, seed) @ table
    low, high = _interval(_share(resampled[:, 0], resampled[:, 2]))
    rate, decided = float(_share(wins, losses)), int(np.count_nonzero(table[:, 0] + table[:, 2]))
    if rate in (0.0, 1.0):
        # Every resample agrees, which would look like certainty: the exact binomial bound for so many decided prompts.
        bound = exact_bound(decided)
        low, high = (bound, 1.0) if rate == 1 else (0.0, 1 - bound)
    elif decided == 1:  # so would they here
        low, high = 0.0, 1.0
    return WinRate(model, against or "all", int(wins), int(ties), int(losses), len(table), rate, low, high)


def exact_bound(trials: int) -> float:
    """Lower end of Clopper and Pearson's interval where all trials were won; one minus it is the upper end where all were lost."""
    return ((1 - CONFIDENCE) / 2) ** (1 / trials)


def win_rate_matrix(votes: Sequence[Vote], models: Sequence[str] | None = None, **kwargs: Any) -> list[WinRate]:
    """The win rate of every model against every other that it met; `kwargs` as for `win_rate`."""
    names = list(models) if models is not None else models_of(votes)
    met = {frozenset((vote.model_a, vote.model_b)) for vote in votes}
    return [win_rate(votes, a, b, **kwargs) for a in names for b in names if a != b and frozenset((a, b)) in met]


def wilcoxon_signed_rank(ratings: Sequence[Rating], model_a: str, model_b: str) -> tuple[float, int]:
    """Two-sided Wilcoxon signed rank test on the prompts' mean ratings of two models.

    Ratings of one prompt are averaged first: the test takes its pairs for independent, and prompts are, listeners of
    one prompt are not.

    Returns:
        the p value (1.0 where no prompt differs) and the number of prompts that both models were rated on.

    Raises:
        ValueError: if they share no rated prompt.
    """
    means = {model: _prompt_means(ratings, model) for model in (model_a, model_b)}
    shared = sorted(set(means[model_a]) & set(means[model_b]))
    if not shared:
        raise ValueError(f"{model_a!r} and {model_b!r} were rated on no common prompt")
    # Rounded: a third of one sum of ratings is not to the last bit a third of another, and equal differences have one rank.
    difference = np.round([means[model_a][prompt] - means[model_b][prompt] for prompt in shared], 9)
    if not np.any(difference):
        return 1.0, len(shared)
    return float(wilcoxon(difference).pvalue), len(shared)


def mean_with_interval(
    model: str, values: Sequence[tuple[str, float]], n_bootstrap: int = N_BOOTSTRAP, seed: int = 0
) -> MeanScore:
    """Mean of (prompt, value) pairs with a 95 % percentile interval from resampled prompts."""
    sums: dict[str, list[float]] = {}
    for prompt, value in values:
        entry = sums.setdefault(prompt, [0.0, 0.0])
        entry[0] += value
        entry[1] += 1
    if not sums:
        raise ValueError(f"values of {model!r} is empty: nothing to average")
    table = np.array(list(sums.values()))
    resampled = _resample_counts(len(table), n_bootstrap, seed) @ table
    low, high = _interval(resampled[:, 0] / resampled[:, 1])
    total, count = table.sum(axis=0)
    return MeanScore(model, float(total / count), low, high, int(count))


def mean_opinion_scores(ratings: Sequence[Rating], n_bootstrap: int = N_BOOTSTRAP, seed: int = 0) -> list[MeanScore]:
    """Mean opinion score of each model over all its ratings, with a 95 % interval over prompts, best first."""
    if not ratings:
        raise ValueError("ratings is empty: nothing to average")
    by_model: dict[str, list[tuple[str, float]]] = {}
    for rating in ratings:
        by_model.setdefault(rating.model, []).append((_prompt(rating.prompt), rating.score))
    scores = [mean_with_interval(model, values, n_bootstrap, seed) for model, values in by_model.items()]
    return sorted(scores, key=lambda score: (-score.mean, score.model))


def votes_from_scores(scores: Mapping[str, Sequence[tuple[str, str, float]]]) -> list[Vote]:
    """Side by side comparisons from scores: for each prompt and listener the higher of two models' scores wins.

    Args:
        scores: model -> (prompt, listener, score) of its clips.
    """
    tables = {model: {(prompt, who): score for prompt, who, score in rows} for model, rows in scores.items()}
    votes = []
    for a, b in combinations(tables, 2):
        for key, score in tables[a].items():
            if key in tables[b]:
                gap = score - tables[b][key]
                votes.append(Vote(key[0], a, b, "tie" if gap == 0 else "a" if gap > 0 else "b", key[1]))
    return votes


def can_be_ranked(votes: Sequence[Vote]) -> bool:
    """Whether a Bradley-Terry ranking exists: each model reaches each other by a chain of wins or ties (Ford, 1957)."""
    return bool(_strongly_connected(_win_table(votes, models_of(votes))))


def bradley_terry(votes: Sequence[Vote], n_bootstrap: int = 500, seed: int = 0) -> list[Strength]:
    """Maximum likelihood Bradley-Terry strengths, best first, with 95 % intervals over prompts.

    P(i beats j) = sigmoid(s_i - s_j) (Bradley and Terry, 1952); a tie or both_bad counts as half a win for each.

    Raises:
        ValueError: if there are no votes, or a group of models never lost (or never won) against the rest, whose
            strength would be infinite.
    """
    names = models_of(votes)
    if not names:
        raise ValueError("votes is empty: nothing to rank")
    if not can_be_ranked(votes):
        raise ValueError(
            f"{', '.join(names)} cannot be ranked: some of them never lost, or never met the others, so that their "
            "strengths would be infinite; collect more votes or leave them out"
        )
    estimate = _newton(_win_table(votes, names)[None])[0]
    prompts = sorted({_prompt(vote.prompt) for vote in votes})
    index = {prompt: i for i, prompt in enumerate(prompts)}
    cells = np.zeros((len(prompts), len(names) ** 2))
    for vote in votes:
        cells[index[_prompt(vote.prompt)]] += _win_table([vote], names).ravel()
    tables = (_resample_counts(len(prompts), n_bootstrap, seed) @ cells).reshape(-1, len(names), len(names))
    rankable = np.array([_strongly_connected(table) for table in tables], dtype=bool)
    resampled = _newton(tables[rankable]) if rankable.any() else np.full((1, len(names)), np.nan)
    ranking = [
        Strength(name, float(estimate[i]), *_interval(resampled[:, i]), int(rankable.sum()))
        for i, name in enumerate(names)
    ]
    return sorted(ranking, key=lambda entry: (-entry.strength, entry.model))


def _other(vote: Vote, model: str) -> str | None:
    if vote.model_a == model:
        return vote.model_b
    return vote.model_a if vote.model_b == model else None


def _outcome(vote: Vote, model: str) -> int:
    """0 a win of `model`, 1 a tie, 2 a loss."""
    if vote.preference not in ("a", "b"):
        return 1
    return 0 if (vote.preference == "a") == (vote.model_a == model) else 2


def _share(wins: Any, losses: Any) -> NDArray[np.float64]:
    wins, total = np.asarray(wins, dtype=float), np.asarray(wins + losses, dtype=float)
    return np.divide(wins, total, out=np.full_like(total, np.nan), where=total > 0)


def _resample_counts(items: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each item is drawn in each resample, [resamples, items]."""
    return np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), size=resamples).astype(float)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Percentile interval; NaN where no resample gave a value."""
    valid = values[~np.isnan(values)]
    if len(valid) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(valid, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _prompt_means(ratings: Sequence[Rating], model: str) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for rating in ratings:
        if rating.model == model:
            scores.setdefault(_prompt(rating.prompt), []).append(rating.score)
    return {prompt: float(np.mean(values)) for prompt, values in scores.items()}


def _win_table(votes: Sequence[Vote], names: Sequence[str]) -> NDArray[np.float64]:
    """[i, j]: wins of i over j, ties half."""
    index = {name: i for i, name in enumerate(names)}
    table = np.zeros((len(names), len(names)))
    for vote in votes:
        a, b = index[vote.model_a], index[vote.model_b]
        points = {"a": 1.0, "b": 0.0}.get(vote.preference, 0.5)
        table[a, b] += points
        table[b, a] += 1 - points
    return table


def _strongly_connected(table: NDArray[np.float64]) -> bool:
    return connected_components(csr_matrix(table > 0), connection="strong", return_labels=False) == 1


def _newton(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Strengths [R, n] that maximise the likelihood of win tables [R, n, n], by Newton's method.

    The step is kept below 1 log-odd, since a full one can run away from the flat side of the likelihood.
    """
    games = tables + tables.transpose(0, 2, 1)
    n = tables.shape[1]
    strength = np.zeros(tables.shape[:2])
    for _ in range(200):
        probability = 1 / (1 + np.exp(strength[:, None, :] - strength[:, :, None]))
        gradient = (tables - games * probability).sum(axis=2)
        weight = games * probability * (1 - probability)
        # The likelihood does not change when all strengths shift: 1 / n in every cell pins that direction to sum 0.
        hessian = np.eye(n) * weight.sum(axis=2, keepdims=True) - weight + 1 / n
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        step /= np.maximum(1, np.abs(step).max(axis=1, keepdims=True))
        strength += step
        if np.abs(step).max() < 1e-10:
            break
    return strength - strength.mean(axis=1, keepdims=True)
