"""Where TRL's trainers and this package meet: the patch around their `__init__`, and what they leave on disk."""

import copy
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import parse_flag_from_env
from peft import PeftModel
from transformers import MusicgenForConditionalGeneration, TrainingArguments

from ..flat import FlatMusicRLForCausalLM, FlatTokenizer
from ..generator import MusicRLForConditionalGeneration, load_generator
from ..places import unlock_weights, whole_path
from .checkpoints import ASIDE, WholeCheckpoints


class _FlatTokenIds(logging.Filter):
    """Drops transformers' message that the model took over the tokenizer's ids: those of the flat view, undone on saving."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "has new PAD/BOS/EOS tokens" not in record.getMessage()


logging.getLogger("transformers.trainer_utils").addFilter(_FlatTokenIds())


@contextmanager
def native_scoring(trl_module: str, reference: Callable[[], FlatMusicRLForCausalLM]) -> Iterator[None]:
    """While a TRL trainer is built, keep it from replacing the models' own fused call, and hand it its reference.

    TRL would give the model a head over K * V ids at every flat position, and would load the reference by name as a
    stock MusicGen, which knows no flat ids (and whose codec refuses TRL's choice of attention).

    Args:
        trl_module: the module that defines the trainer, whose two names are replaced until the block is left.
        reference: called where TRL wants a reference and was given none.
    """
    module = sys.modules[trl_module]
    names = {"add_fused_lm_head": _keep_native_head, "create_model_from_path": lambda *_, **__: reference()}
    stock = {name: vars(module)[name] for name in names}
    vars(module).update(names)
    try:
        yield
    finally:
        vars(module).update(stock)


def _keep_native_head(
    model: FlatMusicRLForCausalLM, temperature: float = 1.0, outputs: tuple[str, ...] = ("log_probs",), **_: Any
) -> None:
    model.scoring_temperature, model.scored = temperature, outputs


def prepare_generator(
    model: "str | MusicRLForConditionalGeneration | PeftModel", name: str = "model"
) -> "FlatMusicRLForCausalLM | PeftModel":
    """A generator ready for training, seen flat: dropout zeroed, codec and text encoder frozen.

    Args:
        model: bundled name, folder, Hub id, generator, or PEFT model over a `FlatMusicRLForCausalLM`.
        name: what to call it in a message.

    Raises:
        ValueError: anything else.
    """
    if isinstance(model, str):
        generator = load_generator(model)
        generator.name_or_path = model  # not the folder of a bundled name
        model = generator
    if isinstance(model, MusicRLForConditionalGeneration) and not isinstance(model, FlatMusicRLForCausalLM):
        model = FlatMusicRLForCausalLM.from_generator(model)
    flat = flat_of(model) if isinstance(model, PeftModel) else model
    if not isinstance(flat, FlatMusicRLForCausalLM):
        raise ValueError(
            f"`{name}` must be a name, a MusicRLForConditionalGeneration or a PEFT model over a FlatMusicRLForCausalLM, "
            f"got {type(flat).__name__}; load it with musicrl_hf.load_generator."
        )
    flat.name_or_path = whole_path(flat.name_or_path)  # what a saved adapter names as its base
    for config in model.peft_config.values() if isinstance(model, PeftModel) else ():
        config.base_model_name_or_path = whole_path(config.base_model_name_or_path)
    flat.disable_dropout()
    flat.freeze_codec()
    flat.text_encoder.requires_grad_(False)  # as MusicGen was trained itself
    flat.restore_audio_token_ids()
    return model


def prepare_reference(
    ref_model: "str | MusicRLForConditionalGeneration | None", model: FlatMusicRLForCausalLM
) -> FlatMusicRLForCausalLM | None:
    """The reference that a caller named, made ready; None stays None.

    Raises:
        ValueError: it shares its weights with `model`, or has other codes.
    """
    if ref_model is None:
        return None
    anchor = prepare_generator(ref_model, "ref_model")
    if not isinstance(anchor, FlatMusicRLForCausalLM) or anchor.decoder is model.decoder:
        raise ValueError(
            "`ref_model` must be a generator of its own (merge an adapter first); leave it None for a copy."
        )
    shapes = [(c.num_codebooks, c.codebook_size, c.audio_channels) for c in (model.config, anchor.config)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`ref_model` has (codebooks, codebook size, channels) = {shapes[1]} where `model` has {shapes[0]}; give a "
            "generator with the same codec."
        )
    return anchor


def flat_of(model: FlatMusicRLForCausalLM | PeftModel) -> FlatMusicRLForCausalLM:
    """The generator itself, without the adapter's wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def copy_of(flat: FlatMusicRLForCausalLM) -> FlatMusicRLForCausalLM:
    """A copy that is trained no more; what training leaves alone is shared, but where each model's weights are shared out."""
    sharded = parse_flag_from_env("ACCELERATE_USE_FSDP") or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    frozen = () if sharded else (flat.text_encoder, flat.audio_encoder, flat.tokenizer)
    return copy.deepcopy(flat, {id(part): part for part in frozen})


class PlainOutputs(WholeCheckpoints):
    """Mixin for TRL's trainers: no ping, no card for chat models, no pickle beside the weights, and whole checkpoints."""

    args: TrainingArguments

    def _send_telemetry(self) -> None:
        """TRL pings a server when a trainer is built; nothing is sent from here."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card shows a chat snippet; cards are written from the finished folder when it is pushed."""

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A tied weight lies in a checkpoint under one of its names, and is not missing under the others."""
        weights, missing = self.model.state_dict(), set(load_result.missing_keys)  # type: ignore[attr-defined]
        there = {weight.data_ptr() for name, weight in weights.items() if name not in missing}
        missing -= {name for name in missing & set(weights) if weights[name].data_ptr() in there}
        super()._issue_warnings_after_load(load_result._replace(missing_keys=sorted(missing)))  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        target = Path(output_dir or str(self.args.output_dir))
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=ASIDE, dir=target) as scratch:
            with warnings.catch_warnings():
                # PEFT looks for the base's vocabulary, on the Hub where that is no folder; no embedding is trained.
                warnings.filterwarnings("ignore", "Could not find a config file in")
                super()._save(scratch, state_dict)  # type: ignore[misc]
            unlock_weights(scratch)
            # Trainer pickles its arguments, and PEFT writes an empty card.
            for unwanted in ("training_args.bin", "README.md"):
                (Path(scratch) / unwanted).unlink(missing_ok=True)
            for config in Path(scratch).rglob("adapter_config.json"):
                _name_stock_class(config)
            for made in sorted(Path(scratch).iterdir()):
                if made.is_dir():
                    shutil.rmtree(target / made.name, ignore_errors=True)
                os.replace(made, target / made.name)


def _name_stock_class(path: Path) -> None:
    """Let PEFT's Auto class find the base where this package is not installed."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("auto_mapping"):
        stock = MusicgenForConditionalGeneration
        config["auto_mapping"] = {"base_model_class": stock.__name__, "parent_library": stock.__module__}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class FlatTrainer(PlainOutputs):
    """Mixin that builds a TRL trainer on a flat generator.

    Attributes:
        trl_module: where the TRL trainer is defined.
        entropy_in_loss: can its loss have the policy's entropy in it? Elsewhere that is a metric.
    """

    trl_module: str
    entropy_in_loss: bool = False
    _weights: int | None = None

    def build(
        self,
        model: "FlatMusicRLForCausalLM | PeftModel",
        anchor: FlatMusicRLForCausalLM | None,
        **kwargs: Any,
    ) -> None:
        """Call TRL's `__init__` with `kwargs`, the prepared model and its tokenizer.

        Args:
            model: from `prepare_generator`.
            anchor: from `prepare_reference`; None hands over a copy of the model where TRL wants a reference.
        """
        flat = flat_of(model)
        with native_scoring(self.trl_module, lambda: anchor or copy_of(flat)):
            super().__init__(model=model, processing_class=FlatTokenizer.for_generator(flat), **kwargs)  # type: ignore[call-arg]
        flat.restore_audio_token_ids()

    @property
    def generator(self) -> FlatMusicRLForCausalLM:
        """The generator that is trained."""
        return flat_of(self.accelerator.unwrap_model(self.model))  # type: ignore[attr-defined]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As `transformers.Trainer` has it, but the weights are counted once, and not by a walk through the model at every step."""
        if "input_ids" not in inputs:  # RLOO's and GRPO's are prompts
            return 0
        if self._weights is None:
            self._weights = self.model.num_parameters(exclude_embeddings=True)  # type: ignore[attr-defined]
        return 6 * inputs["input_ids"].numel() * self._weights

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `transformers.Trainer` does; afterwards the generation config is the audio one again."""
        generator = self.generator
        before, generator.entropy_gradient = generator.entropy_gradient, self.entropy_in_loss
        try:
            output = super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            generator.entropy_gradient = before
        self.generator.restore_audio_token_ids()
        return output
