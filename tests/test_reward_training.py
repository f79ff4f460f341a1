import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from tiny import SAMPLING_RATE, tiny_clap, tiny_generator
from transformers import AutoModel
from trl import RewardConfig, RewardTrainer

from musicrl_hf.audio import audio_bytes, read_audio
from musicrl_hf.config import load_config
from musicrl_hf.flat import FlatTokenizer
from musicrl_hf.preferences.codes import read_index
from musicrl_hf.preferences.schema import load_preferences, preferences_from_rows, save_preferences
from musicrl_hf.preferences.splits import split_by_prompt
from musicrl_hf.rewards import PreferenceModel, load_reward
from musicrl_hf.training import sequences
from musicrl_hf.training.losses import bradley_terry_loss
from musicrl_hf.training.processes import encode_in_shares
from musicrl_hf.training.reward import (
    FlatPreferenceModel,
    RewardJob,
    TabledPreferenceModel,
    bradley_terry_pairs,
    run_reward,
    split_preferences,
)
from musicrl_hf.training.sequences import ClipSequences

WORDS = "pop rock jazz slow fast piano guitar drums bass flute violin happy sad loud soft synth air reel".split()


def clip(noise: float, rate: int, seconds: float = 1.0, seed: int = 0) -> bytes:
    """A tone with noise: the listener of these tests likes it clean."""
    random = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * rate)) / rate
    tone = torch.sin(2 * torch.pi * (40 + seed % 7) * time)
    return audio_bytes((0.2 * (tone + noise * torch.randn(len(time), generator=random)))[None], rate, "wav")


def rows(count: int, rate: int, seconds: float = 1.0, tie_every: int = 0) -> list[dict]:
    return [
        {
            "prompt": f"{WORDS[i % 18]} {WORDS[i // 18]}",
            "chosen": clip(0.05, rate, seconds, 2 * i),
            "rejected": clip(1.5, rate, seconds, 2 * i + 1),
            "chosen_model": "clean" if i % 3 else "other",
            "rejected_model": "noisy",
            "preference": "tie" if tie_every and i % tie_every == 0 else "ab"[i % 2],
            "listener": "test",
            "source": "test",
            "created_at": "2026-01-01T00:00:00+00:00",
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def generator_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    tiny_generator().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clap")
    for part in tiny_clap(sampling_rate=4000):
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """32 pairs at 400 Hz, every eighth a tie."""
    folder = tmp_path_factory.mktemp("preferences") / "prefs"
    save_preferences(preferences_from_rows(rows(32, SAMPLING_RATE, 0.4, tie_every=8)), folder)
    return str(folder)


@pytest.fixture(scope="module")
def sound_preferences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preferences") / "sound"
    save_preferences(preferences_from_rows(rows(40, 4000)), folder)
    return str(folder)


def generator_job(preferences, generator_folder, output_dir, **options) -> RewardJob:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "test_share": 0.3, "seed": 1}
    return RewardJob(
        preferences=preferences, model=generator_folder, output_dir=str(output_dir), **{**defaults, **options}
    )


def flat_trainer(model, pairs, tmp_path, **options) -> RewardTrainer:
    args = RewardConfig(
        str(tmp_path), max_length=None, bf16=False, gradient_checkpointing=False, report_to="none", **options
    )
    tokenizer = FlatTokenizer.for_generator(model.generator)
    return RewardTrainer(FlatPreferenceModel.from_model(model), args, train_dataset=pairs, processing_class=tokenizer)


def test_trls_loss_is_bradley_terry_computed_by_hand(tmp_path):
    torch.manual_seed(0)
    generator = tiny_generator()
    model = PreferenceModel.from_generator(generator)
    ds = preferences_from_rows(rows(3, SAMPLING_RATE, 0.4))
    pairs = bradley_terry_pairs(
        ds, ClipSequences(model, 20.0, tmp_path / "clips").of_rows(ds), "drop", tmp_path / "pairs.arrow"
    )
    trainer = flat_trainer(model, pairs, tmp_path)
    batch = trainer.data_collator(pairs.to_list())
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, batch)

    def score(row, column):
        audio, rate = read_audio(row[column]["bytes"])
        return model([row["prompt"]], audio[None], rate)

    margins = torch.cat([score(row, "chosen") - score(row, "rejected") for row in ds])
    by_hand = -sum(math.log(1 / (1 + math.exp(-margin))) for margin in margins.tolist()) / 3
    assert theirs.item() == pytest.approx(by_hand, abs=1e-6)
    assert bradley_terry_loss(margins, torch.ones(3)).item() == pytest.approx(by_hand, abs=1e-6)


def test_a_tie_counted_half_is_the_cross_entropy_with_target_one_half(tmp_path):
    torch.manual_seed(0)
    model = PreferenceModel.from_generator(tiny_generator())
    ds = preferences_from_rows(rows(4, SAMPLING_RATE, 0.4, tie_every=4))
    ids = list(ClipSequences(model, 20.0, tmp_path / "clips").of_rows(ds))
    pairs = bradley_terry_pairs(ds, ids, "half", tmp_path / "half.arrow")
    assert len(pairs) == 8
    assert len(bradley_terry_pairs(ds, ids, "drop", tmp_path / "decided.arrow")) == 3
    trainer = flat_trainer(model, pairs, tmp_path)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, trainer.data_collator(pairs.to_list()))
        decided = trainer.data_collator([{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in ids])
        chosen, rejected = trainer.model(**decided).logits[:, 0].chunk(2)
    targets = torch.tensor([0.5, 1.0, 1.0, 1.0])  # row 0 is the tie
    assert loss.item() == pytest.approx(bradley_terry_loss(chosen - rejected, targets).item(), abs=1e-6)


def test_flat_view_scores_prompts_and_clips_of_unequal_length(tmp_path):
    torch.manual_seed(0)
    model = PreferenceModel.from_generator(tiny_generator())
    view = FlatPreferenceModel.from_model(model)
    made = rows(2, SAMPLING_RATE, 0.4)
    made[1] |= {
        "prompt": "slow sad piano",
        "chosen": clip(0.1, SAMPLING_RATE, 0.7),
        "rejected": clip(0.5, SAMPLING_RATE, 0.2),
    }
    ds = preferences_from_rows(made)
    pairs = bradley_terry_pairs(
        ds, ClipSequences(model, 20.0, tmp_path / "clips").of_rows(ds), "drop", tmp_path / "pairs.arrow"
    )
    batch = flat_trainer(model, pairs, tmp_path).data_collator(pairs.to_list())
    with torch.no_grad():
        together = view(**batch).logits[:, 0]
        alone = [view(torch.tensor([ids])).logits.item() for ids in [*pairs["chosen_ids"], *pairs["rejected_ids"]]]
    assert together.tolist() == pytest.approx(alone, abs=1e-6)


def test_a_long_clip_is_cropped_not_left_out(tmp_path):
    model = PreferenceModel.from_generator(tiny_generator())
    ds = preferences_from_rows(rows(1, SAMPLING_RATE, 29.0))
    chosen, rejected = next(ClipSequences(model, 20.0, tmp_path / "clips").of_rows(ds))
    audio_ids = 20 * 50 * 4  # 20 s at 50 frames a second, 4 codebooks: far beyond TRL's default of 1024
    assert len(chosen) == len(rejected)
    assert sum(i < 4 * 16 for i in chosen) == audio_ids


def test_each_clip_is_encoded_once_and_read_from_the_cache_afterwards(tmp_path):
    torch.manual_seed(0)
    model = PreferenceModel.from_clap(*tiny_clap(sampling_rate=4000))
    ds = preferences_from_rows(rows(2, 4000) + [rows(1, 4000)[0] | {"prompt": "another prompt"}])
    first = ClipSequences(model, 20.0, tmp_path)
    # The same clips with another prompt are new rows.
    assert list(first.of_rows(ds)) == [([0], [1]), ([2], [3]), ([4], [5])]
    files = list(tmp_path.glob("*/*.safetensors"))
    assert [len(load_file(path)) for path in files] == [4]
    audio, rate = read_audio(ds[1]["rejected"]["bytes"])
    assert torch.allclose(first.table[3], model.features([ds[1]["prompt"]], audio[None], rate)[0], atol=1e-5)
    # What is in the cache is not encoded again: a mark left in it comes back.
    save_file({key: tensor + 100 for key, tensor in load_file(files[0]).items()}, files[0])
    again = ClipSequences(model, 20.0, tmp_path)
    list(again.of_rows(ds))
    sound = model.sound.size
    assert torch.allclose(again.table[:, :sound], first.table[:, :sound] + 100, atol=1e-4)
    # Another crop or another encoder is another folder.
    assert ClipSequences(model, 5.0, tmp_path).folder != again.folder
    assert ClipSequences(PreferenceModel.from_clap(*tiny_clap(1, 4000)), 20.0, tmp_path).folder != again.folder
    files[0].write_bytes(files[0].read_bytes()[:-8])
    with pytest.raises(ValueError, match="is damaged"):
        list(again.of_rows(ds))


@pytest.mark.parametrize("waiting", [4, 64])
def test_clips_of_one_shape_are_encoded_together_and_each_as_alone(tmp_path, monkeypatch, waiting):
    monkeypatch.setattr(sequences, "_AT_ONCE", 3)
    monkeypatch.setattr(sequences, "_WAITING", waiting)
    model = PreferenceModel.from_clap(*tiny_clap(sampling_rate=4000))
    several = rows(5, 4000) + rows(7, 4000, 0.7)[5:] + rows(9, 8000)[7:]
    several = several[::2] + several[1::2]
    ds, clips = preferences_from_rows(several), ClipSequences(model, 20.0, tmp_path)
    pairs = list(clips.of_rows(ds))
    assert len(clips.table) == 18
    for row, ((chosen,), (rejected,)) in zip(several, pairs, strict=True):
        for side, number in (("chosen", chosen), ("rejected", rejected)):
            audio, rate = read_audio(row[side])
            assert torch.allclose(clips.table[number], model.features([row["prompt"]], audio[None], rate)[0], atol=1e-4)


def test_a_clip_that_cannot_be_encoded_is_named_by_its_row(tmp_path):
    model = PreferenceModel.from_clap(*tiny_clap(sampling_rate=4000))
    several = list(preferences_from_rows(rows(3, 4000)))
    several[2]["rejected"]["bytes"] = audio_bytes(torch.zeros(1, 4000), 4000, "wav")
    ds = Dataset.from_list(several)
    clips = ClipSequences(model, 20.0, tmp_path)
    with pytest.raises(ValueError, match="row 2: rejected: .*silent"):
        list(clips.of_rows(ds))
    assert not list(tmp_path.glob("*/*"))
    with pytest.raises(ValueError, match="row 2: rejected: .*silent"):
        clips.encode(ds, range(2, 3))
    clips.encode(ds, range(2))
    assert len(read_index(clips.folder)) == 4


def test_shares_of_the_rows_make_the_cache_of_all(tmp_path):
    model = PreferenceModel.from_clap(*tiny_clap(sampling_rate=4000))
    ds, clips = preferences_from_rows(rows(5, 4000)), ClipSequences(model, 20.0, tmp_path)
    encode_in_shares(clips.encode, ds)  # one process has no share, and encodes what it reads
    assert not read_index(clips.folder)
    clips.encode(ds, range(2))
    assert len(read_index(clips.folder)) == 4
    clips.encode(ds, range(2, 5))
    assert len(known := read_index(clips.folder)) == 10
    list(clips.of_rows(ds))
    assert read_index(clips.folder) == known


def test_training_learns_the_listener_and_leaves_a_whole_folder(preferences, generator_folder, tmp_path):
    job = generator_job(preferences, generator_folder, tmp_path, max_steps=40, learning_rate=3e-3, test_share=0.4)
    assert run_reward(job) == tmp_path
    result = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert result["accuracy"] > result["chance_interval"][1]
    assert result["rows"]["train"]["tie"] + result["rows"]["test"]["tie"] == 4
    assert result["n_pairs"] == result["rows"]["test"]["kept"]
    assert result["n_pairs"] + result["n_train_pairs"] == 28
    low, high = result["chance_interval"]
    assert low < 0.5 < high
    assert set(result["by_models"]) <= {"clean / noisy", "noisy / other"}
    # TRL's log of the first step: the loss of an untrained head is near ln 2.
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2), abs=0.05)
    reward = load_reward(f"preference:{tmp_path}")
    audio = torch.randn(2, 1, SAMPLING_RATE) * torch.tensor([0.1, 0.2])[:, None, None]
    assert reward(["pop", "jazz"], audio, SAMPLING_RATE).shape == (2,)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["PreferenceModel"]
    assert not (tmp_path / "README.md").exists()


def middle_seconds(prompts, audio, sampling_rate):
    """A reward for tests: 1 where the clip lasts as long as the crop, and nothing where it does not."""
    assert audio.shape == (1, 1, int(0.2 * sampling_rate)), "one clip at a time, of the cropped seconds"
    return torch.ones(len(prompts))


def cleanness(prompts, audio, sampling_rate):
    """The listener of these tests: the less the clip changes from sample to sample, the better."""
    return -audio.diff(dim=-1).abs().mean((1, 2))


def test_baselines_are_tested_on_the_same_held_out_votes(preferences, generator_folder, tmp_path, capsys):
    names = [f"{__name__}:{function.__name__}" for function in (middle_seconds, cleanness)]
    run_reward(generator_job(preferences, generator_folder, tmp_path, max_steps=1, crop_s=0.2, baselines=names))
    result = json.loads((tmp_path / "result.json").read_text())["metrics"]
    votes = result["n_votes"]
    assert result["baselines"] == {
        names[0]: {"accuracy": 0.5, "n_votes": votes, "equal_scores": votes},
        names[1]: {"accuracy": 1.0, "n_votes": votes, "equal_scores": 0},
    }
    assert f'"The higher {names[1]} wins" is right in 100.0% of them' in capsys.readouterr().out
    assert result["judged_by"] == {
        "listeners": 1,
        "simulated": 0,
        "rewards": 0,
        "agreement": None,
        "shared_pairs": 0,
        "comparisons": 0,
    }


def test_a_baseline_that_is_not_there_is_told_before_training(preferences, generator_folder, tmp_path):
    with pytest.raises(ValueError, match="`reward` = 'loudest' is unknown"):
        run_reward(generator_job(preferences, generator_folder, tmp_path / "out", baselines=["loudest"]))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="`baselines` names a reward twice"):
        RewardJob(preferences="prefs", output_dir="out", baselines=["quality", "quality"])


def test_codec_and_text_encoder_stay_as_they_were(preferences, generator_folder, tmp_path):
    run_reward(generator_job(preferences, generator_folder, tmp_path, learning_rate=1e-2))
    before, after = tiny_generator().state_dict(), AutoModel.from_pretrained(tmp_path).generator.state_dict()
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"decoder", "enc_to_dec_proj"}


@pytest.mark.parametrize("lora_r", [0, 2])
def test_resuming_is_exact_to_the_bit(preferences, generator_folder, tmp_path, lora_r):
    options = {"learning_rate": 1e-2, "lora_r": lora_r, "max_steps": 4, "ties": "half"}
    run_reward(generator_job(preferences, generator_folder, tmp_path / "whole", **options))
    cut = generator_job(preferences, generator_folder, tmp_path / "cut", **options, save_steps=2)
    run_reward(cut)
    # As after a crash behind step 2: the end is gone, its first checkpoint is there.
    final = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").unlink()
    for checkpoint in ("checkpoint-2", "checkpoint-4"):  # behind the last step none is made
        resumed = RewardJob(**{**vars(cut), "resume_from_checkpoint": str(tmp_path / "cut" / checkpoint)})
        run_reward(resumed)
        assert (tmp_path / "cut" / "model.safetensors").read_bytes() == final, checkpoint
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "cut" / "model.safetensors").items():
        assert torch.equal(tensor, whole[name]), name


def test_lora_trains_adapter_and_head_and_is_merged(preferences, generator_folder, tmp_path):
    torch.manual_seed(0)
    run_reward(generator_job(preferences, generator_folder, tmp_path, lora_r=2, learning_rate=1e-2))
    before, after = tiny_generator().state_dict(), AutoModel.from_pretrained(tmp_path).generator.state_dict()
    assert before.keys() - after.keys() == {f"decoder.lm_heads.{k}.weight" for k in range(4)}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.split(".")[-2] in "q_proj k_proj v_proj out_proj fc1 fc2".split() for name in changed)


@pytest.mark.parametrize("use_text", [True, False])
def test_clap_backbone_learns_the_listener(sound_preferences, clap_folder, tmp_path, use_text):
    job = RewardJob(
        preferences=sound_preferences,
        model=clap_folder,
        output_dir=str(tmp_path),
        backbone="clap",
        use_text=use_text,
        max_steps=30,
        per_device_train_batch_size=8,
        test_share=0.3,
    )
    run_reward(job)
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["accuracy"] > 0.9
    reward = load_reward(f"preference:{tmp_path}")
    row = load_preferences(sound_preferences)[0]
    scores = [reward([row["prompt"]], read_audio(row[side]["bytes"])[0][None], 4000) for side in ("chosen", "rejected")]
    assert scores[0] > scores[1]


def test_tabled_view_reads_rows_of_its_table():
    torch.manual_seed(0)
    model = PreferenceModel.from_clap(*tiny_clap(sampling_rate=4000))
    table = torch.randn(5, model.head.mean.shape[0])
    view = TabledPreferenceModel.from_model(model, table)
    with torch.no_grad():
        expected = model.head(table[[3, 0]])
        assert torch.equal(view(torch.tensor([[3], [0]])).logits[:, 0], expected)


def test_split_by_generator_keeps_it_and_its_prompts_out_of_training(preferences):
    job = RewardJob(preferences=preferences, output_dir="out", test_share=0.4, held_out_models=["other"])
    split = split_preferences(job)
    assert "other" not in split["train"]["chosen_model"]
    assert set(split["test"]["chosen_model"]) == {"other"}
    assert not set(split["train"]["prompt"]) & set(split["test"]["prompt"])


def test_the_preferences_own_test_split_is_what_is_held_out(preferences, tmp_path):
    ds = load_preferences(preferences)
    own = split_by_prompt(ds, 0.4, seed=7)
    save_preferences(own, tmp_path / "split")
    job = RewardJob(preferences=str(tmp_path / "split"), output_dir="out")
    split = split_preferences(job)
    assert {side: rows["prompt"] for side, rows in split.items()} == {side: own[side]["prompt"] for side in own}
    some = split_preferences(replace(job, test_share=0.3))  # asked for: the test split stays untouched
    assert set(some["train"]["prompt"]) | set(some["test"]["prompt"]) == set(own["train"]["prompt"])
    whole = split_preferences(replace(job, preferences=preferences))  # no test split: a tenth of the prompts
    assert len(set(whole["test"]["prompt"])) == max(1, round(0.1 * len(set(ds["prompt"]))))
    assert len(whole["train"]) + len(whole["test"]) == len(ds)


def test_own_splits_that_share_a_prompt_are_refused(preferences, tmp_path):
    ds = load_preferences(preferences)
    save_preferences(DatasetDict(train=ds, test=ds.select([0])), tmp_path / "leaky")
    job = RewardJob(preferences=str(tmp_path / "leaky"), output_dir="out")
    with pytest.raises(ValueError, match="`preferences` = .*leaky.*: give a `test_share`"):
        split_preferences(job)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "mert"}, "`backbone` must be one of generator, clap"),
        ({"backbone": "clap", "lora_r": 4}, "`lora_r` = 4"),
        ({"backbone": "clap", "from_scratch": True}, "`from_scratch` = True"),
        ({"lora_r": 4, "from_scratch": True}, "one of them"),
        ({"ties": "win"}, "`ties` must be"),
        ({"max_steps": 0}, "`max_steps` must be at least 1"),
        ({"crop_s": 0.0}, "`crop_s`"),
        ({"learning_rate": -1.0}, "`learning_rate`"),
        ({"weight_decay": -1.0}, "`weight_decay`"),
    ],
)
def test_bad_options_name_the_field(options, message):
    with pytest.raises(ValueError, match=message):
        RewardJob(preferences="prefs", output_dir="out", **options)


def test_nothing_to_train_on_is_said(tmp_path, generator_folder):
    made = [row | {"preference": "tie"} for row in rows(8, SAMPLING_RATE, 0.4)]
    save_preferences(preferences_from_rows(made), tmp_path / "prefs")
    with pytest.raises(ValueError, match="none of the .* rows to train on has a winner"):
        run_reward(generator_job(str(tmp_path / "prefs"), generator_folder, tmp_path / "out", test_share=0.5))


def test_resuming_without_a_checkpoint_is_refused(preferences, generator_folder, tmp_path):
    job = generator_job(preferences, generator_folder, tmp_path / "out", resume_from_checkpoint="last")
    with pytest.raises(FileNotFoundError, match="no checkpoint there"):
        run_reward(job)


def test_ties_count_only_where_they_were_heard(clap_folder, tmp_path):
    """Of 32 rows every fourth is a tie, and of every other row, ties among them, too little was heard."""
    made = rows(32, 4000, 0.5, tie_every=4)
    for number, row in enumerate(made):
        row |= dict.fromkeys(("seconds_chosen", "seconds_rejected"), 0.5 if number // 4 % 2 else 0.1)
    ds = preferences_from_rows(made)
    save_preferences(DatasetDict(train=ds.select(range(24)), test=ds.select(range(24, 32))), tmp_path / "prefs")
    found = {}
    for ties in ("drop", "half"):
        job = RewardJob(
            preferences=str(tmp_path / "prefs"),
            model=clap_folder,
            output_dir=str(tmp_path / ties),
            backbone="clap",
            ties=ties,
            min_seconds=0.3,
            max_steps=1,
        )
        run_reward(job)
        result = json.loads((tmp_path / ties / "result.json").read_text())["metrics"]
        counts = {side: result["rows"][side]["left_out"] for side in ("train", "test")}
        clips = sum(len(load_file(path)) for path in (tmp_path / ties / "clips").rglob("*.safetensors"))
        found[ties] = result["n_train_pairs"], counts, result["n_pairs"], clips
    # train: 12 rows heard, 3 of them ties; test: 4 heard, 1 of them a tie, which no accuracy is of; two clips a row
    assert found == {
        "drop": (9, {"train": 15, "test": 5}, 3, 2 * (9 + 3)),
        "half": (12, {"train": 12, "test": 5}, 3, 2 * (12 + 3)),
    }


def test_a_reward_on_another_backbone_is_not_written_over(sound_preferences, clap_folder, generator_folder, tmp_path):
    PreferenceModel.from_clap(*tiny_clap()).save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(
        ValueError, match="holds a preference reward with `backbone` = 'clap', and .* 'generator': give"
    ):
        run_reward(generator_job(sound_preferences, generator_folder, tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_max_length_is_off_and_trls_language_defaults_too():
    args = RewardJob(preferences="prefs", output_dir="out").trainer_config()
    assert args.max_length is None
    assert not args.bf16
    assert not args.gradient_checkpointing
    assert args.disable_dropout


@pytest.mark.parametrize("name", ["reward.yaml", "reward_clap.yaml"])
def test_shipped_config_is_a_job(name):
    path = Path(__file__).parent.parent / "examples" / "configs" / name
    assert isinstance(load_config(RewardJob, path), RewardJob)
