import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from musicrl_hf.training import losses


def test_step_sums_adds_the_codebooks_of_a_step_and_leaves_pads_out():
    values = tensor([[[1.0, 2.0, 9.0], [9.0, 3.0, 4.0]]])  # K = 2: codebook 1 lags one step, so two corners are pads
    mask = tensor([[True, True, False], [False, True, True]])
    assert losses.step_sums(values, mask).tolist() == [[1.0, 2.0 + 3.0, 4.0]]


def test_pads_pass_neither_nan_nor_gradient():
    values = tensor([[[1.0, math.inf]]], requires_grad=True)
    total = losses.step_sums(values, tensor([[True, False]])).sum()
    total.backward()
    assert total.item() == 1.0
    assert values.grad.tolist() == [[[1.0, 0.0]]]


def test_musicrl_objective_and_its_gradient_by_hand():
    # One clip of two steps, a = 0.25, R = 3, V = (1, 2): advantages 2 and 1.
    logprobs = tensor([[-0.5, -1.5]], requires_grad=True)
    kl = tensor([[0.2, 0.6]], requires_grad=True)
    values = tensor([[1.0, 2.0]], requires_grad=True)
    objective = losses.musicrl_objective(logprobs, tensor([3.0]), values, kl, kl_mix=0.25)
    assert objective.item() == pytest.approx(0.75 * (-0.5 * 2 - 1.5 * 1) - 0.25 * (0.2 + 0.6))
    objective.backward()
    assert logprobs.grad.tolist() == [[0.75 * 2, 0.75 * 1]]
    assert kl.grad.tolist() == [[-0.25, -0.25]]
    assert values.grad is None  # the baseline is no part of the policy's gradient


def test_musicrl_objective_is_a_mean_over_clips():
    one = losses.musicrl_objective(tensor([[-1.0]]), tensor([2.0]), tensor([[0.5]]), tensor([[0.1]]), 0.5)
    two = losses.musicrl_objective(tensor([[-3.0]]), tensor([1.0]), tensor([[0.0]]), tensor([[0.4]]), 0.5)
    both = losses.musicrl_objective(
        tensor([[-1.0], [-3.0]]), tensor([2.0, 1.0]), tensor([[0.5], [0.0]]), tensor([[0.1], [0.4]]), 0.5
    )
    assert both.item() == pytest.approx((one.item() + two.item()) / 2)


def test_value_loss_is_half_the_mean_squared_error():
    assert losses.value_loss(tensor([[1.0, 4.0]]), tensor([[3.0, 3.0]])).item() == (4 + 1) / 2 / 2


def test_value_loss_takes_the_larger_of_the_free_and_the_held_error():
    # Step 0 moved 0.5 towards its return, only 0.2 of it counts: (0.2 - 1)^2 = 0.64 > (0.5 - 1)^2 = 0.25.
    # Step 1 moved 0.5 away from its return: the free error (0.5 + 1)^2 = 2.25 > (0.2 + 1)^2 = 1.44.
    loss = losses.value_loss(tensor([[0.5, 0.5]]), tensor([[1.0, -1.0]]), tensor([[0.0, 0.0]]), 0.2)
    assert loss.item() == pytest.approx((0.64 + 2.25) / 2 / 2)
    with pytest.raises(ValueError, match="old_values"):
        losses.value_loss(tensor([[0.5]]), tensor([[1.0]]), cliprange_value=0.2)


def test_step_rewards_pay_for_the_divergence_that_follows():
    rewards = losses.step_rewards(tensor([5.0]), tensor([[0.1, 0.2, 0.4]]), kl_coef=0.5)
    assert_close(rewards, tensor([[-0.5 * 0.2, -0.5 * 0.4, 5.0]]))


def slow_gae(rewards, values, gamma, lam):
    """A_t as the sum over all l of (gamma lam)^l delta_{t+l}, straight from the paper."""
    steps = len(rewards)
    deltas = [rewards[t] + gamma * (values[t + 1] if t + 1 < steps else 0.0) - values[t] for t in range(steps)]
    return [sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, steps)) for t in range(steps)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0)])
def test_gae_equals_its_slow_twin(gamma, lam):
    torch.manual_seed(1)
    rewards, values = torch.randn(3, 7), torch.randn(3, 7)
    advantages, returns = losses.gae(rewards, values, gamma, lam)
    slow = tensor([slow_gae(r, v, gamma, lam) for r, v in zip(rewards.tolist(), values.tolist())])
    assert_close(advantages, slow)
    assert_close(returns, slow + values)


def test_gae_with_lambda_one_is_the_return_minus_the_baseline():
    advantages, returns = losses.gae(tensor([[0.0, 0.0, 6.0]]), tensor([[1.0, 2.0, 3.0]]), 1.0, 1.0)
    assert advantages.tolist() == [[5.0, 4.0, 3.0]]
    assert returns.tolist() == [[6.0, 6.0, 6.0]]


def test_ppo_clip_loss_by_hand():
    # Ratios 1.5, 1.5, 0.5, 0.5 with advantages +, -, +, -; epsilon 0.2.
    logprobs = tensor([[1.5, 1.5, 0.5, 0.5]]).log().requires_grad_()
    advantages = tensor([[1.0, -1.0, 1.0, -1.0]])
    loss, ratio, clipped = losses.ppo_clip_loss(logprobs, torch.zeros(1, 4), advantages, 0.2)
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5 + 0.8) / 4)
    assert_close(ratio, tensor([[1.5, 1.5, 0.5, 0.5]]))
    assert clipped.item() == 2 / 4
    loss.backward()  # d(-A r)/d log pi = -A r where nothing is clipped, 0 where it is
    assert_close(logprobs.grad, tensor([[0.0, 1.5 / 4, -0.5 / 4, 0.0]]))


def test_whiten_with_the_statistics_of_all_processes():
    everyone = tensor([1.0, 3.0, 5.0, 7.0])  # mean 4, variance 5
    assert_close(losses.whiten(everyone[:2], everyone), tensor([-3.0, -1.0]) / math.sqrt(5))
    assert_close(losses.whiten(tensor([2.0, 2.0])), tensor([0.0, 0.0]))


def test_bradley_terry_loss_counts_a_tie_half():
    margins = tensor([2.0, 2.0, 2.0])
    p = 1 / (1 + math.exp(-2))
    by_hand = -(math.log(p) + math.log(1 - p) + 0.5 * math.log(p) + 0.5 * math.log(1 - p)) / 3
    assert losses.bradley_terry_loss(margins, tensor([1.0, 0.0, 0.5])).item() == pytest.approx(by_hand, rel=1e-6)
    assert losses.bradley_terry_loss(torch.zeros(4), tensor([1.0, 0.0, 0.5, 1.0])).item() == pytest.approx(math.log(2))


def test_a_tie_pulls_the_scores_together():
    margins = tensor([3.0, 0.0], requires_grad=True)
    losses.bradley_terry_loss(margins, tensor([0.5, 0.5])).backward()
    assert margins.grad[0] > 0
    assert margins.grad[1] == 0


@pytest.mark.parametrize("targets", [tensor([1.5]), tensor([-0.1]), tensor([1.0, 0.0])])
def test_bradley_terry_loss_refuses_targets_that_are_none(targets):
    with pytest.raises(ValueError, match="targets"):
        losses.bradley_terry_loss(tensor([0.0]), targets)


def test_dpo_loss_by_hand_and_at_the_reference():
    loss = losses.dpo_loss(tensor([-1.0]), tensor([-4.0]), tensor([-2.0]), tensor([-3.0]), beta=0.5)
    margin = 0.5 * ((-1.0 + 2.0) - (-4.0 + 3.0))  # = 1
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-margin)))
    same = tensor([-2.0, -5.0])
    assert losses.dpo_loss(same, same + 1, same, same + 1, beta=0.1).item() == pytest.approx(math.log(2))


def test_explained_variance():
    returns = tensor([1.0, 2.0, 3.0])
    assert losses.explained_variance(returns, returns).item() == 1.0
    assert losses.explained_variance(torch.zeros(3), returns).item() == 0.0
    assert losses.explained_variance(torch.zeros(3), torch.ones(3)).item() == 0.0


def test_above_others_is_each_score_less_the_mean_of_the_others():
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    found = losses.above_others(scores, 4)
    for i in range(12):
        group = [j for j in range(12) if j // 4 == i // 4 and j != i]
        torch.testing.assert_close(found[i], scores[i] - scores[group].mean())
    assert torch.equal(losses.above_others(scores, 1), scores)
