"""Scores by heads, chunk by chunk and worked out again in the backward pass, against their definitions."""

import math

import pytest
import torch
from torch import nn, tensor
from torch.distributions import Categorical, kl_divergence

from musicrl_hf import likelihood
from musicrl_hf.likelihood import score_with_heads

K, B, S, H, V = 3, 5, 4, 6, 7


@pytest.fixture
def given():
    torch.manual_seed(0)
    heads = nn.ModuleList([nn.Linear(H, V) for _ in range(K)])
    hidden = (3 * torch.randn(B, S, H)).requires_grad_()
    codes, mask = torch.randint(V, (B, K, S)), torch.rand(B, K, S) > 0.3
    return hidden, heads, codes, mask, V, 0.8, torch.randn(B, K, S, V)


def as_they_are(hidden):
    """A head whose hidden states are logits."""
    return hidden


def slow_twin(hidden, heads, codes, mask, _, temperature, ref_logits):
    """One code at a time, by torch's own distributions."""
    found = {name: torch.zeros(B, K, S) for name in ("logprobs", "entropies", "kl")}
    for b, k, s in mask.nonzero().tolist():
        of_code = Categorical(logits=heads[k](hidden[b, s]) / temperature)
        found["logprobs"][b, k, s] = of_code.log_prob(codes[b, k, s])
        found["entropies"][b, k, s] = of_code.entropy()
        found["kl"][b, k, s] = kl_divergence(of_code, Categorical(logits=ref_logits[b, k, s]))
    return found


@pytest.mark.parametrize("clips_at_once", [1, 2, B])
@pytest.mark.parametrize("used", [("logprobs",), ("entropies",), ("kl",), ("logprobs", "entropies", "kl")])
def test_values_and_gradients_are_those_of_the_slow_twin(given, used, clips_at_once, monkeypatch):
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", clips_at_once * S * V)
    hidden, heads, *_ = given
    weights = {name: torch.randn(B, K, S) for name in used}
    expected, found = slow_twin(*given), vars(score_with_heads(*given))
    gradients = []
    for values in (expected, found):
        total = sum((values[name] * weights[name]).sum() for name in used)
        gradients.append(torch.autograd.grad(total, [hidden, *heads.parameters()]))
    for name in ("logprobs", "entropies", "kl"):
        torch.testing.assert_close(found[name], expected[name])
    for ours, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs)


def test_no_logits_are_kept_for_the_backward_pass(given):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part) or part, lambda part: part):
        score_with_heads(*given)
    assert kept
    anchors = given[-1].untyped_storage().data_ptr()
    assert not any(part.shape[-1:] == (V,) and part.untyped_storage().data_ptr() != anchors for part in kept)


def test_in_bfloat16_many_parts_are_as_exact_as_one(monkeypatch):
    torch.manual_seed(0)
    heads, hidden, codes = [nn.Linear(32, 64)], torch.randn(64, 8, 32), torch.randint(64, (64, 1, 8))

    def gradient(clips_at_once, dtype):
        monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", clips_at_once * 8 * 64)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            scores = score_with_heads(hidden, heads, codes, codes >= 0, 64)
        return torch.autograd.grad(scores.logprobs.sum(), heads[0].weight)[0]

    exact = gradient(64, torch.float32)
    one, many = ((gradient(clips, torch.bfloat16) - exact).norm() / exact.norm() for clips in (64, 1))
    assert 0 < many < 1.5 * one


def test_nothing_is_scored_as_nothing():
    codes = torch.zeros(0, 1, 4, dtype=torch.long)
    assert score_with_heads(torch.zeros(0, 4, 6), [nn.Linear(6, 7)], codes, codes > 0, 7).logprobs.shape == (0, 1, 4)


def test_clips_are_taken_in_slices_that_cover_them_once(monkeypatch):
    monkeypatch.setattr(likelihood, "LOGITS_AT_ONCE", 2 * 4 * 10)
    heads = [nn.Linear(3, 10)]
    sizes = []
    heads[0].register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
    for clips, steps, wanted in ((5, 4, [2, 2, 1]), (2, 4, [2]), (3, 100, [1, 1, 1])):
        sizes.clear()
        codes = torch.zeros(clips, 1, steps, dtype=torch.long)
        scores = score_with_heads(torch.randn(clips, steps, 3), heads, codes, codes == 0, 10)
        assert sizes == wanted
        assert scores.logprobs.shape == (clips, 1, steps)


def test_an_accelerator_is_asked_about_more_clips_at_once():
    on_a_cpu, elsewhere = (  # meta is any device that is no CPU
        likelihood.clips_at_once(torch.empty(20, 500, 3, device=device), 1024) for device in ("cpu", "meta")
    )
    assert (on_a_cpu, elsewhere) == (2, 32)


def test_kl_is_the_sum_over_the_codebook():
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    logits = tensor(p).log().view(1, 1, 3) + 5.0  # logits are log-probabilities up to a constant
    ref_logits = tensor(q).log().view(1, 1, 1, 3) - 2.0
    by_hand = 0.5 * math.log(2) + 0.25 * 0.0 + 0.25 * math.log(0.5)  # = ln 2 / 4
    assert by_hand == pytest.approx(math.log(2) / 4)
    codes = tensor([[[0]]])
    scores = score_with_heads(logits, [as_they_are], codes, codes == 0, 3, ref_logits=ref_logits)
    assert scores.kl.item() == pytest.approx(by_hand, abs=1e-6)
    itself = score_with_heads(logits, [as_they_are], codes, codes == 0, 3, ref_logits=logits[:, None])
    assert itself.kl.item() == 0


def test_without_an_anchor_there_is_no_kl(given):
    assert score_with_heads(*given[:5]).kl is None


def test_statistics_are_asked_for_by_name_and_have_no_gradient(given):
    hidden, heads, codes, mask, _, temperature, _ = given
    asked = {"best": lambda logits, codes: logits.argmax(-1) == codes, "mean": lambda logits, _: logits.mean(-1)}
    found = score_with_heads(hidden, heads, codes, mask, V, temperature, statistics=asked).statistics
    logits = torch.stack([head(hidden) for head in heads], 1) / temperature
    assert found["best"].tolist() == ((logits.argmax(-1) == codes) & mask).tolist()
    torch.testing.assert_close(found["mean"], (logits.mean(-1) * mask).detach())
    assert not found["mean"].requires_grad


def test_entropies_that_are_not_trained_on_cost_the_backward_pass_nothing(given):
    hidden, heads, *_ = given
    found, made = {}, {}
    for trained in (True, False):
        scores = score_with_heads(*given[:6], entropy_gradient=trained)
        assert scores.entropies.requires_grad == trained
        with torch.profiler.profile() as profile:
            gradients = torch.autograd.grad(scores.logprobs.sum(), [hidden, *heads.parameters()])
        made[trained] = sum(event.name == "aten::exp" for event in profile.events())
        found[trained] = [scores.logprobs, scores.entropies, *gradients]
    for with_gradient, without in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(without, with_gradient)
    assert made[False] == made[True] / 2 > 0  # of the distribution's gradient alone


def test_a_head_that_draws_draws_the_same_again(monkeypatch):
    torch.manual_seed(0)
    heads, hidden, codes = (
        [nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 9))],
        torch.randn(4, 3, 16),
        torch.randint(9, (4, 1, 3)),
    )

    def gradient():
        torch.manual_seed(1)
        scores = score_with_heads(hidden, heads, codes, codes >= 0, 9)
        torch.rand(5)  # others draw too before the backward pass
        return torch.autograd.grad(scores.logprobs.sum(), heads[0][1].weight)[0]

    found = gradient()
    monkeypatch.setattr(likelihood, "checkpoint", lambda function, *given, **_: function(*given))
    assert torch.equal(found, gradient())


def test_logits_far_apart_stay_finite():
    logits = tensor([[[1e4, 0.0, -1e4]]], requires_grad=True)
    scores = score_with_heads(logits, [as_they_are], tensor([[[2]]]), tensor([[[True]]]), 3)
    assert (scores.logprobs.item(), scores.entropies.item()) == (-2e4, 0.0)
    (scores.logprobs + scores.entropies).sum().backward()
    assert logits.grad.tolist() == [[[-1.0, 0.0, 1.0]]]
