"""What rewards say of sampled clips: once all are sampled, or beside the sampling in a thread."""

import ctypes
import threading
import time
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from ..generator import MusicRLForConditionalGeneration
from ..rewards import CombinedReward, Reward, check_reward_inputs
from ..rewards.combine import joined
from ..rewards.contract import ask_reward, late_answer
from .ppo_config import MusicPPOConfig
from .processes import combine_over_processes
from .seconds import Seconds

Chunk = tuple[list[str], Tensor, int]  # what a reward is asked about: prompts, audio, sampling rate
_GRACE_S = 5.0  # for a reward to stop in, after a fault


class ClipScorer:
    """Decodes clips and asks the rewards.

    Args:
        generator: whose codes the clips are.
        reward: what is trained on.
        watch: name -> reward that evaluations score the clips with too.
        args: of the training.
        seconds: where the time of decoding and scoring is counted.
    """

    def __init__(
        self,
        generator: MusicRLForConditionalGeneration,
        reward: Reward,
        watch: dict[str, Reward],
        args: MusicPPOConfig,
        seconds: Seconds,
    ) -> None:
        self.generator, self.reward, self.args, self.seconds = generator, reward, args, seconds
        self.combined = reward if isinstance(reward, CombinedReward) else None
        if self.combined:
            args.check_enough(args.clips_per_rollout * args.world_size, self.combined.normalise)
        parts, timeout_s = (self.combined.rewards, self.combined.timeout_s) if self.combined else ({}, 0.0)
        # What is also trained on is scored once.
        self._watched_parts = [name for name, part in watch.items() if parts.get(name) is part]
        others = {name: part for name, part in watch.items() if name not in self._watched_parts}
        self._watch = CombinedReward(others, timeout_s=timeout_s) if others else None

    def decode(self, prompts: list[str], codes: Tensor) -> Chunk:
        """The sound of codes [B, K, F] with its prompts, on the rewards' device."""
        length = round(self.args.duration_s * self.generator.sampling_rate)
        audio = self.generator.decode_codes(codes, length)
        return prompts, audio.to(self.args.rewards_at), self.generator.sampling_rate

    def score(self, prompts: list[str], codes: Tensor, evaluating: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards [B] of codes [B, K, F], and the mean of each part where the reward is a `CombinedReward`.

        Args:
            evaluating: score what is watched too, on the same sound; and leave out what a `CombinedReward` normalises over
                the clips of a call (the weighted sum remains), which would make any two evaluations alike.
        """
        size = self.args.local_rollout_forward_batch_size
        starts = range(0, len(prompts), size)
        heard = [self._hear(prompts[i : i + size], codes[i : i + size], evaluating) for i in starts]
        components, others = joined([asked for asked, _ in heard]), joined([watched for _, watched in heard])
        if self.combined is None:
            scores = components.pop("reward")
        else:
            plain = CombinedReward(self.combined.rewards, self.combined.weights)
            scores = plain.combine(components) if evaluating else combine_over_processes(self.combined, components)
        means = {f"reward/{name}": values.mean() for name, values in components.items()}
        if evaluating:
            others |= {name: components[name] for name in self._watched_parts}
            means |= {f"watch/{name}": values.mean() for name, values in others.items()}
        return scores.to(codes.device), means

    def _hear(self, prompts: list[str], codes: Tensor, evaluating: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is said of one chunk by the reward, or each part of it, and by what is watched; its sound is let go with that."""
        with self.seconds.of("decode"):
            chunk = self.decode(prompts, codes)
        with self.seconds.of("score"):
            combined = self.combined
            asked = combined.components(*chunk) if combined else {"reward": ask_reward(self.reward, *chunk)}
            watched = self._watch.components(*chunk) if evaluating and self._watch is not None else {}
        return asked, watched


class BackgroundScoring:
    """Scores the chunks of one set of clips in a thread, while the caller samples the next.

    The caller decodes, and alone touches generator, CUDA graphs and seconds; the thread asks the rewards, chunk after chunk,
    and nothing else. A fault of a reward is raised where the caller adds a chunk or asks for the scores. The thread is a
    daemon: no reward that hangs keeps the process from its end.

    Example:
        >>> with BackgroundScoring(scorer) as background:  # doctest: +SKIP
        ...     for prompts, codes in sampled:
        ...         background.add(prompts, codes)
        ...     scores, means = background.scores()
    """

    def __init__(self, scorer: ClipScorer) -> None:
        self._scorer, combined = scorer, scorer.combined
        self._rewards = {"reward": scorer.reward} if combined is None else combined.rewards
        self._timeout_s = 0.0 if combined is None else combined.timeout_s
        self._sizes: list[int] = []
        self._chunks: SimpleQueue[Chunk | None] = SimpleQueue()
        # For each chunk and reward two answers: the time at which it was asked, and its scores or what it raised.
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

    def add(self, prompts: list[str], codes: Tensor) -> None:
        """Have the next codes [B, K, F] scored; what a reward raised for others before them is raised here."""
        if self._fault is not None:
            raise self._fault
        with self._scorer.seconds.of("decode"):
            chunk = self._scorer.decode(prompts, codes)
        if self._scorer.combined is not None:
            check_reward_inputs(*chunk)
        self._sizes.append(len(prompts))
        self._chunks.put(chunk)

    def scores(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What `ClipScorer.score` gives for all clips that were added, once the last reward has answered.

        Raises:
            ValueError: a reward raised, or its scores are refused.
            TimeoutError: one has not answered for a chunk within the time limit of the `CombinedReward`.
        """
        with self._scorer.seconds.of("score"):
            chunks = [{name: self._answer(name, clips) for name in self._rewards} for clips in self._sizes]
            components = joined(chunks)
            combined, device = self._scorer.combined, self._scorer.generator.device
            if combined is None:
                return components["reward"].to(device), {}
            scores = combine_over_processes(combined, components)
        return scores.to(device), {f"reward/{name}": values.mean() for name, values in components.items()}

    def _answer(self, name: str, clips: int) -> Tensor:
        """The next answer; signals are heard while it is waited for."""
        asked_at = self._next()
        left = max(asked_at + self._timeout_s - time.monotonic(), 0) if self._timeout_s else None
        try:
            return self._next(left)
        except Empty:
            raise late_answer(name, clips, self._timeout_s) from None

    def _next(self, timeout_s: float | None = None):
        answer = self._answers.get(timeout=timeout_s)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @torch.no_grad()  # a thread begins with gradients and without autocast, and is asked as the main thread would be
    def _ask(self) -> None:
        try:
            if (index := self._scorer.args.device.index) is not None:  # a thread begins at the first GPU
                torch.accelerator.set_device_index(index)
            while (chunk := self._chunks.get()) is not None:
                for name, reward in self._rewards.items():
                    if self._left:
                        return
                    self._answers.put(time.monotonic())
                    self._answers.put(ask_reward(reward, *chunk, name).cpu())
        except BaseException as error:  # a reward may also exit
            self._fault = error
            self._answers.put(error)
