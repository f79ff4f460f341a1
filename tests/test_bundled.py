"""Names: bundled, folder, Hub id, and the folders that are refused before anything is loaded from them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from musicrl_hf import bundled, load_generator
from musicrl_hf.bundled import BUNDLED, check_safetensors, check_weights, refuse_pickle, resolve


def write_weights(folder: Path, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    save_file({"weight": np.arange(12, dtype=np.float32).reshape(3, 4)}, path)
    return path


def test_an_existing_folder_is_itself(tmp_path):
    write_weights(tmp_path / "run")
    assert resolve(tmp_path / "run") == str(tmp_path / "run")


def test_a_folder_wins_over_a_hub_id_spelled_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == "org/name"
    (tmp_path / "org" / "name" / "model.safetensors").parent.mkdir(parents=True)
    (tmp_path / "org" / "name" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        resolve("org/name")


def test_a_hub_id_is_returned_unchanged():
    assert resolve("facebook/musicgen-stereo-small") == "facebook/musicgen-stereo-small"


@pytest.mark.parametrize("name", ["musicrl-tinny", "", "a/b/c", "../gone", "/gone/away", "out dir/run", "org/--x"])
def test_anything_else_is_refused_with_the_bundled_names(name):
    with pytest.raises(ValueError, match="Hub id") as error:
        resolve(name)
    assert repr(name) in str(error.value)
    assert all(known in str(error.value) for known in BUNDLED)


def test_none_is_offered_where_no_bundled_one_would_do():
    with pytest.raises(
        ValueError, match=r"a Hub id \(organisation/name\): check the spelling, or give a folder or an id\.$"
    ):
        resolve("misspelt", "reward", [])


def test_a_file_is_refused_and_the_folder_asked_for(tmp_path):
    with pytest.raises(ValueError, match="is a file: give the folder"):
        resolve(write_weights(tmp_path))


def test_every_bundled_name_leads_to_a_checkpoint_that_ships():
    assert BUNDLED
    for name in BUNDLED:
        folder = Path(resolve(name))
        assert (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
        assert list(folder.glob("*.safetensors")), f"{folder} holds no weights"


def test_a_bundled_adapter_is_merged_into_the_bundled_model_under_it():
    """RU lies on R, and R on the base: each has weights of its own, and the codec is the base's."""
    names = ("musicrl-tiny", "musicrl-tiny-r", "musicrl-tiny-u", "musicrl-tiny-ru")
    weights = [load_generator(name).state_dict() for name in names]
    key = "decoder.model.decoder.layers.0.self_attn.q_proj.weight"
    assert len({state[key].numpy().tobytes() for state in weights}) == len(names)
    codec = [key for key in weights[0] if key.startswith("audio_encoder.")]
    assert codec
    assert all(torch.equal(state[key], weights[0][key]) for state in weights for key in codec)


def test_every_folder_of_checkpoints_has_a_name():
    folders = {path.name for path in bundled.CHECKPOINTS.iterdir() if path.is_dir()}
    assert folders == set(BUNDLED)


def test_a_bundled_checkpoint_missing_from_the_installation(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "CHECKPOINTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="install the package again"):
        resolve(next(iter(BUNDLED)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "last.ckpt", "adapter_model.BIN"])
def test_a_folder_of_pickles_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"is a pickle.*save_pretrained") as error:
        resolve(tmp_path)
    assert name in str(error.value)


def test_a_training_folder_with_safetensors_beside_its_pickles_is_accepted(tmp_path):
    write_weights(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"\x80\x04.")
    refuse_pickle(tmp_path)
    assert resolve(tmp_path) == str(tmp_path)


# 8 bytes of header length, then a JSON header, then 48 bytes of data: a cut in each of the three
@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_a_safetensors_file_cut_short_is_named(tmp_path, keep):
    path = write_weights(tmp_path)
    whole = path.read_bytes()
    check_safetensors(path)
    path.write_bytes(whole[:keep])
    with pytest.raises(ValueError, match="cut short") as error:
        resolve(tmp_path)
    assert "model.safetensors" in str(error.value)


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        resolve(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_weights(tmp_path, first)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": first, "b": second}}))
    with pytest.raises(ValueError, match=second):
        check_weights(tmp_path)
    write_weights(tmp_path, second)
    check_weights(tmp_path)


# -- the manifest ----------------------------------------------------------------------------------------------------------


def test_the_manifest_is_that_of_the_files():
    assert bundled.read_manifest(bundled.CHECKPOINTS) == bundled.manifest_of(bundled.CHECKPOINTS), (
        "python recipes/publish.py --manifest writes SHA256SUMS again"
    )


@pytest.fixture
def release(tmp_path, monkeypatch):
    """Little checkpoints in the place of the bundled ones, with their manifest."""
    monkeypatch.setattr(bundled, "CHECKPOINTS", tmp_path)
    for name in BUNDLED:
        write_weights(tmp_path / name)
        (tmp_path / name / "config.json").write_text("{}")
    assert bundled.write_manifest() == tmp_path / bundled.MANIFEST
    return tmp_path


def test_a_bundled_file_that_was_changed_is_named(release):
    name = next(iter(BUNDLED))
    assert resolve(name) == str(release / name)
    bundled._check_released.cache_clear()
    (release / name / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(ValueError, match=r"config.json is not the file that was released.*install the package again"):
        resolve(name)
    assert resolve(release / name) == str(release / name)  # a folder by its path is its owner's affair
    bundled.write_manifest()
    assert resolve(name) == str(release / name)


def test_a_bundled_file_that_is_missing_or_does_not_belong_is_named(release):
    name = next(iter(BUNDLED))
    (release / name / "more.json").write_text("{}")
    with pytest.raises(ValueError, match=r"more.json does not belong to"):
        resolve(name)
    (release / name / "more.json").unlink()
    (release / name / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json ships with"):
        resolve(name)
    (release / bundled.MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="SHA256SUMS is missing"):
        resolve(name)


def test_a_bundled_checkpoint_is_read_once_a_process(release, monkeypatch):
    name = next(iter(BUNDLED))
    resolve(name)
    monkeypatch.setattr(bundled, "sha256_of", None)
    assert resolve(name) == str(release / name)
