"""What rewards say of the clips that RLOO and GRPO sample, as TRL asks for it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import get_callable_name

from ..flat import FlatMusicRLForCausalLM, unflatten_codes
from ..rewards import CombinedReward, Reward
from ..rewards.combine import joined
from ..rewards.contract import ask_reward, check_scores
from .processes import combine_over_processes
from .scoring import BackgroundScoring, Chunk, questions_of


class ClipReward:
    """A reward on sound, as TRL calls rewards: on lists of ids.

    Args:
        reward: a callable (prompts, audio [B, C, T], sampling rate in Hz) -> scores [B].
        rollouts: the clips of one trainer, which hears all its rewards at once.
    """

    def __init__(self, reward: Reward, rollouts: "Rollouts"):
        self.reward = reward
        self.rollouts = rollouts
        self.__name__ = get_callable_name(reward)
        rollouts.rewards.append(self)

    def __call__(
        self,
        prompts: list[str],
        completion_ids: list[list[int]],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float]:
        """One score a clip; the components of a combination go to the log."""
        components = self.rollouts.heard(prompts, completion_ids)[self.rollouts.rewards.index(self)]
        if not isinstance(self.reward, CombinedReward):
            return components["reward"].tolist()
        for name, values in components.items():
            log_metric(f"rewards/{name}/mean", values.mean().item())
        return check_scores(combine_over_processes(self.reward, components), len(prompts), self.__name__).tolist()

    def components(self, chunk: Chunk) -> dict[str, Tensor]:
        """What it says of a chunk: the parts of a combination, or its scores as "reward"."""
        if isinstance(self.reward, CombinedReward):
            return self.reward.components(*chunk)
        return {"reward": ask_reward(self.reward, *chunk, self.__name__).cpu()}


class Rollouts:
    """Sampled ids to sound and to what rewards say of it: so many clips at once, decoded once for all rewards.

    Args:
        generator: whose ids they are.
        size: clips decoded and scored at once.
        rewards_at: where rewards get them; None for where the generator is.

    Attributes:
        rewards: those that hear every clip.
    """

    def __init__(self, generator: FlatMusicRLForCausalLM, size: int = 64, rewards_at: torch.device | None = None):
        self.generator, self.size, self.rewards_at = generator, size, rewards_at
        self.rewards: list[ClipReward] = []
        self._prompts: list[str] = []
        self._background: BackgroundScoring | None = None
        self._ids: list[list[int]] | None = None
        self._heard: list[dict[str, Tensor]] = []

    @contextmanager
    def listening(self, prompts: list[str]) -> Iterator[None]:
        """While clips for `prompts` are sampled, score in a thread what is added."""
        questions = [question for reward in self.rewards for question in questions_of(reward.reward, reward.__name__)]
        self._prompts = list(prompts)
        try:
            with BackgroundScoring(questions, self.generator.device) as self._background:
                yield
        finally:
            self._background = None

    def forget(self) -> None:
        """Let go of the last clips."""
        self._ids, self._heard = None, []

    def add(self, completion_ids: Sequence[Sequence[int]]) -> None:
        """The next clips that were sampled; they wait for :meth:`heard` where nobody is listening."""
        if self._background is not None:
            prompts, self._prompts = self._prompts[: len(completion_ids)], self._prompts[len(completion_ids) :]
            self._background.add(self._decoded(prompts, completion_ids))

    @torch.no_grad()
    def heard(self, prompts: list[str], completion_ids: list[list[int]]) -> list[dict[str, Tensor]]:
        """Of each reward its :meth:`ClipReward.components` [B] of flat ids [B][K * F]; asked once for the same list of ids."""
        if completion_ids is self._ids:
            return self._heard
        if self._background is not None:
            answers = iter(self._background.answers())
            self._heard = [{name: next(answers) for name in _names(reward.reward)} for reward in self.rewards]
        else:
            starts = range(0, len(prompts), self.size)
            chunks = [self._asked(prompts[i : i + self.size], completion_ids[i : i + self.size]) for i in starts]
            self._heard = [joined(of_one) for of_one in zip(*chunks, strict=True)]
        self._ids = completion_ids
        return self._heard

    def _asked(self, prompts: list[str], completion_ids: Sequence[Sequence[int]]) -> list[dict[str, Tensor]]:
        """What every reward says of one chunk, whose sound is let go with that."""
        chunk = self._decoded(prompts, completion_ids)
        return [reward.components(chunk) for reward in self.rewards]

    @torch.no_grad()
    def _decoded(self, prompts: list[str], completion_ids: Sequence[Sequence[int]]) -> Chunk:
        config = self.generator.config
        flat = torch.tensor(completion_ids, device=self.generator.device)
        codes = unflatten_codes(flat, config.num_codebooks, config.codebook_size, config.audio_channels)
        audio = self.generator.decode_codes(codes)
        return prompts, audio.to(self.rewards_at or audio.device), self.generator.sampling_rate


def _names(reward: Reward) -> list[str]:
    return list(reward.rewards) if isinstance(reward, CombinedReward) else ["reward"]
