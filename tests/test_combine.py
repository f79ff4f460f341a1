import contextlib
import math
import signal
import time

import pytest
import torch
from tiny import tiny_clap, tiny_generator

from musicrl_hf.audio import write_audio
from musicrl_hf.rewards import (
    AdherenceReward,
    CombinedReward,
    PreferenceModel,
    QualityModel,
    load_reward,
    load_rewards,
    score_clips,
)
from musicrl_hf.rewards.combine import label_specs

RATE = 16000
PROMPTS = ["pop", "slow jazz", "rock"]


def loudness(prompts, audio, sampling_rate):
    return audio.square().mean((1, 2))


def words(prompts, audio, sampling_rate):
    return torch.tensor([float(len(prompt.split())) for prompt in prompts])


@pytest.fixture
def audio():
    return torch.tensor([0.1, 0.2, 0.4])[:, None, None] * torch.ones(3, 1, 100)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An adherence, a quality and a preference model, as they are published."""
    base = tmp_path_factory.mktemp("models")
    clap = tiny_clap()
    for part in clap:
        part.save_pretrained(base / "adherence")
    QualityModel.from_clap(clap[0], clap[2]).save_pretrained(base / "quality")
    PreferenceModel.from_generator(tiny_generator()).save_pretrained(base / "preference")
    return base


def test_weighted_sum(audio):
    reward = CombinedReward({"loudness": loudness, "words": words}, {"loudness": 2.0, "words": -0.5})
    expected = [2 * 0.01 - 0.5 * 1, 2 * 0.04 - 0.5 * 2, 2 * 0.16 - 0.5 * 1]
    assert reward(PROMPTS, audio, RATE).tolist() == pytest.approx(expected)


def standardise(values):
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / (spread + 1e-4) for v in values]


def test_both_orders_of_normalising_by_hand(audio):
    a, b = [0.01, 0.04, 0.16], [1.0, 2.0, 1.0]
    rewards, weights = {"loudness": loudness, "words": words}, {"loudness": 3.0, "words": 1.0}
    after = CombinedReward(rewards, weights, "sum_then_normalise")(PROMPTS, audio, RATE)
    assert after.tolist() == pytest.approx(standardise([3 * x + y for x, y in zip(a, b)]), abs=1e-5)
    before = CombinedReward(rewards, weights, "normalise_then_sum")(PROMPTS, audio, RATE)
    expected = [3 * x + y for x, y in zip(standardise(a), standardise(b))]
    assert before.tolist() == pytest.approx(expected, abs=1e-5)
    assert before.tolist() != pytest.approx(after.tolist(), abs=0.1)


def scores_of(*values):
    return lambda prompts, audio, sampling_rate: torch.tensor(values)


def test_the_worst_case_of_an_ensemble_by_hand(audio):
    """The clip in the middle is average to one member and the worst to the other, whose zero lies elsewhere."""
    members = {"a": scores_of(1.0, 2.0, 3.0), "b": scores_of(104.0, 102.0, 106.0)}  # means 2 and 104
    reward = CombinedReward(members, normalise="centre_then_min")
    assert reward(PROMPTS, audio, RATE).tolist() == [-1, -2, 1]  # of (-1, 0, 1) and (0, -2, 2)
    weighted = CombinedReward(members, {"a": 3.0, "b": 1.0}, "centre_then_min")
    assert weighted(PROMPTS, audio, RATE).tolist() == [-3, -2, 2]  # of (-3, 0, 3) and (0, -2, 2)
    # spreads sqrt(2 / 3) and sqrt(8 / 3): (-1.2247, 0, 1.2247) and (0, -1.2247, 1.2247)
    scaled = CombinedReward(members, normalise="normalise_then_min")
    assert scaled(PROMPTS, audio, RATE).tolist() == pytest.approx([-(1.5**0.5), -(1.5**0.5), 1.5**0.5], abs=1e-3)


def test_the_worst_case_does_not_know_a_members_zero_nor_where_normalised_its_scale(audio):
    first, second = torch.tensor([0.1, 0.5, -0.2]), torch.tensor([0.3, -0.4, 0.6])
    for normalise, scale in (("centre_then_min", 1.0), ("normalise_then_min", 8.0)):
        plain, moved = (
            CombinedReward({"a": scores_of(*first), "b": scores_of(*other)}, normalise=normalise)(PROMPTS, audio, RATE)
            for other in (second, scale * second - 7.0)
        )
        assert moved.tolist() == pytest.approx(plain.tolist(), abs=1e-3)


def test_the_worst_case_of_one_reward_is_that_reward(audio):
    reward = CombinedReward({"words": words}, normalise="centre_then_min")
    assert reward(PROMPTS, audio, RATE).tolist() == pytest.approx([-1 / 3, 2 / 3, -1 / 3])


def test_a_reward_that_is_equal_for_all_clips_becomes_zero(audio):
    reward = CombinedReward({"words": words}, normalise="normalise_then_sum")
    assert reward(["one two"] * 3, audio, RATE).tolist() == [0, 0, 0]


def test_components_are_plain_and_not_scored_twice(audio):
    calls = []

    def counted(prompts, audio, sampling_rate):
        calls.append(len(prompts))
        return loudness(prompts, audio, sampling_rate)

    reward = CombinedReward({"mine": counted, "words": words}, {"mine": 5.0, "words": 1.0}, "normalise_then_sum")
    parts = reward.components(PROMPTS, audio, RATE)
    assert parts["mine"].tolist() == pytest.approx([0.01, 0.04, 0.16])
    assert parts["words"].tolist() == [1, 2, 1]
    total = reward.combine(parts)
    assert calls == [3]
    assert torch.equal(total, reward(PROMPTS, audio, RATE))


def test_a_component_that_breaks_is_named(audio):
    def broken(prompts, audio, sampling_rate):
        return torch.tensor([0.0, float("nan"), 1.0])

    with pytest.raises(ValueError, match=r"`broken` returned NaN or infinite scores for clip\(s\) \[1\]"):
        CombinedReward({"words": words, "broken": broken})(PROMPTS, audio, RATE)


def test_a_reward_that_asks_a_server_again_and_again_is_given_up(audio):
    calls = 0

    def asks(prompts, audio, sampling_rate):
        nonlocal calls
        for _ in range(600):
            calls += 1
            with contextlib.suppress(Exception):
                time.sleep(0.1)
                raise ConnectionError("no answer")
        return loudness(prompts, audio, sampling_rate)

    def hears_nothing(prompts, audio, sampling_rate):
        for _ in range(20):
            with contextlib.suppress(BaseException):
                time.sleep(0.1)
        return loudness(prompts, audio, sampling_rate)

    before, left = (
        signal.getsignal(signal.SIGALRM),
        signal.getitimer(signal.ITIMER_REAL)[0],
    )  # of a test that has a limit itself
    for reward in (asks, hears_nothing):
        with pytest.raises(TimeoutError, match="`it` has not answered for 3 clips within 0.3 s"):
            CombinedReward({"it": reward}, timeout_s=0.3)(PROMPTS, audio, RATE)
    assert calls < 600  # and not only once it had given up by itself
    assert signal.getsignal(signal.SIGALRM) is before
    assert 0 <= left - signal.getitimer(signal.ITIMER_REAL)[0] < 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "`rewards` is empty"),
        (({"words": words}, {"other": 1.0}), "one weight each"),
        (({"words": words}, {"words": 0.0}), "leave the reward out"),
        (({"words": words}, {"words": float("nan")}), "finite"),
        (({"words": words}, None, "mean"), "`normalise` must be one of none, sum_then_normalise"),
    ],
)
def test_bad_combinations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CombinedReward(*arguments)


def test_specs_load_models_from_folders(folders):
    assert isinstance(load_reward(f"adherence:{folders / 'adherence'}"), AdherenceReward)
    quality = load_reward(f"quality:{folders / 'quality'}")
    assert isinstance(quality, QualityModel)
    assert not quality.training
    assert isinstance(load_reward(f"preference:{folders / 'preference'}"), PreferenceModel)


def test_weighted_specs_in_either_spelling(folders):
    adherence, quality = f"adherence:{folders / 'adherence'}", f"quality:{folders / 'quality'}"
    listed = load_rewards([f"0.5*{adherence}", f"2 * {quality}"])
    written = load_rewards(f"0.5*{adherence} + 2*{quality}", normalise="sum_then_normalise")
    assert listed.weights == written.weights == {adherence: 0.5, quality: 2.0}
    assert written.normalise == "sum_then_normalise"
    audio = 0.1 * torch.randn(3, 1, RATE)
    parts = listed.components(PROMPTS, audio, RATE)
    assert torch.allclose(listed(PROMPTS, audio, RATE), 0.5 * parts[adherence] + 2 * parts[quality])


def test_a_function_of_the_users_is_found_in_the_current_directory(tmp_path, monkeypatch, audio):
    (tmp_path / "my_rewards.py").write_text(
        "def quiet(prompts, audio, sampling_rate):\n    return -audio.abs().mean((1, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # undoes what load_reward adds
    reward = load_rewards("2*my_rewards:quiet")
    assert reward(PROMPTS, audio, RATE).tolist() == pytest.approx([-0.2, -0.4, -0.8])
    with pytest.raises(ValueError, match="no function 'loud'; it has quiet"):
        load_reward("my_rewards:loud")
    with pytest.raises(ValueError, match=r"'json:dumps' cannot be called with \(prompts, audio, sampling_rate\)"):
        load_reward("json:dumps")
    (tmp_path / "broken_rewards.py").write_text("import a_package_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_missing"):
        load_reward("broken_rewards:quiet")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aderence", "Known forms"),
        ("adherence:", "Known forms"),
        ("preference", "Known forms"),
        ("os.system('true')", "Known forms"),
        ("os:system('true')", "Known forms"),
        ("no_such_module_here:f", "there is no module 'no_such_module_here'"),
        ("quality:no-such-model", "bundled names"),
        ("half*adherence", "'half' is no weight"),
    ],
)
def test_unknown_specs_are_refused_with_the_known_forms(spec, message):
    with pytest.raises(ValueError, match=message):
        load_rewards(spec)


def test_the_same_reward_twice_is_refused(folders):
    spec = f"quality:{folders / 'quality'}"
    with pytest.raises(ValueError, match="named twice"):
        load_rewards([spec, f"0.5*{spec}"])


def test_score_table_of_files_of_unequal_length_and_rate(folders, tmp_path):
    adherence, quality = f"adherence:{folders / 'adherence'}", f"quality:{folders / 'quality'}"
    clips = [0.1 * torch.randn(1, RATE), 0.1 * torch.randn(2, 2 * 8000)]
    paths = [tmp_path / "a.wav", tmp_path / "b.flac"]
    for path, clip, rate in zip(paths, clips, (RATE, 8000)):
        write_audio(path, clip, rate)
    table = score_clips([adherence, f"0.5*{quality}"], "pop", paths)
    assert table.paths == [str(path) for path in paths]
    total = [a + 0.5 * q for a, q in zip(table.scores[adherence], table.scores[quality])]
    assert table.scores["total"] == pytest.approx(total)
    alone = load_reward(quality)(["pop"], clips[0][None], RATE).item()
    assert table.scores[quality][0] == pytest.approx(alone, abs=1e-3)  # 16-bit file
    lines = str(table).splitlines()
    assert lines[0].split()[0] == "clip"
    assert lines[0].endswith(f"total = {adherence} + 0.5*{quality}")
    assert lines[2].startswith(str(paths[1]))
    assert set(score_clips(adherence, ["pop", "jazz"], paths).scores) == {adherence}
    halved = score_clips(f"0.5*{adherence}", "pop", paths)
    assert halved.scores[adherence] == table.scores[adherence]  # the column of a reward is its own score
    assert halved.scores["total"] == pytest.approx([0.5 * score for score in table.scores[adherence]])
    assert f"total = 0.5*{adherence}" in str(halved)


def test_score_clips_refuses_what_it_cannot_score(folders, tmp_path):
    adherence = f"adherence:{folders / 'adherence'}"
    with pytest.raises(FileNotFoundError, match=r"missing\.wav"):
        score_clips(adherence, "pop", [tmp_path / "missing.wav"])
    with pytest.raises(ValueError, match="`paths` must be a list"):
        score_clips(adherence, "pop", [])
    with pytest.raises(ValueError, match="2 texts for 1 clips"):
        score_clips(adherence, ["pop", "jazz"], [tmp_path / "a.wav"])


def test_labels_show_no_more_of_a_path_than_tells_rewards_apart():
    specs = ["quality", "preference:/home/me/runs/a/reward", "0.5*preference:runs/b/reward/ + 0.5*quality:org/name"]
    assert list(label_specs(specs)) == ["quality", "preference:reward", "0.5*preference:reward + 0.5*quality:name"]
    assert label_specs(specs)["preference:reward"] == specs[1]
    apart = label_specs(["preference:/home/me/a/reward", "preference:b/reward"])
    assert list(apart) == ["preference:a/reward", "preference:b/reward"]
    assert label_specs([]) == {}
    for twice in (["quality", "quality"], ["preference:a/r", "preference:a/r/"]):
        with pytest.raises(ValueError, match="`rewards` names a reward twice"):
            label_specs(twice)


def test_what_a_reward_does_to_its_sound_no_other_hears(audio):
    def shout(prompts, audio, sampling_rate):
        audio.mul_(10)
        return loudness(prompts, audio, sampling_rate)

    before = audio.clone()
    found = CombinedReward({"shout": shout, "loudness": loudness}).components(PROMPTS, audio, RATE)
    assert torch.equal(audio, before)
    assert torch.equal(found["loudness"], loudness(PROMPTS, before, RATE))
    torch.testing.assert_close(found["shout"], loudness(PROMPTS, 10 * before, RATE))
