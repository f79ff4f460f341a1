"""The generator: text to codes to sound, and the log-probability of every decoder step.

On disk it is a stock MusicGen: what is saved here loads with `transformers.MusicgenForConditionalGeneration`, and what
Meta published as `facebook/musicgen-*` loads here.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoTokenizer,
    EncodecFeatureExtractor,
    MusicgenForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from .audio import MAX_DURATION_S
from .bundled import loading, resolve
from .codec import AudioCodec
from .configuration import MusicRLConfig
from .delay import delay_codes, delay_mask, undelay_codes
from .hub import PushesWithCard
from .likelihood import Statistic, StepScores, logits_with_heads, score_with_heads
from .places import check_model_type, find_model, sampling_of_adapter
from .recompute import recomputed
from .sampling import check_sampling, check_temperature, draw_codes, likeliest_codes
from .step_decoder import StepDecoder
from .step_graph import check_graph, next_logits

# PEFT and TRL ask for it under its old name; the model has no say in that.
warnings.filterwarnings("ignore", message=".?is_gradient_checkpointing.? is deprecated", category=FutureWarning)

_DROPOUTS = ("dropout", "activation_dropout", "attention_dropout", "layerdrop")


@dataclass
class Clips:
    """Generated clips: codes [B, K, F], audio [B, C, T] in [-1, 1], sampling rate in Hz."""

    codes: Tensor
    audio: Tensor
    sampling_rate: int


class MusicRLForConditionalGeneration(PushesWithCard, MusicgenForConditionalGeneration):
    """MusicGen with its tokenizer, exact step log-probabilities and a sampler that gives back the codes.

    Example:
        >>> model = MusicRLForConditionalGeneration.from_pretrained("musicrl-tiny")
        >>> clips = model.sample(["a slow air played by a flute"], duration_s=1.0, seed=0)
        >>> clips.audio.shape
        torch.Size([1, 1, 16000])
    """

    config: MusicRLConfig
    config_class = MusicRLConfig
    _keep_in_fp32_modules_strict = ["audio_encoder"]  # in half precision a codec hisses
    tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Load a generator with its tokenizer from a bundled name, a folder or a Hub id; safetensors only.

        Raises:
            ValueError: unknown name, a folder of another kind of model, weights that are pickles or were cut short.
        """
        source = resolve(str(pretrained_model_name_or_path))
        if Path(source).is_dir() and "subfolder" not in kwargs:
            check_model_type(source, "musicgen", "pretrained_model_name_or_path")
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        if not isinstance(kwargs.get("config"), MusicRLConfig):
            kwargs.pop("config", None)
        hub_options = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
        with loading(source):
            model = super().from_pretrained(source, *args, **kwargs)
            loaded = model[0] if isinstance(model, tuple) else model
            loaded.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub_options)
        vars(loaded.config).pop("auto_map", None)  # names code that is never run, and is not passed on
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save a whole, stock MusicGen folder: config, safetensors, generation config, tokenizer, feature extractor."""
        self.restore_audio_token_ids()
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        config = json.loads(path.read_text())
        config["architectures"] = [MusicgenForConditionalGeneration.__name__]
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)
        self.feature_extractor().save_pretrained(save_directory)

    def restore_audio_token_ids(self) -> None:
        """Undo what trainers write into the generation config: their pad and eos are text ids, these are code ids."""
        for config in (self.config, self.generation_config):
            config.eos_token_id = None
        self.config.pad_token_id = self.config.bos_token_id = None
        generation = self.generation_config
        generation.pad_token_id = generation.bos_token_id = self.config.pad_code
        generation.decoder_start_token_id = self.config.pad_code

    def feature_extractor(self) -> EncodecFeatureExtractor:
        """The stock feature extractor that belongs to this model's codec."""
        config = self.config.audio_encoder
        return EncodecFeatureExtractor(
            feature_size=self.config.audio_channels,
            sampling_rate=config.sampling_rate,
            padding_side="left",
            chunk_length_s=config.chunk_length_s,
            overlap=config.overlap,
        )

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def sampling_rate(self) -> int:
        """Of the generated audio, in Hz."""
        return self.config.audio_encoder.sampling_rate

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sampling_rate / self.config.audio_encoder.hop_length

    @property
    def codec(self) -> AudioCodec:
        """The model's own EnCodec, with the codebooks of one channel."""
        return AudioCodec(
            self.audio_encoder, self.config.num_codebooks // self.config.audio_channels, fast_decoder=True
        )

    def frames_for(self, duration_s: float) -> int:
        """Frames F that cover `duration_s` seconds (at most 30, MusicGen's limit)."""
        if not 0 < duration_s <= MAX_DURATION_S:
            raise ValueError(f"`duration_s` must be in (0, {MAX_DURATION_S:g}] seconds, got {duration_s!r}.")
        return math.ceil(round(duration_s * self.frame_rate, 6))

    def disable_dropout(self) -> None:
        """Make the policy deterministic. Most of this dropout is functional: only its numbers can be zeroed."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in _DROPOUTS:
                if isinstance(vars(module).get(name), float):
                    setattr(module, name, 0.0)

    def freeze_codec(self) -> None:
        """Keep the codec out of training; its straight-through path would otherwise break under DDP."""
        self.audio_encoder.requires_grad_(False)

    # -- text ----------------------------------------------------------------------------------------------------

    def text_inputs(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts, which T5 takes in any length, to `input_ids` and `attention_mask`, both [B, P], on the model's device."""
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"`prompts` must be a list of at least one text, got {prompts!r}.")
        if self.tokenizer is None:
            raise ValueError(
                "This generator has no tokenizer; load it with from_pretrained from a folder that has tokenizer files, "
                "or set `model.tokenizer`."
            )
        batch = self.tokenizer(list(prompts), padding=True, return_tensors="pt", verbose=False)
        return batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Text states [B, P, H] that the decoder attends to: projected, and 0 at padding, as the stock model does."""
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.text_encoder.config.hidden_size != self.config.decoder.hidden_size:
            states = self.enc_to_dec_proj(states)
        return states * attention_mask[..., None].to(states.dtype)

    # -- scoring -------------------------------------------------------------------------------------------------

    def check_codes(self, codes: Tensor, name: str = "codes") -> None:
        """ValueError unless `codes` is integer [B, K, F] with this model's K and ids in [0, V] (V pads a clip's end)."""
        expected, size = self.config.num_codebooks, self.config.codebook_size
        remedy = "encode the clips with this generator's own codec"
        if codes.dim() != 3 or codes.shape[1] != expected or codes.is_floating_point() or codes.numel() == 0:
            found = f"{codes.dtype} of shape {tuple(codes.shape)}"
            raise ValueError(f"`{name}` must be integers [B, {expected}, F], got {found}; {remedy}.")
        if codes.min() < 0 or codes.max() > size:
            raise ValueError(
                f"`{name}` must lie in [0, {size}] ({size} pads), got {codes.min()} to {codes.max()}; {remedy}."
            )

    def decoder_hidden(self, codes: Tensor, text_states: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Run the decoder over given codes.

        Args:
            codes: [B, K, F]; clips shorter than F end in `pad_code`.
            text_states: [B, P, H] from `encode_text`.
            text_mask: [B, P].

        Returns:
            hidden [B, S, H], where step s has seen the steps before it, and the delayed ids [B, K, S] that it predicts.
        """
        pad = self.config.pad_code
        delayed = delay_codes(codes, pad, self.config.audio_channels)
        shifted = torch.cat([torch.full_like(delayed[..., :1], pad), delayed[..., :-1]], -1)
        with recomputed(self.decoder.model.decoder.layers):
            hidden = self.decoder.model(
                input_ids=shifted.flatten(0, 1),
                encoder_hidden_states=text_states,
                encoder_attention_mask=text_mask,
                use_cache=False,
            ).last_hidden_state
        return hidden, delayed

    def code_logits(self, codes: Tensor, input_ids: Tensor, attention_mask: Tensor, temperature: float = 1.0) -> Tensor:
        """Logits [B, K, S, V] float32 of every code, divided by `temperature`; arguments as of `score_codes`."""
        check_temperature(temperature)
        hidden, _ = self.decoder_hidden(codes, self.encode_text(input_ids, attention_mask), attention_mask)
        return logits_with_heads(hidden, self.decoder.lm_heads, self.config.codebook_size, temperature)

    def score_codes(
        self,
        codes: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        temperature: float = 1.0,
        ref_logits: Tensor | None = None,
        statistics: Mapping[str, Statistic] | None = None,
        entropy_gradient: bool = True,
    ) -> StepScores:
        """Log-probability of every code, with gradient.

        Args:
            codes: [B, K, F]; clips shorter than F end in `pad_code`.
            input_ids, attention_mask: [B, P] from `text_inputs`.
            temperature: the one that the codes were sampled with.
            ref_logits: [B, K, S, V] from `code_logits` of an anchor at the same temperature, for the KL to it.
            statistics, entropy_gradient: see `score_with_heads`.
        """
        check_temperature(temperature)
        hidden, delayed = self.decoder_hidden(codes, self.encode_text(input_ids, attention_mask), attention_mask)
        size, mask = self.config.codebook_size, delayed != self.config.pad_code
        codes, heads = delayed.clamp(max=size - 1), self.decoder.lm_heads
        return score_with_heads(hidden, heads, codes, mask, size, temperature, ref_logits, statistics, entropy_gradient)

    def step_logprobs(self, codes: Tensor, prompts: Sequence[str], temperature: float = 1.0) -> Tensor:
        """Log-probability of each decoder step [B, S]: its K codes together, pads of the delay pattern left out."""
        self.check_codes(codes)
        if len(prompts) != len(codes):
            raise ValueError(f"`prompts` holds {len(prompts)} texts for {len(codes)} clips; give one prompt a clip.")
        return self.score_codes(codes, *self.text_inputs(prompts), temperature).logprobs.sum(1)

    # -- sampling ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_codes(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        frames: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        guidance_scale: float = 1.0,
        do_sample: bool = True,
        generator: torch.Generator | None = None,
        cuda_graph: bool | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draw codes [B, K, F] in S decoder steps, see `StepDecoder`.

        Args:
            input_ids, attention_mask: [B, P] from `text_inputs`.
            frames: F.
            temperature, top_k, guidance_scale: as in transformers; at 1, None and 1 the codes follow exactly the
                distribution that `score_codes` scores at the same temperature, which RL needs.
            do_sample: False takes the likeliest code each time.
            generator: random numbers on the model's device; None uses torch's global ones.
            cuda_graph: record a step and replay it; None does so on CUDA from some 32 steps on, True elsewhere is a ValueError.
            progress: show a bar of the steps on a terminal.
        """
        check_sampling(temperature, top_k, guidance_scale, frames)
        check_graph(cuda_graph, self.device)
        was_training, config = self.training, self.config
        self.eval()
        inside = delay_mask(frames, config.num_codebooks, config.audio_channels, self.device)
        steps = inside.shape[-1]
        text_states = self.encode_text(input_ids, attention_mask)
        decoder = StepDecoder(self.decoder, text_states, attention_mask, steps, guidance_scale)
        current = input_ids.new_full((len(input_ids), config.num_codebooks), config.pad_code)
        step_logits = next_logits(decoder, current, cuda_graph)
        drawn = []
        for step in tqdm(range(steps), "generating", disable=None if progress else True, unit="step", leave=False):
            logits = step_logits(current)
            scaled = logits if temperature == 1 else logits / temperature
            current = draw_codes(scaled, top_k, generator) if do_sample else likeliest_codes(logits)
            current = current.where(inside[:, step], config.pad_code)
            drawn.append(current)
        self.train(was_training)
        return undelay_codes(torch.stack(drawn, -1), config.audio_channels)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        duration_s: float = 5.0,
        temperature: float = 1.0,
        top_k: int | None = 250,
        guidance_scale: float | None = None,
        seed: int | None = None,
        cuda_graph: bool | None = None,
        progress: bool = False,
    ) -> Clips:
        """Generate one clip for each prompt (repeat a prompt for several).

        Args:
            prompts: B texts.
            duration_s: seconds, at most 30.
            temperature, top_k: MusicGen's defaults; 1.0 and None, with a guidance scale of 1.0, sample the model itself.
            guidance_scale: None for that of the model's `generation_config`, or where it has none, MusicGen's 3.0.
            seed: makes the clips reproducible on one kind of device.
            cuda_graph, progress: as in `sample_codes`.

        Returns:
            Clips with codes [B, K, F] and audio [B, C, round(duration_s * sampling_rate)].

        Raises:
            ValueError: no prompts, or an argument out of range.
        """
        own = self.generation_config.guidance_scale
        random = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        codes = self.sample_codes(
            *self.text_inputs(prompts),
            self.frames_for(duration_s),
            temperature=temperature,
            top_k=top_k,
            guidance_scale=(3.0 if own is None else own) if guidance_scale is None else guidance_scale,
            generator=random,
            cuda_graph=cuda_graph,
            progress=progress,
        )
        return Clips(codes, self.decode_codes(codes, round(duration_s * self.sampling_rate)), self.sampling_rate)

    # -- sound ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode_codes(self, codes: Tensor, length: int | None = None) -> Tensor:
        """Codes [B, K, F] to audio [B, C, T], T = F * hop or `length` samples; stereo codebooks alternate sides."""
        sides = [self.codec.decode(codes[:, side :: self.config.audio_channels], length) for side in self._sides()]
        return torch.cat(sides, 1)

    @torch.no_grad()
    def encode_audio(self, audio: Tensor) -> Tensor:
        """Audio [B, C, T] at `sampling_rate` to codes [B, K, F]; each side of stereo goes through the codec alone."""
        if audio.dim() != 3 or audio.shape[1] != self.config.audio_channels:
            raise ValueError(
                f"`audio` must be [B, {self.config.audio_channels}, T] for this generator, got {tuple(audio.shape)}."
            )
        sides = [self.codec.encode(audio[:, side : side + 1]).codes for side in self._sides()]
        return torch.stack(sides, 2).flatten(1, 2)

    def _sides(self) -> range:
        return range(self.config.audio_channels)


def load_generator(
    name_or_path: str | os.PathLike,
    *,
    adapter: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MusicRLForConditionalGeneration:
    """Load a generator by bundled name, folder or Hub id; an adapter is merged into the base that it names. A generation_config.json
    beside it says with which `guidance_scale` that is sampled by default.

    Args:
        name_or_path: a generator, or a PEFT adapter (whose base is then loaded the same way, so that an adapter on an
            adapter works too).
        adapter: a PEFT adapter to merge on top.
        dtype: of the weights in memory, but for the codec's, which stay in float32.
        device: where to; `find_device()` names the accelerator that there is.
    """
    from peft import PeftConfig, PeftModel
    from transformers.utils.peft_utils import find_adapter_config_file

    source = find_model(str(name_or_path), "musicgen")
    if find_adapter_config_file(source) is not None:
        with loading(source):
            base = PeftConfig.from_pretrained(source).base_model_name_or_path
        model = load_generator(base, adapter=source, dtype=dtype)
    else:
        model = MusicRLForConditionalGeneration.from_pretrained(source, dtype=dtype)
    if adapter is not None and resolve(adapter) != source:
        with loading(adapter):
            model = PeftModel.from_pretrained(model, resolve(adapter), use_safetensors=True).merge_and_unload()
            model.generation_config.update(**sampling_of_adapter(resolve(adapter)))
    return model.to(device).eval()
