"""How often two listeners who heard the same pair choose the same clip: what a reward's accuracy has to stand beside."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from datasets import Dataset

from .codes import clip_hash
from .schema import DECIDED


class PairVote(NamedTuple):
    """One decided vote: the pair (a prompt and two clips, whatever their order), the clip that was chosen, and by whom."""

    pair: tuple[str, ...]
    choice: str
    listener: str


@dataclass(frozen=True)
class Agreement:
    """How often two listeners chose the same clip.

    Attributes:
        share: agreeing comparisons of all, in [0, 1]; None where no two listeners decided one pair.
        pairs: pairs that two or more listeners decided.
        comparisons: two listeners and a pair that both decided.
    """

    share: float | None
    pairs: int
    comparisons: int


def pair_votes(ds: Dataset) -> list[PairVote]:
    """The decided rows as votes on pairs; rows with the same prompt and the same bytes of both clips are one pair."""
    votes = []
    for row in ds.select_columns(["prompt", "chosen", "rejected", "preference", "listener"]):
        if row["preference"] in DECIDED:
            chosen, rejected = (clip_hash(row[side]["bytes"]) for side in ("chosen", "rejected"))
            votes.append(PairVote((row["prompt"], *sorted((chosen, rejected))), chosen, row["listener"]))
    return votes


def count_agreement(votes: Iterable[PairVote]) -> Agreement:
    """Compare every two listeners on every pair that both decided; nobody is compared with themselves.

    Example:
        >>> count_agreement([PairVote(("p",), "a", "x"), PairVote(("p",), "a", "y"), PairVote(("p",), "b", "z")])
        Agreement(share=0.3333333333333333, pairs=1, comparisons=3)
    """
    of_pair = defaultdict(list)
    for vote in votes:
        of_pair[vote.pair].append(vote)
    agreed, pairs = [], 0
    for together in of_pair.values():
        own = [one.choice == other.choice for one, other in combinations(together, 2) if one.listener != other.listener]
        agreed += own
        pairs += bool(own)
    return Agreement(sum(agreed) / len(agreed) if agreed else None, pairs, len(agreed))
