"""RLOO and GRPO: so many clips at once, scoring beside sampling, and on another device."""

import threading
import weakref
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from test_online import CONFIGS, TRAINERS, GRPOJob, RLOOJob, both, config, loudness, prompts
from test_ppo_scoring import MODES
from tiny import tiny_generator

from musicrl_hf.flat import FlatMusicRLForCausalLM
from musicrl_hf.rewards import CombinedReward
from musicrl_hf.rewards.variety import variety
from musicrl_hf.training.online import run_rloo

JOBS = {"rloo": RLOOJob, "grpo": GRPOJob}


def softness(texts, audio, sampling_rate):
    return -audio.abs().mean((1, 2))


def chunked(kind, folder, background, **options):
    """Settings of sets of four clips of two prompts, of which two are sampled at once."""
    chunks = {"local_rollout_forward_batch_size": 2, "score_in_background": background, "num_generations": 2}
    return config(kind, folder, **chunks, **options)


def differences(ours, theirs):
    return [name for (name, a), b in zip(ours.items(), theirs.items()) if not torch.equal(a, b[1])]


@both
@pytest.mark.parametrize("combined", [False, True])
def test_a_training_is_the_same_to_the_bit(kind, combined, tmp_path):
    runs = []
    for background in (False, True):
        asked = []

        def loud(texts, audio, sampling_rate, asked=asked):
            thread = threading.current_thread() is not threading.main_thread()
            asked.append((thread, len(texts), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            return loudness(texts, audio, sampling_rate)

        parts = {"loud": loud, "soft": softness, "variety": variety}
        rewards = CombinedReward(parts, None, "normalise_then_sum") if combined else [loud, softness]
        args = chunked(kind, tmp_path, background, max_steps=3, bf16=True, use_cpu=True, duration_s=0.2)
        trainer = TRAINERS[kind](tiny_generator(), rewards, args, prompts())
        trainer.train()
        assert asked == [(background, 2, False, False)] * 6
        runs.append(trainer)
    logs = [[line for line in run.state.log_history if "reward" in line] for run in runs]
    assert len(logs[0]) == 3
    own = {"rewards/loud/mean", "rewards/soft/mean"} if combined else {"rewards/loud/mean", "rewards/softness/mean"}
    assert own <= set(logs[1][0])
    for ours, theirs in zip(*logs):
        assert {k: v for k, v in ours.items() if "time" not in k} == {
            k: v for k, v in theirs.items() if "time" not in k
        }
    assert differences(runs[0].model.state_dict(), runs[1].model.state_dict()) == []


@both
def test_so_many_clips_are_sampled_and_scored_at_once(kind, tmp_path, monkeypatch):
    """Those of a chunk are the prompts' own, and its sound is let go before the next is decoded."""
    decoded, sampled, heard = [], [], []
    decode, sample = FlatMusicRLForCausalLM.decode_codes, FlatMusicRLForCausalLM.sample_codes

    def decodes(self, codes, *args):
        assert not [sound for sound in decoded if sound() is not None]
        audio = decode(self, codes, *args)
        decoded.append(weakref.ref(audio))
        return audio

    def samples(self, input_ids, *args, **options):
        sampled.append([self.tokenizer.decode(ids, skip_special_tokens=True) for ids in input_ids])
        return sample(self, input_ids, *args, **options)

    def reward(texts, audio, sampling_rate):
        heard.append(texts)
        return loudness(texts, audio, sampling_rate)

    monkeypatch.setattr(FlatMusicRLForCausalLM, "decode_codes", decodes)
    monkeypatch.setattr(FlatMusicRLForCausalLM, "sample_codes", samples)
    args = chunked(kind, tmp_path, False, max_steps=1, per_device_train_batch_size=8)
    TRAINERS[kind](tiny_generator(), [reward, softness], args, prompts()).train()
    assert len(decoded) == len(sampled) == len(heard) == 4
    assert len({text for chunk in heard for text in chunk}) == 4
    assert [[text.split() for text in chunk] for chunk in sampled] == [
        [text.split() for text in chunk] for chunk in heard
    ]


@both
def test_clips_are_scored_while_the_next_are_sampled(kind, tmp_path, monkeypatch):
    """Each waits for the other: the sampling of a chunk for the reward of the one before it, and the other way round."""
    sampling, asked = ([threading.Event() for _ in range(3)] for _ in range(2))
    sets, questions, sample = count(), count(), FlatMusicRLForCausalLM.sample_codes

    def waits(self, *args, **options):
        chunk = next(sets)
        sampling[chunk].set()
        assert chunk == 0 or asked[chunk - 1].wait(60), f"chunk {chunk - 1} is not scored beside chunk {chunk}"
        return sample(self, *args, **options)

    def reward(texts, audio, sampling_rate):
        chunk = next(questions)
        asked[chunk].set()
        assert chunk == 2 or sampling[chunk + 1].wait(60), f"chunk {chunk + 1} is not sampled beside chunk {chunk}"
        return loudness(texts, audio, sampling_rate)

    monkeypatch.setattr(FlatMusicRLForCausalLM, "sample_codes", waits)
    args = chunked(kind, tmp_path, True, max_steps=1, per_device_train_batch_size=6)
    TRAINERS[kind](tiny_generator(), reward, args, prompts()).train()
    assert next(sets) == next(questions) == 3


@MODES
@both
def test_faults_of_a_reward_are_raised_with_its_name(kind, background, tmp_path):
    def fails(texts, audio, sampling_rate):
        raise KeyError("no strings")

    train = partial(TRAINERS[kind], tiny_generator(), args=chunked(kind, tmp_path, background), train_dataset=prompts())
    with pytest.raises(ValueError, match="Reward `out of tune` raised KeyError for 2 clips: 'no strings'"):
        train(reward_funcs=CombinedReward({"out of tune": fails})).train()
    with pytest.raises(ValueError, match="Reward `fails` raised KeyError for 2 clips: 'no strings'"):
        train(reward_funcs=[loudness, fails]).train()
    release = threading.Event()
    hangs = CombinedReward({"hangs": lambda *clips: release.wait(300)}, timeout_s=0.3)
    try:
        with pytest.raises(TimeoutError, match="`hangs` has not answered for 2 clips within 0.3 s"):
            train(reward_funcs=hangs).train()
    finally:
        release.set()


@MODES
@both
def test_clips_are_handed_over_on_the_rewards_device(kind, background, tmp_path):
    devices = []

    def reward(texts, audio, sampling_rate):
        devices.append(audio.device)
        return torch.arange(len(texts), dtype=torch.float32)

    args = chunked(kind, tmp_path, background, max_steps=1, reward_device="meta")  # another device on any machine
    TRAINERS[kind](tiny_generator(), reward, args, prompts()).train()
    assert devices == [torch.device("meta")] * 2


@both
def test_settings_that_do_not_go_together_are_refused(kind, tmp_path):
    with pytest.raises(ValueError, match="`local_rollout_forward_batch_size` = 4 takes the 4 clips .* set it lower"):
        config(kind, tmp_path, score_in_background=True, local_rollout_forward_batch_size=4)
    with pytest.raises(ValueError, match="`local_rollout_forward_batch_size` must be at least 1, got 0"):
        config(kind, tmp_path, local_rollout_forward_batch_size=0)
    with pytest.raises(ValueError, match="`reward_device` = 'cuda:99' cannot be used here .*; give cpu"):
        config(kind, tmp_path, reward_device="cuda:99")
    options = {"prompts": "p.txt", "output_dir": "out", "per_device_train_batch_size": 8}
    with pytest.raises(ValueError, match="`local_rollout_forward_batch_size` = 64 takes the 8 clips"):
        JOBS[kind](score_in_background=True, **options)
    with pytest.raises(
        ValueError, match="`local_rollout_forward_batch_size` = 6, which are scored at once, be a multiple"
    ):
        JOBS[kind](reward=["variety"], local_rollout_forward_batch_size=6, **options)
    job = JOBS[kind](score_in_background=True, local_rollout_forward_batch_size=4, reward_device="cpu", **options)
    made = job.trainer_config()
    assert isinstance(made, CONFIGS[kind])
    assert (made.score_in_background, made.local_rollout_forward_batch_size) == (True, 4)
    assert made.rewards_at == torch.device("cpu")


def test_the_job_scores_in_the_background(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own_rewards.py").write_text(
        "import threading\n"
        "threads = set()\n"
        "def loud(prompts, audio, rate):\n"
        "    threads.add(threading.current_thread().name)\n"
        "    return audio.square().mean((1, 2))\n"
    )
    tiny_generator().save_pretrained(tmp_path / "base")
    Path("prompts.txt").write_text("slow piano\nfast guitar\n")
    options = {"model": "base", "prompts": "prompts.txt", "output_dir": "out", "max_steps": 1, "duration_s": 0.1}
    options |= {"per_device_train_batch_size": 4, "num_generations": 2, "local_rollout_forward_batch_size": 2}
    run_rloo(RLOOJob(reward=["own_rewards:loud"], score_in_background=True, **options))
    import own_rewards

    assert own_rewards.threads == {"rewards"}
