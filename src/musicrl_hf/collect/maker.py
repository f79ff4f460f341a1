"""Pairs made ahead: two clips for a prompt, checks of attention, and the fixed pairs of a study."""

import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

import torch
from sqlalchemy import Connection, func, insert, select
from torch import Tensor

from ..generator import MusicRLForConditionalGeneration
from .desk import CHECKS
from .store import VoteStore
from .tables import clips, pairs

Result = TypeVar("Result")
Side = tuple[str, int, Tensor]  # model, seed, clip [C, T]
logger = logging.getLogger(__name__)

BROKEN = "broken"  # stands for the model of a clip that is noise


class PairMaker:
    """Samples pairs and writes them into the store: the files of the clips first, then the rows, all or none.

    Args:
        store: where pairs go.
        models: what to call them -> generators. One gives pairs of its own clips; of several, every two meet.
        prompts: dealt in turn.
        duration_s: seconds a clip.
        temperature, top_k, guidance_scale: of the sampling; a guidance scale of None is each model's own.
        seed: makes pairs reproducible, in a store that only one process writes; None draws seeds. The rows hold them.
        check_every: pairs between two checks of attention; 0 for none.

    Raises:
        ValueError: no prompt, no model, or models that differ in sampling rate or channels.
    """

    def __init__(
        self,
        store: VoteStore,
        models: Mapping[str, MusicRLForConditionalGeneration],
        prompts: Sequence[str],
        *,
        duration_s: float = 5.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        guidance_scale: float | None = 1.0,
        seed: int | None = None,
        check_every: int = 10,
    ):
        if not models or not prompts:
            raise ValueError(f"{len(models)} models and {len(prompts)} prompts: give at least one of each")
        check_alike(models)
        self.store, self.models, self.prompts = store, dict(models), list(prompts)
        self.duration_s, self.check_every = duration_s, check_every
        self._sampling: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "guidance_scale": guidance_scale,
            "duration_s": duration_s,
        }
        self._random = random.Random(seed)
        self._failed: Counter[str] = Counter()
        self._opponents = list(combinations(self.models, 2)) or [(next(iter(self.models)),) * 2]

    @property
    def rate(self) -> int:
        """Sampling rate of all clips, in Hz."""
        return next(iter(self.models.values())).sampling_rate

    def make(self, prompt: str, owner: str | None = None) -> str:
        """Sample a pair for a prompt.

        Args:
            prompt: text.
            owner: the listener who typed it, to whom alone it is dealt; None for everybody.

        Returns:
            the pair's id.

        Raises:
            ValueError: a clip came out silent.
            RuntimeError: the model failed.
        """
        with self.store.read() as connection:
            here, everywhere = _meetings(connection, prompt), _meetings(connection)
        # Those who have met least for this prompt; of them, those who have met least at all.
        opponents = min(self._opponents, key=lambda two: (here[frozenset(two)], everywhere[frozenset(two)]))
        sides = [(name, self._random.randrange(2**31)) for name in opponents]
        return self._save(prompt, [(*side, self._sample(prompt, *side)) for side in sides], "pair", owner)

    def make_next(self) -> bool:
        """Sample a pair for the prompt that has the fewest, or the check of attention that is due.

        Returns:
            whether it was a pair, and not a check.

        Raises:
            as `make`.
        """
        with self.store.read() as connection:
            counted = select(pairs.c.prompt, func.count().label("made")).where(
                pairs.c.kind == "pair", pairs.c.owner.is_(None)
            )
            made = {row.prompt: row.made for row in connection.execute(counted.group_by(pairs.c.prompt))}
            is_check = pairs.c.kind.in_(CHECKS)
            checks = connection.scalar(select(func.count()).select_from(pairs).where(is_check)) or 0
        total = sum(made.values())
        if self.check_every and total >= (checks + 1) * self.check_every:
            self.make_check(CHECKS[checks % len(CHECKS)])
            return False
        prompt = min(self.prompts, key=lambda prompt: made.get(prompt, 0) + self._failed[prompt])
        self._failed[prompt] += 1  # until it has worked: a prompt that always fails must not hold up the others
        self.make(prompt)
        self._failed[prompt] -= 1
        return True

    def make_check(self, kind: str) -> str:
        """A pair of one clip with itself ("identical"), or with noise of the same loudness ("broken")."""
        if kind not in CHECKS:
            raise ValueError(f"kind is {kind!r}: a check of attention is one of {', '.join(CHECKS)}")
        prompt, name = self._random.choice(self.prompts), self._random.choice(list(self.models))
        seed = self._random.randrange(2**31)
        audio = self._sample(prompt, name, seed)
        sides = [(name, seed, audio), (name, seed, audio)]
        if kind == "broken":
            noise = torch.randn(audio.shape, generator=torch.Generator().manual_seed(seed))
            sides[1] = (BROKEN, seed, noise / 10)
        return self._save(prompt, sides, kind, None)

    def make_study(self) -> Iterator[str]:
        """The fixed pairs of a study: for each prompt every two models, one clip each, sampled with the same seed.

        Pairs that are there already, whichever model came first in them, are passed over: a study which was cut short goes
        on, and several servers make one study. A model that fails for a prompt costs the pairs in which it would have played,
        and a warning.

        Yields:
            the id of each pair that was made.

        Raises:
            ValueError: fewer than two models.
        """
        if len(self.models) < 2:
            raise ValueError(f"models is {', '.join(self.models)}: a study compares two or more; give --against")
        made = 0
        for prompt in self.prompts:
            with self.store.read() as connection:
                there = _meetings(connection, prompt)
            missing = [pair for pair in self._opponents if frozenset(pair) not in there]
            seed = self._random.randrange(2**31)
            needed = [name for name in self.models if any(name in pair for pair in missing)]
            audio = {name: _attempt(prompt, partial(self._sample, prompt, name, seed)) for name in needed}
            for pair in missing:
                sides = [(name, seed, sound) for name in pair if (sound := audio[name]) is not None]
                saved = _attempt(prompt, partial(self._save_study, prompt, sides)) if len(sides) == 2 else None
                if saved is None:
                    continue
                yield saved
                made += 1
                if self.check_every and made % self.check_every == 0:
                    yield self.make_check(CHECKS[made // self.check_every % len(CHECKS)])

    def _sample(self, prompt: str, name: str, seed: int) -> Tensor:
        return self.models[name].sample([prompt], seed=seed, **self._sampling).audio[0].cpu()

    def _save(self, prompt: str, sides: Sequence[Side], kind: str, owner: str | None) -> str:
        pair = self._save_if(lambda _: True, prompt, sides, kind, owner)
        assert pair is not None
        return pair

    def _save_study(self, prompt: str, sides: Sequence[Side]) -> str | None:
        """As `_save`, or None where another server has made this pair meanwhile."""
        opponents = frozenset(name for name, _, _ in sides)
        return self._save_if(
            lambda connection: opponents not in _meetings(connection, prompt), prompt, sides, "pair", None
        )

    def _save_if(
        self,
        wanted: Callable[[Connection], bool],
        prompt: str,
        sides: Sequence[Side],
        kind: str,
        owner: str | None,
    ) -> str | None:
        rows: list[dict[str, Any]] = []
        pair, whole = uuid.uuid4().hex, False
        try:
            for name, seed, audio in sides:
                clip, duration_s = self.store.save_clip(audio, self.rate)
                rows.append({"id": clip, "model": name, "seed": seed, "duration_s": duration_s})
            values = {"id": pair, "kind": kind, "prompt": prompt, "owner": owner, "live": 0, "made_at": time.time()}
            with self.store.write(exclusive=True) as connection:
                if not wanted(connection):
                    return None
                connection.execute(insert(clips), rows)
                connection.execute(insert(pairs).values(**values, first=rows[0]["id"], second=rows[1]["id"]))
            whole = True
        finally:
            if not whole:
                self.store.remove_clips([row["id"] for row in rows])
        return pair


def _meetings(connection: Connection, prompt: str | None = None) -> Counter[frozenset[str]]:
    """How often models meet in the pairs of a prompt, or of all, in whichever order."""
    first, second = clips.alias(), clips.alias()
    joined = pairs.join(first, pairs.c.first == first.c.id).join(second, pairs.c.second == second.c.id)
    counted = select(first.c.model, second.c.model, func.count()).select_from(joined).where(pairs.c.kind == "pair")
    if prompt is not None:
        counted = counted.where(pairs.c.prompt == prompt)
    met: Counter[frozenset[str]] = Counter()
    for one, other, times in connection.execute(counted.group_by(first.c.model, second.c.model)):
        met[frozenset((one, other))] += times
    return met


def check_alike(models: Mapping[str, MusicRLForConditionalGeneration]) -> None:
    """Refuse models whose clips do not make a pair.

    Raises:
        ValueError: they differ in sampling rate or channels.
    """
    layouts = {name: (model.sampling_rate, model.config.audio_channels) for name, model in models.items()}
    if len(set(layouts.values())) > 1:
        raise ValueError(
            f"models differ in (Hz, channels): {layouts}; a pair has to sound alike in everything but the music"
        )


def _attempt(prompt: str, work: Callable[[], Result]) -> Result | None:
    """What the work gives, or None and a warning where the model fails."""
    try:
        return work()
    except (ValueError, RuntimeError) as error:
        logger.warning("a clip for %r could not be made (%s): its pairs are left out", prompt, error)
        return None
