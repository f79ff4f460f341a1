"""What the jobs on TRL's trainers have in common: their fields, and how a run starts and ends."""

import dataclasses
import datetime
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import Trainer, TrainerState

from ..bundled import read_json
from ..devices import device_name
from ..places import check_output, find_model
from ..preferences.schema import read_prompts as read_prompts
from ..records import Record, write_record
from .callbacks import MetricsWriter, ShortProgress, StopsAtNaN
from .checkpoints import find_checkpoint, writing
from .ppo_policy import LORA_TARGETS
from .stopping import train_or_stop

NORMALISE_HELP = (
    'how rewards are combined, over the clips of a step: "none" adds them as they are, "normalise_then_sum" keeps one from '
    'drowning another, "normalise_then_min" and, for one kind of reward from several seeds, "centre_then_min" take the '
    "lowest; see `CombinedReward`"
)

BF16_HELP = (
    "train in bfloat16 (autocast; weights stay float32); a CPU needs AVX512-BF16 or the like for it to be faster"
)


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help line."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class TrainingJob:
    """The fields of every job; the names are those of TRL and transformers."""

    model: str = option("musicrl-tiny", "generator to start from: bundled name, folder or Hub id")
    ref_model: str | None = option(
        None, "reference of the KL: a generator; none for the model that the run starts from"
    )
    output_dir: str = field(metadata={"help": "folder for the trained model, metrics.jsonl and result.json"})
    learning_rate: float = option(1e-5, "peak learning rate of AdamW")
    lr_scheduler_type: str = option("constant_with_warmup", "schedule of the learning rate")
    warmup_steps: int = option(0, "optimiser steps of linear warm-up")
    weight_decay: float = option(0.0, "of AdamW")
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm")
    max_steps: int = option(1000, "optimiser steps")
    per_device_train_batch_size: int = option(8, "pairs (DPO) or clips (PPO, RLOO, GRPO) in one forward pass a process")
    gradient_accumulation_steps: int = option(1, "forward passes in one optimiser step")
    lora_r: int = option(0, "rank of a LoRA adapter on the decoder; 0 trains the whole decoder")
    lora_alpha: int = option(16, "scale of the adapter, times 1 / lora_r")
    seed: int = option(42, "of data order, sampling and initialisation")
    logging_steps: int = option(10, "optimiser steps between two lines of metrics")
    save_steps: int = option(0, "optimiser steps between two checkpoints; 0 for none")
    save_total_limit: int | None = option(2, "checkpoints that are kept")
    bf16: bool = option(False, BF16_HELP)
    gradient_checkpointing: bool = option(False, "compute activations twice to save memory")
    report_to: str = option("none", "none, tensorboard, wandb or trackio")
    resume_from_checkpoint: str | None = option(
        None, 'folder of a checkpoint, or "last" for the whole one in output_dir that was saved last'
    )

    def __post_init__(self) -> None:
        at_least = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        at_least |= {"logging_steps": 1, "lora_r": 0, "save_steps": 0, "warmup_steps": 0}
        for name, least in at_least.items():
            if vars(self)[name] < least:
                raise ValueError(f"`{name}` must be at least {least}, got {vars(self)[name]!r}.")
        if self.save_total_limit is not None and self.save_total_limit < 0:
            raise ValueError(
                f"`save_total_limit` must be at least 0, got {self.save_total_limit!r}; none or 0 keeps all."
            )
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be above 0, got {self.learning_rate!r}.")

    @property
    def steps_per_rollout(self) -> int:
        """A run goes on exactly from multiples of so many optimiser steps."""
        return 1

    def shared_arguments(self) -> dict[str, Any]:
        """The fields that a trainer's config takes under the same name, and how often it saves."""
        own = (
            "model",
            "ref_model",
            "lora_r",
            "lora_alpha",
            "save_steps",
            "resume_from_checkpoint",
            "gradient_checkpointing",
        )
        shared = {f.name: vars(self)[f.name] for f in dataclasses.fields(TrainingJob) if f.name not in own}
        return shared | {
            "save_strategy": "steps" if self.save_steps else "no",
            "save_steps": self.save_steps or self.max_steps,
            "activation_checkpointing": self.gradient_checkpointing,  # transformers' newer name for it
            **common_arguments(self.bf16),
        }

    def peft_config(self) -> LoraConfig | None:
        """LoRA on the decoder's layers, or None. No dropout: it would part the policy from its own samples."""
        if self.lora_r == 0:
            return None
        return LoraConfig(r=self.lora_r, lora_alpha=self.lora_alpha, lora_dropout=0.0, target_modules=LORA_TARGETS)

    def check_places(self) -> None:
        """Tell at once what would otherwise be told after minutes, or not at all.

        Raises:
            ValueError: `output_dir` holds something else than this job writes; `model` or `ref_model` is no generator.
            FileNotFoundError: no such generator, or no checkpoint to resume from.
        """
        check_output(self.output_dir, "an adapter" if self.lora_r else "a generator")
        find_model(self.model, "musicgen", "model")
        if self.ref_model is not None:
            find_model(self.ref_model, "musicgen", "ref_model")
        self.checkpoint()

    def checkpoint(self) -> str | None:
        """The checkpoint to resume from.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not whole, holds pickled code, or has an adapter of another rank than `lora_r`.
        """
        found = find_checkpoint(self.resume_from_checkpoint, self.output_dir)
        if found is not None:
            config = Path(found) / "adapter_config.json"
            rank = read_json(config).get("r") if config.is_file() else 0
            if rank != self.lora_r:
                has = f"an adapter of rank {rank!r}" if rank else "no adapter (`lora_r` 0)"
                raise ValueError(
                    f"`lora_r` = {self.lora_r}, and {found} has {has}: give that, or another `resume_from_checkpoint`."
                )
        return found


def common_arguments(bf16: bool) -> dict[str, bool]:
    """What every trainer's config says of the device and of numbers that are none."""
    return {
        "logging_nan_inf_filter": False,  # on, a loss that is no number is logged as 0
        "use_cpu": bf16 and not torch.accelerator.is_available(),  # transformers asks to be told that a CPU is meant
        "dataloader_pin_memory": torch.cuda.is_available(),  # elsewhere torch warns and does not
    }


def run_trainer(
    trainer: Trainer, job: TrainingJob, method: str, metrics: dict[str, Any], evaluate: bool = False
) -> Path:
    """Train, and leave model, tokenizer, metrics.jsonl and result.json in `job.output_dir`.

    Args:
        trainer: one of this package's, built.
        job: its configuration.
        method: what `result.json` calls it.
        metrics: more numbers for it.
        evaluate: also evaluate the saved model on the trainer's evaluation set, unless that was done while it trained.

    Raises:
        OSError: the disk is full.
        ValueError: it diverged.
        SystemExit: on SIGTERM, after a checkpoint.
    """
    started = time.monotonic()
    trainer.add_callback(MetricsWriter())
    trainer.add_callback(StopsAtNaN())
    ShortProgress.shorten(trainer)
    train_or_stop(trainer, job.checkpoint(), job.steps_per_rollout)
    with writing(job.output_dir):
        trainer.save_model(job.output_dir)
    state, saved = trainer.state, trainer.state.global_step
    if trainer.args.load_best_model_at_end and state.best_global_step is not None:
        saved = state.best_global_step
        metrics = metrics | {"best_step": saved}
        if state.is_world_process_zero:
            print(
                f"Saved the weights of step {saved}: the best, with {trainer.args.metric_for_best_model} {state.best_metric:.4g}."
            )
    evaluated = (_evaluation_at(saved, state) or trainer.evaluate()) if evaluate else {}
    if trainer.accelerator.is_main_process:
        lines = [line for line in state.log_history if "loss" in line and line["step"] <= saved]
        logged: dict[str, Any] = lines[-1] if lines else {}
        seconds = time.monotonic() - started
        record = run_record(trainer, job, job.model, method, metrics | logged | evaluated, seconds)
        write_record(job.output_dir, record)
    trainer.accelerator.wait_for_everyone()
    return Path(job.output_dir)


def _evaluation_at(step: int, state: TrainerState) -> dict[str, float]:
    """The evaluation after a step; empty where there was none."""
    lines = [line for line in state.log_history if line["step"] == step]
    return {name: value for line in lines for name, value in line.items() if name.startswith("eval_")}


def run_record(
    trainer: Trainer, job: Any, base_model: str, method: str, metrics: dict[str, Any], seconds: float
) -> Record:
    """What `result.json` says of a run of `job`, a job's dataclass, that took `seconds`."""
    processes = trainer.accelerator.num_processes
    return Record(
        base_model=base_model,
        method=method,
        metrics={"world_size": processes} | metrics,
        config=dataclasses.asdict(job),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        date=datetime.date.today().isoformat(),
        hardware=f"{processes} x {device_name(trainer.args.device)}",
        seconds=seconds,
    )
