"""Batches as one list of blocks: rows of different lengths side by side, without the padding between them.

Dimension key:  B rows of the batch  G global tokens  T text tokens of a padded row  N blocks  W block_size
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockList:
    """The blocks of a batch's text, row after row.

    Args:
        row: (N,) long, which row of the batch each block is of; ascending.
        visible: (N * W,) bool, which text tokens may be attended to.
        num_rows: B.
        row_length: T, tokens of text in a padded row; a multiple of W.
        kept: (N,) long, the place of each block among all B * T / W blocks of the padded batch; None if all are here.
        blank: (N,) bool, which of the blocks that are here `unpack` fills with zeros; None for none.
    """

    row: Tensor
    visible: Tensor
    num_rows: int
    row_length: int
    kept: Tensor | None = None
    blank: Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.visible.shape[0] // self.row.shape[0]

    def to(self, device: torch.device | str) -> "BlockList":
        """The same on another device. Accelerate calls it where a model's layers lie on several."""
        tensors = {f.name: x.to(device) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)

    def first_of_row(self) -> Tensor:
        """For each block the index of the first block of its row, (N,)."""
        return torch.searchsorted(self.row, self.row)

    def segments(self) -> tuple[Tensor, int]:
        """The longest runs of tokens of one row and one length: the row of each, and the length.

        Whole rows if all blocks are here, else the blocks.
        """
        if self.kept is None:
            return torch.arange(self.num_rows, device=self.row.device), self.row_length
        return self.row, self.block_size

    def pack(self, x: Tensor) -> Tensor:
        """List the tokens of rows (B, G + T, ...): all global tokens, then all blocks; (B * G + N * W, ...)."""
        of_globals, of_text = x.tensor_split([x.shape[1] - self.row_length], dim=1)
        of_text = of_text.flatten(0, 1)
        if self.kept is not None:
            of_text = of_text.unflatten(0, (-1, self.block_size))[self.kept].flatten(0, 1)
        return torch.cat([of_globals.flatten(0, 1), of_text])

    def unpack(self, x: Tensor) -> Tensor:
        """The reverse of `pack`, with zeros for the tokens of blocks that are not here, or blank."""
        of_globals, of_text = x.tensor_split([x.shape[0] - self.visible.shape[0]])
        of_blocks = of_text.unflatten(0, (-1, self.block_size))
        if self.kept is not None:
            all_blocks = of_blocks.new_zeros(self.num_rows * self.row_length // self.block_size, *of_blocks.shape[1:])
            of_text = all_blocks.index_copy(0, self.kept, of_blocks).flatten(0, 1)
        elif self.blank is not None:
            is_blank = self.blank.view(-1, *[1] * (of_blocks.ndim - 1))
            of_text = of_blocks.masked_fill(is_blank, 0).flatten(0, 1)
        return torch.cat([part.unflatten(0, (self.num_rows, -1)) for part in (of_globals, of_text)], dim=1)


def list_blocks(visible: Tensor, block_size: int, padding: str = "keep") -> BlockList:
    """List the blocks of a batch.

    Args:
        visible: (B, T) bool, which text tokens may be attended to; T is a multiple of `block_size`.
        block_size: W.
        padding: what becomes of the blocks after a row's last visible token, the first of a row excepted. They are
            treated like the others ("keep"), or left out ("drop"), or only blanked in the end ("blank"), with the
            same result, but in tensors whose sizes do not depend on what is visible.
    """
    num_rows, length = visible.shape
    blocks_per_row = length // block_size
    row = torch.arange(num_rows, device=visible.device).repeat_interleave(blocks_per_row)
    visible_blocks = visible.reshape(-1, block_size)
    if padding == "keep":
        return BlockList(row, visible_blocks.flatten(), num_rows, length)
    last = (visible * torch.arange(1, length + 1, device=visible.device)).amax(1, keepdim=True)
    place = torch.arange(blocks_per_row, device=visible.device) * block_size
    is_padding = ((place >= last) & (place > 0)).flatten()
    if padding == "blank":
        return BlockList(row, visible_blocks.flatten(), num_rows, length, blank=is_padding)
    if not is_padding.any():
        return BlockList(row, visible_blocks.flatten(), num_rows, length)
    kept = is_padding.logical_not().nonzero().squeeze(1)
    return BlockList(row[kept], visible_blocks[kept].flatten(), num_rows, length, kept)
