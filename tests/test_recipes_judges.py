"""The recipe's judges, on sounds whose tempo, key and faults are known because they are made here."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

RECIPES = Path(__file__).parent.parent / "recipes"
RATE = 16_000  # Hz
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe module by name, as a script in that folder does."""
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module


def tone(pitch: float, seconds: float, level: float = 0.2) -> np.ndarray:
    """A MIDI pitch with two overtones, as float32 [T]."""
    time = np.arange(round(seconds * RATE)) / RATE
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    return (level * sum(np.sin(2 * np.pi * k * frequency * time) / k for k in (1, 2, 3))).astype(np.float32)


def scale_clip(tonic: int, steps: tuple, seconds: float = 5.0) -> np.ndarray:
    """A melody on a scale: 1 3 5 1 2 4 7 1 6 5 1 3, so that the tonic sounds longest."""
    notes = [tonic + 60 + steps[degree] for degree in (0, 2, 4, 0, 1, 3, 6, 0, 5, 4, 0, 2)]
    return np.concatenate([tone(pitch, seconds / len(notes)) for pitch in notes])


def clicks(bpm: float, seconds: float = 5.0) -> np.ndarray:
    """Notes of 60 ms in turn on two pitches, one a beat."""
    wave = 1e-4 * np.random.default_rng(0).standard_normal(round(seconds * RATE)).astype(np.float32)
    for beat, at in enumerate(np.arange(0.1, seconds - 0.1, 60 / bpm)):
        begin = round(at * RATE)
        wave[begin : begin + round(0.06 * RATE)] += tone((64, 69)[beat % 2], 0.06)
    return wave


# -- tempo -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bpm", [50, 71, 90, 127])
def test_the_tempo_of_clicks_is_heard(recipe, bpm):
    estimators = recipe("estimators")
    found = estimators.tempo(clicks(bpm))
    assert estimators.same_tempo(found, bpm, 0.03)
    assert not estimators.same_tempo(found, bpm * 1.17, 0.08)  # 1.17 is 8.5 % and more from 1, 3/2 and their inverses


def test_a_tempo_is_the_same_at_a_metrical_level_and_within_the_tolerance(recipe):
    same = recipe("estimators").same_tempo
    assert same(np.array([30, 45, 60, 90, 135, 180, 270]), np.array(90), 0.01).all()  # 1/3 1/2 2/3 1 3/2 2 3
    # 96 / 90 = 1.067; 100 / 90 = 1.11 and 100 / 135 = .74; 360 / 270 = 1.33
    assert same(np.array([96, 100, 360]), np.array(90), 0.08).tolist() == [True, False, False]
    assert not same(96, 90, 0.03)
    assert same(np.array([[90], [60]]), np.array([[90, 100, 70]]), 0.01).tolist() == [
        [True, False, False],
        [True, False, False],
    ]


# -- key -------------------------------------------------------------------------------------------------------------------


def test_the_key_of_a_scale_is_heard_in_keys_that_the_profiles_were_not_taken_from(recipe):
    estimators = recipe("estimators")
    known = [(0, MAJOR, 0), (5, MAJOR, 0), (9, MINOR, 1), (2, MINOR, 1)]
    heard = np.stack([estimators.pitch_classes(scale_clip(tonic, steps)) for tonic, steps, _ in known])
    profiles = estimators.key_profiles(heard, np.array([k[0] for k in known]), np.array([k[2] for k in known]))
    assert np.linalg.norm(profiles, axis=1) == pytest.approx([1, 1])
    for tonic in (3, 7, 10):
        assert estimators.key(scale_clip(tonic, MAJOR), profiles) == (tonic, 0)
        assert estimators.key(scale_clip(tonic, MINOR), profiles) == (tonic, 1)


@pytest.mark.parametrize(
    ("estimate", "same", "neighbour", "signature"),
    [
        ((0, 0), True, True, True),  # C major
        ((9, 1), False, True, True),  # A minor, its relative
        ((7, 0), False, True, True),  # G major, the dominant: one sharp
        ((5, 0), False, True, True),  # F major, the subdominant: one flat
        ((4, 1), False, False, True),  # E minor: one sharp
        ((0, 1), False, False, False),  # C minor, the parallel: three flats
        ((2, 0), False, False, False),  # D major: two sharps
    ],
)
def test_how_near_a_key_is_to_c_major(recipe, estimate, same, neighbour, signature):
    estimators = recipe("estimators")
    truth = estimators.key_of_row({"key": "C", "mode": "major"})
    found = estimators.key_relation(estimate, truth)
    assert found == {"same": same, "neighbour": neighbour, "signature": signature}


def test_modes_count_as_the_key_of_their_third_and_have_their_own_signature(recipe):
    estimators = recipe("estimators")
    assert estimators.key_of_row({"key": "D", "mode": "dorian"}) == (2, 1, 0)  # D minor; the notes of C major
    assert estimators.key_of_row({"key": "G", "mode": "mixolydian"}) == (7, 0, 0)
    assert estimators.key_of_row({"key": "A", "mode": "minor"}) == (9, 1, 0)
    for mode in ("major", "minor", "dorian", "mixolydian"):  # of the 24 keys: 1, 4 and 6
        truth = estimators.key_of_row({"key": "B flat", "mode": mode})
        found = [estimators.key_relation((tonic, third), truth) for tonic in range(12) for third in (0, 1)]
        counts = {name: sum(relation[name] for relation in found) for name in found[0]}
        assert counts == {"same": 1, "neighbour": 4, "signature": 6}


# -- faults ----------------------------------------------------------------------------------------------------------------


def test_faults_are_found_and_a_tune_has_none(recipe):
    faults = recipe("estimators").faults
    tune = scale_clip(2, MAJOR)
    assert faults(tune) == {"silent": False, "clipped": False, "stuck": False}
    assert faults(0.005 * tune)["silent"]
    assert not faults(0 * tune)["stuck"]  # nothing sounds
    assert faults(np.clip(20 * tune, -1, 1))["clipped"]


def test_stuck_is_one_note_for_half_of_the_clip_without_a_break(recipe):
    faults = recipe("estimators").faults
    rest = scale_clip(2, MAJOR, 5.0)
    held, wobble = tone(67, 2.8), tone(70, 0.1)
    assert faults(np.concatenate([held, rest[: round(2.2 * RATE)]]))["stuck"]
    assert faults(np.concatenate([held[:RATE], wobble, held[RATE:], rest[: round(2.1 * RATE)]]))["stuck"]
    assert not faults(np.concatenate([held[: 2 * RATE], rest[: 3 * RATE]]))["stuck"]
    apart = np.concatenate([held[:RATE], tone(70, 0.5), held[:RATE], tone(62, 0.5), held[:RATE], tone(70, 1.0)])
    assert not faults(apart)["stuck"]  # three of five seconds on one note, but not at a stretch


# -- classifier ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sounds() -> torch.Tensor:
    """Eight clips [8, 16000]: four low tones and four bursts of noise."""
    rng = np.random.default_rng(0)
    low = [tone(50 + i, 1.0) for i in range(4)]
    noise = [(0.1 * rng.standard_normal(RATE)).astype(np.float32) for _ in range(4)]
    return torch.from_numpy(np.stack([*low, *noise]))


def test_the_classifier_learns_from_augmented_sound_and_hears_no_loudness(recipe, sounds):
    classifier = recipe("classifier")
    torch.manual_seed(0)
    model, rng = classifier.Classifier(), np.random.default_rng(0)
    rows = [{"instrument": "piano", "backing": "none"}] * 4 + [{"instrument": "flute", "backing": "drums"}] * 4
    truth, spectra = classifier.truths(rows), model.spectra(sounds)
    assert truth["instrument"].tolist() == [0] * 4 + [4] * 4
    assert truth["drums"].tolist() == [False] * 4 + [True] * 4
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        instrument, backing = model(classifier.augment(spectra, rng))
        loss = torch.nn.functional.cross_entropy(instrument, truth["instrument"])
        (loss + torch.nn.functional.cross_entropy(backing, truth["backing"])).backward()
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(20):  # batch norm's running figures settle
        model(spectra)
    heard, quiet = classifier.hear(model, sounds), classifier.hear(model, 0.1 * sounds, batch=3)
    assert all(torch.equal(heard[name], truth[name]) for name in truth)
    assert torch.allclose(heard["embedding"], quiet["embedding"], atol=1e-3)
    # Codec of a kind: the last noise becomes a tone. Three of four noises and all tones are still named.
    decoded = torch.cat([sounds[:7], sounds[:1]])
    kept = classifier.instruments_kept(model, sounds, decoded, rows)
    assert kept == {"original": 1.0, "decoded": 0.875, "kept": 0.875}


def test_augmentation_changes_every_clip_otherwise_and_keeps_the_time(recipe):
    classifier = recipe("classifier")
    spectra = torch.full((2, classifier.MELS, 50), 1e-3)
    spectra[:, :, 20] = 100.0  # an onset
    for seed in range(5):
        changed = classifier.augment(spectra, np.random.default_rng(seed))
        assert changed.shape == spectra.shape
        assert (changed > 0).all()
        assert not torch.allclose(changed[0], changed[1], rtol=0.1)
        assert ((changed.sum(1).argmax(1) - 20).abs() <= classifier.SMEAR_FRAMES // 2).all()


# -- figures ---------------------------------------------------------------------------------------------------------------


def test_chance_is_the_agreement_with_other_clips(recipe):
    judges = recipe("judges")
    agrees = np.array([[1, 0, 1], [0, 0, 0], [1, 0, 1]], bool)
    # own: 2 of 3; others: 2 of the 6 off the diagonal
    assert judges.against_chance(agrees) == {"share": 0.667, "chance": 0.333}
    assert judges.against_chance(agrees[:1, :1]) is None


def test_agreement_counts_only_the_clips_whose_prompts_name_the_fact(recipe):
    judges = recipe("judges")
    facts = [("piano", 60, "C", "major"), ("violin", 100, "G", "minor"), ("flute", 80, "E", "major")]
    rows = [
        {"instrument": name, "backing": "none", "bpm": bpm, "key": key, "mode": mode} for name, bpm, key, mode in facts
    ]
    heard = {
        "instrument": torch.tensor([0, 3, 0]),  # piano, violin, piano
        "backing": torch.tensor([0, 0, 4]),
        "drums": torch.tensor([False, False, True]),
        "bpm": np.array([120.5, 75.0, 80.0]),  # 2 x 60; 3/4 x 100; right
        "key": [(7, 0), (7, 1), (0, 0)],  # the dominant; right; two clips of it are not asked
    }
    found = judges.agreement(heard, rows, np.array([True, True, False]), np.array([True, True, False]))
    assert found["instrument"] == {
        "share": 0.667,
        "chance": 0.167,
    }  # of six wrong pairs, the flute heard as the piano's
    assert found["tempo_within_3%"] == {"share": 0.5, "chance": 0.0}
    assert (found["tempo_clips"], found["key_clips"]) == (2, 2)
    assert found["key_same"]["share"] == 0.5
    assert found["key_neighbour"]["share"] == 1.0


def test_prompts_name_as_many_facts_as_there_are(recipe):
    judge = recipe("judge")
    assert judge.named_facts("piano, 84 bpm, in F sharp minor") == {"bpm": True, "key": True}
    assert judge.named_facts("harp, D dorian mode") == {"bpm": False, "key": True}
    assert judge.named_facts("someone on harp, really fast, and in a minor key") == {"bpm": False, "key": False}
    captions = ["a reel played by a harp, in C major", "harp, fast", "harp, 112 bpm", "harp, 112 bpm, C major"]
    rows = [{"captions": captions, "paraphrase": "harp please"}, {"captions": captions, "paraphrase": "harp please"}]
    assert judge.choose_prompts(rows) == ["harp, 112 bpm, C major", "harp please"]


@pytest.mark.slow
def test_the_bundled_generator_is_judged(recipe, tmp_path, monkeypatch):
    """All of the stage on four prompts: real classes, untrained judges, clips that are scales."""
    common, judges, estimators = recipe("common"), recipe("judges"), recipe("estimators")
    steps = {"major": MAJOR, "minor": MINOR}
    facts = [("major", "slow"), ("minor", "fast"), ("major", "moderate"), ("minor", "slow")] * 2
    rows = [
        {
            "instrument": "piano", "backing": "none", "bpm": 60 + 5 * i, "key": "C", "mode": mode, "tempo": speed,
            "captions": [f"piano, {60 + 5 * i} bpm, C {mode}"], "paraphrase": f"something {speed} on a piano",
        }
        for i, (mode, speed) in enumerate(facts)
    ]  # fmt: skip
    waves = np.stack([scale_clip(0, steps[mode]) for mode, _ in facts])
    common.write_json(tmp_path / "rows_test.json", rows)
    common.write_array(tmp_path / "clips_test.npy", (waves * 32767).astype(np.int16))
    heard = np.stack([estimators.pitch_classes(wave) for wave in waves[:2]])
    profiles = estimators.key_profiles(heard, np.zeros(2, int), np.array([0, 1]))
    judges.Judges(judges.Classifier(), profiles).save(tmp_path)
    command = ["--work", str(tmp_path), "--generator", "musicrl-tiny", "--prompts", "4", "--guidance", "1", "--threads"]
    monkeypatch.setattr(sys, "argv", ["recipes/judge.py", *command, str(torch.get_num_threads())])
    recipe("judge").main()
    found = common.read_json(tmp_path / "results" / "judge.json")["groups"]
    assert set(found) == {"real", "real_through_codec", "random_codes", "generated_guidance_1"}
    assert found["real"]["key_same"]["share"] == 1.0
    assert found["real"]["scale_share_of_real"] == 1.0 > found["random_codes"]["scale_share_of_real"]
    assert found["real_through_codec"]["frechet_distance_of_codec"] == 1.0
    assert found["real"]["faulty_clips"] == {"silent": 0, "clipped": 0, "stuck": 0}
    assert len(list((tmp_path / "judge").glob("real_0*.wav"))) == 4


def test_a_codec_is_measured_by_the_first_seconds_of_each_clip(recipe):
    """An untrained codec gives noise for all clips alike: at most one instrument of two can be named behind it."""
    codec, classifier, judges = recipe("codec"), recipe("classifier"), recipe("judges")
    torch.manual_seed(0)
    model = codec.EncodecModel(codec.transformers_config()).eval()
    judge = judges.Judges(classifier.Classifier(), np.eye(2, 12))
    clips = np.stack([scale_clip(0, MAJOR, 6.0), clicks(90, 6.0)])
    audio = torch.from_numpy(clips[:, : judges.JUDGED_S * RATE])
    names = list(recipe("captions").INSTRUMENTS)
    rows = [{"instrument": names[i], "backing": "none"} for i in classifier.hear(judge.classifier, audio)["instrument"]]
    found = codec.measure_instruments(judge, model, (clips * 32767).astype(np.int16), rows)
    assert found["original"] == 1.0  # the rows say what is heard
    assert found["kept"] == found["decoded"] in (0.0, 0.5, 1.0)
