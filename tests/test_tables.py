"""Tables of data sets as people have them: which one is read, where clips are looked for, what is told of a wrong one."""

import csv
import json
import os
import subprocess
import sys

import pytest
from hub_stand_in import Commit, HubStandIn, Repository
from published import imported, pitch, tone_bytes, write_parquet, write_table, write_tones

from musicrl_hf.preferences.importers.sources import FolderSource, HubSource, open_source
from musicrl_hf.preferences.importers.tables import catalogue, clip_of, read_rows, read_text_table, write_csv

COLUMNS = ("uuid", "prompt", "answer")


def test_every_table_with_the_columns_is_read(tmp_path):
    row = {"uuid": "1", "prompt": "007", "answer": 1}
    write_table(tmp_path / "b.csv", [row, row | {"uuid": "2"}])
    write_table(tmp_path / "a/c.jsonl", [row | {"uuid": "3"}])
    write_table(tmp_path / "a/d.json", [row | {"uuid": "4"}])
    write_parquet(tmp_path / "data/e.parquet", [row | {"uuid": "5"}])
    (tmp_path / "a/f.json").write_text(json.dumps([row | {"uuid": "6"}, row | {"uuid": "7"}]))
    (tmp_path / "numbers.json").write_text("[1, 2]")
    write_table(tmp_path / ".cache/g.jsonl", [row])
    write_table(tmp_path / "prompts.csv", [{"prompt": "007", "answer": 1}])
    rows = read_rows(FolderSource(tmp_path), COLUMNS)
    assert [(row.where, row.text("uuid"), row.text("prompt"), row.number("answer")) for row in rows] == [
        ("a/c.jsonl, row 1", "3", "007", 1),
        ("a/d.json", "4", "007", 1),
        ("a/f.json, row 1", "6", "007", 1),
        ("a/f.json, row 2", "7", "007", 1),
        ("b.csv, row 2", "1", "007", 1),
        ("b.csv, row 3", "2", "007", 1),
        ("data/e.parquet, row 1", "5", "007", 1),
    ]


def test_wrong_tables_are_named(tmp_path):
    src = tmp_path / "set"
    src.mkdir()
    with pytest.raises(FileNotFoundError, match=r"set has no table: it needs a .parquet, .csv, .jsonl or .json file"):
        read_rows(open_source(src), COLUMNS)
    write_table(src / "x.csv", [{"prompt": "p", "answer": 1}])
    with pytest.raises(
        ValueError, match=r"no table of .*set has rows with the columns uuid, .*: found x.csv \(prompt, answer\)"
    ):
        read_rows(open_source(src), COLUMNS)
    write_table(src / "y.jsonl", [{"uuid": 1, "prompt": "p", "answer": 1}, {"uuid": 2, "prompt": "p"}])
    with pytest.raises(ValueError, match=r"y.jsonl, row 2: no column answer: it has uuid, prompt"):
        read_rows(open_source(src), COLUMNS)
    (src / "y.jsonl").write_bytes(b'{"uuid": "\xff"}\n')
    with pytest.raises(ValueError, match=r"y.jsonl cannot be read as JSONL"):
        read_rows(open_source(src), COLUMNS)
    (src / "y.jsonl").unlink()
    (src / "z.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(ValueError, match=r"z.parquet cannot be read as Parquet"):
        read_rows(open_source(src), COLUMNS)
    with pytest.raises(
        FileNotFoundError, match="there is no folder .*nowhere: give a folder with a copy of the data set"
    ):
        open_source(tmp_path / "nowhere")


def test_no_spreadsheet_takes_a_prompt_for_a_formula(tmp_path):
    prompts = [
        '=HYPERLINK("http://x","a reel")',
        "+1 tune",
        "- slow",
        "@flute",
        "\tx",
        "'=quoted",
        "''-twice",
        "'tis a reel",
        "a=b",
    ]
    write_csv(tmp_path / "votes.csv", ("prompt", "score"), [(prompt, -0.5) for prompt in prompts])
    with open(tmp_path / "votes.csv", encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    assert not [cell for cell, _ in rows if cell[0] in "=+-@\t\r"]
    assert [cell for cell, _ in rows][-2:] == prompts[-2:]
    assert {score for _, score in rows} == {"-0.5"}  # numbers stay numbers
    read = read_text_table(tmp_path / "votes.csv", "votes.csv")
    assert [row.values["prompt"] for row in read] == prompts


def test_clips_stay_in_their_table_until_they_are_read(tmp_path):
    rows = [
        {"id": str(number), "audio": {"bytes": tone_bytes(300 + 50 * number), "path": "x.flac"}} for number in range(3)
    ]
    write_parquet(tmp_path / "train.parquet", rows, ("audio",))
    source = FolderSource(tmp_path)
    found = catalogue(source, lambda name: name, id_column="id")
    row = read_rows(source, ("id",))[2]
    own, other = clip_of(source, row, "audio"), clip_of(source, row, "audio", cell=found["0"][0])
    assert (own.name, other.name) == ("train.parquet, audio 3/x.flac", "train.parquet, audio 1/x.flac")
    assert [pitch({"bytes": clip.load()}) for clip in (own, other)] == [400, 300]
    assert list(catalogue(source, lambda name: name)) == ["x.flac"]


def test_clips_are_looked_for_in_the_data_set_and_beside_the_table(tmp_path):
    write_tones(tmp_path, {"sub/audio/a.flac": 300, "audio/b.flac": 400})
    write_table(tmp_path / "sub/x.jsonl", [{"uuid": 1, "audio": "audio/a.flac"}, {"uuid": 2, "audio": "audio/b.flac"}])
    source = FolderSource(tmp_path)
    rows = read_rows(source, ("uuid", "audio"))
    assert [clip_of(source, row, "audio").load() for row in rows] == [
        tmp_path / "sub/audio/a.flac",
        tmp_path / "audio/b.flac",
    ]
    assert clip_of(source, rows[0], "none") is None
    os.symlink(tmp_path, tmp_path / "sub/audio/up")
    with pytest.raises(FileNotFoundError, match=r"sub/x.jsonl, row 1: audio: there is no file 'gone.flac'"):
        clip_of(source, rows[0], "audio", cell="gone.flac")
    with pytest.raises(ValueError, match="leads out of"):
        clip_of(source, rows[0], "audio", cell="/etc/passwd")


# -- the Hub -----------------------------------------------------------------------------------------------------------


def on_the_hub(hub, repo_id, folder):
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.repositories["dataset", repo_id] = Repository(False, {"main": [Commit("0" * 40, "first", files, {})]})


def musicrl(hub, cache, *words):
    command = [sys.executable, "-m", "musicrl_hf.cli", *map(str, words)]
    return subprocess.run(command, env=hub.environment(cache), cwd=cache, capture_output=True, text=True, timeout=500)


def test_a_month_of_a_data_set_on_the_hub(tmp_path):
    """Only the month's tables are fetched, and only the clips that are needed."""
    copy = tmp_path / "copy"
    row = {"prompt": "a reel", "system_a": "x", "system_b": "y", "preference": "B"}
    for number, month in enumerate(("06-2025DEC", "07-2026JAN")):
        clips = {f"audio_{side}": f"audio_files/{month}/{number}{side}.flac" for side in "ab"}
        write_tones(copy, dict.fromkeys(clips.values(), 300 + 50 * number))
        write_table(copy / f"battle_data/{month}/{number}.json", [{"battle_uuid": number, **row, **clips}])
    withheld = {"battle_uuid": 9, **row, "audio_a": "", "audio_b": "audio_files/06-2025DEC/1b.flac"}
    write_tones(copy, {"audio_files/06-2025DEC/1b.flac": 900})
    write_table(copy / "battle_data/06-2025DEC/9.json", [withheld])
    card = "configs:\n- config_name: '2025_12'\n  data_files: battle_data/06-2025DEC/*.json\n"
    (copy / "README.md").write_text(f"---\n{card}---\n# A card\n")
    with HubStandIn() as hub:
        on_the_hub(hub, "arena/battles", copy)
        done = musicrl(hub, tmp_path, "import", "music-arena", "arena/battles", "--config", "2025_12", "--out", "out")
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout == (
            "Wrote out: 1 comparisons (1 decided, 0 ties) of 1 prompts, systems x, y; left out: 1 clip withheld\n"
        )
        asked = [line for line in hub.requests if line.endswith((".flac", ".json"))]
        assert any(line.endswith("/audio_files/06-2025DEC/0a.flac") for line in asked)
        assert not [line for line in asked if "2026JAN" in line or line.endswith("1b.flac")]
        record = json.loads((tmp_path / "out/import.json").read_text())
        assert (record["rows_read"], record["comparisons"]) == (2, 1)

        gone = musicrl(hub, tmp_path, "import", "music-arena", "arena/none", "--out", "none")
        assert gone.returncode == 2
        assert (
            gone.stderr.strip()
            .splitlines()[-1]
            .startswith("musicrl: error: data set 'arena/none' is neither a folder here nor one that the Hub gives")
        )
        assert not (tmp_path / "none").exists()


def test_a_survey_on_the_hub_finds_its_tracks_in_their_own_data_set(tmp_path):
    row = {"question-type": "Music Quality", "description": "celtic", "answer": 2}
    for side, track in ((1, 42), (2, 5331)):
        row |= {f"model-{side}": "xy"[side - 1], f"track-{side}-id": track}
        row |= {f"track-{side}-begin": "00:00:00", f"track-{side}-end": "00:00:10"}
    write_parquet(tmp_path / "survey/data/train-00000-of-00001.parquet", [row])
    tracks = [
        {"id": f"{n:05d}", "audio": {"bytes": tone_bytes(hz), "path": None}} for n, hz in ((42, 300), (5331, 400))
    ]
    write_parquet(tmp_path / "tracks/data/train-00000-of-00001.parquet", tracks, ("audio",))
    with HubStandIn() as hub:
        on_the_hub(hub, "disco-eth/AIME-survey", tmp_path / "survey")
        on_the_hub(hub, "disco-eth/AIME", tmp_path / "tracks")
        done = musicrl(hub, tmp_path, "import", "aime", "disco-eth/AIME-survey", "--out", "out")
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = imported(tmp_path / "out")
    assert (found["chosen"], found["rejected"], found["chosen_model"]) == (400, 300, "y")


def test_a_download_that_breaks_off_is_no_missing_clip(tmp_path):
    """`--skip_bad_clips` counts a clip that the Hub does not hold, and stops where the Hub goes away."""
    row = {"prompt": "a reel", "system_a": "x", "system_b": "y", "preference": "B"}
    for number in range(3):
        clips = {f"audio_{side}": f"audio/{number}{side}.flac" for side in "ab"}
        write_tones(tmp_path / "copy", dict.fromkeys(clips.values(), 300 + 50 * number))
        write_table(tmp_path / f"copy/battle_data/{number}.json", [{"battle_uuid": number, **row, **clips}])
    (tmp_path / "copy/audio/1a.flac").unlink()
    words = ["import", "music-arena", "arena/battles", "--skip_bad_clips", "--out"]
    with HubStandIn() as hub:
        on_the_hub(hub, "arena/battles", tmp_path / "copy")
        hub.break_off = {"audio/2b.flac"}
        broken = musicrl(hub, tmp_path, *words, "broken")
        hub.break_off = set()
        whole = musicrl(hub, tmp_path, *words, "whole")
    assert broken.returncode == 2, broken.stdout
    error = broken.stderr.strip().splitlines()[-1]
    assert error.startswith("musicrl: error: data set 'arena/battles'")
    assert "the Hub could not be reached or broke off" in error
    assert "HF_HUB_OFFLINE" in error
    assert not (tmp_path / "broken").exists()
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert "2 comparisons" in whole.stdout
    assert "left out: 1 clip missing" in whole.stdout


def test_a_hub_id_is_one_only_where_there_is_no_such_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_source("arena/battles") == HubSource("arena/battles")
    (tmp_path / "arena/battles").mkdir(parents=True)
    assert isinstance(open_source("arena/battles"), FolderSource)
