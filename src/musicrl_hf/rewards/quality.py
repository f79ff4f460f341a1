"""Acoustic quality: a predictor of the mean opinion score, from the sound alone (section 3.3)."""

import os
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    ClapAudioConfig,
    ClapAudioModelWithProjection,
    ClapFeatureExtractor,
    ClapModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..bundled import loading, resolve
from ..hub import PushesWithCard
from .clap import ClapSoundFeatures, FeatureHead
from .contract import check_reward_inputs, check_scores
from .windows import first_and_last


class QualityConfig(PreTrainedConfig):
    """Configuration of a `QualityModel`.

    Attributes:
        audio_config: of the CLAP sound encoder.
        feature_extractor: settings of its `ClapFeatureExtractor`.
        pooling: "rhythm", "statistics" or "embedding", see `ClapSoundFeatures`.
        loudness_lufs: loudness that clips are brought to before they are judged; null leaves them as they are.
        head_size: hidden units of the head.
        head_dropout: during training of the head.
    """

    model_type = "musicrl_quality"
    sub_configs_defaults = {"audio_config": ClapAudioConfig}

    audio_config: Any = None  # read from a dict, held as the configuration class
    feature_extractor: Any = None
    pooling: str = "statistics"
    loudness_lufs: float | None = -23.0
    head_size: int = 64
    head_dropout: float = 0.1

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if self.feature_extractor is None:
            self.feature_extractor = ClapFeatureExtractor().to_dict()


class QualityModel(PushesWithCard, PreTrainedModel):
    """MOS in [1, 5] from a small head on a frozen CLAP sound encoder; called as a reward, mapped to [0, 1].

    It reads no prompt and is blind to loudness. Clips over 20 s get the mean of their first and their last 20 s.

    Example:
        >>> quality = QualityModel.from_pretrained("musicrl-tiny-quality")
        >>> quality.mos(torch.randn(1, 1, 16000) / 10, 16000).shape
        torch.Size([1])
    """

    config: QualityConfig
    config_class = QualityConfig
    base_model_prefix = "quality"
    main_input_name = "audio"

    def __init__(self, config: QualityConfig):
        super().__init__(config)
        encoder = ClapAudioModelWithProjection(config.audio_config)
        self.sound = ClapSoundFeatures(encoder, config.feature_extractor, config.pooling, config.loudness_lufs)
        self.head = FeatureHead(self.sound.size, config.head_size, config.head_dropout)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any):
        """Load by bundled name, folder or Hub id; safetensors only."""
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        source = resolve(str(pretrained_model_name_or_path))
        with loading(source):
            model = super().from_pretrained(source, *args, **kwargs)
        loaded = model[0] if isinstance(model, tuple) else model
        loaded.sound.requires_grad_(False)  # loading makes every parameter trainable
        return model

    @classmethod
    def from_clap(cls, clap: ClapModel, feature_extractor: ClapFeatureExtractor, **options: Any) -> "QualityModel":
        """A model with an untrained head on the sound encoder of `clap`.

        Args:
            clap: its sound encoder is copied.
            feature_extractor: of `clap`.
            options: fields of `QualityConfig`, such as `pooling` or `head_size`.
        """
        model = cls(
            QualityConfig(
                audio_config=clap.config.audio_config.to_dict(),
                feature_extractor=feature_extractor.to_dict(),
                **options,
            )
        )
        model.sound.encoder.audio_model.load_state_dict(clap.audio_model.state_dict())
        model.sound.encoder.audio_projection.load_state_dict(clap.audio_projection.state_dict())
        return model.eval()

    def features(self, audio: Tensor, sampling_rate: int) -> Tensor:
        """Vectors [B, D] of clips [B, C, T] from the frozen encoder, without gradient: what the head is trained on."""
        return self.sound(audio, sampling_rate)

    def score_features(self, features: Tensor) -> Tensor:
        """MOS [B] in [1, 5] from features [B, D], with gradient to the head: 1 + 4 sigmoid(head)."""
        return 1 + 4 * torch.sigmoid(self.head(features))

    @torch.no_grad()
    def mos(self, audio: Tensor, sampling_rate: int) -> Tensor:
        """Predicted mean opinion scores [B] in [1, 5] of clips [B, C, T]."""
        check_reward_inputs([""] * len(audio), audio, sampling_rate)
        windows = first_and_last(audio, sampling_rate)
        scores = torch.stack([self.score_features(self.features(window, sampling_rate)) for window in windows])
        return check_scores(scores.mean(0), len(audio), "quality")

    def forward(self, prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor:
        """The reward [B]: (MOS - 1) / 4, in [0, 1]. The prompts are not looked at.

        Args:
            prompts: B texts.
            audio: [B, C, T] in [-1, 1].
            sampling_rate: Hz.

        Raises:
            ValueError: see :func:`check_reward_inputs`.
        """
        check_reward_inputs(prompts, audio, sampling_rate)
        return (self.mos(audio, sampling_rate) - 1) / 4


AutoConfig.register(QualityConfig.model_type, QualityConfig)
AutoModel.register(QualityConfig, QualityModel)
