"""The key windows of blocks: for each block, all keys that its queries see, side by side.

lsg_pattern.py defines how wide the windows are. A window may begin before the first token or end after the last one.
Its places there are called margins. They hold a fill value.

Dimension key:  B rows of the batch  H heads  G global tokens  T text tokens  N blocks  L sparse tokens
                K keys per block
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .lsg_pattern import BlockRange, LSGPattern
from .lsg_tracing import is_exported


class KeyParts(NamedTuple):
    """The tensors that windows are cut from: the keys, their values, or the rows that the keys belong to."""

    globals: Tensor  # (H, B, G, ...)
    text: Tensor  # (H, T, ...)
    sparse: Tensor | None  # (H, L, ...); None without a sparse part

    def ranged(self, pattern: LSGPattern) -> list[tuple[Tensor, BlockRange]]:
        """The sparse and text tokens (H, L or T, ...) in the order of a window, with the range that a block sees."""
        sparse = [(self.sparse, where) for where in pattern.sparse_ranges]
        return [*sparse, (self.text, pattern.text_range)]


def key_windows(parts: KeyParts, row: Tensor, pattern: LSGPattern, fill: float = 0) -> Tensor:
    """The windows of all blocks.

    Args:
        parts: of N blocks.
        row: (N,), which row of the batch each block belongs to.
        pattern: what a block sees.
        fill: the value in the margins.

    Returns:
        (H, N, K, ...): the global tokens of the block's row, the sparse tokens on the left and on the right, and the
        text of the block and its neighbours.
    """
    windows = [parts.globals[:, row]]
    for tokens, where in parts.ranged(pattern):
        windows.append(cut_windows(with_margins(tokens, where, fill), where, row.shape[0]))
    return torch.cat(windows, dim=2)


def with_margins(tokens: Tensor, where: BlockRange, fill: float = 0) -> Tensor:
    """The tokens in the ranges of N blocks, with margins: (H, N * step, ...) -> (H, size + (N - 1) * step, ...).

    The function does not use the number of blocks, so it is right in a graph for any number of blocks.
    """
    beyond = where.end - where.step  # how far the last block's range reaches past the last token
    margins = max(-where.start, 0), max(beyond, 0)
    padded = F.pad(tokens, [0, 0] * (tokens.ndim - 2) + [*margins], value=fill)
    return padded[:, max(where.start, 0) : padded.shape[1] + min(beyond, 0)]


def cut_windows(strip: Tensor, where: BlockRange, num_blocks: int) -> Tensor:
    """Cut a strip (H, size + (N - 1) * step, ...) into windows, one for each block: (H, N, size, ...)."""
    if is_exported():  # not all exporters know how to unfold a dimension of any length
        first = torch.arange(num_blocks, device=strip.device)[:, None] * where.step
        return strip[:, first + torch.arange(where.size, device=strip.device)]
    return strip.unfold(1, where.size, where.step).movedim(-1, 2)


def add_windows(strip: Tensor, windows: Tensor, where: BlockRange) -> None:
    """Add windows (H, N, size, ...), in place, to the strip that they were cut from: the gradient of `cut_windows`."""
    for start in range(0, where.size, where.step):  # pieces of one step do not overlap; whole windows do
        piece = windows[:, :, start : start + where.step]
        places = strip[:, start:].unfold(1, piece.shape[2], where.step).movedim(-1, 2)
        places[:, : windows.shape[1]] += piece
