"""Direct preference optimisation: TRL's own DPOTrainer on pairs of clips whose codes are cached."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import generate_random_fingerprint
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer

from ..audio import atomic_path
from ..flat import FlatTokenizer, flatten_codes
from ..generator import MusicRLConfig, MusicRLForConditionalGeneration
from ..preferences.codes import CODE_COLUMNS, cache_codes, encode_clips
from ..preferences.listeners import count_listeners
from ..preferences.schema import decided_pairs, load_preferences
from ..preferences.splits import split_by_prompt
from .job import BF16_HELP, TrainingJob, option, run_trainer
from .processes import encode_in_shares
from .seam import FlatTrainer, flat_of, prepare_generator, prepare_reference

PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)


@dataclass
class MusicDPOConfig(DPOConfig):
    """TRL's `DPOConfig` with defaults for clips, which are never cut."""

    max_length: int | None = option(None, "must stay empty: a clip that is cut has no log-probability")
    gradient_checkpointing: bool | None = option(
        None, "off here, where TRL has it on; activation_checkpointing turns it on"
    )
    bf16: bool = option(False, BF16_HELP)
    report_to: str | list[str] | None = option("none", "where to report to")
    ddp_find_unused_parameters: bool | None = option(False, "every trained parameter takes part in each step")

    def __post_init__(self) -> None:
        if self.max_length is not None:
            raise ValueError(
                f"`max_length` = {self.max_length} would cut clips in the middle, or drop them all; leave it None, and "
                "shorten the clips themselves where memory is short."
            )
        super().__post_init__()


class MusicDPOTrainer(FlatTrainer, DPOTrainer):
    """TRL's DPOTrainer for generators. The codec is not touched: pairs come as codes.

    Args:
        model: generator (or a PEFT model over a `FlatMusicRLForCausalLM`), or its name.
        ref_model: reference; None takes a copy of `model` (with `args.precompute_ref_log_probs` no copy is kept; with an
            adapter, the model without it).
        args: a `MusicDPOConfig`.
        train_dataset: rows with `prompt`, `chosen_codes`, `rejected_codes` ([K, F], as `cache_codes` makes them). Where
            there is a `preference` column, ties are left out and counted in `left_out`.
        eval_dataset: likewise.
        callbacks, optimizers, peft_config: as in TRL.

    Raises:
        ValueError: no pairs, missing columns, codes of another number of codebooks or beyond the codebook, or a
            `max_length`.

    Example:
        >>> trainer = MusicDPOTrainer("musicrl-tiny", args=MusicDPOConfig("out"), train_dataset=pairs)  # doctest: +SKIP
    """

    trl_module = "trl.trainer.dpo_trainer"

    def __init__(
        self,
        model: str | MusicRLForConditionalGeneration | PeftModel,
        ref_model: str | MusicRLForConditionalGeneration | None = None,
        args: MusicDPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        if not isinstance(args, MusicDPOConfig):
            raise ValueError(f"`args` must be a MusicDPOConfig, got {type(args).__name__}.")
        if train_dataset is None:
            raise ValueError("`train_dataset` is needed: rows with prompt, chosen_codes and rejected_codes.")
        model = prepare_generator(model)
        anchor = prepare_reference(ref_model, flat_of(model))
        self.left_out: dict[str, int] = {}
        tokenizer = FlatTokenizer.for_generator(flat_of(model))
        config = flat_of(model).config
        folder = Path(str(args.output_dir)) / "pairs"
        given = {"train": train_dataset} | ({} if eval_dataset is None else {"eval": eval_dataset})
        pairs = {
            name: self._pairs(part, f"{name}_dataset", tokenizer, config, folder / f"{name}-{args.process_index}.arrow")
            for name, part in given.items()
        }
        if args.precompute_ref_log_probs:
            pairs = {name: _on_disk(part, folder / name) for name, part in pairs.items()}
        self.build(
            model,
            anchor,
            ref_model=anchor,
            args=args,
            data_collator=PairCollator(tokenizer.pad_token_id),
            train_dataset=pairs["train"],
            eval_dataset=pairs.get("eval"),
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        if args.precompute_ref_log_probs and not isinstance(self.accelerator.unwrap_model(self.model), PeftModel):
            self.ref_model = None  # TRL keeps one that it was given, and needs it no more

    def _pairs(self, ds: Dataset, name: str, tokenizer: FlatTokenizer, config: MusicRLConfig, path: Path) -> Dataset:
        missing = [column for column in ("prompt", *CODE_COLUMNS) if column not in ds.column_names]
        if missing:
            raise ValueError(
                f"`{name}` has no column {missing[0]!r} (it has {', '.join(ds.column_names)}); add the codes with "
                "musicrl_hf.preferences.codes.cache_codes."
            )
        if len(ds) == 0:
            raise ValueError(f"`{name}` is empty; give at least one pair with a winner.")
        if "preference" in ds.column_names:
            ds, self.left_out[name] = _without_ties(ds, name)
        return flat_pairs(ds, tokenizer, config, path)

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        """TRL would tokenise text here; ours are ids already."""
        return dataset


@dataclass(frozen=True)
class PairCollator:
    """Rows of `flat_pairs` to a batch, as TRL's `DataCollatorForPreference` makes it, in a tenth of its time: masks are made of lengths."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `completion_mask` [2 B, L]: chosen clips, then rejected ones; the reference's log-probabilities [B]."""
        given = [np.array([*row["prompt_ids"], *row[name]], np.int64) for name in PAIR_COLUMNS[1:] for row in rows]
        lengths = torch.tensor([[len(ids)] for ids in given])
        prompts = torch.tensor([[len(row["prompt_ids"])] for row in [*rows, *rows]])
        ids = pad_sequence([*map(torch.from_numpy, given)], batch_first=True, padding_value=self.pad_token_id)
        place = torch.arange(ids.shape[1])
        attended = place < lengths
        batch = {
            "input_ids": ids,
            "attention_mask": attended.long(),
            "completion_mask": (attended & (place >= prompts)).long(),
        }
        scored = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in rows[0]]
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in scored}


def _without_ties(ds: Dataset, name: str) -> tuple[Dataset, int]:
    kept = [row for row, label in enumerate(ds["preference"]) if label in ("a", "b")]
    if not kept:
        raise ValueError(f"`{name}`: none of its {len(ds)} rows has a winner; DPO needs at least one pair.")
    return ds.select(kept), len(ds) - len(kept)


def flat_pairs(ds: Dataset, tokenizer: FlatTokenizer, config: MusicRLConfig, path: Path) -> Dataset:
    """Rows with prompts and codes to rows of flat ids, in a file that is mapped into memory.

    Args:
        ds: `prompt`, `chosen_codes`, `rejected_codes`.
        tokenizer, config: of the generator.
        path: of the file.

    Returns:
        `prompt_ids`, `chosen_ids`, `rejected_ids`, lists of int32.

    Raises:
        ValueError: codes that do not fit the generator, with the row's number.
    """

    def row_ids(row: dict[str, Any], number: int) -> dict[str, list[int]]:
        ids = {"prompt_ids": tokenizer([row["prompt"]])["input_ids"][0]}
        for column, out in zip(CODE_COLUMNS, PAIR_COLUMNS[1:], strict=True):
            codes = torch.as_tensor(row[column], dtype=torch.long)
            if codes.dim() != 2 or codes.shape[0] != config.num_codebooks:
                raise ValueError(
                    f"row {number}: `{column}` has shape {tuple(codes.shape)}, the generator {config.num_codebooks} "
                    "codebooks; encode the clips with this generator's codec."
                )
            try:
                ids[out] = flatten_codes(codes[None], config.codebook_size, config.audio_channels)[0].tolist()
            except ValueError as error:
                raise ValueError(f"row {number}: `{column}`: {error}") from None
        return ids

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = ["prompt", *CODE_COLUMNS]
    return ds.select_columns(columns).map(
        row_ids,
        with_indices=True,
        remove_columns=columns,
        features=Features({name: List(Value("int32")) for name in PAIR_COLUMNS}),
        cache_file_name=str(path),
        load_from_cache_file=False,
        writer_batch_size=64,
        new_fingerprint=generate_random_fingerprint(),
        desc="flattening pairs",
    )


def _on_disk(pairs: Dataset, folder: Path) -> Dataset:
    """The same rows in a folder that all processes share: TRL's cache of reference log-probabilities lies beside them."""
    state = PartialState()
    if state.is_main_process:
        with atomic_path(folder) as temporary:
            pairs.save_to_disk(temporary)
    state.wait_for_everyone()
    return Dataset.load_from_disk(str(folder))


@dataclass(kw_only=True)
class DPOJob(TrainingJob):
    """One DPO run, as a flat YAML file or command line describes it."""

    preferences: str = field(metadata={"help": "preference data set: folder or Hub id"})
    beta: float = option(0.1, "strength of the pull to the reference")
    loss_type: str = option("sigmoid", f"TRL's name of the loss: {', '.join(LOSSES)}")
    label_smoothing: float = option(0.0, "probability that a vote is wrong, for the losses that know it, in [0, 0.5)")
    precompute_ref_log_probs: bool = option(
        False,
        "score all pairs with the reference first, then drop it from memory (with LoRA a ref_model of its own stays)",
    )
    test_share: float = option(0.0, "share of the prompts that is kept out and evaluated at the end, in [0, 1)")
    min_seconds: float | None = option(None, "leave out votes of listeners who heard less of a clip, in seconds")
    codes_dir: str | None = option(None, "cache of the clips' codes; none for output_dir/codes")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ValueError(f"`beta` must be above 0, got {self.beta!r}.")
        if not 0 <= self.test_share < 1:
            raise ValueError(f"`test_share` must lie in [0, 1), got {self.test_share!r}.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"`label_smoothing` must lie in [0, 0.5), got {self.label_smoothing!r}.")
        if self.loss_type not in LOSSES:
            raise ValueError(f"`loss_type` must be one of {', '.join(LOSSES)}, got {self.loss_type!r}.")
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("`loss_type` = 'exo_pair' needs a `label_smoothing` above 0, such as 0.001; got 0.")

    def trainer_config(self) -> MusicDPOConfig:
        """The trainer's arguments for this job."""
        return MusicDPOConfig(
            **self.shared_arguments(),
            beta=self.beta,
            loss_type=[self.loss_type],
            label_smoothing=self.label_smoothing,
            precompute_ref_log_probs=self.precompute_ref_log_probs,
        )


def run_dpo(job: DPOJob) -> Path:
    """Train a generator on preferences; the folder holds the model (or adapter), metrics.jsonl and result.json.

    Raises:
        FileNotFoundError: no such preferences or checkpoint.
        ValueError: as the job, `load_preferences` and `MusicDPOTrainer`.
    """
    args = job.trainer_config()
    job.check_places()
    decided, counts = decided_pairs(load_preferences(job.preferences), job.min_seconds)
    model = prepare_generator(job.model)
    codes_dir = job.codes_dir or str(Path(job.output_dir) / "codes")
    flat_of(model).audio_encoder.to(args.device)
    encode_in_shares(lambda ds, rows: encode_clips(ds, rows, flat_of(model), codes_dir), decided)
    with PartialState().main_process_first():
        pairs = cache_codes(decided, flat_of(model), codes_dir, keep_audio=False)
    parts = split_by_prompt(pairs, job.test_share, job.seed) if job.test_share else {"train": pairs}
    trainer = MusicDPOTrainer(
        model,
        job.ref_model,
        args=args,
        train_dataset=parts["train"],
        eval_dataset=parts["test"] if job.test_share else None,
        peft_config=job.peft_config(),
    )
    metrics: dict[str, Any] = {"pairs": len(parts["train"]), "left_out": counts["left_out"], "votes": counts}
    metrics["judged_by"] = count_listeners(parts["train"]["listener"])
    folder = run_trainer(trainer, job, "DPO", metrics, evaluate=bool(job.test_share))
    if trainer.accelerator.is_main_process:
        shutil.rmtree(folder / "pairs", ignore_errors=True)
    return folder
