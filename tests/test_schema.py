"""Preference rows: what is refused and where, that the Parquet is what `datasets` expects, and that splits do not leak."""

import math

import datasets
import pyarrow.parquet
import pytest
import torch
from datasets import Audio, Dataset, DatasetDict

from musicrl_hf.audio import audio_bytes, read_audio
from musicrl_hf.preferences.schema import (
    FEATURES,
    Vote,
    decided_pairs,
    load_preferences,
    normalise_prompt,
    preferences_from_rows,
    read_prompts,
    save_preferences,
    validate_preferences,
    votes_from_preferences,
)
from musicrl_hf.preferences.splits import split_by_generator, split_by_prompt

RATE = 8000


def tone(hz=440.0, seconds=0.5):
    return 0.3 * torch.sin(2 * math.pi * hz * torch.arange(int(seconds * RATE)) / RATE)[None]


def row(prompt="a slow air", preference="a", **changes):
    base = {
        "prompt": prompt,
        "chosen": audio_bytes(tone(440), RATE),
        "rejected": audio_bytes(tone(330), RATE),
        "chosen_model": "tuned",
        "rejected_model": "base",
        "preference": preference,
        "listener": "3f2a",
        "source": "test",
        "created_at": "2026-01-31T12:00:00+00:00",
    }
    return base | changes


def test_saved_preferences_load_with_plain_datasets_and_keep_their_audio_type(tmp_path):
    ds = preferences_from_rows([row(), row("a reel", "tie", confidence=2.0, chosen_seed=7)])
    folder = save_preferences(ds, tmp_path / "votes")

    plain = datasets.load_dataset(str(folder), split="train")
    assert isinstance(plain.features["chosen"], Audio)
    assert plain.features["chosen"].decode, "a reader elsewhere sees playable audio"
    (parquet,) = folder.rglob("*.parquet")
    assert b'"chosen": {"_type": "Audio"}' in pyarrow.parquet.read_schema(parquet).metadata[b"huggingface"]

    loaded = load_preferences(folder)
    assert loaded.features == FEATURES
    assert loaded["chosen_seed"] == [None, 7]
    audio, rate = read_audio(loaded[0]["chosen"]["bytes"])
    assert rate == RATE
    assert torch.allclose(audio, tone(440), atol=1 / 32767)


def test_splits_are_saved_and_loaded_by_name(tmp_path):
    parts = DatasetDict({"train": preferences_from_rows([row()]), "test": preferences_from_rows([row("a jig")])})
    folder = save_preferences(parts, tmp_path / "votes")
    assert load_preferences(folder, split="test")["prompt"] == ["a jig"]
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_preferences(folder, split="validation")


def test_saving_replaces_preferences_but_nothing_else(tmp_path):
    folder = save_preferences(preferences_from_rows([row()]), tmp_path / "votes")
    save_preferences(preferences_from_rows([row("a jig")]), folder)
    assert load_preferences(folder)["prompt"] == ["a jig"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        save_preferences(preferences_from_rows([row()]), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    (folder / "votes.db").write_text("all votes")
    with pytest.raises(ValueError, match=r"holds votes\.db beside preferences, which would be lost"):
        save_preferences(preferences_from_rows([row()]), folder)
    assert (folder / "votes.db").read_text() == "all votes"
    assert load_preferences(folder)["prompt"] == ["a jig"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "row 1: prompt is empty"),
        ({"prompt": 5}, "row 1: prompt is 5: it has to be string"),
        ({"preference": "A"}, "row 1: preference is 'A': use one of a, b, tie, both_bad"),
        ({"seconds_chosen": -0.5}, r"row 1: seconds_chosen is -0.5: seconds heard cannot be negative"),
        ({"seconds_rejected": math.inf}, "row 1: seconds_rejected is inf"),
        ({"confidence": 0}, "row 1: confidence is 0: use 1"),
        ({"confidence": "high"}, "row 1: confidence is 'high': it has to be float32"),
        ({"listener": None}, "row 1: listener is empty"),
        ({"chosen_model": ""}, "row 1: chosen_model is empty"),
        ({"created_at": "yesterday"}, "row 1: created_at is 'yesterday': use ISO 8601"),
        ({"chosen": b"not audio"}, "row 1: chosen is not audio that soundfile reads"),
        ({"rejected": {"bytes": None, "path": None}}, "row 1: rejected is"),
        ({"chosen": audio_bytes(torch.zeros(1, 31 * 400) + 0.1, 400)}, "row 1: chosen lasts 31.0 s"),
        ({"mood": "sad"}, "row 1: unknown column 'mood'"),
    ],
)
def test_a_wrong_row_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        preferences_from_rows([row(), row(**changes)])


def test_every_wrong_row_is_named_at_once():
    with pytest.raises(ValueError, match="row 0: prompt is empty\nrow 2: preference is None"):
        preferences_from_rows([row(""), row(), row(preference=None)])


def test_clips_come_from_inside_the_given_folder_only(tmp_path):
    (tmp_path / "in").mkdir()
    for place in ("in/x.flac", "outside.flac"):
        (tmp_path / place).write_bytes(audio_bytes(tone(), RATE))
    ds = preferences_from_rows([row(chosen="x.flac")], root=tmp_path / "in")
    assert ds[0]["chosen"] == {"bytes": (tmp_path / "in" / "x.flac").read_bytes(), "path": "x.flac"}
    with pytest.raises(ValueError, match="row 0: chosen: path '../outside.flac' leads out of"):
        preferences_from_rows([row(chosen="../outside.flac")], root=tmp_path / "in")
    (tmp_path / "in" / "link.flac").symlink_to(tmp_path / "outside.flac")
    with pytest.raises(ValueError, match="leads out of"):
        preferences_from_rows([row(chosen="link.flac")], root=tmp_path / "in")
    with pytest.raises(FileNotFoundError, match="row 0: chosen: there is no file 'y.flac'"):
        preferences_from_rows([row(chosen="y.flac")], root=tmp_path / "in")
    with pytest.raises(ValueError, match="root is not given"):
        preferences_from_rows([row(chosen="x.flac")])


def test_missing_columns_wrong_types_and_empty_tables_are_refused():
    ds = preferences_from_rows([row()])
    with pytest.raises(ValueError, match="no column rejected_model, listener"):
        validate_preferences(ds.remove_columns(["listener", "rejected_model"]))
    with pytest.raises(ValueError, match="no rows"):
        validate_preferences(ds.select([]))
    with pytest.raises(ValueError, match="rows is empty"):
        preferences_from_rows([])
    words = ds.remove_columns("confidence").add_column("confidence", ["high"])
    with pytest.raises(ValueError, match="column confidence is Value"):
        validate_preferences(words)
    with pytest.raises(ValueError, match="it has to be datasets.Audio"):
        validate_preferences(ds.remove_columns("chosen").add_column("chosen", ["x.flac"]))


def test_what_is_neither_a_folder_nor_on_the_hub_is_not_found(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no .parquet file"):
        load_preferences(tmp_path / "empty")
    with pytest.raises(
        FileNotFoundError,
        match=r"`preferences` = .*there is no folder nobody/no-such-preferences here, and HF_HUB_OFFLINE",
    ):
        load_preferences("nobody/no-such-preferences")


def test_decided_pairs_counts_what_it_leaves_out():
    rows = [
        row(seconds_chosen=4.0, seconds_rejected=4.0),
        row(preference="b", seconds_chosen=4.0, seconds_rejected=0.5),
        row(preference="b"),
        row(preference="tie"),
        row(preference="both_bad"),
    ]
    ds = preferences_from_rows(rows)
    kept, counts = decided_pairs(ds)
    assert kept["preference"] == ["a", "b", "b"]
    assert counts == {"a": 1, "b": 2, "tie": 1, "both_bad": 1, "not_heard": 0, "left_out": 2, "kept": 3}
    kept, counts = decided_pairs(ds, min_seconds=2.0)  # row 1 heard half a second of one clip, row 2 does not say
    assert len(kept) == 1
    assert counts["not_heard"] == 2
    for keep_ties in (False, True):
        with pytest.raises(ValueError, match="none of the 1 rows has a winner"):
            decided_pairs(preferences_from_rows([row(preference="tie")]), keep_ties=keep_ties)


def test_ties_are_kept_where_both_clips_were_heard():
    heard, hardly = ({"seconds_chosen": 4.0, "seconds_rejected": seconds} for seconds in (4.0, 0.5))
    labels = [("a", heard), ("tie", heard), ("tie", hardly), ("both_bad", heard), ("b", hardly), ("tie", {})]
    ds = preferences_from_rows([row(preference=label, **seconds) for label, seconds in labels])
    kept, counts = decided_pairs(ds, 2.0, keep_ties=True)
    assert kept["preference"] == ["a", "tie", "both_bad"]
    assert counts == {"a": 1, "b": 1, "tie": 3, "both_bad": 1, "not_heard": 3, "left_out": 3, "kept": 3}
    assert decided_pairs(ds, keep_ties=True)[0]["preference"] == ds["preference"]


def test_no_prompt_is_on_both_sides_however_it_is_spelled():
    prompts = [f"tune {i}" for i in range(40)] + [f"  TUNE,  {i}! " for i in range(40)]
    ds = preferences_from_rows([row(prompt) for prompt in prompts])
    split = split_by_prompt(ds, test_share=0.3, seed=1)
    sides = {name: {normalise_prompt(p) for p in part["prompt"]} for name, part in split.items()}
    assert not sides["train"] & sides["test"]
    assert len(split["train"]) + len(split["test"]) == 80
    assert split_by_prompt(ds, test_share=0.3, seed=1)["test"]["prompt"] == split["test"]["prompt"]
    assert split_by_prompt(ds, test_share=0.3, seed=2)["test"]["prompt"] != split["test"]["prompt"]
    # More votes on the same prompts do not move a prompt to the other side.
    assert {normalise_prompt(p) for p in split_by_prompt(ds.select(range(40)), 0.3, 1)["test"]["prompt"]} == sides[
        "test"
    ]


@pytest.mark.parametrize(
    ("prompts", "share", "expected"),
    [(12, 0.1, 1), (12, 0.3, 4), (40, 0.3, 12), (2, 0.01, 1), (2, 0.99, 1), (5, 0.9, 4)],
)
def test_the_held_out_share_is_what_was_asked_for(prompts, share, expected):
    """round(share * prompts), at least 1, and at least 1 left: by hand in the table."""
    ds = preferences_from_rows([row(f"tune {i}") for i in range(prompts)])
    for seed in range(3):
        split = split_by_prompt(ds, share, seed)
        assert (len(split["test"]), len(split["train"])) == (expected, prompts - expected)


def test_a_new_prompt_moves_at_most_one_other():
    ds = preferences_from_rows([row(f"tune {i}") for i in range(21)])
    before = set(split_by_prompt(ds.select(range(20)), 0.3)["test"]["prompt"])
    after = set(split_by_prompt(ds, 0.3)["test"]["prompt"])
    assert len(before - after) + len(after - before - {"tune 20"}) <= 1


def test_a_split_that_leaves_a_side_empty_is_refused():
    ds = preferences_from_rows([row(), row("A slow air!")])
    with pytest.raises(ValueError, match="the preferences have 1 prompt: give votes on two"):
        split_by_prompt(ds)
    with pytest.raises(ValueError, match="test_share is 1.5"):
        split_by_prompt(ds, test_share=1.5)


def test_a_held_out_generator_is_never_trained_on():
    rows = [row(chosen_model=a, rejected_model=b) for a, b in (("x", "y"), ("y", "z"), ("x", "x"), ("z", "x"))]
    split = split_by_generator(preferences_from_rows(rows), ["z"])
    assert [*zip(split["train"]["chosen_model"], split["train"]["rejected_model"], strict=True)] == [
        ("x", "y"),
        ("x", "x"),
    ]
    assert len(split["test"]) == 2
    with pytest.raises(ValueError, match=r"held_out is \['q'\]: name generators of x, y, z"):
        split_by_generator(preferences_from_rows(rows), ["q"])
    with pytest.raises(ValueError, match="train side of the split is empty"):
        split_by_generator(preferences_from_rows(rows), ["x", "y"])


def test_votes_keep_the_side_on_which_the_winner_was_heard():
    rows = [row(preference="a"), row(preference="b"), row(preference="tie"), row(rejected_model="tuned")]
    assert votes_from_preferences(preferences_from_rows(rows)) == [
        Vote("a slow air", "tuned", "base", "a", "3f2a"),
        Vote("a slow air", "base", "tuned", "b", "3f2a"),
        Vote("a slow air", "tuned", "base", "tie", "3f2a"),
    ]


def test_prompts_are_read_one_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("a reel\n\n  a jig \n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a reel", "a jig"]
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "blank.txt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_prompts(tmp_path / "none.txt")


def test_further_columns_are_let_through(tmp_path):
    ds = preferences_from_rows([row()])
    wider = datasets.concatenate_datasets([ds, Dataset.from_dict({"split_hint": ["x"]})], axis=1)
    assert load_preferences(save_preferences(wider, tmp_path / "votes"))["split_hint"] == ["x"]
