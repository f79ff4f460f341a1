"""The rules of a collection: what is asked, of whom and how often, and what listeners agree to before."""

import hashlib
import math
from dataclasses import dataclass, field, replace
from string import Template
from typing import Any

from ..audio import MAX_DURATION_S
from ..licences import LICENCES
from ..preferences.schema import LABELS, normalise_prompt

_YEAR_H = 8760
CONSENT = Template(
    """Before you vote, please read what happens with your votes.

What is kept: for each pair that you vote on, the prompt, the two clips, your choice or your ratings, how long you listened \
to each clip, the time, and a code that stands for you. The code is a salted hash: it holds no name, no address and nothing \
about your device. If you type a prompt, its text is kept too, so type nothing private.

What for: research on music generation. Models learn from such choices what people prefer, and are compared by them.

Who sees it: everybody. The votes are published as a data set under the licence $licence_title ($licence), which lets \
others use them.

You can stop at any time. You get a private code: with it you can withdraw later on this page. Your votes are then deleted \
here and are missing from every later version of the data set; copies of earlier versions that others have taken cannot be \
called back. Without the code nobody can tell which votes are yours, so keep it."""
)


def rule(default: Any, help: str) -> Any:
    """A field with its help, as in the job configurations."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Rules:
    """What holds for every listener of a collection."""

    licence: str = rule("cc-by-4.0", "licence that the votes are published under, as the Hub spells it")
    study: bool = rule(False, "fixed pairs and a rating from 1 to 5 for each clip, instead of votes")
    raters: int = rule(3, "listeners who are asked about each pair")
    min_seconds: float = rule(3.0, "seconds of each clip that have to be heard before a vote counts")
    check_every: int = rule(10, "pairs between two checks of attention; 0 for none")
    votes_per_minute: int = rule(20, "votes that one listener may give in a minute")
    votes_per_day: int = rule(1000, "votes that one listener may give in 24 hours")
    prompts_per_hour: int = rule(10, "prompts that one listener may type in an hour")
    joins_per_hour: int = rule(200, "listeners who may join from one address in an hour; addresses are not kept")
    prompt_length: int = rule(300, "characters of a typed prompt")
    deal_hours: float = rule(12.0, "hours in which a pair has to be voted on before others are asked instead")

    def __post_init__(self) -> None:
        if self.licence not in LICENCES:
            raise ValueError(f"`licence` is {self.licence!r}: give one of {', '.join(LICENCES)}.")
        least = {
            "raters": 1,
            "check_every": 0,
            "votes_per_minute": 1,
            "votes_per_day": 1,
            "joins_per_hour": 1,
            "prompt_length": 1,
        }
        for name, number in {**least, "prompts_per_hour": 0}.items():
            if getattr(self, name) < number:
                raise ValueError(f"`{name}` is {getattr(self, name)}: it has to be {number} or more.")
        if not 0 <= self.min_seconds <= MAX_DURATION_S:
            raise ValueError(f"`min_seconds` is {self.min_seconds}: clips last 0 to {MAX_DURATION_S:g} s.")
        if not 0 < self.deal_hours <= _YEAR_H:
            raise ValueError(f"`deal_hours` is {self.deal_hours}: it has to be above 0, and at most {_YEAR_H}, a year.")

    @property
    def consent_text(self) -> str:
        """What listeners agree to, in plain words."""
        return CONSENT.substitute(licence=self.licence, licence_title=LICENCES[self.licence])

    @property
    def consent_id(self) -> str:
        """Changes with every word of the text."""
        return hashlib.sha256(f"{self.licence}\n{self.consent_text}".encode()).hexdigest()


LONGEST_HEARD_S = 86_400.0  # nobody hears a clip for longer: what a page reports can be any number


@dataclass(frozen=True)
class Answer:
    """What a listener said of a pair, with a and b as heard.

    Attributes:
        preference: a, b, tie or both_bad.
        seconds_a, seconds_b: how long each was listened to.
        score_a, score_b: 1 to 5 where clips are rated (`Answer.rated`), else None.
    """

    preference: str
    seconds_a: float
    seconds_b: float
    score_a: int | None = None
    score_b: int | None = None

    def __post_init__(self) -> None:
        if self.preference not in LABELS:
            raise ValueError(f"preference is {self.preference!r}: use one of {', '.join(LABELS)}")
        for name in ("seconds_a", "seconds_b"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: seconds heard cannot be negative or infinite")
        scores = [self.score_a, self.score_b]
        if scores != [None, None] and not all(score in (1, 2, 3, 4, 5) for score in scores):
            raise ValueError(f"score_a and score_b are {self.score_a} and {self.score_b}: rate both from 1 to 5")

    @property
    def believed(self) -> "Answer":
        """This answer, with no clip heard for longer than `LONGEST_HEARD_S`."""
        heard = (min(self.seconds_a, LONGEST_HEARD_S), min(self.seconds_b, LONGEST_HEARD_S))
        return replace(self, seconds_a=heard[0], seconds_b=heard[1])

    @classmethod
    def rated(cls, score_a: int, score_b: int, seconds_a: float, seconds_b: float) -> "Answer":
        """Two ratings; the higher one is the preference, as in the paper's study (section 4.3)."""
        preference = "tie" if score_a == score_b else "a" if score_a > score_b else "b"
        return cls(preference, seconds_a, seconds_b, score_a, score_b)


def clean_prompt(prompt: str, length: int) -> str:
    """A typed prompt on one line, without control characters.

    Raises:
        ValueError: it holds no word, or more than `length` characters.
    """
    text = " ".join("".join(char if char.isprintable() else " " for char in prompt).split())
    if not any(char.isalnum() for char in normalise_prompt(text)):
        raise ValueError("Please type what the music should be like, in words.")
    if len(text) > length:
        raise ValueError(f"The prompt has {len(text)} characters: please use at most {length}.")
    return text
