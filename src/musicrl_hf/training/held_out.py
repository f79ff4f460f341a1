"""Held-out prompts, sampled with the same seeds again and again while a policy is trained: its settings, and what comes of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from ..generator import MusicRLForConditionalGeneration
from ..rewards import CombinedReward, Reward, load_reward
from ..rewards.combine import check_single_clips, compares_clips, split_specs
from .callbacks import KLBudget
from .clip_scorer import ClipScorer
from .guard import OverOptimisationGuard
from .job import option
from .ppo_sampler import EVALUATION, clip_seed

View = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""(input_ids, attention_mask, codes) -> "entropy" [B, S], "mask" [B, K, S] and, where there is an anchor, "kl" [B, S]."""


@dataclass(kw_only=True)
class HeldOutSettings:
    """What the jobs of PPO, RLOO and GRPO share: held-out prompts, and what ends a run before its last step."""

    eval_prompts: str | None = option(None, "text file of held-out prompts, needed by eval_steps")
    watch: list[str] = option(
        [],
        "further rewards, never trained on: each evaluation logs them as eval_watch/NAME, unweighted, of the clips that "
        "eval_reward is of",
    )
    per_device_eval_batch_size: int = option(8, "clips evaluated at once on each process")
    eval_steps: int = option(0, "optimiser steps between two evaluations on eval_prompts; 0 for none")
    max_kl: float | None = option(None, "stop when the KL to the anchor passes this many nats a clip; none for never")
    guard: str | None = option(
        None,
        'metric of the evaluations ("reward", "reward/NAME" or "watch/NAME") that the run stops for when it no longer rises; '
        "whenever it stops, it ends with the weights of the best evaluation; needs save_steps = eval_steps",
    )
    guard_patience: int = option(3, "evaluations without a rise after which the guard stops the run")
    guard_min_delta: float = option(0.0, "a rise is more than this above the best before, in the metric's own unit")

    def check_held_out(self) -> None:
        """ValueError for evaluations that cannot be made, and for a guard that has nothing to look at or to go back to."""
        for name, least in {"eval_steps": 0, "per_device_eval_batch_size": 1}.items():
            if vars(self)[name] < least:
                raise ValueError(f"`{name}` must be at least {least}, got {vars(self)[name]!r}.")
        if self.max_kl is not None and not self.max_kl > 0:
            raise ValueError(f"`max_kl` must be above 0 nats, got {self.max_kl!r}; leave it none for no limit.")
        if self.eval_steps and self.eval_prompts is None:
            raise ValueError(
                f"`eval_prompts` is empty, but `eval_steps` = {self.eval_steps} needs held-out prompts; give a text file, or "
                "set it to 0."
            )
        if self.watch and not self.eval_steps:
            raise ValueError(
                f"`watch` = {self.watch} is scored at evaluations only, but `eval_steps` = 0; set eval_steps and eval_prompts, "
                "or leave watch empty."
            )
        check_single_clips(self.watch, "watch")
        if self.guard == "reward/variety":
            raise ValueError(
                "`guard` = 'reward/variety' is 0 in every evaluation, which samples one clip of a prompt; name another metric."
            )
        self._check_guard()

    def _check_guard(self) -> None:
        if self.guard_patience < 1:
            raise ValueError(f"`guard_patience` must be at least 1 evaluation, got {self.guard_patience!r}.")
        if not 0 <= self.guard_min_delta < float("inf"):
            raise ValueError(f"`guard_min_delta` must be at least 0, got {self.guard_min_delta!r}.")
        if self.guard is None:
            return
        parts: dict[str, list[str]] = {"reward": vars(self)["reward"], "watch": self.watch}
        metrics = ["reward", *(f"{kind}/{spec}" for kind, specs in parts.items() for spec in split_specs(specs))]
        if self.guard not in metrics:
            raise ValueError(
                f"`guard` = {self.guard!r} is no metric of the evaluations; they are {', '.join(metrics)}, and any reward more "
                "that `watch` names."
            )
        save_steps, kept = vars(self)["save_steps"], vars(self)["save_total_limit"]
        if not self.eval_steps or save_steps != self.eval_steps:
            raise ValueError(
                f"`guard` = {self.guard!r} goes back to the checkpoint of the best evaluation: `save_steps` must be "
                f"`eval_steps` and above 0, got {save_steps} and {self.eval_steps}."
            )
        if kept == 1:
            raise ValueError(
                f"`save_total_limit` = 1 leaves a run with `guard` = {self.guard!r} the best checkpoint alone, and none of the "
                "last step to go on from; give at least 2."
            )

    def held_out_arguments(self) -> dict[str, Any]:
        """The trainer's arguments for them."""
        return {
            "per_device_eval_batch_size": self.per_device_eval_batch_size,
            "eval_strategy": "steps" if self.eval_steps else "no",
            "eval_steps": self.eval_steps or None,
            "eval_on_start": bool(self.eval_steps) and vars(self)["resume_from_checkpoint"] is None,
            "load_best_model_at_end": self.guard is not None,
            "metric_for_best_model": self.guard,
            "greater_is_better": None if self.guard is None else True,
        }

    def watched(self, reward: CombinedReward) -> dict[str, Reward]:
        """What `watch` names, loaded; what is a part of `reward` too is that part."""
        return {spec: reward.rewards.get(spec) or load_reward(spec, "watch") for spec in split_specs(self.watch)}

    def stops(self, codes: int = 1) -> list[TrainerCallback]:
        """What ends a run before its last step; `codes` as of `KLBudget`."""
        found: list[TrainerCallback] = [] if self.max_kl is None else [KLBudget(self.max_kl, codes=codes)]
        if self.guard is not None:
            found.append(OverOptimisationGuard(f"eval_{self.guard}", self.guard_patience, self.guard_min_delta))
        return found


def check_watched(watch: dict[str, Reward] | None, held_out: object | None) -> None:
    """ValueError for rewards to watch that are not callable, compare the clips of a prompt, or have no held-out prompts."""
    for name, given in (watch or {}).items():
        if not callable(given):
            raise ValueError(
                f"`watch[{name!r}]` must be a callable (prompts, audio, sampling_rate) -> [B], got {given!r}."
            )
    if any(map(compares_clips, (watch or {}).values())):
        raise ValueError(
            "`watch` compares the clips of a prompt, as variety does, and is 0 in every evaluation, of one clip a prompt; leave it out."
        )
    if watch and held_out is None:
        raise ValueError(
            f"`watch` = {', '.join(watch)} is scored at evaluations only, but `eval_dataset` is None; give held-out prompts."
        )


@torch.no_grad()
def evaluate_held_out(
    trainer: Any, prompts: Sequence[str], generator: MusicRLForConditionalGeneration, scorer: ClipScorer, view: View
) -> dict[str, float]:
    """Sample a clip for each prompt, with the same seeds as ever; every process takes some, and all return the same means.

    Args:
        trainer: a Trainer, whose `args` have `duration_s` and `temperature`.
        prompts: held-out ones.
        generator: the policy that is sampled.
        scorer: scores the clips, with what is watched.
        view: what policy and anchor say of them.

    Returns:
        reward, its parts, what is watched, kl (nats a clip) where there is an anchor, and entropy (nats a code).
    """
    args = trainer.args
    size, frames = args.per_device_eval_batch_size, generator.frames_for(args.duration_s)
    batches = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
    rows: list[dict[str, float]] = []
    for number in range(args.process_index, len(batches), args.world_size):
        batch = batches[number]
        input_ids, attention_mask = generator.text_inputs(batch)
        random = torch.Generator(args.device).manual_seed(clip_seed(args.seed, number, EVALUATION))
        with trainer.accelerator.autocast():
            codes = generator.sample_codes(
                input_ids, attention_mask, frames, temperature=args.temperature, generator=random
            )
        scores, components = scorer.score(batch, codes, evaluating=True)
        seen = view(input_ids, attention_mask, codes)
        means = {"reward": scores.mean(), "entropy": seen["entropy"].sum(1).mean() / seen["mask"][0].sum()}
        if "kl" in seen:
            means["kl"] = seen["kl"].sum(1).mean()
        rows += [{name: float(value) for name, value in (means | components).items()}] * len(batch)
    rows = gather_object(rows)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
