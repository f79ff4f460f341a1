"""`musicrl pairs`: pairs sampled from generators, chosen between by simulated listeners or by a reward.

With a reward that was learned from votes, on pairs of the model at hand, this and `musicrl dpo` in turn are iterated DPO
(Xu et al. 2023, "Some things are more cringe than others", arXiv 2312.16682; Yuan et al. 2024, arXiv 2401.10020).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .audio import MAX_DURATION_S
from .devices import find_device, find_dtype
from .evaluation.report import label_models
from .generator import load_generator
from .places import check_output, find_model, weights_of
from .preferences.listeners import REWARD, Judgement, simulated_listeners
from .preferences.pairs import Listener, sample_pairs
from .preferences.schema import load_preferences, read_prompts
from .rewards.combine import find_rewards, label_specs, model_of, move_reward, split_specs
from .rewards.contract import Reward, ask_reward

BUNDLED_PROMPTS = Path(__file__).parent / "prompts" / "train.txt"


class RewardListener:
    """A reward in a listener's place: it chooses the clip that it scores higher, and calls equal scores a tie.

    Its name begins with "reward:", in every row that it labels, so that nobody takes its choices for votes of people. As
    every listener it hears both clips at one loudness.

    Args:
        reward: any reward.
        name: of the reward, such as "preference:reward"; without folders, as rows are published.

    Example:
        >>> loudest = RewardListener(lambda prompts, audio, rate: audio.abs().amax((1, 2)), "loudest")
        >>> loudest.name, loudest("a reel", torch.zeros(1, 800), torch.ones(1, 800), 16000).preference
        ('reward:loudest', 'b')
    """

    def __init__(self, reward: Reward, name: str):
        self.reward, self.name = reward, f"{REWARD}{name}"

    def __call__(self, prompt: str, audio_a: Tensor, audio_b: Tensor, sampling_rate: int) -> Judgement:
        """Choose between two clips [C, T]; no confidence is given, for rewards have no common scale.

        Raises:
            ValueError: the reward raised, or gave no finite scores.
        """
        clips = torch.stack([audio_a, audio_b])
        first, second = ask_reward(self.reward, [prompt] * 2, clips, sampling_rate, self.name).tolist()
        return Judgement("tie" if first == second else "a" if first > second else "b", None)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class PairsJob:
    """What `musicrl pairs` takes: who plays, who chooses, and where the rows go."""

    model: str = _option("musicrl-tiny", "generator: bundled name, folder or Hub id; or label=name")
    against: str | None = _option(None, "generator of the other clip of each pair; none for the same one")
    prompts: str | None = _option(None, "text file, one prompt a line; none for the bundled prompts")
    out: str = field(metadata={"help": "folder for the preferences"})
    label_with: list[str] = field(
        default_factory=list,
        metadata={
            "help": "reward that chooses instead of simulated listeners, as of `musicrl score`; several are added up"
        },
    )
    listeners: int = _option(12, "size of the population of simulated listeners")
    pairs_per_prompt: int = _option(1, "pairs for each prompt")
    votes_per_pair: int = _option(1, "different listeners who choose between the clips of a pair, a row each")
    duration_s: float = _option(5.0, "seconds a clip")
    temperature: float = _option(1.0, "of sampling")
    top_k: int | None = _option(None, "likeliest codes to sample from; none for all")
    guidance_scale: float = _option(1.0, "classifier-free guidance; 1 is none, and samples the model that is tuned")
    batch_size: int = _option(8, "pairs sampled together")
    device: str | None = _option(None, "cpu, cuda, mps ...; none for the accelerator that there is, else the CPU")
    dtype: str = _option("float32", "of the generators: float32, bfloat16 or float16")
    seed: int = _option(0, "of sampling and listeners")

    def __post_init__(self) -> None:
        for name in ("listeners", "pairs_per_prompt", "votes_per_pair", "batch_size"):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}` must be at least 1, got {vars(self)[name]!r}.")
        if self.label_with and self.votes_per_pair > 1:
            raise ValueError(
                f"`votes_per_pair` is {self.votes_per_pair}, but `label_with` {self.label_with} is one judge: leave one out."
            )
        if self.votes_per_pair > self.listeners:
            raise ValueError(
                f"`votes_per_pair` is {self.votes_per_pair}, but there are {self.listeners} `listeners`: have more of them."
            )
        if not 0 < self.duration_s <= MAX_DURATION_S:
            raise ValueError(f"`duration_s` must be in (0, {MAX_DURATION_S:g}] seconds, got {self.duration_s!r}.")


def run_pairs(job: PairsJob) -> Path:
    """Sample the pairs, have them chosen between, and print what came out.

    Returns:
        `out`, a folder of preferences.

    Raises:
        ValueError: an unknown model or reward, an empty prompt file, an `out` that holds something else.
        FileNotFoundError: no such prompt file.
    """
    check_output(job.out, "preferences", "out")
    models = label_models([job.model, *([job.against] if job.against else [])])
    for name in models.values():
        find_model(name, "musicgen", "model")
    load_reward = find_rewards(job.label_with) if job.label_with else None
    prompts = read_prompts(job.prompts or BUNDLED_PROMPTS)
    device = find_device(job.device)
    listeners: Sequence[Listener] = simulated_listeners(job.listeners, job.seed)
    if load_reward is not None:
        reward = load_reward()
        move_reward(reward, device)
        (label,) = label_specs([" + ".join(job.label_with)], "label_with")
        listeners = [RewardListener(reward, label)]
    generators = [load_generator(name, device=device, dtype=find_dtype(job.dtype)) for name in models.values()]
    labels = list(models)
    judges = [judge for spec in split_specs(job.label_with) if (judge := model_of(spec))] if job.label_with else []
    out = sample_pairs(
        generators[0],
        prompts,
        job.out,
        listeners=listeners,
        name=labels[0],
        against=generators[1] if job.against else None,
        against_name=labels[1] if job.against else None,
        duration_s=job.duration_s,
        pairs_per_prompt=job.pairs_per_prompt,
        votes_per_pair=job.votes_per_pair,
        batch_size=job.batch_size,
        temperature=job.temperature,
        top_k=job.top_k,
        guidance_scale=job.guidance_scale,
        seed=job.seed,
        weights=[weights_of(name) for name in (*models.values(), *judges)],
    )
    print(_told(load_preferences(out)["preference"], listeners))
    return out


def _told(choices: Sequence[str], listeners: Sequence[Listener]) -> str:
    counts = ", ".join(f"{count} {choice}" for choice, count in sorted(Counter(choices).items()))
    who = f"{len(listeners)} simulated listeners" if len(listeners) > 1 else listeners[0].name
    return f"{len(choices)} rows ({counts}), chosen by {who}: nobody listened."
