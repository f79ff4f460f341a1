"""RLOO and GRPO: TRL's own trainers, on clips that the policy samples and rewards hear."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import TrainerControl
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer.utils import RepeatSampler, get_callable_name, use_adapter

from ..flat import check_sampled_is_scored
from ..generator import MusicRLForConditionalGeneration
from ..rewards import CombinedReward, Reward, load_rewards
from ..rewards.combine import compares_clips, move_reward
from .callbacks import SampleWriter
from .clip_scorer import ClipScorer
from .held_out import check_watched, evaluate_held_out
from .job import read_prompts, run_trainer
from .losses import step_sums
from .online_config import GRPOJob, MusicGRPOConfig, MusicRLOOConfig, RLOOJob
from .online_scoring import ClipReward, Rollouts
from .processes import shares_out_weights
from .seam import FlatTrainer, flat_of, prepare_generator, prepare_reference
from .seconds import Seconds


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that depends on the epoch, so that a run resumed in a later epoch goes on in order."""

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers' Trainer before each epoch."""
        self.generator.manual_seed(self.seed + epoch)


class RolloutTrainer(FlatTrainer):
    """Mixin of both trainers.

    Args:
        model: generator (or a PEFT model over a `FlatMusicRLForCausalLM`), or its name.
        reward_funcs: one or several rewards on sound: callables (prompts, audio [B, C, T], sampling rate) -> [B];
            `args.reward_weights` weighs them.
        args: a `MusicRLOOConfig` or `MusicGRPOConfig`.
        train_dataset: rows with `prompt`.
        eval_dataset: rows with `prompt`, held out: sampled with the same seeds at each evaluation, a clip each.
        watch: name -> reward that is never trained on: each evaluation scores its clips with them too and logs the means
            as `eval_watch/<name>`.
        ref_model: anchor of the KL; None takes a copy of `model` (with an adapter, the model without it).
        callbacks, optimizers, peft_config: as in TRL.

    Raises:
        ValueError: no rewards, fewer prompts than one step takes, sampling options that are not scored; during training,
            scores of the wrong shape or that are not finite.
    """

    config_class: type
    model: nn.Module
    control: TrainerControl

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
        eval_dataset: Dataset | None = None,
        watch: dict[str, Reward] | None = None,
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
                f"`train_dataset` (`prompts` of a job) must have a `prompt` column and at least {prompts_a_step} rows, the prompts of one "
                f"step (generation batch of {args.generation_batch_size} / {args.num_generations} clips a prompt); got "
                f"{len(train_dataset)} rows of {', '.join(train_dataset.column_names)}."
            )
        if eval_dataset is not None and ("prompt" not in eval_dataset.column_names or len(eval_dataset) == 0):
            raise ValueError(
                f"`eval_dataset` must have a `prompt` column and at least one row, got {len(eval_dataset)} rows of "
                f"{', '.join(eval_dataset.column_names) or 'nothing'}."
            )
        if eval_dataset is not None and shares_out_weights():
            raise ValueError(
                "`eval_dataset`: FSDP and ZeRO-3 share out the policy's weights, which evaluations sample and score as a whole; "
                "leave it out (`eval_prompts` of a job), or start one process a GPU with examples/accelerate/several_gpus.yaml."
            )
        check_watched(watch, eval_dataset)
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
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        for reward in (*rewards, *(watch or {}).values()):
            move_reward(reward, args.rewards_at)
        self._scorer = ClipScorer(flat, self._as_one(rewards), watch or {}, args, Seconds())
        check_sampled_is_scored(self.generation_config)  # type: ignore[attr-defined]
        if anchor is not None and self.ref_model is None and args.beta != 0:  # type: ignore[has-type]
            # With an adapter TRL takes the model without it; the caller named another anchor.
            anchor.scoring_temperature = args.temperature
            self.ref_model = self.accelerator.prepare_model(anchor, evaluation_mode=True)

    def _as_one(self, rewards: list[Reward]) -> Reward:
        """What an evaluation scores clips by: the reward, or the weighted sum of several (those of weight 0 are for TRL's log)."""
        if len(rewards) == 1:
            return rewards[0]
        names = [get_callable_name(reward) for reward in rewards]
        names = [name if names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(names, 1)]
        weights = dict(zip(names, self.reward_weights.tolist()))  # type: ignore[attr-defined]
        weights = {name: weight for name, weight in weights.items() if weight}
        return CombinedReward({name: part for name, part in zip(names, rewards) if name in weights}, weights)

    def evaluate(self, eval_dataset: Dataset | None = None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict:
        """A clip of each held-out prompt, with the same seeds as ever: reward, its parts, what is watched, entropy (nats a code),
        and KL to the anchor, exact, in nats a clip (TRL's `kl` of training is an estimate a code).
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset  # type: ignore[attr-defined]
        if not rows:
            raise ValueError("`eval_dataset` is empty; give held-out prompts.")
        training = self.model.training
        self.model.eval()  # TRL's log asks
        try:
            means = evaluate_held_out(self, rows["prompt"], self.generator, self._scorer, self._view)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
            self.log(metrics.copy())  # type: ignore[attr-defined]
        finally:
            self.model.train(training)
        handler = self.callback_handler  # type: ignore[attr-defined]
        self.control = handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _view(self, input_ids: Tensor, attention_mask: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """What policy and anchor say of codes [B, K, F]."""
        inputs, generator = (codes, input_ids, attention_mask, self.args.temperature), self.generator
        with self.accelerator.autocast():
            scores = generator.score_codes(*inputs, self._anchor_logits(*inputs))
        seen = {"entropy": step_sums(scores.entropies, scores.mask), "mask": scores.mask}
        return seen if scores.kl is None else seen | {"kl": step_sums(scores.kl, scores.mask)}

    def _anchor_logits(self, *inputs: Any) -> Tensor | None:
        """Of the anchor, or of the model without its adapter, as TRL takes it; None where no KL is asked for."""
        if self.beta == 0:  # type: ignore[attr-defined]
            return None
        unwrap = self.accelerator.unwrap_model
        if self.ref_model is not None:
            return unwrap(self.ref_model).code_logits(*inputs)
        model = unwrap(self.model)
        with use_adapter(model, "ref" if "ref" in model.peft_config else None):
            return self.generator.code_logits(*inputs)

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
    if job.sample_steps and shares_out_weights():
        raise ValueError(
            f"`sample_steps` = {job.sample_steps}: FSDP and ZeRO-3 share out the policy's weights, and the clips to hear are sampled from "
            "the whole of it; set it to 0, or start one process a GPU with examples/accelerate/several_gpus.yaml."
        )
    prompts = read_prompts(job.prompts)
    held_out = None if job.eval_prompts is None else read_prompts(job.eval_prompts, "eval_prompts")
    reward = load_rewards(job.reward, job.normalise, job.reward_timeout_s)
    trainer = trainer_class(
        job.model,
        reward,
        args,
        Dataset.from_dict({"prompt": prompts}),
        ref_model=job.ref_model,
        peft_config=job.peft_config(),
        eval_dataset=None if held_out is None else Dataset.from_dict({"prompt": held_out}),
        watch=job.watched(reward),
    )
    if job.sample_steps:
        heard = (held_out or prompts)[:4]
        writer = SampleWriter(trainer.generator, heard, job.sample_steps, job.duration_s, job.temperature, job.seed)
        trainer.add_callback(writer)  # type: ignore[attr-defined]
    for stop in job.stops(codes=args.max_completion_length or 1):  # which the trainer has set
        trainer.add_callback(stop)  # type: ignore[attr-defined]
    return run_trainer(trainer, job, method, {"prompts": len(prompts)}, evaluate=held_out is not None)
