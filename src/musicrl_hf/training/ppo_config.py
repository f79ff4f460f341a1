"""Settings of RL fine-tuning: the algorithm's own (`PPOSettings`), the trainer's, and the flat job that a YAML file fills."""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from ..audio import MAX_DURATION_S
from ..rewards.combine import split_specs
from .held_out import HeldOutSettings
from .job import NORMALISE_HELP, TrainingJob, option
from .processes import shares_out_weights
from .scoring import ScoringSettings

OBJECTIVES = ("paper", "ppo")
VALUE_MODELS = ("shared", "separate")


@dataclass(kw_only=True)
class PPOSettings(ScoringSettings):
    """What the algorithm itself needs; the names are TRL's where TRL's PPO had one.

    `kl_mix` and the choice of `value_model` are not in the paper: it says that policy and value both start from the base
    checkpoint, and gives no value for the mix.
    """

    objective: str = option(
        "ppo",
        '"paper": REINFORCE with a value baseline and exact KL (MusicRL, section 3.2); "ppo": clipped PPO with GAE',
    )
    duration_s: float = option(5.0, "length of the sampled clips, in seconds (at most 30)")
    temperature: float = option(0.99, "sampling temperature, also of the scored distribution (the paper's 0.99)")
    kl_mix: float = option(
        0.01,
        'objective "paper": a in J = (1 - a) sum log pi (R - V) - a sum KL, in [0, 1]; at 0.01 a gain of 0.1 in the reward '
        "pays for 10 nats of KL a clip (not in the paper)",
    )
    kl_coef: float = option(
        0.01, 'objective "ppo": reward that a nat of KL to the anchor costs; the KL is exact and summed over the clip'
    )
    ref_guidance_scale: float = option(
        1.0,
        "classifier-free guidance of the anchor; above 1 the KL draws the policy, which is sampled without, towards what the "
        "anchor plays with so much of it: nearer to what prompts ask for (guidance distillation, Cideron et al. 2024, "
        "arXiv:2410.06084; not in the paper), and what is saved is sampled at guidance scale 1 by default",
    )
    entropy_coef: float = option(
        0.0,
        'objective "ppo": reward that a nat of entropy earns in each state that is visited, summed over the clip; keeps codes '
        "from becoming the same few ones where KL is paid for what listeners like (not in the paper)",
    )
    cliprange: float = option(0.2, 'objective "ppo": the ratio of a step is clipped to 1 -/+ this')
    cliprange_value: float = option(0.2, 'objective "ppo": the value may move this far from the sampled one')
    gamma: float = option(1.0, 'objective "ppo": discount a decoder step, in [0, 1]')
    lam: float = option(
        1.0,
        'objective "ppo": lambda of generalised advantage estimation, in [0, 1]; a clip has one reward, at its end, and '
        "below 1 it reaches about 1 / (1 - lam) decoder steps back (TRL's 0.95: 0.4 s of sound)",
    )
    num_generations: int = option(
        1,
        "clips of each prompt in a set; above 1 a clip earns what its reward is above the mean of its prompt's other clips, "
        "which takes out what prompts, and not clips, differ by (RLOO's baseline; not in the paper)",
    )
    num_ppo_epochs: int = option(1, 'objective "ppo": passes over each set of sampled clips')
    num_mini_batches: int = option(1, 'objective "ppo": optimiser steps in each pass')
    whiten_rewards: bool = option(False, 'objective "ppo": scale the step rewards to unit deviation before GAE')
    vf_coef: float = option(0.1, "weight of the value loss")
    value_model: str = option(
        "shared",
        '"shared": the value head reads the policy\'s own trunk; "separate": a copy of the base checkpoint\'s trunk, which '
        "doubles memory and time but leaves the policy's features to the policy",
    )

    def check_settings(self) -> None:
        """ValueError for values out of range and for combinations that contradict each other."""
        if self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}.")
        if self.value_model not in VALUE_MODELS:
            raise ValueError(f"`value_model` must be one of {', '.join(VALUE_MODELS)}, got {self.value_model!r}.")
        for name in ("kl_mix", "gamma", "lam"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {vars(self)[name]!r}.")
        for name in ("kl_coef", "entropy_coef", "vf_coef"):
            if not vars(self)[name] >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {vars(self)[name]!r}.")
        for name in ("temperature", "cliprange", "cliprange_value"):
            if not vars(self)[name] > 0:
                raise ValueError(f"`{name}` must be above 0, got {vars(self)[name]!r}.")
        for name in ("num_generations", "num_ppo_epochs", "num_mini_batches"):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}` must be at least 1, got {vars(self)[name]!r}.")
        if not 1 <= self.ref_guidance_scale < float("inf"):
            raise ValueError(
                f"`ref_guidance_scale` must be finite and at least 1 (no guidance), got {self.ref_guidance_scale!r}."
            )
        if not 0 < self.duration_s <= MAX_DURATION_S:
            raise ValueError(f"`duration_s` must be in (0, {MAX_DURATION_S:g}] seconds, got {self.duration_s!r}.")
        if self.objective == "paper" and (self.num_ppo_epochs, self.num_mini_batches) != (1, 1):
            raise ValueError(
                f"`objective` = 'paper' has no importance ratio, so each clip may be used once, but `num_ppo_epochs` = "
                f"{self.num_ppo_epochs} and `num_mini_batches` = {self.num_mini_batches}; set both to 1 or use 'ppo'."
            )
        if self.objective == "paper" and self.entropy_coef:
            raise ValueError(
                f"`entropy_coef` is of `objective` = 'ppo', got {self.entropy_coef!r} with 'paper'; set it to 0."
            )
        if self.objective == "paper" and (self.gamma != 1 or self.whiten_rewards):
            raise ValueError(
                "`objective` = 'paper' takes the clip's reward as the return of every step: `gamma` must be 1 and "
                f"`whiten_rewards` False, got {self.gamma!r} and {self.whiten_rewards!r}; or use 'ppo'."
            )

    def check_clips(self, clips: int) -> None:
        """ValueError for what does not go with so many clips of a set on each process."""
        # All clips of a prompt are in one set of one process: they are compared with each other.
        if clips % self.num_generations:
            raise ValueError(
                f"`num_generations` = {self.num_generations} must divide the {clips} clips of a set on each process "
                "(per_device_train_batch_size x gradient_accumulation_steps x num_mini_batches)."
            )
        self.check_scoring(clips)

    def check_enough(self, clips: int, normalise: str = "none") -> None:
        """ValueError where one clip is set against the others of a set, of `clips` on all processes, and there are none."""
        compared = ["`objective` = 'ppo'"] if self.objective == "ppo" else []
        compared += [f"`normalise` = {normalise!r}"] if normalise != "none" else []
        if clips < 2 and compared:
            raise ValueError(
                f"{' and '.join(compared)} set a clip against the others of its set, which is of one clip and teaches nothing "
                "so: set `per_device_train_batch_size` or `gradient_accumulation_steps` to 2 or more."
            )

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps made on each set of sampled clips."""
        return self.num_ppo_epochs * self.num_mini_batches

    def check_multiple(self, name: str, steps: float) -> None:
        """A set of clips is used up before anything stops or is saved, so that a resumed run goes on exactly."""
        if steps % self.steps_per_rollout:
            raise ValueError(
                f"`{name}` = {steps} must be a multiple of num_ppo_epochs x num_mini_batches = {self.steps_per_rollout}, "
                "the optimiser steps made on each set of sampled clips."
            )


@dataclass(kw_only=True)
class MusicPPOConfig(PPOSettings, TrainingArguments):
    """`TrainingArguments` with `PPOSettings`; `max_steps` counts optimiser steps and is needed."""

    logging_steps: float = option(10, "optimiser steps between two log lines")
    report_to: str | list[str] | None = option("none", "where to report to")
    ddp_find_unused_parameters: bool | None = option(False, "every trained parameter takes part in each step")

    def __post_init__(self) -> None:
        self.check_settings()
        super().__post_init__()
        if self.max_steps < 1:
            raise ValueError(f"`max_steps` must be at least 1 optimiser step, got {self.max_steps!r}.")
        self.check_multiple("max_steps", self.max_steps)
        self.check_clips(self.clips_per_rollout)
        self.check_enough(self.clips_per_rollout * self.world_size)
        if self.save_strategy != "no":
            self.check_multiple("save_steps", self.save_steps)
        _ = self.rewards_at  # a device that is not there is known before anything is loaded
        if shares_out_weights():
            raise ValueError(
                "FSDP and ZeRO-3 share out the policy's weights, which PPO samples and saves as a whole; start one process a GPU with "
                "examples/accelerate/several_gpus.yaml, or use RLOO or GRPO."
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs are visible to one process, which would split the batch behind the sampler's back; "
                "start with `accelerate launch` (one process a GPU) or set CUDA_VISIBLE_DEVICES=0."
            )

    @property
    def clips_per_rollout(self) -> int:
        """Clips of a set on each process."""
        return self.train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def rewards_at(self) -> torch.device:
        """Where rewards get their clips: on `reward_device`, or else where the policy is."""
        return self.rewards_on(self.device)


@dataclass(kw_only=True)
class PPOJob(PPOSettings, HeldOutSettings, TrainingJob):
    """One RL fine-tuning run, as a flat YAML file or command line describes it."""

    prompts: str = field(metadata={"help": "text file, one prompt a line"})
    eval_prompts: str | None = option(None, "text file of held-out prompts, needed by eval_steps and sample_steps")
    reward: list[str] = option(["adherence"], "rewards, each a name or weight*name; see `musicrl score --help`")
    normalise: str = option("none", NORMALISE_HELP)
    reward_timeout_s: float = option(
        600.0,
        "seconds that a reward may take for one batch of clips, or until a call of C that it is in returns; 0 for no limit",
    )
    sample_steps: int = option(0, "optimiser steps between two sets of clips to hear; 0 for none")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_settings()
        if self.sample_steps < 0:
            raise ValueError(f"`sample_steps` must be at least 0, got {self.sample_steps!r}.")
        if self.max_kl is not None and self.ref_guidance_scale > 1:
            raise ValueError(
                f"`max_kl` = {self.max_kl!r} stops a run at so many nats from where it starts, but with `ref_guidance_scale` = "
                f"{self.ref_guidance_scale!r} the KL is to a guided anchor and starts far from 0; leave one of them out."
            )
        if not self.reward:
            raise ValueError("`reward` is empty; name at least one, such as adherence.")
        if self.sample_steps and self.eval_prompts is None:
            raise ValueError(
                f"`eval_prompts` is empty, but `sample_steps` = {self.sample_steps} needs held-out prompts; give a text file, or "
                "set it to 0."
            )
        self.check_held_out()
        clips = self.per_device_train_batch_size * self.gradient_accumulation_steps * self.num_mini_batches
        if "variety" in split_specs(self.reward):
            self.check_groups(clips)
        if self.lora_r and self.value_model == "separate":
            raise ValueError(
                f"`value_model` = 'separate' trains a whole copy of the trunk, against the point of `lora_r` = "
                f"{self.lora_r}; set value_model to 'shared', or lora_r to 0."
            )
        self.check_multiple("max_steps", self.max_steps)
        self.check_multiple("save_steps", self.save_steps)
        self.check_clips(clips)
        self.check_enough(clips * int(os.environ.get("WORLD_SIZE", 1)), self.normalise)

    def trainer_config(self) -> MusicPPOConfig:
        """The trainer's arguments for this job."""
        return MusicPPOConfig(
            **{name: vars(self)[name] for name in PPOSettings.__dataclass_fields__},
            **self.shared_arguments(),
            **self.held_out_arguments(),
        )
