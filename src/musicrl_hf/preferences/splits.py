"""Splits of preferences that hold nothing of one side on the other: by prompt, and by generator."""

import hashlib
from collections.abc import Sequence

from datasets import Dataset, DatasetDict

from .schema import normalise_prompt


def split_by_prompt(ds: Dataset, test_share: float = 0.1, seed: int = 0) -> DatasetDict:
    """Split so that no prompt, however spelled, is in both `train` and `test`.

    A prompt's side depends on its own text and the seed only, so it stays where it was when votes are added.

    Raises:
        ValueError: if `test_share` is not between 0 and 1, or one side stays empty.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is {test_share}: it has to lie between 0 and 1")
    sides: dict[str, list[int]] = {"train": [], "test": []}
    for number, prompt in enumerate(ds["prompt"]):
        sides[side_of_prompt(prompt, test_share, seed)].append(number)
    return _both_sides(ds, sides, f"test_share {test_share} and seed {seed}: give another share or seed")


def side_of_prompt(prompt: str, test_share: float = 0.1, seed: int = 0) -> str:
    """The side of `split_by_prompt` that a prompt is on: "train" or "test"."""
    digest = hashlib.sha256(f"{seed}:{normalise_prompt(prompt)}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") < test_share * 2**64 else "train"


def split_by_generator(ds: Dataset, held_out: Sequence[str]) -> DatasetDict:
    """Put every row with a held-out generator into `test`, so that `train` has never heard one of them.

    Raises:
        ValueError: if a name is in no row, or one side stays empty.
    """
    models = list(zip(ds["chosen_model"], ds["rejected_model"], strict=True))
    known = {name for pair in models for name in pair}
    unknown = sorted(set(held_out) - known)
    if unknown or not held_out:
        raise ValueError(f"held_out is {list(held_out)}: name generators of {', '.join(sorted(known))}")
    sides: dict[str, list[int]] = {"train": [], "test": []}
    for number, pair in enumerate(models):
        sides["test" if set(pair) & set(held_out) else "train"].append(number)
    return _both_sides(ds, sides, f"held_out {list(held_out)}: hold out fewer generators")


def _both_sides(ds: Dataset, sides: dict[str, list[int]], remedy: str) -> DatasetDict:
    for name, numbers in sides.items():
        if not numbers:
            raise ValueError(f"the {name} side of the split is empty with {remedy}")
    return DatasetDict({name: ds.select(numbers) for name, numbers in sides.items()})
