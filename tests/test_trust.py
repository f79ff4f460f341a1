"""Nothing that a checkpoint or a data set brings is run, unpickled, unpacked or followed out of its folder."""

import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import tiny_clap, tiny_generator

from musicrl_hf.bundled import resolve
from musicrl_hf.codec import AudioCodec
from musicrl_hf.generator import load_generator
from musicrl_hf.preferences.importers import import_folder
from musicrl_hf.preferences.importers.sources import open_source
from musicrl_hf.preferences.importers.tables import read_rows
from musicrl_hf.preferences.schema import clip_path, load_preferences, preferences_from_rows, save_preferences
from musicrl_hf.rewards import AdherenceReward, PreferenceModel, QualityModel
from musicrl_hf.training.ppo_policy import add_lora


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """Code that leaves a file behind when it is run; the fixture's value is that file."""
    monkeypatch.setenv("CANARY", str(tmp_path / "code_was_run"))
    return tmp_path / "code_was_run"


CODE = """
import os
open(os.environ["CANARY"], "w").close()

class Custom:
    def __init__(self, *args, **kwargs):
        pass

    from_pretrained = from_dict = classmethod(lambda cls, *args, **kwargs: cls())

def generate(*args, **kwargs):
    pass
"""


def booby_trap(folder: Path) -> Path:
    """Every way in which a folder of transformers may name code of its own, at once."""
    (folder / "custom.py").write_text(CODE, encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE, encoding="utf-8")
    auto = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoFeatureExtractor", "AutoProcessor", "AutoModelForCausalLM")
    for path in folder.glob("*config.json"):
        content = json.loads(path.read_text())
        content["auto_map"] = dict.fromkeys(auto, "custom.Custom") | {"AutoTokenizer": ["custom.Custom", None]}
        content["custom_generate"] = "custom_generate"
        if path.name == "tokenizer_config.json":
            content["chat_template"] = "{{ cycler.__init__.__globals__.os.system('touch $CANARY') }}"
        if path.name == "adapter_config.json":
            content["auto_mapping"] = {"base_model_class": "Custom", "parent_library": "custom"}
        path.write_text(json.dumps(content))
    return folder


def saved_generator(folder: Path) -> Path:
    tiny_generator().save_pretrained(folder)
    return folder


def test_no_code_of_a_generator_is_run(tmp_path, canary, monkeypatch):
    folder = booby_trap(saved_generator(tmp_path / "generator"))
    monkeypatch.syspath_prepend(str(folder))  # so that `import custom` would find it
    model = load_generator(str(folder))
    model.sample(["slow piano"], duration_s=0.1, seed=0)
    assert not canary.exists()
    model.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_no_code_of_an_adapter_is_run(tmp_path, canary, monkeypatch):
    base = saved_generator(tmp_path / "base")
    adapter = add_lora(load_generator(base), LoraConfig(r=2, target_modules=["q_proj"]), str(base))
    adapter.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    monkeypatch.syspath_prepend(str(booby_trap(tmp_path / "adapter")))
    load_generator(str(tmp_path / "adapter"))
    assert not canary.exists()


def test_an_adapter_names_a_bundled_base_by_its_name_whatever_lies_here(tmp_path, monkeypatch):
    (tmp_path / "musicrl-tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    base = saved_generator(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    named = {name: add_lora(load_generator(base), lora, name) for name in ("musicrl-tiny", "base")}
    bases = {name: adapter.peft_config["default"].base_model_name_or_path for name, adapter in named.items()}
    assert bases == {"musicrl-tiny": "musicrl-tiny", "base": str(base)}


def test_no_code_of_a_reward_or_codec_is_run(tmp_path, canary, monkeypatch):
    clap, tokenizer, extractor = tiny_clap()
    for part in (clap, tokenizer, extractor):
        part.save_pretrained(tmp_path / "clap")
    QualityModel.from_clap(clap, extractor).save_pretrained(tmp_path / "quality")
    PreferenceModel.from_generator(tiny_generator()).save_pretrained(tmp_path / "preference")
    tiny_generator().audio_encoder.save_pretrained(tmp_path / "codec")
    loaders = {
        "clap": AdherenceReward.from_pretrained,
        "quality": QualityModel.from_pretrained,
        "preference": PreferenceModel.from_pretrained,
        "codec": AudioCodec.from_pretrained,
    }
    for name, load in loaders.items():
        monkeypatch.syspath_prepend(str(booby_trap(tmp_path / name)))
        load(str(tmp_path / name))
        assert not canary.exists(), name


def test_weights_beside_a_pickle_come_from_safetensors_and_a_pickle_alone_is_refused(tmp_path, canary):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    folder = saved_generator(tmp_path / "generator")
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump(Trap(), file)
    load_generator(str(folder))
    (folder / "model.safetensors").rename(folder / "other.safetensors")  # weights, but not those that the config wants
    with pytest.raises((ValueError, OSError)):
        load_generator(str(folder))
    (folder / "other.safetensors").unlink()
    with pytest.raises(ValueError, match="is a pickle"):
        resolve(folder)
    assert not canary.exists()


def test_a_shard_elsewhere_is_refused(tmp_path):
    folder = saved_generator(tmp_path / "generator")
    for elsewhere in ("../x.safetensors", "/x.safetensors", "..", 3):
        index = {"weight_map": {"a": elsewhere}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match="files beside it"):
            resolve(folder)


@pytest.mark.parametrize("config", ["[" * 5000, "[]", "\xff", "{", '{"model_type": 3}', '{"model_type": "musicgen"}'])
def test_a_broken_config_is_named(config, tmp_path):
    folder = saved_generator(tmp_path / "generator")
    (folder / "config.json").write_text(config, encoding="latin-1")
    with pytest.raises(ValueError, match=str(folder)):
        load_generator(str(folder))


def test_adapters_on_each_other_are_refused(tmp_path):
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        content = {"base_model_name_or_path": str(tmp_path / base), "peft_type": "LORA"}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="adapter on itself"):
        load_generator(str(tmp_path / "a"))


# -- data sets -------------------------------------------------------------------------------------------------------------


def tone_bytes() -> bytes:
    from musicrl_hf.audio import audio_bytes

    return audio_bytes(0.1 * torch.randn(1, 400), 400, "wav")


def saved_preferences(folder: Path) -> Path:
    names = ("chosen_model", "rejected_model", "listener", "source")
    row = {"prompt": "air", "chosen": tone_bytes(), "rejected": tone_bytes(), "preference": "a"}
    rows = [row | dict.fromkeys(names, "x") | {"created_at": "2026-01-01"}]
    return save_preferences(preferences_from_rows(rows), folder)


def test_the_script_of_a_data_set_is_not_run(tmp_path, canary):
    folder = saved_preferences(tmp_path / "votes")
    (folder / "other.py").write_text(CODE, encoding="utf-8")
    (folder / "data" / "data.py").write_text(CODE, encoding="utf-8")
    assert len(load_preferences(folder)) == 1
    (folder / "votes.py").write_text(CODE, encoding="utf-8")  # where `datasets` once looked for one
    with pytest.raises(ValueError, match="cannot be read.*script"):
        load_preferences(folder)
    assert not canary.exists()


def test_an_archive_in_a_data_set_is_not_unpacked(tmp_path):
    folder = saved_preferences(tmp_path / "votes")
    (parquet,) = (folder / "data").glob("*.parquet")
    with zipfile.ZipFile(folder / "data" / "train-00001-of-00002.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(parquet, "../../escaped.parquet")
        archive.writestr("bomb.parquet", bytes(20_000_000))
    with pytest.raises(ValueError, match=r"only Parquet files of their own are read|they have to be Parquet"):
        load_preferences(folder)
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("pattern", ["../secret/data/*.parquet", "{root}/secret/data/*.parquet"])
def test_a_card_that_names_files_elsewhere_is_refused(pattern, tmp_path):
    folder = saved_preferences(tmp_path / "votes")
    saved_preferences(tmp_path / "secret")
    data_files = pattern.replace("{root}", str(tmp_path))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {data_files}\n---\n")
    with pytest.raises((ValueError, FileNotFoundError), match="votes"):
        load_preferences(folder)


def test_links_do_not_lead_out_of_an_import(tmp_path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"prompt": "p", "audio": "x.wav", "system": "s", "score": 1}\n')
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "clips.jsonl").symlink_to(secret)
    with pytest.raises(ValueError, match="leads out of"):
        import_folder(mine, tmp_path / "out")
    with pytest.raises(ValueError, match="leads out of"):
        read_rows(open_source(mine), ("prompt",))
    (mine / "clips.jsonl").unlink()
    (mine / "inside").symlink_to(tmp_path)
    (mine / "round").symlink_to(mine / "round")
    for path, message in {
        "inside/secret.jsonl": "leads out of",
        str(secret): "leads out of",
        "../secret.jsonl": "leads out of",
        "round": "no file|is none",
        "a\0b": "is none",
        "n" * 5000: "is none",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            clip_path(mine, path)
    assert not (tmp_path / "out").exists()


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    repository = tmp_path / "datasets--me--votes"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "1").write_text("clip")
    (snapshot / "clip.flac").symlink_to("../../blobs/1")
    (snapshot / "other.flac").symlink_to("../../../other")
    (tmp_path / "other").write_text("clip")
    assert clip_path(snapshot, "clip.flac").read_text() == "clip"
    with pytest.raises(ValueError, match="leads out of"):
        clip_path(snapshot, "other.flac")
