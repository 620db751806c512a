"""LSG attention: each token attends to its neighbourhood, to a sparse selection beyond it, and to global tokens.

Source: Condevaux and Harispe, "LSG Attention: Extrapolation of pretrained Transformers to long sequences",
arXiv 2210.15497. The geometry is in lsg_pattern.py, the selection in lsg_sparsity.py.

Dimension key:  B rows of the batch  H heads  G global tokens  T text tokens  D head_dim  E value width  N blocks
                W block_size  L sparse tokens  M tokens in all  K keys per query block

A row is G global tokens followed by its text. Masks are boolean, True = may be attended to. Every query has keys,
because global tokens are always visible.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .lsg_cpu import ChunkedAttention, can_chunk
from .lsg_flex import flex_attention_of_blocks
from .lsg_gather import KeyParts, key_windows
from .lsg_padding import BlockList, list_blocks
from .lsg_pattern import LSGPattern
from .lsg_softmax import ATTENTION_FUNCTIONS, drop, visibility_bias
from .lsg_sparsity import SparseTokens, at_least_float32, select_sparse_tokens
from .lsg_tracing import is_exported

MAP_COLUMNS = 512  # columns of an attention map computed at a time; this bounds the memory needed beside the map


def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockList,
    pattern: LSGPattern,
    projections: tuple[Tensor, ...] = (),
    implementation: str = "sdpa",
    dropout: float = 0.0,
) -> Tensor:
    """LSG attention of listed tokens: all global tokens, then all blocks, in the order of `BlockList.pack`.

    Args:
        query, key: (H, M, D), M = B * G + N * W.
        value: (H, M, E).
        blocks: which row each block belongs to, and which tokens may be attended to.
        pattern: which keys a query sees.
        projections: for "lsh" only, see `select_sparse_tokens`.
        implementation: a name in `ATTENTION_FUNCTIONS`.
        dropout: the share of attention weights dropped.

    Returns:
        The context, (H, M, E).
    """
    num_globals = blocks.num_rows * pattern.num_global_tokens

    def split(x: Tensor) -> tuple[Tensor, Tensor]:  # (H, M, ...) -> (H, B, G, ...), (H, N * W, ...)
        return x[:, :num_globals].unflatten(1, (blocks.num_rows, pattern.num_global_tokens)), x[:, num_globals:]

    (global_query, text_query), (global_key, text_key), (global_value, text_value) = (
        split(query),
        split(key),
        split(value),
    )
    global_context = global_attention(
        global_query, global_key, global_value, text_key, text_value, blocks, pattern, dropout
    )
    query_blocks = text_query.unflatten(1, (-1, pattern.block_size))  # (H, N, W, D)
    sparse = sparse_tokens(query_blocks, text_key, text_value, blocks, pattern, projections)
    keys, values = KeyParts(global_key, text_key, sparse.key), KeyParts(global_value, text_value, sparse.value)
    owners = key_owners(blocks, sparse.visible, pattern)
    if implementation == "flex_attention" and not is_exported():
        text_context = flex_attention_of_blocks(query_blocks, keys, values, owners, blocks.row, pattern)
    else:
        text_context = window_attention(
            query_blocks, keys, values, owners, blocks.row, pattern, implementation, dropout
        )
    # Lay the context out token by token in memory: the output projection reads it in this order.
    contexts = [x.movedim(0, 2).flatten(0, 1) for x in (global_context, text_context)]
    return torch.cat(contexts).transpose(0, 1)


def sparse_tokens(
    query_blocks: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockList,
    pattern: LSGPattern,
    projections: tuple[Tensor, ...] = (),
) -> SparseTokens:
    """The sparse tokens of listed blocks, from queries (H, N, W, D), keys (H, N * W, D) and values (H, N * W, E).

    Returns:
        Keys (H, L, D), values (H, L, E) and visibility (1 or H, L). All three are None without a sparse part.
    """
    if pattern.sparsity_type is None:
        return SparseTokens(None, None, None)
    first_query = query_blocks[None, :, blocks.first_of_row(), 0]
    selected = select_sparse_tokens(
        first_query, key[None], value[None], blocks.visible[None, None], pattern, projections
    )
    return SparseTokens(*(x[0] for x in selected))


def window_attention(
    query: Tensor,
    keys: KeyParts,
    values: KeyParts,
    owners: KeyParts,
    row: Tensor,
    pattern: LSGPattern,
    implementation: str = "sdpa",
    dropout: float = 0.0,
) -> Tensor:
    """The context of the blocks' queries, where each block has its own window of keys.

    Args:
        query: (H, N, W, D).
        keys, values: the keys and values of all blocks, with D and E as their last dimension.
        owners: the row that each key belongs to, or -1 if the key is not visible; (1 or H, ...).
        row: (N,), which row of the batch each block belongs to.
        pattern, implementation, dropout: as in `block_attention`.

    Returns:
        (H, N, W, E).
    """
    seen = key_windows(owners, row, pattern, fill=-1) == row[:, None]  # (1 or H, N, K)
    bias = visibility_bias(seen, query.dtype)[:, :, None]
    if can_chunk(query, implementation, dropout):
        return ChunkedAttention.apply(pattern, row, query, bias, *keys, *values)
    key, value = key_windows(keys, row, pattern), key_windows(values, row, pattern)
    return ATTENTION_FUNCTIONS[implementation](query, key, value, bias, dropout)


def key_owners(blocks: BlockList, sparse_visible: Tensor | None, pattern: LSGPattern) -> KeyParts:
    """The row that each key belongs to, or -1 if the key is not visible; int32, with 1 or H heads.

    `sparse_visible` (1 or H, L) says which sparse tokens are visible; None without a sparse part.
    """
    row = blocks.row.to(torch.int32)

    def owner(visible: Tensor, tokens_per_block: int) -> Tensor:
        return torch.where(visible.unflatten(1, (-1, tokens_per_block)), row[:, None], -1).flatten(-2)

    text, sparse = owner(blocks.visible[None], pattern.block_size), None
    if sparse_visible is not None:
        sparse = owner(sparse_visible, pattern.sparse_per_block)
        text = text.expand(sparse.shape[0], -1)
    globals_ = torch.arange(blocks.num_rows, dtype=torch.int32, device=row.device)[None, :, None]
    return KeyParts(globals_.expand(text.shape[0], -1, pattern.num_global_tokens), text, sparse)


def global_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_key: Tensor,
    text_value: Tensor,
    blocks: BlockList,
    pattern: LSGPattern,
    dropout: float = 0.0,
) -> Tensor:
    """The context of the global tokens, which attend to all tokens of their row.

    The softmax is combined from the segments of each row, so rows of different lengths need no padding.

    Args:
        query, key: (H, B, G, D), of the global tokens.
        value: (H, B, G, E).
        text_key, text_value: (H, N * W, D) and (H, N * W, E).
        blocks, pattern, dropout: as in `block_attention`.

    Returns:
        (H, B, G, E).
    """
    dtype = at_least_float32(query)
    query = query / math.sqrt(query.shape[-1])
    text_key, text_value = (blocks.segments(x, 1) for x in (text_key, text_value))  # (H, Z, I, ...)
    scores = (query @ key.transpose(-1, -2)).to(dtype)  # (H, B, G, G)
    # (H, Z, G, I); a product in the other order would copy the keys
    text_scores = (text_key @ blocks.spread(query).transpose(-1, -2)).transpose(-1, -2).to(dtype)
    text_scores = text_scores.masked_fill(~blocks.segments(blocks.visible, 0)[:, None], -math.inf)
    with torch.no_grad():  # the softmax does not depend on the peak that is subtracted
        peak = blocks.maximum(scores.amax(-1), text_scores.amax(-1))
    weights = (scores - peak[..., None]).exp()
    text_weights = (text_scores - blocks.spread(peak)[..., None]).exp()
    total = blocks.add(weights.sum(-1), text_weights.sum(-1))
    weights, text_weights = (drop(x, dropout).to(value.dtype) for x in (weights, text_weights))
    context = blocks.add((weights @ value).to(dtype), (text_weights @ text_value).to(dtype))
    return (context / total[..., None]).to(value.dtype)


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    pattern: LSGPattern,
    projections: tuple[Tensor, ...] = (),
    implementation: str = "sdpa",
    dropout: float = 0.0,
) -> Tensor:
    """`lsg_attention` without its checks, with the same arguments. In an exported graph, T is a multiple of W."""
    if not is_exported() and (visible.shape[1] <= pattern.full_length or len(query) == 0):  # no rows, no blocks
        seen_by_all = F.pad(visible, (pattern.num_global_tokens, 0), value=True)[:, None, None]  # (B, 1, 1, G + T)
        bias = visibility_bias(seen_by_all, query.dtype)
        return ATTENTION_FUNCTIONS[implementation](query, key, value, bias, dropout)
    blocks = list_blocks(visible, pattern.block_size)
    query, key, value = (blocks.pack(x.transpose(1, 2)).transpose(0, 1) for x in (query, key, value))
    context = block_attention(query, key, value, blocks, pattern, projections, implementation, dropout)
    return blocks.unpack(context.transpose(0, 1)).transpose(1, 2)


def lsg_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    pattern: LSGPattern,
    projections: tuple[Tensor, ...] = (),
    implementation: str = "sdpa",
    dropout: float = 0.0,
) -> Tensor:
    """LSG attention of a batch of rows; plain full attention if the text is so short that all tokens see each other.

    Args:
        query, key: (B, H, G + T, D), floating point: for each row and head, G = `pattern.num_global_tokens` global
            tokens, then the text. T is at most `pattern.full_length`, or a multiple of the block size.
        value: (B, H, G + T, E), in the dtype of `query` and `key`.
        visible: (B, T) bool: which text tokens may be attended to; False for padding, which may be anywhere.
        pattern: which keys a query sees.
        projections: for "lsh" only: a tensor (H, D, R // 2) for each number of buckets R in `pattern.hash_rounds`, as
            drawn by `hash_projections` for one call.
        implementation: "sdpa", "eager" or "flex_attention".
        dropout: the share of attention weights dropped, from 0 to 1; 0 with "flex_attention".

    Returns:
        The context, (B, H, G + T, E), in the dtype of `value`. Scores are divided by the square root of D.
        A hidden token has a context too: it is hidden as a key, not as a query.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value; the message names it.
    """
    check_arguments(query, key, value, visible, pattern, implementation, dropout)
    if visible.shape[1] > pattern.full_length:
        check_projections(projections, pattern, key)
    return row_attention(query, key, value, visible, pattern, projections, implementation, dropout)


def lsg_attention_map(
    query: Tensor, key: Tensor, visible: Tensor, pattern: LSGPattern, projections: tuple[Tensor, ...] = ()
) -> Tensor:
    """The effective weights of `lsg_attention` on the tokens themselves, (B, H, G + T, G + T), without dropout.

    The weight of a pooled or clustered key is spread over the tokens that the key averages. A token that is seen twice
    has the sum of both weights. So every row sums to 1, and the map times the values is the context. The context is
    linear in the values, so the map is the context of the identity matrix. Arguments as in `lsg_attention`.
    """
    identity = torch.eye(key.shape[2], dtype=key.dtype, device=key.device)
    columns = [
        row_attention(query, key, part.expand(*key.shape[:2], -1, -1), visible, pattern, projections, "eager")
        for part in ([identity] if is_exported() else identity.split(MAP_COLUMNS, dim=1))
    ]
    return torch.cat(columns, dim=-1)


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    pattern: LSGPattern,
    implementation: str,
    dropout: float,
) -> None:
    """Raise `ValueError` if `lsg_attention` cannot take these arguments."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4 or x.shape[:3] != query.shape[:3]:
            like_query = "" if name == "query" or query.ndim != 4 else f", the first three as in {tuple(query.shape)}"
            raise ValueError(
                f"`{name}` must have four dimensions, (batch, heads, global tokens + length, head_dim){like_query}; "
                f"got the shape {tuple(x.shape)}."
            )
        if not x.is_floating_point() or x.dtype != query.dtype:
            wanted = "a floating-point dtype" if name == "query" else f"the dtype of `query`, {query.dtype}"
            raise ValueError(f"`{name}` must have {wanted}, got {x.dtype}.")
    if key.shape != query.shape:
        raise ValueError(f"`key` must have the shape of `query`, {tuple(query.shape)}, got {tuple(key.shape)}.")
    num_globals, num_tokens = pattern.num_global_tokens, query.shape[2]
    if num_tokens < num_globals:
        raise ValueError(f"`query` must begin with the {num_globals} global tokens, got {num_tokens} tokens in all.")
    shape = query.shape[0], num_tokens - num_globals
    if visible.dtype != torch.bool:
        raise ValueError(f"`visible` must be boolean, True for tokens that may be attended to, got {visible.dtype}.")
    if tuple(visible.shape) != shape:
        raise ValueError(
            f"`visible` must have the shape (batch, length) = {shape}, that of `query` without the "
            f"{num_globals} global tokens, got {tuple(visible.shape)}."
        )
    length, block_size = visible.shape[1], pattern.block_size
    if length > pattern.full_length and length % block_size:
        raise ValueError(
            f"`visible` has the length {length}: above {pattern.full_length}, the length must be a multiple of "
            f"`block_size` ({block_size}). Append hidden tokens (False in `visible`)."
        )
    if implementation not in ATTENTION_FUNCTIONS:
        known = ", ".join(map(repr, ATTENTION_FUNCTIONS))
        raise ValueError(f"`implementation` {implementation!r} is unknown. Choose from {known}.")
    if not 0 <= dropout <= 1:
        raise ValueError(f"`dropout` must be a number from 0 to 1, got {dropout}.")
    if dropout and implementation == "flex_attention":
        raise ValueError(f'`dropout` must be 0 with "flex_attention", which cannot drop weights, got {dropout}.')


def check_projections(projections: tuple[Tensor, ...], pattern: LSGPattern, key: Tensor) -> None:
    """Raise `ValueError` unless there is a projection of the right shape for each round of hashing."""
    num_heads, head_dim = key.shape[1], key.shape[3]
    wanted = [(num_heads, head_dim, num_buckets // 2) for num_buckets in pattern.hash_rounds]
    if wanted and [tuple(x.shape) for x in projections] != wanted:
        raise ValueError(
            f"`projections` must be tensors of the shapes {wanted}, one for each of `pattern.hash_rounds`, got "
            f"{[tuple(x.shape) for x in projections]}."
        )
