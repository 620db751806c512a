"""LSG attention against a dense float64 oracle that was written from its definition alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import lsg_albert
from lsg_albert import lsg_cpu
from lsg_albert.lsg_functional import lsg_attention, lsg_attention_map
from lsg_albert.lsg_pattern import SPARSITY_TYPES, LSGPattern
from lsg_albert.lsg_softmax import attention_gradients, eager_attention, sdpa_attention, visibility_bias
from lsg_albert.lsg_sparsity import hash_projections
from oracle import oracle_attention

FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}
IMPLEMENTATIONS = ["eager", "sdpa"]  # "flex_attention" has tests of its own
TYPES = [None if name == "none" else name for name in SPARSITY_TYPES]


def is_legal(sparsity_type, block, window, factor):
    """The rule NORM_CHUNK of the specification: what the two chunked types can use."""
    chunked = sparsity_type in ("norm", "lsh") and factor > 1 and window < block
    return not chunked or (block % window == 0 and window % factor == 0)


@st.composite
def cases(draw):
    """A pattern, queries, keys and values in float64, and which text tokens are visible."""
    block = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    factor = draw(st.sampled_from([f for f in range(1, block + 1) if block % f == 0]))
    sparsity_type = draw(st.sampled_from(TYPES))
    window = draw(st.integers(1, 2 * block + 1))
    assume(is_legal(sparsity_type, block, window, factor))
    num_globals, num_rounds = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    pattern = LSGPattern(
        num_globals, block, sparsity_type, window, factor, num_rounds, draw(st.sampled_from([1, 1, 2]))
    )
    short = st.integers(1, pattern.full_length)
    length = draw(st.one_of(short, st.integers(3, 7).map(lambda blocks: blocks * block)))
    batch, heads, width = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = (3, batch, heads, pattern.num_global_tokens + length, width)
    query, key, value = torch.randn(shape, generator=generator, dtype=torch.float64)
    # From no real token in a row to no masked one: padding on either side, holes, whole rows.
    visible = torch.rand(batch, length, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
    padding = draw(st.integers(0, length))
    visible[0, padding:] = draw(st.booleans())
    return pattern, query, key, value, visible


def draw_projections(pattern, key):
    return tuple(drawn[0] for drawn in hash_projections(1, pattern.hash_rounds, key.shape[1], key.shape[-1], seed=7))


def from_oracle(pattern, query, key, value, visible):
    return oracle_attention(
        query, key, value, visible,
        num_global_tokens=pattern.num_global_tokens, block_size=pattern.block_size,
        sparse_block_size=pattern.sparse_block_size, sparsity_factor=pattern.sparsity_factor,
        sparsity_type=pattern.sparsity_type, neighbours=pattern.neighbours,
        projections=[p.to(key.dtype) for p in draw_projections(pattern, key)],
    )  # fmt: skip


@pytest.fixture(params=[1, 2**22], ids=["one_block_chunks", "one_chunk"])
def chunk_bytes(request, monkeypatch):
    """How the blocks are gone through on the CPU: one by one, or all of the small ones here at once."""
    monkeypatch.setattr(lsg_cpu, "CHUNK_BYTES", request.param)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), st.sampled_from(IMPLEMENTATIONS))
def test_context_and_map_are_the_oracles(chunk_bytes, case, implementation):
    pattern, query, key, value, visible = case
    projections = draw_projections(pattern, key)
    context = lsg_attention(query, key, value, visible, pattern, projections, implementation)
    attention_map = lsg_attention_map(query, key, visible, pattern, projections)
    expected_context, expected_map = from_oracle(*case)
    torch.testing.assert_close(context, expected_context, rtol=0, atol=1e-10)
    torch.testing.assert_close(attention_map, expected_map, rtol=0, atol=1e-10)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases(), st.sampled_from(IMPLEMENTATIONS))
def test_gradients_are_the_oracles(chunk_bytes, case, implementation):
    pattern, *inputs, visible = case
    cotangent = torch.randn_like(inputs[2])

    def gradients(attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad((attention(*leaves) * cotangent).sum(), leaves)

    projections = draw_projections(pattern, inputs[1])
    ours = gradients(lambda q, k, v: lsg_attention(q, k, v, visible, pattern, projections, implementation))
    expected = gradients(lambda q, k, v: from_oracle(pattern, q, k, v, visible)[0])
    for name, gradient, expected_gradient in zip(("query", "key", "value"), ours, expected, strict=True):
        torch.testing.assert_close(
            gradient, expected_gradient, rtol=0, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


@settings(max_examples=40, deadline=None)
@given(cases())
def test_rows_of_the_map_sum_to_one_and_give_the_context(case):
    pattern, query, key, value, visible = case
    projections = draw_projections(pattern, key)
    attention_map = lsg_attention_map(query, key, visible, pattern, projections)
    context = lsg_attention(query, key, value, visible, pattern, projections)
    torch.testing.assert_close(attention_map.sum(-1), torch.ones_like(attention_map[..., 0]))
    torch.testing.assert_close(attention_map @ value, context)
    masked = ~F.pad(visible, (pattern.num_global_tokens, 0), value=True)
    assert (attention_map.transpose(-1, 1)[masked] == 0).all(), "a masked token was attended to"


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(1, 3))
def test_right_padding_by_whole_blocks_changes_nothing(case, blocks):
    pattern, query, key, value, visible = case
    length = visible.shape[1]
    assume(length >= pattern.full_length)
    projections = draw_projections(pattern, key)
    padding = blocks * pattern.block_size
    longer = [
        torch.cat([x, torch.randn_like(x[:, :, :1]).expand(-1, -1, padding, -1)], 2) for x in (query, key, value)
    ]
    padded = lsg_attention(*longer, F.pad(visible, (0, padding)), pattern, projections)
    alone = lsg_attention(query, key, value, visible, pattern, projections)
    torch.testing.assert_close(padded[:, :, : alone.shape[2]], alone)


@pytest.mark.parametrize("sparsity_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_near_the_exact_answer(sparsity_type, dtype):
    pattern = LSGPattern(2, 16, sparsity_type, 16, 4, 1)
    # Values that every dtype holds exactly: what differs is the arithmetic, not the input.
    query, key, value = torch.randn(3, 2, 4, 2 + 80, 16).bfloat16().to(torch.float16).double()
    visible = torch.rand(2, 80) < 0.8
    projections = draw_projections(pattern, key)
    exact = lsg_attention(query, key, value, visible, pattern, projections)
    low = lsg_attention(query.to(dtype), key.to(dtype), value.to(dtype), visible, pattern, projections)
    assert low.dtype == dtype
    # A pooled key is rounded once, and a score of about 8 once more; both enter the weights through exp.
    assert (low.double() - exact).abs().max() < 32 * torch.finfo(dtype).eps * value.abs().max()


def test_more_global_tokens_than_text_are_the_oracles():
    for length in (3, 16):
        pattern = LSGPattern(40, 4, "pooling", 4, 2)
        query, key, value = torch.randn(3, 1, 2, 40 + length, 4, dtype=torch.float64)
        visible = torch.rand(1, length) < 0.8
        context = lsg_attention(query, key, value, visible, pattern)
        torch.testing.assert_close(context, from_oracle(pattern, query, key, value, visible)[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_large_scores_do_not_overflow_in_float16(sparsity_type, implementation):
    pattern = LSGPattern(1, 4, sparsity_type, 4, 2)
    query = key = torch.full((1, 1, 17, 64), 40.0, dtype=torch.float16)  # their product is above float16's largest
    value = torch.randn(1, 1, 17, 64, dtype=torch.float16)
    visible = torch.ones(1, 16, dtype=torch.bool)
    context = lsg_attention(query, key, value, visible, pattern, draw_projections(pattern, key), implementation)
    assert torch.isfinite(context).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity_type", TYPES)
def test_autocast_gives_what_half_precision_inputs_give(sparsity_type, dtype, implementation):
    pattern = LSGPattern(2, 8, sparsity_type, 8, 4, 1)
    query, key, value = torch.randn(3, 2, 4, 2 + 32, 16).to(dtype)
    visible = torch.rand(2, 32) < 0.8
    projections = draw_projections(pattern, key)
    expected = lsg_attention(query, key, value, visible, pattern, projections, implementation)
    with torch.autocast("cpu", dtype):
        actual = lsg_attention(query, key, value, visible, pattern, projections, implementation)
    torch.testing.assert_close(actual.to(dtype), expected)


def test_a_text_of_many_blocks_is_dense_attention_under_a_mask():
    """Without a sparse part: every query sees the global tokens, its own block and one on each side; globals see all."""
    num_globals, length, block = 2, 80, 16
    query, key, value = torch.randn(3, 2, 4, num_globals + length, 8, dtype=torch.float64)
    visible = torch.ones(2, length, dtype=torch.bool)
    visible[1, 50:] = False
    context = lsg_albert.lsg_attention(query, key, value, visible, lsg_albert.LSGPattern(num_globals, block))
    is_global = torch.arange(num_globals + length) < num_globals
    place = (torch.arange(num_globals + length) - num_globals) // block
    near = (place[:, None] - place).abs() <= 1
    seen = (near | is_global | is_global[:, None]) & F.pad(visible, (num_globals, 0), value=True)[:, None]
    scores = query @ key.mT / 8**0.5
    expected = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1) @ value
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-12)


def test_usual_sizes_are_the_oracles():
    pattern = LSGPattern(
        num_global_tokens=1, block_size=128, sparsity_type="norm", sparse_block_size=128, sparsity_factor=4
    )
    query, key, value = torch.randn(3, 1, 2, 1 + 640, 16)
    visible = torch.ones(1, 640, dtype=torch.bool)
    visible[0, 600:] = False
    context = lsg_attention(query, key, value, visible, pattern)
    torch.testing.assert_close(context.double(), from_oracle(pattern, query, key, value, visible)[0], **FLOAT32)


def arguments(**changed):
    """Of a text of three blocks, with some of them changed."""
    query, key, value = torch.randn(3, 2, 4, 1 + 12, 8)
    usual = {"query": query, "key": key, "value": value, "visible": torch.ones(2, 12, dtype=torch.bool)}
    return {**usual, "pattern": LSGPattern(1, 4, "pooling", 4, 2), **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"query": torch.zeros(2, 13, 8)}, r"`query` must have four dimensions.*got the shape \(2, 13, 8\)"),
        ({"query": torch.zeros(2, 4, 13, 8, dtype=torch.long)}, "`query` must have a floating-point dtype, got torch.int64"),
        ({"key": torch.zeros(2, 4, 12, 8)}, r"`key` must have four dimensions.*as in \(2, 4, 13, 8\)"),
        ({"key": torch.zeros(2, 4, 13, 6)}, r"`key` must have the shape of `query`, \(2, 4, 13, 8\), got \(2, 4, 13, 6\)"),
        ({"key": torch.zeros(2, 4, 13, 8).double()}, "`key` must have the dtype of `query`, torch.float32, got torch.float64"),
        ({"value": torch.zeros(2, 1, 13, 8)}, r"`value` must have four dimensions.*got the shape \(2, 1, 13, 8\)"),
        ({"value": torch.zeros(2, 4, 13, 8).half()}, "`value` must have the dtype of `query`, torch.float32, got torch.float16"),
        ({"pattern": LSGPattern(20, 4)}, "`query` must begin with the 20 global tokens, got 13 tokens in all"),
        ({"visible": torch.ones(2, 12)}, "`visible` must be boolean.*got torch.float32"),
        ({"visible": torch.ones(2, 13, dtype=torch.bool)}, r"`visible` must have the shape \(batch, length\) = \(2, 12\)"),
        ({"visible": torch.ones(2, 1, 12, dtype=torch.bool)}, r"`visible` must have the shape.*got \(2, 1, 12\)"),
        ({"pattern": LSGPattern(1, 5)}, r"`visible` has the length 12: above 10, the length must be a multiple of `block_size` \(5\)"),
        ({"pattern": LSGPattern(1, 4, "norn", 4, 2)}, "`sparsity_type` 'norn' is unknown"),
        ({"pattern": LSGPattern(1, 4, "lsh", 4, 2)}, r"`projections` must be tensors of the shapes \[\(4, 8, 1\)\]"),
        ({"implementation": "flash"}, "`implementation` 'flash' is unknown. Choose from 'sdpa', 'eager', 'flex_attention'"),
        ({"dropout": 1.5}, "`dropout` must be a number from 0 to 1, got 1.5"),
        ({"implementation": "flex_attention", "dropout": 0.1}, '`dropout` must be 0 with "flex_attention"'),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(changed, message):
    assert lsg_attention(**arguments()).shape == (2, 4, 13, 8)
    with pytest.raises(ValueError, match=message):
        lsg_attention(**arguments(**changed))


def test_a_batch_without_rows_has_an_empty_context():
    for length in (8, 12):
        query, key, value = torch.zeros(3, 0, 4, 1 + length, 8)
        visible = torch.ones(0, length, dtype=torch.bool)
        assert lsg_attention(query, key, value, visible, LSGPattern(1, 4, "norm", 4, 2)).shape == query.shape


def test_values_may_have_another_width():
    assert lsg_attention(**arguments(value=torch.zeros(2, 4, 13, 3))).shape == (2, 4, 13, 3)


def test_eager_and_sdpa_agree_also_without_visible_text():
    query, key, value = torch.randn(3, 2, 4, 9, 8)
    visible = torch.zeros(2, 1, 1, 9, dtype=torch.bool)
    visible[..., 0] = True
    expected = value[:, :, :1].expand_as(value)
    for attention in (eager_attention, sdpa_attention):
        torch.testing.assert_close(attention(query, key, value, visibility_bias(visible, query.dtype)), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_as_near_the_exact_ones_as_those_of_torch(dtype):
    query, key, value, grad = (torch.randn(2, 3, 8, 16).to(dtype) for _ in range(4))
    visible = torch.rand(1, 3, 1, 8) < 0.8
    visible[..., 0] = True
    bias = visibility_bias(visible, dtype)

    def by_torch(dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        return torch.autograd.grad(sdpa_attention(*inputs, bias.to(dtype)), inputs, grad.to(dtype))

    found = attention_gradients(query, key, value, bias, grad)
    for ours, exact, torchs in zip(found, by_torch(torch.float64), by_torch(dtype), strict=True):
        error, allowed = ((x.double() - exact).abs().max() for x in (ours, torchs))
        assert error <= 2 * allowed + 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_dropout_drops_and_keeps_the_mean():
    query, key = torch.zeros(2, 1, 1, 400, 4)
    visible = torch.ones(1, 1, 1, 400, dtype=torch.bool)
    for attention in (eager_attention, sdpa_attention):
        weights = attention(
            query, key, torch.eye(400)[None, None], visibility_bias(visible, query.dtype), dropout=0.25
        )
        assert 0.24 < (weights == 0).float().mean() < 0.26
        assert abs(weights.sum(-1).mean() - 1) < 0.01


def test_time_and_memory_shapes_are_linear_in_the_length():
    """No tensor of the computation is larger than a constant times the length."""
    pattern = LSGPattern(1, 8, "norm", 8, 2)
    largest = {}
    for length in (256, 1024):
        query, key, value = torch.randn(3, 1, 1, 1 + length, 4)

        class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, length=length):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor):
                    largest[length] = max(largest.get(length, 0), out.untyped_storage().nbytes())
                return out

        with Sizes():
            lsg_attention(query, key, value, torch.ones(1, length, dtype=torch.bool), pattern)
    assert largest[1024] <= 4.1 * largest[256]
