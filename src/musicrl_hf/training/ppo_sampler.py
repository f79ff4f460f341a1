"""Which prompts each set of clips is sampled for, and with which seed."""

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class RolloutSampler(Sampler[int]):
    """Indices of prompts for a whole run: `size` for each set of clips, and those `repeats` times, once a forward pass.

    In a set each prompt comes `generations` times, side by side; `size` is a multiple of that.

    The prompts are shuffled again and again without end, so that every prompt comes as often as any other; the whole run is
    one epoch, so that skipping to any step finds the same prompts.
    """

    def __init__(
        self, num_prompts: int, size: int, repeats: int, rollouts: int, seed: int, generations: int = 1
    ) -> None:
        self.num_prompts, self.size, self.repeats, self.rollouts, self.seed = num_prompts, size, repeats, rollouts, seed
        self.generations = generations

    def __len__(self) -> int:
        return self.rollouts * self.repeats * self.size

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(self.seed)
        shuffles = (torch.randperm(self.num_prompts, generator=random).tolist() for _ in itertools.count())
        stream = itertools.chain.from_iterable(shuffles)
        for _ in range(self.rollouts):
            drawn = itertools.islice(stream, self.size // self.generations)
            prompts = [prompt for prompt in drawn for _ in range(self.generations)]
            for _ in range(self.repeats):
                yield from prompts


EVALUATION = 65_536  # in the place of a process: no rollout has the clips of an evaluation


def clip_seed(seed: int, number: int, process: int) -> int:
    """A seed of its own for each set of clips and each process."""
    return ((seed * 1_000_003 + number) * 65_537 + process) % 2**63


def check_prompts(name: str, prompts: Sequence[str]) -> None:
    """ValueError unless `prompts`, an argument called `name`, is a list of texts."""
    if isinstance(prompts, str) or len(prompts) == 0 or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"`{name}` must be a list of at least one prompt (text), got {prompts!r:.80}.")
