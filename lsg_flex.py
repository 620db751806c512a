"""LSG attention with torch's FlexAttention. It reads keys in place, so no key windows are built.

All keys are in one list, [global | sparse | text]. A mask says which keys a query sees. A coarser mask, of tiles, lets
the kernel skip the other keys, so that time stays linear in the length. The kernel is described in Dong et al., "Flex
Attention: A Programming Model for Generating Optimized Attention Kernels", arXiv 2412.05496.

Dimension key:  B rows of the batch  H heads  G global tokens  N blocks  W block_size  T = N * W text tokens
                L sparse tokens  D head_dim  E value width  R = B * G + L + T keys
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from .lsg_gather import KeyParts
from .lsg_pattern import LSGPattern

TILE = 128  # queries and keys of one tile, torch's own default


def flex_attention_of_blocks(
    query: Tensor,
    keys: KeyParts,
    values: KeyParts,
    owners: KeyParts,
    row: Tensor,
    pattern: LSGPattern,
) -> Tensor:
    """The context of the blocks' queries; arguments and result as in `window_attention`.

    Raises:
        ValueError: gradients are needed on the CPU, where torch has only the forward pass.
    """
    key, value, owner = list_keys(keys), list_keys(values), list_keys(owners)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if query.device.type == "cpu" and needs_grad:
        raise ValueError(
            '`attn_implementation="flex_attention"` has no backward pass on the CPU: train with "sdpa", or run '
            "inference under `torch.no_grad()`."
        )
    num_globals, num_text = keys.globals.shape[1] * keys.globals.shape[2], keys.text.shape[1]
    sees = mask_of_keys(owner, row, num_globals, key.shape[1] - num_text, pattern)
    tiles = tiles_of_keys(row, num_globals, key.shape[1] - num_text, key.shape[1], pattern)
    mask = BlockMask.from_kv_blocks(*tiles, BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(num_text, key.shape[1]))
    attend = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention(query.device.type)
    context = attend(query.flatten(1, 2)[None], key[None], value[None], block_mask=mask)
    return context[0].unflatten(1, query.shape[1:3])


def check_no_dropout(dropout: float) -> None:
    """Raise `ValueError` if attention weights are to be dropped, which FlexAttention cannot do."""
    if dropout:
        raise ValueError(
            f'`attention_probs_dropout_prob` is {dropout}: `attn_implementation="flex_attention"` has no dropout of '
            'attention weights. Set it to 0, or use "sdpa".'
        )


@cache
def compiled_flex_attention(device_type: str) -> Callable[..., Tensor]:
    """FlexAttention, compiled at its first use, and again for other lengths. It is fast only if it is compiled.

    On the CPU it is compiled for every single length: for masks of variable length, torch 2.13 writes invalid C++.
    """
    return torch.compile(flex_attention, dynamic=False if device_type == "cpu" else None)


def list_keys(parts: KeyParts) -> Tensor:
    """All keys as one list [global | sparse | text], (H, R, ...)."""
    sparse = [] if parts.sparse is None else [parts.sparse]
    return torch.cat([parts.globals.flatten(1, 2), *sparse, parts.text], dim=1)


def mask_of_keys(
    owner: Tensor, row: Tensor, first_sparse: int, first_text: int, pattern: LSGPattern
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask in FlexAttention's form: whether query `q` of head `h` sees key `k`.

    Args:
        owner: (1 or H, R), the row that each key belongs to, or -1 if the key is not visible.
        row: (N,), which row of the batch each block belongs to.
        first_sparse, first_text: the indices at which sparse keys and text keys begin in the list of keys.
        pattern: what a block sees.
    """
    is_per_head = owner.shape[0] > 1

    def sees(_: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        block = q // pattern.block_size
        seen = (k < first_sparse) | ((k >= first_text) & pattern.text_range.contains(k - first_text, block))
        for where in pattern.sparse_ranges:
            is_sparse = (k >= first_sparse) & (k < first_text)
            seen = seen | (is_sparse & where.contains(k - first_sparse, block))
        return seen & (owner[h if is_per_head else 0, k] == row[block])

    return sees


def tiles_of_keys(
    row: Tensor, first_sparse: int, first_text: int, num_keys: int, pattern: LSGPattern
) -> tuple[Tensor, Tensor]:
    """For each tile of queries, the tiles of keys that hold any key it may see.

    Returns:
        The number of such tiles, (1, 1, tiles), and the indices of all tiles of keys, these tiles first,
        (1, 1, tiles, tiles of keys); both int32.
    """
    device, num_text = row.device, num_keys - first_text
    starts = torch.arange(0, num_text, TILE, device=device)
    first = starts // pattern.block_size  # first and last block of the queries in a tile
    last = (starts + TILE).clamp(max=num_text).sub(1) // pattern.block_size
    num_globals = pattern.num_global_tokens
    limits = [(row[first] * num_globals, (row[last] + 1) * num_globals)]
    ranges = [(first_sparse, first_text, where) for where in pattern.sparse_ranges]
    for begin, end, where in [*ranges, (first_text, num_keys, pattern.text_range)]:
        seen = begin + first * where.step + where.start, begin + last * where.step + where.end
        limits.append(tuple(place.clamp(begin, end) for place in seen))
    tile = torch.arange(0, num_keys, TILE, device=device)
    touched = torch.zeros(len(starts), len(tile), dtype=torch.bool, device=device)
    for begin, end in limits:
        touched |= (begin[:, None] < tile + TILE) & (end[:, None] > tile) & (begin < end)[:, None]
    indices = touched.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return touched.sum(1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]
