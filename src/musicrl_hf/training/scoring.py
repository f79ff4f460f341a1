"""How sampled clips are scored: so many at once, on which device, and once all are sampled or beside the sampling in a thread."""

import ctypes
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..devices import find_device
from ..rewards import CombinedReward, Reward, check_reward_inputs
from ..rewards.contract import ask_reward, late_answer
from .job import option

Chunk = tuple[list[str], Tensor, int]  # what a reward is asked about: prompts, audio, sampling rate
_GRACE_S = 5.0  # for a reward to stop in, after a fault


@dataclass(kw_only=True)
class ScoringSettings:
    """What PPO, RLOO and GRPO share; `num_generations` is each method's own."""

    local_rollout_forward_batch_size: int = option(64, "clips sampled and scored at once on each process")
    reward_device: str | None = option(
        None, 'device that rewards run on and get their clips on, such as "cpu" or "cuda:1"; none for the policy\'s'
    )
    score_in_background: bool = option(
        False,
        "score clips while the next local_rollout_forward_batch_size are sampled; the numbers are the same. It helps where "
        "rewards run on another device (reward_device) or wait for a server. With the policy on a GPU set reward_device too "
        "(cpu for a server): a GPU does its work in turn",
    )

    def check_scoring(self, clips: int) -> None:
        """ValueError for what does not go with so many clips of a set on each process."""
        if self.local_rollout_forward_batch_size < 1:
            raise ValueError(
                f"`local_rollout_forward_batch_size` must be at least 1, got {self.local_rollout_forward_batch_size!r}."
            )
        if self.score_in_background and clips <= self.local_rollout_forward_batch_size:
            raise ValueError(
                f"`score_in_background` = True scores a part of a set while the next is sampled, but "
                f"`local_rollout_forward_batch_size` = {self.local_rollout_forward_batch_size} takes the {clips} clips of a "
                "set on each process at once; set it lower, best to half of them or less, or score_in_background to False."
            )

    def check_groups(self, clips: int) -> None:
        """ValueError where a reward that compares the clips of a prompt would not hear them together, of `clips` on each process."""
        heard, of_a_prompt = self.local_rollout_forward_batch_size, int(vars(self)["num_generations"])
        if of_a_prompt < 2 or clips % of_a_prompt or (clips > heard and heard % of_a_prompt):
            raise ValueError(
                f"`reward` compares the clips of a prompt, as variety does: `num_generations` = {of_a_prompt} must be at least "
                f"2 and divide the {clips} clips of a set on each process, and `local_rollout_forward_batch_size` = {heard}, "
                f"which are scored at once, be a multiple of it or at least those {clips}."
            )

    def rewards_on(self, policy: torch.device) -> torch.device:
        """Where rewards get their clips: on `reward_device`, or else where the policy is."""
        return find_device(self.reward_device, "reward_device") if self.reward_device else policy


class ScoringArguments(Protocol):
    """What scoring reads of a trainer's arguments."""

    duration_s: float
    local_rollout_forward_batch_size: int

    @property
    def device(self) -> torch.device: ...

    @property
    def rewards_at(self) -> torch.device: ...


class Question(NamedTuple):
    """A reward that answers alone.

    Attributes:
        name: in messages.
        reward: who is asked.
        timeout_s: seconds that it may take for a chunk; 0 for as long as it likes.
        of_combination: whether clips are looked at before it is asked, as a `CombinedReward` does.
    """

    name: str
    reward: Reward
    timeout_s: float
    of_combination: bool


def questions_of(reward: Reward, name: str = "reward") -> list[Question]:
    """A combination's parts, or the reward itself, called `name`."""
    if isinstance(reward, CombinedReward):
        return [Question(part, alone, reward.timeout_s, True) for part, alone in reward.rewards.items()]
    return [Question(name, reward, 0.0, False)]


class BackgroundScoring:
    """Asks rewards about the chunks of one set of clips in a thread, while the caller samples the next.

    The caller decodes, and alone touches generator, CUDA graphs and seconds; the thread asks the rewards, chunk after chunk,
    and nothing else. A fault of a reward is raised where the caller adds a chunk or asks for the answers. The thread is a
    daemon: no reward that hangs keeps the process from its end.

    Args:
        questions: what is asked of every chunk.
        policy: the policy's device.

    Example:
        >>> with BackgroundScoring(questions_of(reward), device) as background:  # doctest: +SKIP
        ...     for chunk in sampled:
        ...         background.add(chunk)
        ...     answers = background.answers()
    """

    def __init__(self, questions: Sequence[Question], policy: torch.device) -> None:
        self._questions, self._policy = questions, policy
        self._sizes: list[int] = []
        self._chunks: SimpleQueue[Chunk | None] = SimpleQueue()
        # For each chunk and question two answers: the time at which it was asked, and its scores or what it raised.
        self._answers: SimpleQueue[float | Tensor | BaseException] = SimpleQueue()
        self._fault: BaseException | None = None
        self._left = False
        self._thread = threading.Thread(target=self._ask, name="rewards", daemon=True)

    def __enter__(self) -> "BackgroundScoring":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._left = True
        self._chunks.put(None)
        if kind is None:
            self._thread.join()
            return
        # What comes back to Python now and then is stopped, as a main thread's time limit would stop it; what does not is left
        # to hang. A thread that is still inside of torch when the process ends would abort it.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(self._thread.ident or 0), ctypes.py_object(SystemExit)
        )
        self._thread.join(_GRACE_S)

    def add(self, chunk: Chunk) -> None:
        """Have the next clips scored; what a reward raised for others before them is raised here."""
        if self._fault is not None:
            raise self._fault
        if any(question.of_combination for question in self._questions):
            check_reward_inputs(*chunk)
        self._sizes.append(len(chunk[0]))
        self._chunks.put(chunk)

    def answers(self) -> list[Tensor]:
        """Of each question the scores [B], on the CPU, of all clips that were added, once the last reward has answered.

        Raises:
            ValueError: a reward raised, or its scores are refused.
            TimeoutError: one has not answered for a chunk within its time.
        """
        chunks = [[self._answer(question, clips) for question in self._questions] for clips in self._sizes]
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def _answer(self, question: Question, clips: int) -> Tensor:
        """The next answer; signals are heard while it is waited for."""
        asked_at, timeout_s = self._next(), question.timeout_s
        left = max(asked_at + timeout_s - time.monotonic(), 0) if timeout_s else None
        try:
            return self._next(left)
        except Empty:
            raise late_answer(question.name, clips, timeout_s) from None

    def _next(self, timeout_s: float | None = None):
        answer = self._answers.get(timeout=timeout_s)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @torch.no_grad()  # a thread begins with gradients and without autocast, and is asked as the main thread would be
    def _ask(self) -> None:
        try:
            if (index := self._policy.index) is not None:  # a thread begins at the first GPU
                torch.accelerator.set_device_index(index)
            while (chunk := self._chunks.get()) is not None:
                for question in self._questions:
                    if self._left:
                        return
                    self._answers.put(time.monotonic())
                    self._answers.put(ask_reward(question.reward, *chunk, question.name).cpu())
        except BaseException as error:  # a reward may also exit
            self._fault = error
            self._answers.put(error)
