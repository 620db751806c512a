"""The sparse part of LSG attention: which tokens, or means of tokens, stand for the text outside the local window.

A selection turns the text's keys and values into a shorter list of sparse keys and values. It is linear in the values
(each sparse value is a weighted mean of values), so values of any width may be passed, the identity matrix included.

Source: Condevaux and Harispe, "LSG Attention: Extrapolation of pretrained Transformers to long sequences",
arXiv 2210.15497, section 3.

Dimension key:  B batch  H heads  T text tokens  D head_dim  E value width  C chunks  W tokens per chunk
                R buckets per chunk  L sparse tokens
"""

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .lsg_pattern import SPARSITY_TYPES, LSGPattern


class SparseTokens(NamedTuple):
    """Keys (B, H, L, D), values (B, H, L, E) and visibility (B, 1 or H, L, bool: True = may be attended to)."""

    key: Tensor
    value: Tensor
    visible: Tensor


def select_sparse_tokens(
    first_query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    pattern: LSGPattern,
    projections: tuple[Tensor, ...] = (),
) -> SparseTokens:
    """Select or build the sparse tokens of every row and head.

    Args:
        first_query: (B, H, T / block_size, D), for each block, the query of the first token of the text that the block
            belongs to. Only "bos_pooling" reads it.
        key: (B, H, T, D); T is a multiple of `pattern.block_size`.
        value: (B, H, T, E).
        visible: (B, 1, T) bool, True = may be attended to.
        pattern: the selection and its sizes; `sparsity_type` is not None.
        projections: one (H, D, R // 2) tensor for each of `pattern.hash_rounds`, see `hash_projections`.

    Returns:
        L = T / sparsity_factor sparse tokens, in the order of the text.
    """
    kind, factor = pattern.sparsity_type, pattern.sparsity_factor
    if factor == 1:  # every token stands for itself
        return SparseTokens(key, value, visible)
    if kind == "norm":
        return largest_norms(key, value, visible, pattern.chunk_size, factor)
    if kind == "stride":
        return strided(key, value, visible, factor, run=1)
    if kind == "block_stride":
        return strided(key, value, visible, factor, run=pattern.sparse_per_block)
    with without_autocast(key.device):
        if kind == "pooling":
            return weighted_means(key, value, *mean_weights(visible, factor, at_least_float32(key)))
        if kind == "bos_pooling":
            return weighted_means(key, value, *first_query_weights(first_query, key, visible, factor))
        if kind == "lsh":
            if factor == pattern.sparse_block_size:  # by definition the same as "bos_pooling"
                return weighted_means(key, value, *first_query_weights(first_query, key, visible, factor))
            return hashed(key, value, visible, pattern.chunk_size, pattern.hash_rounds, projections)
    raise ValueError(f"`sparsity_type` {kind!r} is unknown: choose one of {', '.join(SPARSITY_TYPES)}.")


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context without autocast. Means need float32 at least; autocast would compute them in half precision."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def largest_norms(key: Tensor, value: Tensor, visible: Tensor, chunk_size: int, factor: int) -> SparseTokens:
    """Keep the `chunk_size // factor` visible tokens with the largest key norm in each chunk, by ascending norm.

    If several tokens have the same norm, the first ones are kept.
    """
    norms = torch.linalg.vector_norm(key, dim=-1, dtype=at_least_float32(key)) * visible
    chunks = norms.unflatten(2, (-1, chunk_size))  # (B, H, C, W)
    chosen = first_of_largest(chunks, chunk_size // factor).flip(-1)
    first = torch.arange(0, key.shape[2], chunk_size, device=key.device)[:, None]
    index = (first + chosen).flatten(2)  # (B, H, L)
    return SparseTokens(
        gather_tokens(key, index), gather_tokens(value, index), visible.expand_as(norms).gather(2, index)
    )


def first_of_largest(x: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest values in the last dimension, descending, the first of equal values first."""
    if torch.onnx.is_in_onnx_export():  # ONNX's TopK is stable by definition, but not all exporters can sort
        return x.topk(count, dim=-1).indices
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Take the tokens `index` (B, H, L) of `x` (B, H, T, D) -> (B, H, L, D), token by token in memory."""
    batch_size, num_heads, length, width = x.shape
    first = torch.arange(batch_size, device=x.device)[:, None, None] * length
    head = torch.arange(num_heads, device=x.device)
    rows = (first + index.transpose(1, 2)) * num_heads + head  # (B, L, H)
    taken = x.transpose(1, 2).reshape(-1, width).index_select(0, rows.flatten())
    return taken.unflatten(0, rows.shape).transpose(1, 2)


def strided(key: Tensor, value: Tensor, visible: Tensor, factor: int, run: int) -> SparseTokens:
    """Of every `factor` runs of `run` consecutive tokens, head h takes run number h mod factor."""
    num_heads = key.shape[1]
    head = torch.arange(num_heads, device=key.device)

    def take(x: Tensor) -> Tensor:  # (B, H, T, ...) -> (B, H, T / factor, ...)
        runs = x.unflatten(2, (-1, factor, run))[:, head, :, head % factor]  # (H, B, C, run, ...)
        return runs.transpose(0, 1).flatten(2, 3)

    return SparseTokens(take(key), take(value), take(visible.expand(-1, num_heads, -1)))


def mean_weights(visible: Tensor, factor: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights (B, 1, C, W) of each chunk's mean over its visible tokens, and whether the chunk has any, (B, 1, C)."""
    chunks = visible.unflatten(2, (-1, factor))
    members = chunks.to(dtype)
    return members / members.sum(-1, keepdim=True).clamp(min=1), chunks.any(-1)


def first_query_weights(query: Tensor, key: Tensor, visible: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """As `mean_weights`, but softmax weights (B, H, C, W) of the tokens for their block's query (B, H, N, D)."""
    dtype = at_least_float32(key)
    key_blocks = key.to(dtype).unflatten(2, (query.shape[2], -1))  # (B, H, N, T / N, D)
    scores = (key_blocks @ query.to(dtype)[..., None]).flatten(2) / math.sqrt(key.shape[-1])  # (B, H, T)
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    return scores.unflatten(2, (-1, factor)).softmax(-1), visible.unflatten(2, (-1, factor)).any(-1)


def weighted_means(key: Tensor, value: Tensor, weights: Tensor, visible: Tensor) -> SparseTokens:
    """Sum each chunk's keys and values with the same weights."""
    return SparseTokens(weighted_sum(weights, key), weighted_sum(weights, value), visible)


def weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """Sum each chunk of `x` (B, H, C * W, D) with `weights` (B, 1 or H, C, W) -> (B, H, C, D), in x's dtype."""
    chunks = x.unflatten(2, (-1, weights.shape[-1]))
    return (weights.to(at_least_float32(x))[..., None] * chunks).sum(3).to(x.dtype)


def hashed(
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    chunk_size: int,
    rounds: tuple[int, ...],
    projections: tuple[Tensor, ...],
) -> SparseTokens:
    """Cluster each chunk's visible tokens by rounds of locality-sensitive hashing; cluster means are sparse tokens."""
    dtype = at_least_float32(key)
    key_chunks, value_chunks = (x.to(dtype).unflatten(2, (-1, chunk_size)) for x in (key, value))
    with torch.no_grad():  # the choice of a token's cluster has no gradient
        members = cluster(key_chunks, visible.to(dtype).unflatten(2, (-1, chunk_size)), rounds, projections)
    count = members.sum(-1, keepdim=True)
    weights = members / count.clamp(min=1)  # (B, H, C, R, W)
    means = ((weights @ x).flatten(2, 3).to(key.dtype) for x in (key_chunks, value_chunks))
    return SparseTokens(*means, (count >= 1).flatten(2))


def cluster(key: Tensor, visible: Tensor, rounds: tuple[int, ...], projections: tuple[Tensor, ...]) -> Tensor:
    """Put each chunk's tokens into buckets.

    The first round hashes single tokens. Each later round hashes the sums of the buckets of the round before.

    Args:
        key: (B, H, C, W, D).
        visible: (B, 1, C, W), 1 for the tokens that count, 0 for others.
        rounds, projections: as in `hash_projections`, of one call.

    Returns:
        (B, H, C, R, W) in the dtype of `key`: 1 for a visible token in its bucket, else 0.
    """
    bucket = nearest_direction(key, projections[0])
    for num_buckets, projection in zip(rounds[:-1], projections[1:], strict=True):
        sums = memberships(bucket, visible, num_buckets) @ key
        bucket = nearest_direction(sums, projection).gather(-1, bucket)
    return memberships(bucket, visible, rounds[-1])


def memberships(bucket: Tensor, visible: Tensor, num_buckets: int) -> Tensor:
    """The matrix (B, H, C, R, W) with `visible` (B, 1, C, W) at each token's `bucket` (B, H, C, W), 0 elsewhere."""
    if torch.onnx.is_in_onnx_export():  # slower, but without shapes that the older exporter would freeze
        is_member = bucket[..., None, :] == torch.arange(num_buckets, device=bucket.device)[:, None]
        return is_member * visible[..., None, :]
    members = visible.new_zeros(*bucket.shape[:-1], num_buckets, bucket.shape[-1])
    return members.scatter_(-2, bucket[..., None, :], visible.expand(bucket.shape)[..., None, :])


def nearest_direction(vectors: Tensor, projection: Tensor) -> Tensor:
    """Which random direction, or opposite of a direction, each vector is nearest to, regardless of its length.

    Cross-polytope hashing, Andoni et al. 2015, arXiv 1509.02897.

    Args:
        vectors: (B, H, C, W, D). A vector of zeros gets direction 0.
        projection: (H, D, R // 2), the directions. Their opposites are numbered after them. If R is odd, the last
            bucket stays empty. With R = 1 there are no directions, and the only bucket takes all vectors.

    Returns:
        (B, H, C, W), long.
    """
    if not projection.shape[-1]:
        return torch.zeros_like(vectors[..., 0], dtype=torch.long)
    scores = vectors.flatten(2, 3) @ projection.to(vectors)
    (highest, direction), (lowest, opposite) = scores.max(-1), scores.min(-1)
    nearest = torch.where(highest >= -lowest, direction, opposite + projection.shape[-1])
    return nearest.unflatten(2, (-1, vectors.shape[3]))


def hash_projections(
    num_calls: int, rounds: tuple[int, ...], num_heads: int, head_dim: int, seed: int | None = None
) -> list[Tensor]:
    """Random projections for every call of an attention layer in one forward pass.

    Args:
        num_calls: attention layers applied in one forward pass.
        rounds: buckets per chunk in each round (`LSGPattern.hash_rounds`).
        num_heads: H.
        head_dim: D.
        seed: of a separate generator, so that the same seed gives the same projections in every process. With None,
            torch's global generator draws them.

    Returns:
        For each round with R buckets, a normal float32 tensor (num_calls, H, D, R // 2) on the CPU. All rounds of one
        call are drawn before those of the next, as in the published code.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    calls = [[torch.randn(num_heads, head_dim, size // 2, **kind) for size in rounds] for _ in range(num_calls)]
    return [torch.stack(draws) for draws in zip(*calls, strict=True)]


def at_least_float32(x: Tensor) -> torch.dtype:
    """The dtype to accumulate `x` in: its own, but float32 for half precision."""
    return torch.promote_types(x.dtype, torch.float32)
