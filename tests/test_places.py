"""What a folder holds, and whether a Hub id leads anywhere: told before anything is loaded or written."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest
import torch
from hub_stand_in import HubStandIn
from safetensors.torch import save_file
from tiny import tiny_clap, tiny_generator

from musicrl_hf.generator import MusicRLForConditionalGeneration, load_generator
from musicrl_hf.places import alone_in, check_output, contents_of, find_model, weights_of
from musicrl_hf.rewards import load_reward
from musicrl_hf.rewards.preference import PreferenceModel


def folder_with(path, **files):
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places") / "reward"
    PreferenceModel.from_clap(*tiny_clap()).save_pretrained(folder)
    return folder


def test_a_folder_says_what_it_holds(tmp_path, reward_folder):
    assert contents_of(tmp_path / "none") is None
    assert contents_of(tmp_path) is None
    assert contents_of(reward_folder) == "a preference reward"
    assert contents_of(folder_with(tmp_path / "g", config__json={"model_type": "musicgen"})) == "a generator"
    assert contents_of(folder_with(tmp_path / "a", adapter_config__json={})) == "an adapter"
    assert contents_of(folder_with(tmp_path / "x", config__json={"model_type": "bert"})).endswith("model_type 'bert'")
    assert contents_of(folder_with(tmp_path / "c", pairs__csv="")) == "clips with their table"
    folder_with(tmp_path / "run/checkpoint-10", config__json={"model_type": "musicgen"})
    assert contents_of(tmp_path / "run") == "checkpoints of a generator"
    (tmp_path / "votes/data").mkdir(parents=True)
    (tmp_path / "votes/data/train.parquet").write_bytes(b"")
    assert contents_of(tmp_path / "votes") == "preferences"


def test_a_folder_of_another_kind_is_not_written_into(tmp_path, reward_folder):
    for own in (reward_folder, tmp_path, tmp_path / "none"):
        check_output(own, "a preference reward")
    with pytest.raises(
        ValueError, match=r"`out` = '.*reward' holds a preference reward, and .* writes a generator: give"
    ):
        check_output(reward_folder, "a generator", "out")
    folder_with(tmp_path / "run/checkpoint-10", config__json={"model_type": "musicgen"})
    check_output(tmp_path / "run", "a generator")
    with pytest.raises(ValueError, match="holds checkpoints of a generator"):
        check_output(tmp_path / "run", "a preference reward")
    with pytest.raises(ValueError, match="is a file"):
        check_output(reward_folder / "config.json", "a generator")


def test_a_reward_is_no_generator_and_the_message_says_how_to_use_it(tmp_path, reward_folder):
    for load in (MusicRLForConditionalGeneration.from_pretrained, load_generator):
        with pytest.raises(ValueError, match="model_type 'musicrl_preference'.*preference:FOLDER"):
            load(reward_folder)
    with pytest.raises(FileNotFoundError, match="holds no config.json, not a generator"):
        load_generator(tmp_path)
    generator = tiny_generator()
    generator.save_pretrained(tmp_path / "generator")
    with pytest.raises(ValueError, match="`reward` = .*holds a generator.*not a preference reward"):
        load_reward(f"preference:{tmp_path / 'generator'}")
    assert find_model(tmp_path / "generator", "musicgen") == str(tmp_path / "generator")


def test_weights_are_told_from_others_below_an_adapter_too(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tiny_generator().save_pretrained(first)
    torch.manual_seed(1)
    model = tiny_generator()
    torch.nn.init.normal_(model.decoder.lm_heads[0].weight)
    model.save_pretrained(second)
    adapter = folder_with(tmp_path / "adapter", adapter_config__json={"base_model_name_or_path": str(first)})
    save_file({"lora_A.weight": torch.ones(1)}, adapter / "adapter_model.safetensors")
    before = weights_of(adapter)
    assert len({weights_of(folder) for folder in (first, second)} | {before}) == 3
    (first / "README.md").write_text("no weights")
    assert weights_of(adapter) == before
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(second)}))
    assert weights_of(adapter) != before
    with pytest.raises(FileNotFoundError, match="'no/such' was not downloaded"):
        weights_of("no/such")


def test_offline_is_told_at_once():
    with pytest.raises(FileNotFoundError, match=r"`model` = 'nosuch/model': .*HF_HUB_OFFLINE.*musicrl-tiny.*unset"):
        find_model("nosuch/model", "musicgen", "model")
    with pytest.raises(ValueError, match="`model` = 'no such' is neither an existing folder nor a Hub id"):
        find_model("no such", "musicgen", "model")


ASK = """
from musicrl_hf.places import check_hub
for name in ("runs/votes", "runs/a/votes"):
    try:
        check_hub(name, "dataset", "preferences", "make it", cached=False)
    except FileNotFoundError as error:
        print(error)
check_hub("org/was-downloaded", "model", "model", "make it", cached=True)
"""


def test_the_hub_is_asked_once(tmp_path):
    """A server that hangs up on everyone counts who comes; one that answers says that there is no such data set."""
    with HubStandIn() as hub:
        environment = hub.environment(tmp_path, token=None)
        run = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=300)
        assert hub.requests == [f"401 GET /api/{path}" for path in ("datasets/runs/votes", "models/org/was-downloaded")]
    assert run.stdout.splitlines() == [
        "`preferences` = 'runs/votes': there is no folder runs/votes here, and the Hub has no data set of this name; make "
        "it, or check the spelling and, for a private one, `hf auth login`.",
        "`preferences` = 'runs/a/votes': there is no folder runs/a/votes; make it.",
    ]
    calls = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                calls.append(1)
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        run = subprocess.run([sys.executable, "-c", ASK], env=environment, capture_output=True, text=True, timeout=300)
    assert "there is no folder runs/votes here, and the Hub could not be reached" in run.stdout, run.stderr
    assert "check the network" in run.stdout
    assert len(calls) == 2  # one for each name that can be a Hub id


@pytest.mark.skipif(os.name != "posix", reason="locks of files are POSIX's")
def test_a_folder_where_another_process_is_at_work_is_left_to_it(tmp_path):
    waits = "import sys; from musicrl_hf.places import alone_in\nwith alone_in(sys.argv[1]): print('in', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", waits, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with (
            pytest.raises(ValueError, match="`output_dir` = .* another command is at work there"),
            alone_in(tmp_path / "out"),
        ):
            pytest.fail("both are there")
        other.kill()
    with alone_in(tmp_path / "out"):  # whatever way it ended
        assert not [*(tmp_path / "out").iterdir()]


def test_a_folder_for_nothing_is_gone_again(tmp_path):
    def refuse(folder, leaves):
        with alone_in(folder):
            if leaves:
                (folder / "settings.json").write_text("{}")
            raise ValueError("the input is at fault")

    (tmp_path / "before").mkdir()
    for name, leaves in (("before", False), ("new", False), ("begun", True)):
        with pytest.raises(ValueError, match="at fault"):
            refuse(tmp_path / name, leaves)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "begun"]
