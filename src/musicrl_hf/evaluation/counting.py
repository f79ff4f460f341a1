"""From votes and ratings to the numbers of a comparison, without sound."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..preferences.data_files import reading_parquet
from ..preferences.listeners import count_listeners
from ..preferences.schema import SCORE_COLUMNS, Vote, normalise_prompt
from .win_rates import (
    Rating,
    as_json,
    bradley_terry,
    can_be_ranked,
    mean_opinion_scores,
    models_of,
    wilcoxon_signed_rank,
    win_rate,
    win_rate_matrix,
)


def count_votes(votes: Sequence[Vote], ratings: Sequence[Rating] = (), *, seed: int = 0) -> dict[str, Any]:
    """What votes say: win rates of each against each and against all, and a Bradley-Terry ranking.

    Args:
        votes: between systems.
        ratings: of their clips, where a study asked for them: they give opinion scores and Wilcoxon's test.
        seed: of the bootstrap.

    Raises:
        ValueError: if there are no votes.
    """
    if not votes:
        raise ValueError("there are no votes between two systems: there is nothing to count")
    overall = [win_rate(votes, name, seed=seed) for name in models_of(votes)]
    overall.sort(key=lambda rate: (rate.win_rate != rate.win_rate, -rate.win_rate, rate.model))
    names = [rate.model for rate in overall]
    rates = [as_json(rate) for rate in win_rate_matrix(votes, names, seed=seed)]
    result = {
        "kind": "votes",
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": names,
        "votes": len(votes),
        "raters": count_listeners(vote.listener for vote in votes if vote.listener),
        "prompts": len({normalise_prompt(vote.prompt) for vote in votes}),
        "overall": [as_json(rate) for rate in overall],
        "win_rates": rates,
        **ranking(votes, seed),
    }
    if ratings:
        result["mos"] = [as_json(score) for score in mean_opinion_scores(ratings, seed=seed)]
        result["win_rates"] = [
            rate | {"wilcoxon_p": wilcoxon_signed_rank(ratings, rate["model"], rate["against"])[0]} for rate in rates
        ]
    return result


def ranking(votes: Sequence[Vote], seed: int) -> dict[str, Any]:
    """`ranking`, best first, or None and in `ranking_note` why there is none."""
    if not votes:
        return {"ranking": None, "ranking_note": "one model alone cannot be ranked"}
    if not can_be_ranked(votes):
        return {"ranking": None, "ranking_note": "a model never won or never lost: its strength would be infinite"}
    return {"ranking": [as_json(entry) for entry in bradley_terry(votes, seed=seed)], "ranking_note": None}


def ratings_in(folder: Path) -> list[Rating]:
    """The ratings in a folder of preferences, where its rows have them, of rows that compare two systems."""
    ratings = []
    for path in sorted(folder.glob("data/*.parquet")):
        columns = ["prompt", "listener", "chosen_model", "rejected_model", *SCORE_COLUMNS]
        with reading_parquet(path):
            if not set(SCORE_COLUMNS) <= set(pq.read_schema(path).names):
                return []
            rows = pq.read_table(path, columns=columns).to_pylist()
        for row in rows:
            for model, score in zip((row["chosen_model"], row["rejected_model"]), map(row.get, SCORE_COLUMNS)):
                if score is not None and row["chosen_model"] != row["rejected_model"]:
                    ratings.append(Rating(row["prompt"], model, score, row["listener"]))
    return ratings
