"""Residual vector quantisation with EMA codebooks (van den Oord et al. 2017, appendix A; Zeghidour et al. 2021, SoundStream).

Works on the codebooks of an `encodec` package model.
"""

import torch
from common import CODEBOOK_SIZE
from encodec import EncodecModel as EncodecPackageModel
from torch import Tensor, nn

EMA_DECAY, DEAD_SHARE = 0.99, 0.05  # an entry used less than this share of the mean use is replaced


def codebooks(model: EncodecPackageModel) -> list[nn.Module]:
    """The K codebooks, each with buffers embed [V, D], embed_avg [V, D], cluster_size [V], inited [1]."""
    return [layer._codebook for layer in model.quantizer.vq.layers]


def nearest(vectors: Tensor, entries: Tensor) -> Tensor:
    """Index [N] of the entry of [V, D] nearest to each of [N, D]."""
    return (entries.pow(2).sum(1) - 2 * vectors @ entries.T).argmin(1)


@torch.no_grad()
def k_means(vectors: Tensor, n_clusters: int, iterations: int = 15) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from random vectors: centres [V, D] and sizes [V]."""
    centres = vectors[torch.randperm(len(vectors))[:n_clusters]].clone()
    for _ in range(iterations):
        index = nearest(vectors, centres)
        sizes = torch.bincount(index, minlength=n_clusters).float()
        sums = torch.zeros_like(centres).index_add_(0, index, vectors)
        centres = torch.where(sizes[:, None] > 0, sums / sizes[:, None].clamp(min=1), centres)
    return centres, sizes


@torch.no_grad()
def initialise_codebooks(model: EncodecPackageModel, vectors: Tensor, batch_vectors: int) -> None:
    """k-means of the latents [N, D], then of what the first codebook leaves over, and so on."""
    for book in codebooks(model):
        centres, sizes = k_means(vectors, CODEBOOK_SIZE)
        book.embed.copy_(centres)
        book.cluster_size.copy_(sizes * batch_vectors / len(vectors))  # as an average over steps would have it
        book.embed_avg.copy_(centres * book.cluster_size[:, None])
        book.inited.fill_(1)
        vectors = vectors - centres[nearest(vectors, centres)]


def quantise(model: EncodecPackageModel, latents: Tensor, update: bool) -> tuple[Tensor, Tensor]:
    """Latents [B, D, F] to their quantised value, gradient passed straight through, and the commitment loss.

    With `update` the codebooks follow the latents by exponential averages, and dead entries restart at a latent of
    this batch, its averages included: otherwise the next update would put the old entry back.
    """
    vectors = latents.transpose(1, 2).reshape(-1, latents.shape[1])
    residual, total, commitment = vectors, torch.zeros_like(vectors), 0.0
    for book in codebooks(model):
        index = nearest(residual.detach(), book.embed)
        value = book.embed[index]
        commitment = commitment + (residual - value).pow(2).mean()
        total = total + value
        if update:
            with torch.no_grad():
                source = residual.detach()
                sizes = torch.bincount(index, minlength=CODEBOOK_SIZE).float()
                book.cluster_size.mul_(EMA_DECAY).add_(sizes, alpha=1 - EMA_DECAY)
                sums = torch.zeros_like(book.embed).index_add_(0, index, source)
                book.embed_avg.mul_(EMA_DECAY).add_(sums, alpha=1 - EMA_DECAY)
                mean_size = len(source) / CODEBOOK_SIZE
                dead = book.cluster_size < DEAD_SHARE * mean_size
                book.cluster_size[dead] = mean_size / 2
                book.embed_avg[dead] = source[torch.randint(len(source), (int(dead.sum()),))] * mean_size / 2
                book.embed.copy_(book.embed_avg / book.cluster_size[:, None].clamp(min=1e-5))
        residual = residual - value.detach()
    passed = vectors + (total - vectors).detach()
    return passed.reshape(latents.shape[0], -1, latents.shape[1]).transpose(1, 2), commitment
