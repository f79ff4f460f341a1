"""What the rewards share of a CLAP model: deterministic mel features, segments, and pooled states of its sound encoder.

transformers' `ClapFeatureExtractor` crops long clips at random and marks a random clip of a fusion model's batch as
"longer". A reward must give a clip the same score each time, so clips are cut here, by plan, and none is ever longer.
"""

from collections.abc import Callable
from math import ceil

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    ClapAudioConfig,
    ClapAudioModelWithProjection,
    ClapFeatureExtractor,
    ClapModel,
    PreTrainedTokenizerBase,
)

from ..audio import check_audio, resample
from ..bundled import loading
from ..loudness import match_loudness_of_batch
from ..places import find_model
from . import rhythm
from .contract import check_sampling_rate

POOLINGS = ("rhythm", "statistics", "embedding")
MAX_SEGMENT_S = 10.0  # section 3.3: a 30 s clip is scored as three segments of 10 s


def load_clap(name_or_path: str) -> tuple[ClapModel, PreTrainedTokenizerBase, ClapFeatureExtractor]:
    """A CLAP checkpoint by bundled name, folder or Hub id; safetensors only."""
    source = find_model(name_or_path, "clap")
    with loading(source):
        model = ClapModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        return model.eval(), tokenizer, ClapFeatureExtractor.from_pretrained(source)


def check_extractor(config: ClapAudioConfig, extractor: ClapFeatureExtractor) -> None:
    """ValueError where the feature extractor makes mel features that the model of `config` cannot read."""
    if (extractor.truncation == "fusion") != config.enable_fusion or extractor.feature_size != config.num_mel_bins:
        raise ValueError(
            f"`feature_extractor` has truncation={extractor.truncation!r} and {extractor.feature_size} mels, but the "
            f"CLAP model has enable_fusion={config.enable_fusion} and {config.num_mel_bins} mels; use the one that was "
            "saved with the model (truncation 'fusion' for models with fusion, 'rand_trunc' for others)."
        )


def to_segments(audio: Tensor, sampling_rate: int, extractor: ClapFeatureExtractor) -> Tensor:
    """Mix down to mono, resample to the extractor's rate and cut into segments of equal length.

    Clips of at most one segment stay whole. Longer ones get as few segments as cover them, spread evenly from the start
    to the end: 30 s are three that touch, 25 s three that overlap by 2.5 s. So no short rest counts as much as 10 s.

    Args:
        audio: [B, C, T] at `sampling_rate` Hz.
        extractor: its `max_length_s`, at most 10 s of it, is the length of a segment.

    Returns:
        [B, N, T'] at the extractor's rate.
    """
    check_audio(audio)
    check_sampling_rate(sampling_rate)
    mono = resample(audio.float().mean(1), sampling_rate, extractor.sampling_rate)
    longest = min(extractor.nb_max_samples, int(MAX_SEGMENT_S * extractor.sampling_rate))
    samples = mono.shape[-1]
    if samples <= longest:
        return mono[:, None]
    count = ceil(samples / longest)
    starts = [round(i * (samples - longest) / (count - 1)) for i in range(count)]
    return torch.stack([mono[:, start : start + longest] for start in starts], 1)


def log_mel(audio: Tensor, extractor: ClapFeatureExtractor) -> Tensor:
    """The features of `ClapFeatureExtractor` for segments that it need not crop, in torch and so for a whole batch.

    Args:
        audio: [N, T] mono at the extractor's rate, no longer than its `max_length_s`.

    Returns:
        [N, 1, frames, mels] in dB; [N, 4, frames, mels], four times the same, for fusion models.
    """
    is_fusion = extractor.truncation == "fusion"
    filters = extractor.mel_filters if is_fusion else extractor.mel_filters_slaney
    mel_filters = torch.as_tensor(filters, dtype=torch.float32, device=audio.device)
    size, hop = extractor.fft_window_size, extractor.hop_length
    window = torch.hann_window(size, device=audio.device)

    def mel_power(sound: Tensor) -> Tensor:
        """[N, T] to [N, frames, mels], the first window at the first sample."""
        spectrum = torch.stft(sound, size, hop, window=window, center=False, return_complex=True)
        # Not abs().square(): that takes the root of each number first, and on a CPU half of the time of scoring.
        return (spectrum.real.square() + spectrum.imag.square()).transpose(1, 2) @ mel_filters

    sound, silence = _filled_up(audio, extractor)
    # Windows that hear nothing but the silence behind need not be looked at: only what the last of the others reaches.
    heard = nn.functional.pad(sound, (0, min(silence, size + hop)))
    heard = nn.functional.pad(heard, (size // 2, size // 2), mode="reflect")
    first, last = ceil(size // 2 / hop), (sound.shape[-1] - size // 2) // hop  # of the windows that hear sound alone
    period = audio.shape[-1] // hop
    if audio.shape[-1] % hop == 0 and last - first >= period:
        # Where the sound is repeated, they are: most of them need not be looked at either.
        once = mel_power(heard[:, : (first + period - 1) * hop + size])
        again = torch.arange(last + 1 - first, device=audio.device) % period + first
        power = torch.cat([once[:, :first], once[:, again], mel_power(heard[:, (last + 1) * hop :])], 1)
    else:
        power = mel_power(heard)
    frames = 1 + (sound.shape[-1] + silence) // hop
    power = nn.functional.pad(power, (0, 0, 0, frames - power.shape[1]))
    decibels = 10 * power.clamp(min=1e-10).log10()
    return decibels[:, None].expand(-1, 4 if is_fusion else 1, -1, -1)


def _filled_up(audio: Tensor, extractor: ClapFeatureExtractor) -> tuple[Tensor, int]:
    """What fills `max_length_s` the extractor's way: the sound, repeated and cut, repeated whole, or once; and samples of silence."""
    length, longest = audio.shape[-1], extractor.nb_max_samples
    if length < longest and extractor.padding == "repeat":
        return audio.repeat(1, longest // length + 1)[:, :longest], 0
    if length < longest and extractor.padding == "repeatpad":
        audio = audio.repeat(1, longest // length)
    return audio, max(longest - audio.shape[-1], 0)


def text_embeddings(model: ClapModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Tensor:
    """Unit vectors [B, D]; equal prompts are embedded once, and what passes the model's positions is cut off."""
    distinct = list(dict.fromkeys(prompts))
    text_config = model.config.text_config
    # RoBERTa's positions start behind the padding id.
    longest = min(tokenizer.model_max_length, text_config.max_position_embeddings - text_config.pad_token_id - 1)
    batch = tokenizer(distinct, padding=True, truncation=True, max_length=longest, return_tensors="pt").to(model.device)
    features = model.get_text_features(batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    rows = {prompt: row for row, prompt in enumerate(distinct)}
    return features[[rows[prompt] for prompt in prompts]]


def audio_embeddings(model: ClapModel, extractor: ClapFeatureExtractor, audio: Tensor, sampling_rate: int) -> Tensor:
    """Unit vectors [B, N, D], one a segment."""

    def embed(features: Tensor) -> Tensor:
        return model.get_audio_features(features.to(model.dtype), is_longer=_never_longer(features)).pooler_output

    return _in_passes(embed, to_segments(audio.to(model.device), sampling_rate, extractor), extractor)


def _in_passes(encode: Callable[[Tensor], Tensor], segments: Tensor, extractor: ClapFeatureExtractor) -> Tensor:
    """Vectors [B, N, D] of segments [B, N, T]: `encode` maps mel features [n, ...] to [n, D].

    On a CPU four segments at a time take two thirds of the time of a batch: their spectra and activations stay in the cache.
    """
    flat = segments.flatten(0, 1)
    passes = flat.split(4 if flat.device.type == "cpu" else len(flat))
    return torch.cat([encode(log_mel(part, extractor)) for part in passes]).unflatten(0, segments.shape[:2])


def _never_longer(features: Tensor) -> Tensor:
    return torch.zeros(len(features), 1, dtype=torch.bool, device=features.device)


class ClapSoundFeatures(nn.Module):
    """A frozen CLAP sound encoder that turns clips into vectors for a small head.

    Args:
        encoder: with `audio_model` and `audio_projection`.
        extractor: settings of a `ClapFeatureExtractor`, as its `to_dict` gives them.
        pooling: "embedding" takes CLAP's unit vector; "statistics" puts before it mean and standard deviation of the mel
            bands over time and of the encoder's states at every depth over time and frequency: the embedding is trained
            to forget what a caption does not say, such as noise or bandwidth. "rhythm" puts before both of them how the
            clip's onsets repeat (:func:`rhythm.rhythm`).
        loudness_lufs: clips are brought to this loudness first, so that louder is never better; None leaves them.
    """

    def __init__(
        self,
        encoder: ClapModel | ClapAudioModelWithProjection,
        extractor: dict,
        pooling: str,
        loudness_lufs: float | None,
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"`pooling` must be one of {', '.join(POOLINGS)}, got {pooling!r}.")
        self.encoder = encoder.requires_grad_(False).eval()
        self.extractor = ClapFeatureExtractor.from_dict(extractor)
        check_extractor(encoder.audio_model.config, self.extractor)
        self.pooling = pooling
        self.loudness_lufs = loudness_lufs

    @property
    def size(self) -> int:
        """D, the length of a clip's vector."""
        config = self.encoder.audio_model.config
        if self.pooling == "embedding":
            return config.projection_dim
        width, depth = config.patch_embeds_hidden_size, len(config.depths)
        # Patches, then each stage's output: every stage but the last halves the grid and doubles the width.
        states = [width] + [width * 2 ** min(stage + 1, depth - 1) for stage in range(depth)]
        size = 2 * (config.num_mel_bins + sum(states)) + config.projection_dim
        return size + (rhythm.SIZE if self.pooling == "rhythm" else 0)

    def train(self, mode: bool = True) -> "ClapSoundFeatures":
        """Frozen means that batch statistics and dropout stay off too."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, audio: Tensor, sampling_rate: int) -> Tensor:
        """Vectors [B, D] of clips [B, C, T]: the mean over a clip's segments."""
        check_audio(audio)
        check_sampling_rate(sampling_rate)
        audio = audio.to(self.encoder.audio_projection.linear1.weight.device)
        if self.loudness_lufs is not None:
            audio = match_loudness_of_batch(audio, sampling_rate, self.loudness_lufs)
        segments = to_segments(audio, sampling_rate, self.extractor)
        frames = 1 + segments.shape[-1] // self.extractor.hop_length  # those behind are filled up
        pooled = _in_passes(lambda mel: self._pool(mel, frames), segments, self.extractor)
        return pooled.mean(1)

    def _pool(self, mel: Tensor, frames: int) -> Tensor:
        parts = []
        if self.pooling == "rhythm":
            parts.append(rhythm.rhythm(mel[:, 0, :frames], self.extractor.sampling_rate / self.extractor.hop_length))
        mel = mel.to(self.encoder.audio_projection.linear1.weight.dtype)
        states = self.encoder.audio_model(mel, is_longer=_never_longer(mel), output_hidden_states=True)
        if self.pooling != "embedding":
            parts += [mel[:, 0].mean(1), mel[:, 0].std(1)]
            for state in states.hidden_states:  # [N, width, height, width of the grid]
                parts += [state.flatten(2).mean(-1), state.flatten(2).std(-1)]
        parts.append(nn.functional.normalize(self.encoder.audio_projection(states.pooler_output), dim=-1))
        return torch.cat([part.float() for part in parts], -1)


class FeatureHead(nn.Module):
    """One hidden layer on standardised features: [B, D] -> [B].

    The mean and the spread that it standardises by are buffers, so they are saved with it; `fit` sets them.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, size: int, hidden_size: int, dropout: float = 0.0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("spread", torch.ones(size))
        self.hidden = nn.Linear(size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(hidden_size, 1)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Standardise by the mean and spread of training features [N, D]; what never varies is left at its scale."""
        if features.dim() != 2 or len(features) < 2:
            raise ValueError(f"`features` must be [N, D] with N of at least 2, got shape {tuple(features.shape)}.")
        spread = features.std(0)
        self.mean.copy_(features.mean(0))
        self.spread.copy_(torch.where(spread > 1e-6, spread, torch.ones_like(spread)))

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):  # in bfloat16 many clips would get one score
            standardised = (features - self.mean) / self.spread
            return self.score(self.dropout(nn.functional.gelu(self.hidden(standardised))))[:, 0]
