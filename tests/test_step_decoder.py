"""The step decoder against the stock decoder's forward over whole clips."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_generator
from transformers import TopKLogitsWarper

from musicrl_hf.delay import delay_codes
from musicrl_hf.sampling import draw_codes, draw_from, kth_largest, likeliest_codes, precision_on
from musicrl_hf.step_decoder import StepDecoder

PROMPTS = ["a slow piano air played at night", "drums"]


@torch.no_grad()
def both_ways(model, dtype=torch.float32):
    """Trunk states [B, S, H] step by step, and of the whole clips at once, in float32."""
    model = model.to(dtype).eval()
    codes = torch.randint(0, model.config.codebook_size, (3, model.config.num_codebooks, 9))
    ids, mask = model.text_inputs([*PROMPTS, PROMPTS[0]])
    mask[2] = 0  # no text at all, as the second half of a guided batch
    states = model.encode_text(ids, mask)
    whole, delayed = model.decoder_hidden(codes, states, mask)
    assert torch.equal(delayed, delay_codes(codes, model.config.pad_code, model.config.audio_channels))
    decoder = StepDecoder(model.decoder, states, mask, delayed.shape[-1])
    before = torch.full_like(delayed[..., 0], model.config.pad_code)
    steps = []
    for step in range(delayed.shape[-1]):
        steps.append(decoder.step(before))
        before = delayed[..., step]
    return torch.stack(steps, 1).float(), whole.float()


@pytest.mark.parametrize(("channels", "K"), [(1, 4), (2, 8)])
def test_steps_equal_the_whole_forward(channels, K):
    steps, whole = both_ways(tiny_generator(audio_channels=channels, K=K))
    assert whole.std() > 0.1
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-5)


def test_in_half_precision_too():
    steps, whole = both_ways(tiny_generator(), torch.bfloat16)
    torch.testing.assert_close(steps, whole, rtol=0, atol=0.06)  # bfloat16 has steps of .016 where states reach 2 to 4


def test_an_adapter_takes_part():
    model = tiny_generator()
    plain, _ = both_ways(model)
    torch.manual_seed(1)
    targets = r".*decoder\.model\.decoder\.layers\.\d+\..*(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
    get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    steps, whole = both_ways(model)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-5)
    assert (steps - plain).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("channels", "K"), [(1, 4), (2, 8)])
def test_guidance_combines_a_clip_with_its_text_and_without(channels, K):
    model, scale = tiny_generator(audio_channels=channels, K=K), 3.0
    ids, mask = model.text_inputs(PROMPTS)  # of unequal length
    states, nothing = 300 * model.encode_text(ids, mask), torch.zeros_like(mask)  # random weights hardly listen
    guided = StepDecoder(model.decoder, states, mask, 5, scale)
    with_text, without = StepDecoder(model.decoder, states, mask, 5), StepDecoder(model.decoder, states * 0, nothing, 5)
    for step in range(5):
        codes = torch.randint(0, 16, (2, K)) if step else torch.full((2, K), model.config.pad_code)
        heard, null = with_text.step(codes), without.step(codes)
        states = guided.step(codes)
        torch.testing.assert_close(states, null + scale * (heard - null), rtol=0, atol=1e-5)
        # Combined in front of the heads, as transformers does behind them.
        behind = without.logits(null) + scale * (with_text.logits(heard) - without.logits(null))
        torch.testing.assert_close(guided.logits(states), behind, rtol=0, atol=1e-4)
        assert (heard - null).abs().max() > 0.1


def test_cumulated_probabilities_are_in_float64_where_the_device_has_it():
    assert [precision_on(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [torch.float64] * 2 + [
        torch.float32
    ]


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
@pytest.mark.parametrize("V", [4, 1024, 1021])  # one block, 32 blocks, and a prime: blocks of one
def test_codes_are_drawn_as_often_as_they_are_likely(precision, V):
    probabilities = torch.zeros(V)
    likely = torch.tensor([0, V // 2, V - 1])
    probabilities[likely] = torch.tensor([0.5, 0.3, 0.2])
    logits = probabilities.log().expand(20_000, 2, V)
    drawn = draw_from(logits, precision, torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 2)
    frequencies = torch.bincount(drawn.flatten(), minlength=V) / drawn.numel()
    # Four standard errors of a proportion: 4 * sqrt(.25 / 40000) = .01.
    torch.testing.assert_close(frequencies[likely], probabilities[likely], rtol=0, atol=0.01)
    assert frequencies[likely].sum() == pytest.approx(1), "what cannot be was drawn"
    assert (drawn[:, 0] != drawn[:, 1]).float().mean() > 0.5, "the codebooks of a clip are drawn one by one"


def test_a_whole_codebook_is_drawn_as_it_weighs():
    """Pearson's chi-squared over 64 codes in two blocks: 63 degrees of freedom, 103.4 at p = .001."""
    torch.manual_seed(0)
    logits = torch.randn(64)
    drawn = draw_from(logits.expand(100_000, 1, 64), torch.float64, torch.Generator().manual_seed(1))
    expected = logits.softmax(-1) * 100_000
    seen = torch.bincount(drawn.flatten(), minlength=64)
    assert ((seen - expected) ** 2 / expected).sum() < 103.4


@pytest.mark.parametrize("k", [1, 7, 32])
def test_the_kth_largest_is_topks(k):
    logits = torch.randn(3, 4, 32)
    assert torch.equal(kth_largest(logits, k), logits.topk(k, -1).values[..., -1:])


def test_the_likeliest_codes_are_torchs():
    logits = torch.randn(3, 4, 32)
    logits[0, 0, 5:7] = 9.0  # the first of equals
    logits[1, 1, 8] = float("nan")  # and what is no number
    assert torch.equal(likeliest_codes(logits), logits.argmax(-1))
    assert (likeliest_codes(logits)[0, 0], likeliest_codes(logits)[1, 1]) == (5, 8)


def test_only_the_top_k_are_drawn():
    logits = torch.tensor([3.0, 1.0, 2.0, 0.0]).expand(2_000, 1, 4)
    drawn = draw_codes(logits, 2, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {0, 2}
    # e^3 / (e^3 + e^2) = .731; four standard errors: 4 * sqrt(.731 * .269 / 2000) = .04.
    assert (drawn == 0).float().mean().item() == pytest.approx(0.731, abs=0.04)


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_ties_with_the_last_of_the_top_k_are_drawn_as_stock_does(shift):
    """What transformers leaves of the same logits, wherever they lie: none of the others, not even the next number below."""
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0, -3.0]) + shift
    logits[3] = torch.nextafter(logits[1], torch.tensor(-torch.inf))
    left = TopKLogitsWarper(top_k=2)(torch.zeros(1, 1), logits[None]).isfinite()[0]
    drawn = draw_codes(logits.expand(2_000, 1, 5), 2, torch.Generator().manual_seed(0))
    assert left.tolist() == [True, True, True, False, False]
    assert set(drawn.flatten().tolist()) == {0, 1, 2}
