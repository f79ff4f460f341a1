import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from test_likelihood import as_they_are
from test_losses import slow_gae
from tiny import tiny_generator
from torch import Tensor
from torch.testing import assert_close
from transformers import MusicgenForConditionalGeneration

from musicrl_hf.config import load_config
from musicrl_hf.delay import delay_codes
from musicrl_hf.generator import MusicRLForConditionalGeneration, load_generator
from musicrl_hf.likelihood import score_with_heads
from musicrl_hf.rewards import CombinedReward
from musicrl_hf.rewards.variety import variety
from musicrl_hf.step_decoder import StepDecoder
from musicrl_hf.training import losses
from musicrl_hf.training.callbacks import KLBudget, MetricsWriter, SampleWriter
from musicrl_hf.training.ppo import MusicPPOTrainer, run_ppo
from musicrl_hf.training.ppo_config import MusicPPOConfig, PPOJob
from musicrl_hf.training.ppo_policy import LORA_TARGETS, VALUE_FILE, add_lora
from musicrl_hf.training.ppo_sampler import RolloutSampler, clip_seed

PROMPTS = ["slow piano", "fast guitar drums", "sad violin air", "happy reel"]
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=LORA_TARGETS)


class ReadableGenerator(MusicRLForConditionalGeneration):
    """A generator whose sound is its codes, one sample a code, so that a reward on the sound can have a known optimum."""

    def decode_codes(self, codes: Tensor, length: int | None = None) -> Tensor:
        return codes.flatten(1)[:, None].float() / self.config.codebook_size


def readable_generator(**options) -> ReadableGenerator:
    tiny = tiny_generator(**options)
    model = ReadableGenerator(tiny.config)
    model.load_state_dict(tiny.state_dict())
    model.restore_audio_token_ids()
    model.tokenizer = tiny.tokenizer
    return model.eval()


def even_codes(prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor:
    """Share of even codes, of a codebook of 16: at most 1."""
    return ((audio * 16).round() % 2 == 0).float().mean((1, 2))


def loudness(prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor:
    return audio.square().mean((1, 2))


def config(folder: Path, **options) -> MusicPPOConfig:
    defaults = {
        "duration_s": 0.08,  # 4 frames
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return MusicPPOConfig(output_dir=str(folder), **{**defaults, **options})


def logged(trainer: MusicPPOTrainer, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


# -- the algorithm -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "paper", "kl_mix": 0.0},
        {"objective": "paper", "kl_mix": 0.0, "value_model": "separate"},
        {"objective": "ppo", "kl_coef": 0.0, "num_ppo_epochs": 2, "num_mini_batches": 2},
        {"objective": "ppo", "kl_coef": 0.0, "num_generations": 4},
    ],
    ids=["paper", "paper with a separate value model", "ppo", "ppo against the prompt's other clips"],
)
def test_reaches_the_known_optimum(tmp_path, options):
    args = config(tmp_path, max_steps=60, per_device_train_batch_size=16, **options)
    trainer = MusicPPOTrainer(readable_generator(), even_codes, args, PROMPTS)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert rewards[0] < 0.6
    assert rewards[-1] > 0.97  # the optimum is 1: every code even


@pytest.mark.parametrize("objective", ["paper", "ppo"])
def test_a_strong_anchor_keeps_the_policy_where_it_was(tmp_path, objective):
    args = config(tmp_path, max_steps=15, objective=objective, kl_mix=0.9, kl_coef=9.0, learning_rate=3e-3)
    trainer = MusicPPOTrainer(readable_generator(), even_codes, args, PROMPTS)
    trainer.train()
    assert logged(trainer, "kl")[-1] < 0.5


def test_gradient_of_the_papers_objective_by_hand(tmp_path):
    """Two decoder steps of one codebook with 4 codes; the gradient of the head's logits is known in closed form.

    With logits z, pi = softmax(z / T) and J as in the paper:
      d log pi(a) / d z_v = (1[v = a] - pi_v) / T
      d KL / d z_v       = pi_v (log pi_v - log pi0_v - KL) / T
    and V_t = 0 + b (the head's weights start at 0), so d loss_V / d b = mean(b - R).
    """
    a, temperature, vf_coef = 0.25, 0.9, 0.5
    args = config(tmp_path, objective="paper", kl_mix=a, temperature=temperature, vf_coef=vf_coef, duration_s=0.04)
    anchor = tiny_generator(K=1, V=4, seed=1)
    trainer = MusicPPOTrainer(tiny_generator(K=1, V=4), loudness, args, PROMPTS, ref_model=anchor)
    policy = trainer.model.generator
    bias = 0.3
    trainer.model.value_head.bias.data.fill_(bias)

    codes, rewards = torch.tensor([[[2, 0]], [[3, 1]]]), torch.tensor([1.0, -0.5])
    input_ids, mask = policy.text_inputs(PROMPTS[:2])
    batch = {"codes": codes, "input_ids": input_ids, "attention_mask": mask, "scores": rewards}
    trainer.compute_loss(trainer.model, batch).backward()

    def trunk_states(model: MusicRLForConditionalGeneration) -> Tensor:
        shifted = torch.tensor([[4, 2], [4, 3]])  # the start id, then the first code
        out = model.decoder.model(
            input_ids=shifted, encoder_hidden_states=model.encode_text(input_ids, mask), encoder_attention_mask=mask
        )
        return out.last_hidden_state

    with torch.no_grad():
        hidden = trunk_states(policy)
        ref_hidden = trunk_states(anchor)
        expected = torch.zeros_like(policy.decoder.lm_heads[0].weight)
        for b, t in itertools.product(range(2), range(2)):
            pi = (policy.decoder.lm_heads[0].weight @ hidden[b, t] / temperature).softmax(0)
            pi0 = (anchor.decoder.lm_heads[0].weight @ ref_hidden[b, t] / temperature).softmax(0)
            kl = (pi * (pi.log() - pi0.log())).sum()
            chosen = torch.eye(4)[codes[b, 0, t]]
            d_logpi = (chosen - pi) / temperature
            d_kl = pi * (pi.log() - pi0.log() - kl) / temperature
            d_loss = -((1 - a) * d_logpi * (rewards[b] - bias) - a * d_kl) / 2  # the mean over 2 clips
            expected += d_loss[:, None] * hidden[b, t]
    assert_close(policy.decoder.lm_heads[0].weight.grad, expected)
    assert_close(trainer.model.value_head.bias.grad[0], vf_coef * (bias - rewards).mean())


def test_ppo_with_exact_kl_has_the_gradient_of_the_regularised_expectation():
    """Every trajectory of a two-step world with 3 codes is listed, so E[R] - beta E[sum KL] can be differentiated itself.

    The surrogate at ratio 1 plus the differentiated KL of each state, averaged with the trajectories' probabilities, must
    have that gradient (divided by the 2 steps that both are means over), for any baseline that looks at the state alone.
    """
    torch.manual_seed(0)
    first, second = torch.randn(3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    ref_first, ref_second = torch.randn(3), torch.randn(3, 3)
    scores, baseline, beta = torch.randn(3, 3), torch.randn(4), 0.3

    def kl(logits, ref_logits):
        return (logits.softmax(-1) * (logits.log_softmax(-1) - ref_logits.log_softmax(-1))).sum(-1)

    p1, p2 = first.softmax(0), second.softmax(1)
    expectation = sum(
        p1[i] * p2[i, j] * (scores[i, j] - beta * (kl(first, ref_first) + kl(second[i], ref_second[i])))
        for i, j in itertools.product(range(3), range(3))
    )
    wanted = torch.autograd.grad(-expectation / 2, (first, second))

    total = torch.zeros(())
    for i, j in itertools.product(range(3), range(3)):
        logits = torch.stack([first, second[i]])[None, None]  # [B = 1, K = 1, S = 2, V = 3]
        ref_logits = torch.stack([ref_first, ref_second[i]])[None, None]
        codes = torch.tensor([[[i, j]]])
        scores_of_codes = score_with_heads(logits[:, 0], [as_they_are], codes, codes >= 0, 3, ref_logits=ref_logits)
        divergence = scores_of_codes.kl[:, 0]
        logprobs = torch.stack([first.log_softmax(0)[i], second[i].log_softmax(0)[j]])[None]
        rewards = losses.step_rewards(scores[i, j][None], divergence.detach(), beta)
        values = torch.stack([baseline[3], baseline[i]])[None]
        advantages, _ = losses.gae(rewards, values, gamma=1.0, lam=1.0)
        surrogate, _, _ = losses.ppo_clip_loss(logprobs, logprobs.detach(), advantages, 0.2)
        total = total + (p1[i] * p2[i, j]).detach() * (surrogate + beta * divergence.mean())
    for found, expected in zip(torch.autograd.grad(total, (first, second)), wanted):
        assert_close(found, expected)


def test_clips_and_scores_follow_one_distribution(tmp_path):
    trainer = MusicPPOTrainer(readable_generator(), even_codes, config(tmp_path, objective="ppo"), PROMPTS)
    clips = trainer.rollout(PROMPTS)
    twin = trainer.model.generator.step_logprobs(clips["codes"], PROMPTS, temperature=0.99)
    assert_close(clips["old_logprobs"], twin)
    assert clips["codes"].shape == (4, 4, 4)
    assert clips["old_logprobs"].shape == (4, 4 + 4 - 1)


def test_by_default_the_clips_reward_reaches_its_first_decoder_step(tmp_path):
    """One reward, at the end: a lambda below 1 would leave all but the last steps of a clip without a teacher."""
    trainer = MusicPPOTrainer(
        readable_generator(), even_codes, config(tmp_path, objective="ppo", kl_coef=0.0, duration_s=1.0), PROMPTS
    )
    clips = trainer.rollout(PROMPTS)
    left = clips["scores"][:, None] - clips["old_values"]
    assert clips["scores"].std() > 0
    assert_close(clips["advantages"], (left - left.mean()) / left.std(unbiased=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("objective", "lora", "bf16"),
    [
        ("paper", False, False),
        ("paper", True, False),
        ("ppo", False, False),
        ("ppo", True, True),
        ("paper", False, True),
    ],
)
def test_the_first_kl_is_zero_though_the_checkpoint_says_dropout(tmp_path, objective, lora, bf16):
    generator = readable_generator(dropout=0.1)
    model = add_lora(generator, LORA, "base") if lora else generator
    trainer = MusicPPOTrainer(model, even_codes, config(tmp_path, objective=objective, bf16=bf16), PROMPTS)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0.0
    assert logged(trainer, "kl")[1] > 0.0
    if objective == "ppo":
        assert logged(trainer, "ratio")[0] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("objective", ["paper", "ppo"])
def test_a_batch_of_two_equals_two_accumulation_steps_of_one(tmp_path, objective):
    weights = []
    for batch, accumulation in ((2, 1), (1, 2)):
        args = config(
            tmp_path,
            objective=objective,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.1,
        )
        trainer = MusicPPOTrainer(readable_generator(), even_codes, args, PROMPTS, ref_model=tiny_generator(seed=3))
        trainer.train()
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    start = readable_generator().decoder.lm_heads[0].weight
    assert (weights[0]["policy.decoder.lm_heads.0.weight"] - start).abs().max() > 1e-4
    for name, value in weights[0].items():
        assert_close(value, weights[1][name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("whiten", [False, True])
def test_the_kl_in_the_loss_is_scaled_as_the_advantages_are(tmp_path, whiten):
    """Otherwise kl_coef would no longer be the price of a nat in units of the reward."""
    args = config(tmp_path, objective="ppo", kl_coef=0.1, entropy_coef=0.02, lam=0.95, whiten_rewards=whiten)
    trainer = MusicPPOTrainer(readable_generator(), even_codes, args, PROMPTS, ref_model=tiny_generator(seed=3))
    clips = trainer.rollout(PROMPTS)
    with torch.no_grad():
        kl = trainer.view(clips["input_ids"], clips["attention_mask"], clips["codes"])["kl"]
    rewards = torch.cat([-0.1 * kl[:, 1:], clips["scores"][:, None]], 1)
    spread = rewards.std(unbiased=False) if whiten else torch.ones(())
    rewards = rewards / spread
    assert_close(clips["old_values"].mean(), (clips["scores"].mean() / spread), rtol=1e-4, atol=1e-6)
    advantages = torch.tensor(
        [slow_gae(r, v, 1.0, 0.95) for r, v in zip(rewards.tolist(), clips["old_values"].tolist())]
    )
    assert trainer._kl_weight == pytest.approx(0.1 / float(spread * advantages.std(unbiased=False)), rel=1e-3)
    assert trainer._entropy_weight == pytest.approx(0.2 * trainer._kl_weight)
    whitened = (advantages - advantages.mean()) / advantages.std(unbiased=False)
    assert_close(clips["advantages"], whitened, atol=1e-4, rtol=1e-3)
    assert_close(clips["returns"], advantages + clips["old_values"])


def test_entropy_earns_what_entropy_coef_says_and_rises(tmp_path):
    """The loss falls by so much a nat, the mean over steps; and training on nothing else makes the codes more even."""
    entropies = {}
    for coefficient in (0.0, 0.5):
        args = config(tmp_path, objective="ppo", kl_coef=0.0, entropy_coef=coefficient, max_steps=40, optim="sgd")
        args.learning_rate = 0.2
        trainer = MusicPPOTrainer(readable_generator(), even_codes, args, PROMPTS, ref_model=tiny_generator(seed=3))
        clips = trainer.rollout(PROMPTS)
        if "advantages" not in clips:
            view = trainer.view(clips["input_ids"], clips["attention_mask"], clips["codes"])
            clips |= trainer.weigh(
                clips["scores"], {name: view[name].detach() for name in ("logprobs", "values", "kl")}
            )
        loss, now = trainer.compute_loss(trainer.model, clips, return_outputs=True)
        weight, args.entropy_coef = trainer._entropy_weight, 0.0
        plain = trainer.compute_loss(trainer.model, clips)
        args.entropy_coef = coefficient
        assert_close(loss, plain - weight * now["entropy"].mean())
        assert (weight > 0) == (coefficient > 0)
        trainer.train()
        entropies[coefficient] = [line["entropy"] for line in trainer.state.log_history if "entropy" in line]
    assert entropies[0.5][0] == pytest.approx(entropies[0.0][0])  # of the same clips
    even, plain = (sum(entropies[coefficient][-5:]) / 5 for coefficient in (0.5, 0.0))
    assert even > plain + 0.03


class LooksTwice(MusicPPOTrainer):
    """Views every set of clips before it trains on it, as is needed where one pass does not take them all."""

    def rollout(self, prompts):
        clips = super().rollout(prompts)
        if "advantages" not in clips:
            with torch.no_grad():
                view = self.view(clips["input_ids"], clips["attention_mask"], clips["codes"])
            clips |= self.weigh(clips["scores"], {name: view[name] for name in ("logprobs", "values", "kl")})
        return clips


@pytest.mark.parametrize("whiten", [False, True])
def test_the_pass_that_trains_on_all_clips_is_the_view_of_them(tmp_path, whiten):
    """The losses then need no pass before it, and are the same."""
    ends, logs = [], []
    for kind in (MusicPPOTrainer, LooksTwice):
        args = config(tmp_path, objective="ppo", max_steps=4, kl_coef=0.1, whiten_rewards=whiten)
        trainer = kind(readable_generator(), even_codes, args, PROMPTS, ref_model=tiny_generator(seed=3))
        trainer.train()
        ends.append(trainer.model.state_dict())
        logs.append(
            {name: logged(trainer, name) for name in ("loss", "kl", "ratio", "explained_variance", "advantage_std")}
        )
        trainer.state.global_step = 4
        assert ("advantages" in trainer.rollout(PROMPTS)) == (kind is LooksTwice)
    assert logs[0]["ratio"] == pytest.approx([1.0] * 4, abs=1e-6)
    for name, values in logs[0].items():
        assert values == pytest.approx(logs[1][name], rel=1e-4, abs=1e-6), name
    for name, value in ends[0].items():
        assert_close(value, ends[1][name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, lora):
    weights = []
    for checkpointing in (False, True):
        generator = readable_generator()
        torch.manual_seed(1)
        model = add_lora(generator, LORA, "base") if lora else generator
        args = config(tmp_path, activation_checkpointing=checkpointing, objective="ppo")
        trainer = MusicPPOTrainer(model, even_codes, args, PROMPTS)
        trainer.train()
        layers = generator.decoder.model.decoder.layers
        assert all(layer.gradient_checkpointing == checkpointing for layer in layers)
        weights.append(trainer.model.state_dict())
    for name, value in weights[0].items():
        assert_close(value, weights[1][name], msg=name)


def test_clips_are_sampled_in_chunks_that_fit(tmp_path):
    args = config(tmp_path, objective="ppo", local_rollout_forward_batch_size=3)
    trainer = MusicPPOTrainer(readable_generator(), even_codes, args, PROMPTS)
    clips = trainer.rollout(PROMPTS)
    assert {name: len(values) for name, values in clips.items()} == dict.fromkeys(clips, 4)
    twin = trainer.model.generator.step_logprobs(clips["codes"], PROMPTS, temperature=0.99)
    assert_close(clips["old_logprobs"], twin)


def test_stereo_trains_eight_codebooks(tmp_path):
    generator = tiny_generator(audio_channels=2, K=8)
    trainer = MusicPPOTrainer(generator, loudness, config(tmp_path, objective="ppo"), PROMPTS)
    clips = trainer.rollout(PROMPTS)
    assert clips["codes"].shape == (4, 8, 4)
    assert clips["advantages"].shape == (4, 4 + 8 // 2 - 1)
    trainer.train()
    trainer.save_model(str(tmp_path / "stereo"))
    assert MusicgenForConditionalGeneration.from_pretrained(tmp_path / "stereo").config.decoder.audio_channels == 2


# -- anchors -------------------------------------------------------------------------------------------------------------


def test_a_given_anchor_is_the_anchor_also_with_lora(tmp_path):
    other = tiny_generator(seed=5)
    trainer = MusicPPOTrainer(
        add_lora(readable_generator(), LORA, "base"), even_codes, config(tmp_path), PROMPTS, ref_model=other
    )
    codes = torch.randint(0, 16, (2, 4, 4))
    inputs = trainer.model.generator.text_inputs(PROMPTS[:2])
    assert_close(trainer.anchor.logits(codes, *inputs, 0.99), other.code_logits(codes, *inputs, 0.99))


def test_ru_with_lora_is_anchored_to_r_and_not_to_the_base(tmp_path):
    base, r_folder = tmp_path / "base", tmp_path / "r"
    tiny_generator().save_pretrained(base)
    r_trainer = MusicPPOTrainer(
        add_lora(load_generator(base), LORA, str(base)), loudness, config(tmp_path / "run", max_steps=3), PROMPTS
    )
    r_trainer.train()
    r_trainer.save_model(str(r_folder))

    ru = MusicPPOTrainer(add_lora(load_generator(r_folder), LORA, str(r_folder)), loudness, config(tmp_path), PROMPTS)
    codes = torch.randint(0, 16, (2, 4, 4))
    inputs = ru.model.generator.text_inputs(PROMPTS[:2])
    anchor = ru.anchor.logits(codes, *inputs, 0.99)
    r_logits = r_trainer.model.generator.code_logits(codes, *inputs, 0.99)
    assert_close(anchor, r_logits, atol=1e-5, rtol=1e-4)
    base_logits = load_generator(base).code_logits(codes, *inputs, 0.99)
    assert (anchor - base_logits).abs().max() > 1e-2


def heedful_generator() -> ReadableGenerator:
    """With random weights a generator hardly hears its text; this one does."""
    generator = readable_generator()
    for layer in generator.decoder.model.decoder.layers:
        for part in (layer.encoder_attn.v_proj, layer.encoder_attn.out_proj):
            part.weight.data *= 8
    return generator


@pytest.mark.parametrize("lora", [False, True])
def test_a_guided_anchor_scores_as_guidance_samples(tmp_path, lora):
    """Its logits are those that the sampler draws from, a step at a time, under guidance."""
    generator = heedful_generator()
    model = add_lora(generator, LORA, "base") if lora else generator
    trainer = MusicPPOTrainer(model, even_codes, config(tmp_path, ref_guidance_scale=3.0), PROMPTS)
    pad, (ids, mask) = generator.config.pad_code, generator.text_inputs(PROMPTS[:2])
    assert not mask.all()  # a padded prompt is among them
    codes = torch.randint(0, 16, (2, 4, 5))
    delayed = delay_codes(codes, pad)
    decoder = StepDecoder(generator.decoder, generator.encode_text(ids, mask), mask, delayed.shape[-1], 3.0)
    with torch.no_grad():
        before = [torch.full_like(delayed[..., 0], pad), *delayed.unbind(-1)[:-1]]
        twin = torch.stack([decoder.logits(decoder.step(each)) for each in before], 2)
    anchor = trainer.anchor.logits(codes, ids, mask, 0.9)
    assert_close(anchor, twin / 0.9, atol=1e-4, rtol=1e-4)
    assert (anchor - generator.code_logits(codes, ids, mask, 0.9)).abs().max() > 0.05


@pytest.mark.parametrize("objective", ["paper", "ppo"])
def test_the_kl_to_a_guided_anchor_teaches_what_guidance_plays(tmp_path, objective):
    """Guidance distillation: without a reward, the policy by itself comes near to its guided self."""
    settings = {"objective": objective, "kl_mix": 1.0, "kl_coef": 9.0, "ref_guidance_scale": 3.0}
    args = config(tmp_path, max_steps=40, learning_rate=3e-3, **settings)
    trainer = MusicPPOTrainer(heedful_generator(), lambda prompts, audio, rate: torch.zeros(len(audio)), args, PROMPTS)
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] > 0.1
    assert sum(kl[-5:]) / 5 < 0.5 * kl[0]


@pytest.mark.parametrize("lora", [False, True])
def test_what_learned_guidance_is_sampled_without_it_by_default(tmp_path, lora):
    """A saved model or adapter says so itself; one that learned from rewards alone is sampled as its base is."""
    start = tiny_generator()
    start.save_pretrained(tmp_path / "start")
    for scale in (3.0, 1.0):
        generator = load_generator(tmp_path / "start")
        model = add_lora(generator, LORA, str(tmp_path / "start")) if lora else generator
        args = config(tmp_path / "run", max_steps=1, ref_guidance_scale=scale)
        trainer = MusicPPOTrainer(model, even_codes, args, PROMPTS)
        trainer.train()
        trainer.save_model(str(tmp_path / f"at_{scale:g}"))
    usual = start.generation_config.guidance_scale
    assert usual != 1
    assert load_generator(tmp_path / "at_3").generation_config.guidance_scale == 1
    assert load_generator(tmp_path / "at_1").generation_config.guidance_scale == usual
    assert (tmp_path / "at_1/generation_config.json").is_file() != lora


def test_the_full_fine_tunes_anchor_stays_when_the_policy_moves(tmp_path):
    start = readable_generator()
    trainer = MusicPPOTrainer(readable_generator(), even_codes, config(tmp_path), PROMPTS)
    trainer.train()
    for name, value in start.decoder.state_dict().items():
        assert torch.equal(trainer.anchor.generator.decoder.state_dict()[name], value)


# -- files and resuming --------------------------------------------------------------------------------------------------


def test_saved_model_plays_in_stock_transformers(tmp_path):
    trainer = MusicPPOTrainer(tiny_generator(), loudness, config(tmp_path / "run"), PROMPTS)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    stock, info = MusicgenForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ours = trainer.model.generator
    inputs = ours.text_inputs(["slow piano"])
    audio = stock.generate(
        input_ids=inputs[0], attention_mask=inputs[1], do_sample=False, guidance_scale=1, max_new_tokens=12
    )
    assert audio.shape[:2] == (1, 1)
    assert torch.isfinite(audio).all()
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".json", ".safetensors"}  # and no pickle
    assert set(load_file(tmp_path / "out" / VALUE_FILE)) == {"value_head.weight", "value_head.bias"}


def test_adapter_is_a_stock_peft_adapter(tmp_path):
    tiny_generator().save_pretrained(tmp_path / "base")
    model = add_lora(load_generator(tmp_path / "base"), LORA, str(tmp_path / "base"))
    trainer = MusicPPOTrainer(model, loudness, config(tmp_path / "run", objective="ppo", max_steps=3), PROMPTS)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", VALUE_FILE}
    stock = PeftModel.from_pretrained(
        MusicgenForConditionalGeneration.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).merge_and_unload()
    merged = load_generator(tmp_path / "adapter")
    for name, value in merged.decoder.state_dict().items():
        assert torch.equal(stock.decoder.state_dict()[name], value)
    codes = torch.randint(0, 16, (1, 4, 4))
    assert_close(
        merged.step_logprobs(codes, ["sad air"]),
        trainer.model.generator.step_logprobs(codes, ["sad air"]),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "paper", "value_model": "separate"},
        {"objective": "ppo", "num_ppo_epochs": 2},
        {"objective": "paper", "lora": True},
    ],
    ids=["paper, separate value", "ppo", "lora"],
)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, options):
    lora = options.pop("lora", False)
    tiny = readable_generator(dropout=0.1)

    def trainer(folder: str) -> MusicPPOTrainer:
        generator = ReadableGenerator(tiny.config)
        generator.load_state_dict(tiny.state_dict())
        generator.tokenizer = tiny.tokenizer
        torch.manual_seed(7)
        model = add_lora(generator, LORA, "base") if lora else generator
        args = config(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2, **options)
        return MusicPPOTrainer(model, even_codes, args, PROMPTS)

    straight = trainer("straight")
    straight.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))

    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    ours, theirs = straight.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for key, state in ours.items():
        assert all(torch.equal(value, theirs[key][name]) for name, value in state.items())
    rewards = [logged(t, "reward") for t in (straight, resumed)]
    assert rewards[0] == rewards[1]  # the clips were drawn alike
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    if not lora:
        MusicgenForConditionalGeneration.from_pretrained(checkpoint)


def test_resuming_needs_the_value_baseline(tmp_path):
    trainer = MusicPPOTrainer(
        tiny_generator(), loudness, config(tmp_path, save_strategy="steps", save_steps=2), PROMPTS
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    separate = MusicPPOTrainer(tiny_generator(), loudness, config(tmp_path, value_model="separate"), PROMPTS)
    with pytest.raises(ValueError, match="value_model"):
        separate.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / VALUE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="value_head"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


# -- evaluation, logs, callbacks -----------------------------------------------------------------------------------------


def test_evaluation_uses_the_same_seeds_and_logs_each_reward(tmp_path):
    reward = CombinedReward({"even": even_codes, "loud": loudness}, {"even": 1.0, "loud": 0.5})
    args = config(tmp_path, eval_strategy="steps", eval_steps=1, learning_rate=1e-12, per_device_eval_batch_size=2)
    trainer = MusicPPOTrainer(readable_generator(), reward, args, PROMPTS, ["jazz", "rock", "pop"])
    trainer.train()
    first, second = ([line for line in trainer.state.log_history if "eval_reward" in line])[:2]
    assert first["eval_reward"] == second["eval_reward"]
    assert first["eval_reward"] == pytest.approx(first["eval_reward/even"] + 0.5 * first["eval_reward/loud"], abs=1e-6)
    assert {"reward", "reward/even", "reward/loud", "kl", "entropy", "value_loss", "advantage_std"} <= set(
        next(line for line in trainer.state.log_history if "loss" in line)
    )


def test_a_normalised_reward_is_evaluated_as_it_is(tmp_path):
    reward = CombinedReward({"even": even_codes, "loud": loudness}, normalise="normalise_then_sum")
    trainer = MusicPPOTrainer(readable_generator(), reward, config(tmp_path), PROMPTS, ["jazz", "rock"])
    metrics = trainer.evaluate()
    assert metrics["eval_reward"] == pytest.approx(metrics["eval_reward/even"] + metrics["eval_reward/loud"], abs=1e-6)
    assert trainer.rollout(PROMPTS)["scores"].mean().item() == pytest.approx(0.0, abs=1e-5)


def test_what_is_watched_hears_the_clips_that_the_reward_hears_and_is_not_trained_on(tmp_path):
    heard: dict[str, list[Tensor]] = {"reward": [], "watch": []}

    def trained(prompts, audio, rate):
        heard["reward"].append(audio)
        return even_codes(prompts, audio, rate)

    def watched(prompts, audio, rate):
        heard["watch"].append(audio)
        return loudness(prompts, audio, rate)

    rewards = []
    for watch in (None, {"loud": watched}):
        args = config(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=2)
        trainer = MusicPPOTrainer(readable_generator(), trained, args, PROMPTS, ["jazz", "rock", "pop"], watch=watch)
        heard["reward"], decoded, generator = [], [], trainer.model.generator
        decode = generator.decode_codes
        generator.decode_codes = lambda *given, decode=decode, to=decoded: to.append(decode(*given)) or to[-1]
        trainer.train()
        rewards.append(logged(trainer, "reward"))
        assert all(torch.equal(*both) for both in zip(decoded, heard["reward"], strict=True))
    assert rewards[0] == rewards[1]
    assert [len(audio) for audio in heard["watch"]] == [2, 1, 2, 1]  # three prompts, after steps 2 and 3
    evaluated = [audio for audio in heard["reward"] if len(audio) < len(heard["reward"][0])]
    assert all(torch.equal(*both) for both in zip(evaluated, heard["watch"], strict=True))  # decoded once for both
    means = [torch.cat(heard["watch"][i : i + 2]).square().mean().item() for i in (0, 2)]
    assert logged(trainer, "eval_watch/loud") == pytest.approx(means, abs=1e-6)


def test_what_is_watched_and_trained_on_is_scored_once(tmp_path):
    calls = []

    def counted(prompts, audio, rate):
        calls.append(len(prompts))
        return even_codes(prompts, audio, rate)

    reward = CombinedReward({"even": counted, "loud": loudness}, {"even": 2.0, "loud": 1.0})
    watch = {"even": counted, "quiet": lambda prompts, audio, rate: -audio.square().mean((1, 2))}
    trainer = MusicPPOTrainer(readable_generator(), reward, config(tmp_path), PROMPTS, ["jazz", "rock"], watch=watch)
    metrics = trainer.evaluate()
    assert calls == [2]
    assert metrics["eval_watch/even"] == metrics["eval_reward/even"]  # as it is, without the weight
    assert metrics["eval_watch/quiet"] == pytest.approx(-metrics["eval_reward/loud"])


def test_the_time_limit_of_the_reward_holds_for_what_is_watched(tmp_path):
    def hangs(prompts, audio, rate):
        time.sleep(60)
        return loudness(prompts, audio, rate)

    reward = CombinedReward({"even": even_codes}, timeout_s=0.2)
    trainer = MusicPPOTrainer(readable_generator(), reward, config(tmp_path), PROMPTS, ["jazz"], watch={"hangs": hangs})
    with pytest.raises(TimeoutError, match="`hangs` has not answered for 1 clips within 0.2 s"):
        trainer.evaluate()


def test_evaluation_leaves_the_run_as_it_was(tmp_path):
    rewards = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = MusicPPOTrainer(
            readable_generator(), even_codes, config(tmp_path, max_steps=3, **options), PROMPTS, ["jazz"]
        )
        trainer.train()
        rewards.append(logged(trainer, "reward"))
    assert rewards[0] == rewards[1]


def test_samples_metrics_and_the_kl_budget(tmp_path):
    generator = tiny_generator()
    callbacks = [SampleWriter(generator, ["slow piano", "Sad, sad air!"], 2, 0.1), MetricsWriter(), KLBudget(1e-6)]
    trainer = MusicPPOTrainer(generator, loudness, config(tmp_path, max_steps=6), PROMPTS, callbacks=callbacks)
    trainer.train()
    assert trainer.state.global_step == 2  # the KL is 0 at step 1 and over budget at step 2
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.wav"))
    assert files == [
        f"samples/step_{step}/{name}.wav" for step in (0, 2) for name in ("00_slow_piano", "01_sad_sad_air")
    ]
    samples, rate = soundfile.read(tmp_path / files[0])
    assert (len(samples), rate) == (40, 400)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "kl" in line] == [1, 2]


@pytest.mark.parametrize("logging_steps", [1, 10])
def test_a_policy_that_is_no_number_any_more_ends_the_run_before_it_is_saved(logging_steps, tmp_path):
    generator = tiny_generator()
    with torch.no_grad():
        generator.decoder.lm_heads[0].weight[0, 0] = torch.nan
    generator.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("slow piano\n")
    settings = {"logging_steps": logging_steps, "save_steps": 2, "per_device_train_batch_size": 2, "duration_s": 0.1}
    job = PPOJob(
        model=str(tmp_path / "base"),
        prompts=str(tmp_path / "prompts.txt"),
        reward=["test_ppo:loudness"],
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        **settings,
    )
    with pytest.raises(ValueError, match=r"at step [12]: the training has diverged. Go on from .* `learning_rate`"):
        run_ppo(job)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_whitened_rewards_still_tell_clips_apart(tmp_path):
    """A ramp that is the same for all clips would drown what they differ by."""
    shares = []
    for whiten in (False, True):
        args = config(tmp_path, objective="ppo", kl_coef=0.0, whiten_rewards=whiten, duration_s=1.0)
        trainer = MusicPPOTrainer(readable_generator(), even_codes, args, PROMPTS)
        advantages = trainer.rollout(PROMPTS)["advantages"]
        shares.append(float(advantages.mean(1).var(unbiased=False) / advantages.var(unbiased=False)))
    assert shares == pytest.approx([1.0, 1.0], abs=1e-3)


def test_in_bfloat16_values_keep_their_digits(tmp_path):
    trainer = MusicPPOTrainer(readable_generator(), even_codes, config(tmp_path, bf16=True), PROMPTS)
    with torch.no_grad():
        trainer.model.value_head.weight.normal_(std=0.01)
        trainer.model.value_head.bias.fill_(8.8)
        clips = trainer.rollout(PROMPTS)
        values = trainer.view(clips["input_ids"], clips["attention_mask"], clips["codes"])["values"]
    assert len(values.unique()) > 0.9 * values.numel()


def test_an_evaluation_has_other_clips_than_any_rollout(tmp_path):
    trainer = MusicPPOTrainer(readable_generator(), even_codes, config(tmp_path), PROMPTS, eval_dataset=PROMPTS)
    heard = []
    decode = trainer.model.generator.decode_codes
    trainer.model.generator.decode_codes = lambda codes, length: heard.append(codes) or decode(codes, length)
    trainer.evaluate()
    trainer.rollout(PROMPTS)
    sampled, rolled = heard
    assert sampled.shape == rolled.shape
    assert not torch.equal(sampled, rolled)


def test_the_log_says_where_each_second_went(tmp_path):
    def slow(prompts, audio, sampling_rate):
        time.sleep(0.2)
        return torch.zeros(len(prompts))

    args = config(tmp_path, objective="ppo", max_steps=4, num_ppo_epochs=2)
    trainer = MusicPPOTrainer(tiny_generator(), slow, args, PROMPTS, eval_dataset=PROMPTS)
    trainer.train()
    trainer.evaluate()  # is not training
    (runtime,) = logged(trainer, "train_runtime")
    sampling, decoding, scoring, updating = (
        logged(trainer, f"{part}_s") for part in ("sample", "decode", "score", "update")
    )
    assert len(updating) == 4
    assert len(sampling) == len(decoding) == len(scoring) == 2  # a set of clips serves two steps
    assert min(sampling + decoding + updating) > 0
    assert 0.2 <= min(scoring) <= max(scoring) < 0.2 + max(updating)
    assert sum(sampling + decoding + scoring + updating) < runtime


def test_metrics_of_a_resumed_run_stand_there_once(tmp_path):
    def run(resume: str | None) -> None:
        args = config(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        trainer = MusicPPOTrainer(tiny_generator(), loudness, args, PROMPTS, callbacks=[MetricsWriter()])
        trainer.train(resume_from_checkpoint=resume)

    def steps() -> list[int]:
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        return [line["step"] for line in lines if "loss" in line]

    run(None)
    assert steps() == [1, 2, 3, 4]
    run(str(tmp_path / "checkpoint-2"))
    assert steps() == [1, 2, 3, 4]
    run(None)
    assert steps() == [1, 2, 3, 4]


def test_metrics_with_a_damaged_line_are_named(tmp_path):
    args = config(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    MusicPPOTrainer(tiny_generator(), loudness, args, PROMPTS, callbacks=[MetricsWriter()]).train()
    path = tmp_path / "metrics.jsonl"
    path.write_text("\0\0\0\n" + path.read_text())
    trainer = MusicPPOTrainer(tiny_generator(), loudness, args, PROMPTS, callbacks=[MetricsWriter()])
    with pytest.raises(ValueError, match="metrics.jsonl, line 1 is not what a run logs"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_last_step_is_logged_whatever_logging_steps_is(tmp_path):
    args = config(tmp_path, max_steps=3, logging_steps=2)
    MusicPPOTrainer(tiny_generator(), loudness, args, PROMPTS, callbacks=[MetricsWriter()]).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if {"loss", "kl", "reward"} <= line.keys()] == [2, 3]


def test_metrics_that_are_no_numbers_are_null(tmp_path):
    trainer = MusicPPOTrainer(tiny_generator(), loudness, config(tmp_path), PROMPTS, callbacks=[MetricsWriter()])
    trainer.log({"loss_like": float("nan"), "lr": 0.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 0,
        "loss_like": None,
        "lr": 0.5,
        "epoch": 0,
    }


def test_rollout_sampler_repeats_each_set_and_uses_every_prompt_alike():
    sampler = RolloutSampler(num_prompts=3, size=2, repeats=2, rollouts=3, seed=0)
    indices = list(sampler)
    assert len(indices) == len(sampler) == 12
    sets = [indices[i : i + 2] for i in range(0, 12, 2)]
    assert sets[0::2] == sets[1::2]  # each set comes twice in a row
    seen = [index for chosen in sets[0::2] for index in chosen]
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]  # two shuffles of three prompts
    assert indices == list(sampler)


def test_rollout_sampler_puts_the_clips_of_a_prompt_side_by_side():
    sampler = RolloutSampler(num_prompts=3, size=4, repeats=2, rollouts=3, seed=0, generations=2)
    indices = list(sampler)
    assert len(indices) == len(sampler) == 24
    assert indices[0::2] == indices[1::2]
    seen = [index for i in range(0, 24, 8) for index in indices[i : i + 4 : 2]]
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]


def test_what_prompts_differ_by_is_no_clips_merit(tmp_path):
    def by_prompt_alone(prompts, audio, sampling_rate):
        return torch.tensor([100.0 * PROMPTS.index(prompt) for prompt in prompts])

    args = config(tmp_path, objective="ppo", num_generations=2, per_device_train_batch_size=8)
    trainer = MusicPPOTrainer(readable_generator(), by_prompt_alone, args, PROMPTS)
    trainer.create_optimizer_and_scheduler(1)
    prompts = [prompt for prompt in PROMPTS[:2] for _ in range(4)]
    clips = trainer.rollout(prompts)
    assert clips["scores"].tolist() == [0.0] * 8
    trainer.train()
    assert min(logged(trainer, "reward")) > 1  # logged as it was heard


def test_seeds_differ_between_sets_and_processes():
    seeds = {clip_seed(seed, number, process) for seed in range(3) for number in range(50) for process in range(4)}
    assert len(seeds) == 3 * 50 * 4


# -- two processes -------------------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import sys
import torch
torch.set_num_threads(1)
from accelerate.utils import gather_object
from test_ppo import LORA, PROMPTS, add_lora, config, even_codes, loudness, readable_generator
from musicrl_hf.training.guard import OverOptimisationGuard
from musicrl_hf.training.ppo import MusicPPOTrainer
from musicrl_hf.training.processes import end_processes
for lora, objective in ((False, "paper"), (True, "ppo")):
    torch.manual_seed(0)
    generator = readable_generator()
    model = add_lora(generator, LORA, "base") if lora else generator
    best = {"metric_for_best_model": "watch/loud", "greater_is_better": True, "load_best_model_at_end": True}
    steps = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    args = config(f"{sys.argv[1]}/{objective}", objective=objective, **steps, **best)
    guard = OverOptimisationGuard("eval_watch/loud", patience=1)
    watch = {"loud": loudness}
    trainer = MusicPPOTrainer(
        model, even_codes, args, PROMPTS, ["jazz", "rock", "pop"], callbacks=[guard], watch=watch
    )
    assert trainer.accelerator.num_processes == args.world_size == 2, args.world_size
    trainer.train()
    codes = trainer._clips["codes"]
    codes = trainer.accelerator.gather(codes).chunk(2)
    assert not torch.equal(*codes), "both processes sampled the same clips"
    for name, value in trainer.model.named_parameters():
        ours, theirs = trainer.accelerator.gather(value.detach()[None]).unbind()
        assert torch.equal(ours, theirs), name
    start = readable_generator()
    moved = max(
        float((p.detach() - dict(start.named_parameters())[n]).abs().max())
        for n, p in generator.named_parameters() if n in dict(start.named_parameters())
    )
    assert lora or moved > 1e-3
    last = [line for line in trainer.state.log_history if "eval_reward" in line][-1]
    logs = gather_object([(last["eval_reward"], last["eval_watch/loud"], trainer.state.best_model_checkpoint)])
    assert logs[0] == logs[1]
    assert logs[0][2] is not None
    if trainer.accelerator.is_main_process:
        print("agreed", objective, lora)
del trainer, model, generator
end_processes()
"""


@pytest.mark.slow
def test_two_processes_sample_different_clips_and_agree_on_the_weights(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "src"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(script), str(tmp_path)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("agreed") == 2


# -- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"objective": "reinforce"}, "objective"),
        ({"value_model": "none"}, "value_model"),
        ({"kl_mix": 1.5}, "kl_mix"),
        ({"kl_mix": -0.1}, "kl_mix"),
        ({"kl_mix": float("nan")}, "kl_mix"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"ref_guidance_scale": 0.9}, "ref_guidance_scale"),
        ({"ref_guidance_scale": float("nan")}, "ref_guidance_scale"),
        ({"vf_coef": -1.0}, "vf_coef"),
        ({"entropy_coef": -1.0}, "entropy_coef"),
        ({"objective": "paper", "entropy_coef": 0.1}, "entropy_coef"),
        ({"temperature": 0.0}, "temperature"),
        ({"cliprange": 0.0}, "cliprange"),
        ({"cliprange_value": 0.0}, "cliprange_value"),
        ({"gamma": 1.1}, "gamma"),
        ({"lam": -0.1}, "lam"),
        ({"duration_s": 31.0}, "duration_s"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs"),
        ({"num_generations": 0}, "num_generations"),
        ({"num_generations": 3}, "num_generations"),
        ({"local_rollout_forward_batch_size": 0}, "local_rollout_forward_batch_size"),
        ({"objective": "paper", "num_ppo_epochs": 2}, "num_ppo_epochs"),
        ({"objective": "paper", "gamma": 0.9}, "gamma"),
        ({"objective": "paper", "whiten_rewards": True}, "whiten_rewards"),
        ({"objective": "ppo", "num_ppo_epochs": 3}, "max_steps"),
        ({"objective": "ppo", "num_ppo_epochs": 2, "save_strategy": "steps", "save_steps": 1}, "save_steps"),
        ({"max_steps": -1}, "max_steps"),
        ({"objective": "ppo", "per_device_train_batch_size": 1}, "objective"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, options, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lora_r": -1}, "lora_r"),
        ({"save_total_limit": -1}, "save_total_limit"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size"),
        ({"objective": "ppo", "per_device_train_batch_size": 1}, "objective"),
        ({"objective": "paper", "per_device_train_batch_size": 1, "normalise": "normalise_then_sum"}, "normalise"),
        ({"max_steps": 0}, "max_steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"max_kl": 0.0}, "max_kl"),
        ({"max_kl": 60.0, "ref_guidance_scale": 3.0}, "max_kl"),
        ({"reward": []}, "reward"),
        ({"eval_steps": 10}, "eval_prompts"),
        ({"sample_steps": 10}, "eval_prompts"),
        ({"eval_steps": -1, "eval_prompts": "p.txt"}, "eval_steps"),
        ({"watch": ["quality"]}, "watch"),
        ({"watch": ["quality"], "eval_prompts": "p.txt"}, "watch"),
        ({"lora_r": 4, "value_model": "separate"}, "value_model"),
        ({"objective": "dpo"}, "objective"),
        ({"num_generations": 3}, "num_generations"),
        ({"reward": ["quality", "0.2*variety"], "num_generations": 1}, "num_generations"),
        (
            {"reward": ["0.2*variety"], "num_generations": 2, "local_rollout_forward_batch_size": 5},
            "local_rollout_forward_batch_size",
        ),
        ({"watch": ["variety"], "eval_steps": 1, "eval_prompts": "p.txt"}, "watch"),
        (
            {
                **{"reward": ["quality", "variety"], "num_generations": 2, "guard": "reward/variety"},
                **{"eval_steps": 1, "save_steps": 1, "eval_prompts": "p.txt"},
            },
            "guard",
        ),
        ({"objective": "ppo", "num_ppo_epochs": 2, "save_steps": 3}, "save_steps"),
    ],
)
def test_jobs_that_make_no_sense_are_refused(options, named):
    with pytest.raises(ValueError, match=f"`{named}`"):
        PPOJob(prompts="prompts.txt", output_dir="out", **options)


def test_variety_takes_groups_that_are_scored_at_once():
    for options in ({"num_generations": 6, "per_device_train_batch_size": 12}, {"num_generations": 4}):
        PPOJob(prompts="prompts.txt", output_dir="out", reward=["quality", "0.2*variety"], **options)


class Louder:
    """A reward of a user's that compares the clips of a call."""

    compares_clips = True

    def __call__(self, prompts: list[str], audio: Tensor, sampling_rate: int) -> Tensor:
        return loudness(prompts, audio, sampling_rate) - loudness(prompts, audio, sampling_rate).mean()


@pytest.mark.parametrize(
    "reward", [variety, CombinedReward({"even": even_codes, "more": CombinedReward({"variety": variety})}), Louder()]
)
def test_variety_of_clips_that_are_alone_is_refused_from_python_too(tmp_path, reward):
    with pytest.raises(ValueError, match="`num_generations`"):
        MusicPPOTrainer(readable_generator(), reward, config(tmp_path), PROMPTS)
    with pytest.raises(ValueError, match="`watch`"):
        MusicPPOTrainer(
            readable_generator(), even_codes, config(tmp_path), PROMPTS, eval_dataset=PROMPTS, watch={"how": reward}
        )
    MusicPPOTrainer(readable_generator(), reward, config(tmp_path, num_generations=2), PROMPTS)


@pytest.mark.parametrize(("name", "value"), [("ACCELERATE_USE_FSDP", "true"), ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")])
def test_weights_that_are_shared_out_are_refused(name, value, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="FSDP .*several_gpus.yaml"):
        config(tmp_path)


def test_guidance_and_top_k_are_no_settings():
    """They would make the sampled policy another one than the scored."""
    with pytest.raises(ValueError, match="`guidance_scale`"):
        load_config(PPOJob, None, ["--prompts", "p.txt", "--output_dir", "out", "--guidance_scale", "3"])


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        (lambda prompts, audio, rate: torch.full((len(prompts),), torch.nan), "NaN"),
        (lambda prompts, audio, rate: torch.zeros(len(prompts), 1), "shape"),
        (lambda prompts, audio, rate: [0.0] * len(prompts), "list"),
    ],
)
def test_a_reward_that_is_none_is_refused(tmp_path, reward, problem):
    trainer = MusicPPOTrainer(tiny_generator(), reward, config(tmp_path), PROMPTS)
    with pytest.raises(ValueError, match=problem):
        trainer.train()


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    generator, args = tiny_generator(), config(tmp_path)
    with pytest.raises(ValueError, match="`reward`"):
        MusicPPOTrainer(generator, "adherence", args, PROMPTS)
    with pytest.raises(ValueError, match="`watch\\['quality'\\]` must be a callable"):
        MusicPPOTrainer(generator, loudness, args, PROMPTS, PROMPTS, watch={"quality": "quality"})
    with pytest.raises(ValueError, match="`watch` = loud is scored at evaluations only"):
        MusicPPOTrainer(generator, loudness, args, PROMPTS, watch={"loud": loudness})
    for prompts in ([], "slow piano", [None]):
        with pytest.raises(ValueError, match="`train_dataset`"):
            MusicPPOTrainer(generator, loudness, args, prompts)
    with pytest.raises(ValueError, match="`eval_dataset`"):
        MusicPPOTrainer(generator, loudness, args, PROMPTS, [])
    with pytest.raises(ValueError, match="`model`"):
        MusicPPOTrainer(MusicgenForConditionalGeneration(generator.config), loudness, args, PROMPTS)
    with pytest.raises(ValueError, match="num_codebooks"):
        MusicPPOTrainer(generator, loudness, args, PROMPTS, ref_model=tiny_generator(K=2))
    with pytest.raises(ValueError, match="itself"):
        MusicPPOTrainer(generator, loudness, args, PROMPTS, ref_model=generator)
    with pytest.raises(ValueError, match="`ref_model`"):
        MusicPPOTrainer(generator, loudness, args, PROMPTS, ref_model=3)
    with pytest.raises(ValueError, match="`duration_s`"):
        generator.frames_for(31.0)
    with pytest.raises(ValueError, match="separate"):
        MusicPPOTrainer(add_lora(generator, LORA, "base"), loudness, config(tmp_path, value_model="separate"), PROMPTS)
    with pytest.raises(ValueError, match="`max_kl`"):
        KLBudget(0.0)
    with pytest.raises(ValueError, match="`every`"):
        SampleWriter(generator, PROMPTS, 0, 1.0)


# -- the job -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_r", [0, 2])
def test_the_job_from_yaml_to_folder_and_on_from_its_last_checkpoint(tmp_path, monkeypatch, capfd, lora_r):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text("def loud(prompts, audio, rate):\n    return audio.square().mean((1, 2))\n")
    tiny_generator().save_pretrained(tmp_path / "base")
    Path("prompts.txt").write_text("slow piano\nfast guitar\n\n")
    Path("job.yaml").write_text(
        "model: base\nprompts: prompts.txt\neval_prompts: prompts.txt\nreward: [my_reward:loud]\noutput_dir: out\n"
        "objective: paper\nmax_steps: 4\nsave_steps: 2\neval_steps: 2\nsample_steps: 2\nduration_s: 0.1\n"
        f"lora_r: {lora_r}\nper_device_train_batch_size: 2\nlogging_steps: 1\nlearning_rate: 1e-3\nmax_kl: 100\n"
    )
    out = run_ppo(load_config(PPOJob, "job.yaml", []))
    assert out == Path("out")
    weights = "adapter_model.safetensors" if lora_r else "model.safetensors"
    assert {weights, VALUE_FILE, "metrics.jsonl", "result.json", "samples", "checkpoint-4"} <= {
        p.name for p in out.iterdir()
    }
    straight = load_file(out / weights)
    result = json.loads((out / "result.json").read_text())
    assert (Path(result["base_model"]).name, result["method"]) == ("base", "REINFORCE with a value baseline")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_reward" in line] == [0, 2, 4]  # each once
    assert (
        result["metrics"]["eval_reward"] == next(line for line in lines[::-1] if "eval_reward" in line)["eval_reward"]
    )
    printed = [line for line in capfd.readouterr().out.splitlines() if line.strip().startswith("step ")]
    assert sum("eval_reward" in line for line in printed) == 3
    assert len(set(printed)) == len(printed)
    saved = list(out.rglob("*.safetensors"))
    assert len(saved) == 6  # weights and value baseline, at the end and at two checkpoints
    assert {path.stat().st_mode for path in saved} == {(out / "result.json").stat().st_mode}  # what the umask says

    resume = ["--resume_from_checkpoint", "out/checkpoint-2", "--output_dir", "again"]
    again = run_ppo(load_config(PPOJob, "job.yaml", resume))
    for name, value in load_file(again / weights).items():
        assert torch.equal(value, straight[name])
    load_generator(again).sample(["slow piano"], duration_s=0.1, seed=0)
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint"):
        run_ppo(load_config(PPOJob, "job.yaml", ["--resume_from_checkpoint", "last", "--output_dir", "empty"]))


CONFIGS = sorted((Path(__file__).parent.parent / "examples" / "configs").glob("*.yaml"))
OURS = {"ppo", "ppo_paper", "musicrl_r", "musicrl_u", "musicrl_ru"}


def test_the_example_configs_are_jobs():
    found = {path.stem: load_config(PPOJob, path) for path in CONFIGS if path.stem in OURS}
    assert set(found) == OURS
    for job in found.values():
        assert job.trainer_config().max_steps == job.max_steps
    ru, r = found["musicrl_ru"], found["musicrl_r"]
    assert ru.model == ru.ref_model == r.output_dir  # RU starts from R and is anchored to it
    assert all(found[name].objective == "paper" for name in OURS - {"ppo"})
    assert (r.max_steps, found["musicrl_u"].max_steps, ru.max_steps) == (10_000, 2_000, 1_000)  # the paper's choices
