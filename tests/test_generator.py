import json
import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_generator
from transformers import (
    EncodecConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
    pipeline,
)

from musicrl_hf.bundled import resolve
from musicrl_hf.configuration import MusicRLConfig
from musicrl_hf.delay import num_steps
from musicrl_hf.generator import MusicRLForConditionalGeneration, load_generator

PROMPTS = ["a slow piano air", "fast guitar drums bass"]


@pytest.fixture(params=[(1, 4), (2, 8)], ids=["mono", "stereo"])
def saved(request, tmp_path):
    channels, K = request.param
    model = tiny_generator(audio_channels=channels, K=K)
    model.save_pretrained(tmp_path / "model")
    return model, str(tmp_path / "model")


# -- parity with the stock class ---------------------------------------------------------------------------------------


def stock_greedy(stock, inputs, frames, guidance_scale):
    """Codes [B, K, F] and sound of transformers' own `generate`."""
    config, kept = stock.config.decoder, {}
    stock.audio_encoder.decode = _record(stock.audio_encoder.decode, kept)
    audio = stock.generate(
        input_ids=inputs[0],
        attention_mask=inputs[1],
        do_sample=False,
        max_new_tokens=num_steps(frames, config.num_codebooks, config.audio_channels),
        guidance_scale=guidance_scale,
    )
    return torch.stack(kept["codes"], 2).flatten(1, 2) if len(kept["codes"]) == 2 else kept["codes"][0], audio


def test_a_prompt_longer_than_the_tokenizer_says_is_read_whole(capfd):
    """T5's positions are relative, so that there is nothing to warn of."""
    model = tiny_generator()
    model.tokenizer.model_max_length = 4
    words = "a slow air flute piano drums bass".split()
    ids, mask = model.text_inputs([" ".join(words)])
    assert ids.shape == mask.shape == (1, len(words) + 1)
    assert torch.isfinite(model.encode_text(ids, mask)).all()
    assert "indexing errors" not in capfd.readouterr().err


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_greedy_equals_stock_token_for_token(saved, guidance_scale):
    model, folder = saved
    stock = MusicgenForConditionalGeneration.from_pretrained(folder)
    inputs = model.text_inputs([*PROMPTS, "drums"])  # the last one is padded
    codes = model.sample_codes(*inputs, 12, do_sample=False, guidance_scale=guidance_scale)
    stock_codes, audio = stock_greedy(stock, inputs, 12, guidance_scale)
    assert torch.equal(codes, stock_codes)
    assert len(codes.unique()) > 4
    torch.testing.assert_close(model.decode_codes(codes), audio, rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_greedy_equals_stock_on_the_bundled_model(guidance_scale):
    """Weights that were trained listen to their text."""
    model = load_generator("musicrl-tiny")
    inputs = model.text_inputs(["a slow air played by a flute", "piano, fast tempo, with a band and drums"])
    codes = model.sample_codes(*inputs, 12, do_sample=False, guidance_scale=guidance_scale)
    stock = MusicgenForConditionalGeneration.from_pretrained(resolve("musicrl-tiny"))
    assert torch.equal(codes, stock_greedy(stock, inputs, 12, guidance_scale)[0])
    assert not torch.equal(codes, model.sample_codes(*inputs, 12, do_sample=False, guidance_scale=4 - guidance_scale))


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_greedy_with_an_adapter_equals_stock_with_it(saved, guidance_scale):
    model, folder = saved
    stock = MusicgenForConditionalGeneration.from_pretrained(folder)
    inputs = model.text_inputs([*PROMPTS, "drums"])
    plain = model.sample_codes(*inputs, 12, do_sample=False, guidance_scale=guidance_scale)
    for one in (model, stock):
        torch.manual_seed(1)
        targets = r".*decoder\.(model\.decoder\.layers\.\d+\..*(q_proj|v_proj|out_proj|fc1)|lm_heads\.\d+)"
        get_peft_model(one, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    codes = model.sample_codes(*inputs, 12, do_sample=False, guidance_scale=guidance_scale)
    assert torch.equal(codes, stock_greedy(stock, inputs, 12, guidance_scale)[0])
    assert not torch.equal(codes, plain)


def test_sampling_follows_the_weights_of_the_moment():
    model = tiny_generator()
    inputs = model.text_inputs(PROMPTS)
    before = model.sample_codes(*inputs, 12, do_sample=False)
    other = tiny_generator(seed=1)
    for parameter, value in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(value)  # as merging an adapter does
    codes = model.sample_codes(*inputs, 12, do_sample=False)
    assert torch.equal(codes, other.sample_codes(*inputs, 12, do_sample=False))
    assert not torch.equal(codes, before)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_greedy_in_bfloat16_is_stocks_but_for_near_ties(saved, guidance_scale):
    _, folder = saved
    model = load_generator(folder, dtype=torch.bfloat16)
    stock = MusicgenForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    stock.audio_encoder.float()  # as ours
    inputs = model.text_inputs([*PROMPTS, "drums"])
    codes = model.sample_codes(*inputs, 4, do_sample=False, guidance_scale=guidance_scale)
    same = codes == stock_greedy(stock, inputs, 4, guidance_scale)[0]
    assert same.float().mean() > 0.9  # one other code changes what follows


def _record(decode, kept):
    kept["codes"] = []

    def wrapper(audio_codes, **kwargs):
        kept["codes"].append(audio_codes[0])
        return decode(audio_codes, **kwargs)

    return wrapper


def test_one_decoder_step_a_time(saved):
    model, _ = saved
    seen = []
    model.decoder.model.decoder.layers[0].fc1.register_forward_hook(
        lambda module, inputs, out: seen.append(out.shape[0])
    )
    model.sample_codes(*model.text_inputs(PROMPTS), 12)
    assert seen == [len(PROMPTS)] * num_steps(12, model.config.num_codebooks, model.config.audio_channels)


def test_logits_equal_stock_forward(saved):
    model, folder = saved
    stock = MusicgenForConditionalGeneration.from_pretrained(folder)
    input_ids, mask = model.text_inputs(PROMPTS)
    codes = torch.randint(0, 16, (2, model.config.num_codebooks, 6))
    ours = model.code_logits(codes, input_ids, mask)
    V, K = 16, model.config.num_codebooks
    delayed = torch.full((2, K, ours.shape[2] + 1), V)
    for k in range(K):
        start = 1 + k // model.config.audio_channels
        delayed[:, k, start : start + 6] = codes[:, k]
    with torch.no_grad():
        logits = stock(
            input_ids=input_ids, attention_mask=mask, decoder_input_ids=delayed[..., :-1].reshape(2 * K, -1)
        ).logits
    torch.testing.assert_close(ours.flatten(0, 1), logits, rtol=0, atol=1e-5)


# -- step log-probabilities -------------------------------------------------------------------------------------------


def slow_step_logprobs(model, codes, prompts, temperature):
    """One forward pass a decoder step, one code at a time, straight from the definition."""
    K, F, V, channels = model.config.num_codebooks, codes.shape[-1], 16, model.config.audio_channels
    input_ids, mask = model.text_inputs(prompts)
    states = model.encode_text(input_ids, mask)
    steps = F + K // channels - 1
    result = torch.zeros(len(prompts), steps)
    history = torch.full((len(prompts), K, 1), V)
    for step in range(steps):
        hidden = model.decoder.model(
            input_ids=history.flatten(0, 1), encoder_hidden_states=states, encoder_attention_mask=mask
        ).last_hidden_state[:, -1]
        drawn = torch.full((len(prompts), K, 1), V)
        for k in range(K):
            frame = step - k // channels
            if 0 <= frame < F:
                distribution = (model.decoder.lm_heads[k](hidden) / temperature).softmax(-1)
                for b in range(len(prompts)):
                    code = int(codes[b, k, frame])
                    result[b, step] += distribution[b, code].log()
                    drawn[b, k, 0] = code
        history = torch.cat([history, drawn], -1)
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_step_logprobs_equal_the_slow_twin(saved, temperature):
    model, _ = saved
    codes = model.sample_codes(*model.text_inputs(PROMPTS), 7)
    with torch.no_grad():
        fast = model.step_logprobs(codes, PROMPTS, temperature)
        slow = slow_step_logprobs(model, codes, PROMPTS, temperature)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)


def test_a_shorter_clip_scores_alike_in_a_batch():
    model = tiny_generator()
    long, short = torch.randint(0, 16, (1, 4, 9)), torch.randint(0, 16, (1, 4, 5))
    padded = torch.full((1, 4, 9), 16)
    padded[..., :5] = short
    with torch.no_grad():
        both = model.step_logprobs(torch.cat([long, padded]), PROMPTS)
        alone = model.step_logprobs(short, PROMPTS[1:])
    torch.testing.assert_close(both[1, :8], alone[0], rtol=0, atol=1e-5)
    assert not both[1, 8:].any()


def test_pads_of_the_pattern_weigh_nothing():
    model = tiny_generator()
    scores = model.score_codes(torch.randint(0, 16, (2, 4, 5)), *model.text_inputs(PROMPTS))
    assert scores.mask.sum() == 2 * 4 * 5
    assert not scores.logprobs[~scores.mask].any()
    assert not scores.entropies[~scores.mask].any()
    # What codebook 3 is predicted from gets gradient at its 5 frames only, not at the pads around them.
    gradient = torch.autograd.grad(scores.logprobs[:, 3].sum(), scores.hidden)[0]
    assert not gradient[~scores.mask[:, 3]].any()
    assert gradient[scores.mask[:, 3]].abs().sum(-1).min() > 0


def test_sampling_follows_the_scored_distribution():
    """Frequencies of the first code over many draws against its scored probabilities."""
    model = tiny_generator(K=1, V=4)
    inputs = [part.expand(4000, -1) for part in model.text_inputs(PROMPTS[:1])]
    codes = model.sample_codes(*inputs, 1, temperature=0.8, generator=torch.Generator().manual_seed(0))
    frequencies = torch.bincount(codes.flatten(), minlength=4) / 4000
    logits = model.code_logits(torch.zeros(1, 1, 1, dtype=torch.long), *model.text_inputs(PROMPTS[:1]), 0.8)
    # Four standard errors of a proportion: 4 * sqrt(.25 / 4000) = .032.
    torch.testing.assert_close(frequencies, logits[0, 0, 0].softmax(-1).detach(), rtol=0, atol=0.032)


def test_dropout_is_off_after_disable_dropout():
    model = tiny_generator(dropout=0.1).train()
    codes = torch.randint(0, 16, (2, 4, 5))
    noisy = [model.step_logprobs(codes, PROMPTS) for _ in range(2)]
    assert not torch.equal(*noisy), "without dropout at first this test shows nothing"
    model.disable_dropout()
    first, second = (model.step_logprobs(codes, PROMPTS) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, model.eval().step_logprobs(codes, PROMPTS))


# -- sampling clips ---------------------------------------------------------------------------------------------------


def test_sample_is_reproducible_and_of_exact_length(saved):
    model, _ = saved
    clips = model.sample(PROMPTS, duration_s=0.33, seed=5)
    assert clips.audio.shape == (2, model.config.audio_channels, 132)
    assert clips.codes.shape == (2, model.config.num_codebooks, 17)  # ceil(0.33 s * 50 frames a second)
    assert torch.equal(clips.codes, model.sample(PROMPTS, duration_s=0.33, seed=5).codes)
    assert not torch.equal(clips.codes, model.sample(PROMPTS, duration_s=0.33, seed=6).codes)


def test_codes_survive_the_way_through_sound_channel_by_channel():
    model = tiny_generator(audio_channels=2, K=8)
    audio = torch.randn(1, 2, 80)
    codes = model.encode_audio(audio)
    assert torch.equal(codes[:, 0::2], model.codec.encode(audio[:, :1]).codes)
    assert torch.equal(codes[:, 1::2], model.codec.encode(audio[:, 1:]).codes)
    assert torch.equal(model.decode_codes(codes)[:, 1:], model.codec.decode(codes[:, 1::2]))


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_folder_is_a_stock_musicgen(saved):
    model, folder = saved
    config = json.loads((Path(folder) / "config.json").read_text())
    assert config["architectures"] == ["MusicgenForConditionalGeneration"]
    assert config["model_type"] == "musicgen"
    assert "auto_map" not in config
    speak = pipeline("text-to-audio", model=folder)
    made = speak("slow piano", generate_kwargs={"max_new_tokens": 16, "do_sample": False})
    assert made["sampling_rate"] == 400
    assert made["audio"].size > 0


def test_trainers_token_ids_do_not_reach_the_saved_model(saved, tmp_path):
    model, folder = saved
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 0
    model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "again")
    stock = MusicgenForConditionalGeneration.from_pretrained(tmp_path / "again")
    input_ids, mask = model.text_inputs(PROMPTS)
    frames = stock.generate(input_ids=input_ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert frames.shape[-1] > 0
    assert stock.generation_config.pad_token_id == 16
    assert stock.generation_config.eos_token_id is None


def test_an_adapter_may_say_with_what_guidance_it_is_sampled(saved, tmp_path):
    below = str(saved[1])
    for name in ("guided", "on_it"):
        model = get_peft_model(load_generator(below), LoraConfig(r=2, target_modules=["v_proj", "out_proj"]))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=1.0)  # so that the text is heard
        model.peft_config["default"].base_model_name_or_path = below
        model.save_pretrained(tmp_path / name)
        below = str(tmp_path / name)
    usual = load_generator(below)
    path = tmp_path / "guided" / "generation_config.json"
    path.write_text('{"guidance_scale": 1.0}')
    guided, on_it = load_generator(str(tmp_path / "guided")), load_generator(below)
    assert (guided.generation_config.guidance_scale, on_it.generation_config.guidance_scale) == (1.0, 1.0)
    assert on_it.generation_config.pad_token_id == usual.generation_config.pad_token_id

    def codes(model, **given):
        return model.sample(["a slow air", "a reel"], 0.5, seed=0, **given).codes.tolist()

    assert codes(on_it) == codes(on_it, guidance_scale=1.0) == codes(usual, guidance_scale=1.0)
    assert codes(usual) == codes(on_it, guidance_scale=3.0) != codes(on_it)
    on_it.save_pretrained(tmp_path / "whole")
    assert codes(load_generator(str(tmp_path / "whole"))) == codes(on_it)
    for wrong in ("0.5", '"3"', "true", "NaN", "Infinity"):
        path.write_text(f'{{"guidance_scale": {wrong}}}')
        with pytest.raises(ValueError, match="generation_config.json.*`guidance_scale` is .*1 .no guidance. or more"):
            load_generator(str(tmp_path / "guided"))


def test_load_generator_takes_folders_adapters_and_adapters_on_adapters(saved, tmp_path):
    model, folder = saved
    assert torch.equal(_logits(load_generator(folder)), _logits(model))
    base = folder
    for name in ("first", "second"):
        adapted = get_peft_model(load_generator(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.peft_config["default"].base_model_name_or_path = base
        adapted.save_pretrained(tmp_path / name)
        loaded = load_generator(str(tmp_path / name))
        torch.testing.assert_close(_logits(loaded), _logits(adapted.base_model.model), rtol=0, atol=1e-5)
        assert not torch.allclose(_logits(loaded), _logits(load_generator(base)), atol=1e-3)
        torch.testing.assert_close(
            _logits(load_generator(base, adapter=str(tmp_path / name))), _logits(loaded), rtol=0, atol=0
        )
        base = str(tmp_path / name)


def _logits(model):
    codes = torch.arange(5 * model.config.num_codebooks).reshape(1, -1, 5) % 16
    with torch.no_grad():
        return model.code_logits(codes, torch.tensor([[3, 4, 1]]), torch.ones(1, 3, dtype=torch.long))


def test_dtype_is_the_users(saved):
    _, folder = saved
    model = load_generator(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    clips = model.sample(PROMPTS, duration_s=0.2, seed=0)
    assert clips.audio.dtype == torch.float32
    # Only the codec does without it: the same codes sound the same.
    assert torch.equal(clips.audio, load_generator(folder).decode_codes(clips.codes, clips.audio.shape[-1]))


def test_only_the_warning_about_musicgens_own_pad_is_dropped(caplog):
    logger = logging.getLogger("transformers.configuration_utils")
    warning = (
        "Model config: pad_token_id must be `None` or an integer within the vocabulary (between 0 and {}), got {}. Hm."
    )
    for last, got in ((2047, 2048), (2047, 2049), (2047, -1)):
        logger.warning(warning.format(last, got))
    assert [record.getMessage().split("got ")[1] for record in caplog.records] == ["2049. Hm.", "-1. Hm."]


def test_one_prompt_a_clip_is_asked_for():
    with pytest.raises(ValueError, match="`prompts` holds 2 texts for 1 clips"):
        tiny_generator().step_logprobs(torch.zeros(1, 4, 3, dtype=torch.long), ["slow piano", "drums"])


def test_text_config_is_answered():
    config = tiny_generator().config
    assert config.get_text_config() is config
    assert config.get_text_config(decoder=True) is config.decoder


PUBLISHED = {  # decoder layers, hidden size, heads, ffn, codebooks, channels of facebook/musicgen-*
    "small": (24, 1024, 16, 4096, 4, 1),
    "medium": (48, 1536, 24, 6144, 4, 1),
    "large": (48, 2048, 32, 8192, 4, 1),
    "stereo-small": (24, 1024, 16, 4096, 8, 2),
    "stereo-large": (48, 2048, 32, 8192, 8, 2),
}


def published_config(size: str) -> MusicRLConfig:
    """The configuration of facebook/musicgen-`size`: T5-base text encoder, 32 kHz EnCodec with 4 x 2048 codes."""
    layers, hidden, heads, ffn, codebooks, channels = PUBLISHED[size]
    return MusicRLConfig(
        text_encoder=T5Config(
            d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, is_encoder_decoder=False, use_cache=False
        ),
        audio_encoder=EncodecConfig(
            target_bandwidths=[2.2],
            sampling_rate=32000,
            num_filters=64,
            upsampling_ratios=[8, 5, 4, 4],
            codebook_size=2048,
            codebook_dim=128,
            hidden_size=128,
            num_lstm_layers=2,
            use_causal_conv=False,
            use_conv_shortcut=False,
        ),
        decoder=MusicgenDecoderConfig(
            vocab_size=2048,
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            ffn_dim=ffn,
            num_codebooks=codebooks,
            audio_channels=channels,
            pad_token_id=2048,
            bos_token_id=2048,
        ),
    )


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_build(size):
    """Every published shape, without the memory: on the meta device."""
    with torch.device("meta"):
        model = MusicRLForConditionalGeneration(published_config(size))
    layers, hidden, _, _, codebooks, channels = PUBLISHED[size]
    assert len(model.decoder.model.decoder.layers) == layers
    assert len(model.decoder.lm_heads) == codebooks
    assert model.codec.num_codebooks == codebooks // channels
    assert model.frame_rate == 50
    assert hasattr(model, "enc_to_dec_proj") == (hidden != 768)


@pytest.mark.slow
def test_full_size_small_saved_stock_gives_the_same_logits(tmp_path):
    """facebook/musicgen-small at full size with random weights: saved by the stock class, loaded by ours."""
    torch.manual_seed(0)
    stock = MusicgenForConditionalGeneration(published_config("small")).eval()
    assert sum(p.numel() for p in stock.decoder.parameters()) > 400e6
    stock.save_pretrained(tmp_path / "small")
    tiny_generator().tokenizer.save_pretrained(tmp_path / "small")
    input_ids, mask = torch.tensor([[5, 6, 1]]), torch.ones(1, 3, dtype=torch.long)
    codes = torch.randint(0, 2048, (1, 4, 6))
    delayed = torch.full((1, 4, 10), 2048)
    for k in range(4):
        delayed[:, k, 1 + k : 7 + k] = codes[:, k]
    with torch.no_grad():
        expected = stock(
            input_ids=input_ids, attention_mask=mask, decoder_input_ids=delayed[..., :-1].reshape(4, -1)
        ).logits
        del stock
        ours = MusicRLForConditionalGeneration.from_pretrained(str(tmp_path / "small"))
        logits = ours.code_logits(codes, input_ids, mask)
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-4)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"duration_s": 31}, r"`duration_s` must be in \(0, 30\] seconds, got 31"),
        ({"duration_s": 0}, "`duration_s`"),
        ({"temperature": 0}, "`temperature` must be above 0, got 0"),
        ({"top_k": 0}, "`top_k` must be at least 1"),
        ({"guidance_scale": 0.5}, "`guidance_scale` must be at least 1"),
        ({"prompts": []}, "`prompts` must be a list of at least one text"),
        ({"prompts": "slow piano"}, "`prompts` must be a list"),
    ],
)
def test_sample_names_what_is_wrong(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny_generator().sample(**{"prompts": PROMPTS, **arguments})


def test_codes_of_another_codec_are_refused():
    model = tiny_generator()
    with pytest.raises(ValueError, match=r"`codes` must be integers \[B, 4, F\]"):
        model.step_logprobs(torch.zeros(1, 8, 5, dtype=torch.long), PROMPTS[:1])
    with pytest.raises(ValueError, match=r"`codes` must lie in \[0, 16\]"):
        model.step_logprobs(torch.full((1, 4, 5), 99), PROMPTS[:1])
    with pytest.raises(ValueError, match=r"`audio` must be \[B, 1, T\]"):
        model.encode_audio(torch.zeros(1, 2, 80))


def test_a_generator_without_tokenizer_says_so():
    model = tiny_generator()
    model.tokenizer = None
    with pytest.raises(ValueError, match="has no tokenizer"):
        model.sample(PROMPTS)


def test_unknown_names_pickles_and_cut_files_are_refused(saved, tmp_path):
    model, folder = saved
    with pytest.raises(ValueError, match="musicrl-tinny.*musicrl-tiny"):
        load_generator("musicrl-tinny")
    weights = tmp_path / "model" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors.*cut short"):
        load_generator(folder)
    weights.unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin.*pickle"):
        load_generator(folder)
