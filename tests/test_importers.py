"""One's own clips become pairs: by score, by choice, or as votes without audio."""

import csv
import json
import math
import re
from datetime import datetime

import pyloudnorm
import pytest
import torch
from datasets import Audio, load_dataset

from musicrl_hf.audio import audio_bytes, read_audio, write_audio
from musicrl_hf.preferences.importers import import_battles, import_folder, read_votes
from musicrl_hf.preferences.schema import Vote, load_preferences

RATE = 8000


def tone(hz=440.0, level=0.3, seconds=1.0, channels=1):
    time = torch.arange(int(seconds * RATE)) / RATE
    return (level * torch.sin(2 * math.pi * hz * time)).repeat(channels, 1)


def clips_folder(tmp_path, rows, table="clips.jsonl"):
    """`rows`: (prompt, system, score[, frequency, level]); one FLAC each."""
    folder = tmp_path / "mine"
    folder.mkdir(exist_ok=True)
    records = []
    for i, (prompt, system, score, *sound) in enumerate(rows):
        write_audio(folder / f"audio/{i}.flac", tone(*(sound or [300 + 20 * i])), RATE)
        records.append({"prompt": prompt, "system": system, "audio": f"audio/{i}.flac", "score": score})
    write_table(folder / table, records)
    return folder


def write_table(path, records):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, records)) + "\n")
        return
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


@pytest.mark.parametrize("table", ["clips.jsonl", "clips.csv"])
def test_all_pairs_of_a_prompt_by_score(tmp_path, table):
    rows = [
        ("air", "x", 0.9),
        ("Air!", "y", 0.5),
        ("air", "z", 0.45),
        ("jig", "x", 1),
        ("jig", "y", 1),
        ("reel", "x", 2),
    ]
    result = import_folder(clips_folder(tmp_path, rows, table), tmp_path / "out", min_gap=0.1)
    ds = load_preferences(tmp_path / "out")
    found = {(row["chosen_model"], row["rejected_model"], row["prompt"].lower().strip("!")): row for row in ds}
    # air: x > y, x > z, and y - z = 0.05 is below the gap; jig: equal; reel: one clip, so no pair.
    decided = {key for key, row in found.items() if row["preference"] in "ab"}
    assert decided == {("x", "y", "air"), ("x", "z", "air")}
    ties = [frozenset(key[:2]) for key, row in found.items() if row["preference"] == "tie"]
    assert sorted(map(sorted, ties)) == [["x", "y"], ["y", "z"]]
    assert (result.rows, result.decided, result.ties, result.prompts) == (4, 2, 2, 2)
    assert result.systems == ("x", "y", "z")
    assert str(result).startswith(f"{tmp_path / 'out'}: 4 comparisons (2 decided, 2 ties) of 2 prompts")
    assert set(ds["listener"]) == {"score:score"}
    assert ds["seconds_chosen"] == [None] * 4, "nobody listened"


def test_sides_take_turns_and_repeat(tmp_path):
    rows = [(f"p{i}", system, score) for i in range(12) for system, score in (("good", 1.0), ("bad", 0.0))]
    folder = clips_folder(tmp_path, rows)
    labels = []
    for name in ("one", "two"):
        import_folder(folder, tmp_path / name)
        ds = load_preferences(tmp_path / name)
        assert set(ds["chosen_model"]) == {"good"}
        labels.append(ds["preference"])
    assert labels[0] == labels[1]
    assert {"a", "b"} == set(labels[0])


def test_clips_are_brought_to_one_loudness_and_cropped(tmp_path):
    folder = clips_folder(tmp_path, [("air", "loud", 1, 440, 0.8), ("air", "soft", 0, 440, 0.02)])
    import_folder(folder, tmp_path / "out", crop_s=0.75)
    (row,) = load_preferences(tmp_path / "out")
    for column in ("chosen", "rejected"):
        audio, rate = read_audio(row[column]["bytes"])
        assert audio.shape == (1, 6000)
        loudness = pyloudnorm.Meter(rate).integrated_loudness(audio.T.double().numpy())
        assert loudness == pytest.approx(-23, abs=0.1)
    import_folder(folder, tmp_path / "raw", loudness_lufs=None)
    (row,) = load_preferences(tmp_path / "raw")
    assert read_audio(row["chosen"]["bytes"])[0].abs().max() == pytest.approx(0.8, abs=0.01)


def test_the_score_column_is_not_guessed(tmp_path):
    folder = clips_folder(tmp_path, [("air", "x", 1), ("air", "y", 0)])
    records = [json.loads(line) | {"number": 7} for line in (folder / "clips.jsonl").read_text().splitlines()]
    write_table(folder / "clips.jsonl", records)
    with pytest.raises(ValueError, match=r"2 columns of numbers \(score, number\): name the column"):
        import_folder(folder, tmp_path / "out")
    result = import_folder(folder, tmp_path / "out", score_column="score")
    assert (result.decided, result.note) == (1, "compared by column 'score'")
    with pytest.raises(
        ValueError,
        match="score_column is 'mood': .*clips.jsonl has no such column, it has prompt, system, audio, score, number",
    ):
        import_folder(folder, tmp_path / "out", score_column="mood")
    records[1]["score"] = "high"
    write_table(folder / "clips.jsonl", records)
    with pytest.raises(ValueError, match="clips.jsonl, row 2: score is 'high'"):
        import_folder(folder, tmp_path / "out", score_column="score")


def test_the_one_score_column_is_said_with_the_way_to_choose_another(tmp_path):
    folder = clips_folder(tmp_path, [("air", "x", 1), ("air", "y", 0)])
    told = str(import_folder(folder, tmp_path / "out"))
    assert "; compared by column 'score', the only one of numbers (--score_column names another)" in told


def test_rows_are_counted_as_a_spreadsheet_shows_them(tmp_path):
    """The header is row 1; a blank row has a number too, and a cell of two lines is one row."""
    folder = clips_folder(tmp_path, [("air", "x", 1), ("air", "y", 0)])
    (folder / "clips.jsonl").unlink()
    header, wrong = "prompt,system,audio,score\n", "air,y,audio/1.flac,high\n"
    (folder / "clips.csv").write_text(f'{header}"air\nin D",x,audio/0.flac,1\n\n{wrong}')
    with pytest.raises(ValueError, match="clips.csv, row 4: score is 'high'"):
        import_folder(folder, tmp_path / "out", score_column="score")
    (folder / "clips.csv").write_text(f"{header}air,x,audio/0.flac,1,more\n")
    with pytest.raises(ValueError, match="clips.csv, row 2: has other columns than the first row"):
        import_folder(folder, tmp_path / "out")
    (folder / "clips.csv").write_text(f"\n{header}air,x,audio/0.flac\n")
    with pytest.raises(ValueError, match="clips.csv, row 3: score is None"):
        import_folder(folder, tmp_path / "out", score_column="score")
    (folder / "clips.csv").unlink()
    (folder / "clips.jsonl").write_text('{"prompt": "air"}\n\n{broken\n')
    with pytest.raises(ValueError, match="clips.jsonl, row 3: not a line of JSON"):
        import_folder(folder, tmp_path / "out")


def test_an_import_writes_over_an_earlier_one_of_the_same_and_nothing_else(tmp_path):
    folder = clips_folder(tmp_path, [("air", "x", 1), ("air", "y", 0)])
    for _ in range(2):
        import_folder(folder, tmp_path / "out")
    record = tmp_path / "out" / "import.json"
    before = load_preferences(tmp_path / "out").to_list()
    record.write_text(record.read_text().replace('"source": "folder"', '"source": "aime:quality"'))
    with pytest.raises(
        ValueError, match="out, which holds preferences imported from aime:quality: give another folder"
    ):
        import_folder(folder, tmp_path / "out")
    record.unlink()
    with pytest.raises(ValueError, match="out, which holds preferences that no import wrote: give another folder"):
        import_folder(folder, tmp_path / "out")
    assert load_preferences(tmp_path / "out").to_list() == before
    (tmp_path / "mine" / "votes.csv").write_text("preference,system_a,system_b,why\nA,x,y,louder\n")
    with pytest.raises(ValueError, match="mine, which holds a votes.csv that no import wrote: give another folder"):
        import_battles(tmp_path / "mine" / "votes.csv", tmp_path / "mine")
    for _ in range(2):
        import_battles(tmp_path / "mine" / "votes.csv", tmp_path / "votes")


def test_choices_keep_who_chose_and_what_was_heard(tmp_path):
    folder = clips_folder(tmp_path, [("air", "x", 1), ("air", "y", 0)])
    (folder / "clips.jsonl").unlink()
    common = {"prompt": "air", "audio_a": "audio/0.flac", "audio_b": "audio/1.flac", "system_a": "x", "system_b": "y"}
    write_table(
        folder / "pairs.csv",
        [
            common | {"preference": "B", "listener": "anna", "confidence": 4, "seconds_a": 1.5, "seconds_b": 2},
            common | {"preference": "BOTH_BAD", "listener": "", "confidence": "", "seconds_a": "", "seconds_b": ""},
        ],
    )
    result = import_folder(folder, tmp_path / "out")
    assert (result.decided, result.ties) == (1, 1)
    first, second = load_preferences(tmp_path / "out")
    assert (first["preference"], first["chosen_model"]) == ("b", "y")
    assert re.fullmatch("[0-9a-f]{16}", first["listener"])  # no name goes into the rows
    assert (first["seconds_chosen"], first["seconds_rejected"], first["confidence"]) == (2.0, 1.5, 4.0)
    assert (second["preference"], second["chosen_model"], second["confidence"]) == ("both_bad", "x", None)


def test_a_clip_may_have_a_row_for_each_of_its_raters(tmp_path):
    """It is compared by the mean of its scores, and not with itself."""
    folder = clips_folder(tmp_path, [("air", "x", 1), ("air", "y", 2)])
    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    write_table(folder / "clips.jsonl", [*rows, rows[0] | {"score": 5}])
    result = import_folder(folder, tmp_path / "out")
    assert (result.decided, result.ties) == (1, 0)
    assert load_preferences(tmp_path / "out")[0]["chosen_model"] == "x"  # 3 to 2


def test_a_clip_is_not_better_than_itself(tmp_path):
    folder = clips_folder(tmp_path, [("air", "x", 1)])
    (folder / "clips.jsonl").unlink()
    row = {"prompt": "air", "audio_a": "audio/0.flac", "audio_b": "audio/0.flac", "preference": "b"}
    write_table(folder / "pairs.csv", [row])
    with pytest.raises(ValueError, match=r"pairs.csv, row 2: preference is 'b': audio_a and audio_b are both"):
        import_folder(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"audio": "../secret.flac"}, ValueError, r"mine/clips.jsonl, row 2: path '../secret.flac' leads out of"),
        (
            {"audio": "audio/none.flac"},
            FileNotFoundError,
            r"mine/clips.jsonl, row 2: there is no file 'audio/none.flac'",
        ),
        ({"audio": "audio/noise.txt"}, ValueError, "clips.jsonl, row 2: .*cannot be read as audio"),
        ({"audio": "audio/silent.flac"}, ValueError, "is silent"),
        ({"prompt": ""}, ValueError, "row 2: no prompt"),
        ({"system": None}, ValueError, "row 2: no system"),
    ],
)
def test_an_unusable_clip_is_named(tmp_path, change, error, message):
    folder = clips_folder(tmp_path, [("air", "x", 1), ("air", "y", 0)])
    (tmp_path / "secret.flac").write_bytes(audio_bytes(tone(), RATE))
    (folder / "audio/noise.txt").write_text("not audio")
    (folder / "audio/silent.flac").write_bytes(audio_bytes(torch.zeros(1, RATE), RATE))
    records = [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()]
    write_table(folder / "clips.jsonl", [records[0], records[1] | change])
    with pytest.raises(error, match=message):
        import_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_was_done_is_kept_beside_the_rows(tmp_path):
    rows = [(f"tune {number // 2}", "xy"[number % 2], number) for number in range(90)]
    folder = clips_folder(tmp_path, rows)
    assert import_folder(folder, tmp_path / "out", min_gap=0.5).left_out == {}
    record = json.loads((tmp_path / "out" / "import.json").read_text())
    assert datetime.fromisoformat(record.pop("date"))
    assert record == {
        "source": "folder",
        "rows_read": 90,
        "comparisons": 45,
        "license": None,
        "address": None,
        "left_out": {},
        "options": {
            "crop_s": None,
            "loudness_lufs": -23.0,
            "skip_bad_clips": False,
            "min_gap": 0.5,
            "score_column": "score",
        },
    }
    # 45 rows are more than are in memory at once; they are all there, in order, for plain `datasets` too
    assert load_preferences(tmp_path / "out")["prompt"] == [f"tune {number}" for number in range(45)]
    plain = load_dataset(str(tmp_path / "out"), split="train").cast_column("chosen", Audio(decode=False))
    assert len(plain) == 45
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_folders_without_one_usable_table_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        import_folder(tmp_path / "none", tmp_path / "out")
    folder = clips_folder(tmp_path, [("air", "x", 1), ("jig", "y", 0)])
    with pytest.raises(ValueError, match="no prompt has two clips"):
        import_folder(folder, tmp_path / "out")
    (folder / "pairs.csv").write_text("prompt,audio_a,audio_b,preference\n")
    with pytest.raises(ValueError, match="clips.jsonl and pairs.csv: keep one"):
        import_folder(folder, tmp_path / "out")
    (folder / "clips.jsonl").unlink()
    with pytest.raises(ValueError, match="pairs.csv has no rows"):
        import_folder(folder, tmp_path / "out")
    (folder / "pairs.csv").write_text("prompt,audio_a,audio_b,preference\nair,audio/0.flac,audio/1.flac,left\n")
    with pytest.raises(ValueError, match="pairs.csv, row 2: preference is 'left'"):
        import_folder(folder, tmp_path / "out")
    (folder / "pairs.csv").unlink()
    with pytest.raises(FileNotFoundError, match="has no table of its clips"):
        import_folder(folder, tmp_path / "out")
    (folder / "clips.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match="row 1: not a line of JSON"):
        import_folder(folder, tmp_path / "out")
    for name, value in (("min_gap", -1), ("crop_s", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            import_folder(folder, tmp_path / "out", **{name: value})


def test_battles_are_votes_without_audio(tmp_path):
    """The columns of Music Arena's tables; every battle is a prompt of its own."""
    table = tmp_path / "battles.csv"
    table.write_text(
        "battle_id,preference,system_a,system_b,tj_a,tj_b\n"
        "b1,A,lyria,musicgen,1.0,0.2\n"
        "b2,TIE,musicgen,lyria,0.1,0.9\n"
        "b3,B,lyria,ace,0.3,0.4\n"
    )
    votes = [
        Vote("b1", "lyria", "musicgen", "a"),
        Vote("b2", "musicgen", "lyria", "tie"),
        Vote("b3", "lyria", "ace", "b"),
    ]
    assert read_votes(table) == votes
    result = import_battles(table, tmp_path / "out")
    assert (result.rows, result.decided, result.systems) == (3, 2, ("ace", "lyria", "musicgen"))
    assert read_votes(tmp_path / "out" / "votes.csv") == votes


def test_preferences_are_votes_too(tmp_path):
    folder = clips_folder(tmp_path, [("air", "x", 1), ("air", "y", 0), ("jig", "y", 2), ("jig", "y", 1)])
    import_folder(folder, tmp_path / "out")
    (vote,) = read_votes(tmp_path / "out")  # y against itself is none
    assert vote in (Vote("air", "x", "y", "a", "score:score"), Vote("air", "y", "x", "b", "score:score"))
    with pytest.raises(FileNotFoundError, match="mine holds no data/.*.parquet: give a folder of preferences or a CSV"):
        read_votes(folder)


def test_wrong_battles_are_named(tmp_path):
    table = tmp_path / "battles.csv"
    with pytest.raises(FileNotFoundError, match="there is no vote table"):
        read_votes(table)
    table.write_text("preference,system_a,system_b\nA,x,y\nC,x,y\n")
    with pytest.raises(ValueError, match="battles.csv, row 3: preference is 'c'"):
        read_votes(table)
    table.write_text("preference,system_a,system_b\nA,x,x\n")
    with pytest.raises(ValueError, match="row 2: model_a and model_b are both 'x'"):
        read_votes(table)
    table.write_text("preference,left,right\nA,x,y\n")
    with pytest.raises(ValueError, match="no model_a, model_b"):
        read_votes(table)
