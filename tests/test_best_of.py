"""Best of N: the arg max of the candidates, clip by clip; N = 1 is plain sampling, bit for bit."""

import pytest
import torch
from tiny import tiny_generator

from musicrl_hf.rewards.best_of import best_of

PROMPTS = ["slow air", "fast reel", "jazz piano"]
OPTIONS = {"duration_s": 0.4, "temperature": 1.0, "top_k": None, "guidance_scale": 1.0}


def level(prompts, audio, sampling_rate):
    return audio.abs().mean((1, 2))


class Remembering:
    """A reward that keeps what it was given and what it said."""

    def __init__(self, reward=level):
        self.reward, self.heard, self.said = reward, [], []

    def __call__(self, prompts, audio, sampling_rate):
        assert (prompts, sampling_rate) == (PROMPTS, 400)
        self.heard.append(audio)
        self.said.append(self.reward(prompts, audio, sampling_rate))
        return self.said[-1]


def test_one_is_plain_sampling_bit_for_bit():
    generator = tiny_generator()
    plain = generator.sample(PROMPTS, seed=5, **OPTIONS)
    kept, scores = best_of(generator, PROMPTS, 1, level, seed=5, **OPTIONS)
    assert torch.equal(kept.codes, plain.codes)
    assert torch.equal(kept.audio, plain.audio)
    assert torch.equal(scores, level(None, plain.audio, 400))
    torch.manual_seed(3)
    unseeded = generator.sample(PROMPTS, **OPTIONS)
    torch.manual_seed(3)
    assert torch.equal(best_of(generator, PROMPTS, 1, level, **OPTIONS)[0].codes, unseeded.codes)


def test_the_kept_clip_is_the_arg_max_of_its_prompt():
    generator, reward = tiny_generator(), Remembering()
    kept, scores = best_of(generator, PROMPTS, 5, reward, seed=0, **OPTIONS)
    said = torch.stack(reward.said)  # [5, B]
    best = said.argmax(0)
    assert len(best.unique()) > 1, "the prompts' best candidates are different ones"
    for clip, candidate in enumerate(best):
        assert torch.equal(kept.audio[clip], reward.heard[candidate][clip])
    assert torch.equal(scores, said.max(0).values)
    assert torch.equal(scores, level(None, kept.audio, 400))
    # The codes are those of the kept sound.
    assert torch.allclose(generator.decode_codes(kept.codes, 160), kept.audio, atol=1e-5)
    assert len({clip.numpy().tobytes() for batch in reward.heard for clip in batch}) == 15, "all candidates differ"


def test_more_candidates_hold_the_fewer_and_a_seed_repeats():
    generator = tiny_generator()
    found = {n: best_of(generator, PROMPTS, n, level, seed=2, **OPTIONS) for n in (1, 2, 4)}
    assert (found[1][1] <= found[2][1]).all()
    assert (found[2][1] <= found[4][1]).all()
    assert torch.equal(best_of(generator, PROMPTS, 4, level, seed=2, **OPTIONS)[0].codes, found[4][0].codes)


def test_of_equal_scores_the_first_is_kept():
    generator = tiny_generator()
    even = Remembering(lambda prompts, audio, rate: torch.zeros(3))
    kept, _ = best_of(generator, PROMPTS, 3, even, seed=2, **OPTIONS)
    assert torch.equal(kept.audio, even.heard[0])


def test_no_candidates_and_no_scores_are_refused():
    with pytest.raises(ValueError, match="`best_of` must be at least 1 clip, got 0"):
        best_of(tiny_generator(), PROMPTS, 0, level, **OPTIONS)
    with pytest.raises(ValueError, match="Reward `odd` returned NaN"):
        best_of(tiny_generator(), PROMPTS, 2, lambda *_: torch.full((3,), torch.nan), name="odd", **OPTIONS)
