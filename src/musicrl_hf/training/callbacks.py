"""What happens beside training: clips to hear, a log that any tool can read, and a limit on how far the policy drifts."""

import errno
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..audio import atomic_path, write_audio
from ..devices import device_name
from ..generator import MusicRLForConditionalGeneration
from .checkpoints import writing

# what a line on the terminal shows of what a trainer logs, in this order; metrics.jsonl has everything
SHOWN = (
    *(
        "loss",
        "reward",
        "kl",
        "entropy",
        "accuracy",
        "margin",
        "rewards/accuracies",
        "rewards/margins",
        "learning_rate",
    ),
    *("eval_loss", "eval_reward", "eval_kl", "eval_rewards/accuracies", "eval_rewards/margins"),
    *("train_loss", "train_runtime"),
)


class ShortProgress(ProgressCallback):
    """The stock progress bar, with one short line in the place of all that is logged, and one first that says on what it runs."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.is_world_process_zero:
            precision = "bfloat16 where it can" if args.bf16 else "the weights' own precision"
            print(f"Training on {args.world_size} x {device_name(args.device)}, in {precision}.")
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs
    ) -> None:
        values = logs or {}
        shown = [f"{name} {values[name]:.4g}" for name in SHOWN if name in values]
        if shown and state.is_world_process_zero:
            write = print if self.training_bar is None else self.training_bar.write
            write(f"step {state.global_step} of {state.max_steps}: {', '.join(shown)}")

    @staticmethod
    def shorten(trainer: Trainer) -> None:
        """Put it in the place of the trainer's own; a trainer that shows no bar is left as it is."""
        if trainer.pop_callback(ProgressCallback) is not None:
            trainer.add_callback(ShortProgress())


class SampleWriter(TrainerCallback):
    """Write one clip for each prompt to `output_dir/samples/step_N/` every `every` steps, from step 0 on.

    The seed is the same each time, so that what changes between two steps is the model. Sampling is that of training (no
    guidance, no top-k): what is heard is what the reward hears.

    Args:
        generator: the generator that is trained.
        prompts: texts, a clip each.
        every: optimiser steps between two sets.
        duration_s: of each clip, in seconds.
        temperature: of sampling.
        seed: of the clips.
    """

    def __init__(
        self,
        generator: MusicRLForConditionalGeneration,
        prompts: Sequence[str],
        every: int,
        duration_s: float,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"`every` must be at least 1 step, got {every!r}.")
        self.generator, self.prompts, self.every = generator, list(prompts), every
        self.duration_s, self.temperature, self.seed = duration_s, temperature, seed

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step == 0:
            self._write(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step % self.every == 0:
            self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        if not state.is_world_process_zero:
            return
        random = torch.Generator(self.generator.device).manual_seed(self.seed)
        frames, rate = self.generator.frames_for(self.duration_s), self.generator.sampling_rate
        text = self.generator.text_inputs(self.prompts)
        device = self.generator.device.type
        with torch.autocast(device, torch.bfloat16, enabled=args.bf16):  # as clips are sampled to learn from
            codes = self.generator.sample_codes(*text, frames, temperature=self.temperature, generator=random)
        clips = self.generator.decode_codes(codes, round(self.duration_s * rate))
        folder = Path(str(args.output_dir)) / "samples" / f"step_{state.global_step}"
        for i, (prompt, audio) in enumerate(zip(self.prompts, clips)):
            words = re.sub(r"[^a-z0-9]+", "_", prompt.lower()).strip("_")[:60]
            write_audio(folder / f"{i:02d}_{words}.wav", audio, rate)


class MetricsWriter(TrainerCallback):
    """Append every log line to `output_dir/metrics.jsonl`, one JSON object a line, the last step's among them.

    A run that is resumed at step N first drops the lines after N that the interrupted run had written, so that each step
    stands there once; a run from the start begins a new file.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        path = self._path(args)
        if not state.is_world_process_zero or not path.is_file():
            return
        whole = path.read_text().rpartition("\n")[0]  # a machine that broke down may have left half a line behind it
        lines = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                if json.loads(line)["step"] <= state.global_step:
                    lines.append(line)
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {number} is not what a run logs ({error}): remove that line."
                ) from error
        with atomic_path(path) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines if state.log_history))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step == state.max_steps:  # whatever `logging_steps` is: a short run is not without figures
            control.should_log = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        # JSON knows no NaN: null says that there was a value and that it was no number.
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
        line = json.dumps({"step": state.global_step, **values}) + "\n"
        path = self._path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        # One write to a descriptor opened for appending: a line is there whole or not at all.
        with writing(str(path)):
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                before = os.fstat(descriptor).st_size
                if os.write(descriptor, line.encode()) < len(line):  # the rest found no room
                    os.ftruncate(descriptor, before)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)

    @staticmethod
    def _path(args: TrainingArguments) -> Path:
        return Path(str(args.output_dir)) / "metrics.jsonl"


class StopsAtNaN(TrainerCallback):
    """Ends a training whose loss or weights are no numbers any more, before a checkpoint of them replaces a good one."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs
    ) -> None:
        for name in ("loss", "kl", "grad_norm"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                self._end(f"`{name}` is {value}", state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs
    ) -> None:
        if control.should_save:
            for name, weight in model.named_parameters():
                if weight.requires_grad and not bool(torch.isfinite(weight).all()):
                    self._end(f"The weight {name} holds what is no number", state)

    @staticmethod
    def _end(what: str, state: TrainerState) -> None:
        raise ValueError(
            f"{what} at step {state.global_step}: the training has diverged. Go on from an earlier checkpoint with a lower "
            "`learning_rate`, or look at the rewards."
        )


class KLBudget(TrainerCallback):
    """Stop when the logged KL to the anchor passes a budget: far from it, the reward is no longer to be trusted.

    What is logged of a step is of the policy that sampled its clips; an evaluation's KL is of the policy behind the step.

    Args:
        max_kl: nats a clip, above 0.
        key: the metric to watch; behind "eval_" it is of whole clips.
        codes: of a clip, K * F, where the metric is a mean over them, as TRL's is; 1 where it is of whole clips.
    """

    def __init__(self, max_kl: float, key: str = "kl", codes: int = 1) -> None:
        if not max_kl > 0:
            raise ValueError(f"`max_kl` must be above 0 nats, got {max_kl!r}.")
        self.max_kl, self.key, self.codes = max_kl, key, codes

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs
    ) -> None:
        logged = logs or {}
        kls = (self.codes * logged.get(self.key, 0.0), logged.get(f"eval_{self.key}", 0.0))
        over = [kl for kl in kls if not kl <= self.max_kl]  # no number is over it, too
        if over:
            if state.is_world_process_zero:
                print(
                    f"KL to the anchor is {over[0]:.4g} nats a clip, over `max_kl` = {self.max_kl:g}: "
                    f"stopping at step {state.global_step}."
                )
            control.should_training_stop = True
