from collections import Counter

import pytest
import torch
from sqlalchemy import select
from tiny import tiny_generator

from musicrl_hf.audio import match_loudness, read_audio
from musicrl_hf.collect import tables
from musicrl_hf.collect.maker import BROKEN, PairMaker

OPTIONS = {"duration_s": 0.5, "temperature": 1.0, "guidance_scale": 1.0, "check_every": 0, "seed": 3}
PROMPTS = ["slow piano", "fast drums"]


@pytest.fixture(scope="module")
def models():
    return {"x": tiny_generator(seed=0), "y": tiny_generator(seed=1), "z": tiny_generator(seed=2)}


def made_pairs(store):
    """(prompt, kind, [clip, clip]) in the order in which they were made."""
    with store.read() as connection:
        known = {row.id: row for row in connection.execute(select(tables.clips))}
        rows = connection.execute(select(tables.pairs).order_by(tables.pairs.c.made_at)).all()
    return [(row.prompt, row.kind, [known[row.first], known[row.second]]) for row in rows]


def test_a_pair_is_what_the_models_play_with_the_seeds_of_its_rows(store, models):
    maker = PairMaker(store, {"x": models["x"], "y": models["y"]}, PROMPTS, **OPTIONS)
    maker.make("slow piano")
    ((prompt, kind, clips),) = made_pairs(store)
    assert (prompt, kind, [clip.model for clip in clips]) == ("slow piano", "pair", ["x", "y"])
    assert clips[0].seed != clips[1].seed
    for clip in clips:
        again = models[clip.model].sample(["slow piano"], 0.5, top_k=None, guidance_scale=1.0, seed=clip.seed)
        heard, rate = read_audio(store.clip_file(clip.id))
        assert rate == again.sampling_rate
        torch.testing.assert_close(heard, match_loudness(again.audio[0], rate), atol=1 / 32000, rtol=0)
        assert clip.duration_s == 0.5


def test_prompts_and_opponents_take_turns(store, models):
    maker = PairMaker(store, models, PROMPTS, **OPTIONS)
    assert all(maker.make_next() for _ in range(6))
    made = [(prompt, *(clip.model for clip in clips)) for prompt, _, clips in made_pairs(store)]
    opponents = [("x", "y"), ("x", "z"), ("y", "z")]
    assert sorted(made) == sorted((prompt, *pair) for prompt in PROMPTS for pair in opponents)
    assert [prompt for prompt, *_ in made[:2]] == PROMPTS


def test_every_two_models_meet_though_prompts_have_a_pair_each(store, models):
    """As a rehearsal makes them, one a prompt, and as listeners type theirs."""
    maker = PairMaker(store, models, [f"prompt {number}" for number in range(6)], **OPTIONS)
    assert all(maker.make_next() for _ in range(6))
    two = [frozenset(clip.model for clip in clips) for _, _, clips in made_pairs(store)]
    assert sorted(Counter(two).values()) == [2, 2, 2]
    for number in range(3):
        maker.make(f"typed {number}", None)
    typed = [frozenset(clip.model for clip in clips) for prompt, _, clips in made_pairs(store) if "typed" in prompt]
    assert len(set(typed)) == 3


def test_one_model_meets_itself_with_another_seed(store, models):
    PairMaker(store, {"x": models["x"]}, PROMPTS, **OPTIONS).make("slow piano")
    ((_, _, clips),) = made_pairs(store)
    assert [clip.model for clip in clips] == ["x", "x"]
    assert clips[0].seed != clips[1].seed


def test_checks_of_attention_are_one_clip_twice_and_noise(store, models):
    maker = PairMaker(store, {"x": models["x"]}, PROMPTS, **OPTIONS | {"check_every": 2})
    assert [maker.make_next() for _ in range(6)] == [True, True, False, True, True, False]
    checks = {kind: clips for _, kind, clips in made_pairs(store) if kind != "pair"}
    heard = {kind: [read_audio(store.clip_file(clip.id))[0] for clip in clips] for kind, clips in checks.items()}
    assert torch.equal(*heard["identical"])
    assert checks["identical"][0].id != checks["identical"][1].id  # two files: the addresses do not tell
    assert not torch.equal(*heard["broken"])
    assert [clip.model for clip in checks["broken"]] == ["x", BROKEN]
    spectrum = torch.fft.rfft(heard["broken"][1][0]).abs()
    assert spectrum.std() / spectrum.mean() < 0.7  # white noise: Rayleigh's, .52; a tone's is far above


def test_a_study_has_every_two_models_on_the_same_seed_and_goes_on(store, models):
    def study():
        return PairMaker(store, models, PROMPTS, **OPTIONS).make_study()

    next(study())
    assert len(made_pairs(store)) == 1  # cut short after the first
    list(study())
    made = made_pairs(store)
    assert sorted((prompt, *(clip.model for clip in clips)) for prompt, _, clips in made) == sorted(
        (prompt, *pair) for prompt in PROMPTS for pair in [("x", "y"), ("x", "z"), ("y", "z")]
    )
    assert all(clips[0].seed == clips[1].seed for _, _, clips in made)
    assert list(study()) == []
    with pytest.raises(ValueError, match="a study compares two or more; give --against"):
        next(PairMaker(store, {"x": models["x"]}, PROMPTS, **OPTIONS).make_study())


def test_a_study_has_each_pair_once_whoever_makes_it_and_whichever_model_is_named_first(store, models):
    def study(*names):
        return PairMaker(store, {name: models[name] for name in names}, PROMPTS, **OPTIONS).make_study()

    one, other = study("x", "y"), study("y", "x")
    playing = models["y"].sample

    def sample_while_the_other_server_saves(*values, **options):
        models["y"].sample = playing
        next(other)
        return playing(*values, **options)

    models["y"].sample = sample_while_the_other_server_saves
    assert len([*one, *other]) + 1 == len(PROMPTS)
    assert list(study("y", "x")) == []
    made = made_pairs(store)
    assert sorted(prompt for prompt, *_ in made) == sorted(PROMPTS)
    assert len(list(store.clip_folder.glob("*.wav"))) == 2 * len(made)  # those of the pair that came too late are gone


def test_a_prompt_that_fails_leaves_nothing_and_costs_no_other(store, models):
    silent = tiny_generator(seed=0)
    with torch.no_grad():
        for name, parameter in silent.audio_encoder.decoder.named_parameters():
            if not name.endswith("original1"):  # the direction of a normed weight, which has no zero
                parameter.zero_()
    maker = PairMaker(store, {"x": models["x"], "silent": silent}, PROMPTS, **OPTIONS)
    with pytest.raises(ValueError, match="silent"):
        maker.make("slow piano")
    assert made_pairs(store) == []
    PairMaker(store, {"x": models["x"]}, PROMPTS, **OPTIONS).make("slow piano")
    assert len(made_pairs(store)) == 1


def test_a_model_that_fails_in_a_study_costs_its_own_pairs(store, models):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    broken = tiny_generator(seed=0)
    broken.sample = fail
    maker = PairMaker(store, {"x": models["x"], "broken": broken, "y": models["y"]}, PROMPTS, **OPTIONS)
    assert len(list(maker.make_study())) == len(PROMPTS)
    assert {tuple(clip.model for clip in clips) for _, _, clips in made_pairs(store)} == {("x", "y")}


def test_models_that_sound_unlike_are_refused(store, models):
    with pytest.raises(ValueError, match=r"differ in \(Hz, channels\)"):
        PairMaker(store, {"x": models["x"], "stereo": tiny_generator(audio_channels=2)}, PROMPTS, **OPTIONS)
    for some, prompts in (({}, PROMPTS), (models, [])):
        with pytest.raises(ValueError, match="at least one of each"):
            PairMaker(store, some, prompts, **OPTIONS)
    with pytest.raises(ValueError, match="kind is 'loud'"):
        PairMaker(store, models, PROMPTS, **OPTIONS).make_check("loud")
