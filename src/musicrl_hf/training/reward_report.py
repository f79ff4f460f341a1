"""What a preference reward is worth on held-out votes: accuracy, calibration, baselines, and how far listeners agree."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..audio import read_audio
from ..preferences.agreement import PairVote, count_agreement
from ..preferences.codes import clip_hash
from ..preferences.listeners import count_listeners
from ..rewards.contract import Reward, ask_reward

CALIBRATION_BINS = 10  # of width 0.05, from 0.5 to 1
_DIGITS = 4


def accuracy_report(
    margins: Tensor, pairs_of_models: Sequence[tuple[str, str]], votes: Sequence[PairVote]
) -> dict[str, Any]:
    """How often the chosen clip scores higher, how far to believe the margins, and who chose; equal scores count half.

    Args:
        margins: [N], score of the chosen minus that of the rejected clip of each vote.
        pairs_of_models: the generators of both clips.
        votes: the same N votes.

    Returns:
        `accuracy`, `n_votes`, `n_pairs` (fewer than votes where several listeners voted on a pair), `chance_interval`
        (where 95 % of those end up who toss a coin for each pair), `log_loss` in nats (ln 2 is chance), `by_models` with
        accuracy and number of votes for each two generators that met, `calibration` (see `calibration`), and `judged_by`:
        the number of `listeners`, how many of them are `simulated` or `rewards` rather than people, and the `agreement` of
        every two of them on the `shared_pairs` that both decided (None where there is none), in `comparisons`.
    """
    meetings: dict[str, list[int]] = {}
    for number, models in enumerate(pairs_of_models):
        meetings.setdefault(" / ".join(sorted(models)), []).append(number)
    count = len(margins)
    by_pair: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for vote in votes:
        by_pair[vote.pair][vote.choice] += 1
    low, high = coin_interval(
        [max(counts.values()), counts.total() - max(counts.values())] for counts in by_pair.values()
    )
    agreement = count_agreement(votes)
    return {
        "accuracy": share_right(margins),
        "n_votes": count,
        "n_pairs": len(by_pair),
        "chance_interval": [low / count, high / count],
        "log_loss": -torch.nn.functional.logsigmoid(margins).mean().item(),
        "by_models": {
            name: {"accuracy": share_right(margins[rows]), "n_votes": len(rows)}
            for name, rows in sorted(meetings.items())
        },
        "calibration": calibration(margins, independent=len(by_pair) == count),
        "judged_by": {
            **count_listeners(vote.listener for vote in votes),
            "agreement": agreement.share,
            "shared_pairs": agreement.pairs,
            "comparisons": agreement.comparisons,
        },
    }


def share_right(margins: Tensor) -> float:
    """The share of margins [N] above 0; those of 0 count half."""
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean().item()


def coin_interval(counts: Iterable[Sequence[int]]) -> tuple[int, int]:
    """How many votes a coin gets right, from the 2.5th to the 97.5th percentile, exactly.

    The coin is tossed once a pair, for a reward that knows nothing cannot agree with one listener and not with another who
    chose the same clip. With one vote a pair this is the binomial interval.

    Args:
        counts: votes for the one and for the other clip of each pair.
    """
    chances = np.ones(1)  # of 0, 1, ... right votes
    for one, other in counts:
        grown = np.zeros(len(chances) + one + other)
        for right in (one, other):
            grown[right : right + len(chances)] += chances / 2
        chances = grown
    low, high = np.searchsorted(chances.cumsum(), [0.025, 0.975])
    return int(low), int(high)


def calibration(margins: Tensor, independent: bool = True) -> dict[str, Any]:
    """Expected calibration error of the Bradley-Terry probability (Guo et al. 2017, arXiv 1706.04599, equation 3).

    The model gives the clip that it prefers the probability sigmoid(|margin|), in [0.5, 1]. These are put into
    `CALIBRATION_BINS` bins of equal width, each without its lower and with its upper edge (0.5 is in the first):
    ECE = sum over bins of (votes in it / all votes) * |share of right ones - mean probability|.

    Args:
        margins: [N], score of the chosen minus that of the rejected clip.
        independent: no two of the votes are on the same pair.

    Returns:
        `ece` in [0, 1]; `ece_if_calibrated`, its mean if choices followed the model's own probabilities, which few votes keep
        well above 0 (None unless `independent`); and `bins`, of those that hold a vote: `above` (lower edge), `n_votes`,
        `probability` (mean) and `accuracy`.
    """
    margins = margins.double()
    probability = margins.abs().sigmoid()
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    edges = torch.linspace(0.5, 1, CALIBRATION_BINS + 1, dtype=torch.float64)
    place = torch.bucketize(probability, edges[1:-1])
    error, error_if_calibrated = 0.0, 0.0
    bins: dict[str, list[float]] = {"above": [], "n_votes": [], "probability": [], "accuracy": []}
    for number in place.unique().tolist():
        held = place == number
        mean, accuracy, votes = probability[held].mean().item(), right[held].mean().item(), int(held.sum())
        error += votes / len(margins) * abs(accuracy - mean)
        error_if_calibrated += _mean_deviation(probability[held].numpy()) / len(margins)
        row = (edges[number].item(), votes, mean, accuracy)
        for column, value in zip(bins.values(), row, strict=True):
            column.append(round(value, _DIGITS))
    return {"ece": error, "ece_if_calibrated": error_if_calibrated if independent else None, "bins": bins}


def _mean_deviation(probabilities: np.ndarray) -> float:
    """E|X - E X| where X counts the successes of independent trials with these probabilities [N]."""
    chances = np.ones(1)
    for probability in probabilities:
        chances = np.convolve(chances, [1 - probability, probability])
    return float(np.abs(np.arange(len(chances)) - probabilities.sum()) @ chances)


def baseline_margins(reward: Reward, rows: Dataset, crop_s: float, name: str) -> Tensor:
    """What another reward says of the same votes: its score of the chosen minus that of the rejected clip, [N].

    Each clip is scored once for its prompt, on the same seconds that the preference reward is tested on.

    Args:
        reward: any.
        rows: decided preference rows.
        crop_s: seconds from the start of each clip.
        name: the reward's, for messages.

    Raises:
        ValueError: the reward raised, or gave no finite scores.
    """
    scores: dict[tuple[str, str], float] = {}

    def score(prompt: str, data: bytes) -> float:
        key = prompt, clip_hash(data)
        if key not in scores:
            audio, rate = read_audio(data)
            scores[key] = ask_reward(reward, [prompt], audio[None, :, : math.ceil(crop_s * rate)], rate, name).item()
        return scores[key]

    bar = tqdm(rows.select_columns(["prompt", "chosen", "rejected"]), desc=f"baseline {name}", unit="pair", leave=False)
    return torch.tensor(
        [score(row["prompt"], row["chosen"]["bytes"]) - score(row["prompt"], row["rejected"]["bytes"]) for row in bar]
    )


def accuracy_line(report: dict[str, Any]) -> str:
    """The accuracy that `accuracy_report` found, in one line."""
    low, high = report["chance_interval"]
    votes, pairs = report["n_votes"], report["n_pairs"]
    counted = f"{pairs} held-out pair{'' if pairs == 1 else 's'}"
    if votes != pairs:
        counted = f"{votes} votes on {counted}"
    return (
        f"Accuracy on {counted}: {report['accuracy']:.1%} (in 95 % of cases a coin gets between "
        f"{low:.1%} and {high:.1%} of them right)"
    )


def report_text(report: dict[str, Any]) -> str:
    """What `accuracy_report` found, and under `baselines` what other rewards reach, in a line each."""
    lines = [accuracy_line(report)]
    lines += [
        f'"The higher {name} wins" is right in {found["accuracy"]:.1%} of them'
        for name, found in report.get("baselines", {}).items()
    ]
    judged_by = report["judged_by"]
    if judged_by["agreement"] is not None:
        lines.append(
            f"Two listeners agree on {judged_by['agreement']:.1%} (of {judged_by['comparisons']} comparisons on "
            f"{judged_by['shared_pairs']} pairs that several of them decided)"
        )
    found = report["calibration"]
    expected = found["ece_if_calibrated"]
    told = "" if expected is None else f"; so many votes give a calibrated model {expected:.3f} on average"
    lines.append(f"Expected calibration error: {found['ece']:.3f} ({CALIBRATION_BINS} bins from 0.5 to 1{told})")
    return "\n".join(lines)
