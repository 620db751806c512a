"""The geometry of the pattern against the definition, and patterns that cannot be."""

import pytest

from lsg_albert import LSGAlbertConfig, LSGPattern


@pytest.mark.parametrize("neighbours", [1, 2])
@pytest.mark.parametrize("block_size", [1, 4])
def test_full_length_is_the_longest_text_in_which_all_see_all(block_size, neighbours):
    pattern = LSGPattern(1, block_size, neighbours=neighbours)

    def all_see_all(length):
        blocks = range((length - 1) // block_size + 1)
        return all(pattern.text_range.contains(token, block) for block in blocks for token in range(length))

    assert all_see_all(pattern.full_length) and not all_see_all(pattern.full_length + 1)


def test_the_pattern_of_a_configuration():
    config = LSGAlbertConfig(block_size=64, sparse_block_size=32, sparsity_factor=4, sparsity_type="lsh")
    assert LSGPattern.from_config(config) == LSGPattern(1, 64, "lsh", 32, 4, 1)
    for off in ({"sparsity_type": "none"}, {"sparse_block_size": None}, {"sparsity_factor": 0}):
        config = LSGAlbertConfig(num_global_tokens=3, block_size=64, **off)
        assert LSGPattern.from_config(config) == LSGPattern(3, 64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_global_tokens": 0}, "`num_global_tokens` must be an integer of at least 1, got 0"),
        ({"block_size": 16.0}, "`block_size` must be an integer of at least 1, got 16.0"),
        ({"neighbours": 0}, "`neighbours` must be an integer of at least 1, got 0"),
        ({"neighbours": True}, "`neighbours` must be an integer of at least 1, got True"),
        ({"sparse_block_size": 0}, "`sparse_block_size` must be an integer of at least 1, got 0"),
        ({"sparse_block_size": None}, "`sparse_block_size` must be an integer of at least 1, got None"),
        ({"sparsity_factor": 0}, "`sparsity_factor` must be an integer of at least 1, got 0"),
        ({"lsh_num_pre_rounds": -1}, "`lsh_num_pre_rounds` must be an integer of at least 0, got -1"),
        ({"sparsity_factor": 3}, r"`block_size` \(16\) must be divisible by `sparsity_factor` \(3\)"),
        ({"sparse_block_size": 6}, r"`sparse_block_size` \(6\) is below `block_size` \(16\)"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(fields, message):
    usual = {"num_global_tokens": 1, "block_size": 16, "sparsity_type": "norm", "sparse_block_size": 16}
    with pytest.raises(ValueError, match=message):
        LSGPattern(**usual | {"sparsity_factor": 2} | fields)


def test_without_a_sparse_part_its_sizes_do_not_matter():
    assert LSGPattern(1, 16, None, sparse_block_size=0, sparsity_factor=3).sparse_ranges == ()
    assert LSGPattern(1, 16, "none") == LSGPattern(1, 16)
