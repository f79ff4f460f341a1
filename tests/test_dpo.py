import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from kv_variant import KVVariant
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_generator
from torch import nn
from transformers import MusicgenForConditionalGeneration
from trl import DPOTrainer
from trl.trainer import base_trainer, dpo_trainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from musicrl_hf.audio import audio_bytes
from musicrl_hf.flat import FlatMusicRLForCausalLM, FlatTokenizer
from musicrl_hf.generator import MusicRLForConditionalGeneration, load_generator
from musicrl_hf.preferences.schema import preferences_from_rows, save_preferences
from musicrl_hf.training.dpo import LOSSES, DPOJob, MusicDPOConfig, MusicDPOTrainer, PairCollator, flat_pairs, run_dpo
from musicrl_hf.training.ppo_policy import LORA_TARGETS
from musicrl_hf.training.seam import copy_of, prepare_generator

PROMPTS = ["slow jazz", "a happy fast reel", "loud rock", "soft piano air"]
LORA = LoraConfig(r=2, target_modules=LORA_TARGETS)


def pairs(count=8, K=4, V=16, **columns):
    random = torch.Generator().manual_seed(1)
    frames = [5 + i % 3 for i in range(count)]  # chosen and rejected of unequal length, too
    return Dataset.from_dict(
        {
            "prompt": [PROMPTS[i % 4] for i in range(count)],
            "chosen_codes": [torch.randint(0, V, (K, f), generator=random).tolist() for f in frames],
            "rejected_codes": [
                torch.randint(0, V, (K, f + i % 2), generator=random).tolist() for i, f in enumerate(frames)
            ],
            **columns,
        }
    )


def config(folder, **options):
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    defaults |= {"lr_scheduler_type": "constant", "save_strategy": "no", "disable_tqdm": True}
    return MusicDPOConfig(str(folder), **(defaults | options))


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


class Poisoned(nn.Module):
    """Stands where the codec was, and must never be run."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, *args, **kwargs):
        raise AssertionError("DPO ran the codec")

    encode = decode = forward


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("reference", ["copy", "explicit", "precomputed"])
def test_first_loss_is_ln_2_and_all_references_give_the_same_losses(adapter, reference, tmp_path):
    """With the dropout of MusicGen's own config in the model: it has to be zeroed, or the policy is not its reference."""
    generator = tiny_generator(dropout=0.1)
    trainer = MusicDPOTrainer(
        generator,
        tiny_generator(dropout=0.1) if reference == "explicit" else None,
        config(tmp_path, precompute_ref_log_probs=reference == "precomputed"),
        pairs(2),
        peft_config=adapter,
    )
    assert (trainer.ref_model is not None) == (reference == "explicit" or (reference == "copy" and adapter is None))
    generator.audio_encoder = Poisoned(generator.audio_encoder.config)
    before = generator.decoder.lm_heads[0].weight.clone()
    trainer.train()
    found = losses(trainer)
    assert abs(found[0] - math.log(2)) < 1e-4
    assert found[-1] < found[0] - 1e-3
    assert torch.equal(before, generator.decoder.lm_heads[0].weight) == (adapter is not None)
    again = MusicDPOTrainer(
        tiny_generator(dropout=0.1), None, config(tmp_path / "plain"), pairs(2), peft_config=adapter
    )
    again.train()
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses(again)), atol=1e-5, rtol=1e-5)


def test_a_reference_that_was_given_is_let_go_once_all_pairs_are_scored(tmp_path):
    trainer = MusicDPOTrainer(
        tiny_generator(), tiny_generator(), config(tmp_path, precompute_ref_log_probs=True), pairs(2)
    )
    assert trainer.ref_model is None
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) < 1e-4


def test_the_copy_shares_what_is_not_trained_but_where_weights_are_shared_out(tmp_path, monkeypatch):
    trainer = MusicDPOTrainer(tiny_generator(), args=config(tmp_path), train_dataset=pairs(2))
    ours, copy = trainer.generator, trainer.ref_model
    assert copy.text_encoder is ours.text_encoder
    assert copy.audio_encoder is ours.audio_encoder
    trained = {name for name, weight in ours.named_parameters() if weight.requires_grad}
    shared = {weight.data_ptr() for weight in ours.parameters()} & {weight.data_ptr() for weight in copy.parameters()}
    assert trained
    assert not shared & {weight.data_ptr() for name, weight in ours.named_parameters() if name in trained}
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert copy_of(ours).text_encoder is not ours.text_encoder


def test_stereo_trains(tmp_path):
    trainer = MusicDPOTrainer(tiny_generator(audio_channels=2, K=8), args=config(tmp_path), train_dataset=pairs(2, K=8))
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) < 1e-4
    assert losses(trainer)[-1] < math.log(2)


def test_gradient_checkpointing_and_accumulation_change_nothing(tmp_path):
    plain = MusicDPOTrainer(tiny_generator(), args=config(tmp_path), train_dataset=pairs())
    plain.train()
    for adapter in (None, LORA):
        saving = MusicDPOTrainer(
            tiny_generator(),
            args=config(tmp_path, gradient_checkpointing=True),
            train_dataset=pairs(),
            peft_config=adapter,
        )
        saving.train()
        if adapter is None:
            torch.testing.assert_close(torch.tensor(losses(saving)), torch.tensor(losses(plain)), atol=1e-6, rtol=1e-6)
    halves = config(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    accumulated = MusicDPOTrainer(tiny_generator(), args=halves, train_dataset=pairs())
    accumulated.train()
    torch.testing.assert_close(torch.tensor(losses(accumulated)), torch.tensor(losses(plain)), atol=1e-4, rtol=1e-4)


class StockHeadDPOTrainer(DPOTrainer):
    """Stock but for its tokenisation of text: TRL puts its own fused head on the model."""

    def _prepare_dataset(self, dataset, *args):
        return dataset


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_alarm_stock_trl_on_the_kv_vocabulary_gives_the_same_losses(loss_type, tmp_path):
    """Goes off on the day that TRL changes what its trainers expect of the fused call."""
    native = MusicDPOTrainer(tiny_generator(), args=config(tmp_path, loss_type=[loss_type]), train_dataset=pairs())
    native.train()
    policy, reference = (KVVariant.from_generator(tiny_generator()) for _ in range(2))
    policy.freeze_codec()
    policy.text_encoder.requires_grad_(False)
    tokenizer = FlatTokenizer.for_generator(policy)
    stock = StockHeadDPOTrainer(
        policy,
        reference,
        config(tmp_path, loss_type=[loss_type]),
        train_dataset=flat_pairs(pairs(), tokenizer, policy.config, tmp_path / "pairs.arrow"),
        processing_class=tokenizer,
    )
    assert "forward" in vars(policy)  # TRL's own head is in place
    assert "forward" not in vars(native.generator)
    stock.train()
    torch.testing.assert_close(torch.tensor(losses(native)), torch.tensor(losses(stock)), atol=1e-4, rtol=1e-4)
    for key in ("rewards/margins", "logps/chosen", "entropy", "mean_token_accuracy"):
        first = [trainer.state.log_history[0][key] for trainer in (native, stock)]
        assert math.isclose(*first, rel_tol=1e-4, abs_tol=1e-5), key


def test_the_patch_is_gone_once_a_trainer_is_built(tmp_path):
    stock = dpo_trainer.add_fused_lm_head, dpo_trainer.create_model_from_path
    MusicDPOTrainer(tiny_generator(), args=config(tmp_path), train_dataset=pairs())
    assert (dpo_trainer.add_fused_lm_head, dpo_trainer.create_model_from_path) == stock
    with pytest.raises(ValueError, match="exo_pair|smoothing"):
        MusicDPOTrainer(tiny_generator(), args=config(tmp_path, loss_type=["exo_pair"]), train_dataset=pairs())
    assert (dpo_trainer.add_fused_lm_head, dpo_trainer.create_model_from_path) == stock


def test_no_ping_and_no_chat_card(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(base_trainer, "send_telemetry", lambda *args, **kwargs: sent.append(kwargs))
    monkeypatch.delenv("CI", raising=False)
    trainer = MusicDPOTrainer(tiny_generator(), args=config(tmp_path), train_dataset=pairs())
    trainer.create_model_card(model_name="x")
    assert not sent
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_resume_is_bit_exact(adapter, tmp_path):
    """Six steps in one go, and a few and the rest after a resume, or none after the last: the same parameters to the last bit."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}  # a second epoch begins at step 5
    straight = MusicDPOTrainer(
        tiny_generator(), args=config(tmp_path / "a", **options), train_dataset=pairs(), peft_config=adapter
    )
    straight.train()
    for start in (2, 4, 6):
        resumed = MusicDPOTrainer(
            tiny_generator(), args=config(tmp_path / "b", **options), train_dataset=pairs(), peft_config=adapter
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{start}"))
        assert resumed.state.global_step == 6
        ours = resumed.model.state_dict()
        moved = 0
        for name, tensor in straight.model.state_dict().items():
            assert torch.equal(tensor, ours[name]), name
            moved += not torch.equal(tensor, resumed.ref_model.state_dict()[name]) if adapter is None else 1
        assert moved


def test_a_resumed_run_warns_of_weights_that_are_missing_and_not_of_tied_ones(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", said.append)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    for start in (None, str(tmp_path / "checkpoint-1")):
        trainer = MusicDPOTrainer(tiny_generator(), args=config(tmp_path, **options), train_dataset=pairs())
        trainer.train(resume_from_checkpoint=start)
    assert not said
    weights = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    gone = next(name for name in weights if "q_proj" in name)
    save_file(
        {name: tensor for name, tensor in weights.items() if name != gone},
        tmp_path / "checkpoint-1" / "model.safetensors",
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert said == [f"There were missing keys in the checkpoint model loaded: {[gone]}."]


def test_checkpoint_and_final_model_are_stock_musicgens_that_generate(tmp_path):
    trainer = MusicDPOTrainer(
        tiny_generator(), args=config(tmp_path, save_strategy="steps", save_steps=2), train_dataset=pairs()
    )
    generation = tiny_generator().generation_config.to_dict()
    trainer.train()
    assert trainer.generator.generation_config.to_dict() == generation
    trainer.save_model()
    names = set(tiny_generator().state_dict())
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        stock, report = MusicgenForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert set(stock.state_dict()) == names
        text = tiny_generator().text_inputs(PROMPTS[:2])
        audio = stock.generate(input_ids=text[0], attention_mask=text[1], do_sample=True, max_new_tokens=12)
        assert audio.shape[:2] == (2, 1)
        assert torch.isfinite(audio).all()
        written = {path.name for path in folder.iterdir()}
        assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= written
        assert not written & {"README.md", "training_args.bin"}  # neither TRL's card nor a pickle of ours
        saved = json.loads((folder / "config.json").read_text())
        assert (saved["model_type"], saved["architectures"]) == ("musicgen", ["MusicgenForConditionalGeneration"])
    final = MusicgenForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(final.decoder.lm_heads[1].weight, trainer.generator.decoder.lm_heads[1].weight)


@pytest.mark.parametrize("given", ["name", "generator", "adapter"])
def test_an_adapter_on_a_relative_folder_loads_from_any_working_directory(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_generator().save_pretrained("base")
    model, lora = "base", LoraConfig(r=2, target_modules=LORA_TARGETS)
    if given != "name":
        model = load_generator("base")
        assert model.name_or_path == "base"
    if given == "adapter":
        model, lora = get_peft_model(FlatMusicRLForCausalLM.from_generator(model), lora), None
    trainer = MusicDPOTrainer(
        model, args=config(tmp_path / "out", max_steps=1), train_dataset=pairs(), peft_config=lora
    )
    trainer.save_model()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "base")
    assert isinstance(load_generator(tmp_path / "out"), MusicRLForConditionalGeneration)


def test_a_bundled_base_is_named_as_it_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "musicrl-tiny").mkdir()  # a bundled name wins over a folder
    assert prepare_generator("musicrl-tiny").name_or_path == "musicrl-tiny"


def test_adapter_loads_on_a_stock_model(tmp_path):
    base = tmp_path / "base"
    tiny_generator().save_pretrained(base)
    trainer = MusicDPOTrainer(str(base), args=config(tmp_path / "out"), train_dataset=pairs(), peft_config=LORA)
    trainer.train()
    trainer.save_model()
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(base)
    assert adapter["auto_mapping"]["base_model_class"] == "MusicgenForConditionalGeneration"
    stock = MusicgenForConditionalGeneration.from_pretrained(base)
    with_adapter = PeftModel.from_pretrained(stock, tmp_path / "out")
    trained = dict(trainer.model.named_parameters())
    loaded = {name: p for name, p in with_adapter.named_parameters() if "lora_" in name}
    assert loaded
    for name, parameter in loaded.items():
        assert torch.equal(parameter, trained[name]), name
    text = tiny_generator().text_inputs(PROMPTS[:1])
    assert torch.isfinite(with_adapter.generate(input_ids=text[0], attention_mask=text[1], max_new_tokens=12)).all()


def test_a_trained_adapter_keeps_learning_against_its_own_start(tmp_path):
    model = get_peft_model(FlatMusicRLForCausalLM.from_generator(tiny_generator()), LORA)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    trainer = MusicDPOTrainer(model, args=config(tmp_path), train_dataset=pairs())
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) < 1e-4  # the reference is the adapter's start, not the bare base


def test_an_adapter_on_a_bundled_one_is_saved_without_a_warning(tmp_path, recwarn):
    """PEFT misses the base's configuration, which a bundled adapter does not have; no embedding was trained."""
    args = config(tmp_path)
    MusicDPOTrainer("musicrl-tiny-u", args=args, train_dataset=pairs(), peft_config=LORA).save_model(
        str(tmp_path / "out")
    )
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not [warning for warning in recwarn if "config file" in str(warning.message)]


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scored", [{}, {"ref_chosen_logps": [-1.5, -2.0], "ref_rejected_logps": [-3.0, -0.5]}])
def test_batches_are_trls(scored):
    random = torch.Generator().manual_seed(0)
    lengths = {"prompt_ids": (3, 1), "chosen_ids": (4, 8), "rejected_ids": (8, 12)}
    rows = [
        {name: torch.randint(50, (length[row],), generator=random).tolist() for name, length in lengths.items()}
        | {name: values[row] for name, values in scored.items()}
        for row in range(2)
    ]
    ours, theirs = PairCollator(pad_token_id=99)(rows), DataCollatorForPreference(pad_token_id=99)(rows)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 3 + len(scored)
    for name, values in theirs.items():
        assert ours[name].dtype == values.dtype
        assert ours[name].tolist() == values.tolist(), name
    assert (theirs["input_ids"] == 99).any()


@pytest.mark.parametrize("adapter", [False, True])
def test_arithmetic_is_counted_as_transformers_counts_it(adapter, tmp_path):
    """With weights that are counted once."""
    options = {"peft_config": LORA} if adapter else {}
    trainer = MusicDPOTrainer(tiny_generator(), args=config(tmp_path), train_dataset=pairs(), **options)
    inputs = next(iter(trainer.get_train_dataloader()))
    counted = trainer.floating_point_ops(inputs)
    assert counted == transformers.Trainer.floating_point_ops(trainer, inputs) > 0
    trainer.model.num_parameters = None  # is not asked again
    assert trainer.floating_point_ops(inputs) == counted


def test_ties_are_left_out_and_counted(tmp_path):
    labels = ["a", "tie", "b", "both_bad", "a", "b", "a", "tie"]
    trainer = MusicDPOTrainer(tiny_generator(), args=config(tmp_path), train_dataset=pairs(preference=labels))
    assert len(trainer.train_dataset) == 5
    assert trainer.left_out == {"train_dataset": 3}
    with pytest.raises(ValueError, match="none of its 8 rows has a winner"):
        MusicDPOTrainer(tiny_generator(), args=config(tmp_path), train_dataset=pairs(preference=["tie"] * 8))


def test_bad_data_is_refused(tmp_path):
    def build(ds, **options):
        return MusicDPOTrainer(tiny_generator(), args=config(tmp_path, **options), train_dataset=ds)

    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        build(pairs().select([]))
    with pytest.raises(ValueError, match="`train_dataset` is needed"):
        build(None)
    with pytest.raises(ValueError, match=r"'rejected_codes'.*cache_codes"):
        build(pairs().remove_columns("rejected_codes"))
    with pytest.raises(ValueError, match=r"row 0: `chosen_codes` has shape \(8, 5\), the generator 4 codebooks"):
        build(pairs(K=8))
    with pytest.raises(ValueError, match=r"row 0: `chosen_codes`: .*\[0, 16\)"):
        build(pairs(V=64))
    with pytest.raises(ValueError, match=r"`max_length` = 1024"):
        build(pairs(), max_length=1024)
    with pytest.raises(ValueError, match="MusicDPOConfig"):
        MusicDPOTrainer(tiny_generator(), train_dataset=pairs())


def test_bad_models_are_refused(tmp_path):
    def build(model, reference):
        return MusicDPOTrainer(model, reference, config(tmp_path), pairs())

    generator = tiny_generator()
    with pytest.raises(ValueError, match="generator of its own"):
        build(generator, generator)
    with pytest.raises(ValueError, match=r"`ref_model` has .*\(4, 32, 1\)"):
        build(generator, tiny_generator(V=32))
    with pytest.raises(ValueError, match="`model` must be"):
        build(nn.Linear(2, 2), None)
    with pytest.raises(ValueError, match="known|bundled|neither"):
        build("no such model", None)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta", 0.0),
        ("test_share", 1.0),
        ("label_smoothing", 0.5),
        ("max_steps", 0),
        ("lora_r", -1),
        ("learning_rate", 0.0),
    ],
)
def test_bad_job_fields_are_refused(field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        DPOJob(preferences="p", output_dir="o", **{field: value})


# -- the job -----------------------------------------------------------------------------------------------------------


def saved_preferences(folder, labels=("a", "b", "tie", "a", "b", "a", "both_bad", "b", "a", "b")):
    random = torch.Generator().manual_seed(2)

    def clip():
        return audio_bytes(torch.rand(1, 96, generator=random) - 0.5, 400, "wav")

    rows = [
        {
            "prompt": f"{PROMPTS[i % 4]} {i}",
            "chosen": clip(),
            "rejected": clip(),
            "chosen_model": "x",
            "rejected_model": "y",
            "preference": label,
            "listener": "rule",
            "source": "test",
            "created_at": "2026-01-01T00:00:00",
        }
        for i, label in enumerate(labels)
    ]
    save_preferences(preferences_from_rows(rows), folder)
    return str(folder)


@pytest.mark.parametrize("lora_r", [0, 2])
def test_job_from_sound_to_saved_model(lora_r, tmp_path):
    tiny_generator(dropout=0.1).save_pretrained(tmp_path / "base")
    job = DPOJob(
        model=str(tmp_path / "base"),
        preferences=saved_preferences(tmp_path / "preferences"),
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-2,
        lora_r=lora_r,
        test_share=0.3,
        precompute_ref_log_probs=True,
    )
    folder = run_dpo(job)
    record = json.loads((folder / "result.json").read_text())
    assert record["base_model"] == job.model
    assert record["metrics"]["left_out"] == 2
    assert record["metrics"]["world_size"] == 1
    assert record["metrics"]["pairs"] < 8
    assert "eval_loss" in record["metrics"]
    assert record["config"]["beta"] == 0.1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert abs(next(line["loss"] for line in lines if "loss" in line) - math.log(2)) < 1e-4
    assert (folder / ("adapter_model.safetensors" if lora_r else "model.safetensors")).is_file()
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "pairs").exists()
    resumed = run_dpo(DPOJob(**{**vars(job), "resume_from_checkpoint": "last"}))
    assert resumed == folder


def test_job_without_its_checkpoint_stops_before_any_work(tmp_path):
    job = DPOJob(preferences=str(tmp_path), output_dir=str(tmp_path / "out"), resume_from_checkpoint="last")
    with pytest.raises(FileNotFoundError, match="`resume_from_checkpoint` = 'last'"):
        run_dpo(job)


@pytest.mark.parametrize("options", [{"loss_type": "foo"}, {"loss_type": "exo_pair"}, {"save_total_limit": -1}])
def test_a_job_refuses_at_once_what_its_trainer_would_refuse_late(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        DPOJob(preferences="prefs", output_dir="out", **options)


def test_every_loss_that_a_job_takes_is_trls(tmp_path):
    for loss in LOSSES:
        args = config(tmp_path, max_steps=1, loss_type=[loss], label_smoothing=0.1)
        trainer = MusicDPOTrainer(tiny_generator(), args=args, train_dataset=pairs(2))
        trainer.train()
        assert math.isfinite(losses(trainer)[0]), loss


# -- two processes -----------------------------------------------------------------------------------------------------


def run_two_processes(script, *arguments):
    """Under torchrun with gloo: `accelerate launch --cpu --num_processes 2` would start one process and say nothing."""
    here = Path(__file__).parent
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(here / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_two_processes_equal_one(tmp_path):
    run_two_processes("two_processes.py", "dpo", tmp_path)
    found = json.loads((tmp_path / "dpo.json").read_text())
    assert found["world_size"] == 2
    one = MusicDPOTrainer(
        tiny_generator(), args=config(tmp_path / "one", per_device_train_batch_size=4), train_dataset=pairs()
    )
    one.train()
    assert abs(found["losses"][0] - math.log(2)) < 1e-4
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(losses(one)), atol=1e-4, rtol=1e-4)
