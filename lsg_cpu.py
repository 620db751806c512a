"""Block attention on the CPU, a few blocks at a time, so that their key windows stay in the processor's cache.

The result is that of `window_attention` with `sdpa_attention`. The windows of all blocks at once would need fresh
memory, which is slow on a CPU.

Dimension key:  as in lsg_gather.py, and  W block_size  D head_dim  E value width
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .lsg_gather import KeyParts, add_windows, cut_windows
from .lsg_pattern import BlockRange, LSGPattern
from .lsg_softmax import attention_gradients, sdpa_attention
from .lsg_tracing import is_traced

CHUNK_BYTES = 2**21  # approximate number of bytes of keys that are copied into windows at a time


def can_chunk(query: Tensor, implementation: str, dropout: float) -> bool:
    """Whether to process the blocks in chunks: on the CPU, with the fused kernel, without dropout or tracing.

    A compiler fuses the steps itself. A trace that contains a Python function cannot be saved. With dropout, the
    backward pass could not know which weights were dropped.
    """
    return query.device.type == "cpu" and implementation == "sdpa" and not dropout and not is_traced()


class ChunkedAttention(torch.autograd.Function):
    """`sdpa_attention` of all blocks to their windows.

    Args:
        pattern: what a block sees.
        row: (N,), which row of the batch each block belongs to.
        query: (H, N, W, D).
        bias: (1 or H, N, 1, K), the bias of each block's window.
        parts: the three `KeyParts` of the keys, then those of the values.

    Returns:
        (H, N, W, E). The backward pass cuts the windows and computes the attention a second time.
    """

    @staticmethod
    def forward(
        ctx: Any, pattern: LSGPattern, row: Tensor, query: Tensor, bias: Tensor, *parts: Tensor | None
    ) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(row, query, bias, *parts)
        keys, values = KeyParts(*parts[:3]), KeyParts(*parts[3:])
        num_heads, num_blocks, block_size, _ = query.shape
        width = values.text.shape[-1]
        context = query.new_empty(num_blocks, block_size, num_heads, width).movedim(2, 0)
        for chunk in chunks_of_blocks(query, row, bias, keys, pattern):
            key, value = chunk.windows(keys, pattern), chunk.windows(values, pattern)
            context[:, chunk.blocks] = sdpa_attention(query[:, chunk.blocks], key, value, chunk.bias)
        return context

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_context: Tensor) -> tuple[Tensor | None, ...]:
        pattern, (row, query, bias, *parts) = ctx.pattern, ctx.saved_tensors
        keys, values = KeyParts(*parts[:3]), KeyParts(*parts[3:])
        grad_query, grad_keys, grad_values = torch.empty_like(query), zeros_like(keys), zeros_like(values)
        for chunk in chunks_of_blocks(query, row, bias, keys, pattern):
            key, value = chunk.windows(keys, pattern), chunk.windows(values, pattern)
            grad_query[:, chunk.blocks], grad_key, grad_value = attention_gradients(
                query[:, chunk.blocks], key, value, chunk.bias, grad_context[:, chunk.blocks]
            )
            chunk.add_windows(grad_keys, grad_key, pattern)
            chunk.add_windows(grad_values, grad_value, pattern)
        return None, None, grad_query, None, *grad_keys, *grad_values


def zeros_like(parts: KeyParts) -> KeyParts:
    return KeyParts(*(None if x is None else torch.zeros_like(x) for x in parts))


class Chunk(NamedTuple):
    """Some consecutive blocks, and the keys that at least one of their queries sees.

    Args:
        blocks: which blocks.
        row: (blocks,), which row of the batch each belongs to.
        ranges: the ranges of `KeyParts.ranged` for the first block, without the columns that no query sees.
        bias: (1 or H, blocks, 1, K seen), the bias of each block's window.
    """

    blocks: slice
    row: Tensor
    ranges: list[BlockRange]
    bias: Tensor

    def seen(self, parts: KeyParts, pattern: LSGPattern) -> list["Strip"]:
        """The strips of sparse and text tokens that the blocks see; empty ones are left out."""
        tokens_of_parts = [tokens for tokens, _ in parts.ranged(pattern)]
        pairs = zip(tokens_of_parts, self.ranges, strict=True)
        return [Strip(tokens, where, self.row.shape[0]) for tokens, where in pairs if where.size > 0]

    def windows(self, parts: KeyParts, pattern: LSGPattern) -> Tensor:
        """As `key_windows`, but only for the chunk's blocks and the keys that they see: (H, blocks, K seen, ...)."""
        windows = [parts.globals[:, self.row]]
        for strip in self.seen(parts, pattern):
            windows.append(cut_windows(strip.padded(), strip.where, strip.num_blocks))
        return torch.cat(windows, dim=2)

    def add_windows(self, total: KeyParts, windows: Tensor, pattern: LSGPattern) -> None:
        """Add windows, in place, to the parts that they were cut from: the gradient of `windows`."""
        strips = self.seen(total, pattern)
        sizes = [total.globals.shape[2], *(strip.where.size for strip in strips)]
        global_windows, *strip_windows = windows.split(sizes, dim=2)
        total.globals.index_add_(1, self.row, global_windows)
        for strip, gradient in zip(strips, strip_windows, strict=True):
            padded, inside = strip.padded(), strip.inside()
            add_windows(padded, gradient, strip.where)
            if padded.shape != inside.shape:  # `padded` is a copy, with margins
                inside.copy_(padded.narrow(1, strip.margins()[0], inside.shape[1]))


class Strip(NamedTuple):
    """The stretch of `tokens` (H, T or L, ...) that the ranges of `num_blocks` consecutive blocks cover."""

    tokens: Tensor
    where: BlockRange
    num_blocks: int

    @property
    def end(self) -> int:
        return self.where.end + (self.num_blocks - 1) * self.where.step

    def margins(self) -> tuple[int, int]:
        """The number of places before the first token, and after the last one."""
        start, length = self.where.start, self.tokens.shape[1]
        return len(range(start, min(self.end, 0))), len(range(max(start, length), self.end))

    def inside(self) -> Tensor:
        """The tokens without the margins; a view."""
        return self.tokens[:, max(self.where.start, 0) : max(self.end, 0)]

    def padded(self) -> Tensor:
        """The tokens with zeros in the margins; a view if there are no margins."""
        inside, margins = self.inside(), self.margins()
        return F.pad(inside, [0, 0] * (inside.ndim - 2) + [*margins]) if any(margins) else inside


def chunks_of_blocks(query: Tensor, row: Tensor, bias: Tensor, keys: KeyParts, pattern: LSGPattern) -> Iterator[Chunk]:
    """The chunks, one after another; arguments as in `ChunkedAttention`.

    The first and last blocks of a row do not see their whole windows: the rest is margins or another row's text.
    """
    ranges = [where for _, where in keys.ranged(pattern)]
    sizes = [where.size for where in ranges]
    global_bias, *biases = bias.split([bias.shape[-1] - sum(sizes), *sizes], dim=-1)
    seen = [seen_columns(part) for part in biases]
    num_heads, num_blocks, _, width = query.shape
    count = max(1, CHUNK_BYTES // (num_heads * bias.shape[-1] * width * query.element_size()))
    for first in range(0, num_blocks, count):
        blocks = slice(first, min(first + count, num_blocks))
        columns = [(min(begins[blocks]), max(ends[blocks])) for begins, ends in seen]
        seen_biases = [part[:, blocks, :, begin:end] for part, (begin, end) in zip(biases, columns, strict=True)]
        shifted = [where.shifted(first) for where in ranges]
        yield Chunk(
            blocks,
            row[blocks],
            [where.columns(begin, end) for where, (begin, end) in zip(shifted, columns, strict=True)],
            torch.cat([global_bias[:, blocks], *seen_biases], dim=-1),
        )


def seen_columns(bias: Tensor) -> tuple[list[int], list[int]]:
    """For each block, the first column of its window that any head sees, and the column after the last one.

    `bias` is (1 or H, N, 1, K), 0 for a key that is seen. A block that sees no column has K and 0.
    """
    size = bias.shape[-1]
    column = torch.arange(size, device=bias.device)
    seen = (bias == 0).any(0)[:, 0]
    return column.where(seen, size).amin(-1).tolist(), (column + 1).where(seen, 0).amax(-1).tolist()
