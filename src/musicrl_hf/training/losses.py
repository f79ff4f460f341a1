"""The mathematics of alignment: tensors in, tensors out, the equation and its source at each function.

B clips, K codebooks, S decoder steps, V codes a codebook. One action is one decoder step: its K codes are drawn at once,
so the log-probability of a step is the sum over its codebooks. The delay pattern's pads are no codes and count nowhere.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def step_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Sum a quantity of the codes over the codebooks of each decoder step.

    Args:
        values: [B, K, S], such as log-probabilities.
        mask: bool [B, K, S] (or [K, S]), True where the delay pattern holds a code.

    Returns:
        [B, S]
    """
    return values.masked_fill(~mask, 0.0).sum(1)


def musicrl_objective(logprobs: Tensor, rewards: Tensor, values: Tensor, kl: Tensor, kl_mix: float) -> Tensor:
    """The objective of MusicRL, to be maximised: REINFORCE with a value baseline, mixed with a KL to the anchor.

    J = (1 - a) sum_t log pi(a_t|s_t) (R - V(s_t)) - a sum_t KL(pi(.|s_t) || pi_0(.|s_t)), the mean over clips
    (Cideron et al. 2024, section 3.2). The advantage is a constant to the gradient; V has a loss of its own.

    Args:
        logprobs: [B, S], of the sampled steps, with gradient.
        rewards: [B], one number a clip.
        values: [B, S], the baseline V(s_t).
        kl: [B, S], exact, with gradient.
        kl_mix: a in [0, 1].

    Returns:
        A scalar.
    """
    advantages = (rewards[:, None] - values).detach()
    return ((1 - kl_mix) * (logprobs * advantages).sum(1) - kl_mix * kl.sum(1)).mean()


def above_others(scores: Tensor, generations: int) -> Tensor:
    """What a clip's score is above the mean of the scores of its prompt's other clips: r_i - sum_{j != i} r_j / (n - 1).

    The leave-one-out baseline of RLOO (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740): unbiased, and without what prompts,
    and not clips, differ by.

    Args:
        scores: [B], the n = `generations` clips of a prompt side by side; B is a multiple of n.
        generations: n; at 1 there are no others, and the scores stay.

    Returns:
        [B]
    """
    if generations == 1:
        return scores
    groups = scores.unflatten(0, (-1, generations))
    return ((groups - groups.mean(1, keepdim=True)) * generations / (generations - 1)).flatten()


def value_loss(
    values: Tensor, returns: Tensor, old_values: Tensor | None = None, cliprange_value: float | None = None
) -> Tensor:
    """Half the squared error of the baseline to the return, the mean over clips and steps.

    With `cliprange_value`, the larger of it and the error of the value held within that range of the one at sampling
    time (PPO2's clipped value loss, as in TRL).

    Args:
        values: [B, S], with gradient.
        returns: [B, S].
        old_values: [B, S], needed with `cliprange_value`.
        cliprange_value: above 0, in units of the return; None does not clip.
    """
    error = (values - returns).square()
    if cliprange_value is not None:
        if old_values is None:
            raise ValueError("`old_values` is None, but `cliprange_value` is given; pass the values at sampling time.")
        held = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
        error = torch.maximum(error, (held - returns).square())
    return 0.5 * error.mean()


def step_rewards(scores: Tensor, kl: Tensor, kl_coef: float) -> Tensor:
    """What each action earns in E[R - kl_coef sum_t KL_t]: the KL of the state that it leads to; the last one, the score.

    The gradient of E[sum_t KL_t] has two parts: that of KL_t itself, which no action at t can earn (it is exact, not
    sampled, so the trainer differentiates it directly), and the effect of the action at t on the divergences after t,
    which is this reward. Sources: Schulman, "Approximating KL divergence"; the decomposition is the policy gradient
    theorem applied to a cost that depends on the policy.

    Args:
        scores: [B], one number a clip.
        kl: [B, S], exact, without gradient.
        kl_coef: at least 0.

    Returns:
        [B, S]
    """
    rewards = torch.zeros_like(kl)
    rewards[:, :-1] = -kl_coef * kl[:, 1:]
    rewards[:, -1] = scores
    return rewards


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over decoder steps (Schulman et al. 2016, equation 16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  V after the last step is 0.

    Args:
        rewards: [B, S].
        values: [B, S], V(s_t) before the action at t.
        gamma: discount in [0, 1].
        lam: lambda in [0, 1]; 1 is the return minus the baseline, 0 the one-step error.

    Returns:
        advantages [B, S] and returns [B, S] = advantages + values.
    """
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    deltas = rewards + gamma * following - values
    advantages = torch.empty_like(deltas)
    carried = torch.zeros_like(deltas[:, 0])
    for step in reversed(range(deltas.shape[1])):
        carried = deltas[:, step] + gamma * lam * carried
        advantages[:, step] = carried
    return advantages, advantages + values


def ppo_clip_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate, as a loss (Schulman et al. 2017, equation 7); the ratio is that of a whole step.

    Args:
        logprobs: [B, S], with gradient.
        old_logprobs: [B, S], at sampling time.
        advantages: [B, S].
        cliprange: epsilon above 0.

    Returns:
        The scalar loss, the ratios [B, S], and the share of steps where clipping holds the gradient back.
    """
    ratio = (logprobs - old_logprobs).exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(free, held).mean(), ratio.detach(), (held > free).float().mean()


def whiten(values: Tensor, sample: Tensor | None = None) -> Tensor:
    """Scale to zero mean and unit standard deviation.

    Args:
        values: any shape.
        sample: where mean and deviation come from: `values` of all processes, or None for `values` itself.
    """
    sample = values if sample is None else sample
    return (values - sample.mean()) / deviation(sample)


def deviation(sample: Tensor) -> Tensor:
    """Standard deviation of all of `sample`, kept above 0 so that equal values whiten to 0."""
    return (sample.var(unbiased=False) + 1e-8).sqrt()


def bradley_terry_loss(margins: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of pairwise choices, ties counted half (Bradley and Terry 1952).

    P(first preferred) = sigmoid(score_first - score_second), and
    -[y log P + (1 - y) log(1 - P)] with y = 1 (first preferred), 0 (second), 0.5 (tie).

    Args:
        margins: [N], score of the first clip minus that of the second.
        targets: [N], y in [0, 1].

    Returns:
        The mean, a scalar; ln 2 where all margins are 0.
    """
    if margins.shape != targets.shape:
        raise ValueError(
            f"`targets` has shape {tuple(targets.shape)}, `margins` {tuple(margins.shape)}; give one a pair."
        )
    if bool(((targets < 0) | (targets > 1)).any()):
        raise ValueError("`targets` must lie in [0, 1]: 1 first preferred, 0 second, 0.5 tie.")
    return F.binary_cross_entropy_with_logits(margins, targets.to(margins.dtype))


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
) -> Tensor:
    """-log sigmoid(beta [(log pi - log pi_0)(chosen) - (log pi - log pi_0)(rejected)]), the mean (Rafailov et al. 2023, eq. 7).

    Training runs TRL's; this is the reference that it is compared with.

    Args:
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs: [B], of whole clips.
        beta: above 0.
    """
    margins = (chosen_logprobs - ref_chosen_logprobs) - (rejected_logprobs - ref_rejected_logprobs)
    return -F.logsigmoid(beta * margins).mean()


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect baseline, 0 one that says no more than the mean.

    Args:
        values, returns: of one shape. Returns that are all equal leave nothing to explain: 0.
    """
    spread = returns.var(unbiased=False)
    if float(spread) == 0.0:
        return torch.zeros_like(spread)
    return 1 - (returns - values).var(unbiased=False) / spread
