"""FlexAttention against windows of keys. Uncompiled it is the same mathematics, and quick to test on many patterns."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lsg_albert import lsg_flex
from lsg_albert.lsg_functional import lsg_attention
from lsg_albert.lsg_pattern import SPARSITY_TYPES
from lsg_albert.modeling_lsg_albert import LSGAlbertModel
from test_lsg_functional import cases, draw_projections
from test_lsg_padding import ragged_inputs


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(lsg_flex, "compiled_flex_attention", lambda device_type: lsg_flex.flex_attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cases())
def test_the_mask_lets_through_what_the_windows_hold(uncompiled, case):
    pattern, query, key, value, visible = case
    inputs = query, key, value, visible, pattern, draw_projections(pattern, key)
    torch.testing.assert_close(lsg_attention(*inputs, "flex_attention"), lsg_attention(*inputs, "eager"))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_key_that_is_seen_is_in_a_tile_that_is_visited(case):
    """The kernel passes over other tiles, whatever the mask says; small tiles make the test a sharp one."""
    pattern, _, key, _, visible = case
    if visible.shape[1] <= pattern.full_length:
        return
    num_rows, num_heads = visible.shape[0], key.shape[1]
    num_blocks = visible.numel() // pattern.block_size
    row = torch.arange(num_rows).repeat_interleave(num_blocks // num_rows)
    num_globals = num_rows * pattern.num_global_tokens
    num_sparse = 0 if pattern.sparsity_type is None else num_blocks * pattern.sparse_per_block
    num_keys = num_globals + num_sparse + visible.numel()
    owner = torch.cat(
        [
            torch.arange(num_rows).repeat_interleave(pattern.num_global_tokens),
            row.repeat_interleave(num_sparse // num_blocks),
            row.repeat_interleave(pattern.block_size),
        ]
    )[None].expand(num_heads, -1)
    places = num_globals, num_globals + num_sparse
    sees = lsg_flex.mask_of_keys(owner, row, *places, pattern)
    tile = 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lsg_flex, "TILE", tile)
        count, index = lsg_flex.tiles_of_keys(row, *places, num_keys, pattern)
    q, k = torch.arange(visible.numel())[:, None], torch.arange(num_keys)
    seen = sees(torch.tensor(0), torch.tensor(0), q, k)
    for query_tile in range(count.shape[-1]):
        visited = index[0, 0, query_tile, : count[0, 0, query_tile]].tolist()
        needed = seen[query_tile * tile : (query_tile + 1) * tile].any(0).nonzero().flatten() // tile
        assert set(needed.tolist()) <= set(visited) and len(set(visited)) == len(visited)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_a_model_gives_what_it_gives_with_sdpa(uncompiled, tiny_config, sparsity_type):
    model = LSGAlbertModel(tiny_config(sparsity_type=sparsity_type)).eval()
    inputs = ragged_inputs()
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
        model.set_attn_implementation("flex_attention")
        actual = model(**inputs).last_hidden_state
        short = model(
            inputs["input_ids"][:, :9]
        ).last_hidden_state  # two blocks and fewer: every token sees every other
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(short).all()


def test_training_on_the_cpu_and_dropout_are_refused(tiny_config):
    model = LSGAlbertModel(tiny_config(attn_implementation="flex_attention", attention_probs_dropout_prob=0.1))
    with pytest.raises(ValueError, match=r'"flex_attention".*no backward pass on the CPU.*"sdpa"'):
        model.eval()(**ragged_inputs())
    with pytest.raises(ValueError, match=r"`attention_probs_dropout_prob` is 0.1.*no dropout.*\"sdpa\""):
        model.train()(**ragged_inputs())


@pytest.mark.slow
@pytest.mark.parametrize("sparsity_type", ["norm", "none"])
def test_compiled_it_gives_what_sdpa_gives(tiny_config, sparsity_type):
    sizes = {"hidden_size": 64, "block_size": 32, "sparse_block_size": 32, "max_position_embeddings": 512}
    model = LSGAlbertModel(tiny_config(sparsity_type=sparsity_type, **sizes)).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        for lengths in ([300, 120], [200, 80]):  # a second length is compiled anew
            inputs = ragged_inputs(lengths)
            model.set_attn_implementation("sdpa")
            expected = model(**inputs).last_hidden_state
            model.set_attn_implementation("flex_attention")
            torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity_type", ["norm", "pooling", "none"])
def test_gradients_on_a_gpu_are_those_of_sdpa(tiny_config, sparsity_type):
    sizes = {"hidden_size": 64, "block_size": 32, "sparse_block_size": 32, "max_position_embeddings": 512}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = LSGAlbertModel(tiny_config(sparsity_type=sparsity_type, **sizes, **no_dropout)).cuda().train()
    inputs = {name: x.cuda() for name, x in ragged_inputs([300, 120]).items()}
    real = inputs["attention_mask"].bool()
    gradients = []
    for implementation in ("sdpa", "flex_attention"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(**inputs).last_hidden_state[real].square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
