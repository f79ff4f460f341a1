"""What the generator's heads say of given codes, without the logits of all of them ever lying in memory.

Logits are K * V numbers a decoder step, many times its hidden state: kept for the backward pass with what a softmax makes of them,
they are a third of the memory of a small generator's training step, and more of one that has a divergence. Here they are worked out
for a few clips and one codebook at a time, and again in the backward pass, which costs one more product with the heads (activation
checkpointing, Chen et al. 2016, arXiv:1604.06174).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**20  # about; 4 MB, which stay in a CPU's cache
TIMES_ON_AN_ACCELERATOR = 16  # where each launch costs

Head = Callable[[Tensor], Tensor]
Statistic = Callable[[Tensor, Tensor], Tensor]


@dataclass
class StepScores:
    """What the generator thinks of given codes. Positions that hold no code are 0.

    Attributes:
        logprobs: [B, K, S] float32, log-probability of each code under `temperature`.
        entropies: [B, K, S] float32, of each code's distribution, in nats.
        mask: [B, K, S] bool, True where there is a code.
        hidden: [B, S, H] of the decoder's trunk.
        kl: [B, K, S] float32, KL(pi || pi_0) of each code's distribution, exact, in nats; None without an anchor.
        statistics: [B, K, S] each, what else was asked for, without gradient.
    """

    logprobs: Tensor
    entropies: Tensor
    mask: Tensor
    hidden: Tensor
    kl: Tensor | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)


def score_with_heads(
    hidden: Tensor,
    heads: Iterable[Head],
    codes: Tensor,
    mask: Tensor,
    codebook_size: int,
    temperature: float = 1.0,
    ref_logits: Tensor | None = None,
    statistics: Mapping[str, Statistic] | None = None,
    entropy_gradient: bool = True,
) -> StepScores:
    """Score codes by K heads, with gradient.

    With d = log_softmax(logits / temperature), p = exp(d) and d0 the anchor's: log p(c) = d_c, H = -sum_v p_v d_v and
    KL = sum_v p_v (d_v - d0_v), in nats: over the whole codebook, and not estimated from the code (MusicRL, section 3.2).

    Args:
        hidden: [B, S, H].
        heads: K modules from [b, S, H] to [b, S, V].
        codes: [B, K, S] in [0, V).
        mask: [B, K, S] bool, which of them count.
        codebook_size: V.
        temperature: above 0.
        ref_logits: [B, K, S, V] of the anchor, divided by its temperature; no gradient goes there.
        statistics: what else to work out of logits [b, S, V], divided by the temperature, and codes [b, S] of one codebook:
            functions to [b, S].
        entropy_gradient: False saves what the entropies' gradient takes, where they are not trained on.
    """
    size = clips_at_once(hidden, codebook_size)
    # Split once: a slice for each head would add up as many gradients, each as large as all clips.
    clips = list(zip(hidden.split(size), codes.split(size), strict=True))
    anchors = [None] * len(clips) if ref_logits is None else ref_logits.split(size)
    found: list[dict[str, Tensor]] = []
    for k, head in enumerate(heads):
        parts = [
            checkpoint(
                _of_logits,
                states,
                head,
                chosen[:, k],
                temperature,
                None if anchor is None else anchor[:, k],
                statistics or {},
                entropy_gradient,
                use_reentrant=False,
                preserve_rng_state=_draws(head),
            )
            for (states, chosen), anchor in zip(clips, anchors, strict=True)
        ]
        found.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    values = {name: torch.stack([of_one[name] for of_one in found], 1).masked_fill(~mask, 0) for name in found[0]}
    named = {name: values.pop(name) for name in ("logprobs", "entropies")}
    return StepScores(**named, mask=mask, hidden=hidden, kl=values.pop("kl", None), statistics=values)


def logits_with_heads(hidden: Tensor, heads: Sequence[Head], codebook_size: int, temperature: float = 1.0) -> Tensor:
    """Logits [B, K, S, V] float32 of hidden states [B, S, H] by K heads, divided by `temperature`."""
    logits = hidden.new_empty((len(hidden), len(heads), hidden.shape[1], codebook_size), dtype=torch.float32)
    for k, head in enumerate(heads):
        logits[:, k] = head(hidden)
    return logits if temperature == 1 else logits.div_(temperature)


def clips_at_once(hidden: Tensor, codebook_size: int) -> int:
    """How many clips of hidden states [B, S, H] a head is asked about at once: at least one."""
    numbers = LOGITS_AT_ONCE * (1 if hidden.device.type == "cpu" else TIMES_ON_AN_ACCELERATOR)
    return max(1, numbers // (hidden.shape[1] * codebook_size))


def _of_logits(
    hidden: Tensor,
    head: Head,
    codes: Tensor,
    temperature: float,
    ref_logits: Tensor | None,
    statistics: Mapping[str, Statistic],
    entropy_gradient: bool,
) -> dict[str, Tensor]:
    device = hidden.device.type
    # Autocast would keep one narrow copy of the head for all parts, and add up their gradients there, in its precision.
    with torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    ):
        logits = head(hidden).float()
    if temperature != 1:
        logits = logits / temperature
    distribution, logprobs = _Distribution.apply(logits, codes)
    found = {"logprobs": logprobs}
    if entropy_gradient or ref_logits is not None:
        probabilities = distribution.exp()
    if entropy_gradient:
        found["entropies"] = -(probabilities * distribution).sum(-1)
    if ref_logits is not None:
        found["kl"] = (probabilities * (distribution - ref_logits.log_softmax(-1))).sum(-1)
    with torch.no_grad():  # last: the backward pass works out again what stands above, and ends there
        if not entropy_gradient:
            found["entropies"] = distribution.exp().mul_(distribution).sum(-1).neg_()
        return found | {name: of(logits, codes) for name, of in statistics.items()}


def _draws(head: Head) -> bool:
    """May it have another output when it is asked again? A head that is no module might."""
    return not isinstance(head, nn.Module) or any(part.training and getattr(part, "p", 0) for part in head.modules())


class _Distribution(torch.autograd.Function):
    """Logits [b, S, V] to their log-softmax and what that says of codes [b, S]; its backward pass makes one tensor of that size, not three."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        distribution = logits.log_softmax(-1)
        ctx.save_for_backward(distribution, codes)
        return distribution, distribution.gather(-1, codes[..., None])[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_all: Tensor | None, of_codes: Tensor | None) -> tuple[Tensor | None, None]:
        distribution, codes = ctx.saved_tensors
        if of_codes is not None:
            at, of_codes = codes[..., None], of_codes[..., None]
            if of_all is None:
                return distribution.exp().mul_(-of_codes).scatter_add_(-1, at, of_codes), None
            of_all = of_all.scatter_add(-1, at, of_codes)
        if of_all is None:
            return None, None
        return of_all - distribution.exp().mul_(of_all.sum(-1, keepdim=True)), None
