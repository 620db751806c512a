"""The geometry of LSG attention: which keys a query sees. All sizes count tokens.

Source: Condevaux and Harispe, "LSG Attention: Extrapolation of pretrained Transformers to long sequences",
arXiv 2210.15497.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

SPARSITY_TYPES = ("norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none")  # see lsg_sparsity.py


class BlockRange(NamedTuple):
    """For each block n, the tokens from `start + n * step` up to, but not including, `end + n * step`."""

    start: int
    end: int
    step: int

    @property
    def size(self) -> int:
        return self.end - self.start

    def shifted(self, num_blocks: int) -> "BlockRange":
        """The same ranges, with the blocks counted from block `num_blocks` on."""
        offset = num_blocks * self.step
        return BlockRange(self.start + offset, self.end + offset, self.step)

    def columns(self, begin: int, end: int) -> "BlockRange":
        """The places from `begin` up to, but not including, `end` in each range; none if `end` is below `begin`."""
        return BlockRange(self.start + begin, self.start + max(begin, end), self.step)

    def contains(self, token: Any, block: Any) -> Any:
        """Whether a token is in the range of a block; both arguments are integers or integer tensors."""
        place = token - block * self.step
        return (place >= self.start) & (place < self.end)


@dataclass(frozen=True)
class LSGPattern:
    """Which keys a query sees. All fields except `neighbours` are fields of `LSGAlbertConfig`. All sizes count tokens.

    A text is cut into blocks. The sparse tokens that stand for a block are its image. A query sees all global tokens,
    the text of its own block and of the neighbouring blocks (`text_range`), and the sparse tokens before and after the
    image of this text (`sparse_ranges`), if there are any. Global tokens see all tokens, and all tokens see them.

    Args:
        num_global_tokens: global tokens before the text, at least 1.
        block_size: tokens per block of the text, at least 1.
        sparsity_type: a name in `SPARSITY_TYPES`; None or "none" for no sparse part.
        sparse_block_size: sparse tokens that a query sees on each side, at least 1 if there is a sparse part. "norm" and
            "lsh" cut the text into chunks of this size if it is below `block_size`. It must then divide `block_size`
            and be a multiple of `sparsity_factor`.
        sparsity_factor: tokens that one sparse token stands for; divides `block_size`.
        lsh_num_pre_rounds: hashing rounds of "lsh" before the last one.
        neighbours: blocks that a query sees on each side of its own, at least 1.

    Raises:
        ValueError: a size is impossible; the message names the field, the value and a remedy.
    """

    num_global_tokens: int
    block_size: int
    sparsity_type: str | None = None
    sparse_block_size: int = 0
    sparsity_factor: int = 1
    lsh_num_pre_rounds: int = 0
    neighbours: int = 1

    def __post_init__(self) -> None:
        if self.sparsity_type == "none":  # the name that a configuration has for it
            object.__setattr__(self, "sparsity_type", None)
        lowest = {"num_global_tokens": 1, "block_size": 1, "lsh_num_pre_rounds": 0, "neighbours": 1}
        if self.sparsity_type is not None:
            lowest |= {"sparse_block_size": 1, "sparsity_factor": 1}
        for name, limit in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < limit:
                raise ValueError(f"`{name}` must be an integer of at least {limit}, got {value!r}.")
        if self.sparsity_type is None:
            return
        block, window, factor = self.block_size, self.sparse_block_size, self.sparsity_factor
        if block % factor != 0:
            raise ValueError(
                f"`block_size` ({block}) must be divisible by `sparsity_factor` ({factor}); 1, 2, 4, ... up to "
                "`block_size` work when `block_size` is a power of two."
            )
        has_chunks = self.sparsity_type in ("norm", "lsh") and factor > 1 and window < block
        if has_chunks and (block % window != 0 or window % factor != 0):
            raise ValueError(
                f'`sparse_block_size` ({window}) is below `block_size` ({block}): with `sparsity_type="'
                f'{self.sparsity_type}"` it must then divide `block_size` and be a multiple of `sparsity_factor` '
                f'({factor}). Choose such a size, a size of at least `block_size`, or `sparsity_type="pooling"`.'
            )

    @classmethod
    def from_config(cls, config: Any) -> "LSGPattern":
        """The pattern of a model with this `LSGAlbertConfig`."""
        sizes = {"num_global_tokens": config.num_global_tokens, "block_size": config.block_size}
        if not config.is_sparse:
            return cls(**sizes)
        return cls(
            **sizes,
            sparsity_type=config.sparsity_type,
            sparse_block_size=config.sparse_block_size,
            sparsity_factor=config.sparsity_factor,
            lsh_num_pre_rounds=config.lsh_num_pre_rounds,
        )

    @property
    def text_range(self) -> BlockRange:
        """The text tokens that a block's queries see: the tokens of the block and of its neighbours."""
        return BlockRange(-self.neighbours * self.block_size, (self.neighbours + 1) * self.block_size, self.block_size)

    @property
    def sparse_ranges(self) -> tuple[BlockRange, ...]:
        """The sparse tokens that a block's queries see, left and right of the image of `text_range`.

        The tuple is empty without a sparse part.
        """
        if self.sparsity_type is None:
            return ()
        step, size = self.sparse_per_block, self.sparse_block_size
        left, right = -self.neighbours * step, (self.neighbours + 1) * step
        return BlockRange(left - size, left, step), BlockRange(right, right + size, step)

    @property
    def num_keys(self) -> int:
        """The number of keys that a query of the text sees if none of its ranges reaches past the text."""
        return self.num_global_tokens + sum(where.size for where in (self.text_range, *self.sparse_ranges))

    @property
    def full_length(self) -> int:
        """The length of the longest text in which every token sees every other by `text_range` alone."""
        return (self.neighbours + 1) * self.block_size

    @property
    def sparse_per_block(self) -> int:
        """The number of sparse tokens that stand for one block."""
        return self.block_size // self.sparsity_factor

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk of "norm" and "lsh"."""
        return min(self.block_size, self.sparse_block_size)

    @property
    def hash_rounds(self) -> tuple[int, ...]:
        """Buckets per chunk in each round of hashing; empty when nothing is hashed."""
        if self.sparsity_type != "lsh" or self.sparsity_factor in (1, self.sparse_block_size):
            return ()
        return (self.chunk_size,) * self.lsh_num_pre_rounds + (self.chunk_size // self.sparsity_factor,)
