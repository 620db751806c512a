"""The sparse selections one by one, on cases small enough to be written down."""

import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from lsg_albert.lsg_pattern import SPARSITY_TYPES, LSGPattern
from lsg_albert.lsg_sparsity import (
    cluster,
    first_query_weights,
    hash_projections,
    hashed,
    largest_norms,
    mean_weights,
    select_sparse_tokens,
    strided,
    weighted_sum,
)


def tokens(*values):
    """One row and head of tokens with these keys, and their number as values, all visible."""
    key = torch.tensor(values, dtype=torch.float64)[None, None, :, None]
    value = torch.arange(len(values), dtype=torch.float64)[None, None, :, None]
    return key, value, torch.ones(1, 1, len(values), dtype=torch.bool)


def test_largest_norms_are_kept_per_chunk_by_ascending_norm():
    key, value, visible = tokens(5, -1, 7, 2, 1, -9, 3, 4)
    chosen = largest_norms(key, value, visible, chunk_size=4, factor=2)
    assert chosen.value.flatten().tolist() == [0, 2, 7, 5]
    assert chosen.key.flatten().tolist() == [5, 7, 4, -9]
    assert chosen.visible.all()


def test_largest_norms_take_masked_tokens_last_and_leave_them_masked():
    key, value, visible = tokens(5, -1, 7, 2)
    visible[..., [0, 2, 3]] = False
    chosen = largest_norms(key, value, visible, chunk_size=4, factor=2)
    assert chosen.value.flatten()[1] == 1
    assert chosen.visible.flatten().tolist() == [False, True]


@pytest.mark.parametrize(
    ("run", "expected"),
    [(1, [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14]]), (2, [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13]])],
)
def test_strides_differ_from_head_to_head(run, expected):
    value = torch.arange(16.0).view(1, 1, 16, 1).expand(2, 3, 16, 1)
    visible = torch.ones(2, 1, 16, dtype=torch.bool)
    visible[1, 0, 4] = False
    chosen = strided(value, value, visible, factor=4, run=run)
    assert chosen.value[1, :, :, 0].tolist() == expected
    assert torch.equal(chosen.visible[1], chosen.value[1, :, :, 0] != 4)
    assert chosen.visible[0].all()


def test_pooling_is_the_exact_mean_of_the_visible():
    _, value, visible = tokens(0, 0, 0, 0, 0, 0)
    visible[..., [1, 4, 5]] = False
    weights, seen = mean_weights(visible, 2, torch.float64)
    assert weighted_sum(weights, value).flatten().tolist() == [0, 2.5, 0]
    assert seen.flatten().tolist() == [True, True, False]


def test_half_precision_pools_in_float32():
    # Added one by one in float16 above 2048, ones are lost.
    value = torch.ones(1, 1, 4096, 1, dtype=torch.float16)
    weights = torch.ones(1, 1, 1, 4096)
    assert weighted_sum(weights, value).item() == 4096


def test_first_query_weighs_a_chunk_by_its_softmax():
    key, value, visible = tokens(1, 2, 3, 4)
    visible[..., 1] = False
    query = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    weights, seen = first_query_weights(query, key, visible, 2)
    torch.testing.assert_close(
        weights[0, 0], torch.stack([torch.tensor([1.0, 0]), torch.tensor([6.0, 8]).softmax(0)]).double()
    )
    assert seen.all()


def test_hashing_joins_what_points_the_same_way():
    """Tokens in four directions; a projection on the axes tells the directions apart."""
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    which = torch.tensor([0, 2, 0, 3, 1, 2, 0, 3])
    key = (directions[which] * torch.arange(1, 9)[:, None])[None, None]
    value = torch.eye(8, dtype=torch.float64)[None, None]
    visible = torch.ones(1, 1, 8, dtype=torch.bool)
    visible[..., 6] = False
    projection = torch.eye(2, dtype=torch.float64)[None]
    chosen = hashed(key, value, visible, 8, (4,), (projection,))
    # Bucket i holds the tokens of direction i: the axes first, then their opposites.
    for bucket in range(4):
        members = [j for j in range(8) if which[j] == bucket and j != 6]
        expected = torch.zeros(8, dtype=torch.float64)
        expected[members] = 1 / len(members)
        torch.testing.assert_close(chosen.value[0, 0, bucket], expected)
        torch.testing.assert_close(chosen.key[0, 0, bucket], key[0, 0, members].mean(0))
    assert chosen.visible.all()


def test_one_bucket_takes_all_and_an_odd_last_one_stays_empty():
    key, visible = torch.randn(1, 1, 1, 5, 3), torch.tensor([1.0, 0, 1, 1, 1]).reshape(1, 1, 1, 5)
    assert torch.equal(cluster(key, visible, (1,), (torch.empty(1, 3, 0),)), visible[..., None, :])
    members = cluster(key, visible, (5,), (torch.randn(1, 3, 2),))
    assert members.shape == (1, 1, 1, 5, 5)
    assert torch.equal(members.sum(3), visible) and not members[..., 4, :].any()


def test_a_round_hashes_the_sums_of_the_round_before_it():
    """The first token is nearest to the first axis, but its sum with the second, near the same diagonal, is not."""
    key = torch.tensor([[5.0, 1], [1, 6], [4, -3]])[None, None, None]
    axes, diagonals = torch.eye(2)[None], torch.tensor([[[1.0, 1], [-1, 1]]])
    visible = torch.ones(1, 1, 1, 3)
    assert cluster(key, visible, (4,), (axes,))[0, 0, 0].tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    members = cluster(key, visible, (4, 4), (diagonals, axes))
    assert members[0, 0, 0].tolist() == [[0, 0, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_a_factor_of_one_keeps_everything():
    query, (key, value) = torch.randn(2, 3, 2, 4), torch.randn(2, 2, 3, 8, 4)
    visible = torch.rand(2, 1, 8) < 0.5
    for kind in set(SPARSITY_TYPES) - {"none"}:
        chosen = select_sparse_tokens(query, key, value, visible, LSGPattern(1, 4, kind, 4, 1))
        assert chosen.key is key and chosen.value is value and chosen.visible is visible


def test_hash_rounds_are_those_of_the_pattern():
    assert LSGPattern(1, 16, "lsh", 8, 4, 2).hash_rounds == (8, 8, 2)
    assert LSGPattern(1, 16, "lsh", 32, 4, 0).hash_rounds == (4,)
    assert LSGPattern(1, 16, "lsh", 4, 4, 1).hash_rounds == ()  # this is bos_pooling
    assert LSGPattern(1, 16, "lsh", 8, 1, 1).hash_rounds == ()
    assert LSGPattern(1, 16, "norm", 8, 4, 1).hash_rounds == ()


def test_projections_are_the_published_codes_after_the_same_seed():
    projections = hash_projections(2, (8, 3), 4, 6, seed=5)
    torch.manual_seed(5)
    for call in range(2):
        for drawn, num_buckets in zip(projections, (8, 3), strict=True):
            assert torch.equal(drawn[call], torch.randn(1, 4, 1, 6, num_buckets // 2)[0, :, 0])


def test_projections_are_the_same_in_every_process():
    code = (
        "import sys, torch, types; torch.manual_seed(int(sys.argv[2])); torch.set_default_dtype(torch.float64); "
        "package = sys.modules['package'] = types.ModuleType('package'); package.__path__ = [sys.argv[1]]; "
        "from package import lsg_sparsity; "
        "print(lsg_sparsity.hash_projections(1, (6,), 2, 3, seed=0)[0].flatten().tolist())"
    )
    printed = [
        subprocess.run([sys.executable, "-c", code, str(ROOT), str(i)], capture_output=True, text=True, check=True)
        for i in range(2)
    ]
    assert printed[0].stdout == printed[1].stdout
    assert printed[0].stdout.strip() == str(hash_projections(1, (6,), 2, 3, seed=0)[0].flatten().tolist())


def test_projections_without_a_seed_differ_and_follow_the_global_generator():
    torch.manual_seed(1)
    first, second = (hash_projections(1, (6,), 2, 3)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(hash_projections(1, (6,), 2, 3)[0], first)
