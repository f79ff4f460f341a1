"""Published comparisons, in little copies of them: what each row becomes, what is left out, what is refused."""

import json
from datetime import datetime
from hashlib import sha256

import pytest
import torch
from published import RATE, imported, record_of, tone, tone_bytes, write_parquet, write_table, write_tones

from musicrl_hf.audio import audio_bytes, read_audio
from musicrl_hf.preferences import load_preferences
from musicrl_hf.preferences.importers import (
    ClipOptions,
    import_aime,
    import_cmi_pref,
    import_music_arena,
    import_musicprefs,
)

SKIP = ClipOptions(skip_bad_clips=True)


def hashed(name):
    return sha256(name.encode()).hexdigest()[:16]


# -- Music Arena -------------------------------------------------------------------------------------------------------


def battle(number, preference="A", month="06-2025DEC", **changes):
    """One file of `battle_data`, with the columns of the published set."""
    audio = {f"audio_{side}": f"audio_files/{month}/{number}{side}.flac" for side in "ab"}
    listening = {f"total_listening_time_{side}": seconds for side, seconds in (("a", 12.5), ("b", 4.0))}
    return {
        "battle_uuid": f"uuid-{number}",
        "date": "2025-12-03T10:00:00-05:00",
        "prompt": "celtic punk",
        "is_instrumental": True,
        "is_prebaked": False,
        "user_pseudonym": "5f2",
        "system_a": "musicgen-small",
        "system_b": "lyria",
        "preference": preference,
        **audio,
        **listening,
        "feedback": "",
        "timestamp": 1764774000.0,
        "lyrics": "",
        "listen_data_a": '[["PLAY", 1.0], ["PAUSE", 13.5]]',
        "listen_data_b": None,
    } | changes


def arena(folder, battles):
    for number, row in enumerate(battles):
        for side, hz in (("a", 300 + 20 * number), ("b", 310 + 20 * number)):
            if row[f"audio_{side}"]:
                write_tones(folder, {row[f"audio_{side}"]: hz})
        month = "06-2025DEC" if number < 4 else "07-2026JAN"
        write_table(folder / f"battle_data/{month}/{row['battle_uuid']}.json", [row])
    return folder


def test_music_arena(tmp_path):
    battles = [
        battle(0, "A"),
        battle(1, "B", prompt="a reel", total_listening_time_b=0.0),
        battle(2, "BOTH_BAD", user_pseudonym=None, date=None),
        battle(3, "TIE", audio_b="", system_b="sao"),
        battle(4, "TIE", date=None, timestamp=None),
        battle(5, "A", audio_a="", audio_b=""),
        battle(6, "A", prompt=" "),
        battle(7, None),
    ]
    src = arena(tmp_path / "arena", battles)
    result = import_music_arena(src, tmp_path / "out")
    common = {"confidence": None, "chosen_seed": None, "rejected_seed": None, "source": "music-arena"}
    listener = hashed("music-arena:5f2")
    systems = {"chosen_model": "musicgen-small", "rejected_model": "lyria"}
    rows = imported(tmp_path / "out")
    assert rows[:3] == [
        {
            **common,
            **systems,
            "prompt": "celtic punk",
            "chosen": 300,
            "rejected": 310,
            "preference": "a",
            "seconds_chosen": 12.5,
            "seconds_rejected": 4.0,
            "listener": listener,
            "created_at": "2025-12-03T10:00:00-05:00",
        },
        {
            **common,
            "prompt": "a reel",
            "chosen": 330,
            "rejected": 320,
            "chosen_model": "lyria",
            "rejected_model": "musicgen-small",
            "preference": "b",
            "seconds_chosen": 0.0,
            "seconds_rejected": 12.5,
            "listener": listener,
            "created_at": "2025-12-03T10:00:00-05:00",
        },
        {
            **common,
            **systems,
            "prompt": "celtic punk",
            "chosen": 340,
            "rejected": 350,
            "preference": "both_bad",
            "seconds_chosen": 12.5,
            "seconds_rejected": 4.0,
            "listener": "unknown",
            "created_at": "2025-12-03T15:00:00+00:00",
        },
    ]
    assert [row["preference"] for row in rows[3:]] == ["tie"]
    assert (result.rows, result.decided, result.ties, result.prompts) == (4, 2, 2, 2)
    left_out = {"clip withheld": 2, "prompt empty": 1, "nobody voted": 1}
    assert result.left_out == left_out
    assert str(result).endswith("; left out: 2 clip withheld, 1 prompt empty, 1 nobody voted")
    record = record_of(tmp_path / "out")
    assert datetime.fromisoformat(record.pop("date"))
    assert record == {
        "source": "music-arena",
        "rows_read": 8,
        "comparisons": 4,
        "license": "cc-by-4.0",
        "address": "https://huggingface.co/datasets/music-arena/music-arena-dataset",
        "left_out": left_out,
        "options": {"crop_s": None, "loudness_lufs": -23.0, "skip_bad_clips": False, "config": None},
    }


def test_a_month_of_music_arena_by_its_name_on_the_card_or_by_its_folder(tmp_path):
    src = arena(tmp_path / "arena", [battle(number, prompt=f"tune {number}") for number in range(6)])
    card = (
        "configs:\n- config_name: '2025_12'\n  data_files:\n  - split: train\n    path: battle_data/06-2025DEC/*.json\n"
    )
    (src / "README.md").write_text(f"---\nlicense: cc-by-4.0\n{card}---\n# Music Arena\n")
    import_music_arena(src, tmp_path / "december", config="2025_12")
    assert load_preferences(tmp_path / "december")["prompt"] == ["tune 0", "tune 1", "tune 2", "tune 3"]
    import_music_arena(src, tmp_path / "january", config="07-2026JAN")
    assert load_preferences(tmp_path / "january")["prompt"] == ["tune 4", "tune 5"]
    with pytest.raises(ValueError, match=r"config is '2031_01': .*arena has 2025_12"):
        import_music_arena(src, tmp_path / "out", config="2031_01")


@pytest.mark.parametrize("marked", [True, False], ids=["by datasets", "by others"])
def test_music_arena_as_one_table_that_holds_its_clips(tmp_path, marked):
    rows = [
        battle(0, "B", audio_a={"bytes": tone_bytes(300, suffix="wav"), "path": "x.wav"}),
        battle(1, "A", audio_a={"bytes": None, "path": None}),
        battle(2, "A", audio_a={"bytes": None, "path": "audio_files/a.flac"}),
    ]
    for row in rows:
        row.update(audio_b={"bytes": tone_bytes(310), "path": "y.flac"}, listen_data_b="")
    write_tones(tmp_path / "arena", {"audio_files/a.flac": 900})
    rows = [{name: value for name, value in row.items() if not isinstance(value, bool)} for row in rows]
    write_parquet(tmp_path / "arena/data/train.parquet", rows, ("audio_a", "audio_b"), marked)
    result = import_music_arena(tmp_path / "arena", tmp_path / "out")
    found = imported(tmp_path / "out")
    assert [(row["chosen"], row["rejected"], row["preference"]) for row in found] == [(310, 300, "b"), (900, 310, "a")]
    assert result.left_out == {"clip withheld": 1}
    paths = [row["chosen"]["path"] for row in load_preferences(tmp_path / "out")]
    assert paths == ["y.flac", "a.flac"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"preference": "LEFT"}, ValueError, r"uuid-1.json: preference is 'LEFT': it has to be one of 'a', 'b', 'tie'"),
        ({"audio_b": "../secret.flac"}, ValueError, r"uuid-1.json: audio_b: path '../secret.flac' leads out of"),
        ({"audio_b": "audio_files/none.flac"}, FileNotFoundError, r"uuid-1.json: audio_b: there is no file"),
        ({"audio_b": "noise.flac"}, ValueError, r"uuid-1.json: .*noise.flac cannot be read as audio"),
        ({"system_a": ""}, ValueError, r"uuid-1.json: system_a is '': it has to name what made the clip"),
        ({"total_listening_time_a": -2}, ValueError, r"total_listening_time_a is -2: it has to lie between 0 and inf"),
        ({"total_listening_time_a": "long"}, ValueError, r"total_listening_time_a is 'long': it has to be a number"),
        ({"date": "yesterday"}, ValueError, r"date is 'yesterday': use ISO 8601"),
        (
            {"date": "", "timestamp": 1e12},
            ValueError,
            r"uuid-1.json: timestamp is 1000000000000.0: it has to lie between 0 and 2.5",
        ),
    ],
)
def test_a_wrong_battle_is_named_and_nothing_is_written(tmp_path, change, error, message):
    src = arena(tmp_path / "arena", [battle(0), battle(1)])
    (tmp_path / "secret.flac").write_bytes(tone_bytes(300))
    (src / "noise.flac").write_text("not audio")
    write_table(src / "battle_data/06-2025DEC/uuid-1.json", [battle(1, **change)])
    with pytest.raises(error, match=message):
        import_music_arena(src, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arena", "secret.flac"]


def test_bad_clips_are_counted_where_that_is_asked_for(tmp_path):
    src = arena(tmp_path / "arena", [battle(number) for number in range(5)])
    (src / "audio_files/06-2025DEC/1a.flac").unlink()
    (src / "audio_files/06-2025DEC/2b.flac").write_text("not audio")
    (src / "audio_files/06-2025DEC/3a.flac").write_bytes(tone_bytes(360, seconds=31))
    result = import_music_arena(src, tmp_path / "out", options=SKIP)
    assert [row["chosen"] for row in imported(tmp_path / "out")] == [300, 380]
    assert result.left_out == {"clip missing": 1, "clip unreadable or silent": 1, "clip over 30 s": 1}
    # a path that leads out of the data set is no bad clip
    write_table(src / "battle_data/06-2025DEC/uuid-1.json", [battle(1, audio_a="../../secret.flac")])
    with pytest.raises(ValueError, match="leads out of"):
        import_music_arena(src, tmp_path / "again", options=SKIP)


def test_long_clips_are_cut_only_on_demand(tmp_path):
    src = arena(tmp_path / "arena", [battle(0)])
    (src / "audio_files/06-2025DEC/0a.flac").write_bytes(tone_bytes(300, seconds=31))
    with pytest.raises(ValueError, match=r"uuid-0.json: .*lasts 31.0 s.*crop_s keeps the first seconds"):
        import_music_arena(src, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"none of the 1 rows of music-arena gives a comparison: 1 clip over 30 s left out; crop_s"
    ):
        import_music_arena(src, tmp_path / "out", options=SKIP)
    assert not (tmp_path / "out").exists()
    import_music_arena(src, tmp_path / "out", options=ClipOptions(crop_s=2.5))
    (row,) = load_preferences(tmp_path / "out")
    seconds = [read_audio(row[name]["bytes"])[0].shape[-1] / 8000 for name in ("chosen", "rejected")]
    assert seconds == [2.5, 1.0]


# -- AIME --------------------------------------------------------------------------------------------------------------


def answer(first, second, choice=1, question="Music Quality", **changes):
    """A row of the survey: `first` and `second` are (model, id, begin, end)."""
    names = ("model-{}", "track-{}-id", "track-{}-begin", "track-{}-end")
    sides = {
        name.format(side): value for side, values in ((1, first), (2, second)) for name, value in zip(names, values)
    }
    return {"question-type": question, "description": "newage, celtic"} | sides | {"answer": choice} | changes


SUNO, UDIO = ("Suno v3", 42, "00:00:03", "00:00:13"), ("Udio", 5331, "00:00:00", "00:00:10")
SURVEY = [
    answer(SUNO, UDIO, 1),
    answer(UDIO, SUNO, 1, "Text-Audio Alignment"),
    answer(("Udio", 5331, "00:00:02", "00:00:05"), SUNO, 2),
]


def stepped_track(seconds=15):
    """A tone that goes up by 100 Hz each second, so that an excerpt tells where it was taken from."""
    return audio_bytes(torch.cat([tone(400 + 100 * second) for second in range(seconds)], dim=1), RATE)


def first_and_last_second(clip):
    audio, rate = read_audio(clip["bytes"])
    return [torch.fft.rfft(part[0]).abs().argmax().item() for part in (audio[:, :rate], audio[:, -rate:])]


@pytest.mark.parametrize("layout", ["files", "tables"])
def test_aime(tmp_path, layout):
    survey = tmp_path / "survey"
    if layout == "files":
        write_table(survey / "survey.csv", SURVEY)
        for name in ("00042.flac", "05331.flac"):
            (survey / "audio").mkdir(exist_ok=True)
            (survey / "audio" / name).write_bytes(stepped_track())
    else:
        write_parquet(survey / "data/train.parquet", SURVEY)
        tracks = [
            {"id": name, "audio": {"bytes": stepped_track(), "path": None}, "model": "x"} for name in ("00042", "05331")
        ]
        write_parquet(tmp_path / "tracks/data/train.parquet", tracks, ("audio",))
    audio = None if layout == "files" else tmp_path / "tracks"
    result = import_aime(survey, tmp_path / "out", audio=audio)
    rows = list(load_preferences(tmp_path / "out"))
    excerpts = [[first_and_last_second(row[name]) for name in ("chosen", "rejected")] for row in rows]
    # 3 to 13 s goes from 700 to 1600 Hz, 0 to 10 s from 400 to 1300, 2 to 5 s from 600 to 800
    assert excerpts == [[[700, 1600], [400, 1300]], [[700, 1600], [600, 800]]]
    told = [{name: row[name] for name in row if name not in ("chosen", "rejected", "created_at")} for row in rows]
    common = {
        "prompt": "newage, celtic",
        "chosen_model": "Suno v3",
        "rejected_model": "Udio",
        "chosen_seed": None,
        "rejected_seed": None,
        "confidence": None,
        "seconds_chosen": None,
        "seconds_rejected": None,
        "listener": "unknown",
        "source": "aime:quality",
    }
    assert told == [common | {"preference": "a"}, common | {"preference": "b"}]
    assert result.left_out == {"another question": 1}
    assert record_of(tmp_path / "out")["license"] == "cc-by-4.0"
    import_aime(survey, tmp_path / "other", criterion="alignment", audio=audio)
    (row,) = load_preferences(tmp_path / "other")
    assert (row["preference"], row["chosen_model"], row["source"]) == ("a", "Udio", "aime:alignment")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"answer": 3}, ValueError, r"survey.jsonl, row 2: answer is 3: it has to be one of '1', '2'"),
        ({"track-2-id": "x7"}, ValueError, r"row 2: track-2-id is 'x7': it has to be a number of up to 5 digits"),
        ({"track-2-id": 7}, FileNotFoundError, r"row 2: track-2-id: there is no clip '00007' in"),
        (
            {"track-1-begin": "soon"},
            ValueError,
            r"row 2: track-1-begin is 'soon': it has to be a time, such as 00:01:03",
        ),
        ({"track-1-end": "9" * 400}, ValueError, r"row 2: track-1-end is '9*': it has to be a time, such as 00:01:03"),
        (
            {"track-1-end": "1:" * 200 + "1"},
            ValueError,
            r"row 2: track-1-end is .*: it has to be a time, such as 00:01:03",
        ),
        ({"track-1-end": "00:00:03"}, ValueError, r"row 2: track-1-end is '00:00:03': it has to lie behind 3 s"),
        (
            {"track-2-begin": "00:00:20", "track-2-end": "00:00:30"},
            ValueError,
            r"row 2: .*lasts 15.0 s: it has nothing from",
        ),
        ({"model-1": ""}, ValueError, r"row 2: model-1 is '': it has to name what made the clip"),
    ],
)
def test_a_wrong_answer_is_named(tmp_path, change, error, message):
    write_table(tmp_path / "survey/survey.jsonl", [SURVEY[0], SURVEY[0] | change])
    for name in ("42.flac", "05331.flac"):
        (tmp_path / "survey" / name).write_bytes(stepped_track())
    with pytest.raises(error, match=message):
        import_aime(tmp_path / "survey", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_track_that_is_there_twice_is_not_guessed(tmp_path):
    write_table(tmp_path / "survey/survey.jsonl", [SURVEY[0]])
    for name in ("42.flac", "00042.flac", "5331.flac"):
        (tmp_path / "survey" / name).write_bytes(stepped_track())
    with pytest.raises(ValueError, match=r"row 1: track-1-id is 42: .*survey has 2 clips '00042': keep one"):
        import_aime(tmp_path / "survey", tmp_path / "out")
    with pytest.raises(ValueError, match="criterion is 'beauty': use one of quality, alignment"):
        import_aime(tmp_path / "survey", tmp_path / "out", criterion="beauty")


# -- MusicPrefs --------------------------------------------------------------------------------------------------------


def test_musicprefs(tmp_path):
    src = tmp_path / "musicprefs"
    names = {"m_0.wav": 500, "n_0.wav": 600, "sub/p.wav": 700}
    rows = [
        ("m_0.wav", "n_0.wav", "a_wins", "b_wins"),
        ("m_0.wav", "p.wav", "b_wins", "tie"),
        ("n_0.wav", "p.wav", "both are bad", "a_wins"),
    ]
    table = [
        {"audio_a": a, "audio_b": b, "caption": "a dub bass line", "musicality": musicality, "fidelity": fidelity}
        for a, b, musicality, fidelity in rows
    ]
    write_table(src / "human_preference.csv", table)
    clips = [{"audio": {"bytes": tone_bytes(hz, suffix="wav"), "path": name}} for name, hz in names.items()]
    write_parquet(src / "data/train-00000-of-00001.parquet", clips, ("audio",))
    import_musicprefs(src, tmp_path / "out")
    found = imported(tmp_path / "out")
    assert [(row["chosen"], row["rejected"], row["preference"]) for row in found] == [
        (500, 600, "a"),
        (700, 500, "b"),
        (600, 700, "tie"),
    ]
    assert {(row["prompt"], row["chosen_model"], row["source"]) for row in found} == {
        ("a dub bass line", "unknown", "musicprefs:musicality")
    }
    record = record_of(tmp_path / "out")
    assert record["license"] is None
    assert record["options"]["prompt_column"] == "caption"
    import_musicprefs(src, tmp_path / "sound", criterion="fidelity")
    assert [row["preference"] for row in imported(tmp_path / "sound")] == ["b", "tie", "a"]


def test_musicprefs_beside_its_clips(tmp_path):
    src = tmp_path / "musicprefs"
    write_tones(src, {"clips/m.flac": 500, "clips/n.flac": 600})
    row = {
        "audio_a": "clips/m.flac",
        "audio_b": "n.flac",
        "words": "dub",
        "musicality": "a_wins",
        "model_a": "x",
        "model_b": "y",
    }
    write_table(src / "human_preference.csv", [row])
    with pytest.raises(
        ValueError, match=r"prompt_column is None: name the one with the prompts, of audio_a, audio_b, words"
    ):
        import_musicprefs(src, tmp_path / "out")
    import_musicprefs(src, tmp_path / "out", prompt_column="words")
    (found,) = imported(tmp_path / "out")
    assert [found[name] for name in ("prompt", "chosen", "rejected", "chosen_model", "rejected_model")] == [
        "dub",
        500,
        600,
        "x",
        "y",
    ]
    for change, error, message in (
        ({"audio_b": "../n.flac"}, ValueError, "row 2: audio_b: path '../n.flac' leads out of"),
        ({"audio_b": "o.flac"}, FileNotFoundError, "row 2: audio_b: there is no clip 'o.flac' in"),
    ):
        write_table(src / "human_preference.csv", [row | change])
        with pytest.raises(error, match=message):
            import_musicprefs(src, tmp_path / "again", prompt_column="words")
    with pytest.raises(ValueError, match=r"human_preference.csv, row 2: no column fidelity: it has audio_a"):
        import_musicprefs(src, tmp_path / "again", criterion="fidelity")


# -- CMI-Pref ----------------------------------------------------------------------------------------------------------


def vote(a, b, musicality="model_a", **changes):
    return {
        "audio-path": f"gen-audio/{a}.flac",
        "audio2": f"gen-audio/{b}.flac",
        "prompt": "anime rock",
        "lyrics": "",
        "prompt id": "90502",
        "ref-audio-path": "",
        "preference-musicality": musicality,
        "confidence_preference-musicality": "2.5",
        "preference-alignment": "model_b",
        "confidence_preference-alignment": "",
        "user id": "604",
        "model_a": "songgen",
        "model_b": "yue",
        "source": "cmi-arena-annotation",
        "split": "train",
    } | changes


def test_cmi_pref_keeps_its_splits_and_is_read_once(tmp_path):
    src = tmp_path / "cmi-pref"
    write_tones(src, {"gen-audio/c.flac": 500, "gen-audio/d.flac": 600})
    votes = [
        vote("c", "d"),
        vote("d", "c", "model_b", **{"audio-path": "cmi-pref/gen-audio/d.flac", "user id": "605", "lyrics": "la la"}),
        vote("c", "d", ""),
        vote("c", "d", prompt="", **{"ref-audio-path": "ref-audio/r.flac"}),
        vote("d", "c", "model_b", split="test", **{"confidence_preference-musicality": 5}),
    ]
    write_table(src / "cmi_data.jsonl", votes)
    write_table(src / "cmi_train.jsonl", votes[:4])
    write_table(src / "cmi_test.jsonl", votes[4:])
    result = import_cmi_pref(src, tmp_path / "out")
    common = {
        "prompt": "anime rock",
        "chosen": 500,
        "rejected": 600,
        "chosen_seed": None,
        "rejected_seed": None,
        "seconds_chosen": None,
        "seconds_rejected": None,
        "source": "cmi-pref:musicality",
    }
    first = {
        **common,
        "chosen_model": "songgen",
        "rejected_model": "yue",
        "preference": "a",
        "confidence": 2.5,
        "listener": hashed("cmi-pref:604"),
    }
    second = {**common, "chosen_model": "yue", "rejected_model": "songgen", "preference": "b", "confidence": 2.5}
    second["listener"] = hashed("cmi-pref:605")
    rows = [{name: value for name, value in row.items() if name != "created_at"} for row in imported(tmp_path / "out")]
    assert rows == [first, second]
    (test,) = imported(tmp_path / "out", "test")
    assert (test["preference"], test["confidence"]) == ("b", 5.0)
    assert result.left_out == {"no preference": 1, "prompt without words": 1}
    record = record_of(tmp_path / "out")
    assert (record["rows_read"], record["license"]) == (5, "cc-by-nc-sa-4.0")

    aligned = import_cmi_pref(src, tmp_path / "aligned", criterion="alignment")
    assert [(row["preference"], row["confidence"]) for row in imported(tmp_path / "aligned")] == [("b", None)] * 2
    assert aligned.left_out == {"prompt with lyrics or a reference clip": 1, "prompt without words": 1}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"preference-musicality": "model_c"},
            ValueError,
            r"row 1: preference-musicality is 'model_c': .*'model_a', 'model_b'",
        ),
        ({"confidence_preference-musicality": "7"}, ValueError, r"is '7': it has to lie between 1 and 5"),
        (
            {"split": "../x"},
            ValueError,
            r"row 1: split is '../x': it has to be one of '', 'train', 'validation', 'test'",
        ),
        ({"audio2": "gen-audio/e.flac"}, FileNotFoundError, r"row 1: audio2: there is no file 'gen-audio/e.flac'"),
        ({"audio2": "cmi-pref/../../x.flac"}, ValueError, r"row 1: audio2: path '../../x.flac' leads out of"),
        ({"model_b": None}, ValueError, r"row 1: model_b is None: it has to name what made the clip"),
    ],
)
def test_a_wrong_vote_is_named(tmp_path, change, error, message):
    write_tones(tmp_path / "cmi", {"gen-audio/c.flac": 500, "gen-audio/d.flac": 600})
    write_table(tmp_path / "cmi/cmi_train.jsonl", [vote("c", "d", **change)])
    with pytest.raises(error, match=message):
        import_cmi_pref(tmp_path / "cmi", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_preferences_are_not_written_over_other_files(tmp_path):
    src = arena(tmp_path / "arena", [battle(0)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="out holds other files"):
        import_music_arena(src, tmp_path / "out")
    import_music_arena(src, tmp_path / "prefs")
    import_music_arena(src, tmp_path / "prefs", options=ClipOptions(crop_s=0.5))
    assert json.loads((tmp_path / "prefs/import.json").read_text())["options"]["crop_s"] == 0.5
