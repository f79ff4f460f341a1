import pytest
import torch
from tiny import SAMPLING_RATE, tiny_clap, tiny_generator
from transformers import AutoConfig, AutoModel

from musicrl_hf.audio import match_loudness
from musicrl_hf.rewards import PreferenceConfig, PreferenceModel

PROMPTS = ["slow piano", "fast rock guitar drums", "jazz"]


def codes_of(model, frames=6, batch=3):
    return torch.randint(0, model.config.generator.codebook_size, (batch, model.config.generator.num_codebooks, frames))


@pytest.fixture(scope="module")
def generator():
    return tiny_generator()


@pytest.fixture(scope="module")
def model(generator):
    torch.manual_seed(0)
    return PreferenceModel.from_generator(generator)


@pytest.fixture(scope="module")
def clap_model():
    torch.manual_seed(0)
    model = PreferenceModel.from_clap(*tiny_clap())
    with torch.no_grad():
        model.head.hidden.weight.normal_(0, 0.01)
        model.head.score.weight.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("channels", [1, 2])
def test_score_is_a_linear_map_of_the_generators_own_states(channels):
    """Slow twin: the stock decoder's states, step by step, of a model that the preference model was made from."""
    generator = tiny_generator(audio_channels=channels)
    model = PreferenceModel.from_generator(generator)
    codes = codes_of(model)
    ids, mask = generator.text_inputs(PROMPTS)
    with torch.no_grad():
        hidden = generator.score_codes(codes, ids, mask).hidden
        expected = [model.score(torch.cat([torch.stack(list(states)).mean(0), states[-1]])).item() for states in hidden]
        scores = model.score_codes(codes, ids, mask)
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_shorter_clip_scores_in_a_batch_as_it_does_alone(model, generator):
    codes = codes_of(model, frames=9)
    codes[1, :, 5:] = generator.config.pad_code
    ids, mask = generator.text_inputs(PROMPTS)
    with torch.no_grad():
        together = model.score_codes(codes, ids, mask)
        alone = model.score_codes(codes[1:2, :, :5], *generator.text_inputs(PROMPTS[1:2]))
    assert together[1].item() == pytest.approx(alone.item(), abs=1e-6)


def test_from_generator_copies_and_from_scratch_does_not(generator):
    model = PreferenceModel.from_generator(generator)
    name = "decoder.model.decoder.layers.0.self_attn.q_proj.weight"
    original = generator.get_parameter(name)
    assert torch.equal(model.generator.get_parameter(name), original)
    assert model.generator.get_parameter(name) is not original
    scratch = PreferenceModel.from_generator(generator, from_scratch=True)
    assert not torch.equal(scratch.generator.get_parameter(name), original)
    codec = scratch.generator.audio_encoder.state_dict()
    assert all(torch.equal(codec[key], value) for key, value in generator.audio_encoder.state_dict().items())
    assert len(generator.decoder.lm_heads) == 4
    assert len(model.generator.decoder.lm_heads) == 0


def test_without_text_the_prompt_changes_nothing_and_with_text_it_does(generator):
    torch.manual_seed(0)
    with_text = PreferenceModel.from_generator(generator)
    without = PreferenceModel.from_generator(generator, use_text=False)
    codes = codes_of(with_text, batch=1)
    pairs = [generator.text_inputs([prompt]) for prompt in PROMPTS]
    with torch.no_grad():
        assert len({without.score_codes(codes, *pair).item() for pair in pairs}) == 1
        assert len({with_text.score_codes(codes, *pair).item() for pair in pairs}) == 3


def test_gradient_reaches_decoder_and_head_but_not_codec_and_text_encoder(generator):
    for use_text in (True, False):
        model = PreferenceModel.from_generator(generator, use_text=use_text)
        model.score_codes(codes_of(model), *generator.text_inputs(PROMPTS)).sum().backward()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert not any(name.startswith(("generator.audio_encoder", "generator.text_encoder")) for name in trained)
        # Every trained parameter takes part, which DDP needs.
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_scores_audio_through_its_own_codec(model, generator):
    audio = 0.1 * torch.randn(3, 1, 2 * SAMPLING_RATE)
    matched = torch.stack([match_loudness(clip, SAMPLING_RATE) for clip in audio])
    with torch.no_grad():
        expected = model.score_codes(generator.encode_audio(matched), *generator.text_inputs(PROMPTS))
    assert torch.allclose(model(PROMPTS, audio, SAMPLING_RATE), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["model", "clap_model"])
def test_a_30_s_clip_gets_the_mean_of_its_first_and_last_20_s(name, request):
    model = request.getfixturevalue(name)
    rate = 400 if name == "model" else 4000
    audio = torch.cat([0.1 * torch.randn(1, 1, 15 * rate), torch.sin(torch.arange(15 * rate) * 0.3)[None, None]], -1)
    first = model(["jazz"], audio[..., : 20 * rate], rate)
    last = model(["jazz"], audio[..., 10 * rate :], rate)
    assert model(["jazz"], audio, rate).item() == pytest.approx((first + last).item() / 2, abs=1e-6)
    assert first.item() != last.item()


@pytest.mark.parametrize("name", ["model", "clap_model"])
def test_louder_is_not_better_and_stereo_is_mixed_down(name, request):
    model = request.getfixturevalue(name)
    rate = 400 if name == "model" else 16000
    audio = 0.05 * torch.randn(1, 2, 3 * rate)
    score = model(["jazz"], audio, rate)
    assert model(["jazz"], 2 * audio, rate).item() == pytest.approx(score.item(), abs=1e-4)
    assert torch.equal(model(["jazz"], audio, rate), score)
    assert score.dtype == torch.float32


def test_mono_is_copied_to_both_sides_of_a_stereo_backbone():
    model = PreferenceModel.from_generator(tiny_generator(audio_channels=2))
    mono = 0.05 * torch.randn(1, 1, 800)
    both = mono.repeat(1, 2, 1)
    assert torch.allclose(model(["pop"], mono, 400), model(["pop"], both, 400), atol=1e-6)


@pytest.mark.parametrize("use_text", [True, False])
@pytest.mark.parametrize("pooling", ["statistics", "embedding"])
def test_clap_backbone_hears_text_only_where_it_is_told_to(pooling, use_text):
    torch.manual_seed(0)
    model = PreferenceModel.from_clap(*tiny_clap(), use_text=use_text, pooling=pooling)
    audio = (0.1 * torch.randn(1, 1, 16000)).expand(3, -1, -1)
    features = model.features(PROMPTS, audio, 16000)
    assert features.shape == (3, model.head.mean.shape[0])
    assert len({round(s, 7) for s in model(PROMPTS, audio, 16000).tolist()}) == (3 if use_text else 1)
    assert not any(p.requires_grad for p in model.sound.parameters())


@pytest.mark.parametrize("options", [{}, {"use_text": False}, {"channels": 2}])
def test_a_saved_generator_backbone_is_whole(options, tmp_path):
    channels = options.pop("channels", 1)
    torch.manual_seed(0)
    model = PreferenceModel.from_generator(tiny_generator(audio_channels=channels), **options)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, PreferenceModel)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), PreferenceConfig)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    audio = 0.1 * torch.randn(3, channels, 800)
    assert torch.allclose(loaded(PROMPTS, audio, 400), model(PROMPTS, audio, 400), atol=1e-6)
    trained = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (model, loaded)]
    assert trained[0] == trained[1]


def test_a_saved_clap_backbone_is_whole(clap_model, tmp_path):
    clap_model.head.fit(torch.randn(9, clap_model.head.mean.shape[0]))
    clap_model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    audio = 0.1 * torch.randn(3, 1, 16000)
    assert torch.allclose(loaded(PROMPTS, audio, 16000), clap_model(PROMPTS, audio, 16000), atol=1e-5)
    assert {name.split(".")[0] for name, p in loaded.named_parameters() if p.requires_grad} == {"head"}


def test_pickled_weights_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        AutoModel.from_pretrained(tmp_path)


def test_bad_inputs_name_the_argument(model, clap_model, generator):
    ids, mask = generator.text_inputs(PROMPTS)
    with pytest.raises(ValueError, match=r"integers \[B, 4, F\]"):
        model.score_codes(torch.zeros(3, 2, 5, dtype=torch.long), ids, mask)
    with pytest.raises(ValueError, match="which has no codes"):
        clap_model.score_codes(torch.zeros(3, 4, 5, dtype=torch.long), ids, mask)
    with pytest.raises(ValueError, match="NaN"):
        model(["pop"], torch.full((1, 1, 400), float("nan")), 400)
    with pytest.raises(ValueError, match="`backbone` must be one of"):
        PreferenceConfig(backbone="mert")
    with pytest.raises(ValueError, match="`pooling` must be"):
        PreferenceModel.from_clap(*tiny_clap(), pooling="max")
