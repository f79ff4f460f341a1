"""Text adherence: how well a clip fits its prompt, by a joint embedding of text and sound (section 3.3: MuLan)."""

import torch
from torch import Tensor
from transformers import ClapFeatureExtractor, ClapModel, PreTrainedTokenizerBase

from .clap import audio_embeddings, check_extractor, load_clap, text_embeddings
from .contract import check_reward_inputs, check_scores


class AdherenceReward:
    """Cosine of the prompt's and the clip's CLAP embedding, in [-1, 1]; the mean over the clip's 10 s segments.

    The same clip always gets the same score. Stereo is mixed down, any sampling rate is resampled to the model's.

    Args:
        model: any `ClapModel`.
        tokenizer: of the model.
        feature_extractor: of the model.

    Example:
        >>> reward = AdherenceReward.from_pretrained("musicrl-tiny-adherence")
        >>> reward(["a slow air played by a flute"], torch.randn(1, 1, 16000) / 10, 16000).shape
        torch.Size([1])
    """

    def __init__(self, model: ClapModel, tokenizer: PreTrainedTokenizerBase, feature_extractor: ClapFeatureExtractor):
        check_extractor(model.config.audio_config, feature_extractor)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.feature_extractor = feature_extractor

    @classmethod
    def from_pretrained(cls, name_or_path: str) -> "AdherenceReward":
        """Load a CLAP model by bundled name, folder or Hub id (for example "laion/larger_clap_music")."""
        return cls(*load_clap(name_or_path))

    def to(self, device: str | torch.device) -> "AdherenceReward":
        """Move the model; clips follow it."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor:
        """Score clips.

        Args:
            prompts: B texts.
            audio: [B, C, T] in [-1, 1].
            sampling_rate: Hz.

        Returns:
            cosines [B] float32, on the model's device.

        Raises:
            ValueError: see :func:`check_reward_inputs`.
        """
        check_reward_inputs(prompts, audio, sampling_rate)
        text = text_embeddings(self.model, self.tokenizer, list(prompts))
        sound = audio_embeddings(self.model, self.feature_extractor, audio, sampling_rate)
        cosines = (sound * text[:, None]).sum(-1)
        return check_scores(cosines.mean(1).clamp(-1, 1), len(audio), "adherence")
