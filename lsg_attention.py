"""LSG attention: each token attends to its neighbourhood, to a sparse selection beyond it, and to global tokens.

Source: Condevaux and Harispe, "LSG Attention: Extrapolation of pretrained Transformers to long sequences",
arXiv 2210.15497.

Dimension key:  B rows of the batch  H heads  G global tokens  T text tokens  D head_dim  E value width  N blocks
                W block_size  p sparse tokens per block  S sparse tokens per side  L sparse tokens
                M tokens in all  K keys per query block

A row is G global tokens followed by its text. Masks are boolean, True = may be attended to. No query is ever without
keys, as global tokens are always visible.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .lsg_blocks import BlockList, list_blocks
from .lsg_flex import flex_blocks
from .lsg_sparsity import LSGPattern, SparseTokens, at_least_float32, select_sparse_tokens

MAP_COLUMNS = 512  # columns of an attention map computed at a time, which bounds the memory beside the map's own
CHUNK_BYTES = 2**21  # about so many bytes of keys are copied into windows at a time: they stay in the cache


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """Softmax attention by torch's fused kernel: (..., Q, D), (..., K, D), (..., K, E) -> (..., Q, E).

    `bias` (..., 1, K) is added to the scores; `dropout` is the share of weights dropped.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)


def eager_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float = 0.0) -> Tensor:
    """As `sdpa_attention`, by matrix products and an explicit softmax."""
    scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2) + bias  # so float16 does not overflow
    return drop(scores.softmax(-1), dropout) @ value


def drop(weights: Tensor, dropout: float) -> Tensor:
    """Dropout, where there is any: exporters do not see that one of 0 is none."""
    return F.dropout(weights, dropout) if dropout else weights


def attention_gradients(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, grad_context: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the query, key and value of `sdpa_attention`, without dropout, from that of its context.

    By torch's fused kernel; in half precision, where that takes twice as long on the CPU, by plain products.
    """
    if query.element_size() > 2:
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        with torch.enable_grad():
            context = sdpa_attention(*inputs, bias)
        return torch.autograd.grad(context, inputs, grad_context)
    query = query / math.sqrt(query.shape[-1])
    weights = (query @ key.mT).add_(bias).softmax(-1)
    grad_weights = grad_context @ value.mT
    grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    grad_query = grad_scores @ key / math.sqrt(query.shape[-1])
    return grad_query, grad_scores.mT @ query, weights.mT @ grad_context


# FlexAttention is for blocks; where every token sees every other, there is nothing for it to pass over. A graph for
# any length takes windows: the mask's tiles are laid out for one.
ATTENTION_FUNCTIONS = {"sdpa": sdpa_attention, "eager": eager_attention, "flex_attention": sdpa_attention}


def visibility_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 for visible keys, minus infinity for others."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -math.inf)


class Sources(NamedTuple):
    """What the key windows of consecutive blocks are cut from, for keys, values, or the rows that they are of."""

    of_globals: Tensor  # (H, B, G, ...)
    of_text: Tensor  # (H, N * W, ...)
    of_sparse: Tensor | None  # (H, N * p, ...); None without a sparse part


class Chunk(NamedTuple):
    """Some consecutive blocks, and which columns of their windows are seen by any of their queries.

    Of the windows' parts as `window_parts` gives them, each with the first column and the one after the last.
    """

    blocks: slice
    columns: list[tuple[int, int]]


class WindowPart(NamedTuple):
    """A part of the windows: for block n the `size` tokens from the (start + n * step)-th on, with padding for those
    before the first token and after the last."""

    tokens: Tensor  # (H, T or L, ...)
    start: int
    size: int
    step: int

    def end(self, num_blocks: int) -> int:
        """The token after the last in the windows of so many blocks."""
        return self.start + (num_blocks - 1) * self.step + self.size

    def missing(self, num_blocks: int) -> tuple[int, int]:
        """How many tokens of padding stand in the windows of so many blocks, before and behind the others."""
        end, length = self.end(num_blocks), self.tokens.shape[1]
        return min(end, 0) - min(self.start, 0), max(end, length) - max(self.start, length)

    def present(self, num_blocks: int) -> Tensor:
        """The tokens in the windows of so many blocks, without padding; a view."""
        return self.tokens[:, max(self.start, 0) : max(self.end(num_blocks), 0)]

    def strip(self, num_blocks: int, fill: float = 0) -> Tensor:
        """The tokens in the windows of so many blocks, with padding of `fill`; a view where none is missing."""
        present, missing = self.present(num_blocks), self.missing(num_blocks)
        return F.pad(present, [0, 0] * (present.ndim - 2) + [*missing], value=fill) if any(missing) else present

    def whole_strip(self, fill: float = 0) -> Tensor:
        """The same for all blocks that the tokens are of, `step` of them each: without a look at how many there are,
        as a graph for any number of blocks must do."""
        surplus = self.start + self.size - self.step  # tokens past the last block's own, or, below 0, short of them
        missing = max(-self.start, 0), max(surplus, 0)
        padded = F.pad(self.tokens, [0, 0] * (self.tokens.ndim - 2) + [*missing], value=fill)
        return padded[:, max(self.start, 0) : padded.shape[1] + min(surplus, 0)]


def window_parts(sources: Sources, pattern: LSGPattern, chunk: Chunk | None = None) -> list[WindowPart]:
    """The parts of the windows behind the global tokens, of all blocks or of a chunk."""
    parts = [WindowPart(sources.of_text, -pattern.block_size, 3 * pattern.block_size, pattern.block_size)]
    if sources.of_sparse is not None:
        size, step = pattern.sparse_block_size, pattern.sparse_per_block
        parts = [WindowPart(sources.of_sparse, start, size, step) for start in (-step - size, 2 * step)] + parts
    if chunk is None:
        return parts
    return [
        WindowPart(tokens, start + chunk.blocks.start * step + begin, end - begin, step)
        for (tokens, start, _, step), (begin, end) in zip(parts, chunk.columns, strict=True)
        if begin < end
    ]


def key_windows(
    sources: Sources, row: Tensor, pattern: LSGPattern, chunk: Chunk | None = None, fill: float = 0
) -> Tensor:
    """All that the queries of each block see.

    Args:
        sources: of N blocks.
        row: (N,), which row each block is of.
        pattern: the sizes.
        chunk: only its blocks, and only its columns.
        fill: what stands for tokens before the first and after the last.

    Returns:
        (H, N, K, ...), K = G [+ 2 S] + 3 W: the global tokens of the block's row; S sparse tokens on each side of
        those that stand for the local window; the local window, which is the block and one neighbour on each side.
    """
    row = row if chunk is None else row[chunk.blocks]
    windows = [sources.of_globals[:, row]]
    for part in window_parts(sources, pattern, chunk):
        strip = part.whole_strip(fill) if chunk is None else part.strip(row.shape[0], fill)
        windows.append(cut_windows(strip, row.shape[0], part.size, part.step))
    return torch.cat(windows, dim=2)


def cut_windows(strip: Tensor, num_blocks: int, size: int, step: int) -> Tensor:
    """For each block `size` tokens, `step` further than for the block before: (H, tokens, ...) -> (H, N, size, ...)."""
    if is_exported():  # not all exporters know how to unfold what is of any length
        first = torch.arange(num_blocks, device=strip.device)[:, None] * step
        return strip[:, first + torch.arange(size, device=strip.device)]
    return strip.unfold(1, size, step).movedim(-1, 2)


def add_windows(total: Sources, windows: Tensor, row: Tensor, pattern: LSGPattern, chunk: Chunk) -> None:
    """Add `windows`, cut as by `key_windows`, to where they were cut from: the gradient of cutting."""
    windows, row = windows.movedim(2, -1), row[chunk.blocks]  # (H, N, ..., K), as `unfold` gives them
    parts = window_parts(total, pattern, chunk)
    sizes = [total.of_globals.shape[2], *(part.size for part in parts)]
    of_globals, *of_parts = windows.split(sizes, dim=-1)
    total.of_globals.index_add_(1, row, of_globals.movedim(-1, 2))
    for part, gradient in zip(parts, of_parts, strict=True):
        strip = part.strip(row.shape[0])
        for start in range(0, part.size, part.step):  # pieces of one step do not overlap, whole windows do
            piece = gradient[..., start : start + part.step]
            strip[:, start:].unfold(1, piece.shape[-1], part.step)[:, : row.shape[0]] += piece
        present = part.present(row.shape[0])
        if strip.shape != present.shape:  # a copy, with padding
            present.copy_(strip.narrow(1, part.missing(row.shape[0])[0], present.shape[1]))


class ChunkedAttention(torch.autograd.Function):
    """`sdpa_attention` of all blocks, a few at a time, so that their windows are never in memory, only in the cache.

    Args:
        pattern: the sizes.
        row: (N,), which row each block is of.
        query: (H, N, W, D).
        bias: (1 or H, N, 1, K), of the windows.
        sources: the three of the keys, then those of the values.

    Returns:
        (H, N, W, E). The backward pass cuts the windows again, and computes the attention again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pattern: LSGPattern,
        row: Tensor,
        query: Tensor,
        bias: Tensor,
        *sources: Tensor | None,
    ) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(row, query, bias, *sources)
        num_heads, num_blocks, block_size, _ = query.shape
        width = Sources(*sources[3:]).of_text.shape[-1]
        context = query.new_empty(num_blocks, block_size, num_heads, width).movedim(2, 0)
        for chunk, seen_bias in chunks_of_blocks(query, bias, Sources(*sources[:3]), pattern):
            windows = (key_windows(Sources(*x), row, pattern, chunk) for x in (sources[:3], sources[3:]))
            context[:, chunk.blocks] = sdpa_attention(query[:, chunk.blocks], *windows, seen_bias)
        return context

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor | None, ...]:
        row, query, bias, *sources = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_sources = [None if x is None else torch.zeros_like(x) for x in sources]
        for chunk, seen_bias in chunks_of_blocks(query, bias, Sources(*sources[:3]), ctx.pattern):
            part = chunk.blocks
            windows = (key_windows(Sources(*x), row, ctx.pattern, chunk) for x in (sources[:3], sources[3:]))
            grad_query[:, part], *grad_windows = attention_gradients(
                query[:, part], *windows, seen_bias, grad_context[:, part]
            )
            for total, gradient in zip((grad_sources[:3], grad_sources[3:]), grad_windows, strict=True):
                add_windows(Sources(*total), gradient, row, ctx.pattern, chunk)
        return None, None, grad_query, None, *grad_sources


def chunks_of_blocks(
    query: Tensor, bias: Tensor, sources: Sources, pattern: LSGPattern
) -> Iterator[tuple[Chunk, Tensor]]:
    """Some blocks after another, and the bias of the columns that they see, for queries (H, N, W, D).

    The first and the last blocks of a row see less than their windows hold: padding, or another row's text.
    """
    sizes = [part.size for part in window_parts(sources, pattern)]
    of_globals, *of_parts = bias.split([bias.shape[-1] - sum(sizes), *sizes], dim=-1)
    seen = [seen_columns(part) for part in of_parts]
    num_heads, num_blocks, _, width = query.shape
    count = max(1, CHUNK_BYTES // (num_heads * bias.shape[-1] * width * query.element_size()))
    for first in range(0, num_blocks, count):
        blocks = slice(first, min(first + count, num_blocks))
        columns = [(min(begins[blocks]), max(ends[blocks])) for begins, ends in seen]
        of_seen = [part[:, blocks, :, begin:end] for part, (begin, end) in zip(of_parts, columns, strict=True)]
        yield Chunk(blocks, columns), torch.cat([of_globals[:, blocks], *of_seen], dim=-1)


def seen_columns(bias: Tensor) -> tuple[list[int], list[int]]:
    """For each block of (1 or H, N, 1, K) the first column that is not minus infinity for all heads, and the one after
    the last such; K and 0 where there is none."""
    size = bias.shape[-1]
    column = torch.arange(size, device=bias.device)
    seen = (bias == 0).any(0)[:, 0]
    return column.where(seen, size).amin(-1).tolist(), (column + 1).where(seen, 0).amax(-1).tolist()


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
    """LSG attention of rows that are listed block by block, as `BlockList.pack` lists them.

    Args:
        query, key: (H, M, D), M = B * G + N * W.
        value: (H, M, E).
        blocks: which row each block is of, and which tokens may be attended to.
        pattern: which keys a query sees.
        projections: of "lsh", see `select_sparse_tokens`.
        implementation: a name in `ATTENTION_FUNCTIONS`.
        dropout: the share of attention weights dropped.

    Returns:
        The context, (H, M, E).
    """
    num_globals = blocks.num_rows * pattern.num_global_tokens
    global_query, global_key, global_value = (
        x[:, :num_globals].unflatten(1, (blocks.num_rows, pattern.num_global_tokens)) for x in (query, key, value)
    )  # (H, B, G, D)
    text_query, text_key, text_value = (x[:, num_globals:] for x in (query, key, value))
    global_context = global_attention(
        global_query, global_key, global_value, text_key, text_value, blocks, pattern, dropout
    )
    query_blocks = text_query.unflatten(1, (-1, pattern.block_size))  # (H, N, W, D)
    sparse = None
    if pattern.sparsity_type is not None:
        first_query = query_blocks[None, :, blocks.first_of_row(), 0]
        sparse = select_sparse_tokens(
            first_query, text_key[None], text_value[None], blocks.visible[None, None], pattern, projections
        )
    keys = global_key, text_key, sparse and sparse.key[0]
    values = global_value, text_value, sparse and sparse.value[0]
    owners = key_owners(blocks, sparse, pattern)
    if implementation == "flex_attention" and not is_exported():
        text_context = flex_blocks(query_blocks, keys, values, owners, blocks.row, pattern)
    else:
        text_context = window_attention(
            query_blocks, keys, values, owners, blocks.row, pattern, implementation, dropout
        )
    # Token by token in memory, as the output projection reads it.
    parts = [x.movedim(0, 2).flatten(0, 1) for x in (global_context, text_context)]
    return torch.cat(parts).transpose(0, 1)


def is_traced() -> bool:
    """Whether the computation is recorded, to be run on other inputs than those at hand."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exported() -> bool:
    """Whether the record is a graph that stands alone, for texts of any length. Nothing in it may depend on the length
    at hand. A compiler looks at the length each time, and compiles again for one that its code does not hold for."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def chunks_pay(query: Tensor, implementation: str, dropout: float) -> bool:
    """Whether to go through the blocks in chunks: on the CPU, where fresh memory is slow and a cache is large.

    A compiler fuses by itself, a trace with Python's part in it cannot be saved, and what dropout dropped cannot be
    computed again.
    """
    return query.device.type == "cpu" and implementation == "sdpa" and not dropout and not is_traced()


def window_attention(
    query: Tensor,
    keys: tuple[Tensor, Tensor, Tensor | None],
    values: tuple[Tensor, Tensor, Tensor | None],
    owners: tuple[Tensor, Tensor, Tensor | None],
    row: Tensor,
    pattern: LSGPattern,
    implementation: str = "sdpa",
    dropout: float = 0.0,
) -> Tensor:
    """The context of the blocks' queries, each block with a window of keys of its own; arguments as of `flex_blocks`."""
    seen = key_windows(Sources(*owners), row, pattern, fill=-1) == row[:, None]  # (1 or H, N, K)
    bias = visibility_bias(seen, query.dtype)[:, :, None]
    if chunks_pay(query, implementation, dropout):
        return ChunkedAttention.apply(pattern, row, query, bias, *keys, *values)
    windows = (key_windows(Sources(*x), row, pattern) for x in (keys, values))
    return ATTENTION_FUNCTIONS[implementation](query, *windows, bias, dropout)


def key_owners(
    blocks: BlockList, sparse: SparseTokens | None, pattern: LSGPattern
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The row that each key is of, -1 for one that is not visible, int32, alike for all heads or not: of the global
    tokens (1 or H, B, G), of the text (1 or H, T), and of the sparse tokens (1 or H, L) or None."""
    row = blocks.row.to(torch.int32)

    def owner(visible: Tensor, tokens_per_block: int) -> Tensor:
        return torch.where(visible.unflatten(1, (-1, tokens_per_block)), row[:, None], -1).flatten(-2)

    of_text, of_sparse = owner(blocks.visible[None], pattern.block_size), None
    if sparse is not None:
        of_sparse = owner(sparse.visible[0], pattern.sparse_per_block)
        of_text = of_text.expand(of_sparse.shape[0], -1)
    of_globals = torch.arange(blocks.num_rows, dtype=torch.int32, device=row.device)[None, :, None]
    return of_globals.expand(of_text.shape[0], -1, pattern.num_global_tokens), of_text, of_sparse


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

    The softmax is put together from parts of a row, so that rows of different lengths need no padding.

    Args:
        query, key: (H, B, G, D) of the global tokens.
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
    # (H, Z, G, I); the other way round the keys would be copied
    text_scores = (text_key @ blocks.spread(query).transpose(-1, -2)).transpose(-1, -2).to(dtype)
    text_scores = text_scores.masked_fill(~blocks.segments(blocks.visible, 0)[:, None], -math.inf)
    with torch.no_grad():  # the softmax does not depend on what is subtracted
        peak = blocks.maximum(scores.amax(-1), text_scores.amax(-1))
    weights = (scores - peak[..., None]).exp()
    text_weights = (text_scores - blocks.spread(peak)[..., None]).exp()
    total = blocks.add(weights.sum(-1), text_weights.sum(-1))
    weights, text_weights = (drop(x, dropout).to(value.dtype) for x in (weights, text_weights))
    context = blocks.add((weights @ value).to(dtype), (text_weights @ text_value).to(dtype))
    return (context / total[..., None]).to(value.dtype)


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
    """LSG attention of a batch of rows; plain full attention when two blocks hold their text.

    Args:
        query, key: (B, H, G + T, D). T is at most two blocks, or a multiple of the block size, which it always is where
            `is_exported`.
        value: (B, H, G + T, E).
        visible: (B, T) bool: which text tokens may be attended to.
        pattern, projections, implementation, dropout: as in `block_attention`.

    Returns:
        The context, (B, H, G + T, E).
    """
    if not is_exported() and visible.shape[1] <= 2 * pattern.block_size:
        seen_by_all = F.pad(visible, (pattern.num_global_tokens, 0), value=True)[:, None, None]  # (B, 1, 1, G + T)
        bias = visibility_bias(seen_by_all, query.dtype)
        return ATTENTION_FUNCTIONS[implementation](query, key, value, bias, dropout)
    blocks = list_blocks(visible, pattern.block_size)
    query, key, value = (blocks.pack(x.transpose(1, 2)).transpose(0, 1) for x in (query, key, value))
    context = block_attention(query, key, value, blocks, pattern, projections, implementation, dropout)
    return blocks.unpack(context.transpose(0, 1)).transpose(1, 2)


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
        for part in ([identity] if is_exported() else identity.split(MAP_COLUMNS, dim=1))
    ]
    return torch.cat(columns, dim=-1)
