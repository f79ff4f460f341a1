"""Clips to rewards: decoded, and heard by what is trained on and by what is watched."""

from torch import Tensor

from ..generator import MusicRLForConditionalGeneration
from ..rewards import CombinedReward, Reward
from ..rewards.combine import joined
from ..rewards.contract import ask_reward
from .processes import combine_over_processes
from .scoring import BackgroundScoring, Chunk, ScoringArguments, questions_of
from .seconds import Seconds


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
        args: ScoringArguments,
        seconds: Seconds,
    ) -> None:
        self.generator, self.reward, self.args, self.seconds = generator, reward, args, seconds
        self.combined = reward if isinstance(reward, CombinedReward) else None
        parts, timeout_s = (self.combined.rewards, self.combined.timeout_s) if self.combined else ({}, 0.0)
        # What is also trained on is scored once.
        self._watched_parts = [name for name, part in watch.items() if parts.get(name) is part]
        others = {name: part for name, part in watch.items() if name not in self._watched_parts}
        self._watch = CombinedReward(others, timeout_s=timeout_s) if others else None

    def decode(self, prompts: list[str], codes: Tensor) -> Chunk:
        """The sound of codes [B, K, F] with its prompts, on the rewards' device."""
        with self.seconds.of("decode"):
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
        scores, means = self._combine(components, evaluating)
        if evaluating:
            others |= {name: components[name] for name in self._watched_parts}
            means |= {f"watch/{name}": values.mean() for name, values in others.items()}
        return scores, means

    def in_background(self) -> BackgroundScoring:
        """For a set of clips whose chunks, as `decode` gives them, are scored while the next are sampled."""
        return BackgroundScoring(questions_of(self.reward), self.args.device)

    def collect(self, background: BackgroundScoring) -> tuple[Tensor, dict[str, Tensor]]:
        """What `score` gives, of the clips that were added to `background`, once the last reward has answered."""
        with self.seconds.of("score"):
            names = [question.name for question in questions_of(self.reward)]
            return self._combine(dict(zip(names, background.answers(), strict=True)))

    def _combine(self, components: dict[str, Tensor], evaluating: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards [B] from those of the parts, or of the reward itself, and the mean of each part."""
        device = self.generator.device
        if self.combined is None:
            return components.pop("reward").to(device), {}
        plain = CombinedReward(self.combined.rewards, self.combined.weights)
        scores = plain.combine(components) if evaluating else combine_over_processes(self.combined, components)
        return scores.to(device), {f"reward/{name}": values.mean() for name, values in components.items()}

    def _hear(self, prompts: list[str], codes: Tensor, evaluating: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is said of one chunk by the reward, or each part of it, and by what is watched; its sound is let go with that."""
        chunk, combined = self.decode(prompts, codes), self.combined
        with self.seconds.of("score"):
            asked = combined.components(*chunk) if combined else {"reward": ask_reward(self.reward, *chunk)}
            watched = self._watch.components(*chunk) if evaluating and self._watch is not None else {}
        return asked, watched
