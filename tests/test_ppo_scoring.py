"""Scoring beside sampling, and on another device."""

import signal
import sys
import threading
import weakref
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest
import torch
from test_ppo import PROMPTS, ReadableGenerator, config, even_codes, loudness, readable_generator
from tiny import tiny_generator

from musicrl_hf.rewards import CombinedReward
from musicrl_hf.training.ppo import MusicPPOTrainer, run_ppo
from musicrl_hf.training.ppo_config import PPOJob

MODES = pytest.mark.parametrize("background", [False, True], ids=["after sampling", "in background"])


def chunked(folder: Path, clips: int = 4, background: bool = True, **options):
    """Settings of sets that are sampled two clips at a time."""
    chunks = {"local_rollout_forward_batch_size": 2, "score_in_background": background}
    return config(folder, per_device_train_batch_size=clips, **chunks, **options)


# -- the same numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combined", [False, True])
def test_a_training_is_the_same_to_the_bit(tmp_path, combined):
    prompts, runs = [*PROMPTS, "loud synth"], []
    for background in (False, True):
        modes = set()

        def loud(prompts, audio, sampling_rate, modes=modes):
            thread = threading.current_thread() is not threading.main_thread()
            modes.add((thread, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_num_threads()))
            return loudness(prompts, audio, sampling_rate)

        reward = CombinedReward({"even": even_codes, "loud": loud}, None, "normalise_then_sum") if combined else loud
        options = {"objective": "ppo", "num_ppo_epochs": 2, "max_steps": 6, "bf16": True, "background": background}
        trainer = MusicPPOTrainer(readable_generator(), reward, chunked(tmp_path, 5, **options), prompts)
        trainer.train()
        assert modes == {(background, False, False, torch.get_num_threads())}
        runs.append(trainer)
    logs = [[line for line in run.state.log_history if "reward" in line] for run in runs]
    assert len(logs[0]) == 3
    assert [list(line) for line in logs[0]] == [list(line) for line in logs[1]]
    assert {"sample_s", "decode_s", "score_s"} <= set(logs[1][0])
    for ours, theirs in zip(*logs):
        assert {k: v for k, v in ours.items() if k[-2:] != "_s"} == {k: v for k, v in theirs.items() if k[-2:] != "_s"}
    for (name, ours), theirs in zip(runs[0].model.state_dict().items(), runs[1].model.state_dict().values()):
        assert torch.equal(ours, theirs), name


def test_the_sound_of_a_chunk_is_let_go_before_the_next_is_decoded(tmp_path):
    decoded: list[weakref.ref] = []

    class Decodes(ReadableGenerator):
        def decode_codes(self, *args, **kwargs):
            assert not [sound for sound in decoded if sound() is not None]
            audio = super().decode_codes(*args, **kwargs)
            decoded.append(weakref.ref(audio))
            return audio

    generator = Decodes(readable_generator().config).eval()
    generator.tokenizer = tiny_generator().tokenizer
    reward, watch = CombinedReward({"even": even_codes}), {"loud": loudness}
    trainer = MusicPPOTrainer(generator, reward, chunked(tmp_path, background=False), PROMPTS, PROMPTS, watch=watch)
    trainer.rollout(PROMPTS)
    assert len(decoded) == 2
    assert {"eval_reward/even", "eval_watch/loud"} <= set(trainer.evaluate())


def test_clips_are_scored_while_the_next_are_sampled(tmp_path):
    """Each waits for the other: the sampling of a chunk for the reward of the one before it, and the other way round."""
    sampling, asked = ([threading.Event() for _ in range(3)] for _ in range(2))
    number = count()

    class Waits(ReadableGenerator):
        def sample_codes(self, *args, **kwargs):
            chunk = next(number)
            sampling[chunk].set()
            assert chunk == 0 or asked[chunk - 1].wait(60), f"chunk {chunk - 1} is not scored beside chunk {chunk}"
            return super().sample_codes(*args, **kwargs)

    def reward(prompts, audio, sampling_rate):
        chunk = PROMPTS.index(prompts[0])
        asked[chunk].set()
        assert chunk == 2 or sampling[chunk + 1].wait(60), f"chunk {chunk + 1} is not sampled beside chunk {chunk}"
        return loudness(prompts, audio, sampling_rate)

    generator = readable_generator()
    generator.__class__ = Waits
    args = config(tmp_path, per_device_train_batch_size=3, local_rollout_forward_batch_size=1, score_in_background=True)
    clips = MusicPPOTrainer(generator, reward, args, PROMPTS).rollout(PROMPTS[:3])
    assert torch.equal(clips["scores"], loudness([], generator.decode_codes(clips["codes"]), 400))


# -- faults --------------------------------------------------------------------------------------------------------------


@MODES
def test_what_a_reward_raises_is_raised_with_its_name(tmp_path, background):
    def fails(prompts, audio, sampling_rate):
        if "sad violin air" in prompts:
            raise KeyError("no strings")
        return loudness(prompts, audio, sampling_rate)

    trainer = MusicPPOTrainer(
        readable_generator(), CombinedReward({"fails": fails}), chunked(tmp_path, background=background), PROMPTS
    )
    with pytest.raises(ValueError, match="Reward `fails` raised KeyError for 2 clips: 'no strings' .*test_ppo_scoring"):
        trainer.rollout(PROMPTS)
    assert not trainer._metrics


@MODES
def test_a_reward_may_end_the_program(tmp_path, background):
    def exits(prompts, audio, sampling_rate):
        raise SystemExit(7)

    trainer = MusicPPOTrainer(readable_generator(), exits, chunked(tmp_path, background=background), PROMPTS)
    with pytest.raises(SystemExit, match="7"):
        trainer.rollout(PROMPTS)


@MODES
def test_a_reward_that_hangs_is_given_up(tmp_path, background):
    threads, release = [], threading.Event()

    def hangs(prompts, audio, sampling_rate):
        threads.append(threading.current_thread())
        if "sad violin air" in prompts:
            release.wait(300)
        return loudness(prompts, audio, sampling_rate)

    reward = CombinedReward({"hangs": hangs, "even": even_codes}, timeout_s=0.5)
    args = chunked(tmp_path, 6, background)
    trainer = MusicPPOTrainer(readable_generator(), reward, args, PROMPTS)
    try:
        with pytest.raises(TimeoutError, match="`hangs` has not answered for 2 clips within 0.5 s"):
            trainer.rollout([*PROMPTS, "pop", "rock"])
        if background:
            assert threads[-1].is_alive()
            assert threads[-1].daemon  # the process ends though it hangs
    finally:
        release.set()
    if background:
        threads[-1].join(60)
        assert not threads[-1].is_alive()
    assert len(threads) == 2  # and the third chunk is nobody's any more


def test_a_reward_that_is_given_up_stops_if_it_is_in_python(tmp_path):
    """A thread inside of torch when Python ends aborts the process."""
    threads = []

    def works_for_ever(prompts, audio, sampling_rate):
        threads.append(threading.current_thread())
        while True:
            audio = audio.tanh()

    reward = CombinedReward({"works": works_for_ever}, timeout_s=0.2)
    trainer = MusicPPOTrainer(readable_generator(), reward, chunked(tmp_path), PROMPTS)
    with pytest.raises(TimeoutError, match="`works`"):
        trainer.rollout(PROMPTS)
    assert [thread.is_alive() for thread in threads] == [False]


def test_after_a_fault_no_more_is_sampled(tmp_path):
    def fails(prompts, audio, sampling_rate):
        raise KeyError("no strings")

    trainer = MusicPPOTrainer(readable_generator(), fails, chunked(tmp_path), PROMPTS)
    chunk = trainer._scorer.decode(PROMPTS[:2], torch.zeros(2, 4, 4, dtype=torch.long))
    with trainer._scorer.in_background() as background:
        background.add(chunk)
        background._thread.join(60)
        with pytest.raises(ValueError, match="no strings"):
            background.add(chunk)


@pytest.mark.parametrize(("number", "stops"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_signals_are_heard_while_a_score_is_waited_for(tmp_path, number, stops):
    """SIGINT's handler raises; SIGTERM's, as a training sets it, takes note and lets the set be finished."""
    heard, release = [], threading.Event()

    def interrupts(prompts, audio, sampling_rate):
        if "sad violin air" in prompts:
            signal.pthread_kill(threading.main_thread().ident, number)
            assert release.wait(60), "the handler has not run"
        return loudness(prompts, audio, sampling_rate)

    def note(number, frame):
        heard.append(number)
        release.set()
        if stops:
            raise KeyboardInterrupt

    trainer = MusicPPOTrainer(readable_generator(), interrupts, chunked(tmp_path), PROMPTS)
    before = signal.signal(number, note)
    try:
        with pytest.raises(KeyboardInterrupt) if stops else nullcontext():
            assert len(trainer.rollout(PROMPTS)["scores"]) == 4
    finally:
        signal.signal(number, before)
    assert heard == [number]


# -- settings ------------------------------------------------------------------------------------------------------------


def test_one_chunk_a_set_has_nothing_to_overlap(tmp_path):
    problem = "`score_in_background` = True .* `local_rollout_forward_batch_size` = 4 takes the 4 clips .* set it lower"
    with pytest.raises(ValueError, match=problem):
        config(tmp_path, score_in_background=True, local_rollout_forward_batch_size=4)
    options = {"prompts": "p.txt", "output_dir": "out", "score_in_background": True}
    with pytest.raises(ValueError, match="`local_rollout_forward_batch_size` = 64 takes the 16 clips"):
        PPOJob(**options, gradient_accumulation_steps=2)
    job = PPOJob(**options, gradient_accumulation_steps=2, local_rollout_forward_batch_size=8)
    assert job.trainer_config().score_in_background


def test_a_reward_device_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`reward_device` = 'cuda:99' cannot be used here .*; give cpu"):
        config(tmp_path, reward_device="cuda:99")


@pytest.mark.parametrize("name", [None, ""])
def test_without_a_device_rewards_are_where_the_policy_is(tmp_path, name):
    args = config(tmp_path, reward_device=name)
    assert args.rewards_at == args.device


@MODES
def test_clips_are_handed_over_on_the_rewards_device(tmp_path, background):
    devices = []

    def reward(prompts, audio, sampling_rate):
        devices.append(audio.device)
        return torch.zeros(len(prompts))

    args = chunked(tmp_path, background=background, reward_device="meta")  # what another device is on any machine
    trainer = MusicPPOTrainer(readable_generator(), reward, args, PROMPTS, PROMPTS[:2])
    assert trainer.rollout(PROMPTS)["scores"].device == args.device
    trainer.evaluate()
    assert devices == [torch.device("meta")] * 3


def test_the_job_moves_what_it_trains_on_and_what_it_watches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moved_rewards.py").write_text(
        "from torch import nn\n"
        "class Loud(nn.Module):\n"
        "    def to(self, device):\n"
        "        self.at = device\n"
        "        return super().to(device)\n"
        "    def forward(self, prompts, audio, rate):\n"
        "        return audio.square().mean((1, 2))\n"
        "trained, watched = Loud(), Loud()\n"
    )
    tiny_generator().save_pretrained(tmp_path / "base")
    Path("prompts.txt").write_text("slow piano\nfast guitar\n")
    job = PPOJob(
        model="base",
        prompts="prompts.txt",
        eval_prompts="prompts.txt",
        reward=["moved_rewards:trained"],
        watch=["moved_rewards:watched"],
        output_dir="out",
        max_steps=1,
        eval_steps=1,
        duration_s=0.1,
        per_device_train_batch_size=2,
        local_rollout_forward_batch_size=1,
        reward_device="cpu:0",  # the CPU under a name that the policy's device has not
        score_in_background=True,
    )
    run_ppo(job)
    rewards = sys.modules["moved_rewards"]
    assert rewards.trained.at == rewards.watched.at == torch.device("cpu:0")
