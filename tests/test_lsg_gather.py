"""Key windows: each holds the slices that its pattern names, whole or in chunks, and gradients go back to them."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lsg_albert.lsg_cpu import Chunk
from lsg_albert.lsg_gather import KeyParts, key_windows
from lsg_albert.lsg_pattern import LSGPattern


@st.composite
def cut_parts(draw):
    """A pattern, parts in which every token is its own number, and a chunk with some of the columns of its windows."""
    num_blocks, step, factor, size = (draw(st.integers(1, most)) for most in (6, 4, 3, 9))
    block, is_sparse = step * factor, draw(st.booleans())
    pattern = LSGPattern(1, block, "stride" if is_sparse else None, size, factor, neighbours=draw(st.integers(1, 2)))
    text = torch.arange(1, num_blocks * block + 1)[None]
    sparse = 1000 + torch.arange(1, num_blocks * step + 1)[None] if is_sparse else None
    parts = KeyParts(torch.tensor([[[-5], [-6]]]), text, sparse)
    row = torch.arange(num_blocks) // 3
    first = draw(st.integers(0, num_blocks - 1))
    blocks = slice(first, draw(st.integers(first + 1, num_blocks)))
    ranges = [where for _, where in parts.ranged(pattern)]
    columns = [tuple(sorted(draw(st.tuples(*[st.integers(0, where.size)] * 2)))) for where in ranges]
    seen = [where.shifted(first).columns(*limits) for where, limits in zip(ranges, columns, strict=True)]
    return pattern, parts, row, Chunk(blocks, row[blocks], seen, torch.empty(0)), columns


def within(x, start, stop):
    """Tokens from `start` to `stop`, 0 beyond the ends."""
    return [x[0, j].item() if 0 <= j < x.shape[1] else 0 for j in range(start, stop)]


@settings(max_examples=150, deadline=None)
@given(cut_parts())
def test_windows_hold_the_slices_they_name(case):
    pattern, parts, row, chunk, columns = case
    whole, windows = key_windows(parts, row, pattern), chunk.windows(parts, pattern)
    block, step, size, n = pattern.block_size, pattern.sparse_per_block, pattern.sparse_block_size, pattern.neighbours
    for i in range(len(row)):
        of_globals = [-5 if i < 3 else -6]
        expected = [within(parts.text, (i - n) * block, (i + n + 1) * block)]
        if parts.sparse is not None:
            left = within(parts.sparse, (i - n) * step - size, (i - n) * step)
            right = within(parts.sparse, (i + n + 1) * step, (i + n + 1) * step + size)
            expected = [left, right, *expected]
        assert whole[0, i].tolist() == sum(expected, of_globals)
        if chunk.blocks.start <= i < chunk.blocks.stop:
            seen = [part[begin:end] for part, (begin, end) in zip(expected, columns, strict=True)]
            assert windows[0, i - chunk.blocks.start].tolist() == sum(seen, of_globals)


@settings(max_examples=100, deadline=None)
@given(cut_parts())
def test_adding_windows_is_the_gradient_of_cutting_them(case):
    pattern, parts, _, chunk, _ = case
    leaves = KeyParts(*(None if x is None else x.double()[..., None].requires_grad_() for x in parts))
    windows = chunk.windows(leaves, pattern)
    gradient = torch.randn_like(windows)
    given_parts = [x for x in leaves if x is not None]
    expected = torch.autograd.grad(windows, given_parts, gradient, allow_unused=True, materialize_grads=True)
    total = KeyParts(*(None if x is None else torch.ones_like(x) for x in leaves))
    chunk.add_windows(total, gradient, pattern)
    for ours, theirs in zip((x for x in total if x is not None), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs + 1)
