"""Simulated listeners: taste on the waveform and the prompt, noise that repeats, people-like disagreement."""

import math
import time

import pytest
import torch
from test_metrics import CHROMATIC, MAJOR, NOISE, melody
from tiny import tiny_generator

from musicrl_hf.audio import match_loudness, read_audio
from musicrl_hf.preferences.codes import ClipEncoder
from musicrl_hf.preferences.listeners import (
    BOTH_BAD_BELOW,
    BRIGHT_WORDS,
    CHOICE_NOISE,
    DARK_WORDS,
    FAST_WORDS,
    FEATURES,
    LISTENER_VERSION,
    PANEL_SEED,
    PANEL_SIZE,
    SLOW_WORDS,
    TASTES,
    TIE_WIDTH,
    agreement,
    asked_for,
    clip_features,
    other_taste,
    panel_taste,
    simulated_listeners,
)
from musicrl_hf.preferences.pairs import sample_pairs
from musicrl_hf.preferences.schema import load_preferences
from musicrl_hf.rewards import load_reward

RATE = 16000
CLIPPED = (4 * MAJOR).clamp(-1, 1)
HALF_SILENT = torch.cat([MAJOR[:, : MAJOR.shape[1] // 2], torch.zeros(1, MAJOR.shape[1] // 2)], 1)


@pytest.mark.parametrize(
    "worse", [CHROMATIC, NOISE, CLIPPED, HALF_SILENT], ids=["chromatic", "noise", "clipped", "gap"]
)
def test_most_listeners_prefer_the_clean_scale(worse):
    features = clip_features(["a tune"] * 2, torch.stack([MAJOR, worse]), RATE)
    liked = [listener.utility(features) for listener in simulated_listeners(20)]
    assert sum(bool(u[0] > u[1]) for u in liked) >= 18


def test_the_prompt_decides_on_tempo_and_brightness():
    slow = melody([60, 64, 67], note_s=1.0)
    fast = melody([60, 64, 67], note_s=0.125)
    column = FEATURES.index("tempo_fit")
    for prompt, better in (("a slow air", 0), ("a fast reel", 1)):
        fit = clip_features([prompt] * 2, torch.stack([slow, fast]), RATE)[:, column]
        assert fit.argmax() == better
    assert not clip_features(["a tune"] * 2, torch.stack([slow, fast]), RATE)[:, column].any()
    low, high = melody([48, 52, 55]), melody([84, 88, 91])
    column = FEATURES.index("brightness_fit")
    for prompt, better in (("dark and deep", 0), ("a bright tin whistle", 1)):
        assert clip_features([prompt] * 2, torch.stack([low, high]), RATE)[:, column].argmax() == better


def test_words_ask_for_more_or_less():
    assert asked_for("Up-tempo dance", FAST_WORDS, SLOW_WORDS) == 1
    assert asked_for("a slow, mournful air", FAST_WORDS, SLOW_WORDS) == -1
    assert asked_for("a slow dance", FAST_WORDS, SLOW_WORDS) == 0
    assert asked_for("accordion", BRIGHT_WORDS, DARK_WORDS) == 0
    assert not FAST_WORDS & SLOW_WORDS
    assert not BRIGHT_WORDS & DARK_WORDS


def test_a_vote_repeats_and_names_the_same_clip_when_swapped():
    mirrored = {"a": "b", "b": "a", "tie": "tie", "both_bad": "both_bad"}
    for listener in simulated_listeners(10):
        once = listener("a tune", MAJOR, CHROMATIC, RATE)
        assert listener("a tune", MAJOR, CHROMATIC, RATE) == once
        swapped = listener("a tune", CHROMATIC, MAJOR, RATE)
        assert swapped.preference == mirrored[once.preference]
        assert swapped.confidence == once.confidence
        assert 1 <= once.confidence <= 5
    assert simulated_listeners(1)[0]("a tune", MAJOR, MAJOR, RATE).preference == "tie"


def test_choices_follow_bradley_terry():
    """Over many clips of the same liking the share of choices is sigmoid(gap / noise); the tie width moves it outwards."""
    listener = simulated_listeners(1)[0]
    better, worse = melody([60, 64, 67], seconds=0.75), melody([60, 61, 62], seconds=0.75)
    liking = listener.utility(clip_features(["p", "p"], torch.stack([better, worse]), RATE))
    gap = float(liking[0] - liking[1])
    assert 0.2 < gap < 3, "close enough that the noise decides some of them"
    # The prompt enters the noise, and these words ask for nothing: so each is a fresh draw of the same comparison.
    labels = [listener(f"p {i}", better, worse, RATE).preference for i in range(300)]
    expected = [1 / (1 + math.exp((TIE_WIDTH - side * gap) / CHOICE_NOISE)) for side in (1, -1)]
    for label, share in zip("ab", expected, strict=True):
        assert labels.count(label) / 300 == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / 300) + 0.005)


def test_ratings_are_whole_numbers_from_1_to_5_and_rank_the_same():
    for listener in simulated_listeners(5):
        ratings = listener.rate(["a tune"] * 2, torch.stack([MAJOR, NOISE]), RATE)
        assert ratings[0] > ratings[1]
        assert set(ratings.tolist()) <= {1.0, 2.0, 3.0, 4.0, 5.0}


def test_listeners_differ_and_stay_themselves():
    small, large = simulated_listeners(3, seed=4), simulated_listeners(30, seed=4)
    assert large[:3] == small
    assert len({listener.weights for listener in large}) == 30
    assert simulated_listeners(1, seed=5)[0].weights != small[0].weights
    assert all(listener.name.startswith(LISTENER_VERSION) for listener in large)
    assert LISTENER_VERSION.startswith("simulated")
    with pytest.raises(ValueError, match="count is 0"):
        simulated_listeners(0)


def test_this_version_of_the_listeners_is_these_numbers():
    """All figures are by "simulated-2": who changes what its listeners like, or how they choose, has to give it another name."""
    assert LISTENER_VERSION == "simulated-2"
    assert (CHOICE_NOISE, TIE_WIDTH, BOTH_BAD_BELOW) == (0.45, 0.4, -4.0)
    heard = clip_features(["a fast bright reel"] * 3, torch.stack([MAJOR, CHROMATIC, NOISE]), RATE)
    assert heard.tolist() == [
        pytest.approx(row, abs=0.03)
        for row in (
            [0.934, 0.875, 2.194, 1.908, 0.495, 0.120, 0.0, 0.0],
            [-2.916, 0.911, 2.373, 3.000, 0.495, 0.148, 0.0, 0.0],
            [-3.000, -2.250, -0.848, -2.559, 0.961, 0.998, 0.0, 0.0],
        )
    ]
    for taste, weights in {
        "usual": [0.6027, 0.4126, 0.5299, 0.5102, 1.2353, 0.7395, 0.6069, 0.4053],
        "other": [0.2679, 0.2579, 0.8832, 1.0102, 0.7059, 0.4226, 0.6069, 0.6079],
    }.items():
        (listener,) = simulated_listeners(1, seed=5, taste=taste)
        assert listener.weights == pytest.approx(weights, abs=1e-4)


def test_another_taste_is_another_population_and_says_so():
    usual, other = simulated_listeners(200), simulated_listeners(200, taste="other")
    assert all(name.startswith(LISTENER_VERSION + "-other-") for name in (listener.name for listener in other))
    assert not any("other" in listener.name for listener in usual)
    middle = {taste: torch.tensor([one.weights for one in people]).median(0).values for taste, people in
              (("usual", usual), ("other", other))}  # fmt: skip
    for taste, weights in TASTES.items():
        assert middle[taste].tolist() == pytest.approx(weights, abs=0.1)
    with pytest.raises(ValueError, match="taste is 'odd': it must be one of usual, other"):
        simulated_listeners(1, taste="odd")


def test_a_panel_is_asked_as_a_reward_and_hears_no_loudness():
    """The mean of its listeners' likings; half as loud is as good, and noise is worse than a scale."""
    clips = torch.stack([MAJOR, NOISE])
    prompts = ["a tune"] * 2
    for panel, taste in ((panel_taste, "usual"), (other_taste, "other")):
        liked = panel(prompts, clips, 16_000)
        assert liked[0] > liked[1]
        torch.testing.assert_close(panel(prompts, 0.5 * clips, 16_000), liked, atol=1e-3, rtol=0)
        heard = clip_features(prompts, torch.stack([match_loudness(clip, 16_000) for clip in clips]), 16_000)
        people = simulated_listeners(PANEL_SIZE, PANEL_SEED, taste)
        torch.testing.assert_close(liked, sum(one.utility(heard) for one in people) / PANEL_SIZE)
    assert load_reward("musicrl_hf.preferences.listeners:panel_taste") is panel_taste


def test_listeners_agree_more_than_chance_and_less_than_always():
    generator = torch.Generator().manual_seed(0)

    def tune():
        pitches = (60 + torch.randint(0, 12, (8,), generator=generator)).tolist()
        noise = torch.randn(1, 2 * RATE, generator=generator) * float(torch.rand(1, generator=generator)) * 0.05
        return melody(pitches, note_s=0.25, seconds=2.0) + noise

    # Their noise is drawn from the bits of the clips, which differ from one kind of CPU to another: a dozen pairs are too few.
    share = agreement(simulated_listeners(6), [("a tune", tune(), tune()) for _ in range(48)], RATE)
    assert 0.55 < share < 0.95
    with pytest.raises(ValueError, match="no pair was decided"):
        agreement(simulated_listeners(1), [("a tune", MAJOR, NOISE)], RATE)


def test_agreement_counts_by_hand():
    class Fixed:
        def __init__(self, answers):
            self.answers = dict(zip("pqr", answers, strict=True))

        def __call__(self, prompt, audio_a, audio_b, sampling_rate):
            return type("J", (), {"preference": self.answers[prompt]})

    pairs = [(prompt, MAJOR, NOISE) for prompt in "pqr"]
    people = [Fixed(["a", "b", "tie"]), Fixed(["a", "a", "a"]), Fixed(["b", "a", "b"])]
    # Pairs decided by both: 1-2 p agree, q not; 1-3 p not, q not; 2-3 p not, q agree, r not: 2 of 7.
    assert agreement(people, pairs, RATE) == pytest.approx(2 / 7)


def test_a_five_second_clip_is_heard_in_no_time():
    clip = melody([60, 64, 67, 72], seconds=5.0)[None]
    times = []
    for _ in range(7):
        started = time.process_time()
        clip_features(["a tune"], clip, RATE)
        times.append(time.process_time() - started)
    assert min(times) < 0.05  # 0.01 on one free core


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="2 prompts for 1 clips"):
        clip_features(["a", "b"], MAJOR[None], RATE)


def options(**changes):
    return {"listeners": simulated_listeners(3), "name": "tiny", "duration_s": 0.5, "batch_size": 2, **changes}


def test_sampled_pairs_hold_the_clips_and_the_codes_that_made_them(tmp_path):
    generator = tiny_generator()
    out = sample_pairs(
        generator, ["slow air", "fast reel", "jazz"], tmp_path / "votes", pairs_per_prompt=2, **options()
    )
    ds = load_preferences(out)
    assert ds["prompt"] == [p for p in ("slow air", "fast reel", "jazz") for _ in range(2)]
    assert set(ds["codec"]) == {ClipEncoder(generator).identity}
    assert {*ds["listener"]} == {listener.name for listener in simulated_listeners(3)}
    for row in ds:
        for side in ("chosen", "rejected"):
            decoded = generator.decode_codes(torch.tensor(row[f"{side}_codes"])[None].long(), 200)
            assert torch.allclose(read_audio(row[side]["bytes"])[0], decoded[0].clamp(-1, 1), atol=1e-4)
        assert row["chosen_seed"] != row["rejected_seed"]
    assert not (tmp_path / "votes.partial").exists()
    # Seed 0 sampled the first clips of the first batch.
    seeded = generator.sample(["slow air"] * 2, 0.5, top_k=None, guidance_scale=1.0, seed=0).codes[0]
    first = "chosen" if ds[0]["chosen_seed"] == 0 else "rejected"
    assert torch.equal(torch.tensor(ds[0][f"{first}_codes"]), seeded)


def test_several_listeners_vote_on_the_same_two_clips(tmp_path):
    prompts = ["slow air", "fast reel", "jazz"]
    once = load_preferences(sample_pairs(tiny_generator(), prompts, tmp_path / "once", **options()))
    twice = load_preferences(sample_pairs(tiny_generator(), prompts, tmp_path / "twice", **options(votes_per_pair=2)))
    names = [listener.name for listener in simulated_listeners(3)]
    assert list(twice["prompt"]) == [prompt for prompt in prompts for _ in range(2)]
    assert list(twice["listener"]) == [names[turn] for turn in (0, 1, 2, 0, 1, 2)], "in turn"

    def clips(row):
        return {(row[f"{side}_seed"], row[side]["bytes"], str(row[f"{side}_codes"])) for side in ("chosen", "rejected")}

    for number in range(3):
        assert clips(twice[2 * number]) == clips(twice[2 * number + 1]) == clips(once[number])
    # The first listener of the first pair is asked the same as where each pair has one.
    assert {**twice[0], "created_at": ""} == {**once[0], "created_at": ""}


class Louder:
    """Prefers the louder clip: with clips at equal loudness it has nothing to go by."""

    name = "louder"

    def __init__(self):
        self.levels = []

    def __call__(self, prompt, audio_a, audio_b, sampling_rate):
        from musicrl_hf.preferences.listeners import Judgement

        self.levels.append([float(a.square().mean()) for a in (audio_a, audio_b)])
        return Judgement("a" if self.levels[-1][0] > self.levels[-1][1] else "b", 3.0)


def test_listeners_hear_equal_loudness_in_random_order(tmp_path):
    louder = Louder()
    generators = {"against": tiny_generator(seed=1), "against_name": "other"}
    prompts = [f"p{i}" for i in range(16)]
    ds = load_preferences(
        sample_pairs(tiny_generator(), prompts, tmp_path / "votes", **options(listeners=[louder]), **generators)
    )
    assert all(a == pytest.approx(b, rel=0.02) for a, b in louder.levels)
    heard_first = [c if p == "a" else r for p, c, r in zip(ds["preference"], ds["chosen_model"], ds["rejected_model"])]
    assert set(heard_first) == {"tiny", "other"}, "neither generator is always a"
    assert "codec" not in ds.column_names, "two codecs: the codes are left to whoever trains"


class Interrupted(Exception):
    pass


def test_a_run_that_was_cut_short_goes_on(tmp_path):
    generator = tiny_generator()
    prompts = [f"p{i}" for i in range(6)]
    whole = load_preferences(sample_pairs(generator, prompts, tmp_path / "whole", **options()))

    def stop(done, total):
        if done == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        sample_pairs(generator, prompts, tmp_path / "cut", on_batch=stop, **options())
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ValueError, match="begun with another seed: delete it"):
        sample_pairs(generator, prompts, tmp_path / "cut", seed=1, **options())
    counted = []
    generator.audio_encoder.decoder.register_forward_hook(lambda *_: counted.append(1))
    resumed = load_preferences(sample_pairs(generator, prompts, tmp_path / "cut", **options()))
    assert 0 < len(counted) <= 4, "only the last of three batches is sampled"
    assert resumed.remove_columns("created_at").to_dict() == whole.remove_columns("created_at").to_dict()


def test_wrong_sampling_options_are_refused(tmp_path):
    generator = tiny_generator()
    for changes, message in (
        ({"prompts": []}, "0 pairs for 3 listeners"),
        ({"listeners": []}, "1 pairs for 0 listeners"),
        ({"votes_per_pair": 4}, "votes_per_pair is 4, and there are 3 listeners"),
        ({"votes_per_pair": 0}, "votes_per_pair is 0"),
        (
            {"votes_per_pair": 2, "listeners": [*simulated_listeners(1), *simulated_listeners(1)]},
            "there are 1 listeners",
        ),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"against_name": "x"}, "against_name is 'x'"),
        ({"against": tiny_generator(audio_channels=2), "against_name": "x"}, "differ in"),
    ):
        prompts = changes.pop("prompts", ["p"])
        with pytest.raises(ValueError, match=message):
            sample_pairs(generator, prompts, tmp_path / "votes", **options(**changes))
