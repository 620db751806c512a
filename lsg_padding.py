"""A batch as one list of blocks: one row's blocks follow those of the row before, and blocks of padding are left out.

Three things look like padding. Each has its own word, and no query attends to any of them:
  padding    tokens with 0 in the caller's `attention_mask`. Whole blocks of it at the end of a row are left out here.
  alignment  tokens that the encoder appends so that the last block is whole (`LSGAlbertEncoder.alignment`).
  margins    places of a key window that lie before the first token or after the last (lsg_gather.py).

Dimension key:  B rows of the batch  G global tokens  T text tokens of a row  N blocks  W block_size  H heads
                Z segments  I tokens of a segment
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockList:
    """The blocks of a batch's text, row after row.

    Args:
        row: (N,) long, which row of the batch each block belongs to; ascending.
        visible: (N * W,) bool, which text tokens may be attended to.
        num_rows: B.
        row_length: T, tokens of text in a padded row; a multiple of W.
        block_size: W.
        kept: (N,) long, the index of each block among all B * T / W blocks of the padded batch; None if all are kept.
        blank: (N,) bool, which of the listed blocks `unpack` fills with zeros; None if it fills no block.
    """

    row: Tensor
    visible: Tensor
    num_rows: int
    row_length: int
    block_size: int
    kept: Tensor | None = None
    blank: Tensor | None = None

    def to(self, device: torch.device | str) -> "BlockList":
        """The same list on another device. Accelerate calls this if a model's layers are on several devices."""
        tensors = {f.name: x.to(device) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)

    def first_of_row(self) -> Tensor:
        """For each block, the index of the first block of its row, (N,)."""
        if self.kept is None:
            return self.row * (self.row_length // self.block_size)
        return torch.searchsorted(self.row, self.row)  # `row` is sorted, so this is where each value begins

    def segments(self, x: Tensor, dim: int) -> Tensor:
        """Split the dimension of text tokens into Z segments of I tokens, each of one row.

        The segments are whole rows if no block is left out, and single blocks otherwise.
        """
        shape = (self.num_rows, self.row_length) if self.kept is None else (self.row.shape[0], self.block_size)
        return x.unflatten(dim, shape)

    def spread(self, x: Tensor) -> Tensor:
        """Repeat each row's value for all of its segments: (H, B, ...) -> (H, Z, ...)."""
        return x if self.kept is None else x[:, self.row]

    def add(self, total: Tensor, x: Tensor) -> Tensor:
        """Add each segment's value `x` (H, Z, ...) to its row's `total` (H, B, ...)."""
        return total + x if self.kept is None else total.index_add(1, self.row, x)

    def maximum(self, peak: Tensor, x: Tensor) -> Tensor:
        """The maximum of each row's `peak` (H, B, G) and the values `x` (H, Z, G) of its segments."""
        if self.kept is None:
            return torch.maximum(peak, x)
        return peak.scatter_reduce(1, self.row[None, :, None].expand_as(x), x, "amax")

    def pack(self, x: Tensor) -> Tensor:
        """List all global tokens, then all blocks: rows (B, G + T, ...) -> tokens (B * G + N * W, ...)."""
        num_globals = x.shape[1] - self.row_length
        globals_, text = x[:, :num_globals], x[:, num_globals:].flatten(0, 1)
        if self.kept is not None:
            text = text.unflatten(0, (-1, self.block_size))[self.kept].flatten(0, 1)
        return torch.cat([globals_.flatten(0, 1), text])

    def unpack(self, x: Tensor) -> Tensor:
        """The reverse of `pack`, with zeros for the tokens of blocks that are left out or blank."""
        num_globals = x.shape[0] - self.visible.shape[0]
        globals_, text = x[:num_globals], x[num_globals:]
        blocks = text.unflatten(0, (-1, self.block_size))
        if self.kept is not None:
            all_blocks = blocks.new_zeros(self.num_rows * self.row_length // self.block_size, *blocks.shape[1:])
            text = all_blocks.index_copy(0, self.kept, blocks).flatten(0, 1)
        elif self.blank is not None:
            is_blank = self.blank.view(-1, *[1] * (blocks.ndim - 1))
            text = blocks.masked_fill(is_blank, 0).flatten(0, 1)
        return torch.cat([part.unflatten(0, (self.num_rows, -1)) for part in (globals_, text)], dim=1)


def list_blocks(visible: Tensor, block_size: int, padding: str = "keep") -> BlockList:
    """List the blocks of a batch.

    Args:
        visible: (B, T) bool, which text tokens may be attended to; T is a multiple of `block_size`.
        block_size: W.
        padding: what to do with the blocks after a row's last visible token. "keep" treats them like all others.
            "drop" leaves them out. "blank" lists them, and `unpack` fills them with zeros: the result is that of
            "drop", but the sizes of tensors do not depend on `visible`. The first block of a row is always kept.
    """
    num_rows, length = visible.shape
    blocks_per_row = length // block_size
    block = torch.arange(num_rows * blocks_per_row, device=visible.device)
    row = block // blocks_per_row
    sizes = num_rows, length, block_size
    if padding == "keep":
        return BlockList(row, visible.flatten(), *sizes)
    text_end = (visible * torch.arange(1, length + 1, device=visible.device)).amax(1)  # (B,), behind the last token
    block_start = (block - row * blocks_per_row) * block_size
    is_padding = (block_start >= text_end[row]) & (block_start > 0)
    if padding == "blank":
        return BlockList(row, visible.flatten(), *sizes, blank=is_padding)
    if not is_padding.any():
        return BlockList(row, visible.flatten(), *sizes)
    kept = is_padding.logical_not().nonzero().squeeze(1)
    return BlockList(row[kept], visible.reshape(-1, block_size)[kept].flatten(), *sizes, kept)
