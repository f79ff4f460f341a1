"""Real classes at tiny size with random weights: what every test builds on."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    ClapTextConfig,
    EncodecConfig,
    MusicgenDecoderConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from musicrl_hf.generator import MusicRLConfig, MusicRLForConditionalGeneration

WORDS = "a the pop rock jazz slow fast piano guitar drums bass flute violin happy sad loud soft synth air reel".split()
SAMPLING_RATE = 400  # Hz; with strides 4 and 2 that makes 50 frames a second, as in the real codecs


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """T5's special ids: pad 0, eos 1, unk 2; one word a token."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side="right"
    )


def tiny_codec_config(V: int = 16, K: int = 4, **overrides) -> EncodecConfig:
    """K codebooks of V entries at 50 frames a second."""
    bits = (V - 1).bit_length()
    options = {
        "target_bandwidths": [K * bits * 50 / 1000],
        "sampling_rate": SAMPLING_RATE,
        "num_filters": 4,
        "hidden_size": 16,
        "codebook_size": V,
        "codebook_dim": 16,
        "upsampling_ratios": [4, 2],
        "num_lstm_layers": 1,
        "num_residual_layers": 1,
        "audio_channels": 1,
        "normalize": False,
    }
    return EncodecConfig(**{**options, **overrides})


def randomise_codebooks(codec) -> None:
    """A random EncodecModel has all-zero codebooks, so every code would be 0: spread them over what its encoder says."""
    with torch.no_grad():
        noise = torch.randn(1, codec.config.audio_channels, 64 * codec.config.hop_length)
        embeddings = codec.encoder(noise)[0].T
        centre, spread = embeddings.mean(0), embeddings.std(0)
        for i, layer in enumerate(codec.quantizer.layers):
            entries = torch.randn_like(layer.codebook.embed) * spread / 2**i
            layer.codebook.embed.copy_(entries + centre if i == 0 else entries)


def tiny_generator(
    audio_channels: int = 1,
    K: int = 4,
    V: int = 16,
    layers: int = 2,
    hidden: int = 32,
    seed: int = 0,
    dropout: float = 0.0,
    text_hidden: int = 24,
    sampling_rate: int = SAMPLING_RATE,
) -> MusicRLForConditionalGeneration:
    """A generator with K codebooks in all (K/2 a side for stereo), its tokenizer, and logits that are not flat."""
    torch.manual_seed(seed)
    config = MusicRLConfig(
        text_encoder=T5Config(
            vocab_size=len(WORDS) + 3,
            d_model=text_hidden,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            dropout_rate=dropout,
            is_encoder_decoder=False,
            use_cache=False,
        ),
        audio_encoder=tiny_codec_config(
            V, K // audio_channels, sampling_rate=sampling_rate, upsampling_ratios=[4, sampling_rate // 200]
        ),
        decoder=MusicgenDecoderConfig(
            vocab_size=V,
            num_hidden_layers=layers,
            ffn_dim=48,
            num_attention_heads=2,
            hidden_size=hidden,
            num_codebooks=K,
            pad_token_id=V,
            bos_token_id=V,
            dropout=dropout,
            attention_dropout=dropout,
            activation_dropout=dropout,
            max_position_embeddings=256,
            audio_channels=audio_channels,
        ),
    )
    model = MusicRLForConditionalGeneration(config)
    randomise_codebooks(model.audio_encoder)
    with torch.no_grad():
        for head in model.decoder.lm_heads:
            head.weight.normal_(0, 0.5)
        for embedding in model.decoder.model.decoder.embed_tokens:
            embedding.weight.normal_(0, 1.0)
    model.restore_audio_token_ids()
    model.tokenizer = tiny_tokenizer()
    return model.eval()


def tiny_clap(
    seed: int = 0, sampling_rate: int = 16000
) -> tuple[ClapModel, PreTrainedTokenizerFast, ClapFeatureExtractor]:
    """A ClapModel in miniature with its tokenizer and feature extractor; clips of at most 10 s."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = ClapConfig(
        text_config=ClapTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
            pad_token_id=0,
            projection_dim=16,
        ).to_dict(),
        audio_config=ClapAudioConfig(
            spec_size=64,
            num_mel_bins=16,
            patch_embeds_hidden_size=8,
            depths=[1, 1],
            num_attention_heads=[2, 2],
            hidden_size=16,
            window_size=4,
            projection_dim=16,
        ).to_dict(),
        projection_dim=16,
    )
    extractor = ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=sampling_rate,
        hop_length=sampling_rate // 25,
        max_length_s=10,
        fft_window_size=1024,
        truncation="rand_trunc",  # what extractors of models without fusion have
    )
    return ClapModel(config).eval(), tokenizer, extractor
