"""RL fine-tuning on `transformers.Trainer`: MusicRL's objective and clipped PPO, two losses of one trainer.

The action is one decoder step: its K codes are drawn at once and share one ratio, one advantage and one value. The clip is
sampled without guidance and without top-k at the temperature that it is scored at, so that the policy that is trained is
the policy that was sampled. All clips of a run are equally long, so nothing but the delay pattern's corners is padded.

Left out: a KL coefficient that adapts itself, and a reward inside the clip.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerControl, set_seed

from ..generator import MusicRLForConditionalGeneration, load_generator
from ..rewards import CombinedReward, Reward, load_rewards
from ..rewards.combine import compares_clips, move_reward
from . import losses
from .callbacks import SampleWriter
from .checkpoints import WholeCheckpoints
from .clip_scorer import ClipScorer
from .held_out import check_watched, evaluate_held_out
from .job import read_prompts, run_trainer
from .ppo_config import MusicPPOConfig, PPOJob
from .ppo_policy import Anchor, PolicyWithValue, add_lora
from .ppo_sampler import RolloutSampler, check_prompts, clip_seed
from .seconds import Seconds

SEEN = ("logprobs", "values", "kl")  # of the policy's view of its clips, what the updates need


class MusicPPOTrainer(WholeCheckpoints, Trainer):
    """Fine-tune a generator against a reward, with a KL to an anchor.

    Args:
        model: the generator, or a PEFT adapter over one (then the adapter is trained).
        reward: any callable `(prompts, audio [B, C, T], sampling_rate) -> [B]`.
        args: `MusicPPOConfig`.
        train_dataset: prompts to sample from.
        eval_dataset: held-out prompts, sampled with the same seeds at each evaluation.
        ref_model: the anchor of the KL, or its name; None for the policy as it starts.
        callbacks: further ones.
        watch: name -> reward that is never trained on: each evaluation scores its clips with them too and logs the means
            as `eval_watch/<name>`. Where `reward` is a `CombinedReward`, its time limit holds for them.

    Raises:
        ValueError: no prompts, a reward that is not callable or returns NaN or a wrong shape, an anchor that does not fit,
            something to watch and no held-out prompts.

    Example:
        >>> args = MusicPPOConfig(output_dir="runs/ppo", objective="paper", max_steps=100, duration_s=1.0)
        >>> trainer = MusicPPOTrainer(load_generator("musicrl-tiny"), load_reward("adherence"), args, prompts)
        >>> trainer.train()
        >>> trainer.save_model("runs/ppo")
    """

    args: MusicPPOConfig
    model: PolicyWithValue
    control: TrainerControl

    def __init__(
        self,
        model: MusicRLForConditionalGeneration | PeftModel,
        reward: Reward,
        args: MusicPPOConfig,
        train_dataset: Sequence[str],
        eval_dataset: Sequence[str] | None = None,
        ref_model: MusicRLForConditionalGeneration | str | os.PathLike | None = None,
        callbacks: list[TrainerCallback] | None = None,
        watch: dict[str, Reward] | None = None,
    ) -> None:
        if not callable(reward):
            raise ValueError(f"`reward` must be a callable (prompts, audio, sampling_rate) -> [B], got {reward!r}.")
        check_watched(watch, eval_dataset)
        if compares_clips(reward):
            args.check_groups(args.clips_per_rollout)
        if isinstance(reward, CombinedReward):
            args.check_enough(args.clips_per_rollout * args.world_size, reward.normalise)
        check_prompts("train_dataset", train_dataset)
        if eval_dataset is not None:
            check_prompts("eval_dataset", eval_dataset)
        policy = PolicyWithValue(model, args.value_model, learns_guidance=args.ref_guidance_scale > 1)
        self.anchor = Anchor(model, ref_model, args.ref_guidance_scale)
        self.frames = policy.generator.frames_for(args.duration_s)
        self._micro_batch, self._kl_weight, self._entropy_weight = 0, 0.0, 0.0
        self._clips: dict[str, Tensor] = {}
        self._orders: list[Tensor] = []
        self._metrics: dict[str, list[float]] = defaultdict(list)
        self._seconds = Seconds()
        self._scorer = ClipScorer(policy.generator, reward, watch or {}, args, self._seconds)
        args.remove_unused_columns = False  # a data set of texts has no columns
        super().__init__(
            model=policy,
            args=args,
            data_collator=list,
            train_dataset=list(train_dataset),
            eval_dataset=None if eval_dataset is None else list(eval_dataset),
            callbacks=[*(callbacks or []), self._seconds],
        )
        self.anchor.to(self.accelerator.device)

    @property
    def reward(self) -> Reward:
        """What is trained on."""
        return self._scorer.reward

    # -- data: one batch of the loader is the prompts of a whole set of clips, repeated for each pass over it -----------

    @property
    def micro_batches_per_epoch(self) -> int:
        """Forward passes in one pass over a set of clips, on each process."""
        return self.args.gradient_accumulation_steps * self.args.num_mini_batches

    def get_train_dataloader(self) -> DataLoader:
        """Batches of the prompts that one process samples clips for at once."""
        return self._get_dataloader(
            self.train_dataset,
            description="Training",
            batch_size=self.args.train_batch_size * self.micro_batches_per_epoch,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        args = self.args
        return RolloutSampler(
            len(self.train_dataset),
            size=args.train_batch_size * self.micro_batches_per_epoch * args.world_size,
            repeats=args.num_ppo_epochs * self.micro_batches_per_epoch,
            rollouts=args.max_steps // args.steps_per_rollout,
            seed=args.seed,
            generations=args.num_generations,
        )

    def train(self, *args, **kwargs):
        """Train; see `transformers.Trainer.train`."""
        self._micro_batch = 0
        return super().train(*args, **kwargs)

    def training_step(self, *args, **kwargs) -> Tensor:
        """One forward and backward pass, on new clips where the last are used up."""
        with self._seconds.of("update"):
            return super().training_step(*args, **kwargs)

    def _prepare_inputs(self, inputs: list[str]) -> dict[str, Tensor]:
        """The clips of the next forward pass; samples a new set where the last one is used up."""
        args, per_epoch = self.args, self.micro_batches_per_epoch
        epoch, position = divmod(self._micro_batch % (args.num_ppo_epochs * per_epoch), per_epoch)
        if epoch == position == 0:
            self._clips = self.rollout(inputs)
            random = torch.Generator().manual_seed(self._rollout_seed())
            self._orders = [torch.randperm(len(inputs), generator=random) for _ in range(args.num_ppo_epochs)]
        self._micro_batch += 1
        size = args.train_batch_size
        chosen = self._orders[epoch][position * size : (position + 1) * size].to(args.device)
        return {name: values[chosen] for name, values in self._clips.items()}

    def _rollout_seed(self) -> int:
        """Follows from step and process alone: a resumed run draws what it would have drawn, each process its own clips."""
        return clip_seed(self.args.seed, self.state.global_step // self.args.steps_per_rollout, self.args.process_index)

    # -- the algorithm ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self, prompts: list[str]) -> dict[str, Tensor]:
        """Sample a clip for each of B prompts and work out what the updates need; every value is [B, ...]."""
        args, scorer = self.args, self._scorer
        chunks = [
            slice(i, i + args.local_rollout_forward_batch_size)
            for i in range(0, len(prompts), args.local_rollout_forward_batch_size)
        ]

        # Step 1: sample from the policy itself: no guidance, no top-k, one temperature.
        generator = self.model.generator
        input_ids, attention_mask = generator.text_inputs(prompts)
        random = torch.Generator(args.device).manual_seed(self._rollout_seed())
        sampled: list[Tensor] = []
        with scorer.in_background() if args.score_in_background else nullcontext() as background:
            for c in chunks:
                with self.accelerator.autocast(), self._seconds.of("sample"):
                    codes = generator.sample_codes(
                        input_ids[c], attention_mask[c], self.frames, temperature=args.temperature, generator=random
                    )
                sampled.append(codes)
                if background is not None:
                    background.add(scorer.decode(prompts[c], codes))
            codes = torch.cat(sampled)

            # Step 2: listen. One number a clip, set against the prompt's other clips where there are any.
            heard, components = scorer.score(prompts, codes) if background is None else scorer.collect(background)
        clips = {"codes": codes, "input_ids": input_ids, "attention_mask": attention_mask}
        clips["scores"] = scores = losses.above_others(heard, args.num_generations)
        gathered = self.accelerator.gather(heard)
        # The baseline starts as the mean of the first rewards: from 0, the first hundred updates would be spent on it.
        is_first = self.state.global_step == 0 and not bool(self.model.value_head.weight.any())
        if is_first:
            self.model.value_head.bias.fill_(self.accelerator.gather(scores).mean())

        if args.objective == "ppo" and (is_first or self.micro_batches_per_epoch * args.num_ppo_epochs > 1):
            # Step 3: the policy's view at sampling time. Where one pass takes all clips, that pass itself is it, in step 5.
            views = []
            for c in chunks:
                view = self.view(input_ids[c], attention_mask[c], codes[c])
                views.append({name: view[name] for name in SEEN})
            clips |= self.weigh(scores, {name: torch.cat([view[name] for view in views]) for name in SEEN}, is_first)

        self._record({"reward": gathered.mean(), "reward_std": gathered.std(unbiased=False), **components})
        return clips

    @torch.no_grad()
    def weigh(self, scores: Tensor, old: dict[str, Tensor], is_first: bool = False) -> dict[str, Tensor]:
        """Step 4: advantages over decoder steps, and what else the clipped losses need, [B, S], of all clips of a rollout.

        Args:
            scores: [B], one number a clip.
            old: log-probabilities, values and exact KL to the anchor, [B, S], of the policy that sampled.
            is_first: the baseline is its bias alone so far, which whitened rewards scale.
        """
        args = self.args
        # Scaling the advantages scales the objective; the exact KL that the loss differentiates is scaled with them, so that
        # kl_coef keeps its meaning.
        rewards, scale = losses.step_rewards(scores, old["kl"], args.kl_coef), torch.ones((), device=args.device)
        values = old["values"]
        if args.whiten_rewards:
            # Scaled alone: a mean taken from every step, or left in it, would be a ramp in the returns, the same for all clips.
            scale = losses.deviation(self.accelerator.gather(rewards))
            rewards = rewards / scale
            if is_first:
                self.model.value_head.bias.div_(scale)
                values = values / scale
        advantages, returns = losses.gae(rewards, values, args.gamma, args.lam)
        everyone = self.accelerator.gather(advantages)
        reward_unit = float(scale * losses.deviation(everyone))
        self._kl_weight, self._entropy_weight = args.kl_coef / reward_unit, args.entropy_coef / reward_unit
        self._record({"advantage_mean": everyone.mean(), "advantage_std": everyone.std()})
        return {
            "old_logprobs": old["logprobs"],
            "old_values": values,
            "advantages": losses.whiten(advantages, everyone),
            "returns": returns,
        }

    def view(
        self, input_ids: Tensor, attention_mask: Tensor, codes: Tensor, model: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """What policy, baseline and anchor say of codes [B, K, F]: the policy's outputs."""
        inputs = (codes, input_ids, attention_mask, self.args.temperature)
        with self.accelerator.autocast():
            return (self.model if model is None else model)(*inputs, self.anchor.logits(*inputs))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch=None
    ):
        """Step 5: one forward pass and the loss of the objective, the mean over its clips."""
        args = self.args
        now = self.view(inputs["input_ids"], inputs["attention_mask"], inputs["codes"], model)
        if args.objective == "paper":
            # 5a. J = (1 - a) sum_t log pi (R - V) - a sum_t KL, and V towards the return, which is R at every step.
            returns = inputs["scores"][:, None].expand_as(now["values"])
            advantages = (returns - now["values"]).detach()
            policy_loss = -losses.musicrl_objective(
                now["logprobs"], inputs["scores"], now["values"], now["kl"], args.kl_mix
            )
            value_loss = losses.value_loss(now["values"], returns)
            self._record({"advantage_mean": advantages.mean(), "advantage_std": advantages.std()})
        else:
            # 5b. The clipped surrogate, the exact KL and the entropy of each visited state, and the clipped value loss.
            if "advantages" not in inputs:
                inputs = inputs | self.weigh(inputs["scores"], {name: now[name].detach() for name in SEEN})
            returns = inputs["returns"]
            surrogate, ratio, clip_fraction = losses.ppo_clip_loss(
                now["logprobs"], inputs["old_logprobs"], inputs["advantages"], args.cliprange
            )
            policy_loss = surrogate + self._kl_weight * now["kl"].mean()
            if args.entropy_coef:
                policy_loss = policy_loss - self._entropy_weight * now["entropy"].mean()
            value_loss = losses.value_loss(now["values"], returns, inputs["old_values"], args.cliprange_value)
            self._record({"ratio": ratio.mean(), "clip_fraction": clip_fraction})
        self._record(
            {
                "kl": now["kl"].sum(1).mean(),
                "entropy": now["entropy"].sum(1).mean() / now["mask"][0].sum(),
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "value": now["values"].mean(),
                "explained_variance": losses.explained_variance(now["values"], returns),
            }
        )
        loss = policy_loss + args.vf_coef * value_loss
        return (loss, now) if return_outputs else loss

    # -- evaluation, logs, files -----------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Sample the held-out prompts with the same seeds as ever, and score them: reward, its parts, what is watched, KL, entropy."""
        prompts = self.eval_dataset if eval_dataset is None else eval_dataset
        if not prompts:
            raise ValueError("`eval_dataset` is empty; give held-out prompts.")
        means = evaluate_held_out(self, prompts, self.model.generator, self._scorer, self.view)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _record(self, metrics: Mapping[str, Tensor | float]) -> None:
        for name, value in metrics.items():
            self._metrics[name].append(float(value.detach() if isinstance(value, Tensor) else value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was recorded since the last line, the mean over steps and processes; and where the seconds since then went."""
        if "loss" in logs:
            self._record(self._seconds.taken())
            means = torch.tensor([sum(values) / len(values) for values in self._metrics.values()])
            means = self.accelerator.reduce(means.to(self.args.device), "mean")
            logs = {**logs, **dict(zip(self._metrics, means.tolist()))}
            self._metrics.clear()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A stock MusicGen (or PEFT adapter), the value baseline in a file of its own, and no pickle."""
        if self.args.should_save:
            self.model.save(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.model.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.model.load(self.state.best_model_checkpoint)


def run_ppo(job: PPOJob) -> Path:
    """Run a job from start to finish; works alike under `accelerate launch`.

    Returns:
        `output_dir`: the model (or adapter), its value baseline, `metrics.jsonl`, `samples/` and checkpoints.
    """
    job.check_places()
    set_seed(job.seed)
    prompts = read_prompts(job.prompts)
    held_out = None if job.eval_prompts is None else read_prompts(job.eval_prompts, "eval_prompts")
    args = job.trainer_config()
    reward = load_rewards(job.reward, job.normalise, job.reward_timeout_s)
    watch = job.watched(reward)
    for part in (reward, *watch.values()):
        move_reward(part, args.rewards_at)
    generator = load_generator(job.model)
    lora = job.peft_config()
    model = generator if lora is None else add_lora(generator, lora, job.model)
    callbacks = job.stops()
    if job.sample_steps and held_out is not None:
        callbacks.append(
            SampleWriter(generator, held_out[:8], job.sample_steps, job.duration_s, job.temperature, job.seed)
        )
    trainer = MusicPPOTrainer(model, reward, args, prompts, held_out, job.ref_model, callbacks, watch)
    method = "PPO" if job.objective == "ppo" else "REINFORCE with a value baseline"
    return run_trainer(trainer, job, method, {"prompts": len(prompts)}, evaluate=held_out is not None)
