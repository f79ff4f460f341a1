"""Which rows are trained on and which are kept out: by prompt, and by generator."""

import hashlib
from collections.abc import Sequence

from datasets import Dataset, DatasetDict

from .schema import normalise_prompt


def split_by_prompt(ds: Dataset, test_share: float = 0.1, seed: int = 0) -> DatasetDict:
    """Split so that no prompt, however spelled, is in both `train` and `test`.

    The prompts are ranked by a hash of their text and the seed, and the first `test_share` of them, at least one and never
    all, are `test`: twelve prompts at 0.1 give one. Another vote on a known prompt moves no prompt to the other side; a
    new prompt moves at most one.

    Raises:
        ValueError: if `test_share` is not between 0 and 1, or there are fewer than two prompts.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is {test_share}: it has to lie between 0 and 1")
    prompts = [normalise_prompt(prompt) for prompt in ds["prompt"]]
    ranked = sorted(set(prompts), key=lambda prompt: _digest(prompt, seed))
    if len(ranked) < 2:
        raise ValueError(
            f"test_share is {test_share}, but the preferences have {len(ranked)} prompt: give votes on two prompts or more, "
            "so that one can be held out"
        )
    held_out = set(ranked[: min(max(1, round(test_share * len(ranked))), len(ranked) - 1)])
    sides: dict[str, list[int]] = {"train": [], "test": []}
    for number, prompt in enumerate(prompts):
        sides["test" if prompt in held_out else "train"].append(number)
    return DatasetDict({name: ds.select(numbers) for name, numbers in sides.items()})


def side_of_prompt(prompt: str, test_share: float = 0.1, seed: int = 0) -> str:
    """The side, "train" or "test", of a prompt in a data set that is published again as it grows.

    It follows from the prompt's own text and the seed only, so that what was once held out does not enter `train` later; of a
    few prompts none may be in `test`, and where all are, an export has no `test` and trains on them.
    """
    return (
        "test" if int.from_bytes(_digest(normalise_prompt(prompt), seed)[:8], "big") < test_share * 2**64 else "train"
    )


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
    for name, numbers in sides.items():
        if not numbers:
            raise ValueError(
                f"the {name} side of the split is empty with held_out {list(held_out)}: hold out fewer generators"
            )
    return DatasetDict({name: ds.select(numbers) for name, numbers in sides.items()})


def _digest(prompt: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
