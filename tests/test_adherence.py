import numpy as np
import pytest
import torch
from tiny import tiny_clap

from musicrl_hf.rewards import AdherenceReward, check_scores
from musicrl_hf.rewards import clap as clap_features
from musicrl_hf.rewards.clap import log_mel, to_segments

RATE = 16000


@pytest.fixture(scope="module")
def clap():
    return tiny_clap()


@pytest.fixture(scope="module")
def reward(clap):
    return AdherenceReward(*clap)


def stock_cosine(clap, prompt: str, segment: torch.Tensor) -> float:
    """Prompt and one segment [T] through transformers alone: its feature extractor, its ClapModel."""
    model, tokenizer, extractor = clap
    sound = extractor(segment.numpy(), sampling_rate=RATE, return_tensors="pt")
    text = tokenizer([prompt], return_tensors="pt")
    with torch.no_grad():
        a = model.get_audio_features(sound["input_features"], is_longer=torch.tensor([[False]])).pooler_output[0]
        t = model.get_text_features(text["input_ids"], attention_mask=text["attention_mask"]).pooler_output[0]
    return float(a @ t / a.norm() / t.norm())


def test_a_30_s_clip_is_the_mean_of_three_segments_scored_one_by_one(clap, reward):
    audio = 0.1 * torch.randn(2, 1, 30 * RATE)
    prompts = ["pop piano", "slow jazz flute"]
    slow = [
        np.mean([stock_cosine(clap, prompt, clip[0, start : start + 10 * RATE]) for start in (0, 10 * RATE, 20 * RATE)])
        for prompt, clip in zip(prompts, audio)
    ]
    assert reward(prompts, audio, RATE).tolist() == pytest.approx(slow, abs=1e-5)


def test_segments_of_a_25_s_clip_overlap_and_reach_both_ends(clap):
    audio = torch.arange(25 * RATE).float()[None, None]
    segments = to_segments(audio, RATE, clap[2])
    assert segments.shape == (1, 3, 10 * RATE)
    assert segments[0, :, 0].tolist() == [0, 7.5 * RATE, 15 * RATE]
    assert segments[0, -1, -1] == 25 * RATE - 1


def test_a_clip_of_one_segment_stays_whole(clap):
    assert to_segments(torch.randn(1, 1, 10 * RATE), RATE, clap[2]).shape == (1, 1, 10 * RATE)
    assert to_segments(torch.randn(1, 1, 10 * RATE + 1), RATE, clap[2]).shape == (1, 2, 10 * RATE)


@pytest.mark.parametrize("seconds", [0.7, 3, 6, 9.97, 10])
@pytest.mark.parametrize("padding", ["repeatpad", "repeat", "pad"])
@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
def test_mel_features_equal_the_stock_extractor(clap, seconds, padding, truncation):
    _, _, extractor = clap
    audio = 0.3 * torch.randn(2, int(seconds * RATE))
    stock = extractor(
        [clip.numpy() for clip in audio],
        sampling_rate=RATE,
        padding=padding,
        truncation=truncation,
        return_tensors="pt",
    )["input_features"]
    settings = extractor.to_dict() | {"padding": padding, "truncation": truncation}
    ours = log_mel(audio, type(extractor).from_dict(settings))
    assert ours.shape == stock.shape
    # Decibels of silence rest on the 1e-10 floor in both; elsewhere float32 against float64.
    assert torch.allclose(ours, stock, atol=2e-2)


@pytest.mark.parametrize(("hops", "repeated"), [(40, True), (40.5, False), (1, True)])
@pytest.mark.parametrize("padding", ["repeatpad", "repeat"])
def test_sound_that_is_repeated_is_looked_at_once(clap, hops, repeated, padding, monkeypatch):
    """And is in decibels what it is where nothing is known of a period: where the clip is what would be its repeats."""
    _, _, stock = clap
    settings = stock.to_dict() | {"padding": padding, "truncation": "rand_trunc"}
    extractor, windows, stft = type(stock).from_dict(settings), [], torch.stft

    def counts(*args, **options):
        found = stft(*args, **options)
        windows.append(found.shape[-1])
        return found

    monkeypatch.setattr(torch, "stft", counts)
    clip = 0.3 * torch.randn(2, round(hops * extractor.hop_length))
    ours, looked_at = log_mel(clip, extractor), sum(windows)
    sound, silence = clap_features._filled_up(clip, extractor)
    monkeypatch.setattr(clap_features, "_filled_up", lambda audio, _: (audio, silence))
    windows.clear()
    torch.testing.assert_close(ours, log_mel(sound, extractor), rtol=0, atol=1e-3)
    assert looked_at == sum(windows) if not repeated else looked_at < 0.2 * sum(windows)


def test_the_same_clip_scores_the_same_whatever_numpy_draws(reward):
    audio = 0.1 * torch.randn(1, 1, 23 * RATE)
    scores = []
    for seed in (0, 1):
        np.random.seed(seed)
        scores.append(reward(["rock drums"], audio, RATE))
    assert torch.equal(*scores)


def test_a_clip_scores_alone_as_in_a_batch_and_equal_prompts_score_alike(reward):
    audio = 0.1 * torch.randn(3, 1, 24 * RATE)  # nine segments, more than go through the model at once on a CPU
    prompts = ["sad violin", "fast rock guitar drums", "sad violin"]
    together = reward(prompts, audio, RATE)
    alone = torch.cat([reward([prompt], clip[None], RATE) for prompt, clip in zip(prompts, audio)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.abs().max() <= 1
    assert together.dtype == torch.float32


def test_stereo_is_mixed_down_and_other_rates_are_resampled(reward):
    stereo = 0.1 * torch.randn(1, 2, 4 * RATE)
    mono = stereo.mean(1, keepdim=True)
    assert torch.equal(reward(["pop"], stereo, RATE), reward(["pop"], mono, RATE))
    time = torch.arange(4 * 32000) / 32000
    tone = 0.3 * torch.sin(2 * torch.pi * 440 * time)[None, None]
    assert torch.allclose(reward(["pop"], tone, 32000), reward(["pop"], tone[..., ::2], RATE), atol=5e-2)


def test_loads_from_a_folder(clap, reward, tmp_path):
    for part in clap:
        part.save_pretrained(tmp_path)
    audio = 0.1 * torch.randn(1, 1, 2 * RATE)
    loaded = AdherenceReward.from_pretrained(str(tmp_path))
    assert torch.allclose(loaded(["pop"], audio, RATE), reward(["pop"], audio, RATE), atol=1e-6)


def test_pickled_weights_are_refused(clap, tmp_path):
    for part in clap:
        part.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(clap[0].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        AdherenceReward.from_pretrained(str(tmp_path))


def test_an_extractor_of_another_model_is_refused(clap):
    model, tokenizer, extractor = clap
    other = type(extractor).from_dict(extractor.to_dict() | {"truncation": "fusion"})
    with pytest.raises(ValueError, match="enable_fusion"):
        AdherenceReward(model, tokenizer, other)


@pytest.mark.parametrize(
    ("prompts", "audio", "rate", "message"),
    [
        (["pop"], torch.randn(1, RATE), RATE, "B, C, T"),
        (["pop"], torch.zeros(1, 1, 0), RATE, "empty"),
        (["pop"], torch.full((1, 1, 100), float("nan")), RATE, "NaN"),
        (["pop"], torch.zeros(1, 1, 100, dtype=torch.int16), RATE, "float"),
        (["pop"], torch.randn(1, 1, 100), 16000.0, "sampling_rate"),
        (["pop"], torch.randn(1, 1, 100), 0, "sampling_rate"),
        (["pop", "jazz"], torch.randn(1, 1, 100), RATE, "2 texts for 1 clips"),
        ("pop", torch.randn(1, 1, 100), RATE, "list of strings"),
    ],
)
def test_bad_inputs_name_the_argument(reward, prompts, audio, rate, message):
    with pytest.raises(ValueError, match=message):
        reward(prompts, audio, rate)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.5, 1.0], "returned list"),
        (torch.zeros(2, 1), r"shape \(2, 1\) for 2 clips"),
        (torch.zeros(3), r"shape \(3,\) for 2 clips"),
        (torch.tensor([0.0, float("nan")]), r"NaN or infinite scores for clip\(s\) \[1\]"),
        (torch.tensor([float("inf"), 0.0]), r"clip\(s\) \[0\]"),
        (torch.tensor([True, False]), "torch.bool"),
    ],
)
def test_bad_scores_name_the_reward(scores, message):
    with pytest.raises(ValueError, match=message) as error:
        check_scores(scores, 2, "mine")
    assert "`mine`" in str(error.value)


def test_good_scores_come_back_as_float32_without_gradient():
    scores = check_scores(torch.tensor([1, 2]), 2, "mine")
    assert scores.dtype == torch.float32
    assert not check_scores(torch.ones(2, requires_grad=True), 2).requires_grad
