"""Initial word embeddings: counts of which pieces occur near each other, factorized.

A masked language model must learn what words mean and where to attend at the same time, and one does not help without
the other. For millions of tokens, the loss stays near that of word frequencies. Counting needs one pass, without
gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def cooccurrences(texts: Iterable[np.ndarray], vocab_size: int, window: int) -> Tensor:
    """How often two pieces occur at most ``window`` tokens apart, weighted by 1/distance.

    Args:
        texts: token ids, each of shape (length,).
        vocab_size: number of pieces.
        window: tokens to either side.

    Returns:
        A symmetric float32 matrix of shape (vocab_size, vocab_size).
    """
    counts = torch.zeros(vocab_size * vocab_size)
    for text in texts:
        tokens = torch.from_numpy(text.astype(np.int64))
        for distance in range(1, window + 1):
            pairs = tokens[:-distance] * vocab_size + tokens[distance:]
            counts += torch.bincount(pairs, minlength=vocab_size * vocab_size).float() / distance
    counts = counts.view(vocab_size, vocab_size)
    return counts + counts.T


def positive_pmi(counts: Tensor) -> Tensor:
    """How much more often than by chance two pieces occur together, as a logarithm: (vocabulary, vocabulary).

    Pairs that occur less often than by chance get 0. Every count is reduced by one, so that pairs seen once have no
    effect.
    """
    frequency = counts.sum(0).clamp_min(1.0)
    ratio = (counts - 1).clamp_min(0).mul_(counts.sum()).div_(frequency[:, None]).div_(frequency[None, :])
    return ratio.clamp_min_(1.0).log_()


def factorize(matrix: Tensor, size: int, steps: int = 4) -> Tensor:
    """Vectors (rows, size) whose products approximate a symmetric matrix (randomized subspace iteration)."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(len(matrix), min(len(matrix), size + 32), generator=generator)
    for _ in range(steps):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)  # ascending
    return basis @ vectors[:, -size:] * values[-size:].clamp_min(0).sqrt()


@torch.no_grad()
def set_word_embeddings(embeddings: Tensor, tokens: np.ndarray, window: int = 5) -> None:
    """Fill embeddings (vocabulary, size) in place; unseen pieces keep their rows.

    Args:
        embeddings: randomly initialized word embeddings.
        tokens: training text, shape (length,).
        window: tokens to either side that count as near.
    """
    counts = cooccurrences([tokens], len(embeddings), window)
    seen = counts.sum(0) > 0
    vectors = factorize(positive_pmi(counts), embeddings.shape[1])
    vectors -= vectors[seen].mean(0)  # the mean of all pieces carries no information
    vectors *= embeddings.std() / vectors.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)
    embeddings[seen] = vectors[seen]
