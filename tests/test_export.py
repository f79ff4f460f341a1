"""From votes to a data set: here, as `datasets` reads it, as a reward learns from it, and on a stand-in for the Hub."""

import json
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing

import datasets
import pytest
from hub_stand_in import HubStandIn
from sqlalchemy import select
from stores import add_pair, hear_and_vote, join, open_desk
from tiny import tiny_generator

from musicrl_hf.cards import check_card, preference_card
from musicrl_hf.cli import main
from musicrl_hf.collect import tables
from musicrl_hf.collect.desk import rules_held
from musicrl_hf.collect.export import export_votes
from musicrl_hf.collect.rules import LONGEST_HEARD_S, Answer
from musicrl_hf.collect.store import VoteStore
from musicrl_hf.evaluation import evaluate_votes
from musicrl_hf.hub import prepare_preferences
from musicrl_hf.preferences import load_preferences
from musicrl_hf.preferences.splits import side_of_prompt
from musicrl_hf.records import read_collection
from musicrl_hf.training.reward import RewardJob, run_reward


def table(folder, split="train"):
    rows = datasets.load_dataset(str(folder), split=split)
    for column in ("chosen", "rejected"):
        rows = rows.cast_column(column, datasets.Audio(decode=False))
    return rows.to_list()


def vote_in_order(desk, clock, listener, preference, swapped, seconds=(2.0, 3.0)):
    """Vote on the next deal, with its order set: the tests say what was on which side."""
    deal = desk.deal(listener)
    with desk.store.write() as connection:
        id = deal.token.partition(".")[0]
        connection.execute(tables.deals.update().where(tables.deals.c.id == id).values(swapped=swapped))
    clock.now += 10
    assert desk.vote(listener, deal.token, Answer(preference, *seconds))


@pytest.mark.parametrize(
    ("preference", "swapped", "chosen", "heard"),
    [  # of the pair x, y (seeds 7, 8), a is x unless swapped; a was heard for 2 s, b for 3 s
        ("a", False, ("x", 7), (2.0, 3.0)),
        ("b", False, ("y", 8), (3.0, 2.0)),
        ("a", True, ("y", 8), (2.0, 3.0)),
        ("b", True, ("x", 7), (3.0, 2.0)),
        ("tie", False, ("x", 7), (2.0, 3.0)),
        ("both_bad", True, ("y", 8), (2.0, 3.0)),  # without a winner, chosen is what was heard as a
    ],
)
def test_a_row_says_what_was_heard_and_chosen(tmp_path, clock, preference, swapped, chosen, heard):
    store = VoteStore(tmp_path / "store")
    desk = open_desk(store, clock)
    add_pair(store, "jazz")
    _, listener = join(desk)
    vote_in_order(desk, clock, listener, preference, swapped)
    result = export_votes(store, tmp_path / "out")
    (row,) = table(result.path)
    rejected = ({"x": "y", "y": "x"}[chosen[0]], 15 - chosen[1])
    assert (row["chosen_model"], row["chosen_seed"]) == chosen
    assert (row["rejected_model"], row["rejected_seed"]) == rejected
    assert (row["seconds_chosen"], row["seconds_rejected"]) == heard
    assert (row["preference"], row["prompt"], row["listener"]) == (preference, "jazz", listener)
    assert (row["source"], row["created_at"]) == ("collected", "2027-01-15T08:00:10+00:00")
    assert row["confidence"] is row["reliability"] is None
    with store.read() as connection:
        files = {clip.model: clip.id for clip in connection.execute(select(tables.clips))}
    assert row["chosen"]["path"] == f"{files[chosen[0]]}.flac"
    assert row["chosen"]["bytes"][:4] == b"fLaC"


def test_everything_stands_on_the_card(store, clock, tmp_path):
    desk = open_desk(store, clock, check_every=2, raters=2)
    for number in range(2):
        add_pair(store, f"prompt {number}")
    add_pair(store, "c", kind="identical")
    add_pair(store, "d", models=("x", "broken"), kind="broken")
    careful, careless = join(desk)[1], join(desk)[1]
    for listener, preferences in ((careful, "a b tie"), (careless, "a b b")):
        for preference in preferences.split():
            vote_in_order(desk, clock, listener, preference, swapped=False)
    out = export_votes(store, tmp_path / "out", test_share=0).path
    # each heard two pairs and one check, the first the identical clips, the second the less asked one: noise
    rows = load_preferences(out).to_list()
    assert {row["listener"]: row["reliability"] for row in rows} == {careful: 1.0, careless: 0.0}
    record = read_collection(out)
    assert record.checks == {"identical": {"passed": 1, "failed": 0}, "broken": {"passed": 0, "failed": 1}}
    assert (record.listeners, record.simulated_listeners, record.shared_pairs) == (2, 0, 2)
    card = preference_card(out, "me/votes")
    data = check_card(card, "dataset")
    assert data["license"] == "cc-by-4.0"
    for line in desk.rules.consent_text.splitlines():
        assert f"> {line}".rstrip() in card
    for expected in (
        "| listeners (people) | 2 |",
        "| pairs that two or more voted on | 2 |",
        "| a clip against itself | 1 | 0 |",
        "| a clip against noise | 0 | 1 |",
        f"| preferences | {record.agreement['preferences']:.3f} |",
        "| `raters` | 2 |",
        "| rows | 4 |",
    ):
        assert expected in card
    assert "simulated" not in card.replace("simulated listeners | 0", "")
    evaluate_votes(out, tmp_path / "counted")
    assert "1 of 2 checks of attention was passed." in (tmp_path / "counted" / "index.html").read_text()
    with pytest.raises(ValueError, match="agreed to 'cc-by-4.0': leave it out"):
        preference_card(out, "me/votes", license="mit")


def test_the_card_is_the_same_pushed_or_not(tmp_path, clock):
    """Of an export here, one that is pushed, and one that is pushed later; what a person wrote on it is kept."""
    store = VoteStore(tmp_path / "store")
    desk = open_desk(store, clock, check_every=2)
    add_pair(store, "jazz")
    hear_and_vote(desk, clock, join(desk)[1])
    out = export_votes(store, tmp_path / "votes").path
    here = (out / "README.md").read_text()
    assert "| a clip against itself | 0 | 0 |" in here
    assert 'load_preferences("votes")' in here
    assert prepare_preferences(out, "me/other").card == preference_card(out, "me/other")
    again = export_votes(store, tmp_path / "again", repo_id="me/votes").path
    there = (again / "README.md").read_text()
    assert there == prepare_preferences(again, "me/votes").card == prepare_preferences(out, "me/votes").card
    assert there.replace("me/votes", "votes") == here
    (out / "README.md").write_text(here.replace("## Limits\n", "## Limits\n\nMind that only one person listened.\n"))
    assert "only one person" in prepare_preferences(out, "me/votes").card
    assert len(table(out)) == 1


def test_splits_are_by_prompt(tmp_path, clock):
    store = VoteStore(tmp_path / "store")
    desk = open_desk(store, clock, votes_per_minute=1000)
    for number in range(12):
        add_pair(store, f"prompt {number}")
    _, listener = join(desk)
    while desk.deal(listener):
        hear_and_vote(desk, clock, listener)
    result = export_votes(store, tmp_path / "out", test_share=0.3, seed=2)
    assert result.splits == ("train", "test")
    for split in result.splits:
        prompts = {row["prompt"] for row in table(result.path, split)}
        assert prompts == {f"prompt {n}" for n in range(12) if side_of_prompt(f"prompt {n}", 0.3, 2) == split}
    assert export_votes(store, tmp_path / "whole", test_share=0).splits == ("train",)
    with pytest.raises(ValueError, match="test_share is 1"):
        export_votes(store, tmp_path / "out", test_share=1)


def test_an_export_over_the_last_one_is_what_load_dataset_reads(tmp_path, clock):
    store = VoteStore(tmp_path / "store")
    desk = open_desk(store, clock)
    for number in range(2):
        add_pair(store, f"prompt {number}")
    people = [join(desk) for _ in range(2)]
    read = []
    for _, listener in people:
        while desk.deal(listener):
            hear_and_vote(desk, clock, listener)
        read.append({row["listener"] for row in table(export_votes(store, tmp_path / "out", test_share=0).path)})
    desk.withdraw(people[0][0])
    read.append({row["listener"] for row in table(export_votes(store, tmp_path / "out", test_share=0).path)})
    one, two = (listener for _, listener in people)
    assert read == [{one}, {one, two}, {two}]
    desk.withdraw(people[1][0])
    result = export_votes(store, tmp_path / "out")
    assert result.path is None
    assert not (tmp_path / "out").exists()
    told = f"nothing: the store has no vote; what an earlier export left in {tmp_path / 'out'} is deleted, for its votes were withdrawn"
    assert str(result) == told
    assert str(export_votes(store, tmp_path / "out")) == "nothing: the store has no vote"


def test_a_store_is_not_made_among_other_files_nor_written_over(tmp_path, clock):
    """A store in an export, or an export over a store: either would lose what is there."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"store .*thesis is a folder that holds chapter1.txt: give a new folder"):
        VoteStore(tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.txt"]
    store = VoteStore(tmp_path / "store")
    desk = open_desk(store, clock)
    add_pair(store, "a reel")
    _, listener = join(desk)
    desk.deal(listener)
    hear_and_vote(desk, clock, listener)
    out = export_votes(store, tmp_path / "out", test_share=0).path
    with pytest.raises(ValueError, match=r"store .*out is a folder that holds README.md"):
        VoteStore(out)
    (out / "votes.db").write_bytes(b"a store that is there all the same")
    with pytest.raises(ValueError, match=r"holds votes.db beside preferences, which would be lost"):
        export_votes(store, out, test_share=0)
    assert (out / "votes.db").is_file()


def test_an_export_writes_over_nothing_else(tmp_path, clock):
    store = VoteStore(tmp_path / "store")
    open_desk(store, clock)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        export_votes(store, tmp_path / "mine")
    (tmp_path / "imported" / "data").mkdir(parents=True)
    (tmp_path / "imported" / "data" / "train.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match="preferences that no export wrote"):
        export_votes(store, tmp_path / "imported")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_no_collection_writes_over_the_export_of_another(tmp_path, clock):
    store, other = VoteStore(tmp_path / "store"), VoteStore(tmp_path / "other")
    desk = open_desk(store, clock)
    add_pair(store, "jazz")
    code, listener = join(desk)
    hear_and_vote(desk, clock, listener)
    out = export_votes(store, tmp_path / "out").path
    assert read_collection(out).collection == store.collection != other.collection
    assert not {store.salt, store.key, store.admin_token} & set((out / "collection.json").read_text().split('"'))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match="out is .*out, which holds the export of another collection: give another fol"
    ):
        export_votes(other, out)  # which has no vote
    record = json.loads((out / "collection.json").read_text())
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    (out / "collection.json").write_text(json.dumps(record | {"collection": None}))
    with pytest.raises(ValueError, match="holds the export of a collection without an id"):
        export_votes(other, out)
    (out / "collection.json").write_text(json.dumps(record))
    (tmp_path / "empty").mkdir()
    assert str(export_votes(other, tmp_path / "empty")) == "nothing: the store has no vote"
    assert (tmp_path / "empty").is_dir()
    (tmp_path / "link").symlink_to(out)
    desk.withdraw(code)
    assert export_votes(store, tmp_path / "link").removed
    assert not out.exists()


def test_votes_are_published_under_what_was_agreed_to(tmp_path, clock):
    store = VoteStore(tmp_path / "store")
    listeners = {}
    for licence in ("cc-by-4.0", "cc0-1.0"):
        desk = open_desk(store, clock, licence=licence)
        add_pair(store, licence)
        _, listeners[licence] = join(desk)
        while desk.deal(listeners[licence]):
            hear_and_vote(desk, clock, listeners[licence])
    with pytest.raises(ValueError, match="agreed to cc-by-4.0, cc0-1.0: name one"):
        export_votes(store, tmp_path / "out")
    with pytest.raises(ValueError, match="licence is 'mit'"):
        export_votes(store, tmp_path / "out", licence="mit")
    out = export_votes(store, tmp_path / "out", licence="cc0-1.0", test_share=0).path
    assert {row["listener"] for row in table(out)} == {listeners["cc0-1.0"]}
    assert check_card(preference_card(out, "me/votes"), "dataset")["license"] == "cc0-1.0"


def test_no_number_that_a_page_sends_keeps_the_votes_from_being_exported(tmp_path, clock):
    """float32 has no room for it; a store may hold it from before it was looked at."""
    store = VoteStore(tmp_path / "store")
    desk = open_desk(store, clock)
    add_pair(store, "jazz")
    _, listener = join(desk)
    deal = desk.deal(listener)
    clock.now += 10
    assert desk.vote(listener, deal.token, Answer("a", 1e39, 1e300))
    (row,) = table(export_votes(store, tmp_path / "out", test_share=0).path)
    assert row["seconds_chosen"] == row["seconds_rejected"] == LONGEST_HEARD_S
    with store.write() as connection:
        connection.execute(tables.votes.update().values(seconds_a=1e39))
    (row,) = table(export_votes(store, tmp_path / "out", test_share=0).path)
    assert row["seconds_chosen"] == LONGEST_HEARD_S


def test_votes_that_are_withdrawn_leave_the_export_of_their_licence(tmp_path, clock):
    store, codes = VoteStore(tmp_path / "store"), {}
    for licence in ("cc-by-4.0", "cc0-1.0"):
        desk = open_desk(store, clock, licence=licence)
        add_pair(store, licence)
        codes[licence], listener = join(desk)
        while desk.deal(listener):
            hear_and_vote(desk, clock, listener)
    out = export_votes(store, tmp_path / "out", licence="cc-by-4.0", test_share=0).path
    desk.withdraw(codes["cc-by-4.0"])
    assert export_votes(store, tmp_path / "out", licence="cc-by-4.0", test_share=0).removed
    assert not out.exists()


def test_the_protocol_is_that_of_the_votes_and_not_of_the_last_opening(tmp_path, clock):
    store = VoteStore(tmp_path / "store")
    desk = open_desk(store, clock, min_seconds=0.5)
    add_pair(store, "jazz")
    hear_and_vote(desk, clock, join(desk)[1])
    clock.now += 10
    desk = open_desk(store, clock, min_seconds=1.0, raters=7)
    protocol = read_collection(export_votes(store, tmp_path / "one", test_share=0).path).protocol
    assert (protocol["min_seconds"], protocol["raters"]) == (0.5, 3)
    assert "licence" not in protocol
    add_pair(store, "blues")
    clock.now += 10
    hear_and_vote(desk, clock, join(desk)[1])
    out = export_votes(store, tmp_path / "two", test_share=0).path
    assert read_collection(out).protocol["min_seconds"] == [0.5, 1.0]
    assert check_card(preference_card(out, "me/votes"), "dataset")
    open_desk(store, clock, min_seconds=1.0, raters=7)  # once more under the same rules
    with store.read() as connection:
        assert len(rules_held(connection)) == 2


def test_the_ratings_of_a_study_are_exported_and_evaluated(store, clock, tmp_path):
    desk = open_desk(store, clock, study=True, raters=9, votes_per_minute=1000)
    for number in range(10):
        add_pair(store, f"prompt {number}")
    add_pair(store, "check", kind="identical")
    scores = {}  # model -> what it got
    for place in range(4):
        _, listener = join(desk)
        while (deal := desk.deal(listener)) is not None:
            clock.now += 10
            number = sum(map(ord, deal.prompt))
            a, b = number % 5 + 1, (number // 5 + place) % 5 + 1
            with store.read() as connection:
                wanted = tables.deals.c.id == deal.token.partition(".")[0]
                swapped = connection.scalar(select(tables.deals.c.swapped).where(wanted))
            if deal.prompt != "check":
                for model, score in zip("yx" if swapped else "xy", (a, b)):
                    scores.setdefault(model, []).append(score)
            desk.vote(listener, deal.token, Answer.rated(a, b, 2.0, 2.0))
    out = export_votes(store, tmp_path / "out", test_share=0.3).path
    rows = [row for split in ("train", "test") for row in table(out, split)]
    kept = {}
    for row in rows:
        for side in ("chosen", "rejected"):
            kept.setdefault(row[f"{side}_model"], []).append(row[f"score_{side}"])
        assert row["score_chosen"] >= row["score_rejected"]
        assert (row["score_chosen"] == row["score_rejected"]) == (row["preference"] == "tie")
    assert {model: sorted(own) for model, own in kept.items()} == {model: sorted(own) for model, own in scores.items()}
    assert "`score_chosen`" in preference_card(out, "me/votes")

    assert main(["evaluate", "--votes", str(out), "--out", str(tmp_path / "counted")]) == 0
    result = json.loads((tmp_path / "counted" / "results.json").read_text())
    assert {score["model"]: score["mean"] for score in result["mos"]} == {
        model: pytest.approx(sum(own) / len(own)) for model, own in scores.items()
    }
    assert all(0 <= rate["wilcoxon_p"] <= 1 for rate in result["win_rates"])
    page = (tmp_path / "counted" / "index.html").read_text()
    assert "Mean opinion score, 1 (bad) to 5 (excellent)" in page
    alphas = read_collection(out).agreement
    assert result["agreement"]["krippendorff_alpha"] == alphas
    assert f"{alphas['preferences']:.3f} of the preferences, {alphas['ratings']:.3f} of the ratings" in page
    assert "Attention was not checked." in page
    assert "Wilcoxon" in page


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """A store that simulated listeners filled from the command line, with a model that a reward can start from."""
    root = tmp_path_factory.mktemp("rehearsal")
    tiny_generator(seed=0).save_pretrained(root / "x")
    tiny_generator(seed=1).save_pretrained(root / "y")
    (root / "prompts.txt").write_text("slow piano\nfast drums\nsad violin\nhappy flute\n")
    words = ["collect", "--model", f"{root}/x", "--against", f"{root}/y", "--prompts", f"{root}/prompts.txt"]
    words += ["--simulate", "4", "--pairs", "8", "--duration_s", "0.5", "--guidance_scale", "1", "--check_every", "4"]
    assert main([*words, "--seed", "1", "--store", f"{root}/store"]) == 0
    return root


def test_a_rehearsal_from_the_command_line_trains_a_reward(rehearsal, tmp_path, capsys):
    assert main(["export", "--store", f"{rehearsal}/store", "--out", f"{tmp_path}/out", "--test_share", "0"]) == 0
    alpha = read_collection(tmp_path / "out").agreement["preferences"]
    assert capsys.readouterr().out == (
        f"Wrote {tmp_path}/out: 24 rows (train)\n"
        f"Agreement: Krippendorff's alpha is {alpha:.3f} of the preferences (pairs with two votes or more: 8).\n"
        "No test split: `test_share` is 0.\n"
    )
    rows = table(tmp_path / "out")
    assert {(row["source"], row["listener"][:9]) for row in rows} == {("simulated", "simulated")}
    card = preference_card(tmp_path / "out", "me/votes")
    assert "**4 of the listeners are simulated**" in card
    ranking = evaluate_votes(tmp_path / "out", tmp_path / "counted")
    assert set(ranking["models"]) == {"x", "y"}
    assert ranking["votes"] == 24
    job = RewardJob(
        preferences=f"{tmp_path}/out",
        output_dir=f"{tmp_path}/reward",
        model=f"{rehearsal}/x",
        max_steps=1,
        per_device_train_batch_size=4,
        test_share=0.4,
    )
    run_reward(job)
    assert (tmp_path / "reward" / "model.safetensors").is_file()


def test_a_rehearsal_tells_whom_it_had_no_pair_for(rehearsal, tmp_path, capsys):
    words = ["collect", "--model", f"{rehearsal}/x", "--prompts", f"{rehearsal}/prompts.txt", "--duration_s", "0.5"]
    words += ["--guidance_scale", "1", "--check_every", "0", "--store", f"{tmp_path}/store", "--simulate", "7"]
    assert main([*words, "--pairs", "2", "--raters", "2"]) == 0  # 2 pairs for 2 listeners each: 4 votes
    told = capsys.readouterr().out
    assert "Wrote 4 votes of 4 simulated listeners to" in told
    assert "nothing was left for 3 of the 7: `raters` is 2 listeners a pair, so give a larger --raters, or more" in told
    assert main([*words, "--pairs", "2", "--raters", "7"]) == 0
    told = capsys.readouterr().out
    assert "votes of 7 simulated listeners" in told
    assert "nothing was left" not in told


@pytest.mark.parametrize(
    ("answers", "test_share", "expected"),
    [
        ("ab ab", 0.1, "not known, as no two listeners voted on one pair"),
        ("aa aa", 0.0, "not defined, as all chose the same (pairs with two votes or more: 2)"),
    ],
)
def test_an_export_says_how_far_listeners_agree_and_why_nothing_is_held_out(
    tmp_path, clock, answers, test_share, expected
):
    store = VoteStore(tmp_path / "store")
    shared = "aa" in answers
    desk = open_desk(store, clock, raters=2 if shared else 1)
    for number in range(2):
        add_pair(store, f"prompt {number}")
    for _ in range(2 if shared else 1):
        listener = join(desk)[1]
        for _ in range(2):
            vote_in_order(desk, clock, listener, "a", swapped=False)
    lines = str(export_votes(store, tmp_path / "out", test_share=test_share)).splitlines()
    assert len(lines) == 3
    assert expected in lines[1]
    if test_share:
        assert lines[2].startswith(
            "No test split: `test_share` is 0.1, by a hash of each prompt, and all of the 2 fell"
        )
    else:
        assert lines[2] == "No test split: `test_share` is 0."


def test_a_store_that_is_not_there_is_named_and_not_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("no database\n" * 100)
    with closing(sqlite3.connect("other.db")) as other:
        other.execute("create table songs (name text)")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for store, complaint in {
        "sqlite:///missing.db": "`store`: there is no file missing.db; give the --store",
        "collected": "`store`: there is no file collected/votes.db; give the --store",
        "sqlite:///other.db": "`store` is sqlite:///other.db, a database that holds no votes",
        "sqlite:///notes.txt": "store sqlite:///notes.txt cannot be read (file is not a database)",
    }.items():
        assert main(["export", "--store", store, "--out", "out"]) == 2
        assert complaint in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_clips_of_a_store_have_to_be_there(place, tmp_path):
    where, _ = place
    VoteStore(*place).close()
    with pytest.raises(FileNotFoundError, match="`clips`: there is no folder .*nowhere; give"):
        VoteStore(where, tmp_path / "nowhere", create=False)
    assert not (tmp_path / "nowhere").exists()
    VoteStore(*place, create=False).close()


def test_a_database_without_votes_is_refused_and_left_empty(place):
    where, clip_folder = place
    with pytest.raises((ValueError, FileNotFoundError), match="holds no votes of a listening page|there is no file"):
        VoteStore(where, clip_folder, create=False)
    store = VoteStore(*place)  # it was left as it was: a new store can be made there
    with store.read() as connection:
        assert connection.execute(select(tables.votes)).all() == []
    store.close()


CLIENT = "import sys; from musicrl_hf.cli import main; sys.exit(main(sys.argv[1:]))"


def run_client(hub, folder, *words):
    command = [sys.executable, "-c", CLIENT, *map(str, words)]
    environment = hub.environment(folder / "hf")
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def test_votes_are_pushed_replaced_and_withdrawn(rehearsal, tmp_path, clock):
    shutil.copytree(rehearsal / "store", tmp_path / "store")
    words = ["export", "--store", "store", "--out", "out", "--push", "tester/votes", "--test_share", 0]
    with HubStandIn() as hub:
        first = run_client(hub, tmp_path, *words)
        assert first.returncode == 0, first.stderr[-2000:]
        assert "24 rows (train); pushed to http" in first.stdout
        sent = hub.files("dataset", "tester/votes")
        (name,) = (path for path in sent if path.endswith(".parquet"))
        assert sent[name] == (tmp_path / "out" / name).read_bytes()
        assert json.loads(sent["collection.json"])["simulated_listeners"] == 4
        assert check_card(sent["README.md"].decode(), "dataset")["license"] == "cc-by-4.0"
        load = "import datasets, sys; print(len(datasets.load_dataset('tester/votes', split='train')))"
        read = subprocess.run(
            [sys.executable, "-c", load],
            env=hub.environment(tmp_path / "hf2"),
            capture_output=True,
            text=True,
            check=True,
        )
        assert read.stdout == "24\n"

        store = VoteStore(tmp_path / "store")
        desk = open_desk(store, clock, raters=9)
        _, listener = join(desk)
        hear_and_vote(desk, clock, listener)
        assert "25 rows" in run_client(hub, tmp_path, *words).stdout
        (newer,) = (path for path in hub.files("dataset", "tester/votes") if path.endswith(".parquet"))
        assert newer != name  # one file, under another name

        before = hub.files("dataset", "tester/votes")
        VoteStore(tmp_path / "other").close()
        foreign = run_client(hub, tmp_path, *words[:2], "other", "--out", "new", *words[5:])
        assert foreign.returncode == 2
        assert "push is tester/votes, which holds the export of another collection: give another name" in foreign.stderr
        assert hub.files("dataset", "tester/votes") == before
        assert not (tmp_path / "new").exists()

        with store.write() as connection:
            connection.execute(tables.votes.delete())
        gone = run_client(hub, tmp_path, *words)
        assert "Wrote nothing" in gone.stdout
        assert "pushed to http" in gone.stdout
        assert set(hub.files("dataset", "tester/votes")) - {".gitattributes"} == {"README.md"}
        assert b"holds no rows" in hub.files("dataset", "tester/votes")["README.md"]
        assert not (tmp_path / "out").exists()
        before = len(hub.repositories["dataset", "tester/votes"].branches["main"])
        assert "pushed" not in run_client(hub, tmp_path, *words).stdout  # there is nothing left to delete
        assert len(hub.repositories["dataset", "tester/votes"].branches["main"]) == before
        again = run_client(hub, tmp_path, *words[:6], "tester/never")
        assert again.returncode == 0, again.stderr[-2000:]
        assert ("dataset", "tester/never") not in hub.repositories


def test_without_the_extra_one_line_says_what_to_install(tmp_path):
    (tmp_path / "p.txt").write_text("jazz\n")
    code = "import sys; sys.modules['sqlalchemy'] = None; " + CLIENT
    for words in (["collect", "--prompts", "p.txt", "--simulate", "1"], ["export", "--out", "o"]):
        run = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 2
        assert run.stderr == (
            'musicrl: error: sqlalchemy not installed: collecting votes needs `pip install "musicrl-hf[collect]"`.\n'
        )
    assert {path.name for path in tmp_path.iterdir()} == {"p.txt"}
