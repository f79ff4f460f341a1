"""Which of two clips do people choose? A Bradley-Terry model with one scalar a clip (section 3.3 of the paper)."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.configuration_utils import SubConfigSpec

from ..audio import resample
from ..bundled import loading, resolve
from ..configuration import MusicRLConfig
from ..generator import MusicRLForConditionalGeneration
from ..hub import PushesWithCard
from ..loudness import match_loudness_of_batch
from .clap import ClapSoundFeatures, FeatureHead, text_embeddings
from .contract import check_reward_inputs, check_scores
from .windows import first_and_last

BACKBONES = ("generator", "clap")


class PreferenceConfig(PreTrainedConfig):
    """Configuration of a `PreferenceModel`.

    Attributes:
        backbone: "generator" or "clap".
        generator: configuration of the generator whose decoder is the backbone.
        clap: configuration of the CLAP model that is the backbone.
        feature_extractor: settings of that CLAP model's `ClapFeatureExtractor`.
        use_text: False scores the sound alone (the paper's ablation, which changed nothing there).
        loudness_lufs: loudness that clips are brought to before they are scored; null leaves them as they are.
        pooling: of a CLAP backbone, "rhythm", "statistics" or "embedding", see `ClapSoundFeatures`.
        head_size: hidden units of a CLAP backbone's head.
        head_dropout: of a CLAP backbone's head, in training.
    """

    model_type = "musicrl_preference"
    sub_configs_defaults = {
        "generator": SubConfigSpec(config_class=MusicRLConfig, optional=True),
        "clap": SubConfigSpec(config_class=ClapConfig, optional=True),
    }

    backbone: str = "generator"
    generator: Any = None  # read from a dict, held as the configuration class
    clap: Any = None
    feature_extractor: Any = None
    use_text: bool = True
    loudness_lufs: float | None = -23.0
    pooling: str = "statistics"
    head_size: int = 64
    head_dropout: float = 0.1

    def __post_init__(self, **kwargs: Any):
        if isinstance(self.generator, dict):  # "musicgen" alone would become the stock configuration
            self.generator = MusicRLConfig(**self.generator)
        super().__post_init__(**{"num_labels": 1, **kwargs})
        if self.backbone not in BACKBONES:
            raise ValueError(f"`backbone` must be one of {', '.join(BACKBONES)}, got {self.backbone!r}.")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None):
        """This config: trainers write their padding id into what they get here, and the parts' own must stay."""
        return self


class PreferenceModel(PushesWithCard, PreTrainedModel):
    """A score whose difference between two clips of a prompt is the log-odds that people choose the first.

    P(first chosen) = sigmoid(score_first - score_second) (Bradley and Terry 1952).

    Two backbones:

    * "generator": text encoder and decoder of a music generator, the model that knows its codes best, with a linear
      head on the mean of the decoder's states over the steps that hold codes and the state of the last such step. In
      the paper it starts from the generator's checkpoint, and from scratch it stays at chance. The generator's codec is
      kept inside, frozen, so a saved folder scores audio. Its names inside a checkpoint are the generator's under
      `generator.`, with the head `score`.
    * "clap": frozen CLAP vectors of sound and prompt, their product, and a head with one hidden layer (the recipe of
      TuneJury): minutes to train, and it scores what any system made.

    As a reward it takes audio; clips over 20 s get the mean of their first and their last 20 s.

    Example:
        >>> from musicrl_hf import load_generator
        >>> model = PreferenceModel.from_generator(load_generator("musicrl-tiny"))
        >>> model(["a slow air played by a flute"], torch.randn(1, 1, 16000) / 10, 16000).shape
        torch.Size([1])
    """

    config: PreferenceConfig
    config_class = PreferenceConfig
    base_model_prefix = "preference"
    main_input_name = "audio"
    _supports_sdpa = True
    tokenizer: PreTrainedTokenizerBase | None = None

    def __init__(self, config: PreferenceConfig):
        super().__init__(config)
        if config.backbone == "generator":
            self.generator = MusicRLForConditionalGeneration(config.generator)
            self.generator.decoder.lm_heads = nn.ModuleList()  # the scalar head takes their place
            self.score = nn.Linear(2 * config.generator.decoder.hidden_size, 1)
        else:
            self.sound = ClapSoundFeatures(
                ClapModel(config.clap), config.feature_extractor, config.pooling, config.loudness_lufs
            )
            size = self.sound.size + (2 * config.clap.projection_dim if config.use_text else 0)
            self.head = FeatureHead(size, config.head_size, config.head_dropout)
        self.post_init()
        self.freeze()

    def freeze(self) -> None:
        """Keep the codec, or the whole CLAP model, out of training; a generator's text encoder is frozen as MusicGen's."""
        if self.config.backbone == "generator":
            self.generator.freeze_codec()
            self.generator.text_encoder.requires_grad_(False)
        else:
            self.sound.requires_grad_(False)

    # -- making, loading, saving -----------------------------------------------------------------------------------

    @classmethod
    def from_generator(
        cls, generator: MusicRLForConditionalGeneration, *, from_scratch: bool = False, **options: Any
    ) -> "PreferenceModel":
        """A model with an untrained head on a copy of the generator's text encoder, decoder and codec.

        Args:
            generator: with its tokenizer.
            from_scratch: random decoder weights instead (the paper's ablation); text encoder and codec are still copied.
            options: fields of `PreferenceConfig`.
        """
        config = PreferenceConfig(backbone="generator", generator=generator.config.to_dict(), **options)
        model = cls(config)
        parts = {"audio_encoder": generator.audio_encoder, "text_encoder": generator.text_encoder}
        if not from_scratch:
            parts["decoder.model"] = generator.decoder.model
            if generator.text_encoder.config.hidden_size != generator.config.decoder.hidden_size:
                parts["enc_to_dec_proj"] = generator.enc_to_dec_proj
        for name, part in parts.items():
            model.generator.get_submodule(name).load_state_dict(part.state_dict())
        model.tokenizer = model.generator.tokenizer = generator.tokenizer
        return model.eval()

    @classmethod
    def from_clap(
        cls,
        clap: ClapModel,
        tokenizer: PreTrainedTokenizerBase,
        feature_extractor: ClapFeatureExtractor,
        **options: Any,
    ) -> "PreferenceModel":
        """A model with an untrained head on a copy of `clap`; `options` are fields of `PreferenceConfig`."""
        config = PreferenceConfig(
            backbone="clap", clap=clap.config.to_dict(), feature_extractor=feature_extractor.to_dict(), **options
        )
        model = cls(config)
        model.sound.encoder.load_state_dict(clap.state_dict())
        model.tokenizer = tokenizer
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Load with its tokenizer from a folder or a Hub id; safetensors only."""
        source = resolve(str(pretrained_model_name_or_path))
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        hub_options = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
        with loading(source):
            model = super().from_pretrained(source, *args, **kwargs)
            loaded = model[0] if isinstance(model, tuple) else model
            loaded.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub_options)
        if loaded.config.backbone == "generator":
            loaded.generator.tokenizer = loaded.tokenizer
        loaded.freeze()  # loading makes every parameter trainable
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save config, safetensors and tokenizer: all that scoring audio needs."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(Path(save_directory))

    # -- scoring codes and features, with gradient -------------------------------------------------------------------

    def score_codes(self, codes: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [B] of codes, with gradient to decoder and head; no audio is needed.

        Args:
            codes: [B, K, F] of this backbone's codec; clips shorter than F end in `pad_code`.
            input_ids, attention_mask: [B, P] of the prompts.

        Raises:
            ValueError: a CLAP backbone, which knows no codes; codes of another generator.
        """
        if self.config.backbone != "generator":
            raise ValueError("`backbone` is 'clap', which has no codes: score audio with model(prompts, audio, rate).")
        generator = self.generator
        generator.check_codes(codes)
        text_states = generator.encode_text(input_ids, attention_mask)
        if not self.config.use_text:  # the null condition of classifier-free guidance
            text_states, attention_mask = text_states * 0, torch.zeros_like(attention_mask)
        hidden, delayed = generator.decoder_hidden(codes, text_states, attention_mask)
        holds_code = (delayed != generator.config.pad_code).any(1)  # [B, S]
        weights = holds_code.to(hidden.dtype)[..., None]
        mean = (hidden * weights).sum(1) / weights.sum(1)
        last = holds_code.sum(1) - 1  # steps with codes are the first ones: shorter clips are padded behind
        pooled = torch.cat([mean, hidden[torch.arange(len(hidden), device=hidden.device), last]], -1)
        with torch.autocast(
            pooled.device.type, enabled=False
        ):  # bfloat16 would make clips equal that differ by a hundredth
            return self.score(pooled.to(self.score.weight.dtype))[:, 0].float()

    @torch.no_grad()
    def features(self, prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor:
        """What the head of a CLAP backbone reads, [B, D]: sound, and with `use_text` the prompt and their product."""
        return self.with_text(prompts, self.sound(audio, sampling_rate))

    @torch.no_grad()
    def with_text(self, prompts: list[str], sound: Tensor) -> Tensor:
        """The features [B, D] of clips whose sound vectors [B, D'] are known."""
        if not self.config.use_text:
            return sound
        text = text_embeddings(self.sound.encoder, self.tokenizer, list(prompts))
        return torch.cat([sound, text, text * sound[:, -text.shape[1] :]], -1)

    # -- scoring audio -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_audio(self, audio: Tensor, sampling_rate: int) -> Tensor:
        """Audio [B, C, T] to the codes [B, K, F] that `score_codes` takes: loudness, channels and rate are adapted."""
        channels = self.config.generator.audio_channels
        if audio.shape[1] != channels:
            audio = audio.mean(1, keepdim=True).repeat(1, channels, 1)
        audio = audio.to(self.device)
        if self.config.loudness_lufs is not None:
            audio = match_loudness_of_batch(audio, sampling_rate, self.config.loudness_lufs)
        audio = resample(audio.float(), sampling_rate, self.generator.sampling_rate)
        return self.generator.encode_audio(audio)

    @torch.no_grad()
    def forward(self, prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor:
        """The reward [B]: Bradley-Terry logits, unbounded; only differences within a prompt have a meaning.

        Args:
            prompts: B texts.
            audio: [B, C, T] in [-1, 1].
            sampling_rate: Hz.

        Raises:
            ValueError: see :func:`check_reward_inputs`.
        """
        check_reward_inputs(prompts, audio, sampling_rate)
        windows = first_and_last(audio, sampling_rate)
        scores = torch.stack([self._score_audio(list(prompts), window, sampling_rate) for window in windows])
        return check_scores(scores.mean(0), len(audio), "preference")

    def _score_audio(self, prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor:
        if self.config.backbone == "clap":
            return self.head(self.features(prompts, audio, sampling_rate))
        return self.score_codes(self.encode_audio(audio, sampling_rate), *self.generator.text_inputs(prompts))


AutoConfig.register(PreferenceConfig.model_type, PreferenceConfig)
AutoModel.register(PreferenceConfig, PreferenceModel)
