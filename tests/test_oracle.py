"""The oracle against the golden cases of the published implementation, and against its own laws."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lsg_albert.lsg_pattern import SPARSITY_TYPES
from oracle import lsh_buckets, oracle_attention, oracle_encoder

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "public"
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}  # as in the golden checker
CORRECTED = ("intended_exact_mean", "exact_mean", "intended")  # where there is one, it is what the oracle computes
CASES = [
    "block_stride_types_len45_pad",
    "bos_pooling_b8s8f2_len45_pad",
    "err_norm_b12s12f4_len45",
    "groups2x2_norm_len45_pad",
    "lsh_b16s8f4_r2_len77_pad",
    "lsh_is_bos_pooling_b16s4f4_len64",
    "none_b16_len80",
    "norm_b16s8f1_len70",
    "norm_b8s10f2_len80_pad",
    "norm_hidden_states_len37",
    "norm_len16_full",
    "norm_len40_row_all_masked",
    "norm_maskfirst_poolfalse_len45",
    "norm_positions_1row_len45",
    "pooling_b16s6f2_len70",
    "pooling_embeds_len45_pad",
    "stride_b8s8f8_len80",
]


@pytest.mark.parametrize("name", CASES)
def test_oracle_encoder_matches_golden_case(name: str) -> None:
    if not GOLDEN.is_dir():
        pytest.skip(f"no golden cases at {GOLDEN}")
    case, tensors = json.loads((GOLDEN / f"{name}.json").read_text()), load_file(GOLDEN / f"{name}.safetensors")
    draws = None
    if case["lsh"]:
        flat = [tensors[f"draw.{i}"][0, :, 0] for i in range(len(case["lsh"]["draw_shapes"]))]
        rounds = case["config"]["lsh_num_pre_rounds"] + 1
        draws = [flat[i : i + rounds] for i in range(0, len(flat), rounds)]
    inputs = {key: tensors[key] for key in case["inputs"]}
    output = oracle_encoder(
        load_file(GOLDEN / case["shared_weights"]), case["config"], **inputs, projections_per_layer=draws
    )

    label = next((f"alt.{label}." for label in CORRECTED if label in case["alternatives"]), "expected.")
    keep = tensors["compare_mask"]  # (n, t), True = compare
    atol, num_globals = TOLERANCE[case["dtype"]], case["config"]["num_global_tokens"]
    for key in case["outputs"]:
        actual, expected = output[key], tensors[label + key].double()
        if key in case["masked_outputs"]:
            actual, expected = actual[keep], expected[keep]
        elif "compare_rows" in tensors:
            actual, expected = actual[tensors["compare_rows"]], expected[tensors["compare_rows"]]
        torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    for i, state in enumerate(output["hidden_states"]):
        if (raw := tensors.get(f"extra.hidden_states.{i}")) is not None:  # globals first, adaptive padding kept
            text = raw[:, num_globals : num_globals + keep.shape[1]]
            torch.testing.assert_close(state[keep], text[keep], rtol=0, atol=atol)


def attention_inputs(num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random query, key, value (2, 4, 2 + T, 3) and `visible` (2, T), whose last row ends in 7 masked tokens."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 2 + num_tokens, 3, dtype=torch.float64, generator=generator)
    visible = torch.rand(2, num_tokens, generator=generator) < 0.8
    visible[1, -7:] = False
    return query, key, value, visible


def settings(sparsity_type: str | None, factor: int = 2) -> dict:
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(4, 3, buckets // 2, generator=generator) for buckets in (4, 4 // factor)]
    sizes = {"num_global_tokens": 2, "block_size": 4, "sparse_block_size": 5, "sparsity_factor": factor}
    return {**sizes, "sparsity_type": sparsity_type, "projections": draws}


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_oracle_attention_map_is_a_distribution_over_visible_tokens(sparsity_type: str, factor: int) -> None:
    query, key, value, visible = attention_inputs(num_tokens=24)
    context, attention_map = oracle_attention(query, key, value, visible, **settings(sparsity_type, factor))
    torch.testing.assert_close(attention_map.sum(-1), torch.ones_like(attention_map[..., 0]))
    torch.testing.assert_close(attention_map @ value, context)
    assert (attention_map >= 0).all()
    assert (attention_map[..., 2:].movedim(-1, 1)[~visible] == 0).all()


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_oracle_attention_is_plain_attention_up_to_two_blocks(sparsity_type: str) -> None:
    query, key, value, visible = attention_inputs(num_tokens=8)
    context, _ = oracle_attention(query, key, value, visible, **settings(sparsity_type))
    mask = torch.cat([torch.ones(2, 2, dtype=torch.bool), visible], dim=1)[:, None, None]
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(context, plain)


def test_lsh_buckets_are_ordered_by_direction() -> None:
    """Bucket `argmax [z, -z]`; a window edge inside a chunk makes the order matter, which no golden case shows."""
    key = torch.tensor([[0.0, -3.0], [-2.0, 0.0], [0.0, 1.0], [5.0, 1.0], [4.0, 0.0], [9.0, 0.0]], dtype=torch.float64)
    visible = torch.tensor([True, True, True, True, True, False])
    assert lsh_buckets(range(6), key, visible, 4, [torch.eye(2)]) == [[3, 4], [2], [1], [0]]
    assert lsh_buckets(range(6), key, visible, 5, [torch.eye(2)]) == [[3, 4], [2], [1], [0], []]


def test_lsh_buckets_hash_the_sum_of_the_keys_of_the_round_before() -> None:
    """Tokens 0 and 1 meet in the first round; their sum (-1.1, 6) goes to bucket 1, token 0 alone would go to 0."""
    key = torch.tensor([[1.9, 2.0], [-3.0, 4.0], [5.0, 1.0]], dtype=torch.float64)
    first_axis = torch.tensor([[1.0], [0.0]])
    second_axis = torch.tensor([[0.0], [1.0]])
    visible = torch.ones(3, dtype=torch.bool)
    assert lsh_buckets(range(3), key, visible, 2, [first_axis]) == [[0, 2], [1]]
    assert lsh_buckets(range(2), key, visible, 2, [second_axis, first_axis]) == [[], [0, 1]]


def test_oracle_attention_lsh_with_one_bucket_is_pooling() -> None:
    inputs = attention_inputs(num_tokens=24)
    lsh, pooling = (oracle_attention(*inputs, **settings(kind, factor=4))[1] for kind in ("lsh", "pooling"))
    torch.testing.assert_close(lsh, pooling)


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_oracle_attention_has_gradients(sparsity_type: str) -> None:
    query, key, value, visible = attention_inputs(num_tokens=12)

    def context(*qkv: Tensor) -> Tensor:
        return oracle_attention(*qkv, visible, **settings(sparsity_type))[0]

    inputs = [x.requires_grad_() for x in (query, key, value)]
    assert torch.autograd.gradcheck(context, inputs, fast_mode=True)
