"""LSG attention by torch's FlexAttention: keys are read where they lie, and no window is ever put together.

All keys stand in one list, [global | sparse | text]; a mask says which of them a query sees, and a coarser one, of
tiles, lets the kernel pass over the rest, so that time stays linear in the length. Source of the kernel: Dong et al.,
"Flex Attention: A Programming Model for Generating Optimized Attention Kernels", arXiv 2412.05496.

Dimension key:  B rows of the batch  H heads  G global tokens  N blocks  W block_size  T = N * W text tokens
                L sparse tokens  D head_dim  E value width  R = B * G + L + T keys
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .lsg_sparsity import LSGPattern

TILE = 128  # queries and keys of one tile, torch's own default


def flex_blocks(
    query: Tensor,
    keys: tuple[Tensor, Tensor, Tensor | None],
    values: tuple[Tensor, Tensor, Tensor | None],
    owners: tuple[Tensor, Tensor, Tensor | None],
    row: Tensor,
    pattern: LSGPattern,
) -> Tensor:
    """The context of the blocks' queries.

    Args:
        query: (H, N, W, D).
        keys: of the global tokens (H, B, G, D), of the text (H, T, D), and the sparse ones (H, L, D) or None.
        values: the same with E in the place of D.
        owners: the row that each of these is of, -1 for what is not visible; (1 or H, ...) without the last dimension.
        row: (N,), which row each block is of.
        pattern: the sizes.

    Returns:
        (H, N, W, E).

    Raises:
        ValueError: gradients are asked for on the CPU, where torch has the forward pass only.
    """
    key, value, owner = (list_keys(*x) for x in (keys, values, owners))
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.device.type == "cpu" and needs_grad:
        raise ValueError(
            '`attn_implementation="flex_attention"` has no backward pass on the CPU: train with "sdpa", or run '
            "inference under `torch.no_grad()`."
        )
    num_globals, num_text = keys[0].shape[1] * keys[0].shape[2], keys[1].shape[1]
    sees = mask_of_keys(owner, row, num_globals, key.shape[1] - num_text, pattern)
    tiles = tiles_of_keys(row, num_globals, key.shape[1] - num_text, key.shape[1], pattern)
    mask = BlockMask.from_kv_blocks(*tiles, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(num_text, key.shape[1]))
    attend = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention(query.device.type)
    context = attend(query.flatten(1, 2)[None], key[None], value[None], block_mask=mask)
    return context[0].unflatten(1, query.shape[1:3])


def check_no_dropout(dropout: float) -> None:
    """`ValueError` where attention weights are to be dropped."""
    if dropout:
        raise ValueError(
            f'`attention_probs_dropout_prob` is {dropout}: `attn_implementation="flex_attention"` has no dropout of '
            'attention weights. Set it to 0, or use "sdpa".'
        )


@cache
def compiled_flex_attention(device_type: str) -> Callable[..., Tensor]:
    """FlexAttention is fast when compiled only; compiled at its first use, and for other lengths again.

    On the CPU for every length: torch 2.13 writes code there that is no C++ for a mask of variable length.
    """
    return torch.compile(flex_attention, dynamic=False if device_type == "cpu" else None)


def list_keys(of_globals: Tensor, of_text: Tensor, of_sparse: Tensor | None) -> Tensor:
    """(H, B, G, ...), (H, T, ...) and (H, L, ...) as one list (H, R, ...): [global | sparse | text]."""
    parts = (
        [of_globals.flatten(1, 2), of_text] if of_sparse is None else [of_globals.flatten(1, 2), of_sparse, of_text]
    )
    return torch.cat(parts, dim=1)


def mask_of_keys(
    owner: Tensor, row: Tensor, first_sparse: int, first_text: int, pattern: LSGPattern
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask in FlexAttention's form: whether query `q` of head `h` sees key `k`.

    Args:
        owner: (1 or H, R), the row each key is of, -1 for what is not visible.
        row: (N,), which row each block is of.
        first_sparse, first_text: where in the list of keys the sparse ones and the text begin.
        pattern: the sizes.
    """
    block_size, is_per_head = pattern.block_size, owner.shape[0] > 1
    is_sparse = first_text > first_sparse
    step = pattern.sparse_per_block if is_sparse else 0
    size = pattern.sparse_block_size

    def sees(_: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        block = q // block_size
        token = k - first_text
        seen = (k < first_sparse) | ((k >= first_text) & (abs_difference(token // block_size, block) <= 1))
        if is_sparse:
            place = k - first_sparse - block * step  # from the first sparse token that stands for the query's block
            is_left, is_right = (
                (place >= -step - size) & (place < -step),
                (place >= 2 * step) & (place < 2 * step + size),
            )
            seen = seen | ((k >= first_sparse) & (k < first_text) & (is_left | is_right))
        return seen & (owner[h if is_per_head else 0, k] == row[block])

    return sees


def abs_difference(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > b, a - b, b - a)


def tiles_of_keys(
    row: Tensor, first_sparse: int, first_text: int, num_keys: int, pattern: LSGPattern
) -> tuple[Tensor, Tensor]:
    """For each tile of queries, how many tiles of keys it may see any of, (1, 1, tiles), and first of all their
    indices, (1, 1, tiles, tiles of keys); both int32."""
    device, num_text = row.device, num_keys - first_text
    starts = torch.arange(0, num_text, TILE, device=device)
    first = starts // pattern.block_size  # first and last block of the queries in a tile
    last = (starts + TILE).clamp(max=num_text).sub(1) // pattern.block_size
    num_globals = pattern.num_global_tokens
    ranges = [(row[first] * num_globals, (row[last] + 1) * num_globals)]
    text = first_text + (first - 1) * pattern.block_size, first_text + (last + 2) * pattern.block_size
    ranges.append((text[0].clamp(min=first_text), text[1]))
    if first_text > first_sparse:
        step, size = pattern.sparse_per_block, pattern.sparse_block_size
        for begin, end in ((-step - size, -step), (2 * step, 2 * step + size)):
            limits = first_sparse + first * step + begin, first_sparse + last * step + end
            ranges.append(tuple(limit.clamp(first_sparse, first_text) for limit in limits))
    tile = torch.arange(0, num_keys, TILE, device=device)
    touched = torch.zeros(len(starts), len(tile), dtype=torch.bool, device=device)
    for begin, end in ranges:
        touched |= (begin[:, None] < tile + TILE) & (end[:, None] > tile) & (begin < end)[:, None]
    indices = touched.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return touched.sum(1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]
