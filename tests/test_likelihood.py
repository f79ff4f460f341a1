import pytest
import torch

from musicrl_hf.likelihood import code_likelihood


def plain(logits, codes):
    """The definition, left to automatic differentiation."""
    distribution = logits.log_softmax(-1)
    return distribution.gather(-1, codes[..., None])[..., 0], -(distribution.exp() * distribution).sum(-1)


@pytest.fixture
def given():
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 3, 5, 7, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(7, (2, 3, 5)), torch.randn(2, 2, 3, 5, dtype=torch.float64)


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["log-probabilities", "entropies", "both"])
def test_values_and_gradients_are_those_of_the_definition(given, used):
    logits, codes, weights = given
    gradients = []
    for function in (plain, code_likelihood):
        found = function(logits, codes)
        gradients.append(torch.autograd.grad(sum((found[i] * weights[i]).sum() for i in used), logits)[0])
    for expected, value in zip(plain(logits, codes), code_likelihood(logits, codes), strict=True):
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_gradient_is_that_of_small_differences(given):
    logits, codes, _ = given
    assert torch.autograd.gradcheck(lambda tensor: code_likelihood(tensor, codes), (logits,))


def test_only_the_logits_are_kept_for_the_backward_pass(given):
    logits, codes, _ = given
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        code_likelihood(logits, codes)
    assert sum(tensor.shape == logits.shape for tensor in kept) == 1


def test_logits_far_apart_stay_finite():
    logits = torch.tensor([[[[1e4, 0.0, -1e4]]]], requires_grad=True)
    logprobs, entropies = code_likelihood(logits, torch.tensor([[[2]]]))
    assert (logprobs.item(), entropies.item()) == (-2e4, 0.0)
    (logprobs + entropies).backward()
    assert logits.grad.tolist() == [[[[-1.0, 0.0, 1.0]]]]
