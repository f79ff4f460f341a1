import copy
import json
import math
from functools import partial

import pytest
import torch
from datasets import Dataset
from kv_variant import KVVariant
from peft import LoraConfig, PeftModel
from test_dpo import run_two_processes
from tiny import tiny_generator
from transformers import MusicgenForConditionalGeneration
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer import grpo_trainer, rloo_trainer

from musicrl_hf.flat import FlatMusicRLForCausalLM, FlatTokenizer
from musicrl_hf.generator import load_generator
from musicrl_hf.rewards import CombinedReward
from musicrl_hf.rewards.variety import variety
from musicrl_hf.training.online import (
    GRPOJob,
    MusicGRPOConfig,
    MusicGRPOTrainer,
    MusicRLOOConfig,
    MusicRLOOTrainer,
    RLOOJob,
    run_grpo,
    run_rloo,
)
from musicrl_hf.training.online_config import GRPO_LOSSES
from musicrl_hf.training.online_scoring import ClipReward, Rollouts
from musicrl_hf.training.ppo_policy import LORA_TARGETS

TRAINERS = {"rloo": MusicRLOOTrainer, "grpo": MusicGRPOTrainer}
CONFIGS = {"rloo": MusicRLOOConfig, "grpo": MusicGRPOConfig}
LORA = LoraConfig(r=2, target_modules=LORA_TARGETS)
both = pytest.mark.parametrize("kind", ["rloo", "grpo"])


def prompts(count=6):
    return Dataset.from_dict(
        {"prompt": ["slow jazz", "a happy fast reel", "loud rock", "soft air", "the", "pop"][:count]}
    )


def loudness(texts, audio, sampling_rate):
    assert sampling_rate == 400
    return audio.square().mean((1, 2)).sqrt()


def config(kind, folder, **options):
    defaults = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "learning_rate": 1e-2}
    defaults |= {"duration_s": 0.1, "beta": 0.05, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    return CONFIGS[kind](str(folder), **(defaults | {"lr_scheduler_type": "constant"} | options))


def logged(trainer, key):
    return [line[key] for line in trainer.state.log_history if key in line]


@both
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_first_kl_is_0_and_the_reward_hears_whole_clips(kind, adapter, tmp_path):
    heard = []

    def reward(texts, audio, sampling_rate):
        heard.append((list(texts), audio))
        return loudness(texts, audio, sampling_rate)

    generator = tiny_generator(dropout=0.1)
    trainer = TRAINERS[kind](generator, reward, config(kind, tmp_path), prompts(), peft_config=adapter)
    trainer.train()
    assert abs(logged(trainer, "kl")[0]) < 1e-5
    assert abs(logged(trainer, "kl")[1]) > 1e-6
    assert logged(trainer, "completions/mean_length") == [4 * 5, 4 * 5]  # K * F: 0.1 s at 50 frames a second
    for texts, audio in heard:
        assert audio.shape == (4, 1, 5 * 8)
        assert len(set(texts)) == 1  # the clips of one prompt, to be compared
        assert len({clip.sum().item() for clip in audio}) > 1
    assert len({texts[0] for texts, _ in heard}) == 2
    scores = loudness(None, heard[0][1], 400)
    assert math.isclose(logged(trainer, "reward")[0], scores.mean().item(), rel_tol=1e-5)


@both
def test_the_policy_learns_to_make_the_loudest_clips(kind, tmp_path):
    """One codebook of four codes and five frames: all 1024 clips can be listened to."""
    generator = tiny_generator(K=1, V=4)
    every = torch.cartesian_prod(*[torch.arange(4)] * 5)[:, None]
    loud = loudness(None, generator.decode_codes(every), 400).quantile(0.95).item()
    options = {"max_steps": 20, "per_device_train_batch_size": 16, "num_generations": 16, "beta": 0.0}
    trainer = TRAINERS[kind](generator, loudness, config(kind, tmp_path, **options), prompts(1))
    trainer.train()
    found = logged(trainer, "reward")
    assert found[0] < loud < min(found[-3:])


@both
def test_stereo_trains(kind, tmp_path):
    shapes = []

    def reward(texts, audio, sampling_rate):
        shapes.append(tuple(audio.shape))
        return loudness(texts, audio, sampling_rate)

    trainer = TRAINERS[kind](tiny_generator(audio_channels=2, K=8), reward, config(kind, tmp_path), prompts())
    trainer.train()
    assert shapes == [(4, 2, 40)] * 2
    assert abs(logged(trainer, "kl")[0]) < 1e-5
    assert logged(trainer, "completions/mean_length") == [8 * 5, 8 * 5]


@both
def test_temperature_is_the_same_in_sampling_and_scoring(kind, tmp_path):
    """Where clips are sampled at 0.5 and scored at 0.5, the mean surprise of the samples is their entropy."""
    options = {"temperature": 0.5, "num_generations": 256, "per_device_train_batch_size": 256, "max_steps": 1}
    trainer = TRAINERS[kind](tiny_generator(K=1), loudness, config(kind, tmp_path, **options), prompts(1))
    assert trainer.generator.scoring_temperature == trainer.ref_model.scoring_temperature == 0.5
    assert trainer.generation_config.temperature == 0.5
    trainer.train()
    generator = tiny_generator(K=1)
    text = generator.text_inputs(["slow jazz"] * 256)
    codes = generator.sample_codes(*text, 5, temperature=0.5)
    with torch.no_grad():
        scores = generator.score_codes(codes, *text, temperature=0.5)
    assert abs(logged(trainer, "entropy")[0] - scores.entropies.mean().item()) < 0.05
    assert abs(logged(trainer, "entropy")[0] + scores.logprobs.mean().item()) < 0.15


@both
def test_several_steps_on_one_set_of_clips_and_gradient_checkpointing(kind, tmp_path):
    options = {"max_steps": 4, "num_iterations": 2, "gradient_checkpointing": True}
    calls = []

    def reward(texts, audio, sampling_rate):
        calls.append(len(texts))
        return loudness(texts, audio, sampling_rate)

    trainer = TRAINERS[kind](tiny_generator(), reward, config(kind, tmp_path, **options), prompts())
    trainer.train()
    assert calls == [4, 4]


STOCK = {"rloo": (RLOOTrainer, rloo_trainer), "grpo": (GRPOTrainer, grpo_trainer)}


@pytest.mark.parametrize(("kind", "more"), [("rloo", {}), ("grpo", {}), ("grpo", {"entropy_coef": 0.2})])
def test_alarm_stock_trl_on_the_kv_vocabulary_gives_the_same_losses(kind, more, tmp_path):
    """Goes off on the day that TRL changes what its trainers expect of the fused call or of `generate`."""
    options = {"max_steps": 3, "temperature": 0.8, **more}
    native = TRAINERS[kind](tiny_generator(), loudness, config(kind, tmp_path, **options), prompts())
    native.train()

    policy = KVVariant.from_generator(tiny_generator())
    policy.freeze_codec()
    policy.text_encoder.requires_grad_(False)
    policy.name_or_path = policy.config.name_or_path = str(tmp_path / "base")
    reference = KVVariant.from_generator(tiny_generator())
    args = config(kind, tmp_path, **options)
    args.max_completion_length = 4 * 5
    reward = ClipReward(loudness, Rollouts(policy))
    stock_class, module = STOCK[kind]
    load = module.create_model_from_path
    module.create_model_from_path = lambda *args, **kwargs: reference
    try:  # nothing but where the reference comes from is changed
        stock = stock_class(
            policy, reward, args, train_dataset=prompts(), processing_class=FlatTokenizer.for_generator(policy)
        )
    finally:
        module.create_model_from_path = load
    assert "forward" in vars(policy)  # TRL's own head is in place
    stock.train()
    for key in ("loss", "kl", "reward", "entropy", "grad_norm"):
        torch.testing.assert_close(
            torch.tensor(logged(native, key)), torch.tensor(logged(stock, key)), atol=2e-4, rtol=1e-3, msg=key
        )


def test_a_trainer_built_meanwhile_takes_no_gradient_from_anothers_entropy(tmp_path):
    model = FlatMusicRLForCausalLM.from_generator(tiny_generator())
    first, norms = copy.deepcopy(model), []
    for policy, meanwhile in ((first, False), (model, True)):
        torch.manual_seed(0)
        trainer = MusicGRPOTrainer(policy, loudness, config("grpo", tmp_path, entropy_coef=0.2, max_steps=1), prompts())
        if meanwhile:
            MusicRLOOTrainer(policy, loudness, config("rloo", tmp_path, max_steps=1), prompts())
        trainer.train()
        assert policy.entropy_gradient
        norms.append(logged(trainer, "grad_norm"))
    assert norms[0] == norms[1]


@both
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_resume_is_bit_exact(kind, adapter, tmp_path):
    """In the epoch of the checkpoint, over the border of an epoch (of three steps: six prompts, two a step), and behind the last step."""
    options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 8}
    build = partial(TRAINERS[kind], reward_funcs=loudness, train_dataset=prompts(), peft_config=adapter)
    straight = build(tiny_generator(), args=config(kind, tmp_path / "a", **options))
    straight.train()
    for start in (2, 5, 7):
        resumed = build(tiny_generator(), args=config(kind, tmp_path / "b", **options))
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{start}"))
        assert resumed.state.global_step == 7
        ours = resumed.model.state_dict()
        for name, tensor in straight.model.state_dict().items():
            assert torch.equal(tensor, ours[name]), name


@both
def test_clips_are_sampled_in_the_precision_that_they_are_scored_in(kind, tmp_path, monkeypatch):
    """By the policy that is trained; their sound is decoded in float32, and not held while the policy is updated."""
    found, decoded = {"sample_codes": [], "score_codes": []}, []
    for name, seen in found.items():
        asked = getattr(FlatMusicRLForCausalLM, name)

        def noted(self, *args, asked=asked, seen=seen, **options):
            seen.append(torch.is_autocast_enabled("cpu"))
            return asked(self, *args, **options)

        monkeypatch.setattr(FlatMusicRLForCausalLM, name, noted)

    def heard(texts, audio, sampling_rate):
        decoded.append((torch.is_autocast_enabled("cpu"), audio.dtype))
        return loudness(texts, audio, sampling_rate)

    args = config(kind, tmp_path, bf16=True, use_cpu=True, max_steps=1)
    trainer = TRAINERS[kind](tiny_generator(), heard, args, prompts())
    trainer.train()
    assert len(found["sample_codes"]) == 1
    assert found["score_codes"]
    assert all(found["sample_codes"] + found["score_codes"])
    assert decoded == [(False, torch.float32)]
    assert trainer._rollouts._ids is None


@both
def test_a_reward_that_compares_clips_hears_those_of_a_prompt_together(kind, tmp_path, monkeypatch):
    """On each process: six clips are three prompts' of two, but three clips of each of two processes are not."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = {"rloo": RLOOJob, "grpo": GRPOJob}[kind]
    options = {"prompts": "p.txt", "output_dir": "out", "num_generations": 2, "per_device_train_batch_size": 3}
    assert job(reward=["adherence"], **options)
    with pytest.raises(ValueError, match="num_generations.*divide the 3 clips of a set on each process"):
        job(reward=["0.5*adherence", "0.5*variety"], **options)
    monkeypatch.delenv("WORLD_SIZE")
    args = config(kind, tmp_path, num_generations=2, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert args.per_device_train_batch_size * args.steps_per_generation == 6
    TRAINERS[kind](tiny_generator(), variety, args, prompts())
    args.per_device_train_batch_size = 1
    args.steps_per_generation = 1  # as on each of two processes
    with pytest.raises(ValueError, match="num_generations.*divide the 1 clips"):
        TRAINERS[kind](tiny_generator(), CombinedReward({"variety": variety}), args, prompts())


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (RLOOJob, {"normalise": "foo"}, "normalise"),
        (RLOOJob, {"sample_steps": -1}, "sample_steps"),
        (RLOOJob, {"save_total_limit": -1}, "save_total_limit"),
        (RLOOJob, {"reward": ["adherence", "adherence"]}, "named twice"),
        (GRPOJob, {"loss_type": "foo"}, "loss_type"),
        (GRPOJob, {"scale_rewards": "foo"}, "scale_rewards"),
    ],
)
def test_a_job_refuses_at_once_what_its_trainer_would_refuse_late(kind, options, named):
    with pytest.raises(ValueError, match=named):
        kind(prompts="p.txt", output_dir="out", **options)


def test_every_loss_of_grpo_that_a_job_takes_is_trls(tmp_path):
    for loss in GRPO_LOSSES:
        args = config("grpo", tmp_path, max_steps=1, loss_type=loss)
        trainer = MusicGRPOTrainer(tiny_generator(), loudness, args, prompts())
        trainer.train()
        assert math.isfinite(logged(trainer, "loss")[0])


@both
def test_saved_model_is_a_stock_musicgen_that_generates(kind, tmp_path):
    trainer = TRAINERS[kind](tiny_generator(), loudness, config(kind, tmp_path, max_steps=1), prompts())
    trainer.train()
    trainer.save_model()
    stock, report = MusicgenForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    text = tiny_generator().text_inputs(["slow jazz"])
    audio = stock.generate(input_ids=text[0], attention_mask=text[1], do_sample=True, max_new_tokens=12)
    assert torch.isfinite(audio).all()
    assert not (tmp_path / "README.md").exists()
    assert not (tmp_path / "training_args.bin").exists()


@both
def test_an_anchor_of_the_callers_choice_beside_an_adapter(kind, tmp_path):
    anchor = tiny_generator(seed=5)
    trainer = TRAINERS[kind](
        tiny_generator(), loudness, config(kind, tmp_path, max_steps=1), prompts(), ref_model=anchor, peft_config=LORA
    )
    trainer.train()
    assert trainer.generator.decoder is not anchor.decoder
    assert isinstance(trainer.model, PeftModel)
    assert logged(trainer, "kl")[0] > 0.05  # measured to the anchor, from the start


@both
def test_an_adapter_on_an_adapter_is_anchored_to_the_first(kind, tmp_path):
    """First the reward of the machine, then of the people: with the second adapter off, what speaks is the first."""
    tiny_generator().save_pretrained(tmp_path / "base")
    args = config("rloo", tmp_path / "r", learning_rate=0.05)
    first = MusicRLOOTrainer(str(tmp_path / "base"), loudness, args, prompts(), peft_config=LORA)
    first.train()
    first.save_model()
    merged = load_generator(str(tmp_path / "r"))
    second = TRAINERS[kind](str(tmp_path / "r"), loudness, config(kind, tmp_path / "ru"), prompts(), peft_config=LORA)
    second.train()
    second.save_model()
    assert abs(logged(second, "kl")[0]) < 1e-5
    codes, text = torch.randint(0, 16, (1, 4, 5)), merged.text_inputs(["slow jazz"])

    def score(generator):
        with torch.no_grad():
            return generator.score_codes(codes, *text).logprobs

    with second.model.disable_adapter():
        torch.testing.assert_close(score(second.generator), score(merged), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(score(second.generator), score(merged), atol=1e-4)
    assert not torch.allclose(score(load_generator(str(tmp_path / "base"))), score(merged), atol=1e-4)
    again = load_generator(str(tmp_path / "ru"))
    torch.testing.assert_close(score(again), score(second.generator), atol=1e-5, rtol=1e-5)


# -- rewards -----------------------------------------------------------------------------------------------------------


@both
def test_components_of_a_combination_are_logged_and_weights_apply(kind, tmp_path):
    brightness = lambda texts, audio, rate: audio.diff().abs().mean((1, 2))  # noqa: E731
    combined = CombinedReward({"loudness": loudness, "brightness": brightness}, {"loudness": 2.0, "brightness": -1.0})
    trainer = TRAINERS[kind](tiny_generator(), combined, config(kind, tmp_path), prompts())
    trainer.train()
    for reward, loud, bright in zip(
        logged(trainer, "reward"), logged(trainer, "rewards/loudness/mean"), logged(trainer, "rewards/brightness/mean")
    ):
        assert math.isclose(reward, 2 * loud - bright, abs_tol=1e-5)


@both
def test_several_rewards_hear_the_same_sound(kind, tmp_path):
    heard = {"first": [], "second": []}

    def listener(name):
        def reward(texts, audio, sampling_rate):
            heard[name].append(audio)
            return loudness(texts, audio, sampling_rate)

        reward.__name__ = name
        return reward

    args = config(kind, tmp_path, reward_weights=[1.0, 0.5])
    trainer = TRAINERS[kind](tiny_generator(), [listener("first"), listener("second")], args, prompts())
    decode, decoded = trainer.generator.decode_codes, []
    trainer.generator.decode_codes = lambda *given: decoded.append(decode(*given)) or decoded[-1]
    trainer.train()
    sounds = zip(decoded, heard["first"], heard["second"], strict=True)  # decoded once for both
    assert all(torch.equal(sound, first) and torch.equal(sound, second) for sound, first, second in sounds)
    assert math.isclose(logged(trainer, "reward")[0], 1.5 * logged(trainer, "rewards/first/mean")[0], rel_tol=1e-5)


@both
@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda audio: torch.zeros(len(audio), 1), r"shape \(4, 1\) for 4 clips"),
        (lambda audio: torch.full((len(audio),), torch.nan), "NaN"),
        (lambda audio: [0.0] * len(audio), "list"),
    ],
    ids=["shape", "nan", "list"],
)
def test_rewards_that_would_poison_the_run_are_refused(kind, scores, message, tmp_path):
    trainer = TRAINERS[kind](
        tiny_generator(), lambda texts, audio, rate: scores(audio), config(kind, tmp_path), prompts()
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()


# -- bad input ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "options",
    [
        {"mask_truncated_completions": True},
        {"max_completion_length": 512},
        {"use_vllm": True},
        {"use_transformers_continuous_batching": True},
        {"disable_dropout": False},
        {"duration_s": 31.0},
        {"duration_s": 0.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_language_models_are_refused(kind, options, tmp_path):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        config(kind, tmp_path, **options)


@both
@pytest.mark.parametrize(
    "options",
    [{"generation_kwargs": {"guidance_scale": 3.0}}, {"top_k": 250}, {"top_p": 0.9}, {"repetition_penalty": 1.1}],
)
def test_sampling_that_is_not_scored_is_refused_before_training(kind, options, tmp_path):
    name = "guidance_scale" if "generation_kwargs" in options else next(iter(options))
    with pytest.raises(ValueError, match=f"`{name}`"):
        TRAINERS[kind](tiny_generator(), loudness, config(kind, tmp_path, **options), prompts())


@both
def test_bad_arguments_are_refused(kind, tmp_path):
    build = TRAINERS[kind]
    args = config(kind, tmp_path, per_device_train_batch_size=16)
    with pytest.raises(ValueError, match="at least 4 rows"):
        build(tiny_generator(), loudness, args, prompts(3))
    with pytest.raises(ValueError, match="`prompt` column"):
        build(tiny_generator(), loudness, config(kind, tmp_path), Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="load_rewards"):
        build(tiny_generator(), "adherence", config(kind, tmp_path), prompts())
    with pytest.raises(ValueError, match="`reward_funcs`"):
        build(tiny_generator(), [], config(kind, tmp_path), prompts())
    with pytest.raises(ValueError, match=CONFIGS[kind].__name__):
        build(tiny_generator(), loudness, config("grpo" if kind == "rloo" else "rloo", tmp_path), prompts())


@both
@pytest.mark.parametrize(
    ("field", "value"), [("reward", []), ("temperature", 0.0), ("num_iterations", 0), ("max_steps", 0), ("max_kl", 0.0)]
)
def test_bad_job_fields_are_refused(kind, field, value):
    job = {"rloo": RLOOJob, "grpo": GRPOJob}[kind]
    with pytest.raises(ValueError, match=f"`{field}`"):
        job(prompts="p", output_dir="o", **{field: value})
    with pytest.raises(ValueError, match="`save_steps` = 3"):
        job(prompts="p", output_dir="o", num_iterations=2, save_steps=3)
    with pytest.raises(ValueError, match="`num_generations` = 3 must be at least 2 and divide the 4 clips of a step"):
        job(prompts="p", output_dir="o", num_generations=3, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="`max_kl` = 30.0 needs a `beta` above 0"):
        job(prompts="p", output_dir="o", max_kl=30.0, beta=0.0)


# -- the job -----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(("lora_r", "bf16"), [(0, False), (2, True)])
def test_job_from_prompts_to_saved_model(kind, lora_r, bf16, tmp_path, monkeypatch):
    tiny_generator().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("slow jazz\n\na happy reel\nloud rock\n")
    (tmp_path / "online_rewards.py").write_text(
        "def loud(prompts, audio, rate):\n    return audio.abs().mean((1, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    job_class, run = {"rloo": (RLOOJob, run_rloo), "grpo": (GRPOJob, run_grpo)}[kind]
    options = {
        "model": str(tmp_path / "base"),
        "prompts": "prompts.txt",
        "reward": ["2.0*online_rewards:loud"],
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "save_steps": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "duration_s": 0.1,
        "lora_r": lora_r,
        "bf16": bf16,
        "sample_steps": 2,
    }
    folder = run(job_class(**options))
    record = json.loads((folder / "result.json").read_text())
    assert record["method"] == kind.upper()
    assert record["metrics"]["prompts"] == 3
    assert record["metrics"]["rewards/online_rewards:loud/mean"] > 0
    assert (folder / ("adapter_model.safetensors" if lora_r else "model.safetensors")).is_file()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= 2
    assert len(list((folder / "samples").glob("step_*/*.wav"))) == 2 * 3
    run(job_class(**options, resume_from_checkpoint="last"))
    with pytest.raises(FileNotFoundError, match="no file"):
        run(job_class(**{**options, "prompts": "missing.txt"}))


@both
def test_a_kl_budget_is_of_whole_clips(kind, tmp_path, monkeypatch, capsys):
    """TRL logs a mean over a clip's codes: 4 of each of 5 frames here."""
    tiny_generator().save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("slow jazz\na happy reel\n")
    job_class, run = {"rloo": (RLOOJob, run_rloo), "grpo": (GRPOJob, run_grpo)}[kind]
    options = {
        "model": str(tmp_path / "base"),
        "prompts": str(tmp_path / "prompts.txt"),
        "reward": ["test_online:loudness"],
    }
    options |= {
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "duration_s": 0.1,
        "learning_rate": 1e-2,
    }

    def kls(folder: str, **more) -> list[float]:
        lines = (run(job_class(**options, output_dir=str(tmp_path / folder), **more)) / "metrics.jsonl").read_text()
        return [line["kl"] for line in map(json.loads, lines.splitlines()) if "kl" in line]

    whole = kls("whole")
    assert len(whole) == 4
    assert max(whole) > 1e-5
    assert kls("within", max_kl=20 * max(whole) + 1e-5) == whole
    first = next(step for step, kl in enumerate(whole) if 20 * kl > 5 * max(whole))
    assert kls("beyond", max_kl=5 * max(whole)) == whole[: first + 1]
    assert f"KL to the anchor is {20 * whole[first]:.4g} nats a clip" in capsys.readouterr().out


@both
@pytest.mark.slow
def test_two_processes_sample_different_clips_and_agree_on_the_weights(kind, tmp_path):
    run_two_processes("two_processes.py", kind, tmp_path)
    first, second = (json.loads((tmp_path / f"{kind}.{rank}.json").read_text()) for rank in range(2))
    assert first["world_size"] == 2
    assert not set(first["heard"]) & set(second["heard"])
    assert abs(first["kl"]) < 1e-5
    assert first["weights"] == second["weights"]
    alone = TRAINERS[kind](
        *(tiny_generator(), loudness, config(kind, tmp_path, per_device_eval_batch_size=2), prompts()),
        eval_dataset=prompts(3),
    ).evaluate()
    assert first["evaluated"] == second["evaluated"] == pytest.approx(alone, abs=1e-6)
