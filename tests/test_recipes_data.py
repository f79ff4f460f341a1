"""The recipe's data stages, without the programs and sound fonts that only rendering needs."""

import importlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def recipe(monkeypatch):
    """Imports a recipe module by name, as a script in that folder does."""
    monkeypatch.syspath_prepend(RECIPES)
    return importlib.import_module


def scale_tune(number: int, mode: str = "major", split: str = "train", **fields) -> dict:
    """128 eighths up and down a scale, in 4/4, each tune in another order."""
    steps = {"major": (0, 2, 4, 5, 7, 9, 11, 12), "minor": (0, 2, 3, 5, 7, 8, 10, 12)}[mode]
    order = np.random.default_rng(number).permutation(8)
    notes = [[at / 2, 0.5, 62 + steps[order[at % 8]]] for at in range(128)]
    tune = {
        "title": f"Tune {chr(97 + number // 26) + chr(97 + number % 26)}",
        "book": "a book",
        "tonic": 2,
        "mode": mode,
        "metre": [4, 4],
        "kind": "reel",
    }
    return tune | {"printed_mood": "", "pickup": 0.0, "split": split, "notes": notes} | fields


# -- corpus ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("letters", "unit", "quarters"),
    [
        ("G3-A (Bcd=e)", 0.25, 2.0),  # 3 + 1 + 4 sixteenths
        ("(3ABC d2", 0.5, 2.0),  # a triplet of eighths is one quarter
        ("[ceg]2 B/2c/2 B/c/", 0.5, 2.0),  # a chord once; a half written in two ways
        ('"G7"{cB}A z ^c\'2', 0.5, 2.0),  # chord names and grace notes take no time, a rest does
        ("A>B c<<d", 0.5, 2.0),  # dotting shifts time inside a pair
    ],
)
def test_the_length_of_a_stretch_of_abc(recipe, letters, unit, quarters):
    assert recipe("corpus").duration(letters, unit) == pytest.approx(quarters)


@pytest.mark.parametrize(
    ("abc", "metre", "upbeat"),
    [
        ("X:1\nM:2/4\nL:1/16\nK:Gm\nf-g | a3-b g3-a | f4 e3-d |", (2, 4), 0.5),
        ("X:1\nM:4/4\nK:D\n% by ear\nABcd efga | d8 |", (4, 4), 0.0),
        ('X:1\nM:6/8\nL:1/8\nK:G\n|: "G"d | GBd gbg |', (6, 8), 0.5),
        ("X:1\nM:C\nL:1/8\nK:G\n[|d2 ef|g8|", (4, 4), 2.0),
    ],
)
def test_the_upbeat_is_what_stands_before_the_first_full_bar(recipe, abc, metre, upbeat):
    assert recipe("corpus").pickup(abc, metre) == upbeat


def test_a_tune_under_several_titles_is_in_one_split(recipe):
    """Each pair is one group; with 60 groups, all splits occur."""
    corpus = recipe("corpus")
    tunes = []
    for number in range(60):
        tunes += [
            scale_tune(number, title=f"The Rover {chr(97 + number % 26)}{number // 26 * 'x'}"),
            scale_tune(number),
        ]
        tunes[-1]["notes"] = [[at, length, pitch + 5] for at, length, pitch in tunes[-1]["notes"]]  # another key
    tunes.append(scale_tune(99, title="Rover ax, The"))
    corpus.split_by_tune(tunes)
    assert all(tunes[first]["split"] == tunes[first + 1]["split"] for first in range(0, 120, 2))
    assert tunes[-1]["split"] == next(t["split"] for t in tunes if t["title"] == "The Rover ax")
    assert {tune["split"] for tune in tunes} == {"train", "test", "validation", "judges"}


def test_two_settings_of_a_chorale_melody_are_in_one_group(recipe):
    corpus = recipe("corpus")
    plain = [[float(beat), 1.0, 60 + (5 * beat) % 7] for beat in range(12)]
    ornate = [[0.0, 1.0, 60], [1.0, 0.5, 65], [1.5, 0.5, 64], *[[at, 1.0, pitch + 0] for at, _, pitch in plain[2:]]]
    tune = {"kind": "chorale"}
    assert corpus.beat_intervals(tune | {"notes": plain}) == corpus.beat_intervals(tune | {"notes": ornate})


CHORALE = """<score-partwise><part-list/>{parts}</score-partwise>"""
TIME = "<attributes><divisions>2</divisions><time><beats>4</beats><beat-type>4</beat-type></time></attributes>"


def xml_note(step: str, octave: int, duration: int, tie: str = "") -> str:
    ties = f'<tie type="{tie}"/>' if tie else ""
    pitch = f"<pitch><step>{step}</step><octave>{octave}</octave></pitch>"
    return f"<note>{pitch}<duration>{duration}</duration>{ties}</note>"


def xml_part(step: str, octave: int, third: str = "") -> str:
    """An upbeat of a quarter, a note tied over the bar line, then quarters, and `step` at the end."""
    middle = xml_note(third or step, octave, 2) * 25
    bars = [
        TIME + xml_note(step, octave, 2),
        xml_note(step, octave, 8, "start"),
        xml_note(step, octave, 8, "stop") + middle,
    ]
    bars.append(xml_note(step, octave, 8))
    return "<part>" + "".join(f"<measure>{bar}</measure>" for bar in bars) + "</part>"


def test_a_chorale_is_read_with_its_voices(recipe):
    read = recipe("chorales").read_chorale
    parts = [xml_part("G", 4), xml_part("D", 4), xml_part("B", 3), xml_part("G", 2)]
    tune = read(CHORALE.format(parts="".join(parts)), "bwv0")
    assert (tune["tonic"], tune["mode"], tune["metre"], tune["pickup"]) == (7, "major", [4, 4], 1.0)
    assert tune["notes"][:3] == [[0.0, 1.0, 67], [1.0, 8.0, 67], [9.0, 1.0, 67]]  # the tie is one note of two bars
    assert [voice[0][2] for voice in tune["voices"]] == [62, 59, 43]
    assert read(CHORALE.format(parts="".join(parts[:3])), "bwv0") is None
    flat = xml_part("B", 3).replace("<step>B</step>", "<step>B</step><alter>-1</alter>")
    assert read(CHORALE.format(parts="".join([*parts[:2], flat, parts[3]])), "bwv0")["mode"] == "minor"


# -- arrangement -------------------------------------------------------------------------------------------------------------


def test_chords_change_at_the_bar_lines_behind_an_upbeat(recipe):
    """A quarter of upbeat at 60 beats a minute: bars begin at 1, 5 and 9 s. Their melody is IV, V and I of C major."""
    arrange = recipe("arrange")
    melody = [(0.0, 1.0, 67, 100)]
    for bar, pitches in enumerate(((65, 69), (67, 71), (60, 64))):
        melody += [
            (1.0 + 4 * bar + 2 * half, 3.0 + 4 * bar + 2 * half, pitch, 100) for half, pitch in enumerate(pitches)
        ]
    triads = arrange.harmony(melody, tonic=0, mode="major", first_bar=1.0, bar_s=4.0)
    assert [tuple(pitch % 12 for pitch in triad) for triad in triads] == [(5, 9, 0), (7, 11, 2), (0, 4, 7)]
    backed = arrange.accompaniment("bass", triads, first_bar=1.0, bar_s=4.0, n_beats=4)
    assert [note[0] for note in backed["bass"]] == [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]


def test_a_chorale_is_accompanied_by_its_own_voices(recipe):
    voices = [[[beat * 1.0, 1.0, pitch] for beat in range(64)] for pitch in (59, 55, 43)]
    tune = scale_tune(0, voices=voices, kind="chorale")
    rng = random.Random(0)
    row, parts = recipe("arrange").arrange(tune, "church organ", "chords", "moderate", rng)
    assert row["kind"] == "chorale"
    shift = parts[0][2][0][2] - tune["notes"][0][2]
    assert {note[2] - shift for note in parts[1][2]} == {59, 55, 43}


def test_clips_are_balanced_and_keep_to_their_split(recipe):
    render = recipe("render")
    modes = ("major", "minor")
    tunes = [scale_tune(n, modes[n % 2], ("train", "test")[n // 2 % 2]) for n in range(40)]
    clips = list(render.arrangements("train", tunes, 288, seed=0))
    settings = {(row["instrument"], row["backing"], row["tempo"]) for row, _ in clips}
    assert len(settings) == 288 == len(clips)
    allowed = {tune["title"] for tune in tunes if tune["split"] == "train"}
    assert {row["title"] for row, _ in clips} <= allowed
    assert 0.3 < np.mean([row["mode"] == "minor" for row, _ in clips]) < 0.6
    again = list(render.arrangements("train", tunes, 288, seed=0))
    assert again == clips  # an interrupted rendering goes on with the same clips
    assert [row for row, _ in render.arrangements("train", tunes, 20, seed=1)] != [row for row, _ in clips[:20]]


def test_every_caption_names_the_instrument_and_tests_have_words_of_their_own(recipe):
    render, captions = recipe("render"), recipe("captions")
    tunes = [scale_tune(n, split="test") for n in range(10)]
    seen, asked = set(), []
    for row, _ in render.arrangements("test", tunes, 288, seed=0):
        names = captions.SYNONYMS.get(row["instrument"], [row["instrument"]])
        assert len(set(row["captions"])) == 12
        for text in [*row["captions"], row["paraphrase"]]:
            assert any(name in text for name in names), text
        seen |= set(row["captions"])
        asked.append(row["paraphrase"])
    assert not seen & set(asked)
    assert len(set(asked)) > 200
    assert "paraphrase" not in next(iter(render.arrangements("train", [scale_tune(0)], 1, seed=0)))[0]


# -- the record --------------------------------------------------------------------------------------------------------------


def test_a_record_says_command_seed_and_versions_but_not_whose_folder(recipe, monkeypatch, tmp_path):
    common = recipe("common")
    monkeypatch.setattr("sys.argv", ["recipes/corpus.py", "--work", str(tmp_path), "--tiny", "--seed", "3"])
    args = common.stage_arguments("a stage", minutes=50).parse_args()
    args.threads = torch.get_num_threads()  # of the process that runs the other tests too
    common.start(args)
    assert args.minutes == common.TINY_MINUTES
    common.record(args, "corpus", {"tunes": 5})
    found = json.loads((tmp_path / "results" / "corpus.json").read_text())
    assert found["command"] == "python recipes/corpus.py --work build/tiny --tiny --seed 3"
    assert (found["tunes"], found["seed"]) == (5, 3)
    assert {"torch", "transformers", "encodec", "numpy"} <= set(found["versions"])
    assert str(tmp_path) not in json.dumps(found)


def test_only_a_finished_run_is_published(recipe, monkeypatch, tmp_path):
    publish = recipe("publish")
    command = [
        "publish.py",
        "--work",
        str(tmp_path),
        "--checkpoints",
        str(tmp_path / "c"),
        "--results",
        str(tmp_path / "r"),
    ]
    monkeypatch.setattr("sys.argv", command)
    for name in publish.MODELS:
        with pytest.raises(SystemExit, match=name):
            publish.main()
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(name)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "codec.json").write_text("{}")
    publish.main()
    assert (tmp_path / "c" / "musicrl-tiny-quality" / "config.json").read_text() == "musicrl-tiny-quality"
    assert (tmp_path / "r" / "codec.json").read_text() == "{}"
