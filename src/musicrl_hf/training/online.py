"""RLOO and GRPO: TRL's own trainers, on clips that the policy samples and rewards hear."""

import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import RepeatSampler

from ..audio import MAX_DURATION_S
from ..flat import check_sampled_is_scored
from ..generator import MusicRLForConditionalGeneration
from ..rewards import Reward, load_rewards
from ..rewards.combine import NORMALISE, compares_clips, move_reward, split_specs
from .callbacks import KLBudget, SampleWriter
from .job import BF16_HELP, NORMALISE_HELP, TrainingJob, option, read_prompts, run_trainer
from .online_scoring import ClipReward, Rollouts
from .scoring import ScoringSettings
from .seam import FlatTrainer, flat_of, prepare_generator, prepare_reference

# TRL's that take an importance ratio a token
GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
SCALES = ("group", "batch", "none")


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that depends on the epoch, so that a run resumed in a later epoch goes on in order."""

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers' Trainer before each epoch."""
        self.generator.manual_seed(self.seed + epoch)


@dataclass
class RolloutArguments(ScoringSettings):
    """What both configs add to TRL's, and what neither may ask for."""

    duration_s: float = option(5.0, "length of the sampled clips, in seconds (at most 30)")
    max_completion_length: int | None = option(None, "must stay empty: `duration_s` decides")
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
        if not 0 < self.duration_s <= MAX_DURATION_S:
            raise ValueError(f"`duration_s` must be in (0, {MAX_DURATION_S:g}] seconds, got {self.duration_s!r}.")


@dataclass
class MusicRLOOConfig(RolloutArguments, RLOOConfig):
    """TRL's `RLOOConfig` for clips of `duration_s` seconds."""


@dataclass
class MusicGRPOConfig(RolloutArguments, GRPOConfig):
    """TRL's `GRPOConfig` for clips of `duration_s` seconds."""


class RolloutTrainer(FlatTrainer):
    """Mixin of both trainers.

    Args:
        model: generator (or a PEFT model over a `FlatMusicRLForCausalLM`), or its name.
        reward_funcs: one or several rewards on sound: callables (prompts, audio [B, C, T], sampling rate) -> [B];
            `args.reward_weights` weighs them.
        args: a `MusicRLOOConfig` or `MusicGRPOConfig`.
        train_dataset: rows with `prompt`.
        ref_model: anchor of the KL; None takes a copy of `model` (with an adapter, the model without it).
        callbacks, optimizers, peft_config: as in TRL.

    Raises:
        ValueError: no rewards, fewer prompts than one step takes, sampling options that are not scored; during training,
            scores of the wrong shape or that are not finite.
    """

    config_class: type

    def __init__(
        self,
        model: str | MusicRLForConditionalGeneration | PeftModel,
        reward_funcs: Reward | list[Reward],
        args: MusicRLOOConfig | MusicGRPOConfig,
        train_dataset: Dataset,
        ref_model: str | MusicRLForConditionalGeneration | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        if not isinstance(args, self.config_class):
            raise ValueError(f"`args` must be a {self.config_class.__name__}, got {type(args).__name__}.")
        rewards = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if not rewards or not all(callable(reward) for reward in rewards):
            raise ValueError(
                f"`reward_funcs` must be callables (prompts, audio, sampling_rate) -> scores [B], got {reward_funcs!r}; "
                "names go through musicrl_hf.load_rewards."
            )
        prompts_a_step = args.generation_batch_size // args.num_generations
        if "prompt" not in train_dataset.column_names or len(train_dataset) < prompts_a_step:
            raise ValueError(
                f"`train_dataset` must have a `prompt` column and at least {prompts_a_step} rows, the prompts of one "
                f"step (generation batch of {args.generation_batch_size} / {args.num_generations} clips a prompt); got "
                f"{len(train_dataset)} rows of {', '.join(train_dataset.column_names)}."
            )
        if any(map(compares_clips, rewards)):
            args.check_groups(args.clips_per_rollout)
        model = prepare_generator(model)
        flat = flat_of(model)
        anchor = prepare_reference(ref_model, flat)
        args.max_completion_length = flat.config.num_codebooks * flat.frames_for(args.duration_s)
        self._rollouts = Rollouts(flat, args.local_rollout_forward_batch_size, args.rewards_at)
        self.build(
            model,
            anchor,
            reward_funcs=[ClipReward(reward, self._rollouts) for reward in rewards],
            args=args,
            train_dataset=train_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        for reward in rewards:
            move_reward(reward, args.rewards_at)
        check_sampled_is_scored(self.generation_config)  # type: ignore[attr-defined]
        if anchor is not None and self.ref_model is None and args.beta != 0:  # type: ignore[has-type]
            # With an adapter TRL takes the model without it; the caller named another anchor.
            anchor.scoring_temperature = args.temperature
            self.ref_model = self.accelerator.prepare_model(anchor, evaluation_mode=True)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        rollouts, prompts = self._rollouts, [row["prompt"] for row in inputs]
        try:
            with rollouts.listening(prompts) if self.args.score_in_background else nullcontext():
                return super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        finally:
            rollouts.forget()

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Sampled in the precision in which clips are scored, by the policy that is trained; so many clips at once."""
        size, ids, beside = self.args.local_rollout_forward_batch_size, [], False
        for start in range(0, len(prompt_ids), size):
            with self.accelerator.autocast():
                found = super()._generate_single_turn(prompt_ids[start : start + size], *args, **kwargs)  # type: ignore[misc]
            beside = isinstance(found, tuple)  # GRPO's has log-probabilities, which are None but for vLLM's
            sampled = found[0] if beside else found
            self._rollouts.add(sampled)
            ids += sampled
        return (ids, None) if beside else ids

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        stock = super()._get_train_sampler(dataset)  # type: ignore[misc]
        return EpochSampler(
            stock.data_source, stock.mini_repeat_count, stock.batch_size, stock.repeat_count, stock.shuffle, stock.seed
        )


class MusicRLOOTrainer(RolloutTrainer, RLOOTrainer):
    """TRL's RLOOTrainer (REINFORCE with the leave-one-out baseline) for generators; see `RolloutTrainer`."""

    trl_module = "trl.trainer.rloo_trainer"
    config_class = MusicRLOOConfig


class MusicGRPOTrainer(RolloutTrainer, GRPOTrainer):
    """TRL's GRPOTrainer for generators; see `RolloutTrainer`."""

    trl_module = "trl.trainer.grpo_trainer"
    entropy_in_loss = True  # `entropy_coef`
    config_class = MusicGRPOConfig


@dataclass(kw_only=True)
class RolloutJob(ScoringSettings, TrainingJob):
    """What both jobs share."""

    prompts: str = field(metadata={"help": "text file, one prompt a line"})
    reward: list[str] = option(["adherence"], "rewards, each a name or weight*name; see `musicrl score --help`")
    normalise: str = option("none", NORMALISE_HELP)
    reward_timeout_s: float = option(600.0, "seconds that a reward may take for one batch of clips; 0 for no limit")
    duration_s: float = option(5.0, "length of the sampled clips, in seconds (at most 30)")
    temperature: float = option(1.0, "sampling temperature, also of the scored distribution")
    num_generations: int = option(4, "clips a prompt, compared with each other")
    num_iterations: int = option(1, "optimiser steps on each set of sampled clips")
    epsilon: float = option(0.2, "the ratio to the sampling policy is clipped to 1 -/+ this")
    sample_steps: int = option(0, "optimiser steps between two sets of clips to hear; 0 for none")
    max_kl: float | None = option(None, "stop when the KL to the anchor passes this many nats a clip; none for never")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_kl is not None and not self.max_kl > 0:
            raise ValueError(f"`max_kl` must be above 0 nats, got {self.max_kl!r}; leave it none for no limit.")
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
        if "variety" in split_specs(self.reward):
            self.check_groups(of_a_process)
        if self.num_iterations < 1 or self.save_steps % self.num_iterations:
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
        return self.shared_arguments() | {name: vars(self)[name] for name in names}


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


def run_rloo(job: RLOOJob) -> Path:
    """Train a generator with RLOO; the folder holds the model (or adapter), metrics.jsonl and result.json.

    Raises:
        FileNotFoundError: no such prompts or checkpoint.
        ValueError: as the job and `RolloutTrainer`.
    """
    return _run(job, MusicRLOOTrainer, "RLOO")


def run_grpo(job: GRPOJob) -> Path:
    """Train a generator with GRPO; otherwise as `run_rloo`."""
    return _run(job, MusicGRPOTrainer, "GRPO")


def _run(job: RLOOJob | GRPOJob, trainer_class: type[RolloutTrainer], method: str) -> Path:
    args = job.trainer_config()
    job.check_places()
    prompts = read_prompts(job.prompts)
    trainer = trainer_class(
        job.model,
        load_rewards(job.reward, job.normalise, job.reward_timeout_s),
        args,
        Dataset.from_dict({"prompt": prompts}),
        ref_model=job.ref_model,
        peft_config=job.peft_config(),
    )
    if job.sample_steps:
        heard = prompts[:4]
        writer = SampleWriter(trainer.generator, heard, job.sample_steps, job.duration_s, job.temperature, job.seed)
        trainer.add_callback(writer)  # type: ignore[attr-defined]
    if job.max_kl is not None:
        trainer.add_callback(KLBudget(job.max_kl, codes=args.max_completion_length or 1))  # type: ignore[attr-defined]
    return run_trainer(trainer, job, method, {"prompts": len(prompts)})
