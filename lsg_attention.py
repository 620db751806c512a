"""LSG attention: each token attends to its neighbourhood, to a sparse selection beyond it, and to global tokens.

Source: Condevaux and Harispe, "LSG Attention: Extrapolation of pretrained Transformers to long sequences",
arXiv 2210.15497.

Dimension key:  B batch  H heads  G global tokens  T text tokens  D head_dim  E value width  N blocks  W block_size
                S sparse tokens per side  K keys per query block

A sequence is the G global tokens followed by the T text tokens. Masks are boolean, True = may be attended to. No
query is ever without keys, as global tokens are always visible.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .lsg_sparsity import LSGPattern, at_least_float32, select_sparse_tokens

MAP_COLUMNS = 512  # columns of an attention map computed at a time, which bounds the memory beside the map's own


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, dropout: float = 0.0) -> Tensor:
    """Softmax attention by torch's fused kernel: (B, H, Q, D), (B, H, K, D), (B, H, K, E) -> (B, H, Q, E).

    `visible` (B, 1 or H, 1, K) says which keys are attended to; `dropout` is the share of weights dropped.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, dropout: float = 0.0) -> Tensor:
    """As `sdpa_attention`, by matrix products and an explicit softmax."""
    scores = (query / math.sqrt(query.shape[-1])) @ key.mT  # in this order float16 does not overflow
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=at_least_float32(scores)).to(value.dtype)
    return F.dropout(weights, dropout) @ value


ATTENTION_FUNCTIONS = {"sdpa": sdpa_attention, "eager": eager_attention}


def block_windows(x: Tensor, num_blocks: int, step: int, start: int, size: int) -> Tensor:
    """Give every block its window of `x`, zeros (False) past the ends.

    Args:
        x: (B, H, L, ...).
        num_blocks: N.
        step: how far the window moves from one block to the next.
        start: where the window of block 0 begins; may be negative.
        size: length of a window.

    Returns:
        (B, H, N, size, ...); window i holds `x[:, :, i * step + start : i * step + start + size]`.
    """
    before = max(0, -start)
    after = max(0, (num_blocks - 1) * step + start + size - x.shape[2])
    padded = F.pad(x, (0, 0) * (x.ndim - 3) + (before, after))
    windows = padded[:, :, start + before :].unfold(2, size, step)[:, :, :num_blocks]
    return windows.movedim(-1, 3)


def key_windows(x_global: Tensor, x_text: Tensor, x_sparse: Tensor | None, pattern: LSGPattern) -> Tensor:
    """All that the queries of each block see, for keys, values or visibility.

    Args:
        x_global: (B, H, G, ...) of the global tokens.
        x_text: (B, H, T, ...) of the text tokens.
        x_sparse: (B, H, L, ...) of the sparse tokens, None without a sparse part.
        pattern: the sizes.

    Returns:
        (B, H, N, K, ...), K = G [+ 2 S] + 3 W: the global tokens; S sparse tokens on each side of those that stand
        for the local window; the local window, which is the block and one neighbour on each side.
    """
    block_size = pattern.block_size
    num_blocks = x_text.shape[2] // block_size
    windows = [x_global[:, :, None].expand(-1, -1, num_blocks, *x_global.shape[2:])]
    if x_sparse is not None:
        step, size = pattern.sparse_per_block, pattern.sparse_block_size
        windows.append(block_windows(x_sparse, num_blocks, step=step, start=-step - size, size=size))
        windows.append(block_windows(x_sparse, num_blocks, step=step, start=2 * step, size=size))
    windows.append(block_windows(x_text, num_blocks, step=block_size, start=-block_size, size=3 * block_size))
    return torch.cat(windows, dim=3)


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
    """LSG attention of a whole sequence; plain full attention when two blocks hold its text.

    Args:
        query, key: (B, H, G + T, D). T is at most two blocks, or a multiple of the block size.
        value: (B, H, G + T, E).
        visible: (B, T) bool: which text tokens may be attended to.
        pattern: which keys a query sees.
        projections: of "lsh", see `select_sparse_tokens`.
        implementation: a name in `ATTENTION_FUNCTIONS`.
        dropout: the share of attention weights dropped.

    Returns:
        The context, (B, H, G + T, E).
    """
    attend = partial(ATTENTION_FUNCTIONS[implementation], dropout=dropout)
    num_globals = pattern.num_global_tokens
    seen_by_all = F.pad(visible, (num_globals, 0), value=True)[:, None, None]  # (B, 1, 1, G + T)
    if visible.shape[1] <= 2 * pattern.block_size:
        return attend(query, key, value, seen_by_all)
    global_context = attend(query[:, :, :num_globals], key, value, seen_by_all)
    text_context = text_attention(query[:, :, num_globals:], key, value, visible, pattern, projections, attend)
    return torch.cat([global_context, text_context], dim=2)


def text_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    pattern: LSGPattern,
    projections: tuple[Tensor, ...],
    attend: Callable[..., Tensor],
) -> Tensor:
    """The context of the text queries (B, H, T, D), block by block: (B, H, T, E). The rest as in `lsg_attention`."""
    num_heads, block_size = query.shape[1], pattern.block_size
    visible = visible[:, None]  # (B, 1, T), or (B, H, T) once a selection tells the heads apart
    global_key, text_key = key.tensor_split([pattern.num_global_tokens], dim=2)
    global_value, text_value = value.tensor_split([pattern.num_global_tokens], dim=2)
    sparse_key = sparse_value = sparse_visible = None
    if pattern.sparsity_type is not None:
        sparse_key, sparse_value, sparse_visible = select_sparse_tokens(
            query, text_key, text_value, visible, pattern, projections
        )
        visible = visible.expand(-1, sparse_visible.shape[1], -1)
    global_visible = visible.new_ones(*visible.shape[:2], pattern.num_global_tokens)
    seen = key_windows(global_visible, visible, sparse_visible, pattern)  # (B, 1 or H, N, K)
    context = attend(
        query.unflatten(2, (-1, block_size)).flatten(1, 2),  # (B, H * N, W, D)
        key_windows(global_key, text_key, sparse_key, pattern).flatten(1, 2),  # (B, H * N, K, D)
        key_windows(global_value, text_value, sparse_value, pattern).flatten(1, 2),
        seen.expand(-1, num_heads, -1, -1).flatten(1, 2)[:, :, None],  # (B, H * N, 1, K)
    )
    return context.unflatten(1, (num_heads, -1)).flatten(2, 3)


def lsg_attention_map(
    query: Tensor, key: Tensor, visible: Tensor, pattern: LSGPattern, projections: tuple[Tensor, ...] = ()
) -> Tensor:
    """The effective weights of `lsg_attention` on the tokens themselves, (B, H, G + T, G + T), without dropout.

    The weight of a pooled or clustered key is spread over the tokens that it is a mean of, and a token seen twice has
    the sum of both weights: every row sums to 1, and the map times the values is the context. As the context is
    linear in the values, the map is the context of the identity matrix. Arguments as in `lsg_attention`.
    """
    identity = torch.eye(key.shape[2], dtype=key.dtype, device=key.device)
    columns = [
        lsg_attention(query, key, part.expand(*key.shape[:2], -1, -1), visible, pattern, projections, "eager")
        for part in identity.split(MAP_COLUMNS, dim=1)
    ]
    return torch.cat(columns, dim=-1)
