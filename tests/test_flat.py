import math

import pytest
import torch
from kv_variant import KVVariant
from tiny import tiny_generator
from transformers import GenerationConfig, MusicgenForConditionalGeneration
from trl.trainer.utils import add_fused_lm_head

from musicrl_hf.delay import delay_codes, delay_mask
from musicrl_hf.flat import FlatMusicRLForCausalLM, FlatTokenizer, flatten_codes, split_flat, unflatten_codes

PROMPTS = ["slow jazz", "a happy fast reel"]


def flat_of(generator, cls=FlatMusicRLForCausalLM):
    return cls.from_generator(generator), FlatTokenizer.for_generator(generator)


def rows(model, tokenizer, prompts, clips, left=0):
    """Flat rows of unequal length, padded to the longest (and by `left` columns in front)."""
    config = model.config
    ids = [
        tokenizer([prompt])["input_ids"][0]
        + flatten_codes(clip[None], config.codebook_size, config.audio_channels)[0].tolist()
        for prompt, clip in zip(prompts, clips, strict=True)
    ]
    longest = max(map(len, ids))
    padded = [[tokenizer.pad_token_id] * left + row + [tokenizer.pad_token_id] * (longest - len(row)) for row in ids]
    mask = [[0] * left + [1] * len(row) + [0] * (longest - len(row)) for row in ids]
    return torch.tensor(padded), torch.tensor(mask)


def labels_of(model, ids, mask):
    audio = (ids < model.config.num_codebooks * model.config.codebook_size) & mask.bool()
    return ids.masked_fill(~audio, -100)


# -- ids ---------------------------------------------------------------------------------------------------------------


def test_flat_ids_are_the_delayed_steps_one_after_the_other():
    codes = torch.tensor([[[1, 2, 3], [4, 5, 6]]])  # K = 2, F = 3; V = 10, so codebook 1 starts at 10
    # step 0: codebook 0 frame 0 | 1: cb 0 frame 1, cb 1 frame 0 | 2: cb 0 frame 2, cb 1 frame 1 | 3: cb 1 frame 2
    expected = torch.tensor([[1, 2, 14, 3, 15, 16]])
    assert torch.equal(flatten_codes(codes, 10), expected)
    assert torch.equal(unflatten_codes(expected, 2, 10), codes)


def test_stereo_pairs_share_a_step():
    codes = torch.tensor([[[1, 2], [3, 4], [5, 6], [7, 8]]])  # left 0, right 0, left 1, right 1; delays 0 0 1 1
    expected = torch.tensor([[1, 13, 2, 14, 25, 37, 26, 38]])
    assert torch.equal(flatten_codes(codes, 10, audio_channels=2), expected)
    assert torch.equal(unflatten_codes(expected, 4, 10, audio_channels=2), codes)


@pytest.mark.parametrize(("channels", "K"), [(1, 1), (1, 4), (2, 8)])
def test_flatten_there_and_back(channels, K):
    codes = torch.randint(0, 16, (3, K, 5))
    flat = flatten_codes(codes, 16, channels)
    assert flat.shape == (3, K * 5)
    assert torch.equal(unflatten_codes(flat, K, 16, channels), codes)


def test_truncated_and_foreign_sequences_are_refused():
    flat = flatten_codes(torch.randint(0, 16, (2, 4, 5)), 16)
    with pytest.raises(ValueError, match=r"K = 4.*truncated"):
        unflatten_codes(flat[:, :-1], 4, 16)
    with pytest.raises(ValueError, match="codebook"):  # cut by whole frames: the codebooks no longer fit the pattern
        unflatten_codes(flat[:, :-4], 4, 16)
    with pytest.raises(ValueError, match="codebook"):  # another codebook size
        unflatten_codes(flat, 4, 8)
    with pytest.raises(ValueError, match=r"\[0, 16\)"):
        flatten_codes(torch.full((1, 4, 2), 16), 16)
    with pytest.raises(ValueError, match=r"\[B, K, F\]"):
        flatten_codes(torch.zeros(4, 2, dtype=torch.long), 16)


# -- the model ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
def test_log_probs_equal_score_codes_and_an_untouched_stock_forward(channels, tmp_path):
    K = 4 * channels
    generator = tiny_generator(audio_channels=channels, K=K)
    model, tokenizer = flat_of(generator)
    clips = torch.randint(0, 16, (2, K, 6))
    ids, mask = rows(model, tokenizer, PROMPTS, clips)
    with torch.no_grad():
        out = model(ids, mask, labels=labels_of(model, ids, mask), fused_lm_head=True)
        text = generator.text_inputs(PROMPTS)
        scores = generator.score_codes(clips, *text)
    for row in range(2):
        start = len(tokenizer([PROMPTS[row]])["input_ids"][0]) - 1  # log_probs[j] belongs to the id at j + 1
        place = delay_mask(6, K, channels).T
        for found, wanted in ((out.log_probs, scores.logprobs), (out.entropy, scores.entropies)):
            torch.testing.assert_close(found[row, start : start + 6 * K], wanted[row].T[place], atol=1e-6, rtol=0)
            assert found[row, :start].abs().sum() == 0
            assert found[row, start + 6 * K :].abs().sum() == 0

    generator.save_pretrained(tmp_path)
    stock = MusicgenForConditionalGeneration.from_pretrained(tmp_path).eval()
    delayed = delay_codes(clips, 16, channels)
    read = torch.cat([torch.full_like(delayed[..., :1], 16), delayed[..., :-1]], -1)
    with torch.no_grad():
        logits = stock(input_ids=text[0], attention_mask=text[1], decoder_input_ids=read.flatten(0, 1)).logits
    S = delayed.shape[-1]
    logprobs = logits.view(2, K, S, 16).log_softmax(-1).gather(-1, delayed.clamp(max=15)[..., None])[..., 0]
    expected = (logprobs * (delayed != 16)).sum((1, 2))
    torch.testing.assert_close(out.log_probs.sum(1), expected, atol=1e-5, rtol=1e-6)
    by_id = torch.stack([logprobs[row].T[delay_mask(6, K, channels).T] for row in range(2)])
    found = torch.stack([out.log_probs[row][labels_of(model, ids, mask)[row, 1:] != -100] for row in range(2)])
    torch.testing.assert_close(found, by_id, atol=1e-6, rtol=0)


def test_clips_of_unequal_length_and_padding_on_either_side_change_nothing():
    model, tokenizer = flat_of(tiny_generator())
    clips = [torch.randint(0, 16, (4, 7)), torch.randint(0, 16, (4, 3))]
    ids, mask = rows(model, tokenizer, PROMPTS, clips, left=2)
    with torch.no_grad():
        together = model(ids, mask, labels=labels_of(model, ids, mask), fused_lm_head=True).log_probs.sum(1)
        for i in range(2):
            one, one_mask = rows(model, tokenizer, PROMPTS[i : i + 1], clips[i : i + 1])
            alone = model(one, one_mask, labels=labels_of(model, one, one_mask), fused_lm_head=True).log_probs.sum(1)
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-6)


def test_fused_call_equals_trls_own_on_the_kv_vocabulary():
    """The slow twin: TRL's fused head over K * V logits, with gradients, at a temperature other than 1."""
    generator = tiny_generator()
    native, tokenizer = flat_of(generator)
    stock, _ = flat_of(generator, KVVariant)
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "is_top1")
    add_fused_lm_head(stock, temperature=0.7, outputs=fields)
    native.scoring_temperature = 0.7
    clips = [torch.randint(0, 16, (4, 7)), torch.randint(0, 16, (4, 3))]
    ids, mask = rows(native, tokenizer, PROMPTS, clips)
    gradients = []
    outputs = []
    for model in (native, stock):
        generator.zero_grad()
        out = model(input_ids=ids, attention_mask=mask, labels=labels_of(native, ids, mask), fused_lm_head=True)
        out.loss.backward()
        outputs.append(out)
        gradients.append({n: p.grad.clone() for n, p in generator.named_parameters() if p.grad is not None})
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, atol=1e-6, rtol=1e-6)
    for field in fields:
        torch.testing.assert_close(outputs[0][field], outputs[1][field], atol=2e-5, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    assert any("lm_heads" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_plain_logits_give_the_same_log_probs():
    model, tokenizer = flat_of(tiny_generator())
    ids, mask = rows(model, tokenizer, PROMPTS, torch.randint(0, 16, (2, 4, 5)))
    labels = labels_of(model, ids, mask)
    with torch.no_grad():
        fused = model(ids, mask, labels=labels, fused_lm_head=True)
        plain = model(ids, mask, labels=labels)
    assert plain.logits.shape == (*ids.shape, 64)
    chosen = plain.logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(chosen * (labels[:, 1:] != -100), fused.log_probs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(plain.loss, fused.loss, atol=1e-6, rtol=1e-6)


def test_bad_flat_batches_are_refused():
    model, tokenizer = flat_of(tiny_generator())
    ids, mask = rows(model, tokenizer, PROMPTS[:1], torch.randint(0, 16, (1, 4, 5)))
    with pytest.raises(ValueError, match=r"truncated.*max_length"):
        split_flat(ids[:, :-3], mask[:, :-3], model.config)
    with pytest.raises(ValueError, match="codebook"):
        split_flat(ids[:, :-4], mask[:, :-4], model.config)
    start = len(tokenizer(PROMPTS[:1])["input_ids"][0])
    with pytest.raises(ValueError, match="without a prompt"):
        split_flat(ids[:, start:], mask[:, start:], model.config)
    with pytest.raises(ValueError, match="truncated"):
        split_flat(ids[:, :start], mask[:, :start], model.config)
    with pytest.raises(ValueError, match="`labels`"):
        model(ids, mask, fused_lm_head=True)


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_generate_gives_whole_clips_that_score_as_they_were_drawn():
    generator = tiny_generator()
    model, tokenizer = flat_of(generator)
    prompt = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    greedy = GenerationConfig(do_sample=False, max_new_tokens=4 * 6)
    flat = model.generate(**prompt, generation_config=greedy)
    assert flat.shape == (2, prompt["input_ids"].shape[1] + 24)
    codes = unflatten_codes(flat[:, -24:], 4, 16)
    assert torch.equal(codes, generator.sample_codes(*generator.text_inputs(PROMPTS), 6, do_sample=False))
    mask = torch.cat([prompt["attention_mask"], torch.ones(2, 24, dtype=torch.long)], 1)
    out = model(flat, mask, labels=labels_of(model, flat, mask), fused_lm_head=True)
    assert out.is_top1.sum() == 2 * 24  # greedy codes are the likeliest under the scores


def test_sampled_frequencies_match_the_scored_distribution():
    model, tokenizer = flat_of(tiny_generator(K=1, V=4))
    config = GenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=1)
    prompt = tokenizer(PROMPTS[:1] * 4000, return_tensors="pt")
    drawn = model.generate(**prompt, generation_config=config)[:, -1]
    model.scoring_temperature = 0.7
    one = prompt["input_ids"][:4], prompt["attention_mask"][:4]
    ids = torch.cat([one[0], torch.arange(4)[:, None]], 1)
    mask = torch.cat([one[1], torch.ones(4, 1, dtype=torch.long)], 1)
    with torch.no_grad():
        probs = model(ids, mask, labels=labels_of(model, ids, mask), fused_lm_head=True).log_probs.sum(1).exp()
    assert math.isclose(probs.sum().item(), 1.0, abs_tol=1e-5)
    frequencies = torch.bincount(drawn, minlength=4) / 4000
    assert (frequencies - probs).abs().max() < 4 * (0.25 / 4000) ** 0.5  # four standard errors


@pytest.mark.parametrize(
    "options", [{"guidance_scale": 3.0}, {"top_k": 250}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.2}]
)
def test_generate_refuses_to_sample_what_is_not_scored(options):
    model, tokenizer = flat_of(tiny_generator())
    prompt = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match=next(iter(options))):
        model.generate(**prompt, generation_config=GenerationConfig(do_sample=True, max_new_tokens=8, **options))


def test_generate_refuses_lengths_that_are_no_whole_frames():
    model, tokenizer = flat_of(tiny_generator())
    prompt = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with pytest.raises(ValueError, match=r"`max_new_tokens` = 10"):
        model.generate(**prompt, max_new_tokens=10)
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(**prompt)


# -- the tokenizer and the view ------------------------------------------------------------------------------------------


def test_tokenizer_moves_text_behind_the_codes_and_saves_the_text_tokenizer(tmp_path):
    generator = tiny_generator()
    _, tokenizer = flat_of(generator)
    text_ids = generator.tokenizer(PROMPTS)["input_ids"]
    assert tokenizer(PROMPTS)["input_ids"] == [[i + 64 for i in row] for row in text_ids]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (64, 65, None)
    assert tokenizer.get_vocab()["jazz"] == 64 + generator.tokenizer.get_vocab()["jazz"]
    assert len(tokenizer) == 64 + len(generator.tokenizer)
    assert tokenizer.batch_decode([[*tokenizer(["slow jazz"])["input_ids"][0], 3, 20]], skip_special_tokens=True) == [
        "slow jazz[2 codes]"
    ]
    padded = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert padded["input_ids"][0, 0] == 64
    assert padded["attention_mask"][0, 0] == 0
    tokenizer.save_pretrained(tmp_path)
    saved = type(generator.tokenizer).from_pretrained(tmp_path)
    assert saved(PROMPTS)["input_ids"] == text_ids


def test_tokenizer_needs_pad_and_eos():
    generator = tiny_generator()
    generator.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos"):
        FlatTokenizer.for_generator(generator)
    generator.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        FlatTokenizer.for_generator(generator)


def test_view_shares_weights_and_saves_stock_names(tmp_path):
    generator = tiny_generator()
    model, _ = flat_of(generator)
    assert list(model.state_dict()) == list(generator.state_dict())
    assert model.decoder is generator.decoder
    assert type(generator).__name__ == "MusicRLForConditionalGeneration"
    model.save_pretrained(tmp_path)
    stock = MusicgenForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, generator.state_dict()[name]), name
    again = FlatMusicRLForCausalLM.from_pretrained(str(tmp_path))
    assert torch.equal(again.decoder.lm_heads[0].weight, generator.decoder.lm_heads[0].weight)
