"""Clips that experts rated become pairs of a prompt, in little copies of SongEval and MusicEval."""

from hashlib import sha256

import pytest
from published import imported, pitch, record_of, tone_bytes, write_parquet, write_table, write_tones

from musicrl_hf.preferences import load_preferences, split_by_prompt
from musicrl_hf.preferences.importers import ClipOptions, import_musiceval, import_songeval, read_musiceval
from musicrl_hf.preferences.importers.sources import open_source
from musicrl_hf.preferences.importers.writing import Tally

AXES = ("Coherence", "Musicality", "Memorability", "Clarity", "Naturalness")


def song(number, *ratings):
    """A line of metadata.jsonl: each of `ratings` is one annotator's five."""
    annotation = [dict(zip(AXES, five, strict=True)) for five in ratings]
    return {"file_name": f"mp3/{number}.flac", "gender": "female", "annotation": annotation}


def songeval(folder, songs):
    write_table(folder / "metadata.jsonl", songs)
    write_tones(folder, {one["file_name"]: 300 + 50 * number for number, one in enumerate(songs)})
    return folder


def test_songeval(tmp_path):
    songs = [
        song(0, (5, 5, 5, 5, 5), (4, 4, 4, 4, 4)),  # mean 4.5; memorability 4.5
        song(1, (4, 4, 1, 4, 4), (4, 4, 2, 4, 4)),  # 3.5; 1.5
        song(2, (3, 3, 3, 4, 4)),  # 3.4; 3
    ]
    result = import_songeval(songeval(tmp_path / "songeval", songs), tmp_path / "out")
    rows = imported(tmp_path / "out")
    # 4.5 wins against both; 3.5 and 3.4 are too close to be a pair
    assert sorted((row["chosen"], row["rejected"]) for row in rows) == [(300, 350), (300, 400)]
    told = {"prompt", "chosen_model", "rejected_model", "listener", "source", "confidence"}
    assert [{name: row[name] for name in told} for row in rows] == [
        {
            "prompt": "a song, group 0",
            "chosen_model": "unknown",
            "rejected_model": "unknown",
            "listener": "score:mean",
            "source": "songeval:mean",
            "confidence": None,
        }
    ] * 2
    assert result.left_out == {"pair closer than 0.5": 1}
    record = record_of(tmp_path / "out")
    assert (record["rows_read"], record["comparisons"], record["license"]) == (3, 2, "cc-by-nc-sa-4.0")
    assert record["options"]["min_gap"] == 0.5
    result = import_songeval(tmp_path / "songeval", tmp_path / "memorable", criterion="memorability", min_gap=2)
    assert [(row["chosen"], row["rejected"]) for row in imported(tmp_path / "memorable")] == [(300, 350)]
    assert result.left_out == {"pair closer than 2": 2}


def test_a_split_by_prompt_of_songeval_is_one_by_song(tmp_path):
    songs = [song(number, [1 + number % 5] * 5) for number in range(20)]
    import_songeval(songeval(tmp_path / "songeval", songs), tmp_path / "out")
    ds = load_preferences(tmp_path / "out")
    assert set(ds["prompt"]) == {f"a song, group {number}" for number in range(5)}
    sides = split_by_prompt(ds, test_share=0.4)
    heard = {
        side: {pitch(row[name]) for row in rows for name in ("chosen", "rejected")} for side, rows in sides.items()
    }
    assert heard["train"]
    assert heard["test"]
    assert not heard["train"] & heard["test"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"annotation": []},
            ValueError,
            r"metadata.jsonl, row 2: annotation is \[\]: it has to be a list of ratings with",
        ),
        ({"annotation": [{"Coherence": 3}]}, ValueError, r"row 2: Musicality is None: a rating lies between 1 and 5"),
        ({"annotation": [dict.fromkeys(AXES, 6)]}, ValueError, r"row 2: Coherence is 6: a rating lies between 1 and 5"),
        ({"file_name": "../x.flac"}, ValueError, r"row 2: file_name: path '../x.flac' leads out of"),
        ({"file_name": "mp3/9.flac"}, FileNotFoundError, r"row 2: file_name: there is no file 'mp3/9.flac'"),
    ],
)
def test_a_wrong_song_is_named(tmp_path, change, error, message):
    src = songeval(tmp_path / "songeval", [song(0, [4] * 5), song(1, [2] * 5)])
    write_table(src / "metadata.jsonl", [song(0, [4] * 5), song(1, [2] * 5) | change])
    with pytest.raises(error, match=message):
        import_songeval(src, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_songs_are_counted_where_that_is_asked_for(tmp_path):
    src = songeval(tmp_path / "songeval", [song(number, [number + 1] * 5) for number in range(3)])
    (src / "mp3/1.flac").unlink()
    result = import_songeval(src, tmp_path / "out", options=ClipOptions(skip_bad_clips=True))
    assert [(row["chosen"], row["rejected"]) for row in imported(tmp_path / "out")] == [(400, 300)]
    assert result.left_out == {"clip missing": 1}


def musiceval_archive(folder, lists):
    """`lists`: split -> (system, prompt, quality, alignment)."""
    hz = 300
    for split, clips in lists.items():
        lines = []
        for system, prompt, quality, alignment in clips:
            name = f"audiomos2025-track1-{system}_{prompt}.wav"
            write_tones(folder, {f"wav/{name}": hz})
            lines.append(f"{name},{quality},{alignment}\n")
            hz += 50
        (folder / "sets").mkdir(exist_ok=True)
        (folder / f"sets/{split}_mos_list.txt").write_text("".join(lines))
    (folder / "prompt_info.txt").write_text("id\ttext\nP044\ta dub bass line\nP045\ta waltz, slow\n")
    demo = "audiomos2025-track1-S001_P001.wav\ta demo's own prompt\n"
    (folder / "demo_prompt_info.txt").write_text(f"id\ttext\n{demo}")
    return folder


ARCHIVE = {
    "train": [
        ("S002", "P044", 4.2, 2.0),  # 300 Hz
        ("S003", "P044", 3.0, 4.0),  # 350
        ("S004", "P044", 3.2, 3.9),  # 400
        ("S002", "P045", 2.0, 2.0),  # 450
        ("S001", "P001", 5, 5),  # 500, a demo: alone with its prompt
        ("S009", "P099", 5, 5),  # 550, a prompt that nobody wrote down
    ],
    "dev": [("S003", "P045", 4.0, 4.0)],  # 600
    "test": [("S004", "P045", 1.0, 1.0), ("S005", "P045", 4.6, 1.2)],  # 650, 700
}


def test_musiceval_pairs_clips_of_one_prompt_and_split(tmp_path):
    src = musiceval_archive(tmp_path / "MusicEval-full", ARCHIVE)
    result = import_musiceval(src, tmp_path / "out")
    rows = imported(tmp_path / "out")
    assert sorted((row["chosen"], row["rejected"], row["chosen_model"], row["rejected_model"]) for row in rows) == [
        (300, 350, "S002", "S003"),
        (300, 400, "S002", "S004"),
    ]
    assert {(row["prompt"], row["listener"], row["source"]) for row in rows} == {
        ("a dub bass line", "score:quality", "musiceval:quality")
    }
    (test,) = imported(tmp_path / "out", "test")
    assert (test["chosen"], test["rejected"], test["prompt"]) == (700, 650, "a waltz, slow")
    assert result.left_out == {"prompt unknown": 1, "pair closer than 0.5": 1}
    assert record_of(tmp_path / "out")["license"] == "cc-by-nc-4.0"
    import_musiceval(src, tmp_path / "fitting", criterion="alignment")
    found = {(row["chosen"], row["rejected"]) for row in imported(tmp_path / "fitting")}
    assert found == {(350, 300), (400, 300)}
    with pytest.raises(ValueError, match="no split 'test'"):
        load_preferences(tmp_path / "fitting", "test")


def test_musiceval_with_one_list_of_all(tmp_path):
    src = musiceval_archive(tmp_path / "MusicEval-full", {"total": ARCHIVE["train"][:2]})
    import_musiceval(src, tmp_path / "out")
    assert len(imported(tmp_path / "out")) == 1


def test_musiceval_from_its_parquet(tmp_path):
    clips = [("S002", "P044", 4.2, 2.0, 300), ("S003", "P044", 3.0, 4.0, 350)]
    rows = [
        {
            "audio": {"bytes": tone_bytes(hz, suffix="wav"), "path": f"audiomos2025-track1-{system}_{prompt}.wav"},
            "overall quality": quality,
            "textual alignment": alignment,
        }
        for system, prompt, quality, alignment, hz in clips
    ]
    write_parquet(tmp_path / "musiceval/data/validation-00000-of-00001.parquet", rows, ("audio",))
    with pytest.raises(ValueError, match="prompts is not given and .*musiceval has no prompt_info.txt"):
        import_musiceval(tmp_path / "musiceval", tmp_path / "out")
    (tmp_path / "prompt_info.txt").write_text("id\ttext\nP044\ta dub bass line\n")
    import_musiceval(tmp_path / "musiceval", tmp_path / "out", prompts=tmp_path / "prompt_info.txt")
    (row,) = imported(tmp_path / "out", "validation")
    assert (row["chosen"], row["rejected"], row["chosen_model"], row["prompt"]) == (300, 350, "S002", "a dub bass line")
    with pytest.raises(FileNotFoundError, match="prompts: there is no file"):
        import_musiceval(tmp_path / "musiceval", tmp_path / "out", prompts=tmp_path / "none.txt")


def test_the_ratings_themselves_are_there_to_learn_from(tmp_path):
    src = musiceval_archive(tmp_path / "MusicEval-full", ARCHIVE)
    clips = read_musiceval(open_source(src), "quality", Tally())
    assert [(one.clip.system, one.score, one.split) for one in clips[:2]] == [
        ("S003", 4.0, "validation"),
        ("S004", 1.0, "test"),
    ]
    audio, rate = clips[0].clip.read(crop_s=0.5)
    assert (audio.shape, rate) == ((1, 4000), 8000)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x_S002_P044.wav,4.2\n", r"sets/train_mos_list.txt, row 1: .* is not clip,quality,alignment"),
        ("x_S002_P044.wav,9,1\n", r"row 1: overall quality is '9': a rating lies between 1 and 5"),
        ("tune.wav,3,1\n", r"row 1: audio is 'tune': its name has to end in system and prompt, as S002_P044"),
    ],
)
def test_a_wrong_line_of_musiceval_is_named(tmp_path, line, message):
    src = musiceval_archive(tmp_path / "MusicEval-full", {"train": ARCHIVE["train"][:2]})
    (src / "sets/train_mos_list.txt").write_text(line)
    with pytest.raises(ValueError, match=message):
        import_musiceval(src, tmp_path / "out")


def test_pairs_of_a_prompt_can_be_limited_and_repeat(tmp_path):
    clips = [(f"S{number:03d}", "P044", 1 + number / 2, 3) for number in range(6)]
    src = musiceval_archive(tmp_path / "MusicEval-full", {"train": clips})
    result = import_musiceval(src, tmp_path / "out", pairs_per_prompt=4)
    assert result.left_out == {"pair over pairs_per_prompt": 11}  # of 15
    names = [f"wav/audiomos2025-track1-S{number:03d}_P044.wav" for number in range(6)]
    rows = imported(tmp_path / "out")
    chosen = {frozenset((row["chosen"], row["rejected"])) for row in rows}

    def digest(a, b):
        return sha256(f"{names[a]}\x1f{names[b]}".encode()).digest()

    # Which clip is a is a coin toss over both names; the pairs that are kept are those with the first digests.
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    ordered = sorted(digest(*(pair[::-1] if digest(*pair)[0] % 2 else pair)) for pair in pairs)
    by_digest = {digest(*(pair[::-1] if digest(*pair)[0] % 2 else pair)): pair for pair in pairs}
    assert chosen == {frozenset(300 + 50 * number for number in by_digest[one]) for one in ordered[:4]}
    for name, value in (("min_gap", -1), ("pairs_per_prompt", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            import_musiceval(src, tmp_path / "again", **{name: value})
    with pytest.raises(ValueError, match="criterion is 'beauty': use one of quality, alignment"):
        import_musiceval(src, tmp_path / "again", criterion="beauty")
