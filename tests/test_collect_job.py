"""How `musicrl collect` starts, or does not: then it has made nothing, and says in the user's words what is wrong."""

import shutil
import socket
from contextlib import closing
from functools import partial

import pytest
import torch
from sqlalchemy import select
from stores import add_pair, hear_and_vote, join, open_desk
from tiny import tiny_generator
from tqdm.auto import tqdm

from musicrl_hf.cli import main
from musicrl_hf.collect.export import export_votes
from musicrl_hf.collect.job import CollectJob, run_collect
from musicrl_hf.collect.store import VoteStore
from musicrl_hf.collect.tables import deals, pairs, votes
from musicrl_hf.preferences import load_preferences
from musicrl_hf.rewards.preference import PreferenceModel


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_generator().save_pretrained(root / "x")
    tiny_generator(sampling_rate=800).save_pretrained(root / "faster")
    PreferenceModel.from_generator(tiny_generator()).save_pretrained(root / "reward")
    return root


def refusal(capsys, *words) -> str:
    assert main(["collect", *map(str, words)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--model", "{m}/x", "--against", "no/such"], "`against` = 'no/such': there is no folder no/such here"),
        (["--model", "no/such"], "`model` = 'no/such'"),
        (["--model", "{m}/reward"], "`model` = '{m}/reward' holds a preference reward"),
        (["--model", "{m}/x", "--against", "{m}/x"], "model and against is {m}/x, {m}/x: 'x' is there twice"),
        (["--model", "{m}/x", "--against", "{m}/faster"], "models differ in (Hz, channels)"),
        (["--model", "{m}/x", "--prompts", "none.txt"], "there is no file none.txt"),
        (["--model", "{m}/x", "--guidance_scale", "0.5"], "`guidance_scale` must be at least 1"),
        (["--model", "{m}/x", "--device", "abacus"], "abacus"),
        (["--model", "{m}/x", "--every", "10m", "--out", "{m}/x"], "folder {m}/x holds a generator"),
        (["--model", "{m}/x", "--every", "10m", "--out", "o", "--push", "votes"], "`push` is 'votes'"),
        (["--model", "{m}/x", "--store", "postgresql://me:secret@127.0.0.1:1/v", "--clips", "c"], "v was not reached"),
    ],
)
@pytest.mark.parametrize("simulate", [False, True])
def test_a_start_that_fails_leaves_nothing(models, words, complaint, simulate, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [word.format(m=models) for word in words]
    if simulate and "--every" not in words:
        words += ["--simulate", "2"]
    told = refusal(capsys, *words, "--port", "0")
    assert complaint.format(m=models) in told
    assert "name_or_path" not in told
    assert "secret" not in told
    assert list(tmp_path.iterdir()) == []


def test_a_taken_port_leaves_nothing(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = refusal(capsys, "--model", models / "x", "--port", taken.getsockname()[1])
    assert "`host` and `port` are 127.0.0.1 and" in told
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_name_is_offered_the_bundled_generators_alone(models, capsys):
    told = refusal(capsys, "--model", models / "x", "--against", "musicrl-tyni")
    assert "`against` = 'musicrl-tyni' is neither" in told
    assert "(musicrl-tiny, musicrl-tiny-r, musicrl-tiny-u, musicrl-tiny-ru)" in told


def test_exports_in_turn_of_several_licences_are_refused_once(models, clock, tmp_path, capsys):
    store = VoteStore(tmp_path / "store")
    desk = open_desk(store, clock, licence="cc0-1.0")
    add_pair(store, "jazz")
    hear_and_vote(desk, clock, join(desk)[1])
    store.close()
    words = ["--model", models / "x", "--store", tmp_path / "store", "--port", 0, "--every", "10m"]
    told = refusal(capsys, *words, "--out", tmp_path / "out")
    assert f"the store {tmp_path / 'store'} holds votes under cc0-1.0, and this page asks for cc-by-4.0" in told
    assert "export each with `musicrl export --licence`" in told
    assert not (tmp_path / "out").exists()
    store = VoteStore(tmp_path / "store")
    with store.read() as connection:  # the rules of those votes, which their card shows, are as they were
        rules = connection.exec_driver_sql("select value from settings where name = 'rules'").scalar_one()
    assert '"licence": "cc0-1.0"' in rules
    store.close()


def test_exports_in_turn_over_those_of_another_collection_are_refused_at_once(models, clock, tmp_path, capsys):
    store = VoteStore(tmp_path / "store")
    desk = open_desk(store, clock)
    add_pair(store, "jazz")
    hear_and_vote(desk, clock, join(desk)[1])
    out = export_votes(store, tmp_path / "out").path
    store.close()
    words = ["--model", models / "x", "--store", tmp_path / "other", "--port", 0, "--every", "10m", "--out", out]
    assert f"out is {out}, which holds the export of another collection" in refusal(capsys, *words)
    assert load_preferences(out).num_rows == 1


def test_messages_call_the_store_as_it_was_given(models, clock, tmp_path, capsys):
    words = ["--model", models / "x", "--store", tmp_path / "s", "--simulate", 2, "--pairs", 1, "--duration_s", 0.5]
    assert main(["collect", *map(str, words), "--guidance_scale", "1"]) == 0
    assert f"simulated listeners to {tmp_path / 's'}\n" in capsys.readouterr().out
    told = refusal(capsys, *words[:6], "--study", "--against", f"y={models / 'x'}")
    assert f"the store {tmp_path / 's'} holds votes that were no ratings" in told


def test_a_store_that_goes_on_says_what_it_holds(models, tmp_path, monkeypatch, capsys):
    """Two rehearsals in one store, the second with other rules: nobody mixes collections unawares."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a reel\na jig\n")
    words = ["collect", "--model", str(models / "x"), "--prompts", "prompts.txt", "--store", "s", "--duration_s", "0.5"]
    assert main([*words, "--simulate", "2", "--check_every", "0"]) == 0
    assert "holds" not in capsys.readouterr().out
    with closing(VoteStore("s")) as store, store.read() as connection:
        given = len(connection.execute(select(votes)).all())
    assert given > 0
    assert main([*words, "--simulate", "2", "--seed", "5", "--check_every", "0", "--deal_hours", "7"]) == 0
    told = f"The store s holds {given} votes already, {given} of them simulated, on clips of x; other deal_hours than then."
    assert told in capsys.readouterr().out


def test_a_rehearsal_ends_though_no_bar_counts(models, tmp_path, monkeypatch):
    """As with TQDM_DISABLE=1."""
    monkeypatch.setattr("tqdm.auto.tqdm", partial(tqdm, disable=True))
    (tmp_path / "p.txt").write_text("slow piano\nfast drums\n")
    options = {"prompts": str(tmp_path / "p.txt"), "store": str(tmp_path / "store"), "duration_s": 0.5}
    told = run_collect(
        CollectJob(model=str(models / "x"), simulate=2, min_seconds=0.0, check_every=0, seed=0, **options)
    )
    assert told.startswith("4 votes of 2 simulated listeners")


def test_a_rehearsal_is_the_same_with_the_same_seed(models, tmp_path):
    (tmp_path / "p.txt").write_text("slow piano\nfast drums\nsad air\nhappy reel\n")
    heard = []
    for name in ("one", "two"):
        options = {"prompts": str(tmp_path / "p.txt"), "store": str(tmp_path / name), "duration_s": 0.5}
        run_collect(CollectJob(model=str(models / "x"), simulate=3, min_seconds=0.0, check_every=0, seed=5, **options))
        store = VoteStore(tmp_path / name)
        with store.read() as connection:
            joined = votes.join(deals, votes.c.deal == deals.c.id).join(pairs, votes.c.pair == pairs.c.id)
            columns = (votes.c.listener, pairs.c.prompt, deals.c.swapped, votes.c.preference)
            heard.append([tuple(row) for row in connection.execute(select(*columns).select_from(joined))])
        store.close()
    assert sorted(heard[0]) == sorted(heard[1])
    assert len(heard[0]) == 12


def test_one_name_is_not_for_two_weights(tmp_path, capsys):
    """Tuned once more and compared under the old name, votes would be of two generators in one row of a leaderboard."""
    model, other = tiny_generator(), tmp_path / "other"
    model.save_pretrained(tmp_path / "x")
    words = ["--store", tmp_path / "s", "--simulate", 1, "--pairs", 1, "--duration_s", 0.5, "--model"]
    assert main(["collect", *map(str, words), str(tmp_path / "x")]) == 0
    torch.nn.init.normal_(model.decoder.lm_heads[0].weight)
    model.save_pretrained(other)
    shutil.copytree(other, tmp_path / "x", dirs_exist_ok=True)
    with closing(VoteStore(tmp_path / "s")) as store, store.read() as connection:
        there = connection.execute(select(pairs)).all()
    told = refusal(capsys, *words, tmp_path / "x")
    assert f"the store {tmp_path / 's'} has clips of other weights under the name 'x': give these a name" in told
    assert f"as in another={tmp_path / 'x'}, or another --store" in told
    with closing(VoteStore(tmp_path / "s")) as store, store.read() as connection:
        assert connection.execute(select(pairs)).all() == there
    assert main(["collect", *map(str, words), f"another={tmp_path / 'x'}"]) == 0


def test_a_store_says_which_pairs_are_dealt_first(models, tmp_path, capsys):
    """Those that an earlier start made and nobody heard, whatever their prompts."""
    with closing(VoteStore(tmp_path / "s")) as store:
        add_pair(store, "jazz")
        add_pair(store, "pop", kind="identical")
    words = ["--model", models / "x", "--store", tmp_path / "s", "--simulate", 1, "--pairs", 1, "--duration_s", 0.5]
    assert main(["collect", *map(str, words)]) == 0
    told = f"The store {tmp_path / 's'} holds no vote yet. Pairs of clips of x, y that nobody has heard are dealt first, 1 of them: "
    assert told in capsys.readouterr().out
