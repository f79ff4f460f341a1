"""Log-probabilities and entropies of codes, for which nothing but the logits is kept until the backward pass.

Written as `log_softmax` and a sum, automatic differentiation keeps the distribution, its exponential and their product beside the
logits: half of the memory of a training step of a small generator.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def code_likelihood(logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """What logits say of codes, with gradient to the logits.

    With d = log_softmax(logits) and p = exp(d): log p(c) = d_c and H = -sum_v p_v d_v, in nats.

    Args:
        logits: [B, K, S, V].
        codes: [B, K, S] in [0, V).

    Returns:
        log-probabilities and entropies, both [B, K, S].

    Example:
        >>> code_likelihood(torch.zeros(1, 1, 1, 4), torch.tensor([[[2]]]))
        (tensor([[[-1.3863]]]), tensor([[[1.3863]]]))
    """
    return _CodeLikelihood.apply(logits, codes)


class _CodeLikelihood(torch.autograd.Function):
    """One codebook at a time, so that what is in between is a K-th of the logits."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropies = (logits.new_empty(codes.shape) for _ in range(2))
        for k in range(logits.shape[1]):
            distribution = logits[:, k].log_softmax(-1)
            logprobs[:, k] = distribution.gather(-1, codes[:, k, :, None])[..., 0]
            entropies[:, k] = -(distribution.exp() * distribution).sum(-1)
        ctx.save_for_backward(logits, codes, entropies)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, to_logprobs: Tensor | None, to_entropies: Tensor | None) -> tuple[Tensor, None]:
        logits, codes, entropies = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for k in range(logits.shape[1]):
            distribution = logits[:, k].log_softmax(-1)
            probabilities = distribution.exp()
            if to_entropies is not None:  # dH / dlogit_v = -p_v (d_v + H)
                surprise = (distribution + entropies[:, k, :, None]) * probabilities
                gradient[:, k] -= surprise * to_entropies[:, k, :, None]
            if to_logprobs is not None:  # dlog p(c) / dlogit_v = 1[v = c] - p_v
                weights = to_logprobs[:, k, :, None]
                gradient[:, k] -= probabilities * weights
                gradient[:, k].scatter_add_(-1, codes[:, k, :, None], weights)
        return gradient, None
