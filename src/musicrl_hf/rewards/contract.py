"""What a reward is: a callable `(prompts, audio, sampling_rate) -> scores`, and the checks at both of its ends."""

import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..audio import check_audio


class Reward(Protocol):
    """Anything that scores clips: a learned model, a combination, or a function of the user's.

    One that compares the clips of a prompt with each other has an attribute `compares_clips`, which is true: a function gets it by
    `function.compares_clips = True`. Training then asks it for the clips of a prompt together, and refuses settings where that cannot be.

    Args:
        prompts: B texts.
        audio: [B, C, T] float in [-1, 1].
        sampling_rate: Hz.

    Returns:
        scores [B] float32, higher is better.
    """

    def __call__(self, prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor: ...


def ask_reward(
    reward: Reward,
    prompts: list[str],
    audio: Tensor,
    sampling_rate: int,
    name: str = "reward",
    timeout_s: float = 0.0,
) -> Tensor:
    """What a reward says of clips, checked; whatever goes wrong inside of it is said with its name.

    Args:
        reward, prompts, audio, sampling_rate: see `Reward`.
        name: the reward's name for messages.
        timeout_s: seconds that it may take; 0 for as long as it likes. Only a main thread can measure them, and only code
            that comes back to Python now and then can be interrupted; who asks in another thread waits with a limit.

    Returns:
        scores [B] float32, detached.

    Raises:
        ValueError: it raised, or its scores are refused by `check_scores`.
        TimeoutError: it took longer.
    """
    try:
        with _time_limit(timeout_s):
            scores = reward(prompts, audio.clone(), sampling_rate)  # its own: what it changes there, no other hears
    except _TooLate:
        raise late_answer(name, len(audio), timeout_s) from None
    except Exception as error:  # it may be anybody's code
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"Reward `{name}` raised {type(error).__name__} for {len(audio)} clips: {error} ({place.filename}, line "
            f"{place.lineno})."
        ) from error
    return check_scores(scores, len(audio), name)


def late_answer(name: str, clips: int, timeout_s: float) -> TimeoutError:
    """The error of a reward that takes longer than `timeout_s` seconds for so many clips."""
    return TimeoutError(
        f"Reward `{name}` has not answered for {clips} clips within {timeout_s:g} s: look at what it waits for, or "
        "set `reward_timeout_s` higher (0 waits for ever)."
    )


class _TooLate(BaseException):
    """No `Exception`, which a reward that asks a server again and again would take for one more failure of the server's."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `_TooLate` in the body once it has taken so long, and every second from then on until it lets go."""
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return
    began, over, late = time.monotonic(), False, False

    def stop(number: int, frame: Any) -> None:
        nonlocal late
        if not over:
            late = True
            raise _TooLate

    handler = signal.signal(signal.SIGALRM, stop)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        try:
            yield
        finally:
            over = True
        if late:  # the body has passed over it
            raise _TooLate
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's timer was running
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)


def check_scores(scores: Tensor, batch_size: int, name: str = "reward") -> Tensor:
    """Refuse scores that would poison a training run; return them as float32 [B], detached.

    Args:
        scores: what a reward returned.
        batch_size: B, the number of clips it was given.
        name: the reward's name for the message.

    Raises:
        ValueError: not a real-valued tensor, not of shape [B], or holding NaN or infinite values.

    Example:
        >>> check_scores(torch.tensor([0.5, 1.0]), 2, "adherence")
        tensor([0.5000, 1.0000])
    """
    if not isinstance(scores, Tensor):
        raise ValueError(
            f"Reward `{name}` returned {type(scores).__name__}; return a float tensor [B] with one score a clip "
            "(for a list: torch.tensor(scores))."
        )
    if scores.is_complex() or scores.dtype == torch.bool:
        raise ValueError(f"Reward `{name}` returned {scores.dtype}; return a float tensor [B], e.g. scores.float().")
    if scores.shape != (batch_size,):
        raise ValueError(
            f"Reward `{name}` returned shape {tuple(scores.shape)} for {batch_size} clips; return one score a clip, "
            f"shape ({batch_size},)."
        )
    scores = scores.detach().float()
    if not torch.isfinite(scores).all():
        wrong = (~torch.isfinite(scores)).nonzero()[:, 0].tolist()
        raise ValueError(
            f"Reward `{name}` returned NaN or infinite scores for clip(s) {wrong[:8]} of {batch_size}: "
            f"{scores[wrong[:8]].tolist()}; look at these clips and at the reward's own divisions and logarithms."
        )
    return scores


def check_reward_inputs(prompts: list[str], audio: Tensor, sampling_rate: int) -> None:
    """Refuse what no reward can score.

    Raises:
        ValueError: `audio` not a finite float [B, C, T], `prompts` not B strings, `sampling_rate` not a whole number of
            Hz above 0.
    """
    check_audio(audio)
    if audio.dim() != 3:
        raise ValueError(f"`audio` must be [B, C, T], got shape {tuple(audio.shape)}; add the batch with audio[None].")
    if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"`prompts` must be a list of strings, one a clip, got {type(prompts).__name__}.")
    if len(prompts) != len(audio):
        raise ValueError(f"`prompts` holds {len(prompts)} texts for {len(audio)} clips; give one prompt a clip.")
    check_sampling_rate(sampling_rate)


def check_sampling_rate(sampling_rate: int) -> None:
    """ValueError unless `sampling_rate` is a whole number of Hz above 0."""
    is_whole = isinstance(sampling_rate, int | np.integer) and not isinstance(sampling_rate, bool)
    if not is_whole or sampling_rate <= 0:
        raise ValueError(f"`sampling_rate` must be a whole number of Hz above 0, got {sampling_rate!r}.")
