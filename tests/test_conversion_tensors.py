"""The pure core of the conversion."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AlbertConfig, AlbertForMaskedLM

from lsg_albert.conversion.tensors import convert_state_dict, embeddings_prefix, make_global_table, order_positions


@pytest.fixture
def golden(shared):
    folder = shared / "golden" / "public" / "conversion"
    expected = json.loads((folder / "expected_512.json").read_text())
    state_dict = load_file(folder / "source_512" / "model.safetensors")
    return state_dict, expected, folder


def convert(state_dict, **options):
    return convert_state_dict(state_dict, **{"max_length": 1000, "bos_token_id": 2, "mask_token_id": 4, **options})


def test_global_tables_are_those_of_the_published_conversion(golden):
    state_dict, expected, folder = golden
    tables = load_file(folder / "expected_512_globals.safetensors")
    for case in expected["global_tables"]:
        converted = convert(state_dict, stride=case["global_positional_stride"], use_token_type=case["use_token_ids"])
        torch.testing.assert_close(
            converted["albert.embeddings.global_embeddings.weight"], tables[case["tensor"]], rtol=0, atol=1e-6
        )


def test_positions_are_those_of_the_published_conversion(golden):
    state_dict, expected, folder = golden
    rows = load_file(folder / "expected_512_positions.safetensors")
    name = "albert.embeddings.position_embeddings.weight"
    for length in expected["max_sequence_lengths"]:
        converted = convert(state_dict, max_length=length)[name]
        assert torch.equal(converted, state_dict[name][rows[f"position_source_row.{length}"].long()])


def test_global_tables_of_an_lsg_source_are_those_of_the_published_conversion(shared):
    folder = shared / "golden" / "public" / "conversion"
    state_dict = load_file(folder / "source_lsg_512" / "model.safetensors")
    tables = load_file(folder / "expected_lsg_512_globals.safetensors")
    for case in json.loads((folder / "expected_lsg_512.json").read_text())["global_tables"]:
        converted = convert(
            state_dict,
            max_length=case["max_sequence_length"],
            stride=case["global_positional_stride"],
            use_token_type=case["use_token_ids"],
            keep_globals=case["resize_lsg"],
            keep_first_global=case["keep_first_global_token"],
        )
        torch.testing.assert_close(
            converted["albert.embeddings.global_embeddings.weight"], tables[case["tensor"]], rtol=0, atol=1e-6
        )
        assert len(converted["albert.embeddings.position_embeddings.weight"]) == case["max_sequence_length"]


def test_an_lsg_source_is_not_changed(shared):
    state_dict = load_file(shared / "golden" / "public" / "conversion" / "source_lsg_512" / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in state_dict.items()}
    for options in ({"keep_globals": True}, {"keep_first_global": True}, {}):
        convert(state_dict, **options)
    assert all(torch.equal(state_dict[name], before[name]) for name in before)


@pytest.mark.parametrize("option", ["keep_globals", "keep_first_global"])
def test_globals_that_do_not_exist_cannot_be_kept(source, option):
    with pytest.raises(ValueError, match="no global tokens to keep"):
        convert(source, **{option: True})


@pytest.fixture
def source():
    config = AlbertConfig(
        vocab_size=50, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16,
        num_hidden_layers=1, max_position_embeddings=512,
    )  # fmt: skip
    return AlbertForMaskedLM(config).state_dict()


def test_all_else_is_copied_and_nothing_of_the_source_changed(source):
    before = {name: tensor.clone() for name, tensor in source.items()}
    converted = convert(source)
    made = {"albert.embeddings.global_embeddings.weight", "albert.embeddings.position_embeddings.weight"}
    assert converted.keys() == source.keys() | made
    assert all(converted[name] is source[name] for name in source.keys() - made)
    assert source.keys() == before.keys() and all(torch.equal(source[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tables_keep_the_dtype(source, dtype):
    converted = convert({name: tensor.to(dtype) for name, tensor in source.items()})
    assert {tensor.dtype for tensor in converted.values()} == {dtype}


def test_random_globals_follow_the_words(source):
    words, positions = torch.randn(2000, 8) @ torch.randn(8, 8) + 3, torch.zeros(512, 8)
    table = make_global_table(words, positions, None, 2, 4, random_globals=True, seed=1)
    assert torch.equal(table[0], words[2])
    assert torch.equal(table, make_global_table(words, positions, None, 2, 4, random_globals=True, seed=1))
    assert not torch.equal(table, make_global_table(words, positions, None, 2, 4, random_globals=True, seed=2))
    deviation = words.std(0)
    assert ((table[1:].mean(0) - words.mean(0)) / deviation).abs().max() < 0.2
    assert (table[1:].T.cov() - words.T.cov()).abs().max() < 0.25 * words.T.cov().abs().max()


def test_short_source_draws_the_missing_positions_from_the_seed():
    words, positions = torch.randn(50, 8), torch.randn(100, 8)
    state = torch.get_rng_state()
    first, again, other = (make_global_table(words, positions, None, 2, 4, stride=1, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[:100, :] - other[:100, :], torch.zeros(100, 8))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_globals_need_no_mask_token(source):
    assert "albert.embeddings.global_embeddings.weight" in convert(source, random_globals=True, mask_token_id=None)
    with pytest.raises(ValueError, match="`mask_token_id` must be .* got None"):
        convert(source, mask_token_id=None)


def test_order_positions_names_the_strides_that_work():
    positions = torch.arange(1024.0)[:, None]
    with pytest.raises(ValueError, match="`stride` 7 does not work with 1024 positions.* 2, 4, 8, 16"):
        order_positions(positions, 7)
    for stride in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        assert sorted(order_positions(positions, stride).flatten().tolist()) == list(range(0, 1024, 2))


def test_a_missing_table_and_a_foreign_id_are_named(source):
    with pytest.raises(ValueError, match="word_embeddings"):
        embeddings_prefix({"bert.embeddings.word_embeddings.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="`mask_token_id` must be .* 49, got 50"):
        convert(source, mask_token_id=50)
