"""What a comparison compares: the checks before it, and the clips that each system plays."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..generator import Clips, MusicRLForConditionalGeneration
from ..places import find_model
from ..preferences.schema import normalise_prompt
from ..rewards import Reward
from ..rewards.best_of import SEED_STEP, best_of


class Rater(Protocol):
    """Whoever rates clips from 1 to 5; `name` identifies them."""

    @property
    def name(self) -> str: ...

    def rate(self, prompts: Sequence[str], audio: Tensor, sampling_rate: int) -> Tensor: ...


def check_replaced(out: Path, votes: Path | None, written: Sequence[str]) -> None:
    """Refuse to write over the table of votes that is counted, or over files that no evaluation wrote.

    Args:
        out: folder of the evaluation.
        votes: the table that is counted, or None.
        written: names of the files that an evaluation writes, the first of which none is without.

    Raises:
        ValueError: naming the file.
    """
    if votes is not None and votes.is_file() and votes.resolve().parent == out.resolve():
        raise ValueError(
            f"votes is {votes}, which lies in out = {out}, where it would be written over: give another folder"
        )
    there = [name for name in written if (out / name).exists()]
    if there and not (out / written[0]).exists():
        raise ValueError(f"out is {out}, which holds {there[0]} of something else: give another folder")


def check_study(
    models: Mapping[str, Any],
    prompts: Sequence[str],
    listeners: Sequence[Rater],
    raters_per_clip: int,
    samples_per_prompt: int,
    batch_size: int,
) -> None:
    """Refuse what would fail, or mislead, after minutes of sampling; the arguments are those of `evaluate_models`.

    Raises:
        ValueError: naming the argument.
        FileNotFoundError: no such generator.
    """
    if not models:
        raise ValueError("models is empty: give at least one generator")
    for source in models.values():
        if isinstance(source, str):
            find_model(source, "musicgen", "models")
    spelled = [normalise_prompt(prompt) for prompt in prompts]
    twice = sorted({prompt for prompt in spelled if spelled.count(prompt) > 1})
    if not prompts or twice or not all(spelled):
        raise ValueError(f"prompts has {len(prompts)} texts, twice or empty: {twice}: give each prompt once")
    numbers = {"raters_per_clip": raters_per_clip, "samples_per_prompt": samples_per_prompt, "batch_size": batch_size}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: it has to be 1 or more")
    if raters_per_clip * samples_per_prompt > len(listeners):
        raise ValueError(
            f"raters_per_clip x samples_per_prompt is {raters_per_clip} x {samples_per_prompt}, but there are "
            f"{len(listeners)} listeners: have more of them, so that nobody rates two clips of a model for one prompt"
        )


def sample_study(
    play: Callable[..., Clips],
    prompts: Sequence[str],
    samples: int,
    batch_size: int,
    seed: int,
    sampling: Mapping[str, Any],
) -> Iterable[tuple[int, str, Tensor, Tensor]]:
    """Play each prompt `samples` times: (number, prompt, codes [samples, K, F], audio [samples, C, T]) of each prompt."""
    at_once = max(1, batch_size // samples)
    for start in range(0, len(prompts), at_once):
        batch = list(prompts[start : start + at_once])
        clips = play([prompt for prompt in batch for _ in range(samples)], seed=seed + start, **sampling)
        audio = clips.audio.cpu().unflatten(0, (len(batch), samples))
        codes = clips.codes.cpu().unflatten(0, (len(batch), samples))
        yield from ((start + i, prompt, codes[i], audio[i]) for i, prompt in enumerate(batch))


def best_of_player(model: MusicRLForConditionalGeneration, n: int, reward: Reward, name: str) -> Callable[..., Clips]:
    """A `sample` of the generator that plays the best of `n` clips by a reward called `name`.

    None of the `n` is the clip that the generator itself plays of that seed: compared with one of its own candidates, what was
    chosen could only tie or be that which the reward preferred.
    """

    def play(prompts: Sequence[str], seed: int, **options: Any) -> Clips:
        return best_of(model, prompts, n, reward, name=name, seed=seed + SEED_STEP, **options)[0]

    return play
