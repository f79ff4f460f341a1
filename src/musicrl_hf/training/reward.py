"""Training of the preference reward: Bradley-Terry on TRL's own `RewardTrainer` (section 3.3 of the paper).

TRL's trainer knows token sequences. A generator backbone shows it one by being seen flat (`flat.py`): the prompt's ids, then the
clip's. A CLAP backbone is frozen, so its vectors are computed once, and a sequence is the number of a row of that table. Loss,
optimisation, checkpoints and resuming are TRL's and transformers' in both cases.
"""

import copy
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from peft import LoraConfig
from torch import Tensor
from transformers import set_seed
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer

from ..audio import atomic_path
from ..bundled import read_json
from ..flat import FlatTokenizer, split_flat
from ..generator import load_generator
from ..places import check_output, contents_of, find_model
from ..preferences.agreement import pair_votes
from ..preferences.schema import DECIDED, decided_pairs, load_preferences, normalise_prompt, preference_splits
from ..preferences.splits import split_by_generator, split_by_prompt
from ..records import write_record
from ..rewards.clap import POOLINGS, load_clap
from ..rewards.combine import find_rewards, label_specs, move_reward
from ..rewards.contract import Reward
from ..rewards.preference import BACKBONES, PreferenceModel
from ..rewards.windows import WINDOW_S
from .callbacks import MetricsWriter, ShortProgress, StopsAtNaN
from .checkpoints import ASIDE, find_checkpoint, writing
from .job import BF16_HELP, common_arguments, option, run_record
from .processes import encode_in_shares
from .reward_report import accuracy_report, baseline_margins, report_text, share_right
from .seam import PlainOutputs
from .sequences import ClipSequences
from .stopping import train_or_stop

DEFAULT_MODELS = {"generator": "musicrl-tiny", "clap": "musicrl-tiny-adherence"}
DEFAULT_TEST_SHARE = 0.1  # of the prompts, where the preferences have no test split
DEFAULT_LEARNING_RATES = {"generator": 1e-4, "clap": 1e-3}
LORA_TARGETS = r"generator\.decoder\.model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"


@dataclass(kw_only=True)
class RewardJob:
    """One run of preference-reward training, as a flat YAML file or command line describes it."""

    preferences: str = field(metadata={"help": "preferences: a folder or a Hub id"})
    output_dir: str = field(metadata={"help": "folder for the model, result.json, metrics.jsonl and checkpoints"})
    backbone: str = option("generator", "generator: its decoder, fine-tuned; clap: a head on frozen CLAP vectors")
    model: str | None = option(
        None, "generator or CLAP model to start from: bundled name, folder or Hub id; none for the bundled one"
    )
    from_scratch: bool = option(False, "backbone generator: random decoder weights (the paper's ablation)")
    use_text: bool = option(True, "False scores the sound alone (the paper's ablation)")
    pooling: str = option("rhythm", "backbone clap: rhythm (statistics and onsets), statistics or embedding")
    head_size: int = option(64, "backbone clap: hidden units of the head")
    head_dropout: float = option(0.1, "backbone clap: dropout of the head, in [0, 1)")
    crop_s: float = option(WINDOW_S, "seconds of each clip, from its start, that are trained and tested on")
    ties: str = option("drop", "drop: leave tie and both_bad out; half: count them as half a choice for either side")
    min_seconds: float | None = option(None, "leave out rows whose listener heard less of a clip, in seconds")
    cache_dir: str | None = option(None, "cache of the clips' codes or vectors; none for output_dir/clips")
    test_share: float | None = option(
        None,
        "share of the train split's prompts that is held out; none for the preferences' own test split, or a tenth where "
        "they have none",
    )
    held_out_models: list[str] = option([], "generators that only held-out pairs may hold; empty splits by prompt only")
    baselines: list[str] = option(
        [], "rewards, as `musicrl score --reward` takes them, whose own accuracy on the held-out pairs is reported too"
    )
    learning_rate: float | None = option(None, "peak learning rate; none for 1e-4 (generator) or 1e-3 (clap)")
    lr_scheduler_type: str = option("linear", "schedule of the learning rate")
    warmup_steps: int = option(0, "optimiser steps of linear warm-up")
    weight_decay: float = option(0.0, "of AdamW")
    max_steps: int = option(300, "optimiser steps (the paper: 10,000 for 300,000 pairs)")
    per_device_train_batch_size: int = option(32, "pairs in one forward pass on each process (the paper: 32 in all)")
    gradient_accumulation_steps: int = option(1, "forward passes in one optimiser step")
    per_device_eval_batch_size: int = option(32, "pairs scored at once after training")
    center_rewards_coefficient: float | None = option(None, "TRL's penalty on the mean reward; none to leave it out")
    lora_r: int = option(0, "backbone generator: rank of a LoRA adapter, merged at the end; 0 trains the whole decoder")
    lora_alpha: int = option(16, "scale of the adapter, times 1 / lora_r")
    seed: int = option(42, "of the split, the head and the order of the pairs")
    logging_steps: int = option(10, "optimiser steps between two lines of metrics")
    save_steps: int = option(0, "optimiser steps between two checkpoints; 0 for none")
    save_total_limit: int | None = option(2, "checkpoints that are kept")
    bf16: bool = option(False, BF16_HELP)
    report_to: str = option("none", "none, tensorboard, wandb or trackio")
    resume_from_checkpoint: str | None = option(
        None, 'folder of a checkpoint, or "last" for the whole one in output_dir that was saved last'
    )

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"`backbone` must be one of {', '.join(BACKBONES)}, got {self.backbone!r}.")
        for name, known in (("ties", ("drop", "half")), ("pooling", POOLINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.backbone == "clap" and (self.lora_r or self.from_scratch):
            raise ValueError(
                f"`backbone` = 'clap' is frozen and only its head is trained: `lora_r` = {self.lora_r} and "
                f"`from_scratch` = {self.from_scratch} are for 'generator'; leave them out."
            )
        if self.from_scratch and self.lora_r:
            raise ValueError("`lora_r` adapts trained weights, and `from_scratch` has none; set one of them only.")
        for name in ("lora_r", "warmup_steps", "save_steps", "weight_decay", "save_total_limit"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` must be at least 0, got {getattr(self, name)!r}.")
        batches = ("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")
        for name in ("max_steps", *batches, "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)!r}.")
        if not self.crop_s > 0:
            raise ValueError(f"`crop_s` must be above 0 seconds, got {self.crop_s!r}.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be above 0, got {self.learning_rate!r}.")
        label_specs(self.baselines, "baselines")

    def trainer_config(self) -> RewardConfig:
        """TRL's arguments for this job."""
        alike = {
            name: getattr(self, name)
            for name in (
                *("output_dir", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_steps", "seed", "bf16"),
                *("per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size"),
                *("center_rewards_coefficient", "logging_steps", "save_total_limit", "report_to"),
            )
        }
        return RewardConfig(
            **alike,
            learning_rate=self.learning_rate or DEFAULT_LEARNING_RATES[self.backbone],
            save_strategy="steps" if self.save_steps else "no",
            save_steps=self.save_steps or self.max_steps,
            max_length=None,  # TRL would leave out every clip of more than 1024 ids
            gradient_checkpointing=None,  # off, where TRL has it on
            disable_dropout=self.backbone == "generator",
            ddp_find_unused_parameters=False,
            **common_arguments(self.bf16),
        )


class FlatPreferenceModel(PreferenceModel):
    """A preference model on a generator, seen as a sequence classifier over flat ids; the weights are the same."""

    main_input_name = "input_ids"

    @classmethod
    def from_model(cls, model: PreferenceModel) -> "FlatPreferenceModel":
        """Nothing is copied: training this trains `model`."""
        flat = copy.copy(model)
        flat.__class__ = cls
        return flat

    def get_input_embeddings(self) -> None:
        """None: there is a table a codebook, and nothing that a trainer could take for the one."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Logits [B, 1] of sequences [B, L]: a prompt's flat ids, then a whole clip's."""
        batch = split_flat(input_ids, attention_mask, self.config.generator)
        scores = self.score_codes(batch.codes, batch.text_ids, batch.text_mask)
        return SequenceClassifierOutput(logits=scores[:, None])


class TabledPreferenceModel(PreferenceModel):
    """A preference model on CLAP, seen as a sequence classifier over row numbers of a table of its features."""

    main_input_name = "input_ids"
    table: Tensor

    @classmethod
    def from_model(cls, model: PreferenceModel, table: Tensor) -> "TabledPreferenceModel":
        """Nothing is copied: training this trains `model`. `table` holds features [N, D]."""
        tabled = copy.copy(model)
        tabled.__class__ = cls
        tabled.table = table
        return tabled

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:
        """Logits [B, 1] of row numbers [B, 1]."""
        features = self.table[input_ids[:, 0].to(self.table.device)].to(input_ids.device)
        return SequenceClassifierOutput(logits=self.head(features)[:, None])


class MusicRewardTrainer(PlainOutputs, RewardTrainer):
    """TRL's `RewardTrainer` as it is, without its ping, its card for language models and its pickle."""


def bradley_terry_pairs(
    ds: Dataset, ids: Iterable[tuple[list[int], list[int]]], ties: str, path: str | Path
) -> Dataset:
    """The pairs that TRL trains on, in a file that is mapped into memory.

    Its loss is -log sigmoid(chosen - rejected) for each pair. A tie counted half is -0.5 log sigmoid(a - b) - 0.5 log
    sigmoid(b - a): with `ties` = "half" a tie stands here in both orders, and each decided pair twice.

    Args:
        ds: preference rows.
        ids: sequences of the chosen and the rejected clip of each row.
        ties: "drop" or "half".
        path: of the file.
    """
    features = Features({name: List(Value("int32")) for name in ("chosen_ids", "rejected_ids")})
    with (
        atomic_path(path) as temporary,
        ArrowWriter(features=features, path=str(temporary), writer_batch_size=64) as writer,
    ):
        for label, (chosen, rejected) in zip(ds["preference"], ids, strict=True):
            orders = []
            if label in DECIDED:
                orders = [(chosen, rejected)] * (2 if ties == "half" else 1)
            elif ties == "half":
                orders = [(chosen, rejected), (rejected, chosen)]
            for first, second in orders:
                writer.write({"chosen_ids": first, "rejected_ids": second})
        writer.finalize()
    return Dataset.from_file(str(path))


def split_preferences(job: RewardJob) -> DatasetDict:
    """Train and held-out rows that share no prompt; with `held_out_models`, none of them in training and one a test row.

    Raises:
        ValueError: where one of the sides stays empty, or the preferences' own splits share a prompt.
    """
    train = load_preferences(job.preferences)
    if job.test_share is None and "test" in preference_splits(job.preferences):
        sides = DatasetDict(train=train, test=load_preferences(job.preferences, "test"))
        shared = {normalise_prompt(prompt) for prompt in train["prompt"]} & set(
            map(normalise_prompt, sides["test"]["prompt"])
        )
        if shared:
            raise ValueError(
                f"`preferences` = {job.preferences!r} have the prompt {sorted(shared)[0]!r} in their train and in their test "
                "split, so that the test would not be of prompts that were held out: give a `test_share`."
            )
    else:
        sides = split_by_prompt(train, DEFAULT_TEST_SHARE if job.test_share is None else job.test_share, job.seed)
    if not job.held_out_models:
        return sides
    return DatasetDict({side: split_by_generator(sides[side], job.held_out_models)[side] for side in ("train", "test")})


def build_model(job: RewardJob) -> PreferenceModel:
    """The untrained preference model of a job."""
    name = job.model or DEFAULT_MODELS[job.backbone]
    if job.backbone == "clap":
        return PreferenceModel.from_clap(
            *load_clap(name),
            use_text=job.use_text,
            pooling=job.pooling,
            head_size=job.head_size,
            head_dropout=job.head_dropout,
        )
    model = PreferenceModel.from_generator(load_generator(name), from_scratch=job.from_scratch, use_text=job.use_text)
    model.generator.disable_dropout()  # TRL turns modules' dropout off; the decoder's is no module
    return model


@torch.no_grad()
def held_out_margins(trainer: RewardTrainer, pairs: Dataset) -> Tensor:
    """Score of the chosen minus that of the rejected clip, [N], for pairs of sequences."""
    trainer.model.eval()
    batches = torch.utils.data.DataLoader(
        pairs, batch_size=trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator
    )
    margins = []
    for batch in batches:
        logits = trainer.model(**{name: tensor.to(trainer.args.device) for name, tensor in batch.items()}).logits
        chosen, rejected = logits[:, 0].float().cpu().chunk(2)
        margins.append(chosen - rejected)
    return torch.cat(margins)


def run_reward(job: RewardJob) -> Path:
    """Train a preference reward and test it on prompts that it never saw; works alike under `accelerate launch`.

    Returns:
        `output_dir`: the model folder (for "preference:DIR"), result.json, metrics.jsonl and checkpoints.

    Raises:
        ValueError: no decided pairs, a side of the split that stays empty, or an `output_dir` that holds something else.
        FileNotFoundError: no such preferences or model, or no checkpoint to resume from.
        OSError: the disk is full.
        SystemExit: on SIGTERM, after a checkpoint.
    """
    started = time.monotonic()
    args = job.trainer_config()
    check_output(job.output_dir, "a preference reward")
    _check_backbone(job)
    name = job.model or DEFAULT_MODELS[job.backbone]
    find_model(name, "clap" if job.backbone == "clap" else "musicgen", "model")
    checkpoint = find_checkpoint(job.resume_from_checkpoint, job.output_dir)
    baselines = {label: find_rewards(spec) for label, spec in label_specs(job.baselines, "baselines").items()}
    set_seed(job.seed)
    split = split_preferences(job)
    kept, counts = {}, {}
    for side, rows in split.items():
        keep_ties = side == "train" and job.ties == "half"
        called = {"train": "rows to train on", "test": "held-out rows (a `test_share` holds out more)"}[side]
        kept[side], counts[side] = decided_pairs(rows, job.min_seconds, keep_ties, called)
    reached = {}  # before the training, so that a reward that fails costs none
    for label, load in baselines.items() if PartialState().is_main_process else ():
        reached[label] = _baseline(load(), kept["test"], job.crop_s, label, args.device)

    model = build_model(job).to(args.device)
    clips = ClipSequences(model, job.crop_s, job.cache_dir or Path(job.output_dir) / "clips")
    encode_in_shares(clips.encode, kept["train"], kept["test"])
    pairs, own = Path(job.output_dir) / "pairs", PartialState().process_index
    train = bradley_terry_pairs(kept["train"], clips.of_rows(kept["train"]), job.ties, pairs / f"train-{own}.arrow")
    fitted = len(clips.table) if job.backbone == "clap" else 0
    test = bradley_terry_pairs(kept["test"], clips.of_rows(kept["test"]), "drop", pairs / f"test-{own}.arrow")
    if job.backbone == "clap":
        model.head.fit(clips.table[:fitted].to(args.device))  # standardised by what the training side holds
        view: PreferenceModel = TabledPreferenceModel.from_model(model, clips.table)
        tokenizer = model.tokenizer
    else:
        view = FlatPreferenceModel.from_model(model)
        tokenizer = FlatTokenizer.for_generator(model.generator)

    trainer = MusicRewardTrainer(
        view,
        args,
        train_dataset=train,
        processing_class=tokenizer,
        callbacks=[MetricsWriter(), StopsAtNaN()],
        peft_config=_lora(job) if job.lora_r else None,
    )
    ShortProgress.shorten(trainer)
    outcome = train_or_stop(trainer, checkpoint)
    if job.lora_r:
        trainer.model = trainer.model.merge_and_unload()
    whole = trainer.accelerator.get_state_dict(model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():  # before the report, which takes its time
        with writing(job.output_dir):
            _save(model, Path(job.output_dir), whole)
    margins = held_out_margins(trainer, test)
    meetings = list(zip(kept["test"]["chosen_model"], kept["test"]["rejected_model"]))
    metrics = accuracy_report(margins, meetings, pair_votes(kept["test"])) | {
        "baselines": reached,
        "n_train_pairs": counts["train"]["kept"],
        "train_loss": outcome.training_loss,
        "rows": counts,
    }
    if trainer.is_world_process_zero():
        method = f"Bradley-Terry on {'the decoder of a generator' if job.backbone == 'generator' else 'frozen CLAP'}"
        write_record(job.output_dir, run_record(trainer, job, name, method, metrics, time.monotonic() - started))
        print(report_text(metrics))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        shutil.rmtree(pairs)
    return Path(job.output_dir)


def _baseline(reward: Reward, rows: Dataset, crop_s: float, label: str, device: torch.device) -> dict[str, Any]:
    move_reward(reward, device)
    margins = baseline_margins(reward, rows, crop_s, label)
    return {"accuracy": share_right(margins), "n_votes": len(margins), "equal_scores": int((margins == 0).sum())}


def _check_backbone(job: RewardJob) -> None:
    """A reward on another backbone is of another kind, whose files and checkpoints would lie between the new ones."""
    if contents_of(job.output_dir) == "a preference reward":
        there = read_json(Path(job.output_dir) / "config.json").get("backbone")
        if there != job.backbone:
            raise ValueError(
                f"`output_dir` = {job.output_dir!r} holds a preference reward with `backbone` = {there!r}, and this run trains "
                f"{job.backbone!r}: give another folder, or move away what is there."
            )


def _lora(job: RewardJob) -> LoraConfig:
    return LoraConfig(r=job.lora_r, lora_alpha=job.lora_alpha, target_modules=LORA_TARGETS, modules_to_save=["score"])


def _save(model: PreferenceModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):  # the trainer's, of the flat vocabulary
        setattr(model.config, name, None)
    with tempfile.TemporaryDirectory(prefix=ASIDE, dir=folder) as scratch:  # each file appears whole
        model.save_pretrained(scratch, state_dict=weights)
        for path in Path(scratch).iterdir():
            path.replace(folder / path.name)
