"""Cards, what a push would send, and whole pushes against a stand-in for the Hub.

The stand-in (`hub_stand_in.py`) proves that our calls speak the protocol of the installed `huggingface_hub`, and how we
behave when the answer is no. It cannot prove that the Hub itself accepts a push. Clients run in processes of their own:
`huggingface_hub` reads its endpoint and the offline switch when it is imported.
"""

import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from tiny import tiny_clap, tiny_generator

from musicrl_hf.audio import audio_bytes, write_audio
from musicrl_hf.bundled import CHECKPOINTS
from musicrl_hf.cards import check_card, kind_of, model_card, preference_card, python_blocks
from musicrl_hf.hub import check_sign_in, prepare_model, prepare_preferences, push_model
from musicrl_hf.licences import LICENCES, choose_licence, licence_of_sources
from musicrl_hf.preferences.schema import preferences_from_rows, save_preferences
from musicrl_hf.records import ImportRecord, Record, base_of, origin_of, read_import, read_record, write_record
from musicrl_hf.rewards import PreferenceModel, QualityModel

TESTS = Path(__file__).parent
SAMPLING_RATE = 400  # Hz


def clip(seed: int) -> bytes:
    noise = torch.randn(1, SAMPLING_RATE, generator=torch.Generator().manual_seed(seed)) / 10
    return audio_bytes(noise, SAMPLING_RATE, "flac")


def preference_rows(labels: list[str], source: str = "own") -> list[dict]:
    return [
        {
            "prompt": f"a slow reel {number // 2}",
            "chosen": clip(2 * number),
            "rejected": clip(2 * number + 1),
            "chosen_model": "model-x",
            "rejected_model": "model-y",
            "preference": label,
            "listener": "simulated-1" if number == 0 else f"listener{number}",
            "source": source,
            "created_at": "2026-01-01T00:00:00Z",
        }
        for number, label in enumerate(labels)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A generator, an adapter on it, two rewards and preferences, saved as a user would save them."""
    root = tmp_path_factory.mktemp("saved")
    generator = tiny_generator()
    generator.save_pretrained(root / "generator")
    adapter = get_peft_model(tiny_generator(), LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5)
    adapter.base_model.model.config._name_or_path = str(root / "generator")
    for config in adapter.peft_config.values():
        config.base_model_name_or_path = str(root / "generator")
    adapter.save_pretrained(root / "adapter")
    clap, tokenizer, extractor = tiny_clap()
    for part in (clap, tokenizer, extractor):
        part.save_pretrained(root / "adherence")
    QualityModel.from_clap(clap, extractor).save_pretrained(root / "quality")
    PreferenceModel.from_generator(generator).save_pretrained(root / "preference")
    save_preferences(preferences_from_rows(preference_rows(["a", "b", "tie", "a", "both_bad"])), root / "preferences")
    return root


# -- cards -----------------------------------------------------------------------------------------------------------


def test_the_card_of_a_generator_is_this_page(folders, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(folders / "generator", folder)
    record = Record(
        base_model="facebook/musicgen-small",
        method="DPO",
        datasets=["me/votes"],
        training_data="Prompts: 200 captions (CC-BY-4.0).",
        metrics={"win rate": {"against the base": 0.61234, "ties": 3}},
        config={"learning_rate": 1e-5, "preferences": "/home/me/votes"},
        limits=["Only accordions."],
        command="musicrl dpo --config /home/me/dpo.yaml",
        hardware="one CPU core",
        date="2026-01-01",
        seconds=61.7,
    )
    write_record(folder, record)
    card = model_card(folder, "me/tuned")
    parameters = sum(value.size for value in load_file(folder / "model.safetensors").values())
    parts = {}
    for name, value in load_file(folder / "model.safetensors").items():
        parts[name.split(".")[0]] = parts.get(name.split(".")[0], 0) + value.size
    by_part = ", ".join(f"{name} {parts[name]:,}" for name in sorted(parts))
    expected = (TESTS / "data" / "generator_card.md").read_text()
    assert card == expected.replace("@PARAMETERS@", f"{parameters:,}").replace("@PARTS@", by_part)
    assert check_card(card)["license"] == "cc-by-nc-4.0"


def test_a_card_says_where_nothing_was_recorded(folders):
    card = model_card(folders / "generator", "me/tuned", license="mit")
    assert "recorded no training data" in card
    assert "No measurement was recorded" in card
    data = check_card(card)
    assert data["license"] == "mit"
    assert data["pipeline_tag"] == "text-to-audio"
    assert data["library_name"] == "transformers"
    assert data["language"] == "en"
    assert "base_model" not in data


@pytest.mark.parametrize(
    ("kind", "library"), [("adherence", "transformers"), ("quality", "musicrl_hf"), ("preference", "musicrl_hf")]
)
def test_the_card_of_a_reward(folders, kind, library):
    card = model_card(folders / kind, "me/reward", license="apache-2.0")
    data = check_card(card)
    assert data["library_name"] == library
    assert {"reward-model", kind} <= set(data["tags"])
    assert f'load_reward("{kind}:me/reward")' in card


def test_the_card_of_an_adapter_names_its_base(folders):
    data = check_card(model_card(folders / "adapter", "me/adapter", base_model="facebook/musicgen-medium"))
    assert data["base_model"] == "facebook/musicgen-medium"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert data["license"] == "cc-by-nc-4.0"


def test_the_card_of_preferences_counts_its_rows(folders):
    card = preference_card(folders / "preferences", "me/votes", license="cc-by-4.0")
    data = check_card(card, "dataset")
    (file,) = (folders / "preferences" / "data").iterdir()  # its name holds a hash of its content
    assert data["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": [f"data/{file.name}"]}]}
    ]
    assert data["size_categories"] == ["n<1K"]
    # labels a, b, tie, a, both_bad; two rows a prompt; the first listener is a rule
    for line in [
        "rows | 5",
        "with a winner | 3",
        "ties | 1",
        "both bad | 1",
        "prompts | 3",
        "listeners | 5",
        "listeners who are simulated | 1",
        "own | 5",
    ]:
        assert f"| {line} |" in card
    assert "| model-x | 5 |" in card
    assert "1 of these rows were chosen by a documented rule" in card
    assert "a reward" not in card.split("## Columns")[0]


def test_what_a_reward_chose_is_not_called_a_vote(tmp_path):
    rows = [row | {"listener": "reward:quality"} for row in preference_rows(["a", "b"])]
    save_preferences(preferences_from_rows(rows), tmp_path / "labelled")
    card = preference_card(tmp_path / "labelled", "me/labelled", license="cc-by-4.0")
    assert "human-feedback" not in check_card(card, "dataset")["tags"]
    assert "Which of two clips for one prompt a reward scored higher." in card
    assert "2 of these rows were chosen by a reward" in card
    assert "| listeners who are rewards | 1 |" in card
    assert "documented rule" not in card
    save_preferences(preferences_from_rows([*rows, *preference_rows(["b", "a"])[1:]]), tmp_path / "mixed")
    mixed = preference_card(tmp_path / "mixed", "me/mixed", license="cc-by-4.0")
    assert "human-feedback" in check_card(mixed, "dataset")["tags"]
    assert "Which of two clips for one prompt listeners chose." in mixed
    assert "**2 of the 3 rows are no votes**" in mixed


def test_a_model_learned_from_no_people_says_so(folders, tmp_path):
    shutil.copytree(folders / "generator", tmp_path / "tuned")
    judges = {"listeners": 3, "simulated": 2, "rewards": 1, "agreement": None}
    write_record(tmp_path / "tuned", Record(base_model="musicrl-tiny", method="DPO", metrics={"judged_by": judges}))
    card = model_card(tmp_path / "tuned", "me/tuned", license="mit")
    assert (
        "It was tuned on choices of 3 listeners, of whom 2 are simulated (rules on the waveform) and 1 rewards" in card
    )
    assert "| judged by, listeners | 3 |" in card
    assert "agreement" not in card, "what is not defined is not shown"
    judges |= {"simulated": 0, "rewards": 0}
    write_record(tmp_path / "tuned", Record(base_model="musicrl-tiny", method="DPO", metrics={"judged_by": judges}))
    assert "not people" not in model_card(tmp_path / "tuned", "me/tuned", license="mit")


def test_a_bundled_base_is_named_but_is_no_hub_id(folders, tmp_path):
    card = model_card(folders / "generator", "me/tuned", base_model="musicrl-tiny")
    assert "made from `musicrl-tiny`" in card
    assert "base_model" not in check_card(card)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda card: card.replace("license: mit\n", ""), "`license` is missing"),
        (lambda card: card.replace("license: mit", "license: license"), "none of"),
        (
            lambda card: card.replace("license: mit", "license: mit\nbase_model: facebook/musicgen-small"),
            "cc-by-nc-4.0",
        ),
        (lambda card: card.replace("pipeline_tag: text-to-audio\n", ""), "`pipeline_tag` is missing"),
        (lambda card: card.replace("## Limits", "## Other"), "`## Limits` is missing"),
        (lambda card: card + "[More Information Needed]", "was left in it"),
        (lambda card: card + "```python\nmusic = (\n```\n", "does not parse"),
        (lambda card: card.replace("language: en", "language: [en"), "not valid YAML"),
    ],
)
def test_an_unfit_card_is_refused_with_what_is_wrong(folders, change, complaint):
    card = model_card(folders / "generator", "me/tuned", license="mit")
    changed = change(card)
    assert changed != card
    with pytest.raises(ValueError, match=complaint):
        check_card(changed)


def test_everything_wrong_is_told_at_once():
    with pytest.raises(ValueError) as error:
        check_card("# A model\n")
    told = str(error.value)
    for name in ("license", "language", "tags", "library_name", "pipeline_tag", "How to use", "Licence", "Citation"):
        assert name in told


# -- licences and lineage ----------------------------------------------------------------------------------------------


def test_a_licence_is_asked_for_where_none_is_known(folders):
    with pytest.raises(ValueError, match="give one of apache-2.0.*, as --license NAME"):
        model_card(folders / "generator", "me/tuned")


def test_what_musicgen_forbids_stays_forbidden(folders):
    with pytest.raises(ValueError, match="use 'cc-by-nc-4.0'"):
        model_card(folders / "generator", "me/tuned", base_model="facebook/musicgen-small", license="apache-2.0")
    card = model_card(
        folders / "generator", "me/tuned", base_model="facebook/musicgen-small", license="cc-by-nc-sa-4.0"
    )
    assert "no commercial use" in card


def test_an_unknown_licence_is_refused():
    with pytest.raises(ValueError, match="'gpl' is not known here"):
        choose_licence("gpl", None, "it")
    assert all(choose_licence(name, None, "it") == name for name in LICENCES)


@pytest.mark.parametrize("given", ["cc0-1.0", "mit"])
def test_authors_who_ask_to_be_named_stay_named(given):
    with pytest.raises(ValueError, match="permits what it inherits from does not: use 'cc-by-4.0'"):
        choose_licence(given, "cc-by-4.0", "it")
    assert choose_licence("cc-by-nc-4.0", "cc-by-4.0", "it") == "cc-by-nc-4.0"


def test_a_systems_name_is_text_on_the_card(tmp_path):
    name = "# x | <img src=x>\n```python\nprint(1)\n```"
    rows = [row | {"chosen_model": name} for row in preference_rows(["a"])]
    save_preferences(preferences_from_rows(rows), tmp_path / "votes")
    card = preference_card(tmp_path / "votes", "me/votes", license="mit")
    line = next(line for line in card.splitlines() if "print(1)" in line)
    assert line == r"| # x \| \<img src=x\> \`\`\`python print(1) \`\`\` | 1 |"


def test_preferences_keep_the_licence_of_their_sources():
    assert licence_of_sources(["music-arena", "aime"]) == "cc-by-4.0"
    assert licence_of_sources(["music-arena", "cmi-pref"]) == "cc-by-nc-sa-4.0"
    assert licence_of_sources(["music-arena", "musicprefs"]) is None
    assert licence_of_sources(["own"]) is None
    assert licence_of_sources(["musiceval:quality"]) == "cc-by-nc-4.0"
    assert licence_of_sources(["musiceval:quality", "songeval:mean", "own"]) == "cc-by-nc-sa-4.0"


def test_non_commercial_votes_are_not_published_as_free_ones(tmp_path):
    save_preferences(preferences_from_rows(preference_rows(["a"], source="cmi-pref")), tmp_path / "votes")
    with pytest.raises(ValueError, match="cc-by-nc-sa-4.0"):
        preference_card(tmp_path / "votes", "me/votes", license="cc-by-4.0")
    assert check_card(preference_card(tmp_path / "votes", "me/votes"), "dataset")["license"] == "cc-by-nc-sa-4.0"
    with pytest.raises(ValueError, match="'cc-by-nc-4.0' permits what .* does not: use 'cc-by-nc-sa-4.0'"):
        preference_card(tmp_path / "votes", "me/votes", license="cc-by-nc-4.0")  # share alike


def test_votes_whose_authors_gave_no_licence_are_not_published_without_asking(tmp_path):
    rows = [
        *preference_rows(["a"], source="musicprefs:fidelity"),
        *preference_rows(["a"], source="cmi-pref:musicality"),
    ]
    save_preferences(preferences_from_rows(rows), tmp_path / "votes")
    with pytest.raises(ValueError, match="the authors of musicprefs:fidelity gave none; ask them"):
        prepare_preferences(tmp_path / "votes", "me/votes")
    with pytest.raises(ValueError, match="'cc-by-4.0' permits what"):
        prepare_preferences(tmp_path / "votes", "me/votes", license="cc-by-4.0")
    upload = prepare_preferences(tmp_path / "votes", "me/votes", license="cc-by-nc-sa-4.0")
    assert check_card(upload.card, "dataset")["license"] == "cc-by-nc-sa-4.0"


def test_an_import_is_published_with_its_source_and_what_was_left_out(tmp_path):
    record = ImportRecord(
        "music-arena", 5, 2, "2026-01-01T00:00:00+00:00", "cc-by-4.0", left_out={"clip withheld": 2, "prompt empty": 1}
    )
    save_preferences(preferences_from_rows(preference_rows(["a", "b"], "music-arena")), tmp_path / "votes", record)
    assert read_import(tmp_path / "votes") == record
    upload = prepare_preferences(tmp_path / "votes", "me/votes")
    assert {"import.json", "README.md"} < set(upload.files)
    assert check_card(upload.card, "dataset")["license"] == "cc-by-4.0"
    assert "| [music-arena](https://huggingface.co/datasets/music-arena/music-arena-dataset) | 2 |" in upload.card
    assert "by reason:\n\n| | |\n|---|---|\n| clip withheld | 2 |\n| prompt empty | 1 |\n" in upload.card
    save_preferences(preferences_from_rows(preference_rows(["a"], "music-arena")), tmp_path / "votes")
    assert read_import(tmp_path / "votes") is None, "the rows are others now"
    assert "by reason" not in preference_card(tmp_path / "votes", "me/votes")
    (tmp_path / "votes" / "import.json").write_text("[]")
    with pytest.raises(ValueError, match="import.json is no record of an import"):
        read_import(tmp_path / "votes")


def test_the_base_is_found_over_several_runs(tmp_path):
    for name, base in [("first", "facebook/musicgen-small"), ("second", str(tmp_path / "first"))]:
        (tmp_path / name).mkdir()
        write_record(tmp_path / name, Record(base_model=base))
    (tmp_path / "third").mkdir()
    adapter = {"base_model_name_or_path": str(tmp_path / "second")}
    (tmp_path / "third" / "adapter_config.json").write_text(json.dumps(adapter))
    assert base_of(tmp_path / "third") == "facebook/musicgen-small"
    assert origin_of(str(CHECKPOINTS / "musicrl-tiny")) == "musicrl-tiny"


def test_a_run_over_its_own_folder_has_no_known_base(tmp_path):
    write_record(tmp_path, Record(base_model=str(tmp_path)))
    assert base_of(tmp_path) is None


def test_a_record_comes_back_as_it_was_written(tmp_path):
    record = Record(base_model="musicrl-tiny", method="PPO", metrics={"win rate": 0.5}, seconds=3.0)
    write_record(tmp_path, record)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert read_record(tmp_path) == record
    assert read_record(tmp_path / "elsewhere") == Record()


def test_a_base_beside_the_run_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, base in [("first", "facebook/musicgen-small"), ("second", "first")]:
        Path(name).mkdir()
        write_record(name, Record(base_model=base))
    monkeypatch.chdir("/")
    assert base_of(tmp_path / "second") == "facebook/musicgen-small"


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_broken_record_is_named(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match="result.json"):
        read_record(tmp_path)


# -- what a push would send ----------------------------------------------------------------------------------------------


def test_nothing_pickled_and_no_training_state_is_sent(folders, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folders / "generator", run)
    safe = {path.name for path in run.iterdir()}
    (run / "checkpoint-5").mkdir()
    shutil.copy(run / "model.safetensors", run / "checkpoint-5")
    (run / "samples").mkdir()
    write_audio(run / "samples" / "0.wav", torch.zeros(1, 40), SAMPLING_RATE)
    unsafe = [
        "optimizer.pt",
        "training_args.bin",
        "pytorch_model.bin",
        "rng_state.pth",
        "state.pkl",
        ".env",
        "notes.py",
    ]
    for name in unsafe:
        (run / name).write_bytes(b"\x80\x04.")
    upload = prepare_model(run, "me/tuned", license="mit")
    assert set(upload.files) == safe | {"samples/0.wav", "README.md"}
    assert set(upload.left_out) == {*unsafe, "checkpoint-5/model.safetensors"}


def test_the_published_record_does_not_tell_where_files_lie(folders, tmp_path):
    shutil.copytree(folders / "generator", tmp_path / "run")
    write_record(
        tmp_path / "run", Record(config={"preferences": "/home/me/votes"}, command="musicrl dpo /home/me/a.yaml")
    )
    upload = prepare_model(tmp_path / "run", "me/tuned", license="mit")
    assert json.loads(upload.files["result.json"]) == {
        "config": {"preferences": "votes"},
        "command": "musicrl dpo a.yaml",
    }
    assert "/home/me" not in upload.card


def test_a_trainers_stub_is_replaced_and_a_persons_card_is_kept(folders, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folders / "generator", run)
    (run / "README.md").write_text("---\nlicence: license\n---\n# Model Card\nIt has been trained using [TRL](...).")
    written = prepare_model(run, "me/tuned", license="mit").card
    assert "How to use" in written
    own = written.replace("# tuned", "# My own words")
    (run / "README.md").write_text(own)
    assert prepare_model(run, "me/tuned", license="mit").card == own
    (run / "README.md").write_text("# My own words\n")
    with pytest.raises(ValueError, match="not fit to be published"):
        prepare_model(run, "me/tuned", license="mit")


def test_an_adapter_on_a_folder_of_this_computer_is_refused(folders):
    with pytest.raises(ValueError, match="publish that model first"):
        prepare_model(folders / "adapter", "me/adapter", license="mit")
    upload = prepare_model(folders / "adapter", "me/adapter", base_model="me/generator", license="mit")
    assert json.loads(upload.files["adapter_config.json"])["base_model_name_or_path"] == "me/generator"


@pytest.mark.parametrize("repo_id", ["", "name", "a/b/c", "me/--x", "me/two words"])
def test_a_wrong_repo_id_is_refused(folders, repo_id):
    with pytest.raises(ValueError, match="repo_id"):
        prepare_model(folders / "generator", repo_id, license="mit")


def test_what_cannot_be_published_is_refused(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        push_model(tmp_path / "nowhere", "me/x")
    with pytest.raises(ValueError, match="holds no config.json"):
        push_model(tmp_path, "me/x")
    with pytest.raises(ValueError, match="use push_preferences"):
        push_model(folders / "preferences", "me/x")
    with pytest.raises(ValueError, match="no data"):
        prepare_preferences(folders / "generator", "me/x", license="mit")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert'"):
        kind_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "musicgen"}')
    with pytest.raises(ValueError, match="no .safetensors"):
        push_model(tmp_path, "me/x")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="is a pickle"):
        push_model(tmp_path, "me/x")
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cut short"):
        push_model(tmp_path, "me/x")


def test_offline_is_told_in_one_line(folders):
    # the suite itself runs with HF_HUB_OFFLINE=1
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        push_model(folders / "generator", "me/tuned", license="mit")
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        check_sign_in("me/votes", token="any")


# -- against the stand-in --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as stand_in:
        yield stand_in


START = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from musicrl_hf.hub import push_model, push_preferences
folders = Path(sys.argv[1])
"""


def client(hub: HubStandIn, cache: Path, code: str, *arguments: object, token: str | None = HubStandIn.token):
    """Run code in a process that takes the stand-in for the Hub; the folder it runs in is `cache`."""
    command = [sys.executable, "-c", START + code, *map(str, arguments)]
    environment = hub.environment(cache, token)
    return subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=500)


def succeeds(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_generator_goes_there_and_back_with_its_card(hub, folders, tmp_path):
    push = 'print(push_model(folders / "generator", "tester/generator", license="mit", private=False))'
    assert "/commit/" in succeeds(client(hub, tmp_path, push, folders))
    sent = hub.files("model", "tester/generator")
    assert sent["model.safetensors"] == (folders / "generator" / "model.safetensors").read_bytes()
    card = sent["README.md"].decode()
    assert ModelCard(card).data.license == "mit"
    assert not [name for name in sent if name.endswith((".bin", ".pt", ".pkl"))]

    # stock transformers, a fresh cache: the same codes as the model here, then every block of code on the card
    load = """
from transformers import MusicgenForConditionalGeneration
from musicrl_hf import load_generator
model = load_generator("tester/generator")
codes = model.sample_codes(*model.text_inputs(["a slow reel"]), 8, do_sample=False)
print(codes.tolist())
stock = MusicgenForConditionalGeneration.from_pretrained("tester/generator")
assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), model.state_dict().values(), strict=True))
for code in sys.argv[2:]:
    exec(code, {})
"""
    blocks = python_blocks(card)
    assert len(blocks) == 2
    out = succeeds(client(hub, tmp_path, load, folders, *blocks, token=None))
    model = tiny_generator()
    expected = model.sample_codes(*model.text_inputs(["a slow reel"]), 8, do_sample=False)
    assert json.loads(out.splitlines()[0]) == expected.tolist()
    assert (tmp_path / "tune.wav").stat().st_size > 5 * SAMPLING_RATE  # 5 s of at least one byte a sample


def test_push_to_hub_of_a_model_in_memory_and_an_adapter_on_it(hub, folders, tmp_path):
    push = """
from musicrl_hf import load_generator
model = load_generator(str(folders / "generator"))
print(model.push_to_hub("tester/base", license="mit"))
push_model(folders / "adapter", "tester/adapter", base_model="tester/base", license="mit")
adapted = load_generator("tester/adapter")
here = load_generator(str(folders / "adapter"))
assert all(torch.equal(a, b) for a, b in zip(adapted.state_dict().values(), here.state_dict().values(), strict=True))
assert not all(torch.equal(a, b) for a, b in zip(adapted.state_dict().values(), model.state_dict().values(), strict=True))
from musicrl_hf.places import weights_of
load_generator("tester/base")
assert weights_of("tester/base") == weights_of(folders / "generator") != weights_of("tester/adapter")
assert weights_of("tester/adapter") == weights_of(folders / "adapter")
for code in sys.argv[2:]:
    exec(code, {})
"""
    card = prepare_model(folders / "adapter", "tester/adapter", base_model="tester/base", license="mit").card
    blocks = python_blocks(card)
    assert len(blocks) == 2
    assert "/commit/" in succeeds(client(hub, tmp_path, push, folders, *blocks))
    assert hub.files("model", "tester/adapter")["README.md"].decode() == card
    check_card(hub.files("model", "tester/base")["README.md"].decode())
    config = json.loads(hub.files("model", "tester/adapter")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tester/base"


def test_an_adapters_guidance_scale_goes_with_it(hub, folders, tmp_path):
    """There, from the cache, and with a warning where the cache has everything but that."""
    for name in ("sings", "hums"):
        shutil.copytree(folders / "adapter", tmp_path / name)
    (tmp_path / "sings" / "generation_config.json").write_text('{"guidance_scale": 1.5}')
    push = """
from musicrl_hf import load_generator
load_generator(str(folders / "generator")).push_to_hub("tester/below", license="mit")
for name in ("sings", "hums"):
    push_model(Path.cwd() / name, f"tester/{name}", base_model="tester/below", license="mit")
"""
    succeeds(client(hub, tmp_path, push, folders))
    assert json.loads(hub.files("model", "tester/sings")["generation_config.json"]) == {"guidance_scale": 1.5}
    load = """
import warnings
from musicrl_hf import load_generator
for name in ("sings", "hums"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scale = load_generator(f"tester/{name}").generation_config.guidance_scale
    print(name, scale, sum("tester/sings: the Hub could not be asked" in str(one.message) for one in caught))
"""
    usual = tiny_generator().generation_config.guidance_scale
    known = ["sings 1.5 0", f"hums {usual} 0"]
    assert succeeds(client(hub, tmp_path, load, folders)).splitlines() == known
    command = [sys.executable, "-c", START + load, str(folders)]
    offline = hub.environment(tmp_path) | {"HF_HUB_OFFLINE": "1"}
    run = partial(subprocess.run, command, env=offline, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert succeeds(run()).splitlines() == known
    (kept,) = tmp_path.rglob("models--tester--sings/snapshots/*/generation_config.json")
    kept.unlink()
    assert succeeds(run()).splitlines() == [f"sings {usual} 1", f"hums {usual} 0"]


def test_rewards_go_there_and_back(hub, folders, tmp_path):
    write_audio(tmp_path / "tune.wav", torch.randn(1, 16000) / 10, 16000)
    push = """
from musicrl_hf import PreferenceModel, QualityModel
push_model(folders / "adherence", "tester/adherence", license="apache-2.0")
for kind, model in (("quality", QualityModel), ("preference", PreferenceModel)):
    model.from_pretrained(str(folders / kind)).push_to_hub(f"tester/{kind}", license="apache-2.0")
for code in sys.argv[2:]:
    exec(code, {})
"""
    kinds = ("adherence", "quality", "preference")
    cards = [model_card(folders / kind, f"tester/{kind}", license="apache-2.0") for kind in kinds]
    blocks = [block for card in cards for block in python_blocks(card)]
    assert len(blocks) == 3
    out = succeeds(client(hub, tmp_path, push, folders, *blocks))
    assert out.count("tensor([") == 3
    assert [hub.files("model", f"tester/{kind}")["README.md"].decode() for kind in kinds] == cards


def test_preferences_go_there_and_back_streaming_too(hub, folders, tmp_path):
    code = """
from datasets import Audio, load_dataset
from musicrl_hf.preferences import load_preferences
push_preferences(folders / "preferences", "tester/votes", license="cc-by-4.0")
here, there = load_preferences(folders / "preferences"), load_preferences("tester/votes")
assert there.to_list() == here.to_list() and len(there) == 5
stream = load_dataset("tester/votes", split="train", streaming=True)
for column in ("chosen", "rejected"):
    stream = stream.cast_column(column, Audio(decode=False))
assert [row["chosen"]["bytes"] for row in stream] == [row["bytes"] for row in here["chosen"]]
for code in sys.argv[2:]:
    exec(code, {})
"""
    card = preference_card(folders / "preferences", "tester/votes", license="cc-by-4.0")
    blocks = python_blocks(card)
    assert len(blocks) == 2
    out = succeeds(client(hub, tmp_path, code, folders, *blocks))
    assert "a slow reel 0" in out
    assert hub.files("dataset", "tester/votes")["README.md"].decode() == card


@pytest.mark.slow
def test_a_second_push_replaces_the_first_on_its_branch(hub, folders, tmp_path):
    single = tmp_path / "single"
    shutil.copytree(folders / "quality", single)
    shards = tmp_path / "shards"
    shutil.copytree(folders / "quality", shards)
    tensors = load_file(single / "model.safetensors")
    (shards / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    for name, half in zip(names, halves, strict=True):
        save_file(
            {key: np.ascontiguousarray(value) for key, value in half.items()}, shards / name, metadata={"format": "pt"}
        )
    (shards / "result.json").write_text(json.dumps({"method": "another run"}))
    (shards / "LICENSE").write_text("as it is")
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    code = """
from huggingface_hub import HfApi
for name in ("shards", "single"):
    push_model(folders / name, "tester/twice", license="mit", revision="next")
from musicrl_hf import QualityModel
QualityModel.from_pretrained("tester/twice", revision="next")
HfApi().delete_repo("tester/twice")
"""
    before = None

    # look while the repository still exists: the deletion is the client's last request
    class Watching(dict):
        def __delitem__(self, key):
            nonlocal before
            before = (self[key].commit_at("next"), self[key].commit_at("main"))
            super().__delitem__(key)

    hub.repositories = Watching(hub.repositories)
    succeeds(client(hub, tmp_path, code, tmp_path))
    on_branch, on_main = before
    assert "model.safetensors" in on_branch.files
    assert not set(on_branch.files) & {*names, "model.safetensors.index.json", "result.json"}
    assert "LICENSE" in on_branch.files
    assert list(on_main.files) == [".gitattributes"]
    assert ("model", "tester/twice") not in hub.repositories


REFUSED = """
for line in sys.argv[2:]:
    repo_id, _, token = line.partition(" ")
    try:
        push_model(folders / "generator", repo_id, license="mit", token=token or None)
    except OSError as error:
        print(type(error).__name__, error)
"""


def test_a_refusal_is_one_clear_error(hub, folders, tmp_path):
    tries = ["tester/secret", "tester/secret hf_wrong", f"others/theirs {hub.token}"]
    lines = succeeds(client(hub, tmp_path, REFUSED, folders, *tries, token=None)).splitlines()
    assert len(lines) == 3
    assert lines[0] == lines[1]
    assert lines[0].startswith("PermissionError the Hub did not accept your token for tester/secret: sign in with")
    assert lines[2].startswith("PermissionError your token may not write to others/theirs")
    assert [line[:3] for line in hub.requests if "/api/repos/create" in line and line[0] == "4"][-3:] == [
        "401",
        "401",
        "403",
    ]
    assert not {("model", "tester/secret"), ("model", "others/theirs")} & set(hub.repositories)


def test_a_missing_repository_is_named(hub, tmp_path):
    code = """
from musicrl_hf import load_generator
from musicrl_hf.preferences import load_preferences
for load in (load_generator, load_preferences):
    try:
        load("tester/nothing-here")
    except OSError as error:
        print(type(error).__name__, str(error).replace("\\n", " "))
"""
    lines = succeeds(client(hub, tmp_path, code, tmp_path)).splitlines()
    assert len(lines) == 2
    assert all("tester/nothing-here" in line for line in lines)


def test_who_cannot_push_is_told_before_the_work(hub, tmp_path):
    code = """
import os
from musicrl_hf.hub import check_sign_in
check_sign_in("tester/votes")
for token in ("wrong", None):
    os.environ.pop("HF_TOKEN", None)
    try:
        check_sign_in("tester/votes", token=token)
    except OSError as error:
        print(type(error).__name__, error)
"""
    refused, missing = succeeds(client(hub, tmp_path, code, tmp_path)).splitlines()
    assert refused.startswith("PermissionError the Hub did not accept your token for tester/votes")
    assert missing.startswith("PermissionError there is no token to push to tester/votes with")


@pytest.mark.slow
def test_an_unreachable_hub_is_named(folders, tmp_path):
    with HubStandIn() as gone:
        pass
    out = succeeds(client(gone, tmp_path, REFUSED, folders, "tester/x"))
    assert out.startswith(f"ConnectionError {gone.endpoint} was not reached")


def test_an_upload_that_is_cut_off_leaves_nothing_half_done(folders, tmp_path):
    folder = tmp_path / "generator"
    shutil.copytree(folders / "generator", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    work = tmp_path / "work"
    work.mkdir()
    push = 'push_model(folders / "generator", "tester/cut", license="mit")'
    with HubStandIn() as hub:
        hub.hold_uploads.set()
        process = subprocess.Popen(
            [sys.executable, "-c", START + push, str(tmp_path)],
            env=hub.environment(work) | {"TMPDIR": str(work)},
            cwd=work,
            stderr=subprocess.DEVNULL,
        )
        assert hub.upload_started.wait(280)
        time.sleep(0.2)
        process.kill()
        process.wait()
        assert list(hub.files("model", "tester/cut")) == [".gitattributes"]
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert not [path for path in work.iterdir() if path.name.startswith("tmp")]

        hub.hold_uploads.clear()
        succeeds(client(hub, work, push, tmp_path))
        assert hub.files("model", "tester/cut")["model.safetensors"] == before["model.safetensors"]


def test_the_stand_in_reads_metadata_as_the_hub_would(hub, folders):
    block = model_card(folders / "generator", "me/x", license="mit").split("---")[1]
    assert yaml.safe_load(block)["tags"][0] == "musicrl"
