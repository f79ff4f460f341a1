import pytest
import torch
from tiny import tiny_clap
from transformers import AutoConfig, AutoModel

from musicrl_hf.audio import match_loudness
from musicrl_hf.rewards import QualityConfig, QualityModel
from musicrl_hf.rewards.clap import FeatureHead, log_mel

RATE = 16000


@pytest.fixture(scope="module")
def clap():
    return tiny_clap()


@pytest.fixture(scope="module", params=["statistics", "embedding"])
def model(clap, request):
    model = QualityModel.from_clap(clap[0], clap[2], pooling=request.param)
    with torch.no_grad():
        model.head.score.weight.normal_(0, 0.1)
    return model


def test_embedding_features_are_those_of_the_clap_model(clap):
    model, _, extractor = clap
    quality = QualityModel.from_clap(model, extractor, pooling="embedding", loudness_lufs=None)
    audio = 0.1 * torch.randn(2, 1, 5 * RATE)
    with torch.no_grad():
        expected = model.get_audio_features(log_mel(audio[:, 0], extractor)).pooler_output
    assert torch.allclose(quality.features(audio, RATE), expected, atol=1e-6)


def test_statistics_are_mean_and_standard_deviation_at_every_depth(clap):
    model, _, extractor = clap
    quality = QualityModel.from_clap(model, extractor, loudness_lufs=None)
    audio = 0.1 * torch.randn(1, 1, 5 * RATE)
    mel = log_mel(audio[:, 0], extractor)
    with torch.no_grad():
        states = model.audio_model(mel, output_hidden_states=True).hidden_states
        embedding = model.get_audio_features(mel).pooler_output[0]
    expected = [float(band.mean()) for band in mel[0, 0].T] + [float(band.std()) for band in mel[0, 0].T]
    for state in states:
        expected += [float(unit.mean()) for unit in state[0]] + [float(unit.std()) for unit in state[0]]
    expected += embedding.tolist()
    assert quality.features(audio, RATE)[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_features_of_a_long_clip_are_the_mean_over_its_segments(model):
    audio = 0.1 * torch.randn(1, 1, 20 * RATE)
    model.sound.loudness_lufs = None
    halves = [model.features(audio[..., : 10 * RATE], RATE), model.features(audio[..., 10 * RATE :], RATE)]
    assert torch.allclose(model.features(audio, RATE), torch.stack(halves).mean(0), atol=1e-4)
    model.sound.loudness_lufs = -23.0


def test_mos_lies_in_1_to_5_and_the_reward_in_0_to_1(model):
    audio = 0.1 * torch.randn(3, 2, 4 * RATE)
    mos = model.mos(audio, RATE)
    assert mos.shape == (3,)
    assert mos.min() >= 1
    assert mos.max() <= 5
    reward = model(["pop", "jazz", "rock"], audio, RATE)
    assert torch.allclose(reward, (mos - 1) / 4)
    assert torch.equal(model(["", "", ""], audio, RATE), reward)


def test_a_30_s_clip_gets_the_mean_of_its_first_and_last_20_s(model):
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(20 * RATE) / RATE)
    audio = 0.1 * torch.cat([torch.randn(10 * RATE), tone])[None, None]
    first, last = model.mos(audio[..., : 20 * RATE], RATE), model.mos(audio[..., 10 * RATE :], RATE)
    assert torch.allclose(model.mos(audio, RATE), (first + last) / 2, atol=1e-6)
    assert not torch.allclose(first, last, atol=1e-6)


def test_louder_is_not_better(model):
    audio = 0.1 * torch.randn(1, 1, 4 * RATE)
    assert torch.allclose(model.mos(audio, RATE), model.mos(0.2 * audio, RATE), atol=1e-4)
    assert torch.allclose(model.mos(match_loudness(audio[0], RATE)[None], RATE), model.mos(audio, RATE), atol=1e-4)


def test_only_the_head_learns_and_the_encoder_stays_in_evaluation(model):
    model.train()
    assert not any(part.training for part in model.sound.modules())
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"head"}
    features = model.features(0.1 * torch.randn(4, 1, RATE), RATE)
    assert not features.requires_grad
    model.score_features(features).sum().backward()
    assert model.head.hidden.weight.grad.abs().sum() > 0
    model.eval()


def test_head_can_be_fitted_to_ratings(clap):
    """The whole of what a training recipe needs: features, fit, score_features."""
    model = QualityModel.from_clap(clap[0], clap[2], head_dropout=0.0)
    noise = torch.rand(16) * 0.5
    time = torch.arange(2 * RATE) / RATE
    audio = (torch.sin(2 * torch.pi * 440 * time) + noise[:, None] * torch.randn(16, 2 * RATE))[:, None] * 0.2
    ratings = 5 - 8 * noise
    features = model.features(audio, RATE)
    model.head.fit(features)
    standardised = (features - model.head.mean) / model.head.spread
    assert torch.allclose(standardised.mean(0), torch.zeros(features.shape[1]), atol=1e-3)
    optimiser = torch.optim.Adam(model.head.parameters(), lr=3e-3)
    for _ in range(200):
        loss = (model.score_features(features) - ratings).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert torch.corrcoef(torch.stack([model.mos(audio, RATE), ratings]))[0, 1] > 0.95


def test_saved_model_loads_through_the_auto_classes_and_scores_the_same(model, tmp_path):
    model.head.fit(torch.randn(10, model.head.mean.shape[0]))
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), QualityConfig)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, QualityModel)
    audio = 0.1 * torch.randn(2, 1, 3 * RATE)
    assert torch.allclose(loaded.mos(audio, RATE), model.mos(audio, RATE), atol=1e-5)
    assert not any(p.requires_grad for p in loaded.sound.parameters())


def test_pickled_weights_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        AutoModel.from_pretrained(tmp_path)


def test_a_silent_clip_gets_a_finite_score(model):
    assert torch.isfinite(model.mos(torch.zeros(1, 1, RATE), RATE)).all()


def test_bad_inputs_are_refused(model, clap):
    with pytest.raises(ValueError, match="NaN"):
        model.mos(torch.full((1, 1, RATE), float("nan")), RATE)
    with pytest.raises(ValueError, match="B, C, T"):
        model.mos(torch.randn(1, RATE), RATE)
    with pytest.raises(ValueError, match="sampling_rate"):
        model(["pop"], torch.randn(1, 1, RATE), "16000")
    with pytest.raises(ValueError, match="`pooling` must be"):
        QualityModel.from_clap(clap[0], clap[2], pooling="max")
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        FeatureHead(4, 2).fit(torch.randn(1, 4))
