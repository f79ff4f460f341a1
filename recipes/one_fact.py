"""Captions of one clip that differ in one fact: the right one, and those that name another instrument, tempo, ...

Among clips drawn at random the instrument nearly always decides which caption belongs to which, so that a contrastive loss
has little use for the other facts. Here nothing else differs. (Hard negatives made from captions: Yuksekgonul et al. 2022,
arXiv:2210.01936, section 4.)
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from captions import BACKINGS, INSTRUMENTS, STYLES, complete, mood_by_rule, phrase
from facts import CLASSES

FACTS = ("instrument", "backing", "tempo", "key")  # "key" changes the tonic or the mode
COMPLETE = 0.5  # share of the captions that name every fact


class Drawn(NamedTuple):
    """A caption, one wrong caption for each of `FACTS` (equal to it where it does not name that fact), whether it names all."""

    right: str
    wrong: list[str]
    complete: bool


def another(row: dict, fact: str, rows: Sequence[dict], rng: random.Random) -> dict:
    """The facts of a clip with one of `FACTS` changed, and its mood word where that follows from it.

    Args:
        row: the clip's facts.
        fact: which to change.
        rows: of other clips, whose tempi are taken with their beats a minute.
        rng: draws what it becomes.
    """
    row = dict(row)
    if fact == "tempo":
        other = rng.choice(rows)
        while other["tempo"] == row["tempo"]:
            other = rng.choice(rows)
        row |= {"tempo": other["tempo"], "bpm": other["bpm"]}
    else:
        column = rng.choice(("key", "mode")) if fact == "key" else fact
        classes = {"instrument": list(INSTRUMENTS), "backing": list(BACKINGS)}.get(column) or CLASSES[column]
        row[column] = rng.choice([name for name in classes if name != row[column]])
    if row["mood"] and fact in ("tempo", "key"):
        row["mood"] = mood_by_rule(row["mode"], row["tempo"], row["instrument"], rng)
    return row


def draw_captions(row: dict, rows: Sequence[dict], rng: random.Random) -> Drawn:
    """A caption of a clip in a random style, and a wrong one in that style for each of `FACTS`."""
    style = None if rng.random() < COMPLETE else rng.choice(STYLES)
    words = rng.random()

    def write(facts: dict) -> str:
        own = random.Random(words)
        return phrase(facts, style, own) if style else complete(facts, own)

    return Drawn(write(row), [write(another(row, fact, rows, rng)) for fact in FACTS], style is None)
