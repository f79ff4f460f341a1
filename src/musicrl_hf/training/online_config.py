"""Settings of RLOO and GRPO: the trainers', and the flat jobs that YAML files fill."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import GRPOConfig, RLOOConfig

from ..audio import MAX_DURATION_S
from ..rewards.combine import NORMALISE, split_specs
from .held_out import HeldOutSettings
from .job import BF16_HELP, NORMALISE_HELP, TrainingJob, option
from .scoring import ScoringSettings

# TRL's that take an importance ratio a token
GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
SCALES = ("group", "batch", "none")


@dataclass
class RolloutArguments(ScoringSettings):
    """What both configs add to TRL's, and what neither may ask for."""

    duration_s: float = option(5.0, "length of the sampled clips, in seconds (at most 30)")
    max_completion_length: int | None = option(None, "must stay empty: `duration_s` decides")
    num_generations_eval: int | None = option(1, "must stay 1: an evaluation samples one clip of each held-out prompt")
    disable_dropout: bool = option(True, "must stay true: the clips are scored by the policy that sampled them")
    gradient_checkpointing: bool | None = option(
        None, "off here, where TRL has it on; activation_checkpointing turns it on"
    )
    bf16: bool = option(False, BF16_HELP)
    report_to: str | list[str] | None = option("none", "where to report to")
    ddp_find_unused_parameters: bool | None = option(False, "every trained parameter takes part in each step")

    def __post_init__(self) -> None:
        self.check_rollouts()
        super().__post_init__()  # type: ignore[misc]  # TRL's
        self.check_scoring(self.clips_per_rollout)
        _ = self.rewards_at  # a device that is not there is known before anything is loaded

    @property
    def clips_per_rollout(self) -> int:
        """Clips of a set on each process."""
        return int(vars(self)["per_device_train_batch_size"] * vars(self)["steps_per_generation"])

    @property
    def rewards_at(self) -> torch.device:
        """Where rewards get their clips: on `reward_device`, or else where the policy is."""
        return self.rewards_on(self.device)  # type: ignore[attr-defined]

    def check_rollouts(self) -> None:
        """ValueError for options of language models that would break training on clips, each with the reason."""
        refused = {
            "mask_truncated_completions": "music has no end-of-sequence id, so every clip would be masked and every "
            "gradient be zero",
            "use_vllm": "vLLM does not know the delayed codebooks",
            "use_transformers_continuous_batching": "the generator has its own sampler",
            "max_completion_length": "a clip has codebooks x frames ids: set `duration_s` instead",
            "cast_lm_head_to_fp32": "the scores are float32 already",
        }
        for name, reason in refused.items():
            if vars(self).get(name):
                raise ValueError(f"`{name}` = {vars(self)[name]!r} is not for music: {reason}; leave it unset.")
        if not self.disable_dropout:
            raise ValueError("`disable_dropout` = False: the policy would differ from its own samples; leave it True.")
        if self.num_generations_eval != 1:
            raise ValueError(
                f"`num_generations_eval` = {self.num_generations_eval!r}: an evaluation samples one clip of each held-out "
                "prompt; leave it 1, and give more prompts."
            )
        if not 0 < self.duration_s <= MAX_DURATION_S:
            raise ValueError(f"`duration_s` must be in (0, {MAX_DURATION_S:g}] seconds, got {self.duration_s!r}.")


@dataclass
class MusicRLOOConfig(RolloutArguments, RLOOConfig):
    """TRL's `RLOOConfig` for clips of `duration_s` seconds."""


@dataclass
class MusicGRPOConfig(RolloutArguments, GRPOConfig):
    """TRL's `GRPOConfig` for clips of `duration_s` seconds."""


@dataclass(kw_only=True)
class RolloutJob(ScoringSettings, HeldOutSettings, TrainingJob):
    """What both jobs share."""

    prompts: str = field(metadata={"help": "text file, one prompt a line"})
    reward: list[str] = option(["adherence"], "rewards, each a name or weight*name; see `musicrl score --help`")
    normalise: str = option("none", NORMALISE_HELP)
    reward_timeout_s: float = option(
        600.0,
        "seconds that a reward may take for one batch of clips, or until a call of C that it is in returns; 0 for no limit",
    )
    duration_s: float = option(5.0, "length of the sampled clips, in seconds (at most 30)")
    temperature: float = option(1.0, "sampling temperature, also of the scored distribution")
    num_generations: int = option(4, "clips a prompt, compared with each other")
    num_iterations: int = option(1, "optimiser steps on each set of sampled clips")
    epsilon: float = option(0.2, "the ratio to the sampling policy is clipped to 1 -/+ this")
    sample_steps: int = option(0, "optimiser steps between two sets of clips to hear; 0 for none")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "epsilon"):
            if not vars(self)[name] >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {vars(self)[name]!r}.")
        if self.num_iterations < 1:
            raise ValueError(f"`num_iterations` must be at least 1, got {self.num_iterations!r}.")
        if self.max_kl is not None and not vars(self)["beta"]:
            raise ValueError(
                f"`max_kl` = {self.max_kl!r} needs a `beta` above 0, such as 1e-6: without one TRL measures no KL."
            )
        if not self.reward:
            raise ValueError("`reward` is empty; name at least one, such as adherence.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature!r}.")
        if self.normalise not in NORMALISE:
            raise ValueError(f"`normalise` must be one of {', '.join(NORMALISE)}, got {self.normalise!r}.")
        if self.sample_steps < 0:
            raise ValueError(f"`sample_steps` must be at least 0, got {self.sample_steps!r}.")
        of_a_process = self.per_device_train_batch_size * self.gradient_accumulation_steps
        clips = of_a_process * int(os.environ.get("WORLD_SIZE", 1))
        if self.num_generations < 2 or clips % self.num_generations:
            raise ValueError(
                f"`num_generations` = {self.num_generations} must be at least 2 and divide the {clips} clips of a step "
                "(`per_device_train_batch_size` x `gradient_accumulation_steps` x processes)."
            )
        self.check_scoring(of_a_process)
        self.check_held_out()
        if "variety" in split_specs(self.reward):
            self.check_groups(of_a_process)
        if self.save_steps % self.num_iterations:
            raise ValueError(
                f"`save_steps` = {self.save_steps} must be a multiple of `num_iterations` = {self.num_iterations}: a set "
                "of clips is used up before anything is saved, so that a resumed run goes on exactly."
            )

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps made on each set of sampled clips."""
        return self.num_iterations

    def rollout_arguments(self) -> dict[str, Any]:
        """The trainer's arguments that both jobs share."""
        names = (
            "duration_s",
            "temperature",
            "num_generations",
            "num_iterations",
            "epsilon",
            *ScoringSettings.__dataclass_fields__,
        )
        return self.shared_arguments() | self.held_out_arguments() | {name: vars(self)[name] for name in names}


@dataclass(kw_only=True)
class RLOOJob(RolloutJob):
    """One RLOO run, as a flat YAML file or command line describes it."""

    beta: float = option(0.05, "reward lost a nat of KL to the reference, over the whole clip")
    normalize_advantages: bool = option(False, "scale the advantages of a batch to unit deviation")

    def trainer_config(self) -> MusicRLOOConfig:
        """The trainer's arguments for this job."""
        own: dict[str, Any] = {"beta": self.beta, "normalize_advantages": self.normalize_advantages}
        return MusicRLOOConfig(**self.rollout_arguments(), **own)


@dataclass(kw_only=True)
class GRPOJob(RolloutJob):
    """One GRPO run, as a flat YAML file or command line describes it."""

    beta: float = option(0.04, "weight of the KL to the reference, a code")
    loss_type: str = option("dapo", "TRL's name of the loss: dapo, grpo, dr_grpo, ...")
    scale_rewards: str = option("group", "divide advantages by the deviation of the group, the batch, or none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type not in GRPO_LOSSES:
            raise ValueError(f"`loss_type` must be one of {', '.join(GRPO_LOSSES)}, got {self.loss_type!r}.")
        if self.scale_rewards not in SCALES:
            raise ValueError(f"`scale_rewards` must be one of {', '.join(SCALES)}, got {self.scale_rewards!r}.")

    def trainer_config(self) -> MusicGRPOConfig:
        """The trainer's arguments for this job."""
        own: dict[str, Any] = {"beta": self.beta, "loss_type": self.loss_type, "scale_rewards": self.scale_rewards}
        return MusicGRPOConfig(**self.rollout_arguments(), **own)
